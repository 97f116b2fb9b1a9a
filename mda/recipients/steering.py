"""The files that steer mail, opened: whoever can write one decides where mail goes."""

from __future__ import annotations

import errno
import os
import stat

from mda.model import Outcome

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS_MAY_WRITE = 0o022
_WORLD_MAY_WRITE = 0o002


class Distrusted(Exception):
    """A file that steers mail is not one to follow; `outcome` defers and says why."""

    def __init__(self, file: str, reason: str, remedy: str = "") -> None:
        shown = printable(file)
        help_text = f" ({remedy.replace('FILE', shown)})" if remedy else ""
        self.outcome = Outcome(451, "4.3.5", f"{shown} {reason}{help_text}")
        super().__init__(self.outcome.text)


def open_trusted(
    path: str,
    owners: tuple[int, ...] | None,
    private_gid: int = -1,
    place: tuple[int, str] | None = None,
) -> int:
    """A descriptor of the regular file `path`, which one of `owners` owns (None: anybody).

    Nobody else may write it but the members of `private_gid`, a group of one. `place` is
    its directory's descriptor and its name there, where that is open already. Raises
    FileNotFoundError, Distrusted, or another OSError.
    """
    fd = os.open(path, _FLAGS) if place is None else os.open(place[1], _FLAGS, dir_fd=place[0])
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Distrusted(path, "is not a regular file")
        judge_writers(path, status, owners, private_gid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def judge_writers(
    path: str, status: os.stat_result, owners: tuple[int, ...] | None, private_gid: int = -1
) -> None:
    """Raise Distrusted where others than `owners` decide what `path` holds."""
    if owners is not None and status.st_uid not in owners:
        raise Distrusted(path, f"is owned by uid {status.st_uid}, not by uid {owners[0]}")
    harmful = _WORLD_MAY_WRITE if status.st_gid == private_gid else _OTHERS_MAY_WRITE
    if status.st_mode & harmful:
        raise Distrusted(path, "can be written by others", "chmod go-w FILE")


def read_whole(path: str, fd: int, most: int) -> bytes:
    """What is in the file, at most `most` bytes; raises Distrusted beyond, OSError."""
    pieces = []
    left = most + 1
    while left and (piece := os.read(fd, min(left, 1 << 20))):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise Distrusted(path, f"is larger than {most} bytes")
    return b"".join(pieces)


def cannot_read(path: str, error: OSError) -> Outcome:
    """A file that steers mail and cannot be read: never taken for one that is not there."""
    reason = errno.errorcode.get(error.errno or 0, "unknown error")
    return Outcome(451, "4.3.5", f"{printable(path)} cannot be read: {reason}")


def printable(text: str) -> str:
    """`text` as printable ASCII, for an outcome's text."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:300])
