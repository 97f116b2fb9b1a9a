"""What a virtual disk was told to do, and the disk that a power cut makes of it.

qemu's blklogwrites driver writes the log, in the format of the kernel's dm-log-writes: a
head of one sector, then entries, each a sector (where in the disk, how many sectors, flags,
the length of a mark) and the data of a write.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SURVIVING = 0.5  # of the writes that no flush has followed
SECTOR = 512
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _OTHERS = 1, ~1


@dataclass
class Entry:
    """A flush, or a write of `data` at `offset` in the disk; it ends at `end` in the log."""

    is_flush: bool
    offset: int
    data: bytes
    end: int


def read_log(path: Path) -> Iterator[Entry]:
    """The entries that are there in full."""
    with path.open("rb") as log:
        log.seek(SECTOR)
        while len(head := log.read(SECTOR)) == SECTOR:
            sector, count, flags, _ = _ENTRY.unpack_from(head)
            data = log.read(count * SECTOR)
            # The entry that the cut came upon is all zeros, or not there in full.
            if len(data) < count * SECTOR or not (flags or count):
                return
            if flags & _OTHERS:
                raise ValueError(f"a write of another kind: {flags}")
            yield Entry(bool(flags & _FLUSH), sector * SECTOR, data, log.tell())


def cut_power(entries: list[Entry], disk: Path) -> tuple[int, int]:
    """Bring to `disk` all that was flushed and a random half of the rest.

    The number of writes, and of those that are lost.
    """
    last = max((at for at, entry in enumerate(entries) if entry.is_flush), default=-1)
    writes = lost = 0
    with disk.open("r+b") as file:
        for at, entry in enumerate(entries):
            writes += bool(entry.data)
            if at > last and random.random() > SURVIVING:  # noqa: S311 (no secret)
                lost += bool(entry.data)
                continue
            file.seek(entry.offset)
            file.write(entry.data)
    return writes, lost
