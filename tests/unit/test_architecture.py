"""What the design promises about who imports whom, who changes identity, and what it costs."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.sandbox import Sandbox, start_command

SPEC = find_spec("mda")
assert SPEC is not None
assert SPEC.origin is not None
PACKAGE = Path(SPEC.origin).parent

# From left and top to right and bottom: a file imports from its own rank's files that
# stand below it, from ranks after it in its own column, and from the vocabulary.
VOCABULARY = ["rights", "config", "log", "wire", "model", "line"]
SESSION_COLUMN = [
    "receiver.session",
    "receiver.tls",
    "receiver.submission",
    "receiver.transaction",
    "receiver.verify",
    "receiver.domains",
    "receiver.textstore",
    "receiver.protocol",
    "receiver.chunks",
    "receiver.dotstream",
    "receiver.proxy",
    "receiver.grammar",
    "receiver.replies",
    "outbound.notice",
    "content.screen",
    "content.headers",
    "content.quoting",
]
BROKER_COLUMN = [
    "broker",
    "answers",
    "recipients.fullname",
    "recipients.listing",
    "recipients.expand",
    "recipients.forward",
    "recipients.aliases",
    "recipients.steering",
    "recipients.destinations",
    "recipients.resolve",
    "recipients.passwd",
    "delivery.copies",
    "delivery.deliver",
    "delivery.command",
    "delivery.quota",
    "delivery.maildir",
    "delivery.mbox",
    "delivery.lock",
    "terminal.terminals",
    "terminal.tty",
    "terminal.sessions",
    "terminal.consent",
    "terminal.rates",
    "terminal.record",
    "outbound.queue",
]
# The run of the queue, a process of its own; of the session's column it uses what reads and
# writes paths and notices.
QUEUE_COLUMN = [
    "outbound.runner",
    "outbound.turned",
    "outbound.attempt",
    "outbound.program",
    "outbound.route",
    "outbound.sender",
    "outbound.sevenbit",
    "outbound.dialogue",
    "outbound.text",
    "outbound.queue",
]
QUEUE_USES = {"outbound.notice", "receiver.domains", "receiver.grammar"}
# Where a process begins, before it is session or broker.
ENTRIES = ["receiver.inetd", "receiver.listener", "receiver.admission", "receiver.peer"]

CHANGES_IDENTITY = re.compile(
    r"^(set(res|re|e|fs)?[ug]id|setgroups|initgroups|capset|prctl|setns|unshare|chroot)$"
)

MUST_NOT_LOAD_BEFORE_GREETING = {
    "click", "asyncio", "logging", "email", "psutil", "filelock", "tomllib", "dataclasses",
    "typing", "re", "enum", "subprocess", "socket", "signal", "tempfile", "pathlib",
    "collections", "contextlib", "ctypes",
}  # fmt: skip
MUST_NEVER_LOAD_IN_BROKER = {
    "email", "html", "mda.receiver.grammar", "mda.receiver.protocol", "mda.receiver.dotstream",
    "mda.receiver.session", "mda.receiver.transaction", "mda.content",
}  # fmt: skip


def files() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below `mda`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports_of(tree: ast.Module) -> set[str]:
    """The files of mda that a module imports at run time, wherever in it."""
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        found |= {name.removeprefix("mda.") for name in names if name.startswith("mda.")}
    return found & set(files())


def test_every_file_has_its_place() -> None:
    placed = {*VOCABULARY, *SESSION_COLUMN, *BROKER_COLUMN, *QUEUE_COLUMN, *ENTRIES, "__main__"}
    assert {name for name in files() if not name.startswith("cli.")} == placed


@pytest.mark.parametrize("column", [SESSION_COLUMN, BROKER_COLUMN, QUEUE_COLUMN, VOCABULARY])
def test_imports_point_right_and_down(column: list[str]) -> None:
    trees = files()
    for place, name in enumerate(column):
        allowed = {*column[place + 1 :], *VOCABULARY}
        if name == "receiver.submission":
            allowed.add("receiver.peer")
        if column is QUEUE_COLUMN:
            allowed |= QUEUE_USES
        if column is VOCABULARY:
            allowed = set(VOCABULARY) - {name}
        assert imports_of(trees[name]) <= allowed, name


def test_the_vocabulary_imports_nothing_in_a_circle() -> None:
    trees = files()
    assert imports_of(trees["model"]) == set()
    assert imports_of(trees["wire"]) == {"model"}


def test_only_the_entries_and_the_commands_know_both_columns() -> None:
    for name, tree in files().items():
        is_outside = name in ENTRIES or name in QUEUE_COLUMN
        if is_outside or name.startswith("cli.") or name == "__main__":
            continue
        found = imports_of(tree)
        crosses = found & set(SESSION_COLUMN) and found & set(BROKER_COLUMN)
        assert not crosses, name


def test_only_the_broker_names_a_call_that_changes_identity() -> None:
    for name, tree in files().items():
        named = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(tree)
            if isinstance(node, (ast.Attribute, ast.Name))
        }
        guilty = {word for word in named if CHANGES_IDENTITY.match(word)}
        assert bool(guilty) == (name == "broker"), (name, guilty)


REPORT_AT_GREETING = """
import sys
from mda.receiver import replies
real = replies.greeting
def greeting(*arguments, **options):
    import os
    with open({report!r}, 'w') as file:
        file.write('\\n'.join(sys.modules))
    return real(*arguments, **options)
replies.greeting = greeting
"""
REPORT_AT_END = """
import sys
from mda import broker
real = broker.answer_requests
def answer_requests(*arguments):
    real(*arguments)
    with open({report!r}, 'w') as file:
        file.write('\\n'.join(sys.modules))
broker.answer_requests = answer_requests
"""
ONE_SAML = (
    b"EHLO x\r\nSAML FROM:<bob@example.org>\r\nRCPT TO:<alice>\r\nDATA\r\n"
    b"Subject: =?utf-8?q?=C3=A9?=\r\nContent-Type: text/html\r\n\r\n<b>hi</b>\r\n.\r\n"
    b"XWHO\r\nQUIT\r\n"
)


def run_with_report(sandbox: Sandbox, prelude: str, report: Path, text: bytes) -> set[str]:
    """The modules that a process of `mda receive` has loaded when `prelude` writes them."""
    command = start_command()
    report.touch()
    report.chmod(0o666)
    program = prelude.format(report=str(report)) + (
        f"sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "from mda.receiver import inetd\nsys.exit(inetd.main([]))"
    )
    program = f"import sys\nsys.path.append({str(PACKAGE.parent)!r})\n" + program
    ours, theirs = sandbox.connect_as("bob")
    with ours:
        process = subprocess.Popen(
            sandbox.inside([*command[:-1], "-c", program]),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.sendall(text)
        ours.shutdown(socket.SHUT_WR)
        while ours.recv(65536):
            pass
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    return set(report.read_text().split())


def bare_interpreter() -> set[str]:
    """What an interpreter that does nothing has loaded (more under coverage)."""
    program = "import sys; print('\\n'.join(sys.modules))"
    command = [*start_command()[:-1], "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def is_loaded(names: set[str], loaded: set[str]) -> set[str]:
    return {name for name in loaded if any(name == n or name.startswith(f"{n}.") for n in names)}


@pytest.fixture
def report(sandbox: Sandbox) -> Path:
    return sandbox.root / "report"


def test_the_greeting_waits_for_no_heavy_module(sandbox: Sandbox, report: Path) -> None:
    loaded = run_with_report(sandbox, REPORT_AT_GREETING, report, b"QUIT\r\n")
    assert "mda.receiver.session" in loaded
    assert is_loaded(MUST_NOT_LOAD_BEFORE_GREETING, loaded - bare_interpreter()) == set()


def test_the_broker_never_loads_what_parses(sandbox: Sandbox, report: Path) -> None:
    loaded = run_with_report(sandbox, REPORT_AT_END, report, ONE_SAML)
    assert "mda.delivery.mbox" in loaded
    assert sandbox.mailbox("alice") is not None, "the message did not go all the way"
    assert is_loaded(MUST_NEVER_LOAD_IN_BROKER, loaded - bare_interpreter()) == set()
