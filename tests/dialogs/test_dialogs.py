"""Run every `*.dialog` beside this file: what is said, what is answered, what is kept.

A dialog begins with settings (`peer: bob`, `protocol: lmtp`, `config: KEY...`), then has
a line for each line of the client (`C: `, with \\xNN and \\r, \\n escapes) and each reply
line (`S: `, of which the beginning must agree). `NAME.USER.mbox` beside it is what is in
the mailbox of USER afterwards; `{...}` stands for a date or an identity. A user without
such a file has no mailbox.
"""

from __future__ import annotations

import contextlib
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox

HERE = Path(__file__).parent
DIALOGS = sorted(path.stem for path in HERE.glob("*.dialog"))
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
        if kind == "C":
            escaped = text.encode().decode("unicode_escape").encode("latin-1")
            dialog.client += escaped + b"\r\n"
        elif kind == "S":
            dialog.replies.append(text)
        else:
            dialog.settings[kind] = text
    return dialog


def pieces(octets: bytes, chunking: str) -> list[bytes]:
    if chunking == "bytewise":
        return [octets[at : at + 1] for at in range(len(octets))]
    if chunking == "trailing":
        ends_in_quit = octets.upper().endswith(b"QUIT\r\n")
        return [octets + (b"NOOP\r\nVRFY x" if ends_in_quit else b"NOO")]
    return [octets]


def converse(sandbox: Sandbox, dialog: Dialog, chunking: str) -> tuple[bytes, int]:
    """Everything that the receiver says, and its exit status.

    A SOCK_SEQPACKET pair hands over each piece as one read, so the chunking is exact.
    """
    ours, theirs = sandbox.connect_as(dialog.settings.get("peer", "bob"), socket.SOCK_SEQPACKET)
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
            ours.shutdown(socket.SHUT_WR)
            while more := ours.recv(65536):
                said += more
    _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors, errors.decode()
    return said, process.returncode


def matches(expected: str, text: bytes) -> bool:
    """The expected mailbox, with `{...}` for what differs from run to run."""
    pattern = re.sub(r"\\\{[a-z]+\\\}", "[^\n]*", re.escape(expected))
    return re.fullmatch(pattern, text.decode("latin-1")) is not None


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", DIALOGS)
def test_dialog(sandbox: Sandbox, name: str, chunking: str) -> None:
    dialog = read_dialog(name)
    said, status = converse(sandbox, dialog, chunking)
    lines = said.decode("ascii").split("\r\n")
    assert lines.pop() == "", "the last reply has no end"
    wrong = [
        (want, got)
        for want, got in zip(dialog.replies, lines, strict=False)
        if not got.startswith(want)
    ]
    assert (wrong, len(lines)) == ([], len(dialog.replies)), "\n".join(lines)
    assert status == 0
    for user in (*UIDS, "root"):
        kept = sandbox.mailbox(user)
        beside = HERE / f"{name}.{user}.mbox"
        if beside.exists():
            assert kept is not None, f"nothing for {user}"
            assert matches(beside.read_bytes().decode("latin-1"), kept), kept.decode("latin-1")
        else:
            assert kept is None, f"{user} has mail: {kept!r}"
    assert not list((sandbox.root / "mail").glob("*.lock"))
