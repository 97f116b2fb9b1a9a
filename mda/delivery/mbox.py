"""One message appended to an mbox mailbox: durable before success, or as if never begun.

Everything is decided on the opened file (owner, kind, links), under its locks, with the
recipient's own rights; the broker has taken them before.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat

from mda.delivery.lock import MailboxLock, acquire, is_left_by_dead, printable
from mda.model import Outcome, classify_os_error

_BLOCK = 128 * 1024
# The dotlock is touched between blocks; no wait for the disk in between may be long.
_SYNC_EVERY = 128 * _BLOCK
# What the dotlock of a repair says of its message: nothing of it can be half there.
_NO_MESSAGE = (b"From \n", 0, 0)
# O_NOATIME, since a mailbox read after its last change has no new mail for the shells.
_FLAGS = (
    os.O_RDWR
    | os.O_APPEND
    | os.O_NOFOLLOW
    | os.O_NONBLOCK
    | os.O_NOCTTY
    | os.O_CLOEXEC
    | os.O_NOATIME
)


def append(
    mailbox: str,
    uid: int,
    mode: int,
    prefix: bytes,
    text_fd: int,
    size: int,
    deadline: float,
    notes: list[str],
    *,
    takes_flock: bool = False,
) -> Outcome:
    """Append `prefix` and the text to `mailbox`, which `uid` owns or will own.

    `prefix` is the From_ line and the header lines that we add, `text_fd` holds `size`
    bytes of text with LF line ends and mboxrd quoting, `deadline` (time.monotonic()) ends
    the wait for the locks, which are three with `takes_flock`; `mode` is a new mailbox's.
    250 means that the message is on disk; after anything else the mailbox is as before
    (design, decision 3). What was repaired on the way is added to `notes`, for the log.
    """
    opener = _Opener(mailbox, uid, mode)
    from_line = prefix[: prefix.find(b"\n") + 1]
    try:
        nuls = prefix.count(0) + _count_nuls(text_fd, size)
    except OSError as error:
        return classify_os_error(error, "reading the message")
    message = (from_line, len(prefix) + size, nuls)
    lock = acquire(mailbox, opener.open, message, deadline, notes, takes_flock=takes_flock)
    if isinstance(lock, Outcome):
        return lock
    try:
        refusal = refuse(mailbox, lock.status, uid)
        outcome = refusal or _append_locked(lock, prefix, text_fd, size)
        if not outcome.is_done and opener.has_created and lock.status.st_size == 0:
            _unlink_empty(lock)
        return outcome
    finally:
        lock.release()


def _count_nuls(text_fd: int, size: int) -> int:
    """How many of the text's bytes are NUL: more in the mailbox were never written."""
    return sum(
        os.pread(text_fd, min(_BLOCK, size - at), at).count(0) for at in range(0, size, _BLOCK)
    )


def repair(
    mailbox: str, uid: int, deadline: float, notes: list[str], *, takes_flock: bool = False
) -> Outcome | None:
    """Undo what a killed delivery left half done in `mailbox`, which `uid` owns.

    None says that there is nothing more to undo, an outcome why that could not be done
    now. What was repaired is added to `notes`.
    """
    try:
        if not is_left_by_dead(mailbox):
            return None
    except OSError:
        # Where nothing can be looked at, nothing was delivered either.
        return None
    opener = _Opener(mailbox, uid, None)
    lock = acquire(mailbox, opener.open, _NO_MESSAGE, deadline, notes, takes_flock=takes_flock)
    if isinstance(lock, Outcome):
        return lock
    lock.release()
    return None


class _Opener:
    """Opens the mailbox, or creates it with `mode`; remembers that it did so.

    Without a mode it creates nothing.
    """

    __slots__ = ("_mailbox", "_mode", "_uid", "has_created")

    def __init__(self, mailbox: str, uid: int, mode: int | None) -> None:
        self._mailbox = mailbox
        self._uid = uid
        self._mode = mode
        self.has_created = False

    def open(self, dir_fd: int, name: str) -> int | Outcome:
        """A descriptor of the mailbox, or why there is none."""
        try:
            try:
                # Without O_CREAT first: fs.protected_regular forbids it in a sticky spool.
                fd = os.open(name, _FLAGS, dir_fd=dir_fd)
            except FileNotFoundError:
                if self._mode is None:
                    raise
                return self._create(dir_fd, name, self._mode)
        except OSError as error:
            return _explain(error, self._mailbox, (dir_fd, name), self._uid)
        # Before the locks, since what a dead delivery left is repaired on the way to them.
        refusal = refuse(self._mailbox, os.fstat(fd), self._uid)
        if refusal is None:
            return fd
        os.close(fd)
        return refusal

    def _create(self, dir_fd: int, name: str, mode: int) -> int:
        try:
            fd = os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=dir_fd)
        except FileExistsError:
            return os.open(name, _FLAGS, dir_fd=dir_fd)
        self.has_created = True
        os.fchmod(fd, mode)
        return fd


def _explain(error: OSError, mailbox: str, place: tuple[int, str], uid: int) -> Outcome:
    """Why the mailbox could not be opened, in words that help the administrator."""
    dir_fd, name = place
    if error.errno in (errno.EPERM, errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENXIO):
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return classify_os_error(error, "opening the mailbox")
        refusal = refuse(mailbox, status, uid)
        if refusal is not None:
            return refusal
    return classify_os_error(error, "opening the mailbox")


def refuse(mailbox: str, status: os.stat_result, uid: int) -> Outcome | None:
    """Why nothing may be written to this file, or None: temporary, so nothing bounces."""
    shown = printable(mailbox)
    if stat.S_ISLNK(status.st_mode):
        return Outcome(451, "4.2.0", f"Mailbox {shown} is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        return Outcome(451, "4.2.0", f"Mailbox {shown} is not a regular file")
    if status.st_uid != uid:
        owner, user = user_name(status.st_uid), user_name(uid)
        help_text = f"as root: chown {user} {shown}"
        return Outcome(
            451, "4.2.0", f"Mailbox {shown} is owned by {owner}, not by {user} ({help_text})"
        )
    if status.st_nlink != 1:
        return Outcome(451, "4.2.0", f"Mailbox {shown} has {status.st_nlink} hard links")
    return None


def user_name(uid: int) -> str:
    """The login name of `uid` in printable ASCII, or "uid 1000" where none is known."""
    try:
        return printable(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return f"uid {uid}"


def _append_locked(lock: MailboxLock, prefix: bytes, text_fd: int, size: int) -> Outcome:
    is_durable = False
    try:
        head = _separator(lock.fd, lock.status.st_size) + prefix
        _write_message(lock, head, text_fd, size)
        _show_as_new(lock.fd)
        os.fsync(lock.fd)
        if lock.status.st_size == 0:
            # An empty mailbox may be new, by us or by a try of ours that missed the locks.
            _sync_directory(lock.dir_fd)
        is_durable = True
    except OSError as error:
        return classify_os_error(error, "writing the mailbox")
    finally:
        # Also when a signal or want of memory is what ends us here.
        if not is_durable:
            _roll_back(lock)
    return Outcome(250, "2.0.0", "Delivered to mailbox")


def _separator(fd: int, size: int) -> bytes:
    """What makes the next line follow a blank one, whatever other programs left."""
    tail = os.pread(fd, 2, max(0, size - 2))
    if not size or tail == b"\n\n":
        return b""
    return b"\n" if tail.endswith(b"\n") else b"\n\n"


def _write_message(lock: MailboxLock, head: bytes, text_fd: int, size: int) -> None:
    """Write `head`, the text and the blank line after it; a small message in one call."""
    at = 0
    while True:
        block = os.pread(text_fd, min(_BLOCK, size - at), at)
        at += len(block)
        if at < size:
            if not block:
                raise OSError(errno.EIO, "text cut short")
            _write_whole(lock.fd, [head, block])
            if at % _SYNC_EVERY == 0:
                os.fdatasync(lock.fd)
        else:
            last = block or head
            _write_whole(lock.fd, [head, block, b"\n" if last.endswith(b"\n") else b"\n\n"])
            return
        head = b""
        lock.refresh()


def _write_whole(fd: int, parts: list[bytes]) -> None:
    written = os.writev(fd, parts)
    if written < sum(map(len, parts)):
        rest = b"".join(parts)[written:]
        while rest:
            rest = rest[os.write(fd, rest) :]


def _show_as_new(fd: int) -> None:
    """Have the mailbox changed after it was read, in whole seconds, as shells compare."""
    status = os.fstat(fd)
    second = 1_000_000_000
    if status.st_atime_ns // second >= status.st_mtime_ns // second:
        os.utime(fd, ns=(status.st_mtime_ns - second, status.st_mtime_ns))


def _sync_directory(dir_fd: int) -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _roll_back(lock: MailboxLock) -> None:
    """Make the mailbox what it was; where even that fails, leave the next one a record."""
    try:
        os.ftruncate(lock.fd, lock.status.st_size)
        os.utime(lock.fd, ns=(lock.status.st_atime_ns, lock.status.st_mtime_ns))
    except OSError as error:
        lock.notes.append(f"the failed write could not be undone: {error.strerror}")
        lock.leave_record()


def _unlink_empty(lock: MailboxLock) -> None:
    try:
        if os.fstat(lock.fd).st_size == 0:
            os.unlink(lock.name, dir_fd=lock.dir_fd)
    except OSError as error:
        lock.notes.append(f"the empty new mailbox stays: {error.strerror}")
