"""One mail transaction: its envelope, its text, and the outcome for each recipient."""

from __future__ import annotations

import os
import time

from mda import log
from mda.config import is_maildir, official_name
from mda.content.headers import HeaderFilter, from_line, received, return_path
from mda.content.quoting import Quoter
from mda.model import TERMINAL_VERBS, Envelope, Outcome, Recipient, classify_os_error
from mda.receiver import replies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.config import Config
    from mda.model import Path, Peer, Verb
    from mda.receiver.domains import Domains
    from mda.receiver.replies import Reply
    from mda.wire import Broker

_HEAD = 128 * 1024  # as much of a text as a terminal's block is made from


class TextStore:
    """The text of a message in its stored form: in memory, or on disk when it is large.

    For Maildirs the stored form is as it came, for mbox files it is quoted. `head` are its
    first octets without quoting; `error` is what went wrong, and
    from then on the text is only swallowed.
    """

    def __init__(self, broker: Broker, config: Config) -> None:
        self._broker = broker
        self._memory = config.delivery.memory
        self._limits = config.receiver
        self._line_size = 0
        self._filter = HeaderFilter()
        self._quoter = None if is_maildir(config) else Quoter()
        self._is_on_disk = False
        self.fd = -1
        self.size = 0
        self.received_size = 0
        self.head = bytearray()
        self.error: Outcome | None = None
        try:
            self.fd = os.memfd_create("mda", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            self.error = cannot_keep(error)

    def write(self, octets: bytes) -> None:
        """Add a piece of the text (LF line ends) as it comes."""
        self.received_size += len(octets)
        if self.received_size > self._limits.message_size:
            self.refuse(replies.TOO_LARGE)
        if self._limits.text_line and not self.error:
            self._measure_lines(octets)
        self._keep(self._filter.feed(octets))

    def refuse(self, reply: Reply) -> None:
        """The text is not taken, for the first reason that there was."""
        self.error = self.error or replies.to_outcome(reply)

    def _measure_lines(self, octets: bytes) -> None:
        """Refuse a line that is longer on its way, with its CRLF (RFC 821 4.5.3)."""
        most = self._limits.text_line - len(b"\r\n")
        # Where the line in hand begins. What lies between there and the last LF that is
        # near enough are lines that are shorter still.
        at = -self._line_size
        while (end := octets.rfind(b"\n", max(0, at), max(0, at + most + 1))) >= 0:
            at = end + 1
        self._line_size = len(octets) - at
        if self._line_size > most:
            self.refuse(replies.TEXT_LINE_TOO_LONG)

    def finish(self) -> None:
        """The text is complete; seal it, so that nobody can change it any more."""
        self._keep(self._filter.finish())
        self._store(self._quoter.finish() if self._quoter else b"")
        if self._filter.received_count > self._limits.received_lines:
            self.refuse(replies.MAIL_LOOP)
        if self.fd != -1 and not self._is_on_disk:
            seal_memory(self.fd)

    @property
    def is_head_whole(self) -> bool:
        """`head` is all of the text."""
        return self.received_size <= _HEAD

    def _keep(self, octets: bytes) -> None:
        if len(self.head) < _HEAD:
            self.head += octets[: _HEAD - len(self.head)]
        self._store(self._quoter.feed(octets) if self._quoter else octets)

    def _store(self, octets: bytes) -> None:
        if self.error or not octets:
            return
        if self.size + len(octets) > self._memory and not self._is_on_disk:
            self._move_to_disk()
        if self.error:
            return
        try:
            write_all(self.fd, octets)
            self.size += len(octets)
        except OSError as error:
            self.error = cannot_keep(error)

    def _move_to_disk(self) -> None:
        outcome, fd = self._broker.open_spool()
        if not outcome.is_done or fd == -1:
            self.error = outcome
            return
        try:
            os.lseek(self.fd, 0, os.SEEK_SET)
            while octets := os.read(self.fd, 1 << 16):
                write_all(fd, octets)
        except OSError as error:
            self.error = cannot_keep(error)
        os.close(self.fd)
        self.fd = fd
        self._is_on_disk = True

    def close(self) -> None:
        """Let go of the text."""
        if self.fd != -1:
            os.close(self.fd)


def cannot_keep(error: OSError) -> Outcome:
    """A failure of our own store, which is no fault of the message: always temporary."""
    outcome = classify_os_error(error, "keeping the message")
    return outcome if outcome.is_temporary else Outcome(452, "4.3.1", outcome.text)


def write_all(fd: int, octets: bytes) -> None:
    """Write every octet; raises OSError."""
    view = memoryview(octets)
    while view:
        view = view[os.write(fd, view) :]


def seal_memory(fd: int) -> None:
    """Make a memfd unchangeable for whoever holds it."""
    import fcntl

    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


class Transaction:
    """What the protocol's events do: `open`, `address`, `write`, `finish`, `drop`.

    `helo` and `protocol` ("ESMTP") describe the session for the time stamp.
    """

    def __init__(
        self, broker: Broker, config: Config, peer: Peer, domains: Domains, *, is_lmtp: bool
    ) -> None:
        self._broker = broker
        self._config = config
        self._peer = peer
        self._name = official_name(config)
        self._domains = domains
        self._envelope: Envelope | None = None
        self._text: TextStore | None = None
        self._identity = ""
        self._is_full = False
        self.helo = ""
        self.protocol = "LMTP" if is_lmtp else "SMTP"

    def open(
        self, verb: Verb, reverse_path: Path, size: int = 0, *, is_utf8: bool = False
    ) -> Reply:
        """MAIL, SEND, SOML or SAML: the sender is known, nobody is a recipient yet."""
        envelope = Envelope(verb, reverse_path, is_utf8)
        if size > self._config.receiver.message_size:
            return self._refuse(envelope, replies.TOO_LARGE)
        self._envelope = envelope
        self._identity = f"{time.time_ns():x}.{os.getpid():x}"
        return replies.opened(verb)

    @property
    def _open_envelope(self) -> Envelope:
        if self._envelope is None:
            raise RuntimeError("no transaction is open")
        return self._envelope

    def address(self, path: Path) -> Reply:
        """RCPT: accept one more recipient, or say why not."""
        envelope = self._open_envelope
        if len(envelope.recipients) >= self._config.receiver.recipients:
            if self._is_full:
                return replies.TOO_MANY_RECIPIENTS  # logged once is enough
            self._is_full = True
            return self._refuse(envelope, replies.TOO_MANY_RECIPIENTS, to=path.text)
        if not self._domains.is_ours(path.domain):
            return self._refuse(envelope, replies.RELAYING_DENIED, to=path.text)
        outcome, user, folder = self._broker.resolve(path.local_part)
        recipient = Recipient(path, user, folder)
        if outcome.is_done and envelope.verb in TERMINAL_VERBS:
            outcome = self._probe(envelope.verb, recipient)
        reply = replies.of_outcome(outcome, subject(path))
        if not reply.is_accepted:
            return self._refuse(envelope, reply, to=path.text)
        envelope.recipients.append(recipient)
        return reply

    def _probe(self, verb: Verb, recipient: Recipient) -> Outcome:
        """Ask for a terminal now; RFC 821 3.4 lets only SEND fail by it."""
        outcome, recipient.width = self._broker.probe(recipient.path.local_part)
        if outcome.is_done or verb == "SEND":
            return outcome
        # Only 450 is an answer about the person; nobody is called away for our faults.
        is_away = outcome.code == 450
        reason = replies.NOT_ACTIVE if is_away else outcome.text
        return Outcome(250, "2.1.5", reason + replies.WILL_MAIL)

    def _refuse(self, envelope: Envelope, reply: Reply, *, to: bytes = b"") -> Reply:
        log.write(
            "refused",
            to=to,
            sender=envelope.reverse_path.text,
            peer=self._peer.address,
            reply=f"{reply.code} {reply.enhanced} {reply.lines[0]}",
        )
        return reply

    def write(self, octets: bytes) -> None:
        """A piece of the message in its stored form."""
        if self._text is None:
            self._text = TextStore(self._broker, self._config)
        self._text.write(octets)

    def finish(self, fault: Reply | None = None) -> Iterator[tuple[Recipient, Outcome]]:
        """Deliver, recipient by recipient in their order; each outcome is final.

        `fault` is what the protocol has against the text, and is then everybody's outcome.
        The waits for locks share one deadline. A mailbox named twice gets one copy, and
        both its recipients get the same outcome.
        """
        envelope = self._open_envelope
        self.write(b"")
        text = self._text
        if text is None:
            raise RuntimeError("no text was begun")
        if fault is not None:
            text.refuse(fault)
        text.finish()
        deadline = time.monotonic() + self._config.delivery.lock_seconds
        served: dict[tuple[str, str], Outcome] = {}
        for recipient in envelope.recipients:
            mailbox = (recipient.user, recipient.folder)
            if mailbox not in served:
                outcome = text.error or self._deliver(envelope, recipient, text, deadline)
                served[mailbox] = outcome
                self._log(envelope, recipient, text, outcome)
            yield recipient, served[mailbox]

    def _deliver(
        self, envelope: Envelope, recipient: Recipient, text: TextStore, deadline: float
    ) -> Outcome:
        block, is_clipped = b"", False
        if envelope.verb in TERMINAL_VERBS:
            block, is_clipped = self._render(envelope, recipient, text)
        return self._broker.deliver(
            envelope.verb,
            recipient.path.local_part,
            prefix=self._lines_before(envelope, recipient),
            text=(text.fd, text.size),
            block=block,
            is_clipped=is_clipped,
            deadline=deadline,
        )

    def _lines_before(self, envelope: Envelope, recipient: Recipient) -> bytes:
        """What stands before the text: From_ line (mbox), Return-Path, the time stamp."""
        now = time.time()
        sender = envelope.reverse_path.text
        sole = recipient if len(envelope.recipients) == 1 else None
        return b"".join(
            (
                b"" if is_maildir(self._config) else from_line(sender, now),
                return_path(sender),
                received(
                    self.helo,
                    peer_text(self._peer),
                    self._name,
                    name_protocol(self.protocol, envelope.is_utf8),
                    self._identity,
                    sole.path.text.decode("utf-8", "replace") if sole else None,
                    now,
                ),
            )
        )

    def _render(
        self, envelope: Envelope, recipient: Recipient, text: TextStore
    ) -> tuple[bytes, bool]:
        """The block for the recipient's terminal (decision 7)."""
        from mda.content.screen import render  # needs email, which MAIL never does

        terminal = self._config.terminal
        claimed = envelope.reverse_path.text.decode("utf-8", "replace")
        return render(
            bytes(text.head),
            text.is_head_whole,
            sender=self._peer.user or f"<{claimed}>",
            is_verified=bool(self._peer.user),
            via=self.helo or self._peer.address,
            when=time.strftime("%H:%M"),
            width=recipient.width or 80,
            lines=terminal.lines,
            limit=terminal.bytes,
            bell=terminal.bell,
            has_mailbox_copy=envelope.verb != "SEND",
        )

    def _log(
        self, envelope: Envelope, recipient: Recipient, text: TextStore, outcome: Outcome
    ) -> None:
        log.write(
            "delivered" if outcome.is_done else "deferred" if outcome.is_temporary else "failed",
            log.INFO if outcome.is_done else log.WARNING,
            id=self._identity,
            verb=envelope.verb,
            to=recipient.path.text,
            user=recipient.user,
            sender=envelope.reverse_path.text,
            peer=self._peer.address,
            size=text.received_size,
            reply=f"{outcome.code} {outcome.enhanced} {outcome.text}",
        )

    def drop(self) -> None:
        """Forget the envelope and the text (RFC 821 4.1.1: the buffers are cleared)."""
        self._envelope = None
        self._is_full = False
        if self._text is not None:
            self._text.close()
            self._text = None


def combine(results: list[tuple[Recipient, Outcome]]) -> Reply:
    """The one reply that SMTP has for all recipients.

    Without a queue a temporary failure of one makes the whole transaction temporary
    (decision 3), and a permanent one is the sender's to know, since no notice of ours
    could be on its way.
    """
    failed = [(recipient, outcome) for recipient, outcome in results if not outcome.is_done]
    if not failed:
        only = results[0][1]
        return replies.of_outcome(only if len(results) == 1 else Outcome(250, "2.0.0", "OK"))
    recipient, outcome = min(failed, key=lambda pair: not pair[1].is_temporary)
    if len(results) == 1:
        return replies.of_outcome(outcome)
    if outcome.is_temporary and outcome.code != 452:
        outcome = Outcome(451, outcome.enhanced, outcome.text)
    return replies.of_outcome(outcome, subject(recipient.path))


def subject(path: Path) -> str:
    """`<alice>` for the text of a reply."""
    return f"<{path.text[:300].decode('ascii', 'replace')}>"


def peer_text(peer: Peer) -> str:
    """The comment of a time stamp that says what the kernel knows of the peer."""
    if peer.kind == "tcp":
        literal = peer.address if ":" not in peer.address else f"IPv6:{peer.address}"
        return f"[{literal}]"
    if peer.user:
        return f"local user {peer.user}, {peer.address}"
    return f"local, {peer.address}" if peer.address else "local"


def name_protocol(protocol: str, is_utf8: bool) -> str:
    """The registered name for a time stamp: "ESMTP", and "UTF8SMTP" (RFC 3848, 6531 4.3)."""
    return f"UTF8{protocol.removeprefix('E')}" if is_utf8 else protocol
