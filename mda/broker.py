"""The one file that changes identity.

The broker is the half of the receiver that keeps root's uid, with CAP_SETUID and
CAP_SETGID and nothing else. It never sees what the client says: it answers the few
bounded requests of `wire.py`, looks every name up itself, takes the recipient's
effective identity for one delivery, and gives it back (design, decision 1).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import _socket
import fcntl
import os
import pwd
import resource
import time

from mda import log, wire
from mda.config import is_maildir, mailbox_folder, mailbox_mode_for
from mda.model import VERBS, Outcome, Peer, classify_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import NoReturn

    from mda.config import Config
    from mda.model import Account
    from mda.terminal.sessions import Terminal

    Session = Callable[[wire.Broker], int]
    Report = Callable[[Account, list[str], Outcome | None], None]

SESSION_USER = "mda-net"
SPOOL_USER = "mda"
TEMPORARY_FAILURE = 75
_CANNOT_TELL = Outcome(451, "4.3.0", "Cannot tell who is logged in on this host")
_MOST_ACCOUNTS = 1000
_MOST_ROWS = 400
_NO_TERMINALS = Outcome(451, "4.3.5", "Terminals cannot be written to on this host")
_LATEST_DEADLINE = 1 << 60
_REPAIR_SECONDS = 60
_REPAIR_SECONDS_EACH = 5
# A user's own file system may hang for ever.
_REPAIR_HANGS_AFTER = 75


class SetupError(Exception):
    """The host lacks what the processes need to split: a system user, a capability."""


class Identities:
    """The ids that the broker may take, looked up once before the split.

    Without privilege there is only our own uid, and `only_uid` says so.
    """

    __slots__ = ("only_uid", "session", "spool", "terminal_gid")

    def __init__(self, config: Config) -> None:
        self.only_uid = os.geteuid() or None
        self.terminal_gid = _find_gid(config.terminal.group)
        self.session = self.spool = (os.getuid(), os.getgid())
        if self.only_uid is None:
            self.session = _find_ids(SESSION_USER)
            self.spool = _find_ids(SPOOL_USER)


def _find_ids(user: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise SetupError(f"no system user {user}: run `mda install`") from None
    if entry.pw_uid == 0:
        raise SetupError(f"the system user {user} must not be root")
    return entry.pw_uid, entry.pw_gid


def _find_gid(group: str) -> int:
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


class Acting:
    """A `with` block under another effective identity; root's uid stays the real one.

    With the real uid unchanged the user cannot signal us. Outside privilege it is a
    block like any other.
    """

    __slots__ = ("_gid", "_groups", "_is_real", "_uid")

    def __init__(self, identities: Identities, uid: int, gid: int, groups: list[int]) -> None:
        self._is_real = identities.only_uid is None
        self._uid = uid
        self._gid = gid
        self._groups = groups

    def __enter__(self) -> None:
        if not self._is_real:
            return
        try:
            os.setgroups(self._groups)
            os.setegid(self._gid)
            os.seteuid(self._uid)
        except OSError:
            self._give_back()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_real:
            self._give_back()

    def _give_back(self) -> None:
        try:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([])
        except OSError as error:
            # Not to be caught by whoever expects an error of a mailbox or a terminal.
            log.write("identity", log.ERROR, error=str(error))
            os._exit(TEMPORARY_FAILURE)


def drop_for_good(identities: Identities) -> None:
    """Become the session user, with no way back; raises OSError or SetupError."""
    uid, gid = identities.session
    if identities.only_uid is None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise SetupError("the session process did not lose its identity")


def split(config: Config, peer: Peer, load_session: Callable[[], Session]) -> int:
    """Fork into session and broker; returns, in the broker, the session's exit status.

    The session process calls `load_session` while it can still read every file, drops its
    identity, and ends with what was loaded. Raises SetupError before the fork if the host
    lacks something.
    """
    identities = Identities(config)
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        keep_only(theirs.fileno())
        be_session(identities, config, wire.Broker(theirs), load_session)
    theirs.close()
    leave_client()
    answer_requests(ours, config, peer, identities)
    ours.close()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def be_session(
    identities: Identities,
    config: Config,
    broker: wire.Broker,
    load_session: Callable[[], Session],
) -> NoReturn:
    """The session process from here to its end; nothing gets out of it upwards."""
    status = TEMPORARY_FAILURE
    try:
        converse = load_session()
        limit_writing(largest_text(config))
        drop_for_good(identities)
        status = converse(broker)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("session")
    finally:
        os._exit(status)


def keep_only(fd: int) -> None:
    """Close every descriptor but the first three and `fd`."""
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 20)


def leave_client() -> None:
    """Let go of the client's descriptors, so that only the session can reach it."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if null > 2:
        os.close(null)


def largest_text(config: Config) -> int:
    """The most bytes that a message can have as it is kept: quoting at most doubles it."""
    return 2 * config.receiver.message_size + 1_048_576


def limit_writing(most: int) -> None:
    """The session keeps one message, and writes nothing else."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


class Stopped(Exception):
    """We were asked to end while no request was in hand."""


class Patience:
    """SIGTERM and its like end the broker between requests, and never within one."""

    def __init__(self) -> None:
        self._is_stopping = False
        self._is_waiting = False
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT):
            _signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self._is_stopping = True
        if self._is_waiting:
            raise Stopped

    def receive(self, channel: _socket.socket) -> tuple[bytes, int]:
        """The next frame; raises Stopped, or WireError."""
        self._is_waiting = True
        try:
            if self._is_stopping:
                raise Stopped
            return wire.receive_frame(channel)
        finally:
            self._is_waiting = False


def answer_requests(
    channel: _socket.socket, config: Config, peer: Peer, identities: Identities
) -> None:
    """Serve one session until it is gone, or until we are told to end between requests."""
    patience = Patience()
    if identities.only_uid is None:
        os.setgroups([])
    answers = Answers(config, peer, identities)
    try:
        while True:
            frame, fd = patience.receive(channel)
            if not frame:
                return
            try:
                answer, answer_fd = answers.answer(wire.unpack(frame), fd)
            finally:
                if fd != -1:
                    os.close(fd)
            wire.send_frame(channel, answer, answer_fd)
    except Stopped:
        _tell(channel)
    except (wire.WireError, OSError) as error:
        log.write("broker", log.WARNING, error=str(error))


def _tell(channel: _socket.socket) -> None:
    """Let a session that waits for its client know that there is no more broker."""
    try:
        wire.send_frame(channel, wire.pack(wire.STOP))
    except wire.WireError:
        log.write("lost")


def preload() -> None:
    """Load what `Answers` needs, and what finding logins needs, before any fork."""
    import psutil  # noqa: F401

    from mda.delivery import deliver, maildir, mbox  # noqa: F401
    from mda.recipients import fullname, listing, resolve  # noqa: F401
    from mda.terminal import sessions, tty  # noqa: F401


class Answers:
    """The requests of one session, each answered by a frame and maybe a descriptor."""

    def __init__(self, config: Config, peer: Peer, identities: Identities) -> None:
        # Loaded here: after the fork, so that the greeting need not wait for them, and
        # before any change of identity, which could make them unreadable.
        from mda.delivery import deliver, maildir, mbox
        from mda.recipients import fullname, resolve
        from mda.terminal import sessions, tty

        self._maildir = maildir
        self._fullname = fullname
        self._run = deliver.run
        self._append = mbox.append
        self._repair = mbox.repair
        self._resolve = resolve.resolve
        self._sessions = sessions
        self._tty = tty
        self._config = config
        self._peer = peer
        self._identities = identities
        self._accounts: dict[bytes, tuple[Outcome, Account | None]] = {}
        self._spool_fd = -1

    def answer(self, request: list[bytes], fd: int) -> tuple[bytes, int]:
        """One request; raises WireError for anything but a request of `wire.py`."""
        match request:
            case [wire.RESOLVE, local_part]:
                outcome, account = self._find(local_part)
                names = [account.user, account.extension] if account else []
                return wire.pack_outcome(outcome, *map(os.fsencode, names)), -1
            case [wire.VERIFY, string, kind]:
                outcome, *names = self._verify(string, may_be_full_name=kind == b"anything")
                return wire.pack_outcome(outcome, *map(os.fsencode, names)), -1
            case [wire.PROBE, local_part]:
                outcome, width = self._probe(local_part)
                return wire.pack_outcome(outcome, b"%d" % width), -1
            case [wire.SPOOL]:
                outcome, spool_fd = self._open_spool()
                return wire.pack_outcome(outcome), spool_fd
            case [wire.DELIVER, *fields]:
                return wire.pack_outcome(self._deliver(fields, fd)), -1
            case [wire.WHO]:
                outcome, rows = self._list_logins()
                return wire.pack_outcome(outcome, *rows), -1
        raise wire.WireError("unknown request")

    def _find(self, name: bytes) -> tuple[Outcome, Account | None]:
        if name in self._accounts:
            return self._accounts[name]
        recipients = self._config.recipients
        found = self._resolve(
            name,
            mailbox=self._config.delivery.mailbox,
            uid_range=(recipients.uid_min, recipients.uid_max),
            postmaster=recipients.postmaster,
            separator=recipients.extension_separator,
            only_uid=self._identities.only_uid,
        )
        if found[1] is not None and found[1].extension:
            found = self._choose_folder(found[1])
        # A client that guesses names must not fill our memory, nor a failure of the
        # account database outlast itself.
        if found[0].is_done and len(self._accounts) < _MOST_ACCOUNTS:
            self._accounts[name] = found
        return found

    def _choose_folder(self, account: Account) -> tuple[Outcome, Account | None]:
        """Turn to the folder that the extension names; without one, forget the extension."""
        folder = ""
        if is_maildir(self._config):
            try:
                with self._as_recipient(account):
                    folder = self._maildir.find_folder(account.mailbox, account.extension)
            except OSError as error:
                return classify_os_error(error, "looking for the folder"), None
        account.mailbox = folder or account.mailbox
        account.extension = account.extension if folder else ""
        return Outcome(250, "2.1.5", "Recipient OK"), account

    def _verify(self, string: bytes, *, may_be_full_name: bool) -> tuple[Outcome, str, str]:
        """Whose mailbox `string` is or, where that is allowed, who is called so."""
        if not self._peer.may_ask_names:
            return Outcome(550, "5.7.1", "Names are not for this peer"), "", ""
        recipients = self._config.recipients
        outcome, account = self._find(string)
        if outcome.code == 550 and may_be_full_name and self._config.receiver.vrfy_names:
            persons = (recipients.uid_min, recipients.uid_max)
            outcome, user = self._fullname.find_person(string, persons, self._identities.only_uid)
            if outcome.is_done:
                outcome, account = self._find(os.fsencode(user))
        if account is None:
            return outcome, "", ""
        if string.lower() == b"postmaster":
            return outcome, "postmaster", ""
        try:
            return outcome, account.user, self._fullname.full_name(account.user)
        except OSError:
            return outcome, account.user, ""

    def _probe(self, local_part: bytes) -> tuple[Outcome, int]:
        outcome, account = self._find(local_part)
        if account is None:
            return outcome, 0
        try:
            terminals = self._find_terminals(account)
            if isinstance(terminals, Outcome):
                return terminals, 0
            with self._as_terminal_writer():
                return self._tty.probe(terminals, account.uid, self._identities.terminal_gid)
        except OSError as error:
            return classify_os_error(error, "asking for terminals"), 0

    def _show(self, account: Account, block: bytes) -> Outcome:
        """An error here is an outcome too: the mailbox may have the message already."""
        gid = self._identities.terminal_gid
        try:
            terminals = self._find_terminals(account)
            if isinstance(terminals, Outcome):
                return terminals
            with self._as_terminal_writer():
                return self._tty.show(terminals, account.uid, gid, block)
        except OSError as error:
            return classify_os_error(error, "writing to a terminal")

    def _find_terminals(self, account: Account) -> list[Terminal] | Outcome:
        """Candidates for this peer's message, or why there can be none (decision 8)."""
        if not self._peer.may_use_terminals:
            return Outcome(550, "5.7.1", "Terminals are not for this peer")
        recipients = self._config.recipients
        is_person = recipients.uid_min <= account.uid <= recipients.uid_max
        if not is_person and account.uid != self._identities.only_uid:
            return Outcome(550, "5.7.1", "No terminal messages for this account")
        if self._identities.terminal_gid == -1:
            return _NO_TERMINALS
        logins = self._sessions.find_terminals(account.uid)
        return logins.terminals if logins.is_available else _CANNOT_TELL

    def _open_spool(self) -> tuple[Outcome, int]:
        """An unnamed file on disk, which only the spool's own user could have made.

        There is one for the session's life, emptied for each message that needs it, so
        that a session gone astray cannot fill the disk with many.
        """
        uid, gid = self._identities.spool
        # With O_EXCL nobody can give it a name afterwards.
        flags = os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC
        try:
            if self._spool_fd == -1:
                with Acting(self._identities, uid, gid, []):
                    self._spool_fd = os.open(self._config.delivery.spool, flags, 0o600)
            os.ftruncate(self._spool_fd, 0)
            os.lseek(self._spool_fd, 0, os.SEEK_SET)
        except OSError as error:
            return classify_os_error(error, "opening the spool"), -1
        return Outcome(250, "2.0.0", "Spool"), self._spool_fd

    def _deliver(self, fields: list[bytes], fd: int) -> Outcome:
        """The verb table for one recipient, each step under its own identity."""
        if len(fields) != 7 or fields[0] not in VERBS:
            raise wire.WireError("malformed request")
        verb, local_part, prefix, size_field, block, clipped, deadline = fields
        size = wire.read_number(size_field, largest_text(self._config))
        latest = time.monotonic() + self._config.delivery.lock_seconds
        until = min(wire.read_number(deadline, _LATEST_DEADLINE) / 1000, latest)
        outcome, account = self._find(local_part)
        if account is None:
            return outcome
        return self._run(
            VERBS[verb],
            clipped == b"clipped",
            lambda: self._store(account, prefix, (fd, size), until),
            lambda: self._show(account, block),
        )

    def _check_text(self, prefix: bytes, fd: int, size: int) -> None:
        """Only what we have made ourselves or what is sealed is read, and only whole.

        A device, a pipe or a file that changes under us could hold us, or never end.
        """
        first = b"Return-Path: " if is_maildir(self._config) else b"From "
        if not prefix.startswith(first) or not prefix.endswith(b"\n") or fd == -1:
            raise wire.WireError("a delivery without a message")
        status = os.fstat(fd)
        if self._spool_fd != -1 and os.path.samestat(status, os.fstat(self._spool_fd)):
            is_ours = True
        else:
            is_ours = _is_sealed(fd)
        if not is_ours or status.st_size != size:
            raise wire.WireError("a text that is not sealed, or not of its size")

    def _store(
        self, account: Account, prefix: bytes, text: tuple[int, int], deadline: float
    ) -> Outcome:
        self._check_text(prefix, *text)
        notes: list[str] = []
        try:
            with self._as_recipient(account):
                place = (account.mailbox, account.uid)
                if is_maildir(self._config):
                    return self._maildir.deliver(*place, prefix, *text, notes)
                mode = mailbox_mode_for(self._config)
                flock = self._config.delivery.flock
                return self._append(*place, mode, prefix, *text, deadline, notes, takes_flock=flock)
        except OSError as error:
            return classify_os_error(error, "delivering")
        finally:
            for note in notes:
                log.write("mailbox", log.WARNING, user=account.user, note=note)

    def repair(self, account: Account, deadline: float, notes: list[str]) -> Outcome | None:
        """Undo what a killed delivery left in the mailbox; an outcome says why not."""
        flock = self._config.delivery.flock
        try:
            with self._as_recipient(account):
                place = (account.mailbox, account.uid)
                return self._repair(*place, deadline, notes, takes_flock=flock)
        except OSError as error:
            return classify_os_error(error, "repairing the mailbox")

    def _as_recipient(self, account: Account) -> Acting:
        """The user's uid: with the user's groups at home, with the spool's in the spool.

        Only root's directory with no user's name in its path is a spool: anywhere else a
        user could lead the path to a directory of a group that is not the user's.
        """
        directory = mailbox_folder(self._config)
        if self._identities.only_uid is None and "{" not in directory:
            status = os.stat(directory)
            if status.st_uid == 0:
                return Acting(self._identities, account.uid, status.st_gid, [])
        groups = []
        if self._identities.only_uid is None:
            groups = os.getgrouplist(account.user, account.gid)
        return Acting(self._identities, account.uid, account.gid, groups)

    def _as_terminal_writer(self) -> Acting:
        """The session's uid with group tty: a `mesg n` terminal is the kernel's to refuse."""
        return Acting(
            self._identities, self._identities.session[0], self._identities.terminal_gid, []
        )

    def _list_logins(self) -> tuple[Outcome, list[bytes]]:
        gid = self._identities.terminal_gid
        if gid == -1:
            return _NO_TERMINALS, []
        rows = []
        try:
            found, is_available = self._sessions.list_logins()
            with self._as_terminal_writer():
                for uid, terminal in found:
                    state = self._tty.describe(terminal, uid, gid)
                    if state is not None:
                        rows.append((uid, terminal.device, *state))
        except OSError as error:
            return classify_os_error(error, "asking for terminals"), []
        if not is_available:
            return _CANNOT_TELL, []
        lines = [
            b"%s %s %d %s" % (os.fsencode(user), os.fsencode(device), idle, takes.encode())
            for uid, device, idle, takes in rows
            if (user := _name_of(uid))
        ]
        return Outcome(250, "2.0.0", f"{len(lines[:_MOST_ROWS])} terminals"), lines[:_MOST_ROWS]


def start_repair(
    config: Config, identities: Identities, prepare: Callable[[], None], report: Report
) -> int:
    """Fork a process that undoes what killed deliveries left in mailboxes; its pid.

    There it calls `prepare`, and `report` with each mailbox's account, what was done, and
    why there is more to do. It may be killed at any moment, as it is where a file system
    hangs: the next delivery to a mailbox repairs that at the latest. Raises OSError.
    """
    pid = os.fork()
    if pid != 0:
        return pid
    status = TEMPORARY_FAILURE
    try:
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGCHLD):
            _signal.signal(number, _signal.SIG_DFL)
        _signal.alarm(_REPAIR_HANGS_AFTER)
        prepare()
        for repaired in _repair_mailboxes(config, identities):
            report(*repaired)
        status = 0
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("repair")
    finally:
        os._exit(status)


def _repair_mailboxes(
    config: Config, identities: Identities
) -> Iterator[tuple[Account, list[str], Outcome | None]]:
    from mda.recipients import listing

    if is_maildir(config):
        return
    answers = Answers(config, Peer("stream"), identities)
    recipients = config.recipients
    accounts = listing.list_locked(
        config.delivery.mailbox,
        uid_range=(recipients.uid_min, recipients.uid_max),
        postmaster=recipients.postmaster,
        only_uid=identities.only_uid,
    )
    until = time.monotonic() + _REPAIR_SECONDS
    for account in accounts:
        notes: list[str] = []
        failure = answers.repair(account, time.monotonic() + _REPAIR_SECONDS_EACH, notes)
        if notes or failure is not None:
            yield account, notes, failure
        if time.monotonic() > until:
            return


def _is_sealed(fd: int) -> bool:
    """A memfd that nobody can change any more."""
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted
    except OSError:
        return False


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
