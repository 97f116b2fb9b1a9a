"""What one message costs: forks per connection, system calls per message.

The numbers are written down here so that a change that doubles them is seen by whoever
makes it. They are counted by strace between the first and the last of several equal
messages in one session, spoken in lockstep, so that no timing enters.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess

from support.sandbox import UIDS, Sandbox, start_command

# For one message of one recipient. The session: poll, read, poll and write for each of
# the four things the client says, three frames to the broker and back, the text's memory
# (made, written, sealed, closed), one line of log, and the identity's process id.
SESSION_CALLS = 30
# The broker: three frames and back, the aliases' age, six changes of identity for the
# forward file (two opened, one closed) and six for the mailbox, the spool's group, the
# text kept, proven and looked through for NULs, and the mailbox opened, locked (with its
# record as text and as attribute), proven, written, fsynced and released.
BROKER_CALLS = 53
FORKS_PER_CONNECTION = 1

MESSAGES = 6
STEPS = (
    (b"MAIL FROM:<bob@example.org>\r\n", b"250"),
    (b"RCPT TO:<alice>\r\n", b"250"),
    (b"DATA\r\n", b"354"),
    (b"Subject: x\r\n\r\nhello\r\n.\r\n", b"250"),
)


def record_session(sandbox: Sandbox) -> tuple[list[str], list[str]]:
    """The system calls of the broker, and of the session, that took several messages."""
    ours, theirs = sandbox.connect_as("bob", socket.SOCK_SEQPACKET)
    command = ["strace", "-ff", "-y", "-qq", "-o", str(sandbox.root / "trace"), *start_command()]
    process = subprocess.Popen(
        sandbox.inside([*command, "receive"]), stdin=theirs.fileno(), stdout=theirs.fileno()
    )
    theirs.close()
    with ours:
        ours.settimeout(30)
        assert ours.recv(512).startswith(b"220")
        for line, answer in [(b"HELO x\r\n", b"250"), *STEPS * MESSAGES, (b"QUIT\r\n", b"221")]:
            ours.send(line)
            assert ours.recv(512).startswith(answer)
    assert process.wait(30) == 0
    files = sorted(sandbox.root.glob("trace.*"))
    traces = [file.read_text().splitlines() for file in files]
    for file in files:
        file.unlink()
    assert len(traces) == 1 + FORKS_PER_CONNECTION
    broker, session = sorted(traces, key=count_forks, reverse=True)
    return broker, session


def count_forks(trace: list[str]) -> int:
    return sum(bool(re.match(r"(clone|clone3|fork|vfork)\(", line)) for line in trace)


def calls_between_deliveries(trace: list[str], mark: str) -> int:
    """How many calls there are from one occurrence of `mark` to the next, at the most."""
    calls = [line for line in trace if re.match(r"\w+\(", line)]
    at = [number for number, line in enumerate(calls) if mark in line]
    assert len(at) == MESSAGES
    # The first delivery makes the mailbox, so it is left out.
    return max(b - a for a, b in itertools.pairwise(at[1:]))


def test_a_message_costs_what_is_written_here(sandbox: Sandbox) -> None:
    broker, session = record_session(sandbox)
    assert (count_forks(broker), count_forks(session)) == (FORKS_PER_CONNECTION, 0)
    assert calls_between_deliveries(broker, "writev(") <= BROKER_CALLS
    assert calls_between_deliveries(session, "memfd_create(") <= SESSION_CALLS


def calls_on_mailbox(sandbox: Sandbox, size: int) -> list[str]:
    """The calls on the descriptor of a mailbox of `size` bytes, without where and when."""
    box = sandbox.root / "mail/alice"
    box.write_bytes(b"From old@example.org Tue Jan  6 09:00:00 2026\n\nold\n\n")
    os.truncate(box, size - 2)
    with box.open("ab") as file:
        file.write(b"\n\n")
    os.chown(box, UIDS["alice"], 8)
    # Long unread, so that the times need no touch, whatever the second.
    os.utime(box, (0, 0))
    broker, _ = record_session(sandbox)
    calls = []
    for line in broker:
        if found := re.match(r"(\w+)\(\d+</var/mail/alice>.*= (-?\w+)", line):
            name, result = found.groups()
            calls.append(f"{name} = {result}" if name == "pread64" else name)
    box.unlink()
    return calls


def test_a_mailbox_of_10_gib_costs_what_one_of_1_kib_does(sandbox: Sandbox) -> None:
    small = calls_on_mailbox(sandbox, 1 << 10)
    large = calls_on_mailbox(sandbox, 10 << 30)
    assert large == small
    assert large.count("writev") == MESSAGES
    assert [call for call in large if "read" in call] == ["pread64 = 2"] * MESSAGES
