"""The one file that changes identity.

The broker is the half of the receiver that keeps root's uid, with CAP_SETUID and
CAP_SETGID and nothing else. It never sees what the client says: it answers the few
bounded requests of `wire.py`, looks every name up itself, takes the recipient's
effective identity for one delivery, and gives it back (design, decision 1).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import _socket
import os
import pwd
import time

from mda import log, wire
from mda.model import VERBS, Outcome, classify_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mda.config import Config
    from mda.model import Account, Peer
    from mda.terminal.sessions import Terminal

    Session = Callable[[wire.Broker], int]

SESSION_USER = "mda-net"
SPOOL_USER = "mda"
TEMPORARY_FAILURE = 75
_CANNOT_TELL = Outcome(451, "4.3.0", "Cannot tell who is logged in on this host")
_MOST_ACCOUNTS = 1000
_MOST_ROWS = 400


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
        if self._is_real:
            os.setgroups(self._groups)
            os.setegid(self._gid)
            os.seteuid(self._uid)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_real:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([])


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
        ours.close()
        os._exit(_be_session(identities, wire.Broker(theirs), load_session))
    theirs.close()
    leave_client()
    answer_requests(ours, config, peer, identities)
    ours.close()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _be_session(
    identities: Identities, broker: wire.Broker, load_session: Callable[[], Session]
) -> int:
    try:
        keep_only(broker.fileno())
        converse = load_session()
        drop_for_good(identities)
        return converse(broker)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("session")
        return TEMPORARY_FAILURE


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


def answer_requests(
    channel: _socket.socket, config: Config, peer: Peer, identities: Identities
) -> None:
    """Serve one session until it is gone.

    SIGTERM ends the session, and thereby us, but never a delivery in hand.
    """
    _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    if identities.only_uid is None:
        os.setgroups([])
    answers = Answers(config, peer, identities)
    try:
        while True:
            frame, fd = wire.receive_frame(channel)
            if not frame:
                return
            try:
                answer, answer_fd = answers.answer(wire.unpack(frame), fd)
            finally:
                if fd != -1:
                    os.close(fd)
            try:
                wire.send_frame(channel, answer, answer_fd)
            finally:
                if answer_fd != -1:
                    os.close(answer_fd)
    except (wire.WireError, OSError) as error:
        log.write("broker", log.WARNING, error=str(error))


def preload() -> None:
    """Load what `Answers` needs, and what finding logins needs, before any fork."""
    import psutil  # noqa: F401

    from mda.delivery import deliver, mbox  # noqa: F401
    from mda.recipients import resolve  # noqa: F401
    from mda.terminal import sessions, tty  # noqa: F401


class Answers:
    """The requests of one session, each answered by a frame and maybe a descriptor."""

    def __init__(self, config: Config, peer: Peer, identities: Identities) -> None:
        # Loaded here: after the fork, so that the greeting need not wait for them, and
        # before any change of identity, which could make them unreadable.
        from mda.delivery import deliver, mbox
        from mda.recipients import resolve
        from mda.terminal import sessions, tty

        self._run = deliver.run
        self._append = mbox.append
        self._resolve = resolve.resolve
        self._sessions = sessions
        self._tty = tty
        self._config = config
        self._peer = peer
        self._identities = identities
        self._accounts: dict[bytes, tuple[Outcome, Account | None]] = {}

    def answer(self, request: list[bytes], fd: int) -> tuple[bytes, int]:
        """One request; raises WireError for anything but a request of `wire.py`."""
        match request:
            case [wire.RESOLVE, local_part]:
                outcome, account = self._find(local_part)
                return wire.pack_outcome(
                    outcome, *([os.fsencode(account.user)] if account else [])
                ), -1
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
            only_uid=self._identities.only_uid,
        )
        # A client that guesses names must not fill our memory, nor a failure of the
        # account database outlast itself.
        if found[0].is_done and len(self._accounts) < _MOST_ACCOUNTS:
            self._accounts[name] = found
        return found

    def _probe(self, local_part: bytes) -> tuple[Outcome, int]:
        outcome, account = self._find(local_part)
        if account is None:
            return outcome, 0
        terminals = self._find_terminals(account)
        if isinstance(terminals, Outcome):
            return terminals, 0
        with self._as_terminal_writer():
            return self._tty.probe(terminals, account.uid, self._identities.terminal_gid)

    def _show(self, account: Account, block: bytes) -> Outcome:
        terminals = self._find_terminals(account)
        if isinstance(terminals, Outcome):
            return terminals
        gid = self._identities.terminal_gid
        with self._as_terminal_writer():
            return self._tty.show(terminals, account.uid, gid, block)

    def _find_terminals(self, account: Account) -> list[Terminal] | Outcome:
        """Candidates for this peer's message, or why there can be none (decision 8)."""
        if not self._peer.may_use_terminals:
            return Outcome(550, "5.7.1", "Terminals are not for this peer")
        logins = self._sessions.find_terminals(account.uid)
        return logins.terminals if logins.is_available else _CANNOT_TELL

    def _open_spool(self) -> tuple[Outcome, int]:
        """An unnamed file on disk, which only the spool's own user could have made."""
        uid, gid = self._identities.spool
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        try:
            with Acting(self._identities, uid, gid, []):
                return Outcome(250, "2.0.0", "Spool"), os.open(
                    self._config.delivery.spool, flags, 0o600
                )
        except OSError as error:
            return classify_os_error(error, "opening the spool"), -1

    def _deliver(self, fields: list[bytes], fd: int) -> Outcome:
        """The verb table for one recipient, each step under its own identity."""
        if len(fields) != 7 or fields[0] not in VERBS:
            raise wire.WireError("malformed request")
        verb, local_part, prefix, size, block, clipped, deadline = fields
        outcome, account = self._find(local_part)
        if account is None:
            return outcome
        latest = time.monotonic() + self._config.delivery.lock_seconds
        until = min(int(deadline) / 1000, latest)
        return self._run(
            VERBS[verb],
            clipped == b"clipped",
            lambda: self._store(account, prefix, (fd, int(size)), until),
            lambda: self._show(account, block),
        )

    def _store(
        self, account: Account, prefix: bytes, text: tuple[int, int], deadline: float
    ) -> Outcome:
        if text[0] == -1:
            raise wire.WireError("a delivery without a text")
        notes: list[str] = []
        try:
            with self._as_recipient(account):
                return self._append(
                    account.mailbox,
                    account.uid,
                    self._config.delivery.mailbox_mode,
                    prefix,
                    *text,
                    deadline,
                    notes,
                )
        except OSError as error:
            return classify_os_error(error, "delivering")
        finally:
            for note in notes:
                log.write("mailbox", log.WARNING, user=account.user, note=note)

    def _as_recipient(self, account: Account) -> Acting:
        """The user's uid: with the user's groups at home, with the spool's in the spool."""
        if self._identities.only_uid is not None:
            return Acting(self._identities, account.uid, account.gid, [])
        if "{home}" in self._config.delivery.mailbox:
            groups = os.getgrouplist(account.user, account.gid)
            return Acting(self._identities, account.uid, account.gid, groups)
        spool_gid = os.stat(os.path.dirname(account.mailbox)).st_gid
        return Acting(self._identities, account.uid, spool_gid, [])

    def _as_terminal_writer(self) -> Acting:
        """The session's uid with group tty: a `mesg n` terminal is the kernel's to refuse."""
        return Acting(
            self._identities, self._identities.session[0], self._identities.terminal_gid, []
        )

    def _list_logins(self) -> tuple[Outcome, list[bytes]]:
        found, is_available = self._sessions.list_logins()
        if not is_available:
            return _CANNOT_TELL, []
        rows = []
        with self._as_terminal_writer():
            for uid, terminal in found:
                state = self._tty.describe(terminal, uid, self._identities.terminal_gid)
                if state is not None:
                    rows.append((uid, terminal.device, *state))
        lines = [
            b"%s %s %d %s" % (os.fsencode(user), os.fsencode(device), idle, takes.encode())
            for uid, device, idle, takes in rows
            if (user := _name_of(uid))
        ]
        return Outcome(250, "2.0.0", f"{len(lines[:_MOST_ROWS])} terminals"), lines[:_MOST_ROWS]


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
