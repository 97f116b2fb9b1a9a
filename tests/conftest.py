"""Fixtures for more than one kind of test."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.sandbox import Sandbox
from support.terminal import PERSON, PERSON_UID, Terminal

# A shell's background job has SIGINT ignored, and so would whatever it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_sandbox() -> Iterator[Sandbox]:
    """One private view of the host for the whole run."""
    if os.geteuid() != 0:
        pytest.fail("these tests change identity: run them as root (see HACKING)")
    root = Path(tempfile.mkdtemp(prefix="mda-sandbox-"))
    sandbox = Sandbox(root)
    yield sandbox
    sandbox.close()
    shutil.rmtree(root)


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """The private view with an empty mail spool."""
    shared_sandbox.clear_mail()
    yield shared_sandbox
    shared_sandbox.clear_mail()


@pytest.fixture
def home(sandbox: Sandbox) -> Iterator[Path]:
    """The home of the person, as seen from outside."""
    passwd = sandbox.root / "etc/passwd"
    before = passwd.read_text()
    line = re.compile(rf"^({PERSON}:.*):/nonexistent:", re.MULTILINE)
    passwd.write_text(line.sub(rf"\1:/home/{PERSON}:", before))
    sandbox.run(["install", "-d", "-m", "755", "-o", str(PERSON_UID), f"/home/{PERSON}"])
    yield Path(f"/proc/{sandbox.pid}/root/home/{PERSON}")
    sandbox.run(["rm", "-rf", f"/home/{PERSON}"])
    passwd.write_text(before)


@pytest.fixture
def no_counts(sandbox: Sandbox) -> None:
    """What earlier tests have sent counts for nothing."""
    sandbox.run(["rm", "-f", "/run/mda/terminal-rates"])


@pytest.fixture
def log_in() -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(uid: int = PERSON_UID, columns: int = 80) -> Terminal:
        terminals.append(Terminal(uid, columns))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def terminal(log_in: Callable[..., Terminal]) -> Terminal:
    return log_in()
