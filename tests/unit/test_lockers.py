"""The programs that lock mailboxes on a Debian host and ours, side by side on one mailbox."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.contest import FROM_LINE, Contest
from support.lockers import LOCKERS, Locker
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import wait_until

from mda.delivery import lock
from mda.model import Outcome

THEIRS = FROM_LINE + b"Subject: theirs\n\ntheirs\n\n"


@pytest.fixture
def box(sandbox: Sandbox) -> Path:
    """Alice's mailbox, empty."""
    path = sandbox.root / "mail/alice"
    path.touch()
    os.chown(path, UIDS["alice"], 8)
    path.chmod(0o660)
    return path


def deliver(sandbox: Sandbox, locker: Locker) -> subprocess.CompletedProcess[bytes]:
    file = sandbox.configure(locker.configuration(lock_seconds=1))
    command = [*start_command(), "deliver", "-f", "bob@example.org", "-d", "alice"]
    return sandbox.run([*command, "--config", file], input=b"Subject: ours\n\nours\n")


@pytest.mark.parametrize("name", [name for name, locker in LOCKERS.items() if locker.holds])
def test_we_keep_out_of_a_mailbox_that_another_program_holds(
    sandbox: Sandbox, box: Path, name: str
) -> None:
    locker = LOCKERS[name]
    in_the_way = {"dotlock": b"alice.lock, PID ", "flock": b"alice (flock), PID "}
    # Ours takes the fcntl lock first, and so names that one.
    kind = "fcntl" if "fcntl" in locker.locks else locker.locks[0]
    with subprocess.Popen(
        locker.command(sandbox, locker.append), stdin=subprocess.PIPE, bufsize=0
    ) as holder:
        assert holder.stdin is not None
        holder.stdin.write(THEIRS[:20])
        wait_until(lambda: box.stat().st_size > 0)
        done = deliver(sandbox, locker)
        assert done.returncode == 75
        assert b"Mailbox is locked (" + in_the_way.get(kind, b"alice, PID ") in done.stderr
        assert box.read_bytes() == THEIRS[:20]
        holder.stdin.write(THEIRS[20:])
    assert holder.returncode == 0
    assert deliver(sandbox, locker).returncode == 0
    assert box.read_bytes().startswith(THEIRS + b"From bob@example.org ")


@contextlib.contextmanager
def held_by_us(box: Path, locker: Locker) -> Iterator[None]:
    """The mailbox under our locks, in this process."""
    message = (FROM_LINE, 100, 0)
    flock = locker.takes_only_flock
    held = lock.acquire(str(box), open_existing, message, time.monotonic(), [], takes_flock=flock)
    assert isinstance(held, lock.MailboxLock)
    yield
    held.release()


@pytest.mark.parametrize("name", LOCKERS)
def test_another_program_appends_nothing_while_we_hold_the_mailbox(
    sandbox: Sandbox, box: Path, name: str
) -> None:
    locker = LOCKERS[name]
    with held_by_us(box, locker):
        program = start(sandbox, locker, locker.append, THEIRS)
        # Long enough for what does not wait to have written.
        time.sleep(0.7)
        assert program.poll() is None
        assert box.stat().st_size == 0
    assert program.wait(30) == 0
    assert b"Subject: theirs\n" in box.read_bytes()


@pytest.mark.parametrize("name", [name for name, locker in LOCKERS.items() if locker.delete])
def test_reader_deletes_nothing_while_we_hold_the_mailbox(
    sandbox: Sandbox, box: Path, name: str
) -> None:
    locker = LOCKERS[name]
    chaff = FROM_LINE + b"Subject: chaff\n\nchaff\n\n"
    box.write_bytes(chaff + THEIRS)
    with held_by_us(box, locker):
        program = start(sandbox, locker, locker.delete)
        time.sleep(0.7)
        assert program.poll() is None
        assert box.read_bytes() == chaff + THEIRS
    assert program.wait(30) == 0
    assert b"chaff" not in box.read_bytes()
    assert b"Subject: theirs\n" in box.read_bytes()


def start(
    sandbox: Sandbox, locker: Locker, script: str, text: bytes = b""
) -> subprocess.Popen[bytes]:
    """Start a script of another program's on its standard input."""
    quiet = subprocess.DEVNULL
    program = subprocess.Popen(
        locker.command(sandbox, script), stdin=subprocess.PIPE, stdout=quiet, stderr=quiet
    )
    assert program.stdin is not None
    program.stdin.write(text)
    program.stdin.close()
    return program


def open_existing(dir_fd: int, name: str) -> int | Outcome:
    return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=dir_fd)


@pytest.mark.parametrize("name", LOCKERS)
def test_no_message_is_lost_or_torn_where_many_write(sandbox: Sandbox, name: str) -> None:
    contest = Contest(sandbox, LOCKERS[name], seconds=1)
    contest.run()
    assert contest.complaints() == []
    assert contest.accepted(ours=True) > 0
    assert contest.accepted(ours=False) > 0
