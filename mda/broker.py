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
from mda.config import is_maildir, mailbox_folder, mailbox_mode_for, official_name
from mda.model import VERBS, Outcome, Peer, Target, classify_os_error

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
_FOUND = Outcome(250, "2.1.5", "Recipient OK")
_NO_NAMES = Outcome(550, "5.7.1", "Names are not for this peer")
_ROWS = Outcome(250, "2.0.0", "Rows")
_TAKEN = Outcome(250, "2.0.0", "Text")
_MOST_TARGETS = 20_000  # of one transaction
_LARGEST_DECLARED = 1 << 64
_NO_TERMINALS = Outcome(451, "4.3.5", "Terminals cannot be written to on this host")
_LATEST_DEADLINE = 1 << 60
_SHORTEST_RUN = 10  # seconds that a command has, whatever others of the transaction took
_PR_SET_CHILD_SUBREAPER = 36
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


def become_user(account: Account) -> None:
    """Become a user with no way back, and the parent of the user's orphans.

    Raises OSError or SetupError.
    """
    import ctypes

    groups = os.getgrouplist(account.user, account.gid)
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

    from mda.delivery import command, deliver, maildir, mbox, quota  # noqa: F401
    from mda.recipients import expand, fullname, listing  # noqa: F401
    from mda.terminal import sessions, tty  # noqa: F401


class Answers:
    """The requests of one session, each answered by a frame and maybe a descriptor."""

    def __init__(self, config: Config, peer: Peer, identities: Identities) -> None:
        # Loaded here: after the fork, so that the greeting need not wait for them, and
        # before any change of identity, which could make them unreadable.
        from mda.delivery import command, deliver, maildir, mbox, quota
        from mda.recipients import expand, fullname
        from mda.terminal import sessions, tty

        self._maildir = maildir
        self._fullname = fullname
        self._run = deliver.run
        self._append = mbox.append
        self._names = expand
        self._command = command
        self._quota = quota
        self._repair = mbox.repair
        self._sessions = sessions
        self._tty = tty
        self._config = config
        self._peer = peer
        self._identities = identities
        self.host = expand.Host(config, identities.only_uid, self.as_user)
        # Of the transaction in hand: what its addresses mean, and what has been delivered.
        self._targets: list[Target] = []
        self._numbers: dict[tuple[str, int, str], int] = {}
        self._mailed: dict[tuple[str, int, str], Outcome] = {}
        self._commands_until = 0.0
        self._rows: list[bytes] = []
        self._texts: dict[bytes, tuple[int, int]] = {}
        self._spool_fds: dict[bytes, int] = {}
        self._groups: dict[str, list[int]] = {}

    def answer(self, request: list[bytes], fd: int) -> tuple[bytes, int]:
        """One request; raises WireError for anything but a request of `wire.py`."""
        match request:
            case [wire.RESOLVE | wire.EXPAND | wire.VERIFY | wire.ROWS | wire.WHO, *_]:
                return self._answer_about_names(request), -1
            case [wire.PROBE, number]:
                outcome, width = self.probe(self._target(number))
                return wire.pack_outcome(outcome, b"%d" % width), -1
            case [wire.SPOOL, form] if form in wire.FORMS:
                outcome, spool_fd = self._open_spool(form)
                return wire.pack_outcome(outcome), spool_fd
            case [wire.TEXT, form, size] if form in wire.FORMS:
                self._take_text(form, fd, wire.read_number(size, largest_text(self._config)))
                return wire.pack_outcome(_TAKEN), -1
            case [wire.DELIVER, *fields]:
                return wire.pack_outcome(self._deliver(fields)), -1
        raise wire.WireError("unknown request")

    def _answer_about_names(self, request: list[bytes]) -> bytes:
        match request:
            case [wire.RESOLVE, *fields]:
                outcome, self._rows = self._resolve(fields)
            case [wire.EXPAND, string]:
                outcome, self._rows = self._list_members(string)
            case [wire.WHO]:
                outcome, self._rows = self.list_logins()
            case [wire.ROWS, begin]:
                at = wire.read_number(begin, len(self._rows))
                return wire.pack_rows(_ROWS, self._rows, at)
            case [wire.VERIFY, string, kind]:
                outcome, *names = self._verify(string, may_be_full_name=kind == b"anything")
                return wire.pack_outcome(outcome, *map(os.fsencode, names))
            case _:
                raise wire.WireError("unknown request")
        return wire.pack_rows(outcome, self._rows)

    def _resolve(self, fields: list[bytes]) -> tuple[Outcome, list[bytes]]:
        """The targets of one address, as rows for the session; each has a number here."""
        match fields:
            case [verb, local_part, size, (b"first" | b"next") as place, origin] if verb in VERBS:
                declared = wire.read_number(size, _LARGEST_DECLARED)
            case _:
                raise wire.WireError("malformed request")
        if place == b"first":
            self._begin()
        is_handed_over = origin == b"handed-over"
        targets = self._names.expand(
            self.host,
            local_part,
            VERBS[verb],
            is_final=lambda account: is_handed_over and self._is_final(account),
        )
        if verb != b"SEND":
            targets = [self._refuse_full(target, declared) for target in targets]
        outcome = judge_targets(targets)
        if outcome.is_done and len(self._targets) + len(targets) > _MOST_TARGETS:
            outcome = Outcome(452, "4.5.3", "Too many members of too many lists")
        if not outcome.is_done:
            return outcome, []
        rows = []
        for target in targets:
            number = self._number(target)
            fields = [b"%d" % number, target.forms.encode("ascii"), target.address, target.owner]
            rows.append(wire.pack(*fields))
        return outcome, rows

    def _is_final(self, account: Account) -> bool:
        """Is a handed over message for this person to go no further?

        From a program, yes; but a person is no MTA, unless one has made him run us for
        his own mail.
        """
        return self._peer.user in ("", account.user)

    def _begin(self) -> None:
        """A new transaction: nothing that the last one was told is true any more."""
        self.host.forget()
        self._targets.clear()
        self._numbers.clear()
        self._mailed.clear()
        self._commands_until = 0.0

    def _refuse_full(self, target: Target, declared: int) -> Target:
        """The target, or a failure in the place of a mailbox with no room for that many bytes."""
        if target.forwards:
            target.forwards = [self._refuse_full(each, declared) for each in target.forwards]
            return target
        full = self.judge_quota(target, max(1, declared))
        if full is None:
            return target
        return Target("failure", None, address=target.address, outcome=full)

    def judge_quota(self, target: Target, adding: int) -> Outcome | None:
        """Why so many bytes more are too many for the target's mailbox, if they are."""
        limits = self._config.delivery
        account = target.account
        if target.kind != "mailbox" or account is None:
            return None
        if not limits.quota_size and not limits.quota_messages:
            return None
        try:
            with self.as_recipient(account):
                full = self._quota.judge(
                    account.inbox, adding, limits.quota_size, limits.quota_messages
                )
        except OSError as error:
            return classify_os_error(error, "asking how full the mailbox is")
        return self._quota.defer(full, is_wanted=limits.quota_defers) if full else None

    def _number(self, target: Target) -> int:
        """The target's place in the table; one place that is named twice has one."""
        known = self._numbers.get(target.key)
        if known is not None and target.kind != "failure":
            return known
        self._targets.append(target)
        self._numbers[target.key] = len(self._targets) - 1
        return len(self._targets) - 1

    def _target(self, number: bytes) -> Target:
        if not self._targets:
            raise wire.WireError("no such target")
        return self._targets[wire.read_number(number, len(self._targets) - 1)]

    def _verify(self, string: bytes, *, may_be_full_name: bool) -> tuple[Outcome, str, str]:
        """Whose mailbox `string` is or, where that is allowed, who is called so."""
        if not self._peer.may_ask_names:
            return _NO_NAMES, "", ""
        if string.lower() == b"postmaster":
            outcome, account = self.host.find_account(string)
            return outcome, "postmaster" if account else "", ""
        self.host.forget()
        name = self._names.name_person(self.host, string)
        if isinstance(name, Outcome):
            return name, "", ""
        outcome, account = self.host.find_account(name)
        recipients = self._config.recipients
        if outcome.code == 550 and may_be_full_name and self._config.receiver.vrfy_names:
            persons = (recipients.uid_min, recipients.uid_max)
            outcome, user = self._fullname.find_person(string, persons, self._identities.only_uid)
            if outcome.is_done:
                outcome, account = self.host.find_account(os.fsencode(user))
        if account is None:
            return outcome, "", ""
        return outcome, account.user, self._full_name(account.user)

    def _full_name(self, user: str) -> str:
        try:
            return self._fullname.full_name(user)
        except OSError:
            return ""

    def _list_members(self, name: bytes) -> tuple[Outcome, list[bytes]]:
        """One row for each member of a list: local part, domain and full name."""
        if not self._peer.may_ask_names:
            return _NO_NAMES, []
        self.host.forget()
        found = self._names.list_members(self.host, name)
        if found is None:
            return Outcome(550, "5.1.1", "No such list here"), []
        if isinstance(found, Outcome):
            return found, []
        rows = []
        for each in found[:_MOST_TARGETS]:
            is_ours = not each.domain or self.host.is_ours(each.domain)
            account = self.host.find_account(each.text)[1] if is_ours else None
            full_name = self._full_name(account.user) if account else ""
            rows.append(wire.pack(each.text, each.domain, os.fsencode(full_name)))
        return Outcome(250, "2.1.5", "Members"), rows

    def probe(self, target: Target) -> tuple[Outcome, int]:
        """Would a terminal of the target's take the peer's message now, and how wide is it."""
        try:
            found = self._find_terminals(target)
            if isinstance(found, Outcome):
                return found, 0
            with self._as_terminal_writer():
                return self._tty.probe(found[1], found[0], self._identities.terminal_gid)
        except OSError as error:
            return classify_os_error(error, "asking for terminals"), 0

    def _show(self, target: Target, block: bytes) -> Outcome:
        """An error here is an outcome too: the mailbox may have the message already."""
        gid = self._identities.terminal_gid
        try:
            found = self._find_terminals(target)
            if isinstance(found, Outcome):
                return found
            with self._as_terminal_writer():
                return self._tty.show(found[1], found[0], gid, block)
        except OSError as error:
            return classify_os_error(error, "writing to a terminal")

    def _find_terminals(self, target: Target) -> tuple[int, list[Terminal]] | Outcome:
        """Their owner and the candidates for this peer's message, or why there can be none.

        Raises OSError (design, decision 8).
        """
        account = target.account
        if target.kind != "mailbox" or account is None:
            return target.outcome or Outcome(550, "5.3.3", "No person, and so no terminal")
        if not self._peer.may_use_terminals:
            return Outcome(550, "5.7.1", "Terminals are not for this peer")
        recipients = self._config.recipients
        is_person = recipients.uid_min <= account.uid <= recipients.uid_max
        if not is_person and account.uid != self._identities.only_uid:
            return Outcome(550, "5.7.1", "No terminal messages for this account")
        if self._identities.terminal_gid == -1:
            return _NO_TERMINALS
        logins = self._sessions.find_terminals(account.uid)
        return (account.uid, logins.terminals) if logins.is_available else _CANNOT_TELL

    def _open_spool(self, form: bytes) -> tuple[Outcome, int]:
        """An unnamed file on disk, which only the spool's own user could have made.

        There is one of each form for the session's life, emptied for each message that
        needs it, so that a session gone astray cannot fill the disk with many.
        """
        uid, gid = self._identities.spool
        # With O_EXCL nobody can give it a name afterwards.
        flags = os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC
        try:
            if form not in self._spool_fds:
                with Acting(self._identities, uid, gid, []):
                    self._spool_fds[form] = os.open(self._config.delivery.spool, flags, 0o600)
            os.ftruncate(self._spool_fds[form], 0)
            os.lseek(self._spool_fds[form], 0, os.SEEK_SET)
        except OSError as error:
            return classify_os_error(error, "opening the spool"), -1
        return Outcome(250, "2.0.0", "Spool"), self._spool_fds[form]

    def _take_text(self, form: bytes, fd: int, size: int) -> None:
        """Keep the text that deliveries are made from, in place of the last one."""
        if fd == -1:
            raise wire.WireError("a text without a descriptor")
        last, _ = self._texts.pop(form, (-1, 0))
        if last != -1:
            os.close(last)
        self._texts[form] = (os.dup(fd), size)

    def _text(self, form: bytes) -> tuple[int, int]:
        """The descriptor and the size of the text in that form.

        Only what we have made ourselves or what is sealed is read, and only whole: a
        device, a pipe or a file that changes under us could hold us, or never end.
        """
        fd, size = self._texts.get(form, (-1, 0))
        if fd == -1:
            raise wire.WireError("a delivery without a message")
        status = os.fstat(fd)
        spools = self._spool_fds.values()
        is_ours = any(os.path.samestat(status, os.fstat(each)) for each in spools)
        if not (is_ours or _is_sealed(fd)) or status.st_size != size:
            raise wire.WireError("a text that is not sealed, or not of its size")
        return fd, size

    def _deliver(self, fields: list[bytes]) -> Outcome:
        """The verb table for one target, each step under its own identity."""
        if len(fields) != 8 or fields[0] not in VERBS:
            raise wire.WireError("malformed request")
        verb, number, sender, recipient, prefix, block, clipped, deadline = fields
        latest = time.monotonic() + self._config.delivery.lock_seconds
        until = min(wire.read_number(deadline, _LATEST_DEADLINE) / 1000, latest)
        if not prefix.startswith(b"From ") or not prefix.endswith(b"\n"):
            raise wire.WireError("a delivery without a From_ line")
        target = self._target(number)
        message = Message(sender, recipient, prefix, until)
        return self._run(
            VERBS[verb],
            clipped == b"clipped",
            lambda: self._mail(target, message),
            lambda: self._show(target, block),
        )

    def _mail(self, target: Target, message: Message) -> Outcome:
        """Put one copy where it belongs, once in a transaction."""
        if target.forwards:
            outcomes = [self._mail(each, message) for each in target.forwards]
            return min(outcomes, key=lambda each: (each.is_done, not each.is_temporary))
        if target.key not in self._mailed or target.kind == "failure":
            self._mailed[target.key] = self._mail_now(target, message)
        return self._mailed[target.key]

    def _mail_now(self, target: Target, message: Message) -> Outcome:
        account = target.account
        if account is None:
            return target.outcome or Outcome(451, "4.3.0", "Nowhere to go")
        if target.kind == "nothing":
            return Outcome(250, "2.0.0", "Delivered to nowhere, as its alias says")
        text = self._text(target.forms.encode("ascii"))
        notes: list[str] = []
        try:
            if target.kind == "command":
                return self._pipe(target, account, message, text)
            full = self.judge_quota(target, len(message.prefix) + text[1])
            outcome = full or self._store(target, account, message, text, notes)
            return self._quota.defer(outcome, is_wanted=self._config.delivery.quota_defers)
        except OSError as error:
            return classify_os_error(error, "delivering")
        finally:
            for note in notes:
                log.write("mailbox", log.WARNING, user=account.user, note=note)

    def _store(
        self,
        target: Target,
        account: Account,
        message: Message,
        text: tuple[int, int],
        notes: list[str],
    ) -> Outcome:
        """Write to a mailbox, or to a file that an alias or a forward file names."""
        is_mailbox = target.kind == "mailbox"
        with self.as_recipient(account) if is_mailbox else self.as_user(account):
            if target.place.endswith("/"):
                head = message.prefix.partition(b"\n")[2]
                return self._maildir.deliver(target.place, account.uid, head, *text, notes)
            mode = mailbox_mode_for(self._config) if is_mailbox else 0o600
            place = (target.place, account.uid, mode)
            flock = self._config.delivery.flock
            return self._append(
                *place, message.prefix, *text, message.deadline, notes, takes_flock=flock
            )

    def repair(self, account: Account, deadline: float, notes: list[str]) -> Outcome | None:
        """Undo what a killed delivery left in the mailbox; an outcome says why not."""
        flock = self._config.delivery.flock
        try:
            with self.as_recipient(account):
                place = (account.mailbox, account.uid)
                return self._repair(*place, deadline, notes, takes_flock=flock)
        except OSError as error:
            return classify_os_error(error, "repairing the mailbox")

    def _pipe(
        self, target: Target, account: Account, message: Message, text: tuple[int, int]
    ) -> Outcome:
        """Run a command as the user; all of one transaction's share a time that is bounded."""
        now = time.monotonic()
        self._commands_until = self._commands_until or now + self._config.delivery.command_seconds
        seconds = max(_SHORTEST_RUN, self._commands_until - now)
        domain = official_name(self._config)
        variables = self._command.environment(
            account, target.address, domain, message.sender, message.recipient
        )
        report_fd, write_fd = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(report_fd)
            os.close(write_fd)
            raise
        if pid == 0:
            job = (target.place, variables, (message.prefix, *text), seconds, write_fd)
            self._supervise(account, (text[0], write_fd), lambda: self._command.supervise(*job))
        os.close(write_fd)
        report = self._command.read_report(report_fd, seconds)
        os.close(report_fd)
        self._end(account, pid)
        outcome, note = self._command.judge(report)
        level = log.INFO if outcome.is_done else log.WARNING
        log.write("command", level, user=account.user, command=target.place, note=note)
        return outcome

    def _supervise(
        self, account: Account, fds: tuple[int, int], supervise: Callable[[], None]
    ) -> NoReturn:
        """In the child: become the user for good, adopt what is orphaned, then `supervise`."""
        try:
            become_user(account)
            keep_only(*fds)
            supervise()
        except Exception:  # noqa: BLE001 (the outermost of this process)
            log.write_traceback("command")
        finally:
            os._exit(TEMPORARY_FAILURE)

    def _end(self, account: Account, pid: int) -> None:
        """The supervisor is over, or is made so: root without CAP_KILL kills as the user."""
        with self.as_user(account):
            try:
                os.kill(pid, _signal.SIGKILL)
            except ProcessLookupError:
                log.write("lost", user=account.user)
        os.waitpid(pid, 0)

    def as_recipient(self, account: Account) -> Acting:
        """The identity for a mailbox: with the spool's group where that is a spool.

        Only root's directory with no user's name in its path is one: anywhere else a
        user could lead the path to a directory of a group that is not the user's.
        """
        directory = mailbox_folder(self._config)
        if self._identities.only_uid is None and "{" not in directory:
            status = os.stat(directory)
            if status.st_uid == 0:
                return Acting(self._identities, account.uid, status.st_gid, [])
        return self.as_user(account)

    def as_user(self, account: Account) -> Acting:
        """The user as at home: uid, gid, and the groups that the account database gives."""
        if account.user not in self._groups and self._identities.only_uid is None:
            self._groups[account.user] = os.getgrouplist(account.user, account.gid)
        groups = self._groups.get(account.user, [])
        return Acting(self._identities, account.uid, account.gid, groups)

    def _as_terminal_writer(self) -> Acting:
        """The session's uid with group tty: a `mesg n` terminal is the kernel's to refuse."""
        return Acting(
            self._identities, self._identities.session[0], self._identities.terminal_gid, []
        )

    def list_logins(self) -> tuple[Outcome, list[bytes]]:
        """Each terminal that somebody sits at: user, device, idle seconds, and y or n."""
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
        return Outcome(250, "2.0.0", f"{len(lines)} terminals"), lines


class Message:
    """What the targets of one delivery share; the paths are without brackets."""

    __slots__ = ("deadline", "prefix", "recipient", "sender")

    def __init__(self, sender: bytes, recipient: bytes, prefix: bytes, deadline: float) -> None:
        self.sender = sender
        self.recipient = recipient
        self.prefix = prefix
        self.deadline = deadline


def judge_targets(targets: list[Target]) -> Outcome:
    """What RCPT is told about an address with these targets, of which there is one.

    Without a queue one that cannot be reached now holds up the others (decision 3).
    """
    outcomes = [
        judge_targets(each.forwards) if each.forwards else each.outcome or _FOUND
        for each in targets
    ]
    failed = [each for each in outcomes if not each.is_done]
    for each in failed:
        if each.is_temporary:
            return each
    return _FOUND if len(failed) < len(outcomes) else failed[0]


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
