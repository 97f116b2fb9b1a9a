"""The one file that changes identity.

The broker is the half of the receiver that keeps root's uid, with CAP_SETUID and
CAP_SETGID and nothing else. It never sees what the client says: it answers the few
bounded requests of `wire.py` (in `answers.py`), looks every name up itself, takes the
recipient's effective identity for one delivery, and gives it back (design, decision 1).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import _socket
import os
import pwd
import resource
import time

from mda import log, wire
from mda.config import SPOOL_USER, is_maildir, largest_text, mailbox_folder
from mda.model import Outcome, Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import NoReturn

    from mda.config import Config
    from mda.model import Account

    Session = Callable[[wire.Broker], int]
    Report = Callable[[Account, list[str], Outcome | None], None]

SESSION_USER = "mda-net"
TEMPORARY_FAILURE = 75
# How a session ends that an error of ours has ended: nobody was told anything.
UNFORESEEN = 70
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_REPAIR_SECONDS = 60
_REPAIR_SECONDS_EACH = 5
# A user's own file system may hang for ever.
_REPAIR_HANGS_AFTER = 75


class SetupError(Exception):
    """The host lacks what the processes need to split: a system user, a capability."""


class Identities:
    """The identities that the broker may take; its own ids are looked up before the split.

    Each `as_` is for a `with` block, and raises OSError at its beginning. Without privilege
    there is only our own uid, and `only_uid` says so.
    """

    __slots__ = ("_folder", "_groups", "only_uid", "session", "spool", "terminal_gid")

    def __init__(self, config: Config) -> None:
        self.only_uid = os.geteuid() or None
        self.terminal_gid = _find_gid(config.terminal.group)
        self._folder = mailbox_folder(config)
        self._groups: dict[str, list[int]] = {}
        self.session = self.spool = (os.getuid(), os.getgid())
        if self.only_uid is None:
            self.session = _find_ids(SESSION_USER)
            self.spool = _find_ids(SPOOL_USER)

    def as_user(self, account: Account) -> Acting:
        """The user as at home: uid, gid, and the groups that the account database gives."""
        if account.user not in self._groups and self.only_uid is None:
            self._groups[account.user] = os.getgrouplist(account.user, account.gid)
        groups = self._groups.get(account.user, [])
        return Acting(self, account.uid, account.gid, groups)

    def as_recipient(self, account: Account) -> Acting:
        """The identity for a mailbox: with the spool's group where that is a spool.

        Only root's directory with no user's name in its path is one: anywhere else a
        user could lead the path to a directory of a group that is not the user's.
        Raises OSError.
        """
        if self.only_uid is None and "{" not in self._folder:
            status = os.stat(self._folder)
            if status.st_uid == 0:
                return Acting(self, account.uid, status.st_gid, [])
        return self.as_user(account)

    def as_spool_user(self) -> Acting:
        """The owner of messages that wait on disk."""
        return Acting(self, *self.spool, [])

    def as_terminal_writer(self) -> Acting:
        """The session's uid with group tty: a `mesg n` terminal is the kernel's to refuse."""
        return Acting(self, self.session[0], self.terminal_gid, [])

    def start_as(self, account: Account, fds: tuple[int, int], job: Callable[[], None]) -> int:
        """Fork a process that is `account` for good, and does `job`; its pid, or OSError.

        It keeps the first three descriptors and `fds`, and is the parent of its orphans.
        """
        groups = os.getgrouplist(account.user, account.gid)
        pid = os.fork()
        if pid != 0:
            return pid
        try:
            become_user(account, groups)
            keep_only(*fds)
            job()
        except Exception:  # noqa: BLE001 (the outermost of this process)
            log.write_traceback("command")
        finally:
            os._exit(TEMPORARY_FAILURE)


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


def become_user(account: Account, groups: list[int]) -> None:
    """Become a user with no way back, and the parent of the user's orphans.

    Raises OSError or SetupError.
    """
    import ctypes

    os.setgroups(groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    if 0 in (account.uid, *os.getresuid()) or os.getresuid() != (account.uid,) * 3:
        raise SetupError("the command's process did not lose its identity")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def drop_for_good(identities: Identities) -> None:
    """Become the session user, with no way back; raises OSError or SetupError."""
    uid, gid = identities.session
    if identities.only_uid is None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise SetupError("the session process did not lose its identity")


def become_spool_user() -> None:
    """Become the owner of the queue, with no way back; raises OSError or SetupError.

    Whoever is not root stays who he is, and finds out what he may do with it.
    """
    if os.geteuid() != 0:
        return
    uid, gid = _find_ids(SPOOL_USER)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise SetupError("the queue's process did not lose its identity")


def split(config: Config, peer: Peer, load_session: Callable[[], Session]) -> tuple[int, str]:
    """Fork into session and broker; in the broker, returns the session's exit status, and the
    host that is to have its mail by TURN, or "".

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
    host = answer_requests(ours, config, peer, identities)
    ours.close()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), host


def be_session(
    identities: Identities,
    config: Config,
    broker: wire.Broker,
    load_session: Callable[[], Session],
) -> NoReturn:
    """The session process from here to its end; nothing gets out of it upwards."""
    status = UNFORESEEN
    try:
        converse = load_session()
        limit_writing(largest_text(config))
        drop_for_good(identities)
        if config.delivery.commands:
            give_up_new_privileges()
        status = converse(broker)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("session")
    finally:
        os._exit(status)


def give_up_new_privileges() -> None:
    """Never become another by a setuid program, where the unit does not see to it."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def keep_only(*fds: int) -> None:
    """Close every descriptor but the first three and `fds`."""
    begin = 3
    for fd in sorted(fds):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, 1 << 20)


def leave_client() -> None:
    """Let go of the client's descriptors, so that only the session can reach it."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if null > 2:
        os.close(null)


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
) -> str:
    """Serve one session until it is gone, or until we are told to end between requests.

    Returns the host to which the client has turned the channel, or "".
    """
    patience = Patience()
    if identities.only_uid is None:
        os.setgroups([])
    # Loaded here: after the fork, so that the greeting need not wait for it, and before any
    # change of identity, which could make it unreadable.
    from mda.answers import Answers

    answers = Answers(config, peer, identities)
    try:
        while True:
            frame, fd = patience.receive(channel)
            if not frame:
                return answers.turned_to
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
    return ""


def _tell(channel: _socket.socket) -> None:
    """Let a session that waits for its client know that there is no more broker."""
    try:
        wire.send_frame(channel, wire.pack(wire.STOP))
    except wire.WireError:
        log.write("lost")


def preload() -> None:
    """Load what `Answers` needs, and what finding logins needs, before any fork."""
    import filelock  # noqa: F401
    import psutil  # noqa: F401

    from mda import answers  # noqa: F401
    from mda.outbound import queue  # noqa: F401
    from mda.recipients import listing  # noqa: F401


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
    from mda.delivery.copies import Copies
    from mda.recipients import listing

    if is_maildir(config):
        return
    copies = Copies(config, identities)
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
        failure = copies.repair(account, time.monotonic() + _REPAIR_SECONDS_EACH, notes)
        if notes or failure is not None:
            yield account, notes, failure
        if time.monotonic() > until:
            return
