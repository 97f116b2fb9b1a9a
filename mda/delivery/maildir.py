"""One message into a Maildir: durable before success, or as if never begun.

Written in tmp, linked into new, as the format's specification has it
(https://cr.yp.to/proto/maildir.html); no locks, and the recipient's own rights, which the
broker has taken before. Everything is done below opened directories.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from mda.delivery.lock import close, printable
from mda.delivery.mbox import user_name
from mda.model import Outcome, classify_os_error

_BLOCK = 128 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def deliver(
    maildir: str, uid: int, head: bytes, text_fd: int, size: int, notes: list[str]
) -> Outcome:
    """Put `head` and the text into `maildir`, which `uid` owns or will own.

    `head` is the header lines that we add, `text_fd` holds `size` bytes of text with LF
    line ends and no quoting. 250 means that the message is on disk; after anything else
    there is no message. What could not be cleaned up is added to `notes`, for the log.
    """
    opened: list[int] = []
    try:
        top = _open_maildir(maildir, uid)
        if isinstance(top, Outcome):
            return top
        opened.append(top)
        for folder in ("tmp", "new", "cur"):
            opened.append(_open_folder(top, folder))
        _write(opened[1], opened[2], (head, text_fd, size), notes)
    except OSError as error:
        return classify_os_error(error, "writing the Maildir")
    finally:
        for fd in opened:
            close(fd, notes)
    return Outcome(250, "2.0.0", "Delivered to mailbox")


def find_folder(maildir: str, extension: str) -> str:
    """The Maildir++ folder of an address' extension, "" where the user has none.

    A link counts as none: the folders of a Maildir are directories in it. Raises OSError
    where that cannot be told.
    """
    if not extension or "/" in extension or extension.startswith("."):
        return ""
    path = f"{maildir}.{extension}/"
    try:
        mode = os.stat(path.rstrip("/"), follow_symlinks=False).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return ""
        raise
    return path if stat.S_ISDIR(mode) else ""


def _open_maildir(maildir: str, uid: int) -> int | Outcome:
    """The Maildir's directory, created if it is missing; an outcome if it is another's."""
    try:
        fd = os.open(maildir, _DIRECTORY)
    except FileNotFoundError:
        parent, name = os.path.split(maildir.rstrip("/"))
        parent_fd = os.open(parent, _DIRECTORY)
        try:
            fd = _open_folder(parent_fd, name)
        finally:
            os.close(parent_fd)
    owner = os.fstat(fd).st_uid
    if owner == uid:
        return fd
    os.close(fd)
    shown, user = printable(maildir), user_name(uid)
    return Outcome(
        451,
        "4.2.0",
        f"Maildir {shown} is owned by {user_name(owner)}, not by {user} "
        f"(as root: chown -R {user} {shown})",
    )


def _open_folder(parent_fd: int, name: str) -> int:
    """A folder in an opened one, created 0700 and durably if it is missing; raises OSError."""
    flags = _DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=parent_fd)
    except FileNotFoundError:
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
        except FileExistsError:
            return os.open(name, flags, dir_fd=parent_fd)
        os.fsync(parent_fd)
    return os.open(name, flags, dir_fd=parent_fd)


def _write(tmp_fd: int, new_fd: int, message: tuple[bytes, int, int], notes: list[str]) -> None:
    """Write the message in tmp, then show it in new; raises OSError with nothing left."""
    head, text_fd, size = message
    name = _unique_name(len(head) + size)
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=tmp_fd)
    is_shown = is_durable = False
    try:
        try:
            _copy(fd, head, text_fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        # A link, since a rename would replace what another host has named alike.
        os.link(name, name, src_dir_fd=tmp_fd, dst_dir_fd=new_fd)
        is_shown = True
        os.fsync(new_fd)
        is_durable = True
    finally:
        _unlink(name, tmp_fd, notes)
        if is_shown and not is_durable:
            _unlink(name, new_fd, notes)


def _unlink(name: str, folder_fd: int, notes: list[str]) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except FileNotFoundError:
        return  # a reader has been quick
    except OSError as error:
        notes.append(f"{name}: cannot be removed: {error.strerror}")


def _copy(fd: int, head: bytes, text_fd: int, size: int) -> None:
    _write_whole(fd, head)
    at = 0
    while at < size:
        block = os.pread(text_fd, min(_BLOCK, size - at), at)
        if not block:
            raise OSError(errno.EIO, "text cut short")
        _write_whole(fd, block)
        at += len(block)


def _write_whole(fd: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(fd, view) :]


def _unique_name(size: int) -> str:
    """A name as the specification has it, with the exact size, as Dovecot reads it."""
    host = os.uname().nodename.replace("/", "\\057").replace(":", "\\072")
    seconds, rest = divmod(time.time_ns(), 1_000_000_000)
    unique = f"M{rest // 1000}P{os.getpid()}R{os.urandom(8).hex()}"
    return f"{seconds}.{unique}.{host},S={size}"
