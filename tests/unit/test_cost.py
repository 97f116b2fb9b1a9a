"""What one message costs: forks per connection, system calls per message.

The numbers are written down here so that a change that doubles them is seen by whoever
makes it. They are counted by strace between the first and the last of several equal
messages in one session, spoken in lockstep, so that no timing enters.
"""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
from pathlib import Path

import pytest
from support.sandbox import Sandbox, start_command

# For one message of one recipient. The session: poll, read, poll and write for each of
# the four things the client says, three frames to the broker and back, the text's memory
# (made, written, sealed, closed), one line of log, and the identity's process id.
SESSION_CALLS = 30
# The broker: three frames and back, the aliases' age, six changes of identity for the
# forward file (two opened, one closed) and six for the mailbox, the spool's group, the
# text kept and proven, and the mailbox opened, locked, proven, written, fsynced, released.
BROKER_CALLS = 51
FORKS_PER_CONNECTION = 1

MESSAGES = 6
STEPS = (
    (b"MAIL FROM:<bob@example.org>\r\n", b"250"),
    (b"RCPT TO:<alice>\r\n", b"250"),
    (b"DATA\r\n", b"354"),
    (b"Subject: x\r\n\r\nhello\r\n.\r\n", b"250"),
)


@pytest.fixture
def trace(sandbox: Sandbox) -> list[str]:
    """The system calls of a session with several messages, one `PID CALL` a line."""
    record = sandbox.root / "trace"
    ours, theirs = sandbox.connect_as("bob", socket.SOCK_SEQPACKET)
    command = ["strace", "-f", "-qq", "-o", str(record), *start_command(), "receive"]
    process = subprocess.Popen(
        sandbox.inside(command), stdin=theirs.fileno(), stdout=theirs.fileno()
    )
    theirs.close()
    with ours:
        ours.settimeout(30)
        assert ours.recv(512).startswith(b"220")
        for line, answer in [(b"HELO x\r\n", b"250"), *STEPS * MESSAGES, (b"QUIT\r\n", b"221")]:
            ours.send(line)
            assert ours.recv(512).startswith(answer)
    assert process.wait(30) == 0
    return Path(record).read_text().splitlines()


def calls_between_deliveries(trace: list[str], pid: str, mark: str) -> int:
    """How many calls `pid` makes from one occurrence of `mark` to the next, at the most."""
    own = [line.partition(" ")[2].strip() for line in trace if line.startswith(f"{pid} ")]
    own = [line for line in own if re.match(r"\w+\(", line)]
    at = [number for number, line in enumerate(own) if mark in line]
    assert len(at) == MESSAGES
    # The first delivery makes the mailbox, so it is left out.
    return max(b - a for a, b in itertools.pairwise(at[1:]))


def test_a_message_costs_what_is_written_here(trace: list[str]) -> None:
    broker = trace[0].split()[0]
    forks = [line for line in trace if re.search(r" (clone|clone3|fork|vfork)\(", line)]
    assert len(forks) == FORKS_PER_CONNECTION, forks
    (session,) = {line.split()[0] for line in trace} - {broker}
    assert calls_between_deliveries(trace, broker, "writev(") <= BROKER_CALLS
    assert calls_between_deliveries(trace, session, "memfd_create(") <= SESSION_CALLS
