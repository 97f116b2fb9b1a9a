"""RFC 821 1 and Appendices A to D: any reliable ordered stream of octets will do."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import tty
from collections.abc import Callable, Iterator

import pytest
from support.sandbox import Sandbox, start_command
from support.serving import SMTP, connect, dial, served

OCTETS = bytes(range(10)) + bytes(range(11, 13)) + bytes(range(14, 256))
DIALOGUE = (
    b"HELO client.example\r\nMAIL FROM:<bob@example.org>\r\nRCPT TO:<alice>\r\n"
    b"RCPT TO:<nobody-here>\r\nDATA\r\nSubject: x\r\n\r\n.\x03\x04\x11\x13\x1a\r\n"
    + OCTETS.replace(b".", b"")
    + b"\r\n..\r\n.\r\nNOOP\x15\r\nQUIT\r\n"
)
CODES = [220, 250, 250, 250, 550, 354, 250, 500, 221]
STORED = b"Subject: x\n\n\x03\x04\x11\x13\x1a\n" + OCTETS.replace(b".", b"") + b"\n.\n\n"


def read_to_end(fd: int) -> bytes:
    """All that comes from a descriptor within 30 seconds; a terminal ends in an error."""
    said = b""
    while select.select([fd], [], [], 30)[0]:
        try:
            more = os.read(fd, 65_536)
        except OSError:
            return said
        if not more:
            return said
        said += more
    raise AssertionError(f"no end after {said!r}")


def over_socket(connection: socket.socket) -> bytes:
    with connection:
        connection.sendall(DIALOGUE)
        return read_to_end(connection.fileno())


def over_unix_socket(sandbox: Sandbox) -> bytes:
    with served(sandbox, "--listen", f"unix:{SMTP}"):
        return over_socket(connect(sandbox, SMTP, "bob"))


def over_ipv4(sandbox: Sandbox) -> bytes:
    with served(sandbox, "--listen", "127.0.0.1:0") as daemon:
        return over_socket(dial(daemon.port))


def over_ipv6(sandbox: Sandbox) -> bytes:
    with served(sandbox, "--listen", "[::1]:0") as daemon:
        (port,) = re.findall(r"listening on \S*\[::1\]:(\d+)", "\n".join(daemon.lines))
        return over_socket(socket.create_connection(("::1", int(port)), timeout=30))


def over_pipes(sandbox: Sandbox) -> bytes:
    done = subprocess.run(
        sandbox.inside([*start_command(), "receive"]),
        input=DIALOGUE,
        capture_output=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@contextlib.contextmanager
def raw_terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal that changes no octet, as getty leaves a serial line."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def over_terminal(sandbox: Sandbox) -> bytes:
    with raw_terminal() as (ours, theirs):
        command = sandbox.inside([*start_command(), "receive"])
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        os.write(ours, DIALOGUE)
        said = read_to_end(ours)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, b"Traceback" in errors) == (0, False), errors
        return said


@pytest.mark.parametrize(
    "speak", [over_unix_socket, over_ipv4, over_ipv6, over_pipes, over_terminal]
)
def test_the_same_dialogue_over_every_transport(
    sandbox: Sandbox, speak: Callable[[Sandbox], bytes]
) -> None:
    said = speak(sandbox)
    assert [int(line[:3]) for line in said.split(b"\r\n")[:-1]] == CODES
    kept = sandbox.mailbox("alice")
    assert kept is not None
    assert kept.endswith(STORED)
    assert kept.count(b"\nReceived: from client.example (") == 1
