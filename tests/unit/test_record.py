"""What a terminal was shown is kept, within bounds, in the user's own file and no other."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from mda.terminal import record
from mda.terminal.record import Entry

MOST = 16_384


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / record.FILE


def entry(number: int, block: bytes = b"\r\n| hello\r\n", sender: str = "bob") -> Entry:
    return Entry(number, sender, block, is_verified=number % 2 == 0)


def add(home: Path, *entries: Entry, most: int = MOST) -> None:
    for each in entries:
        record.append(str(home), os.getuid(), each, most)


def kept(home: Path) -> list[tuple[int, str, bytes, bool]]:
    return [(e.when, e.sender, e.block, e.is_verified) for e in record.read(str(home))]


def test_entries_come_back_in_their_order(tmp_path: Path, file: Path) -> None:
    assert kept(tmp_path) == []
    add(tmp_path, entry(1, sender="a b@x"), entry(2, b"\r\n| 5 verified 3 x\n| y\r\n"))
    assert kept(tmp_path) == [
        (1, "a b@x", b"\r\n| hello\r\n", False),
        (2, "bob", b"\r\n| 5 verified 3 x\n| y\r\n", True),
    ]
    assert file.stat().st_mode & 0o7777 == 0o600
    assert file.parent.stat().st_mode & 0o7777 == 0o700


def test_a_sender_cannot_end_the_line(tmp_path: Path) -> None:
    add(tmp_path, entry(1, sender="x\n9 verified 0 root\n\x1b[2J"), entry(2))
    assert [each[0] for each in kept(tmp_path)] == [1, 2]
    assert kept(tmp_path)[0][1] == "x?9 verified 0 root??[2J"


def test_the_oldest_go_when_there_is_no_more_room(tmp_path: Path, file: Path) -> None:
    for number in range(200):
        add(tmp_path, entry(number, b"x" * 500))
        assert file.stat().st_size <= MOST
        numbers = [each[0] for each in kept(tmp_path)]
        assert numbers == list(range(number + 1 - len(numbers), number + 1))
        assert len(numbers) >= min(number + 1, 14)


def test_what_somebody_has_made_of_the_file_is_survived(tmp_path: Path, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"garbage\n" * 10_000)
    add(tmp_path, entry(1), entry(2))
    assert [each[0] for each in kept(tmp_path)] == [1, 2]
    file.write_bytes(b"7 verified 99999999999 x\nshort")
    assert kept(tmp_path) == [(7, "x", b"short", True)]


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "hard link"])
def test_nothing_but_a_file_of_ones_own_is_written(tmp_path: Path, file: Path, kind: str) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    file.parent.mkdir(parents=True)
    if kind == "link":
        file.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        os.link(other, file)
    begun = time.monotonic()
    with pytest.raises(OSError, match="messages"):
        add(tmp_path, entry(1))
    assert time.monotonic() - begun < 1
    assert other.read_bytes() == b"precious"


def test_a_file_of_somebody_else_is_not_written(tmp_path: Path, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    os.chown(file, 1001, 1001)
    with pytest.raises(PermissionError):
        add(tmp_path, entry(1))
    assert file.read_bytes() == b""


def test_a_file_that_is_locked_is_not_waited_for_long(tmp_path: Path, file: Path) -> None:
    add(tmp_path, entry(1))
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(BlockingIOError):
            add(tmp_path, entry(2))
        assert time.monotonic() - begun < 1
    add(tmp_path, entry(3))
    assert [each[0] for each in kept(tmp_path)] == [1, 3]


def test_a_full_disk_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, entry(1))
    real = os.write

    def write_some(fd: int, octets: bytes) -> int:
        if len(octets) < 20:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, octets[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        with pytest.raises(OSError, match="full"):
            add(tmp_path, entry(2))
    add(tmp_path, entry(3))
    assert [each[0] for each in kept(tmp_path)] == [1, 3]


def test_no_descriptor_is_left(tmp_path: Path, file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    add(tmp_path, entry(1))
    record.read(str(tmp_path))
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        add(tmp_path, entry(2))
    assert len(os.listdir("/proc/self/fd")) == before
