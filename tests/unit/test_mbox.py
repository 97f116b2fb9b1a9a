"""Appending to an mbox: the bytes, the durability, the refusals, and the kill in between."""

from __future__ import annotations

import errno
import fcntl
import mailbox
import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from support.children import in_child, start_child

from mda.delivery import lock, mbox
from mda.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PREFIX = b"From bob@example.org Tue Jan  6 10:00:00 2026\nReturn-Path: <bob@example.org>\n"
TEXT = b"Subject: lunch\n\nat noon?\n"
DELIVERED = Outcome(250, "2.0.0", "Delivered to mailbox")
NOBODY = 65_534
OLD = b"From old Tue Jan  6 09:00:00 2026\n\nold\n\n"


def append(
    path: Path,
    text: bytes = TEXT,
    *,
    prefix: bytes = PREFIX,
    uid: int = 0,
    size: int = -1,
    wait: float = 5,
    notes: list[str] | None = None,
) -> Outcome:
    fd = os.memfd_create("text")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(text)
        return mbox.append(
            str(path),
            uid,
            0o660,
            prefix,
            fd,
            len(text) if size < 0 else size,
            time.monotonic() + wait,
            [] if notes is None else notes,
        )
    finally:
        os.close(fd)


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(uid)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """The path of a mailbox that is not there yet."""
    return tmp_path / "alice"


@pytest.fixture
def public_spool() -> Iterator[Path]:
    """A spool as Debian has it: 2775, with a group that is not the recipient's."""
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, 0, 8)
        os.chmod(directory, 0o2775)
        yield Path(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_new_mailbox_holds_prefix_text_and_a_blank_line(box: Path) -> None:
    before = os.umask(0o077)
    try:
        assert append(box) == DELIVERED
    finally:
        os.umask(before)
    assert box.read_bytes() == PREFIX + TEXT + b"\n"
    assert stat.S_IMODE(box.stat().st_mode) == 0o660
    assert os.listdir(box.parent) == ["alice"]


@pytest.mark.parametrize(
    ("left", "separator"),
    [
        (b"", b""),
        (b"\n", b"\n"),
        (b"x", b"\n\n"),
        (b"\n\n", b""),
        (b"From old\n\nold\n\n", b""),
        (b"From old\n\nold\n", b"\n"),
        (b"From old\n\nold", b"\n\n"),
    ],
)
def test_message_follows_a_blank_line_whatever_was_there(
    box: Path, left: bytes, separator: bytes
) -> None:
    box.write_bytes(left)
    assert append(box) == DELIVERED
    assert box.read_bytes() == left + separator + PREFIX + TEXT + b"\n"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (b"Subject: x\n\nno end", b"\n\n"),
        (b"", b"\n"),
        (b"\n", b"\n"),
        (b"a: \0\r\xff\n\n" + b"x" * 300_000, b"\n\n"),
        (b"y" * mbox._BLOCK, b"\n\n"),
        (b"y" * (mbox._BLOCK - 1) + b"\n", b"\n"),
        (b"y" * (3 * mbox._BLOCK - 1) + b"\n", b"\n"),
    ],
    ids=["no end", "empty", "one line", "large", "one block", "whole block", "three blocks"],
)
def test_text_is_kept_byte_for_byte_and_ended(box: Path, text: bytes, end: bytes) -> None:
    box.write_bytes(OLD)
    assert append(box, text) == DELIVERED
    assert box.read_bytes() == OLD + PREFIX + text + end


def test_mailbox_has_new_mail_for_the_shell(box: Path) -> None:
    append(box)
    assert int(box.stat().st_mtime) > int(box.stat().st_atime)
    box.read_bytes()
    now = time.time()
    os.utime(box, (now, now))
    append(box)
    assert int(box.stat().st_mtime) > int(box.stat().st_atime)


def test_mailbox_and_new_name_are_synced_before_success(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, int]] = []
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        real_fsync(fd)
        status = os.fstat(fd)
        is_directory = stat.S_ISDIR(status.st_mode)
        synced.append((is_directory, -1 if is_directory else status.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    append(box)
    size = box.stat().st_size
    assert synced == [(False, size), (True, -1)]
    synced.clear()
    append(box)
    assert synced == [(False, 2 * size)]


def test_recipients_own_rights_suffice_in_the_spool(public_spool: Path) -> None:
    box = public_spool / "alice"

    def run() -> None:
        become(NOBODY, 8)
        assert append(box, uid=NOBODY) == DELIVERED
        assert append(box, uid=NOBODY) == DELIVERED

    assert in_child(run) == 0
    status = box.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (NOBODY, 8, 0o660)
    assert os.listdir(public_spool) == ["alice"]


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_mailbox_of_another_user_is_refused_with_the_cure(public_spool: Path, mode: int) -> None:
    box = public_spool / "alice"
    box.write_bytes(OLD)
    os.chown(box, 1, 8)
    box.chmod(mode)

    def run() -> None:
        become(NOBODY, 8)
        refused = append(box, uid=NOBODY)
        text = f"Mailbox {box} is owned by daemon, not by nobody (as root: chown nobody {box})"
        assert refused == Outcome(451, "4.2.0", text)

    assert in_child(run) == 0
    assert box.read_bytes() == OLD
    assert os.listdir(public_spool) == ["alice"]


def test_root_does_not_write_to_a_users_mailbox_as_its_own(box: Path) -> None:
    box.write_bytes(OLD)
    os.chown(box, 123_456, 0)
    assert "is owned by uid 123456, not by root" in append(box).text
    assert box.read_bytes() == OLD


def test_new_mailbox_that_would_be_somebody_elses_is_not_left(box: Path) -> None:
    assert append(box, uid=NOBODY).code == 451
    assert os.listdir(box.parent) == []


def test_own_mailbox_without_write_permission_is_a_temporary_failure(public_spool: Path) -> None:
    box = public_spool / "alice"
    box.touch(0o400)
    os.chown(box, NOBODY, 8)

    def run() -> None:
        become(NOBODY, 8)
        refused = append(box, uid=NOBODY)
        assert refused == Outcome(451, "4.3.0", "Local error (opening the mailbox: EACCES)")

    assert in_child(run) == 0


@pytest.mark.parametrize("kind", ["symlink", "dangling", "directory", "fifo", "hard link"])
def test_what_is_no_plain_mailbox_is_refused_untouched(box: Path, kind: str) -> None:
    other = box.with_name("other")
    other.write_bytes(OLD)
    match kind:
        case "symlink":
            box.symlink_to(other)
        case "dangling":
            box.symlink_to(box.with_name("nowhere"))
        case "directory":
            box.mkdir()
        case "fifo":
            os.mkfifo(box)
        case _:
            box.hardlink_to(other)
    refused = append(box)
    reasons = {
        "symlink": "is a symbolic link",
        "dangling": "is a symbolic link",
        "hard link": "has 2 hard links",
    }
    assert (refused.code, refused.enhanced) == (451, "4.2.0")
    assert reasons.get(kind, "is not a regular file") in refused.text
    assert other.read_bytes() == OLD
    assert sorted(os.listdir(box.parent)) == ["alice", "other"]


@pytest.mark.parametrize("kind", ["hard link", "owner"])
def test_false_record_cuts_nothing_off_a_mailbox_that_is_refused(box: Path, kind: str) -> None:
    other = box.with_name("other")
    other.write_bytes(OLD + PREFIX + TEXT)
    if kind == "hard link":
        box.hardlink_to(other)
    else:
        other.rename(box)
        os.chown(box, NOBODY, 0)
    status = box.stat()
    file = (status.st_dev, status.st_ino)
    record = lock.Record(1 << 30, b"1", b"earlier", file, len(OLD), 10_000, 0, b"From ")
    box.with_name("alice.lock").write_bytes(record.format())
    assert append(box).enhanced == "4.2.0"
    assert box.read_bytes() == OLD + PREFIX + TEXT


def test_missing_directory_is_a_temporary_failure(box: Path) -> None:
    assert append(box / "below") == Outcome(
        451, "4.3.0", "Local error (opening the mailbox's directory: ENOENT)"
    )


@pytest.mark.parametrize("call", ["writev", "fsync"])
@pytest.mark.parametrize(
    ("number", "code", "enhanced"),
    [
        (errno.ENOSPC, 452, "4.3.1"),
        (errno.EFBIG, 452, "4.3.1"),
        (errno.EDQUOT, 552, "5.2.2"),
        (errno.EIO, 451, "4.3.0"),
    ],
)
def test_failed_write_leaves_bytes_and_times_as_they_were(
    box: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, enhanced: str, call: str
) -> None:
    box.write_bytes(OLD)
    os.utime(box, ns=(1_000_000_001, 2_000_000_002))
    real = getattr(os, call)

    def fail_later(fd: int, *arguments: object) -> object:
        # The second block of a message, or all of it when it is to be made durable.
        if call == "fsync" or os.fstat(fd).st_size > len(OLD):
            raise OSError(number, os.strerror(number))
        return real(fd, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_later)
        outcome = append(box, b"x" * (3 * mbox._BLOCK))
    assert (outcome.code, outcome.enhanced) == (code, enhanced)
    assert (box.stat().st_atime_ns, box.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert box.read_bytes() == OLD
    assert os.listdir(box.parent) == ["alice"]


@pytest.mark.parametrize("size", [100_000, 400_000])
def test_full_disk_leaves_the_mailbox_as_it_was(small_disk: Path, size: int) -> None:
    box = small_disk / "alice"
    box.write_bytes(OLD)
    os.utime(box, ns=(1_000_000_000, 2_000_000_000))
    outcome = append(box, b"x" * size)
    assert (outcome.code, outcome.enhanced) == (452, "4.3.1")
    assert box.read_bytes() == OLD
    assert box.stat().st_mtime_ns == 2_000_000_000
    assert os.listdir(small_disk) == ["alice"]
    assert append(box) == DELIVERED


def test_full_disk_leaves_no_new_mailbox(small_disk: Path) -> None:
    assert append(small_disk / "alice", b"x" * 100_000).code == 452
    assert os.listdir(small_disk) == []


def test_file_size_limit_of_ours_is_no_quota_of_the_users(box: Path) -> None:
    old = OLD + b"x" * 300_000
    box.write_bytes(old)
    os.utime(box, ns=(1_000_000_000, 2_000_000_000))

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, resource.RLIM_INFINITY))
        outcome = append(box, b"x" * 400_000)
        assert (outcome.code, outcome.enhanced) == (452, "4.3.1")

    assert in_child(run) == 0
    assert box.stat().st_mtime_ns == 2_000_000_000
    assert box.read_bytes() == old
    assert os.listdir(box.parent) == ["alice"]


def test_text_shorter_than_said_is_undone(box: Path) -> None:
    box.write_bytes(OLD)
    outcome = append(box, b"x" * 200_000, size=200_001)
    assert outcome == Outcome(451, "4.3.0", "Local error (writing the mailbox: EIO)")
    assert box.read_bytes() == OLD


def fail(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "input/output error")


def test_failed_sync_is_undone(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box.write_bytes(OLD)
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), box.stat()):
            fail()
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert append(box).code == 451
    assert box.read_bytes() == OLD


def test_what_cannot_be_undone_now_is_undone_by_the_next_delivery(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.write_bytes(OLD)
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        outcome = append(box, TEXT * 10_000, size=10_000_000, notes=notes)
    assert outcome.code == 451
    assert notes == ["the failed write could not be undone: input/output error"]
    assert box.stat().st_size > len(OLD)
    assert append(box) == DELIVERED
    assert box.read_bytes() == OLD + PREFIX + TEXT + b"\n"


def test_short_write_is_continued(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_writev, real_write = os.writev, os.write

    def writev(fd: int, parts: Sequence[bytes]) -> int:
        return real_writev(fd, [b"".join(parts)[:7]])

    def write(fd: int, data: bytes) -> int:
        # The lock's record is one write; what follows a short writev comes in sevens.
        return real_write(fd, data if b"mda1" in data else data[:7])

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "write", write)
    assert append(box) == DELIVERED
    assert box.read_bytes() == PREFIX + TEXT + b"\n"


def test_no_descriptor_is_left(box: Path) -> None:
    before = os.listdir("/proc/self/fd")
    append(box)
    append(box, b"x", size=2)
    append(box, uid=NOBODY)
    assert os.listdir("/proc/self/fd") == before


def test_a_descriptor_that_cannot_be_closed_changes_nothing(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_close = os.close

    def close(fd: int) -> None:
        real_close(fd)
        fail()

    append(box)
    notes: list[str] = []
    fd = os.memfd_create("text")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        place = (str(box), 0, 0o660, PREFIX, fd, 0)
        assert mbox.append(*place, time.monotonic() + 5, notes) == DELIVERED
    os.close(fd)
    assert notes == ["a descriptor cannot be closed: input/output error"] * 3
    assert box.read_bytes() == PREFIX + TEXT + b"\n" + PREFIX + b"\n"


def killed_after(writes: int) -> Callable[[int, list[bytes]], None]:
    """A stand-in for the write that ends the process after so many real ones."""
    real, done = mbox._write_whole, 0

    def write(fd: int, parts: list[bytes]) -> None:
        nonlocal done
        if done == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        real(fd, parts)

    return write


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_kill_during_an_append_is_repaired_by_the_next(
    box: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    box.write_bytes(OLD.removesuffix(b"\n"))
    before = box.read_bytes()

    def run() -> None:
        monkeypatch.setattr(mbox, "_write_whole", killed_after(writes))
        append(box, TEXT + b"x\n" * 500_000)

    assert in_child(run) == -signal.SIGKILL
    assert box.with_name("alice.lock").exists()
    assert (box.stat().st_size > len(before)) == (writes > 0)
    notes: list[str] = []
    began = time.monotonic()
    assert append(box, notes=notes) == DELIVERED
    assert time.monotonic() - began < 1
    assert box.read_bytes() == before + b"\n" + PREFIX + TEXT + b"\n"
    assert len(notes) == (2 if writes else 1)
    assert os.listdir(box.parent) == ["alice"]


def test_kill_after_the_last_write_loses_nothing(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        monkeypatch.setattr(mbox, "_show_as_new", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        append(box)

    assert in_child(run) == -signal.SIGKILL
    assert append(box, wait=0) == DELIVERED
    assert box.read_bytes() == 2 * (PREFIX + TEXT + b"\n")


def test_kill_at_any_moment_leaves_only_whole_messages(box: Path) -> None:
    text = TEXT + b"some line of text\n" * 1_500_000
    whole = PREFIX + text + b"\n"
    small = PREFIX + TEXT + b"\n"
    torn = 0
    for moment in range(12):
        box.write_bytes(OLD)
        pid = start_child(lambda: append(box, text))
        time.sleep(0.004 * moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += len(OLD) < box.stat().st_size < len(OLD + whole)
        assert append(box) == DELIVERED
        stored = box.read_bytes()
        assert stored in (OLD + small, OLD + whole + small)
        assert os.listdir(box.parent) == ["alice"]
    print(f"{torn} of 12 kills tore a message")


def test_parallel_deliveries_lose_and_tear_nothing(box: Path) -> None:
    def run(worker: int) -> None:
        for number in range(50):
            text = b"X-Id: %d-%d\n\n" % (worker, number) + b"%d\n" % worker * 2000
            assert append(box, text, wait=60) == DELIVERED

    pids = [start_child(lambda worker=worker: run(worker)) for worker in range(4)]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    stored = box.read_bytes()
    seen = set()
    for message in stored.removesuffix(b"\n\n").split(b"\n\nFrom "):
        identity = message.split(b"X-Id: ")[1].split(b"\n")[0]
        seen.add(identity)
        assert message.endswith(b"\n\n" + b"%b\n" % identity[:1] * 1999 + identity[:1])
    assert seen == {b"%d-%d" % (w, n) for w in range(4) for n in range(50)}
    assert stored.count(PREFIX) == 200


def test_readers_find_the_messages(box: Path, tmp_path: Path) -> None:
    for left in (b"", b"x", b"\n"):
        with box.open("ab") as file:
            file.write(left)
        append(box, b"Subject: x\n\n>From here\n>>From there\nno end")
    reader = mailbox.mbox(box)
    assert len(reader) == 3
    reader.close()
    if shutil.which("formail"):
        with box.open("rb") as stdin:
            parts = subprocess.run(
                ["formail", "-s", "sh", "-c", "cat >/dev/null; echo message"],
                stdin=stdin,
                capture_output=True,
                check=True,
            )
        assert parts.stdout == b"message\n" * 3


def test_delivery_does_not_count_as_reading(box: Path) -> None:
    box.write_bytes(OLD)
    os.utime(box, ns=(1_000_000_000, 2_000_000_000))
    append(box)
    assert box.stat().st_atime_ns == 1_000_000_000


def test_mailbox_that_somebody_creates_just_now_is_used(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, calls = os.open, 0

    def open_late(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        nonlocal calls
        calls += path == "alice"
        if path == "alice" and calls == 1:
            box.write_bytes(OLD)
            raise FileNotFoundError(errno.ENOENT, "not yet")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_late)
    assert append(box) == DELIVERED
    assert box.read_bytes() == OLD + PREFIX + TEXT + b"\n"


def test_long_append_touches_its_lock(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0)
    touched = []
    real_utime = os.utime

    def utime(fd: int, **options: tuple[int, int]) -> None:
        touched.append(os.readlink(f"/proc/self/fd/{fd}"))
        real_utime(fd, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "utime", utime)
    assert append(box, b"x" * (3 * mbox._BLOCK)) == DELIVERED
    assert len([path for path in touched if path != str(box)]) == 2


def test_large_message_is_made_durable_piece_by_piece(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real_fdatasync = os.fdatasync

    def fdatasync(fd: int) -> None:
        real_fdatasync(fd)
        sizes.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert append(box, b"x" * (2 * mbox._SYNC_EVERY + 1)) == DELIVERED
    assert sizes == [len(PREFIX) + mbox._SYNC_EVERY, len(PREFIX) + 2 * mbox._SYNC_EVERY]


def test_mailbox_that_somebody_removes_just_now_is_made_again(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.touch()
    real_lockf, calls = fcntl.lockf, 0

    def remove_first(fd: int, command: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            box.unlink()
        real_lockf(fd, command)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    assert append(box) == DELIVERED
    assert box.read_bytes() == PREFIX + TEXT + b"\n"
