"""What a user's terminals were shown, kept for `mda messages` and `mda reply`.

One file in the user's home, 0600, written with the user's rights, which the broker has
taken before. An entry is a line with the time, whether the sender was verified, the size
of the block and the sender, and then the block as the terminal got it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = ".local/state/mda"
FILE = FOLDER + "/messages"
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WAIT_SECONDS = 0.2
_PAUSE = 0.005


class Entry:
    """One message: `when` in seconds since 1970, the sender, and the block it was shown as.

    `sender` is a login name if it `is_verified`, else what MAIL FROM said.
    """

    __slots__ = ("block", "is_verified", "sender", "when")

    def __init__(self, when: int, sender: str, block: bytes, *, is_verified: bool) -> None:
        self.when = when
        self.sender = sender
        self.block = block
        self.is_verified = is_verified


def append(home: str, uid: int, entry: Entry, most: int) -> None:
    """Add `entry` to the file of `uid`, which then has at most `most` bytes.

    The oldest go first. Raises OSError where that cannot be done, and never waits long.
    """
    fd = _open(home, uid)
    try:
        _lock(fd)
        new = _pack(entry)
        size = os.fstat(fd).st_size
        if size + len(new) > most:
            kept = _newest(_read(fd, most), most // 2)
            os.ftruncate(fd, 0)
            new, size = kept + new, 0
        _write(fd, new, size)
    finally:
        os.close(fd)


def read(home: str) -> list[Entry]:
    """The entries, the oldest first; none where nothing was kept. Raises OSError."""
    try:
        fd = os.open(os.path.join(home, FILE), os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return []
    with open(fd, "rb") as file:
        return [entry for _, entry in _unpack(file.read())]


def _open(home: str, uid: int) -> int:
    # No O_CREAT at first, nor makedirs: on most calls everything is there.
    path = os.path.join(home, FILE)
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | _FLAGS)
    except FileNotFoundError:
        _make_folders(home)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _FLAGS, 0o600)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_uid == uid and status.st_nlink == 1:
        return fd
    os.close(fd)
    raise PermissionError(f"{path} is no file of the user's own")


def _make_folders(home: str) -> None:
    path = home
    for name in FOLDER.split("/"):
        path = os.path.join(path, name)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue


def _lock(fd: int) -> None:
    """Not by `filelock`: it would follow a link, and wait for a FIFO, in a user's own folder."""
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _pack(entry: Entry) -> bytes:
    sender = "".join(c if c.isprintable() else "?" for c in entry.sender)
    kind = "verified" if entry.is_verified else "claimed"
    head = f"{entry.when} {kind} {len(entry.block)} {sender}\n"
    return head.encode("utf-8", "replace") + entry.block


def _unpack(text: bytes) -> Iterator[tuple[int, Entry]]:
    """Each entry and where it begins; the rest, where it is no entry, is left out."""
    at = 0
    while at < len(text):
        line, newline, _ = text[at : at + 4096].partition(b"\n")
        match line.decode("utf-8", "replace").split(" ", 3):
            case [when, "verified" | "claimed" as kind, size, sender] if (
                newline and when.isdecimal() and size.isdecimal() and len(when) + len(size) < 40
            ):
                begin = at + len(line) + 1
            case _:
                return
        block = text[begin : begin + int(size)]
        yield at, Entry(int(when), sender, block, is_verified=kind == "verified")
        at = begin + int(size)


def _newest(text: bytes, most: int) -> bytes:
    """The last whole entries of `text` that have at most `most` bytes together."""
    begins = [at for at, _ in _unpack(text) if len(text) - at <= most]
    return text[begins[0] :] if begins else b""


def _read(fd: int, most: int) -> bytes:
    """What is in the file, unless somebody has made it larger than we ever do."""
    pieces = []
    left, at = most, 0
    while left and (piece := os.pread(fd, left, at)):
        pieces.append(piece)
        left -= len(piece)
        at += len(piece)
    return b"".join(pieces) if left else b""


def _write(fd: int, octets: bytes, size: int) -> None:
    """Append; half an entry would hide those after it, so a failure leaves none."""
    try:
        while octets:
            octets = octets[os.write(fd, octets) :]
    except OSError:
        os.ftruncate(fd, size)
        raise
