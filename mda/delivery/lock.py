"""The locks of an mbox mailbox: fcntl on the file, and the dotlock beside it.

Other programs take them in either order, so no step waits while it holds anything: on a
miss all is released, and after a random pause the whole is tried again until the deadline
(Debian Policy 11.6). The order here is fcntl, then dotlock, and the release is the other
way round: whoever holds the fcntl lock and sees our dotlock knows that its writer is gone.
Where it is asked for, flock(2) comes between the two.

A dotlock of ours holds three lines: the PID, as liblockfile and procmail read it; `mda1`,
the process's start time, the boot, the mailbox's device and inode, its size before the
message, the message's size and how many NULs it has; and the message's From_ line. From
that the next delivery, or a repair, undoes an append that a kill or a power cut left half
done (design, decision 3).
For the latter the record is an attribute of the file as well, which has reached the disk
when the name has, and that before the mailbox has grown: journals keep this order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from mda.model import Outcome, classify_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    OpenMailbox = Callable[[int, str], int | Outcome]
    Message = tuple[bytes, int, int]

DOTLOCK_SUFFIX = ".lock"
# liblockfile's and sendmail's age; younger foreign locks may well be alive.
FOREIGN_LOCK_SECONDS = 300
# maildrop breaks locks that were not touched for 60 s.
REFRESH_SECONDS = 15
_SHORTEST_PAUSE = 0.04
_LONGEST_PAUSE = 0.3
_LONGEST_RECORD = 1024
_RECORD_ATTRIBUTE = "user.mda.record"
_LONGEST_FROM_LINE = 400
_BLOCK = 256 * 1024
_STRUCT_FLOCK = "hhqqi"
# What the file system or the kernel says where O_TMPFILE is not known.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class Record:
    """What a dotlock of ours says: which process appends what to which file.

    `start` and `boot` are bytes as /proc gives them, `file` is (device, inode), `size`
    the mailbox's size before, `length` the message's bytes without the blank lines
    around it and `nuls` how many of them are NUL, `from_line` its first line or the
    beginning of that.
    """

    __slots__ = ("boot", "file", "from_line", "length", "nuls", "pid", "size", "start")

    def __init__(
        self,
        pid: int,
        start: bytes,
        boot: bytes,
        file: tuple[int, int],
        size: int,
        length: int,
        nuls: int,
        from_line: bytes,
    ) -> None:
        self.pid = pid
        self.start = start
        self.boot = boot
        self.file = file
        self.size = size
        self.length = length
        self.nuls = nuls
        self.from_line = from_line

    def format(self) -> bytes:
        """The dotlock's contents."""
        device, inode = self.file
        place = b"%d:%d %d %d %d" % (device, inode, self.size, self.length, self.nuls)
        return b"%d\nmda1 %b %b %b\n%b" % (self.pid, self.start, self.boot, place, self.from_line)


def parse_record(text: bytes) -> Record | None:
    """The record in a dotlock's contents, or None if it is not one of ours, whole."""
    lines = text.split(b"\n", 2)
    words = lines[1].split(b" ") if len(lines) == 3 else []
    if len(words) != 7 or words[0] != b"mda1" or not lines[2].startswith(b"From "):
        return None
    device, _, inode = words[3].partition(b":")
    numbers = (lines[0], words[1], device, inode, *words[4:])
    if not all(number.isdigit() and len(number) <= 20 for number in numbers):
        return None
    file = (int(device), int(inode))
    size, length, nuls = map(int, words[4:])
    return Record(parse_pid(text), words[1], words[2], file, size, length, nuls, lines[2])


def parse_pid(text: bytes) -> int:
    """The PID at the beginning of a dotlock's contents, or 0 where there is none."""
    words = text.replace(b"\0", b" ").split(None, 1)
    if not words or not words[0].isdigit() or len(words[0]) > 10:
        return 0
    pid = int(words[0])
    return pid if pid < 1 << 31 else 0


def has_died(pid: int, start: bytes = b"0", boot: bytes = b"-") -> bool:
    """Is the process certainly gone: other boot, no such PID, or a later one of that PID.

    `start` b"0" and `boot` b"-" stand for not known.
    """
    if b"-" not in (boot, _own_stamp()[1]) and boot != _own_stamp()[1]:
        return True
    if pid == os.getpid():
        # No delivery of this process is under way, since it makes one at a time.
        return True
    try:
        state, began = _read_stat(b"%d" % pid)
    except (FileNotFoundError, ProcessLookupError):
        # With hidepid another user's process is not in /proc, but does answer.
        return not _answers(pid)
    except OSError:
        return False
    return state in (b"Z", b"X") or (start != b"0" and began != start)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_stat(process: bytes) -> tuple[bytes, bytes]:
    """State and start time of a process, from /proc; raises OSError."""
    text = _read_file(b"/proc/%b/stat" % process)
    # The command's name may hold blanks and parentheses; it ends at the last one.
    fields = text[text.rfind(b")") + 1 :].split()
    if len(fields) < 20:
        raise OSError(errno.EIO, "strange /proc")
    return fields[0], fields[19]


def _read_file(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1024)
    finally:
        os.close(fd)


_stamp_pid = 0
_stamp = (b"0", b"-")


def _own_stamp() -> tuple[bytes, bytes]:
    """Our start time and the boot's id; b"0" and b"-" where /proc does not say."""
    global _stamp, _stamp_pid
    if _stamp_pid != os.getpid():
        try:
            boot = _read_file(b"/proc/sys/kernel/random/boot_id").strip()
            _stamp = (_read_stat(b"self")[1], boot)
        except OSError:
            _stamp = (b"0", b"-")
        _stamp_pid = os.getpid()
    return _stamp


def dotlock_name(mailbox: str) -> str:
    """What the dotlock of a mailbox of this name is called."""
    return mailbox + DOTLOCK_SUFFIX


class MailboxLock:
    """An mbox mailbox, held open under its locks.

    `fd` is the process's only descriptor on it, since closing any other would drop the
    fcntl lock; `status` is the file as it was found, `dir_fd` its directory (O_PATH),
    `name` its name there, `deadline` (time.monotonic()) when waiting ends, `takes_flock`
    whether flock(2) is one of the locks. What was repaired on the way is added to `notes`.
    """

    __slots__ = (
        "_dotlock_fd",
        "_refreshed",
        "deadline",
        "dir_fd",
        "fd",
        "name",
        "notes",
        "status",
        "takes_flock",
    )

    def __init__(
        self, dir_fd: int, name: str, deadline: float, notes: list[str], takes_flock: bool
    ) -> None:
        self.dir_fd = dir_fd
        self.name = name
        self.deadline = deadline
        self.notes = notes
        self.takes_flock = takes_flock
        self.fd = -1
        self.status: os.stat_result
        self._dotlock_fd = -1
        self._refreshed = 0.0

    @property
    def dotlock_name(self) -> str:
        """The dotlock's name in the mailbox's directory."""
        return dotlock_name(self.name)

    def hold_dotlock(self, fd: int) -> None:
        """Take over the descriptor of the dotlock that was just created."""
        self._dotlock_fd = fd
        self._refreshed = time.monotonic()

    def refresh(self) -> None:
        """Touch the dotlock if that is due, so that nobody takes it for a dead one."""
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS:
            os.utime(self._dotlock_fd)
            self._refreshed = now

    def leave_record(self) -> None:
        """Keep the dotlock after the release, for the next delivery to repair by."""
        if self._dotlock_fd != -1:
            close(self._dotlock_fd, self.notes)
            self._dotlock_fd = -1

    def let_go(self) -> None:
        """Give the locks back and close the mailbox; the directory stays open."""
        if self._dotlock_fd != -1:
            self._unlink_own_dotlock()
            close(self._dotlock_fd, self.notes)
            self._dotlock_fd = -1
        if self.fd != -1:
            close(self.fd, self.notes)
            self.fd = -1

    def release(self) -> None:
        """Give everything back."""
        self.let_go()
        close(self.dir_fd, self.notes)

    def _unlink_own_dotlock(self) -> None:
        """Remove the dotlock unless somebody has put their own in its place."""
        name = self.dotlock_name
        try:
            there = os.stat(name, dir_fd=self.dir_fd, follow_symlinks=False)
            if os.path.samestat(there, os.fstat(self._dotlock_fd)):
                os.unlink(name, dir_fd=self.dir_fd)
            else:
                self.notes.append(f"{name}: our lock was replaced while we held it")
        except OSError as error:
            # The message is safe; the lock of a dead process is cleared by who comes next.
            self.notes.append(f"{name}: cannot be removed: {error.strerror}")


def close(fd: int, notes: list[str]) -> None:
    """Close what is on disk already, or was never to be: a failure changes no outcome."""
    try:
        os.close(fd)
    except OSError as error:
        notes.append(f"a descriptor cannot be closed: {error.strerror}")


def acquire(
    mailbox: str,
    open_mailbox: OpenMailbox,
    message: Message,
    deadline: float,
    notes: list[str],
    *,
    takes_flock: bool = False,
) -> MailboxLock | Outcome:
    """Take the locks of `mailbox`; an outcome (451, 452) says why that was not possible.

    `open_mailbox` gets the directory's descriptor and the mailbox's name, opens it for
    reading and writing, or says why it must not. `message` is the From_ line, how many bytes
    will be written without blank lines around, and how many of those are NUL; `deadline` is
    in seconds of time.monotonic(), and one try is made even if it has passed.
    """
    directory, name = os.path.split(mailbox)
    try:
        dir_fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return classify_os_error(error, "opening the mailbox's directory")
    lock = MailboxLock(dir_fd, name, deadline, notes, takes_flock)
    try:
        failure = _wait_for_all(lock, open_mailbox, message)
    except OSError as error:
        failure = classify_os_error(error, "locking the mailbox")
    if failure is None:
        return lock
    lock.release()
    return failure


def is_left_by_dead(mailbox: str) -> bool:
    """Does a dotlock of the caller's own user say that a delivery to `mailbox` was killed?

    A look without a lock, for whoever wants to repair: `acquire` decides and does it.
    """
    directory, name = os.path.split(mailbox)
    dir_fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status, text = _read_dotlock(dir_fd, dotlock_name(name))
    finally:
        os.close(dir_fd)
    record = parse_record(text)
    if status is None or status.st_uid != os.geteuid() or record is None:
        return False
    return has_died(record.pid, record.start, record.boot)


def _wait_for_all(lock: MailboxLock, open_mailbox: OpenMailbox, message: Message) -> Outcome | None:
    pause = _SHORTEST_PAUSE
    while True:
        missed = _try_all(lock, open_mailbox, message)
        if missed is None or isinstance(missed, Outcome):
            return missed
        lock.let_go()
        left = lock.deadline - time.monotonic()
        if left <= 0:
            return Outcome(451, "4.2.0", f"Mailbox is locked ({printable(missed)})")
        # A quarter to the whole of the pause; the random module would cost its import.
        time.sleep(min(left, pause * (64 + os.urandom(1)[0] * 0.75) / 256))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _try_all(
    lock: MailboxLock, open_mailbox: OpenMailbox, message: Message
) -> str | Outcome | None:
    """One try without waiting: None with all locks, or what is in the way (a text)."""
    opened = open_mailbox(lock.dir_fd, lock.name)
    if isinstance(opened, Outcome):
        return opened
    lock.fd = opened
    missed = _lock_file(lock) or _take_dotlock(lock, message)
    if missed is not None:
        return missed
    # Somebody with only the dotlock may have written, or renamed, just before we had it.
    if not _is_as_found(lock):
        return f"{lock.name}, changing under us"
    return None


def _is_as_found(lock: MailboxLock) -> bool:
    try:
        named = os.stat(lock.name, dir_fd=lock.dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, lock.status) and named.st_size == lock.status.st_size


def _lock_file(lock: MailboxLock) -> str | None:
    """Take the kernel's locks on the opened mailbox; a text says what is in the way."""
    kind = ""
    try:
        if lock.takes_flock:
            # NFS makes of flock an fcntl lock that belongs to the open file. One of this
            # process's would be in its way; one that belongs to the same file is not.
            fcntl.fcntl(lock.fd, fcntl.F_OFD_SETLK, _whole_file())
            kind = " (flock)"
            fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.lockf(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return f"{lock.name}{kind}, PID {_find_holder(lock) or 'not known'}"
    return None


def _whole_file() -> bytes:
    """A `struct flock` about writing to the whole file."""
    return struct.pack(_STRUCT_FLOCK + "0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def _find_holder(lock: MailboxLock) -> int:
    """The PID of a process with a kernel's lock on the file, or 0 if that is not to be had."""
    holder = _fcntl_holder(lock.fd)
    # Of a lock that belongs to an open file, fcntl does not say whose it is.
    return holder or (_flock_holder(lock.fd) if lock.takes_flock else 0)


def _fcntl_holder(fd: int) -> int:
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, _whole_file())
    except OSError:
        return 0
    holder: int = struct.unpack_from(_STRUCT_FLOCK, answer)[4]
    return max(0, holder)


def _flock_holder(fd: int) -> int:
    status = os.fstat(fd)
    device = b"%02x:%02x" % (os.major(status.st_dev), os.minor(status.st_dev))
    file = b"%b:%d" % (device, status.st_ino)
    try:
        with open("/proc/locks", "rb") as table:
            # "1: FLOCK ADVISORY WRITE 812 fe:00:1534361 0 EOF"; who waits has another row.
            rows = [row.split() for row in table]
    except OSError:
        return 0
    return next((int(row[4]) for row in rows if row[1] == b"FLOCK" and row[5] == file), 0)


def _take_dotlock(lock: MailboxLock, message: Message) -> str | None:
    """Create the dotlock, clearing a dead one away first; a text says what is in the way."""
    from_line, length, nuls = message
    for _ in range(2):
        lock.status = os.fstat(lock.fd)
        file = (lock.status.st_dev, lock.status.st_ino)
        record = Record(
            os.getpid(),
            *_own_stamp(),
            file,
            lock.status.st_size,
            length,
            nuls,
            from_line[:_LONGEST_FROM_LINE],
        )
        try:
            lock.hold_dotlock(_create_dotlock(lock.dir_fd, lock.dotlock_name, record.format()))
        except FileExistsError:
            obstacle = _clear_dead_dotlock(lock)
            if obstacle is not None:
                return obstacle
        else:
            return None
    return lock.dotlock_name


def _create_dotlock(dir_fd: int, name: str, record: bytes) -> int:
    """Create the dotlock with its record inside, in one step, and return its descriptor.

    Raises FileExistsError if there is one, OSError if none can be made.
    """
    flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
    try:
        fd = os.open(".", flags, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return _create_dotlock_by_name(dir_fd, name, record)
        raise
    try:
        _fill_dotlock(fd, record)
        # A directory descriptor makes this linkat(2), which follows the link in /proc.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=dir_fd, follow_symlinks=True)
    except FileNotFoundError:
        os.close(fd)
        return _create_dotlock_by_name(dir_fd, name, record)
    except OSError:
        os.close(fd)
        raise
    return fd


def _create_dotlock_by_name(dir_fd: int, name: str, record: bytes) -> int:
    """The same in two steps, for file systems without O_TMPFILE and hosts without /proc."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
    try:
        _fill_dotlock(fd, record)
    except OSError:
        os.unlink(name, dir_fd=dir_fd)
        os.close(fd)
        raise
    return fd


def _fill_dotlock(fd: int, record: bytes) -> None:
    """Write the record, also where a power cut cannot part it from the lock's name.

    An attribute reaches the disk with the name, as journals order it, and the file's text
    may come later. Where there are no attributes the text is flushed.
    """
    if os.write(fd, record) != len(record):
        raise OSError(errno.ENOSPC, "lock file cut short")
    try:
        os.setxattr(fd, _RECORD_ATTRIBUTE, record)
    except OSError:
        os.fsync(fd)
    os.fchmod(fd, 0o444)  # whatever the umask: the PID is for everybody to read


def _clear_dead_dotlock(lock: MailboxLock) -> str | None:
    """Remove a dead dotlock, undoing what its writer left half done; None if it is gone.

    Called with the fcntl lock held. The text names the lock that stays, and its PID.
    """
    status, text = _read_dotlock(lock.dir_fd, lock.dotlock_name)
    if status is None:
        return None
    pid = parse_pid(text)
    shown = f"{lock.dotlock_name}, PID {pid or 'not given'}"
    record = parse_record(text)
    if record is not None and _can_repair_by(record, status, lock.status):
        _undo_half_message(lock, record)
    elif not _is_stale(status, pid, record):
        return shown
    now_there, _ = _read_dotlock(lock.dir_fd, lock.dotlock_name)
    if now_there is None:
        return None
    if not _is_same_lock(now_there, status):
        return shown
    try:
        os.unlink(lock.dotlock_name, dir_fd=lock.dir_fd)
    except PermissionError:
        return shown
    lock.notes.append(f"removed the dead lock {printable(shown)}")
    return None


def _read_dotlock(dir_fd: int, name: str) -> tuple[os.stat_result | None, bytes]:
    """What is there under the dotlock's name, and its text as far as we may read it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None, b""
    if not stat.S_ISREG(status.st_mode):
        return status, b""
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except FileNotFoundError:
        return None, b""
    except OSError:
        # Postfix and Exim make theirs so that nobody else can read them.
        return status, b""
    try:
        status = os.fstat(fd)
        return status, _read_record(fd) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(fd)


def _read_record(fd: int) -> bytes:
    """The dotlock's text, or what it should be where a power cut has taken that away."""
    text = os.read(fd, _LONGEST_RECORD)
    if text.strip(b"\0"):
        return text
    try:
        return os.getxattr(fd, _RECORD_ATTRIBUTE)[:_LONGEST_RECORD]
    except OSError:
        return text


def _can_repair_by(record: Record, status: os.stat_result, mailbox: os.stat_result) -> bool:
    """Is it a record of the mailbox's own user, about this very file, by a dead process.

    The next boot may number devices otherwise; the inode stays.
    """
    device, inode = record.file
    is_this_boot = record.boot == _own_stamp()[1]
    return (
        status.st_uid == os.geteuid()
        and inode == mailbox.st_ino
        and (device == mailbox.st_dev or not is_this_boot)
        and has_died(record.pid, record.start, record.boot)
    )


def _is_stale(status: os.stat_result, pid: int, record: Record | None) -> bool:
    """May anybody's lock be broken: old, a file, and its process dead or not named."""
    if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime <= FOREIGN_LOCK_SECONDS:
        return False
    if record is not None:
        return has_died(record.pid, record.start, record.boot)
    return pid == 0 or has_died(pid)


def _is_same_lock(one: os.stat_result, other: os.stat_result) -> bool:
    # Inode numbers are used again at once, so the time of its making counts too.
    return os.path.samestat(one, other) and one.st_ctime_ns == other.st_ctime_ns


def _undo_half_message(lock: MailboxLock, record: Record) -> None:
    """Cut off what the record's dead process wrote, if it is a half message and no more."""
    end = lock.status.st_size
    if end > record.size and _is_half_message(lock, record, end):
        os.ftruncate(lock.fd, record.size)
        os.fsync(lock.fd)
        lock.notes.append(f"removed a half message of {end - record.size} bytes")


def _is_half_message(lock: MailboxLock, record: Record, end: int) -> bool:
    head = os.pread(lock.fd, 2 + len(record.from_line), record.size)
    if head.startswith(b"\0"):
        # After a power cut: the mailbox has grown, and what was written there is lost.
        return not _has_other_message(lock, record.size, end)
    blank = min(2, len(head) - len(head.lstrip(b"\n")))
    from_line = head[blank : blank + len(record.from_line)]
    begin = record.size + blank
    if not record.from_line.startswith(from_line):
        return False
    if end - begin >= record.length and not _has_holes(lock, record, begin, end):
        return False
    return not _has_other_message(lock, begin + len(from_line), end)


def _has_holes(lock: MailboxLock, record: Record, begin: int, end: int) -> bool:
    """Does a message of full length lack parts that were written and never reached the disk?

    The file systems show NULs in their place, where a power cut came before the fsync.
    """
    if record.boot == _own_stamp()[1]:
        return False
    end = min(end, begin + record.length + len(b"\n\n"))
    nuls = 0
    for at in range(begin, end, _BLOCK):
        nuls += os.pread(lock.fd, min(_BLOCK, end - at), at).count(0)
        _refuse_endless(lock, end - at - _BLOCK)
    return nuls > record.nuls


def _refuse_endless(lock: MailboxLock, left: int) -> None:
    """Raise OSError after the deadline: the record may be false, and about a huge file."""
    if left > 0 and time.monotonic() > lock.deadline:
        raise OSError(errno.ETIMEDOUT, "half message too long to check")


def _has_other_message(lock: MailboxLock, at: int, end: int) -> bool:
    """Does a From_ line stand between the offsets: something that others delivered.

    Raises OSError where that cannot be told before the deadline.
    """
    while True:
        block = os.pread(lock.fd, min(_BLOCK, end - at), at)
        if len(block) < len(b"From "):
            return False
        found = block.find(b"From ")
        while found != -1:
            if _is_from_line(os.pread(lock.fd, _LONGEST_FROM_LINE, at + found - 1)):
                return True
            found = block.find(b"From ", found + 1)
        # Four bytes are looked at twice: "From " may lie across two blocks.
        at += len(block) - 4
        _refuse_endless(lock, end - at - 4)


def _is_from_line(text: bytes) -> bool:
    """`text` is one byte, "From " and what follows: a From_ line, or only the word?

    A program without dotlock may have put its From_ line right behind the torn text, in
    the middle of a line; there the year at its end tells it from a sentence.
    """
    if text[:1] in (b"\n", b">"):
        return text[:1] == b"\n"
    year = text.split(b"\n", 1)[0].rsplit(b" ", 1)[-1]
    return len(year) == 4 and year.isdigit()


def printable(text: str) -> str:
    """`text` as printable ASCII, for an outcome's text or a note."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def describe(mailbox: str) -> str:
    """Who holds the locks of a mailbox now, in words; raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(mailbox, flags)
    try:
        pid = _fcntl_holder(fd)
    finally:
        os.close(fd)
    held = [f"fcntl by PID {pid}"] if pid else []
    if os.path.lexists(mailbox + ".lock"):
        held.append(f"dotlock {printable(mailbox)}.lock")
    return ", ".join(held) or "free"
