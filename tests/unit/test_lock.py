"""The locks, against real files, real processes and the lockers that other programs use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mailbox
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NoReturn

import pytest
from support.children import in_child

from mda.delivery import lock
from mda.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["fcntl", "flock"]
FROM_LINE = b"From bob@example.org Tue Jan  6 10:00:00 2026\n"
NOBODY = 65_534


def open_existing(dir_fd: int, name: str) -> int | Outcome:
    return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=dir_fd)


def acquire(
    path: Path,
    wait: float = 0.0,
    notes: list[str] | None = None,
    length: int = 1000,
    *,
    takes_flock: bool = False,
) -> lock.MailboxLock | Outcome:
    return lock.acquire(
        str(path),
        open_existing,
        (FROM_LINE, length, 0),
        time.monotonic() + wait,
        [] if notes is None else notes,
        takes_flock=takes_flock,
    )


def must_acquire(
    path: Path,
    wait: float = 0.0,
    notes: list[str] | None = None,
    length: int = 1000,
    *,
    takes_flock: bool = False,
) -> lock.MailboxLock:
    held = acquire(path, wait, notes, length, takes_flock=takes_flock)
    assert isinstance(held, lock.MailboxLock), held
    return held


def must_miss(path: Path, *, takes_flock: bool = False) -> Outcome:
    missed = acquire(path, takes_flock=takes_flock)
    assert isinstance(missed, Outcome)
    assert (missed.code, missed.enhanced) == (451, "4.2.0")
    return missed


def become_nobody() -> None:
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)


@contextlib.contextmanager
def locked_by_another(path: Path, kind: Kind) -> Iterator[int]:
    """Another process has one lock of the kernel's on the file; yields its PID."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        file = os.open(path, os.O_RDWR)
        (fcntl.lockf if kind == "fcntl" else fcntl.flock)(file, fcntl.LOCK_EX)
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reading, 1)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def is_free(path: Path, kind: Kind) -> bool:
    """Can another process have this lock of the kernel's now?"""

    def try_it() -> None:
        with path.open("r+b") as file:
            (fcntl.lockf if kind == "fcntl" else fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with contextlib.redirect_stderr(None):
        return in_child(try_it) == 0


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """A mailbox `alice` with one message in it; its dotlock is `alice.lock`."""
    path = tmp_path / "alice"
    path.write_bytes(b"From old Tue Jan  6 09:00:00 2026\n\nold\n\n")
    return path


@pytest.fixture
def nobodys_spool() -> Iterator[Path]:
    """The mailbox of `nobody` in a directory of their own, which they can reach."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "alice")
        path.touch()
        os.chown(path, NOBODY, NOBODY)
        os.chown(directory, NOBODY, NOBODY)
        yield path


@pytest.fixture
def dotlock(spool: Path) -> Path:
    return spool.with_name("alice.lock")


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The PID of a live process that is not ours."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def make_old(path: Path, seconds: int = 600) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def our_record(
    spool: Path,
    pid: int,
    *,
    start: bytes = b"1",
    boot: bytes | None = None,
    length: int = 1000,
    nuls: int = 0,
) -> bytes:
    status = spool.stat()
    file = (status.st_dev, status.st_ino)
    boot = lock._own_stamp()[1] if boot is None else boot
    return lock.Record(pid, start, boot, file, status.st_size, length, nuls, FROM_LINE).format()


def test_held_lock_shows_pid_and_record_to_everybody(spool: Path, dotlock: Path) -> None:
    size = spool.stat().st_size
    held = must_acquire(spool)
    text = dotlock.read_bytes()
    assert text.split(b"\n")[0] == b"%d" % os.getpid()
    assert stat.S_IMODE(dotlock.stat().st_mode) == 0o444
    assert dotlock.stat().st_nlink == 1
    record = lock.parse_record(text)
    assert record is not None
    assert (record.size, record.length, record.from_line) == (size, 1000, FROM_LINE)
    assert record.file == (spool.stat().st_dev, spool.stat().st_ino)
    held.release()
    assert os.listdir(spool.parent) == ["alice"]


def test_record_is_readable_under_a_tight_umask(spool: Path, dotlock: Path) -> None:
    before = os.umask(0o077)
    try:
        held = must_acquire(spool)
        assert stat.S_IMODE(dotlock.stat().st_mode) == 0o444
        held.release()
    finally:
        os.umask(before)


def test_held_mailbox_is_locked_by_fcntl_too(spool: Path) -> None:
    held = must_acquire(spool)

    def try_it() -> None:
        with open(spool, "r+b") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert in_child(try_it) == 0
    held.release()


def test_no_descriptor_is_left_by_success_or_failure(spool: Path, dotlock: Path) -> None:
    before = os.listdir("/proc/self/fd")
    must_acquire(spool).release()
    dotlock.touch()
    must_miss(spool)
    assert isinstance(acquire(spool.with_name("missing")), Outcome)
    assert isinstance(acquire(spool / "below"), Outcome)
    assert os.listdir("/proc/self/fd") == before


def test_pythons_mailbox_lock_is_waited_for(spool: Path, dotlock: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        box = mailbox.mbox(spool)
        box.lock()
        os.write(writing, b"x")
        time.sleep(0.3)
        box.unlock()
        os._exit(0)
    os.read(reading, 1)
    began = time.monotonic()
    held = must_acquire(spool, wait=10)
    assert time.monotonic() - began > 0.2
    held.release()
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert not dotlock.exists()


def test_fcntl_lock_alone_is_waited_for_and_its_holder_named(spool: Path, dotlock: Path) -> None:
    with locked_by_another(spool, "fcntl") as pid:
        assert f"alice, PID {pid}" in must_miss(spool).text
        assert not dotlock.exists()
    must_acquire(spool).release()


def test_live_foreign_dotlock_is_waited_for_until_the_deadline(
    spool: Path, dotlock: Path, sleeper: int
) -> None:
    dotlock.write_bytes(b"%d\n" % sleeper)
    began = time.monotonic()
    missed = acquire(spool, wait=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert missed == Outcome(451, "4.2.0", f"Mailbox is locked (alice.lock, PID {sleeper})")
    assert dotlock.read_bytes() == b"%d\n" % sleeper


@pytest.mark.parametrize("text", [b"", b"0", b"0\0", b"host:alice\n", b"99999999999\n"])
def test_foreign_dotlock_without_pid_is_broken_only_when_old(
    spool: Path, dotlock: Path, text: bytes
) -> None:
    dotlock.write_bytes(text)
    make_old(dotlock, 290)
    assert "alice.lock, PID not given" in must_miss(spool).text
    make_old(dotlock, 310)
    notes: list[str] = []
    must_acquire(spool, notes=notes).release()
    assert notes == ["removed the dead lock alice.lock, PID not given"]
    assert not dotlock.exists()


def test_foreign_dotlock_of_a_dead_process_is_broken_only_when_old(
    spool: Path, dotlock: Path, dead_pid: int
) -> None:
    dotlock.write_bytes(b"%d\n" % dead_pid)
    must_miss(spool)
    make_old(dotlock)
    notes: list[str] = []
    must_acquire(spool, notes=notes).release()
    assert notes == [f"removed the dead lock alice.lock, PID {dead_pid}"]


def test_old_foreign_dotlock_of_a_live_process_is_never_broken(
    spool: Path, dotlock: Path, sleeper: int
) -> None:
    dotlock.write_bytes(b"%d\n" % sleeper)
    make_old(dotlock, 100_000)
    must_miss(spool)
    assert dotlock.exists()


def test_unreadable_foreign_dotlock_is_waited_for_and_broken_when_old(
    nobodys_spool: Path,
) -> None:
    dotlock = nobodys_spool.with_name("alice.lock")
    dotlock.touch(0)

    def run() -> None:
        become_nobody()
        must_miss(nobodys_spool)
        os.seteuid(0)
        make_old(dotlock)
        os.seteuid(NOBODY)
        must_acquire(nobodys_spool).release()

    assert in_child(run) == 0
    assert not dotlock.exists()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "directory", "fifo"])
def test_what_is_no_file_is_neither_followed_nor_removed(
    spool: Path, dotlock: Path, kind: str
) -> None:
    elsewhere = spool.with_name("elsewhere")
    elsewhere.write_bytes(b"0\n")
    match kind:
        case "symlink":
            dotlock.symlink_to(elsewhere)
        case "dangling":
            dotlock.symlink_to(spool.with_name("nowhere"))
        case "directory":
            dotlock.mkdir()
        case _:
            os.mkfifo(dotlock)
    make_old(dotlock)
    make_old(elsewhere)
    must_miss(spool)
    assert elsewhere.read_bytes() == b"0\n"
    assert not spool.with_name("nowhere").exists()
    assert os.path.lexists(dotlock)


def test_our_lock_of_a_dead_process_is_cleared_at_once(
    spool: Path, dotlock: Path, dead_pid: int
) -> None:
    dotlock.write_bytes(our_record(spool, dead_pid))
    notes: list[str] = []
    must_acquire(spool, notes=notes).release()
    assert notes == [f"removed the dead lock alice.lock, PID {dead_pid}"]


def test_our_lock_of_a_live_process_is_kept(spool: Path, dotlock: Path, sleeper: int) -> None:
    start = lock._read_stat(b"%d" % sleeper)[1]
    record = our_record(spool, sleeper, start=start)
    dotlock.write_bytes(record)
    make_old(dotlock)
    must_miss(spool)
    assert dotlock.read_bytes() == record


def test_our_lock_of_an_earlier_process_with_that_pid_is_cleared(
    spool: Path, dotlock: Path, sleeper: int
) -> None:
    dotlock.write_bytes(our_record(spool, sleeper, start=b"1"))
    notes: list[str] = []
    must_acquire(spool, notes=notes).release()
    assert notes == [f"removed the dead lock alice.lock, PID {sleeper}"]
    assert not dotlock.exists()


def test_our_lock_of_an_earlier_boot_is_cleared(spool: Path, dotlock: Path, sleeper: int) -> None:
    start = lock._read_stat(b"%d" % sleeper)[1]
    dotlock.write_bytes(our_record(spool, sleeper, start=start, boot=b"earlier"))
    notes: list[str] = []
    must_acquire(spool, notes=notes).release()
    assert notes == [f"removed the dead lock alice.lock, PID {sleeper}"]
    assert not dotlock.exists()


def test_our_lock_about_another_file_waits_like_a_foreign_one(
    spool: Path, dotlock: Path, dead_pid: int
) -> None:
    other = spool.with_name("other")
    other.touch()
    record = our_record(other, dead_pid)
    dotlock.write_bytes(record)
    must_miss(spool)
    assert dotlock.read_bytes() == record
    make_old(dotlock)
    must_acquire(spool).release()


def test_zombie_counts_as_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert lock.has_died(pid)
    os.waitpid(pid, 0)


def test_process_hidden_in_proc_counts_as_alive(dead_pid: int) -> None:
    code = """if True:
        import os, sys
        from mda.delivery import lock
        os.setegid(65534)
        os.seteuid(65534)
        assert not os.path.exists("/proc/1"), "not hidden"
        print(lock.has_died(1), lock.has_died(int(sys.argv[1])))
    """
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    run = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, str(dead_pid)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


HALF = FROM_LINE + b"Subject: x\n\nFrom here on, and >From there\n>From a b 2026\nhalf"


def with_tail(spool: Path, dotlock: Path, pid: int, tail: bytes, length: int = 1000) -> bytes:
    """A mailbox as a dead process left it: the tail, and a record of what was before."""
    before = spool.read_bytes()
    dotlock.write_bytes(our_record(spool, pid, length=length))
    spool.write_bytes(before + tail)
    return before


@pytest.mark.parametrize(
    "tail",
    [
        b"\n",
        b"\n\n",
        b"Fr",
        b"\n" + FROM_LINE[:20],
        FROM_LINE,
        HALF.replace(b"\nFrom", b"\n>From"),
        b"\n\n" + HALF.replace(b"\nFrom", b"\n>From"),
        FROM_LINE + b"x\n" * 400_000,
        # A power cut leaves these: the mailbox had grown, but not all that was in it.
        b"\0",
        b"\0" * 4096,
        b"\0" * 3000 + b"and so on\n>From there\n",
        b"\0" * 1_000_001,
    ],
)
def test_half_message_of_a_dead_process_is_cut_off(
    spool: Path, dotlock: Path, dead_pid: int, tail: bytes
) -> None:
    before = with_tail(spool, dotlock, dead_pid, tail, length=1_000_000)
    notes: list[str] = []
    held = must_acquire(spool, 5, notes)
    assert held.status.st_size == len(before)
    held.release()
    assert spool.read_bytes() == before
    assert notes[0] == f"removed a half message of {len(tail)} bytes"


FOREIGN = b"From carol Tue Jan  6 10:00:01 2026\n\nher message\n\n"


@pytest.mark.parametrize(
    ("tail", "length"),
    [
        (HALF, 1000),
        (FROM_LINE + b"torn\n" + FOREIGN, 1000),
        (FROM_LINE + b"torn" + FOREIGN, 1000),
        (FROM_LINE + FOREIGN, 1000),
        (FROM_LINE + b"x" * (256 * 1024 - 3) + b"\n" + FOREIGN, 1_000_000),
        (FOREIGN, 1000),
        (b"\n\n\n", 1000),
        (b"\0" * 3000 + b"\n" + FOREIGN, 10_000),
        (FROM_LINE + b"whole\0\0\n", len(FROM_LINE) + 8),
        (FROM_LINE + b"whole", len(FROM_LINE) + 5),
        (b"\n\n" + FROM_LINE + b"whole\n\n", len(FROM_LINE) + 5),
    ],
)
def test_whole_or_foreign_text_after_a_dead_process_is_kept(
    spool: Path, dotlock: Path, dead_pid: int, tail: bytes, length: int
) -> None:
    before = with_tail(spool, dotlock, dead_pid, tail, length)
    must_acquire(spool, 5).release()
    assert spool.read_bytes() == before + tail
    assert not dotlock.exists()


LONG = FROM_LINE + b"x" * 300_000 + b"\n"


@pytest.mark.parametrize(
    ("boot", "text", "nuls", "is_kept"),
    [
        (b"earlier", LONG[:-8000] + b"\0" * 8000, 0, False),
        (b"earlier", LONG[:4096] + b"\0" * (len(LONG) - 8192) + LONG[-4096:], 0, False),
        (b"earlier", LONG + b"\0", 0, False),
        (b"earlier", LONG[:-8000] + b"\0" * 8000, 5000, False),
        # What the message had of itself is no hole, and a program's end makes none.
        (b"earlier", LONG[:-8000] + b"\0" * 8000, 8000, True),
        (b"earlier", LONG + b"\n", 0, True),
        (b"", LONG[:-8000] + b"\0" * 8000, 0, True),
        # Nor is what another program has written behind it.
        (b"earlier", LONG[:-8000] + b"\0" * 8000 + b"\n\n" + FOREIGN, 0, True),
        (b"earlier", LONG + b"\n" + FOREIGN + b"\0", 0, True),
    ],
)
def test_message_that_a_power_cut_has_left_with_holes_is_cut_off(
    spool: Path, dotlock: Path, dead_pid: int, boot: bytes, text: bytes, nuls: int, *, is_kept: bool
) -> None:
    before = spool.read_bytes()
    length = len(LONG)
    record = our_record(spool, dead_pid, boot=boot or None, length=length, nuls=nuls)
    dotlock.write_bytes(record)
    spool.write_bytes(before + text)
    must_acquire(spool, 5).release()
    assert spool.read_bytes() == before + text * is_kept


def test_half_message_is_cut_off_though_this_boot_numbers_devices_otherwise(
    spool: Path, dotlock: Path, dead_pid: int
) -> None:
    before = spool.read_bytes()
    status = spool.stat()
    elsewhere = (status.st_dev + 1, status.st_ino)
    record = lock.Record(dead_pid, b"1", b"earlier", elsewhere, len(before), 1000, 0, FROM_LINE)
    dotlock.write_bytes(record.format())
    spool.write_bytes(before + FROM_LINE)
    must_acquire(spool, 5).release()
    assert spool.read_bytes() == before


@pytest.mark.parametrize("left", [b"", b"\0" * 200])
def test_half_message_is_cut_off_though_the_power_cut_took_the_records_text(
    spool: Path, dotlock: Path, dead_pid: int, left: bytes
) -> None:
    before = spool.read_bytes()
    place = (spool.stat().st_dev, spool.stat().st_ino)
    record = lock.Record(dead_pid, b"1", b"earlier", place, len(before), 1000, 0, FROM_LINE)
    fd = lock._create_dotlock(os.open(spool.parent, os.O_PATH), dotlock.name, record.format())
    os.close(fd)
    dotlock.write_bytes(left)
    spool.write_bytes(before + FROM_LINE + b"half")
    must_acquire(spool, 5).release()
    assert spool.read_bytes() == before
    assert not dotlock.exists()


def test_without_attributes_the_records_text_is_on_the_disk_before_it_has_a_name(
    spool: Path, dotlock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        real_fsync(fd)
        assert not dotlock.exists()
        synced.append(Path(f"/proc/self/fd/{fd}").read_bytes())

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no attributes here")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "setxattr", refuse)
    held = must_acquire(spool, 5)
    assert synced == [dotlock.read_bytes()]
    held.release()


def test_planted_record_of_another_user_cuts_nothing_off(
    spool: Path, dotlock: Path, dead_pid: int
) -> None:
    before = with_tail(spool, dotlock, dead_pid, FROM_LINE + b"text\n")
    os.chown(dotlock, NOBODY, NOBODY)
    must_miss(spool)
    make_old(dotlock)
    must_acquire(spool).release()
    assert spool.read_bytes() == before + FROM_LINE + b"text\n"


@pytest.mark.parametrize(("boot", "length"), [(None, 10**15), (b"earlier", 1 << 41)])
def test_false_record_about_a_huge_file_does_not_outlast_the_deadline(
    spool: Path, dotlock: Path, dead_pid: int, boot: bytes | None, length: int
) -> None:
    dotlock.write_bytes(our_record(spool, dead_pid, boot=boot, length=length, nuls=10**15))
    spool.write_bytes(spool.read_bytes() + FROM_LINE)
    os.truncate(spool, 1 << 42)
    began = time.monotonic()
    missed = acquire(spool, wait=0.2)
    assert time.monotonic() - began < 2
    assert isinstance(missed, Outcome)
    assert missed.code == 451
    assert spool.stat().st_size == 1 << 42
    os.truncate(spool, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"12\n",
        b"12\nmda1 1 boot 1:2 3 4\nFrom x\n",
        b"12\nmda1 1 boot 1:2 3 -4 5\nFrom x\n",
        b"12\nmda1 1 boot 1:2 3 4 x\nFrom x\n",
        b"12\nmda1 1 boot 1: 3 4 5\nFrom x\n",
        b"12\nmda1 1 boot 1:2 3 4 5\n",
        b"12\nmda2 1 boot 1:2 3 4 5\nFrom x\n",
        b"x\nmda1 1 boot 1:2 3 4 5\nFrom x\n",
        b"12\nmda1 1 boot 1:2 3 " + b"4" * 900 + b" 5\nFrom x\n",
    ],
)
def test_what_is_not_wholly_our_record_is_none(text: bytes) -> None:
    assert lock.parse_record(text) is None


def test_record_comes_back_as_it_was_written() -> None:
    record = lock.Record(12, b"34", b"boot-id", (5, 6), 7, 8, 9, FROM_LINE)
    again = lock.parse_record(record.format())
    assert again is not None
    assert [getattr(again, name) for name in lock.Record.__slots__] == [
        getattr(record, name) for name in lock.Record.__slots__
    ]


def test_without_tmpfile_support_the_lock_is_made_by_name(
    spool: Path, dotlock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_tmpfile(monkeypatch)
    held = must_acquire(spool)
    assert lock.parse_record(dotlock.read_bytes()) is not None
    held.release()
    assert os.listdir(spool.parent) == ["alice"]
    dotlock.touch()
    must_miss(spool)


def refuse_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def fake_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fake_open)


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_full_disk_leaves_no_lock_file(
    spool: Path, monkeypatch: pytest.MonkeyPatch, has_tmpfile: bool
) -> None:
    if not has_tmpfile:
        refuse_tmpfile(monkeypatch)

    def fake_write(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fake_write)
        missed = acquire(spool)
    assert isinstance(missed, Outcome)
    assert missed.code == 452
    assert os.listdir(spool.parent) == ["alice"]


def test_where_no_dotlock_can_be_made_nothing_is_locked(nobodys_spool: Path) -> None:
    os.chown(nobodys_spool.parent, 0, 0)
    nobodys_spool.parent.chmod(0o755)

    def run() -> None:
        become_nobody()
        missed = acquire(nobodys_spool, wait=5)
        assert isinstance(missed, Outcome)
        assert missed == Outcome(451, "4.3.0", "Local error (locking the mailbox: EACCES)")

    assert in_child(run) == 0


def test_release_leaves_a_lock_that_replaced_ours(spool: Path, dotlock: Path) -> None:
    notes: list[str] = []
    held = must_acquire(spool, notes=notes)
    dotlock.unlink()
    dotlock.write_bytes(b"1\n")
    held.release()
    assert dotlock.read_bytes() == b"1\n"
    assert notes == ["alice.lock: our lock was replaced while we held it"]
    dotlock.unlink()
    held = must_acquire(spool, notes=notes)
    dotlock.unlink()
    held.release()
    assert "cannot be removed" in notes[1]


def test_long_delivery_touches_its_lock(spool: Path, dotlock: Path) -> None:
    held = must_acquire(spool)
    make_old(dotlock)
    held.refresh()
    assert time.time() - dotlock.stat().st_mtime > 500
    held._refreshed -= lock.REFRESH_SECONDS
    held.refresh()
    assert time.time() - dotlock.stat().st_mtime < 5
    held.release()


def test_mailbox_that_is_renamed_meanwhile_is_opened_again(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_lockf = fcntl.lockf
    old_inode = spool.stat().st_ino

    def rename_first(fd: int, command: int) -> None:
        if spool.stat().st_ino == old_inode:
            fresh = spool.with_name("fresh")
            fresh.write_bytes(b"")
            fresh.rename(spool)
        real_lockf(fd, command)

    monkeypatch.setattr(fcntl, "lockf", rename_first)
    held = must_acquire(spool, wait=5)
    assert os.path.samestat(os.fstat(held.fd), spool.stat())
    held.release()


def test_mail_that_came_just_before_our_dotlock_starts_over(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_create, calls = lock._create_dotlock, 0

    def create(dir_fd: int, name: str, record: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            with spool.open("ab") as file:
                file.write(FOREIGN)
        return real_create(dir_fd, name, record)

    monkeypatch.setattr(lock, "_create_dotlock", create)
    # Closing another descriptor drops the fcntl lock of this process; the next try has it.
    held = must_acquire(spool, wait=5)
    assert calls == 2
    assert held.status.st_size == spool.stat().st_size
    held.release()


def test_lock_that_replaces_a_dead_one_just_now_is_not_removed(
    spool: Path, dotlock: Path, sleeper: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotlock.write_bytes(b"0\n")

    def replace(*_: object) -> bool:
        dotlock.unlink()
        dotlock.write_bytes(b"%d\n" % sleeper)
        return True

    monkeypatch.setattr(lock, "_is_stale", replace)
    must_miss(spool)
    assert dotlock.read_bytes() == b"%d\n" % sleeper


def test_dead_lock_that_somebody_else_removes_just_now_is_no_obstacle(
    spool: Path, dotlock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotlock.write_bytes(b"0\n")

    def remove(*_: object) -> bool:
        dotlock.unlink()
        return True

    monkeypatch.setattr(lock, "_is_stale", remove)
    held = must_acquire(spool)
    assert dotlock.read_bytes().startswith(b"%d\n" % os.getpid())
    held.release()
    assert not dotlock.exists()


def test_dead_lock_that_may_not_be_removed_is_waited_for(nobodys_spool: Path) -> None:
    dotlock = nobodys_spool.with_name("alice.lock")
    dotlock.touch()
    make_old(dotlock)
    os.chown(nobodys_spool.parent, 0, 0)
    nobodys_spool.parent.chmod(0o1777)

    def run() -> None:
        become_nobody()
        must_miss(nobodys_spool)

    assert in_child(run) == 0
    assert dotlock.exists()


def test_without_proc_a_signal_tells_who_is_alive(
    spool: Path, dotlock: Path, sleeper: int, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: bytes) -> bytes:
        raise FileNotFoundError(errno.ENOENT, "no /proc", path)

    monkeypatch.setattr(lock, "_read_file", missing)
    monkeypatch.setattr(lock, "_stamp_pid", 0)
    held = must_acquire(spool)
    assert dotlock.read_bytes().split(b"\n")[1].startswith(b"mda1 0 - ")
    held.release()
    assert not lock.has_died(sleeper, b"0", b"-")
    assert not lock.has_died(sleeper, b"12", b"some-boot")
    assert lock.has_died(dead_pid)


@pytest.mark.parametrize("text", [b"", b"1 (a) S 1 2", b"1 (a) S 1) 2 (3"])
def test_process_about_which_proc_is_strange_counts_as_alive(
    dead_pid: int, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    lock._own_stamp()
    monkeypatch.setattr(lock, "_read_file", lambda _: text)
    assert not lock.has_died(dead_pid)


def test_command_name_cannot_pretend_to_be_other_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tmp_path / "a) Z 1 2 ("
    shutil.copy(shutil.which("sleep") or "/bin/sleep", name)
    process = subprocess.Popen([name, "60"])
    assert not lock.has_died(process.pid)
    process.kill()
    process.wait()


def test_lock_without_proc_to_link_from_is_made_by_name(
    spool: Path, dotlock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: str, target: str, **_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "no /proc", source)

    monkeypatch.setattr(os, "link", missing)
    held = must_acquire(spool)
    assert lock.parse_record(dotlock.read_bytes()) is not None
    held.release()


def test_flock_alone_is_waited_for_where_it_is_wanted(spool: Path, dotlock: Path) -> None:
    with locked_by_another(spool, "flock") as pid:
        missed = must_miss(spool, takes_flock=True)
        assert missed.text == f"Mailbox is locked (alice (flock), PID {pid})"
        assert not dotlock.exists()
        must_acquire(spool).release()
    must_acquire(spool, takes_flock=True).release()


def test_fcntl_lock_is_waited_for_and_named_beside_flock(spool: Path) -> None:
    with locked_by_another(spool, "fcntl") as pid:
        missed = must_miss(spool, takes_flock=True)
        assert missed.text == f"Mailbox is locked (alice, PID {pid})"


def test_another_delivery_with_flock_is_named(spool: Path) -> None:
    held = must_acquire(spool, takes_flock=True)

    def miss() -> None:
        missed = must_miss(spool, takes_flock=True)
        assert missed.text == f"Mailbox is locked (alice, PID {os.getppid()})"

    assert in_child(miss) == 0
    held.release()


@pytest.mark.parametrize("takes_flock", [True, False])
def test_held_mailbox_has_flock_only_where_it_is_wanted(spool: Path, takes_flock: bool) -> None:
    held = must_acquire(spool, takes_flock=takes_flock)
    assert is_free(spool, "flock") is not takes_flock
    assert not is_free(spool, "fcntl")
    held.release()
    assert is_free(spool, "flock")
    assert is_free(spool, "fcntl")


def test_miss_of_any_lock_gives_back_the_others(spool: Path, dotlock: Path, sleeper: int) -> None:
    with locked_by_another(spool, "flock"):
        must_miss(spool, takes_flock=True)
        assert is_free(spool, "fcntl")
    dotlock.write_bytes(b"%d\n" % sleeper)
    must_miss(spool, takes_flock=True)
    assert is_free(spool, "fcntl")
    assert is_free(spool, "flock")


def test_flock_that_is_an_fcntl_lock_of_the_open_file_is_no_obstacle_to_itself(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock_of_nfs(file: int | IO[bytes], _: int) -> None:
        layout = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, layout)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    held = must_acquire(spool, takes_flock=True)
    assert not is_free(spool, "flock")
    assert not is_free(spool, "fcntl")
    held.release()
    with locked_by_another(spool, "flock"):
        assert "(alice, PID not known)" in must_miss(spool, takes_flock=True).text
    must_acquire(spool, takes_flock=True).release()


def test_without_proc_the_holder_of_flock_is_not_known(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    with locked_by_another(spool, "flock"), monkeypatch.context() as patch:
        patch.setattr("builtins.open", missing)
        assert "(alice (flock), PID not known)" in must_miss(spool, takes_flock=True).text
