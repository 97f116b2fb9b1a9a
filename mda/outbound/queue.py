"""Messages that wait on disk: for another host, or for a mailbox that failed for now.

Below the spool directory stand `new`, `wait` and `held`, a file a message: a line of JSON
with the envelope, then the text as it goes out, LF line ends. `log` has for each message
what became of its recipients, a line of JSON a step, only ever added to. A message is
written in `part`, and renamed into `new` once it is on disk: it is there whole or not at
all. In `wait` the time of a file's last change is that of its next try. All of it belongs
to the user `mda`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time

from mda.model import NO_WISH, Outcome, Wish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

FOLDERS = ("new", "wait", "held")
_LOG = "log"
_PART = "part"
_LEFT_BEHIND = 86_400  # seconds after which nobody can still be at work on a file
_LARGEST_ENVELOPE = 16 << 20
_LARGEST_LOG = 64 << 20
_PIECE = 1 << 16
_KEEP_FILES = 1000  # on the disk, for others


class Unreadable(Exception):
    """What is in a file of the queue is nothing that we have written."""


class Addressee:
    """One recipient of a message that waits.

    `domain` is empty for one of this host, whose `place` is then the digest of the target
    that failed. `route` is what is left of the source route (b"@ONE,@TWO"), or empty.
    `outcome` is the last try's, or None, and `host` whose word it is, or "" for ours; `wish` is
    what the sender wants to be told, and `is_passed_on` that the next host knows it.
    """

    __slots__ = (
        "domain",
        "host",
        "is_passed_on",
        "is_told",
        "local_part",
        "outcome",
        "place",
        "route",
        "wish",
    )

    def __init__(
        self, local_part: bytes, domain: bytes, place: str = "", *, route: bytes = b""
    ) -> None:
        self.local_part = local_part
        self.domain = domain
        self.place = place
        self.route = route
        self.host = ""
        self.wish = NO_WISH
        self.is_passed_on = False
        self.outcome: Outcome | None = None
        self.is_told = False

    @property
    def is_open(self) -> bool:
        """Is there something left to try?"""
        return self.outcome is None or self.outcome.is_temporary

    @property
    def is_to_be_told(self) -> bool:
        """Has it failed for good, and nobody been told?"""
        is_lost = self.outcome is not None and not self.outcome.is_done and not self.is_open
        return is_lost and not self.is_told and self.wish.has("FAILURE")

    @property
    def is_to_be_confirmed(self) -> bool:
        """Has it gone to a host that tells no sender of deliveries, and nobody been told?"""
        is_gone = self.outcome is not None and self.outcome.is_done and not self.is_passed_on
        return is_gone and not self.is_told and self.wish.has("SUCCESS")


class Envelope:
    """The envelope of a message that waits; `form` is the text's: "p" plain, "q" quoted.

    `sender` is the reverse-path without brackets, `came` seconds since the epoch;
    `is_relayed` says that the client has named the other hosts, and no file of ours; `ret` and
    `envid` are for notices (RFC 3461).
    """

    __slots__ = (
        "addressees",
        "came",
        "envid",
        "form",
        "is_relayed",
        "is_utf8",
        "ret",
        "sender",
        "verb",
    )

    def __init__(
        self,
        verb: str,
        sender: bytes,
        addressees: list[Addressee],
        *,
        form: str = "p",
        is_utf8: bool = False,
        is_relayed: bool = False,
        ret: str = "",
        envid: str = "",
        came: float = 0.0,
    ) -> None:
        self.verb = verb
        self.sender = sender
        self.addressees = addressees
        self.form = form
        self.is_utf8 = is_utf8
        self.is_relayed = is_relayed
        self.ret = ret
        self.envid = envid
        self.came = came or time.time()


class Waiting:
    """A message in the queue, as its two files say; raises OSError or Unreadable.

    Who is to send it claims it first, so that a run of the queue and a host that takes its
    mail by TURN never send it both: BlockingIOError where somebody has. `release` ends that.
    """

    def __init__(self, directory: str, folder: str, name: str, *, is_claimed: bool = False) -> None:
        self.directory = directory
        self.folder = folder
        self.name = name
        self.tries = 0
        self.is_delay_told = False
        self._claim_fd = -1
        try:
            self._read(is_claimed=is_claimed)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            self.release()
            raise Unreadable(f"{name}: {error}") from error
        except OSError:
            self.release()
            raise

    def _read(self, *, is_claimed: bool) -> None:
        with open(self.path, "rb", opener=_open_to_claim if is_claimed else _open_plain) as file:
            if is_claimed:
                self._claim_fd = _claim(file.fileno(), self.path)
            line = file.readline(_LARGEST_ENVELOPE)
            status = os.fstat(file.fileno())
        self.begin = len(line)
        self.size = status.st_size - self.begin
        self.due = status.st_mtime
        self.envelope = _read_envelope(line)
        for step in _read_steps(self._log_path):
            self._take(step)

    def release(self) -> None:
        """Somebody else may send it."""
        if self._claim_fd != -1:
            os.close(self._claim_fd)
            self._claim_fd = -1

    @property
    def path(self) -> str:
        """Where the message is now."""
        return os.path.join(self.directory, self.folder, self.name)

    @property
    def _log_path(self) -> str:
        return os.path.join(self.directory, _LOG, self.name)

    def read_text(self) -> Iterator[bytes]:
        """The text in pieces, LF line ends; raises OSError."""
        with open(self.path, "rb", opener=_open_plain) as file:
            file.seek(self.begin)
            yield from iter(lambda: file.read(_PIECE), b"")

    def read_lines(self) -> Iterator[bytes]:
        """The text in lines with their LF; what is longer than 64 KiB comes in parts."""
        with open(self.path, "rb", opener=_open_plain) as file:
            file.seek(self.begin)
            yield from iter(lambda: file.readline(_PIECE), b"")

    def note(
        self,
        outcomes: dict[int, Outcome],
        host: str = "",
        own: Collection[int] = (),
        *,
        is_passed_on: bool = False,
    ) -> None:
        """Keep what became of some addressees, by number, durably; raises OSError.

        `host` is whose word it is, or empty for ours, as it is for the numbers in `own`;
        `is_passed_on` says that the wishes for notices went along.
        """
        rows = {
            str(at): [each.code, each.enhanced, each.text, "" if at in own else host]
            for at, each in outcomes.items()
        }
        self._add({"outcomes": rows, "passed on": is_passed_on})

    def note_try(self) -> None:
        """One more try of what is open has been made; raises OSError."""
        self._add({"tries": self.tries + 1})

    def note_told(self, numbers: list[int]) -> None:
        """The sender has a notice about these; raises OSError."""
        self._add({"told": numbers})

    def note_delay_told(self) -> None:
        """The sender knows that it takes longer; raises OSError."""
        self._add({"delay": True})

    def _add(self, step: dict[str, object]) -> None:
        line = json.dumps(step).encode() + b"\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._log_path, flags, 0o600)
        try:
            # A kill may have left half a line, which counts for nothing.
            at = _end_of_lines(fd)
            os.ftruncate(fd, at)
            os.pwrite(fd, line, at)
            os.fsync(fd)
        finally:
            os.close(fd)
        if at == 0:
            _sync_folder(os.path.dirname(self._log_path))
        self._take(step)

    def _take(self, step: dict[str, object]) -> None:
        match step:
            case {"outcomes": dict(rows), "passed on": bool(is_passed_on)}:
                for number, (code, enhanced, text, host) in rows.items():
                    addressee = self.envelope.addressees[int(number)]
                    addressee.outcome = Outcome(code, enhanced, text)
                    addressee.host = host
                    addressee.is_passed_on = is_passed_on
            case {"told": list(numbers)}:
                for number in numbers:
                    self.envelope.addressees[number].is_told = True
            case {"tries": int(tries)}:
                self.tries = tries
            case {"delay": True}:
                self.is_delay_told = True
            case _:
                raise ValueError("a step that is none")

    def wait_until(self, due: float) -> None:
        """Put it aside until `due`, seconds since the epoch; raises OSError."""
        os.utime(self.path, (due, due))
        self.move("wait")
        self.due = due

    def move(self, folder: str) -> None:
        """Move it between the folders; raises OSError."""
        if folder != self.folder:
            os.rename(self.path, os.path.join(self.directory, folder, self.name))
            self.folder = folder

    def remove(self) -> None:
        """Forget it; raises OSError. What a kill leaves of the two files is the log."""
        os.unlink(self.path)
        _sync_folder(os.path.dirname(self.path))
        if os.path.exists(self._log_path):
            os.unlink(self._log_path)


def put(directory: str, envelope: Envelope, pieces: Iterable[bytes], *, keep_free: int = 0) -> str:
    """Queue a message durably; its name. Raises OSError, and then there is none.

    `pieces` are the text, LF line ends, in the form that the envelope names. The disk must
    have `keep_free` bytes left, and files for others.
    """
    make_folders(directory)
    if keep_free and not _has_room(directory, keep_free):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    name = f"{time.time_ns():x}.{os.urandom(6).hex()}"
    # A file without a name would leave no part behind, but whoever has changed his effective
    # uid may not use /proc/self/fd to give it one.
    part, place = (os.path.join(directory, each, name) for each in (_PART, "new"))
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", buffering=_PIECE) as file:
            file.write(_pack_envelope(envelope))
            file.writelines(pieces)
            file.flush()
            os.fsync(fd)
        os.rename(part, place)
        _sync_folder(os.path.dirname(place))
    except OSError:
        for path in (part, place):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        raise
    return name


def _has_room(directory: str, keep_free: int) -> bool:
    disk = os.statvfs(directory)
    has_files = disk.f_files == 0 or disk.f_favail > _KEEP_FILES
    return has_files and disk.f_bavail * disk.f_frsize > keep_free


def make_folders(directory: str) -> None:
    """See that the folders are there; raises OSError."""
    for each in ("", *FOLDERS, _LOG, _PART):
        path = os.path.join(directory, each)
        if not os.path.isdir(path):
            os.mkdir(path, 0o700)


def list_names(directory: str, folder: str) -> Iterator[tuple[str, float]]:
    """Each message of a folder: its name, and when it is due; memory stays flat."""
    try:
        entries = os.scandir(os.path.join(directory, folder))
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue  # done in the meantime


def sweep(directory: str) -> None:
    """Remove the logs of messages that are gone, and parts of some that never were there.

    Only old ones: a part may grow, and a message be on its way from folder to folder, just
    now. Raises OSError.
    """
    latest = time.time() - _LEFT_BEHIND
    for folder in (_PART, _LOG):
        for name, changed in list_names(directory, folder):
            is_there = any(os.path.exists(os.path.join(directory, f, name)) for f in FOLDERS)
            if changed < latest and not is_there:
                os.unlink(os.path.join(directory, folder, name))


def find(directory: str, name: str) -> Waiting | None:
    """The message of that name in any folder; raises OSError or Unreadable."""
    if not name or "/" in name or name.startswith("."):
        return None
    for folder in FOLDERS:
        try:
            return Waiting(directory, folder, name)
        except FileNotFoundError:
            continue
    return None


def _claim(fd: int, path: str) -> int:
    """A descriptor that keeps the open message ours, as long as it is at its path still."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fstat(fd).st_ino != os.lstat(path).st_ino:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return os.dup(fd)


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _open_to_claim(path: str, flags: int) -> int:
    """For writing too, since NFS has no flock without."""
    return _open_plain(path, flags & ~os.O_ACCMODE | os.O_RDWR)


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _end_of_lines(fd: int) -> int:
    """Where the last whole line of a log ends."""
    size = os.fstat(fd).st_size
    at = size
    while at > 0:
        begin = max(0, at - _PIECE)
        found = os.pread(fd, at - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        at = begin
    return 0


def _read_steps(path: str) -> Iterator[dict[str, object]]:
    try:
        with open(path, "rb", opener=_open_plain) as file:
            lines = file.read(_LARGEST_LOG).split(b"\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:  # what stands behind the last line end is half a line
        yield json.loads(line)


def _pack_envelope(envelope: Envelope) -> bytes:
    fields = {
        "verb": envelope.verb,
        "sender": os.fsdecode(envelope.sender),
        "came": envelope.came,
        "form": envelope.form,
        "utf8": envelope.is_utf8,
        "relayed": envelope.is_relayed,
        "ret": envelope.ret,
        "envid": envelope.envid,
        "to": [_pack_addressee(each) for each in envelope.addressees],
    }
    return json.dumps(fields).encode() + b"\n"


def _pack_addressee(each: Addressee) -> list[str]:
    mailbox = os.fsdecode(each.local_part), os.fsdecode(each.domain)
    wish = each.wish.notify, each.wish.original.decode("ascii")
    return [*mailbox, each.place, os.fsdecode(each.route), *wish]


def _read_addressee(
    local_part: str, domain: str, place: str, route: str, notify: str, original: str
) -> Addressee:
    mailbox = os.fsencode(local_part), os.fsencode(domain)
    addressee = Addressee(*mailbox, place, route=os.fsencode(route))
    addressee.wish = Wish(notify, original.encode("ascii"))
    return addressee


def _read_envelope(line: bytes) -> Envelope:
    if not line.endswith(b"\n"):
        raise ValueError("no envelope")
    match json.loads(line):
        case {
            "verb": str(verb),
            "sender": str(sender),
            "came": int() | float() as came,
            "form": str(form),
            "utf8": bool(is_utf8),
            "relayed": bool(is_relayed),
            "ret": str(ret),
            "envid": str(envid),
            "to": list(rows),
        }:
            return Envelope(
                verb,
                os.fsencode(sender),
                [_read_addressee(*row) for row in rows],
                form=form,
                is_utf8=is_utf8,
                is_relayed=is_relayed,
                ret=ret,
                envid=envid,
                came=came,
            )
    raise ValueError("no envelope")
