"""How much a mailbox may hold: the limits of this host, not those of the file system.

A limit is asked before the locks are waited for, so that two deliveries at one time may both
still fit; what counts is what lies in the mailbox when it is asked.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from mda.model import Outcome

_BLOCK = 1 << 20
_PATIENCE = 10  # seconds
_FROM = b"\n\nFrom "
_FULL = Outcome(552, "5.2.2", "Mailbox full")
_FULL_FOR_NOW = Outcome(452, "4.2.2", "Mailbox full")


def judge(mailbox: str, adding: int, most_bytes: int, most_messages: int) -> Outcome | None:
    """552 5.2.2 where a message of `adding` bytes is too much for `mailbox`, else None.

    A limit of 0 is none. `mailbox` is a path, a Maildir's ends in a slash. Raises OSError.
    """
    if mailbox.endswith("/"):
        size, messages = _measure_maildir(mailbox)
    else:
        size, messages = _measure_mbox(mailbox, most_messages)
    is_too_large = most_bytes and size + adding > most_bytes
    is_too_many = most_messages and messages + 1 > most_messages
    return _FULL if is_too_large or is_too_many else None


def defer(outcome: Outcome, *, is_wanted: bool) -> Outcome:
    """A full mailbox, ours or the file system's to tell, as one that may be emptied."""
    is_full = (outcome.code, outcome.enhanced) == (_FULL.code, _FULL.enhanced)
    if not is_full or not is_wanted:
        return outcome
    return Outcome(_FULL_FOR_NOW.code, _FULL_FOR_NOW.enhanced, outcome.text)


def _measure_mbox(mailbox: str, most_messages: int) -> tuple[int, int]:
    """Bytes, and with a limit the messages up to it: that may read the whole file.

    What is no mailbox is empty here; the delivery will say what is wrong with it.
    """
    try:
        fd = os.open(mailbox, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return 0, 0
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return 0, 0
        return status.st_size, _count_messages(fd, status.st_size, most_messages)
    finally:
        os.close(fd)


def _count_messages(fd: int, size: int, most: int) -> int:
    """The From_ lines that a blank line, or nothing, stands before, as far as they matter.

    Holes are passed over: a user must not keep us reading what is not there.
    """
    until = time.monotonic() + _PATIENCE
    count = at = 0
    kept = b"\n\n"
    while count < most and at < size:
        begin = _find_data(fd, at)
        block = os.pread(fd, _BLOCK, begin)
        if not block:
            break
        octets = (kept if begin == at else b"") + block
        count += octets.count(_FROM)
        kept = octets[-len(_FROM) + 1 :]
        at = begin + len(block)
        _give_up_after(until)
    return count


def _find_data(fd: int, at: int) -> int:
    """Where the next byte that was written is, from `at` on."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return at + (1 << 62)  # nothing but a hole
        return at


def _give_up_after(until: float) -> None:
    if time.monotonic() > until:
        raise OSError(errno.ETIMEDOUT, "a mailbox too large to be counted")


def _measure_maildir(maildir: str) -> tuple[int, int]:
    """Bytes and messages of a Maildir and its folders, as far as names tell them."""
    until = time.monotonic() + _PATIENCE
    size = messages = 0
    # A link to a folder is none, as for deliveries.
    found = [each for each in _list(maildir) if each.is_dir(follow_symlinks=False)]
    folders = [each.name for each in found if each.name.startswith(".")]
    for folder in ("", *folders):
        for state in ("new", "cur"):
            for entry in _list(os.path.join(maildir, folder, state)):
                size += _size_of(entry)
                messages += 1
            _give_up_after(until)
    return size, messages


def _list(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size_of(entry: os.DirEntry[str]) -> int:
    """What the name says (`,S=1234`), else the file itself; 0 for one that is gone."""
    digits = entry.name.partition(",S=")[2].split(",")[0].split(":")[0]
    if digits.isascii() and digits.isdigit() and len(digits) < 20:
        return int(digits)
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
