"""Copies of one message, each put where it belongs: a mailbox, a file, a command.

The text is offered once in each form that its copies need, and every copy has lines of its
own before it. Each step is taken under the identity of whoever the place belongs to.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import errno
import fcntl
import itertools
import os
import time

from mda import log, wire
from mda.config import mailbox_mode_for, official_name, queue_directory
from mda.delivery import command, maildir, mbox, quota
from mda.model import NO_WISH, Outcome, cannot_keep, classify_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.broker import Identities
    from mda.config import Config
    from mda.model import Account, Target, Verb, Wish

_NO_TIME = Outcome(451, "4.3.0", "No time is left for one more command of this message")
_SHORTEST_RUN = 1  # second


class Message:
    """What the targets of one delivery share; the paths are without brackets."""

    __slots__ = ("deadline", "prefix", "recipient", "sender")

    def __init__(self, sender: bytes, recipient: bytes, prefix: bytes, deadline: float) -> None:
        self.sender = sender
        self.recipient = recipient
        self.prefix = prefix
        self.deadline = deadline


class Copies:
    """The texts and the deliveries of one session."""

    def __init__(self, config: Config, identities: Identities) -> None:
        self._config = config
        self._identities = identities
        self._texts: dict[bytes, tuple[int, int]] = {}
        self._spool_fds: dict[bytes, int] = {}
        # Of the transaction in hand.
        self._mailed: dict[tuple[str, int, str], Outcome] = {}
        self._commands_until = 0.0
        # Not to be counted as time that others have waited for locks.
        self.seconds_of_commands = 0.0

    def begin(self) -> None:
        """A new transaction: nothing of it has been delivered yet, and there is no text."""
        for fd, _ in self._texts.values():
            os.close(fd)
        self._texts.clear()
        self._mailed.clear()
        self._commands_until = 0.0
        self.seconds_of_commands = 0.0

    def open_spool(self, form: bytes) -> tuple[Outcome, int]:
        """An unnamed file on disk, which only the spool's own user could have made.

        There is one of each form for the session's life, emptied for each message that
        needs it, so that a session gone astray cannot fill the disk with many.
        """
        # With O_EXCL nobody can give it a name afterwards.
        flags = os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC
        try:
            if form not in self._spool_fds:
                with self._identities.as_spool_user():
                    self._spool_fds[form] = os.open(self._config.delivery.spool, flags, 0o600)
            os.ftruncate(self._spool_fds[form], 0)
            os.lseek(self._spool_fds[form], 0, os.SEEK_SET)
        except OSError as error:
            return cannot_keep(error, "opening the spool"), -1
        return Outcome(250, "2.0.0", "Spool"), self._spool_fds[form]

    def take_text(self, form: bytes, fd: int, size: int) -> None:
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

    def mail(self, target: Target, message: Message) -> Outcome:
        """Put one copy where it belongs, once in a transaction; raises WireError."""
        if target.forwards:
            outcomes = [self.mail(each, message) for each in target.forwards]
            return min(outcomes, key=lambda each: (each.is_done, not each.is_temporary))
        if target.key not in self._mailed or target.kind == "failure":
            self._mailed[target.key] = self._mail_now(target, message)
        return self._mailed[target.key]

    def queue(
        self,
        verb: Verb,
        sender: bytes,
        head: bytes,
        items: list[tuple[Target, bytes, Wish]],
        *,
        is_utf8: bool = False,
        ret: str = "",
        envid: str = "",
    ) -> Outcome:
        """Let the message wait on disk for targets that leave this host, or failed for now.

        `head` are the header lines that go before the text; with each target comes the
        local part that was asked for. Raises WireError.
        """
        from mda.outbound import queue  # needs json, which mail for this host never does

        addressees = []
        for target, asked, wish in items:
            local_part, _, domain = target.place.rpartition("@")
            if target.leaves:
                mailbox = os.fsencode(local_part), os.fsencode(domain)
                addressees.append(queue.Addressee(*mailbox, route=target.route))
            else:
                addressees.append(queue.Addressee(asked, b"", name_place(target)))
            addressees[-1].wish = wish
        form = b"p" if b"p" in self._texts else b"q"
        fd, size = self._text(form)
        envelope = queue.Envelope(
            verb,
            sender,
            addressees,
            form=form.decode("ascii"),
            is_utf8=is_utf8,
            is_relayed=any(target.kind == "relay" for target, _, _ in items),
            ret=ret,
            envid=envid,
        )
        pieces = itertools.chain([head], read_at(fd, size))
        try:
            with self._identities.as_spool_user():
                directory = queue_directory(self._config)
                keep_free = self._config.outbound.keep_free
                name = queue.put(directory, envelope, pieces, keep_free=keep_free)
        except OSError as error:
            return cannot_keep(error, "queueing the message")
        log.write("queued", queue=name, sender=sender, recipients=len(addressees))
        return Outcome(250, "2.0.0", f"Queued as {name}")

    def failed(self, target: Target) -> list[Target]:
        """Of a target's places those that have failed for now, and may be tried again."""
        places = target.forwards or [target]
        outcomes = [(each, self._mailed.get(each.key)) for each in places]
        return [
            each
            for each, outcome in outcomes
            if each.kind != "failure" and outcome and outcome.is_temporary
        ]

    def _mail_now(self, target: Target, message: Message) -> Outcome:
        account = target.account
        if target.leaves:
            return self.queue(
                "MAIL", message.sender, head_of(message.prefix), [(target, b"", NO_WISH)]
            )
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
            return quota.defer(outcome, is_wanted=self._config.delivery.quota_defers)
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
        with (
            self._identities.as_recipient(account)
            if is_mailbox
            else self._identities.as_user(account)
        ):
            if target.place.endswith("/"):
                head = message.prefix.partition(b"\n")[2]
                return maildir.deliver(target.place, account.uid, head, *text, notes)
            mode = mailbox_mode_for(self._config) if is_mailbox else 0o600
            place = (target.place, account.uid, mode)
            flock = self._config.delivery.flock
            return mbox.append(
                *place, message.prefix, *text, message.deadline, notes, takes_flock=flock
            )

    def judge_quota(self, target: Target, adding: int) -> Outcome | None:
        """Why so many bytes more are too many for the target's mailbox, if they are."""
        limits = self._config.delivery
        account = target.account
        if target.kind != "mailbox" or account is None:
            return None
        if not limits.quota_size and not limits.quota_messages:
            return None
        try:
            with self._identities.as_recipient(account):
                full = quota.judge(account.inbox, adding, limits.quota_size, limits.quota_messages)
        except OSError as error:
            return classify_os_error(error, "asking how full the mailbox is")
        return quota.defer(full, is_wanted=limits.quota_defers) if full else None

    def repair(self, account: Account, deadline: float, notes: list[str]) -> Outcome | None:
        """Undo what a killed delivery left in the mailbox; an outcome says why not."""
        flock = self._config.delivery.flock
        try:
            with self._identities.as_recipient(account):
                place = (account.mailbox, account.uid)
                return mbox.repair(*place, deadline, notes, takes_flock=flock)
        except OSError as error:
            return classify_os_error(error, "repairing the mailbox")

    def _pipe(
        self, target: Target, account: Account, message: Message, text: tuple[int, int]
    ) -> Outcome:
        """Run a command as the user; all of one transaction's share a time that is bounded."""
        now = time.monotonic()
        self._commands_until = self._commands_until or now + self._config.delivery.command_seconds
        seconds = self._commands_until - now
        if seconds < min(_SHORTEST_RUN, self._config.delivery.command_seconds):
            return _NO_TIME
        domain = official_name(self._config)
        variables = command.environment(
            account,
            target.address,
            self._config.recipients.extension_separator.encode("ascii"),
            domain,
            (message.sender, message.recipient),
        )
        report_fd, write_fd = os.pipe()
        job = (target.place, variables, (message.prefix, *text), seconds, write_fd)
        try:
            pid = self._identities.start_as(
                account, (text[0], write_fd), lambda: command.supervise(*job)
            )
        except OSError:
            os.close(report_fd)
            raise
        finally:
            os.close(write_fd)
        report = command.read_report(report_fd, seconds)
        os.close(report_fd)
        self._end(account, pid)
        self.seconds_of_commands += time.monotonic() - now
        outcome, note = command.judge(report)
        level = log.INFO if outcome.is_done else log.WARNING
        log.write("command", level, user=account.user, command=target.place, note=note)
        return outcome

    def _end(self, account: Account, pid: int) -> None:
        """The supervisor is over, or is made so: root without CAP_KILL kills as the user."""
        with self._identities.as_user(account):
            try:
                os.kill(pid, _signal.SIGKILL)
            except ProcessLookupError:
                log.write("lost", user=account.user)
        os.waitpid(pid, 0)


def name_place(target: Target) -> str:
    """What the queue calls a place of this host: whose it is, and a digest of which."""
    import hashlib

    uid = target.account.uid if target.account else -1
    return f"{uid}.{hashlib.blake2b(repr(target.key).encode(), digest_size=16).hexdigest()}"


def head_of(prefix: bytes) -> bytes:
    """The lines before a text without those that only a final delivery adds.

    These are the From_ line, the Return-Path (RFC 821 4.1.1) and X-Original-To.
    """
    final = (b"Return-Path:", b"X-Original-To:")
    lines = prefix.split(b"\n")[1:]
    return b"\n".join(line for line in lines if not line.startswith(final))


def read_at(fd: int, size: int) -> Iterator[bytes]:
    """The `size` octets of a text, in pieces; raises OSError."""
    at = 0
    while at < size:
        piece = os.pread(fd, min(size - at, 1 << 16), at)
        if not piece:
            raise OSError(errno.EIO, "the text has become shorter")
        yield piece
        at += len(piece)


def _is_sealed(fd: int) -> bool:
    """A memfd that nobody can change any more."""
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted
    except OSError:
        return False
