"""The files that steer mail, opened: whoever can write one decides where mail goes."""

from __future__ import annotations

import errno
import os
import stat

from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    IsPrivate = Callable[[int], bool]

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Distrusted(Exception):
    """A file that steers mail is not one to follow; `outcome` defers and says why."""

    def __init__(self, file: str, reason: str, remedy: str = "") -> None:
        shown = printable(file)
        help_text = f" ({remedy.replace('FILE', shown)})" if remedy else ""
        self.outcome = Outcome(451, "4.3.5", f"{shown} {reason}{help_text}")
        super().__init__(self.outcome.text)


def open_trusted(
    path: str, owners: tuple[int, ...] | None, is_private: IsPrivate, dir_fd: int | None = None
) -> int:
    """A descriptor of the regular file `path`, which one of `owners` owns (None: anybody).

    Nobody else may write it, but a group for which `is_private` says that it is one
    person's. With `dir_fd`, the descriptor of its directory, only the path's last part is
    looked up. Raises FileNotFoundError where there is nothing, Distrusted, or another
    OSError.
    """
    name = path if dir_fd is None else os.path.basename(path)
    try:
        fd = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        fd = _follow_link(path, name, dir_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Distrusted(path, "is not a regular file")
        judge_writers(path, status, owners, is_private)
    except Distrusted:
        os.close(fd)
        raise
    return fd


def _follow_link(path: str, name: str, dir_fd: int | None) -> int:
    """A link is followed to what is judged then; but not for nothing, as if it were not there."""
    try:
        return os.open(name, _FLAGS, dir_fd=dir_fd)
    except FileNotFoundError:
        raise Distrusted(path, "is a link that leads nowhere") from None


def nobodys(_gid: int) -> bool:
    """No group is private."""
    return False


def judge_writers(
    path: str, status: os.stat_result, owners: tuple[int, ...] | None, is_private: IsPrivate
) -> None:
    """Raise Distrusted where others than `owners` decide what `path` holds."""
    if owners is not None and status.st_uid not in owners:
        raise Distrusted(path, f"is owned by uid {status.st_uid}, not by uid {owners[0]}")
    mode = status.st_mode
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not is_private(status.st_gid)):
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
