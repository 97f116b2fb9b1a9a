"""How much a mailbox may hold: the limits of this host, not those of the file system.

A limit is asked before the locks are waited for, so that two deliveries at one time may both
still fit; what counts is what lies in the mailbox when it is asked.
"""

from __future__ import annotations

import errno
import os
import stat

from mda.model import Outcome

_BLOCK = 1 << 20
_FROM = b"\n\nFrom "
_FULL = Outcome(552, "5.2.2", "Mailbox full")
_FULL_FOR_NOW = Outcome(452, "4.2.2", "Mailbox full")


def judge(mailbox: str, adding: int, most_bytes: int, most_messages: int) -> Outcome | None:
    """552 5.2.2 where a message of `adding` bytes is too much for `mailbox`, else None.

    A limit of 0 is none. `mailbox` is a path, a Maildir's ends in a slash. Raises OSError.
    """
    measure = _measure_maildir if mailbox.endswith("/") else _measure_mbox
    size, messages = measure(mailbox, counts_messages=most_messages > 0)
    is_too_large = most_bytes and size + adding > most_bytes
    is_too_many = most_messages and messages + 1 > most_messages
    return _FULL if is_too_large or is_too_many else None


def defer(outcome: Outcome, *, is_wanted: bool) -> Outcome:
    """A full mailbox, ours or the file system's to tell, as one that may be emptied."""
    is_full = (outcome.code, outcome.enhanced) == (_FULL.code, _FULL.enhanced)
    if not is_full or not is_wanted:
        return outcome
    return Outcome(_FULL_FOR_NOW.code, _FULL_FOR_NOW.enhanced, outcome.text)


def _measure_mbox(mailbox: str, *, counts_messages: bool) -> tuple[int, int]:
    """Bytes, and the messages where they are asked for: that reads the whole file.

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
        return status.st_size, _count_messages(fd) if counts_messages else 0
    finally:
        os.close(fd)


def _count_messages(fd: int) -> int:
    """The From_ lines that a blank line, or nothing, stands before."""
    count = 0
    kept = b"\n\n"
    while block := os.read(fd, _BLOCK):
        octets = kept + block
        count += octets.count(_FROM)
        kept = octets[-len(_FROM) + 1 :]
    return count


def _measure_maildir(maildir: str, *, counts_messages: bool) -> tuple[int, int]:
    """Bytes and messages of a Maildir and its folders, as far as names tell them."""
    size = messages = 0
    for folder in ("", *_folders(maildir)):
        for state in ("new", "cur"):
            for name, path in _list(os.path.join(maildir, folder, state)):
                size += _size_of(name, path)
                messages += 1
    return size, messages if counts_messages else 0


def _folders(maildir: str) -> list[str]:
    return [name for name, _ in _list(maildir) if name.startswith(".")]


def _list(directory: str) -> list[tuple[str, str]]:
    try:
        with os.scandir(directory) as entries:
            return [(entry.name, entry.path) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size_of(name: str, path: str) -> int:
    """What the name says (`,S=1234`), else the file itself; 0 for one that is gone."""
    digits = name.partition(",S=")[2].split(",")[0].split(":")[0]
    if digits.isdigit():
        return int(digits)
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0
