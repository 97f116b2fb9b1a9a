"""What goes wrong in mail spools elsewhere, as their users report it, tried on ours end to end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import LMTP, connect, dialogue, served

OLD = b"From old@example.org Tue Jan  6 09:00:00 2026\nSubject: old\n\nold\n\n"
IMPATIENT = "[delivery]\nlock_seconds = 1\n"


@pytest.fixture
def box(sandbox: Sandbox) -> Path:
    """Alice's mailbox with one message."""
    path = sandbox.root / "mail/alice"
    path.write_bytes(OLD)
    os.chown(path, UIDS["alice"], 8)
    path.chmod(0o660)
    return path


@pytest.fixture
def spool(sandbox: Sandbox) -> Iterator[Path]:
    """The mail spool, whose owner and mode may be changed."""
    path = sandbox.root / "mail"
    yield path
    os.chown(path, 0, 8)
    path.chmod(0o2775)


def command(sandbox: Sandbox, config: str = "") -> list[str]:
    words = ["deliver", "-f", "bob@example.org", "-d", "alice"]
    return [*start_command(), *words, "--config", sandbox.configure(config)]


def deliver(
    sandbox: Sandbox, config: str = "", text: bytes = b"Subject: new\n\nnew\n"
) -> tuple[int, str]:
    """Exit status and first line of `mda deliver` to Alice, as root."""
    done = sandbox.run(command(sandbox, config), input=text)
    return done.returncode, done.stderr.decode().partition("\n")[0]


def make_old(path: Path, seconds: int) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_lock_that_a_crash_left_does_not_hold_up_mail_for_days(sandbox: Sandbox, box: Path) -> None:
    dotlock = box.with_name("alice.lock")
    dotlock.write_bytes(b"%d\n" % (1 << 30))
    make_old(dotlock, 600)
    text = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice>\r\nDATA\r\nSubject: x\r\n\r\n.\r\nQUIT\r\n"
    with served(sandbox) as daemon:
        said = dialogue(connect(sandbox, LMTP, "root"), text)
        log = daemon.log()
    assert b"250 2.0.0" in said
    (line,) = [line for line in log.splitlines() if "alice.lock" in line]
    assert line.endswith(f'user=alice note="removed the dead lock alice.lock, PID {1 << 30}"')
    assert not dotlock.exists()


@pytest.mark.parametrize("age", [0, 290])
def test_lock_of_another_program_that_may_be_alive_is_not_broken(
    sandbox: Sandbox, box: Path, age: int
) -> None:
    dotlock = box.with_name("alice.lock")
    dotlock.write_bytes(b"0")
    make_old(dotlock, age)
    status, said = deliver(sandbox, IMPATIENT)
    assert status == 75
    assert said.endswith("4.2.0 <alice> Mailbox is locked (alice.lock, PID not given)")
    assert (box.read_bytes(), dotlock.read_bytes()) == (OLD, b"0")


@pytest.mark.parametrize("kind", ["fcntl", "flock"])
def test_wait_for_a_lock_is_bounded_and_says_whose_it_is(
    sandbox: Sandbox, box: Path, kind: str
) -> None:
    with box.open("r+b") as held:
        (fcntl.lockf if kind == "fcntl" else fcntl.flock)(held, fcntl.LOCK_EX)
        status, said = deliver(sandbox, IMPATIENT + "flock = true\n")
    assert status == 75
    which = "alice (flock)" if kind == "flock" else "alice"
    assert said.endswith(f"Mailbox is locked ({which}, PID {os.getpid()})")
    assert box.read_bytes() == OLD
    assert os.listdir(box.parent) == ["alice"]


@contextlib.contextmanager
def locked(box: Path, kind: str) -> Iterator[None]:
    """The mailbox under one lock of this process's, of whatever kind."""
    dotlock = box.with_name("alice.lock")
    with box.open("r+b") as file:
        match kind:
            case "dotlock":
                dotlock.write_bytes(b"%d\n" % os.getpid())
            case "fcntl":
                fcntl.lockf(file, fcntl.LOCK_EX)
            case _:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    dotlock.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["dotlock", "fcntl", "flock"])
def test_reader_and_writer_that_know_different_locks_do_not_miss_each_other(
    sandbox: Sandbox, box: Path, kind: str
) -> None:
    with locked(box, kind):
        process = subprocess.Popen(
            sandbox.inside(command(sandbox, "[delivery]\nflock = true\n")), stdin=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(b"Subject: new\n\nnew\n")
        process.stdin.close()
        # Long enough for what does not wait to have written.
        time.sleep(0.7)
        assert process.poll() is None
        assert box.read_bytes() == OLD
    assert process.wait(30) == 0
    assert box.read_bytes().endswith(b"Subject: new\n\nnew\n\n")


@pytest.mark.parametrize("header", [b"Message-ID: <1@x>\n", b"Message-ID: \n", b""])
def test_mail_with_the_same_message_id_or_none_is_no_duplicate(
    sandbox: Sandbox, box: Path, header: bytes
) -> None:
    for text in (b"one\n", b"two\n", b"two\n"):
        assert deliver(sandbox, text=header + b"Subject: x\n\n" + text) == (0, "")
    kept = box.read_bytes()
    assert (kept.count(b"\none\n"), kept.count(b"\ntwo\n")) == (1, 2)


def test_full_disk_leaves_neither_lock_nor_half_a_message(sandbox: Sandbox) -> None:
    folder = "/home/small"
    script = f"mkdir {folder} && mount -t tmpfs -o size=64k,mode=2775,gid=8 none {folder}"
    assert sandbox.run(["sh", "-c", script]).returncode == 0
    config = f'[delivery]\nmailbox = "{folder}/{{user}}"\n'
    small = Path(f"/proc/{sandbox.pid}/root{folder}")
    try:
        assert deliver(sandbox, config) == (0, "")
        before = (small / "alice").read_bytes()
        status, said = deliver(sandbox, config, b"Subject: large\n\n" + b"x" * 100_000)
        assert (status, said[:15]) == (75, "4.3.1 <alice> I"), said
        assert (small / "alice").read_bytes() == before
        assert os.listdir(small) == ["alice"]
        assert deliver(sandbox, config) == (0, "")
    finally:
        sandbox.run(["sh", "-c", f"umount {folder} && rmdir {folder}"])


@pytest.mark.parametrize("mode", [0o2770, 0o2775, 0o770, 0o3777])
def test_user_who_is_not_in_group_mail_gets_mail(sandbox: Sandbox, spool: Path, mode: int) -> None:
    spool.chmod(mode)
    assert deliver(sandbox) == (0, "")
    status = (spool / "alice").stat()
    assert (status.st_uid, status.st_gid) == (UIDS["alice"], 8)
    assert status.st_mode & 0o7777 == 0o660
    assert os.listdir(spool) == ["alice"]


def test_mailbox_whose_owner_was_changed_is_named_and_left_alone(
    sandbox: Sandbox, box: Path
) -> None:
    os.chown(box, UIDS["bob"], 8)
    status, said = deliver(sandbox)
    assert status == 75
    assert "Mailbox /var/mail/alice is owned by bob, not by alice" in said
    assert said.endswith("(as root: chown alice /var/mail/alice)")
    assert box.read_bytes() == OLD
    assert os.listdir(box.parent) == ["alice"]


def test_mailbox_without_a_place_for_its_dotlock_is_not_written_unlocked(
    sandbox: Sandbox, spool: Path, box: Path
) -> None:
    spool.chmod(0o755)
    status, said = deliver(sandbox)
    assert (status, said) == (75, "4.3.0 <alice> Local error (locking the mailbox: EACCES)")
    assert box.read_bytes() == OLD
