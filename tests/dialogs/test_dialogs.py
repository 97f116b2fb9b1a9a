"""Run every `*.dialog` beside this file: what is said, what is answered, what is kept.

A dialog begins with settings (`peer: bob` or `peer: tcp`, `protocol: lmtp`, `config: KEY...`,
`login: USER` for one who sits at a terminal), then has a line for each of the client's (`C: `, with
\\xNN and \\r, \\n escapes) and each reply line (`S: `, of which the beginning must agree);
`C*100: ` is a line a hundred times. `NAME.USER.mbox` beside it is what is in the mailbox of
USER afterwards, `NAME.USER.screen` what is on the terminal; `{...}` stands for a date, a time
or an identity. A user without such a file has no mailbox.

Whatever a dialog expects, each command must have exactly one reply with a code of its row
(RFC 821 4.3).
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.sandbox import PEOPLE, PEOPLE_UIDS, UIDS, Sandbox
from support.sequences import attribute
from support.terminal import Terminal

HERE = Path(__file__).parent
DIALOGS = sorted(path.stem for path in HERE.glob("*.dialog"))
LONGEST_READ = 64 * 1024  # of the receiver: what is longer would lose its end
CHUNKINGS = ["whole", "bytewise", "trailing"]


@dataclass
class Dialog:
    """One file, read."""

    settings: dict[str, str] = field(default_factory=dict)
    client: bytes = b""
    replies: list[str] = field(default_factory=list)


def read_dialog(name: str) -> Dialog:
    dialog = Dialog()
    for line in (HERE / f"{name}.dialog").read_text().splitlines():
        kind, _, text = line.partition(": ") if ": " in line else line.partition(":")
        if not line or line.startswith("#"):
            continue
        kind, _, times = kind.partition("*")
        if kind == "C":
            escaped = text.encode().decode("unicode_escape").encode("latin-1")
            dialog.client += (escaped + b"\r\n") * int(times or 1)
        elif kind == "S":
            dialog.replies += [text] * int(times or 1)
        else:
            dialog.settings[kind] = text
    return dialog


def pieces(octets: bytes, chunking: str) -> list[bytes]:
    if chunking == "trailing":
        ends_in_quit = octets.upper().endswith(b"QUIT\r\n")
        octets += b"NOOP\r\nVRFY x" if ends_in_quit else b"NOO"
    size = 1 if chunking == "bytewise" else LONGEST_READ
    return [octets[at : at + size] for at in range(0, len(octets), size)]


def converse(sandbox: Sandbox, dialog: Dialog, chunking: str) -> tuple[bytes, int]:
    """Everything that the receiver says, and its exit status.

    A SOCK_SEQPACKET pair hands over each piece as one read, so the chunking is exact; that of
    TCP is as it comes.
    """
    peer = dialog.settings.get("peer", "bob")
    if peer == "tcp":
        ours, theirs = connect_by_tcp()
    else:
        ours, theirs = sandbox.connect_as(peer, socket.SOCK_SEQPACKET)
    config = sandbox.configure(dialog.settings.get("config", "").replace("; ", "\n"))
    protocol = dialog.settings.get("protocol", "smtp")
    with ours:
        ours.settimeout(30)
        process = sandbox.start(
            "receive", "--protocol", protocol, "--config", config, client=theirs
        )
        theirs.close()
        said = ours.recv(65536)
        # A receiver that sends its client away reads no more of what comes.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces(dialog.client, chunking):
                ours.send(piece)
                # Replies are packets here, and no socket holds a hundred unread ones.
                while select.select([ours], [], [], 0)[0] and (more := ours.recv(65536)):
                    said += more
            ours.shutdown(socket.SHUT_WR)
        said += read_to_end(ours)
    _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors, errors.decode()
    return said, process.returncode


def connect_by_tcp() -> tuple[socket.socket, socket.socket]:
    """A connection over loopback: the client's end, and ours."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0]


def read_to_end(connection: socket.socket) -> bytes:
    """All that is still to come; what was said before a reset is read behind it."""
    said = b""
    while True:
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            continue
        if not more:
            return said
        said += more


def matches(expected: str, text: bytes) -> bool:
    """The expected mailbox, with `{...}` for what differs from run to run."""
    pattern = re.sub(r"\\\{[a-z]+\\\}", "[^\n]*", re.escape(expected))
    return re.fullmatch(pattern, text.decode("latin-1")) is not None


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", DIALOGS)
def test_dialog(sandbox: Sandbox, name: str, chunking: str) -> None:
    dialog = read_dialog(name)
    with contextlib.ExitStack() as stack:
        screens = {}
        for user in dialog.settings.get("login", "").split():
            screens[user] = Terminal(PEOPLE_UIDS[user])
            stack.callback(screens[user].close)
        said, status = converse(sandbox, dialog, chunking)
        shown = {user: terminal.shown() for user, terminal in screens.items()}
    attribute(dialog.client, said, is_lmtp=dialog.settings.get("protocol") == "lmtp")
    lines = said.decode("ascii").split("\r\n")
    assert lines.pop() == "", "the last reply has no end"
    wrong = [
        (want, got)
        for want, got in zip(dialog.replies, lines, strict=False)
        if not got.startswith(want)
    ]
    assert (wrong, len(lines)) == ([], len(dialog.replies)), "\n".join(lines)
    assert status == 0
    for user, screen in shown.items():
        expected = (HERE / f"{name}.{user}.screen").read_text()
        assert matches(expected, screen.replace(b"\r\n", b"\n").lstrip(b"\a\n")), screen
    for user in (*UIDS, *PEOPLE, "root"):
        kept = sandbox.mailbox(user)
        beside = HERE / f"{name}.{user}.mbox"
        if beside.exists():
            assert kept is not None, f"nothing for {user}"
            assert matches(beside.read_bytes().decode("latin-1"), kept), kept.decode("latin-1")
        else:
            assert kept is None, f"{user} has mail: {kept!r}"
    assert not list((sandbox.root / "mail").glob("*.lock"))
