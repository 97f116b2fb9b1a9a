"""One mail transaction: its envelope, its text, and the outcome for each recipient."""

from __future__ import annotations

import os
import time

from mda import log
from mda.config import official_name
from mda.content.headers import (
    delivered_to,
    from_line,
    original_to,
    received,
    return_path,
)
from mda.model import (
    NO_WISH,
    TERMINAL_VERBS,
    Envelope,
    Outcome,
    Path,
    Peer,
    Recipient,
    Wish,
    will_forward,
)
from mda.receiver import replies
from mda.receiver.domains import Domains
from mda.receiver.grammar import read_path
from mda.receiver.textstore import TextStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.config import Config
    from mda.model import Copy, Verb
    from mda.outbound.notice import Action
    from mda.receiver.replies import Reply
    from mda.wire import Broker

    Members = list[tuple[Copy, Outcome]]


_LONGEST_TEXT = 400  # of a reply that says what happened to many
_ROOM = 48 * 1024  # octets of a request that names copies for the queue
_LONGEST_NUMBERED = 50  # of one copy, without its ORCPT


class Transaction:
    """What the protocol's events do: `open`, `address`, `write`, `finish`, `drop`.

    `helo` and `protocol` ("ESMTP") describe the session for the time stamp.
    """

    def __init__(
        self,
        broker: Broker,
        config: Config,
        peer: Peer,
        domains: Domains,
        *,
        is_lmtp: bool,
        is_notice: bool = False,
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
        self._kept: set[int] = set()  # copies that failed for now, and wait in the queue
        self._is_lmtp = is_lmtp
        self._is_notice = is_notice
        self.helo = ""
        self.protocol = "LMTP" if is_lmtp else "SMTP"

    def open(
        self,
        verb: Verb,
        reverse_path: Path,
        size: int = 0,
        *,
        is_utf8: bool = False,
        ret: str = "",
        envid: bytes = b"",
    ) -> Reply:
        """MAIL, SEND, SOML or SAML: the sender is known, nobody is a recipient yet."""
        envelope = Envelope(verb, reverse_path, size, is_utf8=is_utf8, ret=ret, envid=envid)
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

    def address(self, path: Path, place: bytes = b"", wish: Wish = NO_WISH) -> Reply:
        """RCPT: accept one more recipient, or say why not.

        `place` is the one that the queue asks for, or empty.
        """
        envelope = self._open_envelope
        if len(envelope.recipients) >= self._config.receiver.recipients:
            if self._is_full:
                return replies.TOO_MANY_RECIPIENTS  # logged once is enough
            self._is_full = True
            return self._refuse(envelope, replies.TOO_MANY_RECIPIENTS, to=path.text)
        away = self._lead_away(path)
        if away[0] and not self._may_relay:
            return self._refuse(envelope, replies.RELAYING_DENIED, to=path.text)
        outcome, copies = self._broker.resolve(
            envelope.verb,
            path.local_part,
            envelope.size,
            is_first=not envelope.recipients,
            is_handed_over=self._is_handed_over,
            only=place,
            domain=away[0],
            route=away[1],
            is_notice=self._is_notice,
        )
        recipient = Recipient(path, copies, wish)
        if outcome.is_done and envelope.verb in TERMINAL_VERBS:
            outcome = self._ask_for_terminals(envelope, recipient, outcome, is_relay=bool(away[0]))
        # What a moved mailbox is told begins with the path that it has now.
        has_moved = outcome.code in (251, 551)
        reply = replies.of_outcome(outcome, "" if has_moved else subject(path))
        if not reply.is_accepted:
            self._refuse(envelope, reply, to=path.text)
            # What is wrong with a file of a user's is for this host to know.
            is_stranger = self._peer.kind == "tcp" and reply.enhanced == "4.3.5"
            return replies.WAITS_FOR_A_MEND if is_stranger else reply
        envelope.recipients.append(recipient)
        return reply

    @property
    def _may_relay(self) -> bool:
        """Our own notices go anywhere."""
        return self._peer.may_relay or self._is_notice

    def _lead_away(self, path: Path) -> tuple[bytes, bytes]:
        """Domain and source route of mail that leaves us; both empty where it is ours.

        A route counts only where it is honoured, and only from who may relay: without it the
        last mailbox does (RFC 5321 4.1.1.3), and by that nobody can make us a relay.
        """
        is_honoured = self._config.relay.source_routes == "honour" and self._may_relay
        return self._domains.lead_away(path, is_honoured=is_honoured)

    @property
    def _is_handed_over(self) -> bool:
        """Has an MTA followed aliases and forward files already?"""
        from_mta = self._domains.takes_any and not self._peer.is_queue
        return from_mta and self._config.recipients.mta_expands

    def _ask_for_terminals(
        self, envelope: Envelope, recipient: Recipient, resolved: Outcome, *, is_relay: bool
    ) -> Outcome:
        """The answer to SEND, SOML and SAML; for another host's terminal we will only try."""
        if not all(copy.is_remote for copy in recipient.copies):
            return self._probe(envelope, recipient)
        if envelope.verb != "SEND" or resolved.code == 251:
            return resolved
        return will_forward(recipient.path.text if is_relay else b"")

    def _probe(self, envelope: Envelope, recipient: Recipient) -> Outcome:
        """Ask for a terminal now; RFC 821 3.4 lets only SEND fail by it.

        Of several copies the first without a terminal speaks for all.
        """
        probed = []
        for copy in recipient.copies:
            outcome, copy.width = self._broker.probe(copy, envelope.reverse_path.text)
            probed.append(outcome)
        outcome = min(probed, key=lambda each: each.is_done)
        if outcome.is_done or envelope.verb == "SEND":
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
            forms = {form for each in self._open_envelope.recipients for form in each.forms}
            self._text = TextStore(self._broker, self._config, "".join(sorted(forms)))
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
        if not text.error:
            text.offer()
        deadline = time.monotonic() + self._config.delivery.lock_seconds
        served = self._send_on(text)
        self._hold_up(served)
        held: list[tuple[Recipient, Members]] = []
        for recipient in envelope.recipients:
            members = self._serve(recipient, text, deadline, served)
            # What else is to be done for some waits until everybody has been served.
            if held or not self._is_lmtp or is_mixed(members):
                held.append((recipient, members))
            else:
                yield recipient, merge(members)
        for group in [[each] for each in held] if self._is_lmtp else [held]:
            self._keep_failed(group, served, text)
        for recipient, members in held:
            members = [(copy, served[copy.number]) for copy, _ in members]
            yield recipient, self._settle(recipient, members, text)
        self._confirm(served, text)

    def _confirm(self, served: dict[int, Outcome], text: TextStore) -> None:
        """Tell the sender of deliveries, where that was asked for (RFC 3461 5.2.3, 5.2.7).

        Of a copy that leaves us the last host tells, or the queue. Who stands for several places
        is expanded, and nobody tells of the single ones.
        """
        told: dict[Action, list[tuple[bytes, Outcome, Wish]]] = {}
        for recipient in self._open_envelope.recipients:
            outcomes = [(copy, served[copy.number]) for copy in recipient.copies]
            here = [
                outcome
                for copy, outcome in outcomes
                if outcome.is_done and not copy.is_remote and copy.number not in self._kept
            ]
            if recipient.wish.has("SUCCESS") and here:
                action: Action = "delivered" if len(outcomes) == 1 else "expanded"
                row = (recipient.path.text, here[0], recipient.wish)
                told.setdefault(action, []).append(row)
        for action, rows in told.items():
            self._notify(self._open_envelope.reverse_path.text, rows, text, action)

    def _send_on(self, text: TextStore) -> dict[int, Outcome]:
        """Queue the copies that leave this host; the outcome of each, by its number.

        Those of one sender and one forwarding address go in one message.
        """
        envelope = self._open_envelope
        groups: dict[tuple[bytes, bytes], dict[int, tuple[Recipient, Copy]]] = {}
        for recipient in envelope.recipients:
            for copy in recipient.copies:
                if copy.is_remote:
                    group = groups.setdefault((self._sender(copy), copy.address), {})
                    group.setdefault(copy.number, (recipient, copy))
        served: dict[int, Outcome] = {}
        for group in groups.values():
            served.update(self._send_group([copy for _, copy in group.values()], text))
            for number, (recipient, copy) in group.items():
                self._log(envelope, recipient, copy, served[number])
        return served

    def _hold_up(self, served: dict[int, Outcome]) -> None:
        """Who stands beside a mailbox elsewhere that must be tried again is not served now.

        Else the client's next try would be one more copy: of the transaction's, by SMTP, and
        by LMTP of the recipient's.
        """
        recipients = self._open_envelope.recipients
        for group in [[each] for each in recipients] if self._is_lmtp else [recipients]:
            numbers = [copy.number for recipient in group for copy in recipient.copies]
            known = [served[number] for number in numbers if number in served]
            late = next((outcome for outcome in known if outcome.is_temporary), None)
            if late is not None:
                served.update({number: late for number in numbers if number not in served})

    def _send_group(self, copies: list[Copy], text: TextStore) -> dict[int, Outcome]:
        refused, mark = text.error, b""
        if copies[0].address:  # forwarded by an address of ours, and not relayed
            address = self._address_of(copies[0])
            mark = delivered_to(address)
            if not refused and text.has_been_at(address):
                refused = replies.to_outcome(replies.DELIVERED_BEFORE)
        if refused:
            return dict.fromkeys((copy.number for copy in copies), refused)
        return self._queue(copies, mark)

    def _keep_failed(
        self,
        group: list[tuple[Recipient, Members]],
        served: dict[int, Outcome],
        text: TextStore,
    ) -> None:
        """Queue what failed for now where others have the message already (decision 3).

        SEND is for now or not at all.
        """
        copies = {copy.number: copy for _, members in group for copy, _ in members}
        is_served = any(served[number].is_done for number in copies)
        if self._open_envelope.verb == "SEND" or text.error or not is_served:
            return
        by_sender: dict[bytes, list[Copy]] = {}
        for number, copy in copies.items():
            if served[number].is_temporary and not copy.is_remote:
                by_sender.setdefault(self._sender(copy), []).append(copy)
        for failed in by_sender.values():
            outcomes = self._queue(failed, b"")
            kept = {each: outcome for each, outcome in outcomes.items() if outcome.is_done}
            served.update(kept)
            self._kept |= set(kept)

    def _queue(self, copies: list[Copy], mark: bytes) -> dict[int, Outcome]:
        """Let the message wait for copies with one sender; each one's outcome, by its number.

        `mark` is the Delivered-To line, or nothing where the next try adds its own.
        """
        envelope = self._open_envelope
        outcomes: dict[int, Outcome] = {}
        for part in cut(copies):
            outcome = self._broker.queue(
                envelope.verb,
                part,
                sender=self._sender(copies[0]),
                head=mark + self._stamp(None),
                is_utf8=envelope.is_utf8,
                ret=envelope.ret,
                envid=envelope.envid,
            )
            outcomes.update(dict.fromkeys((copy.number for copy in part), outcome))
        return outcomes

    def _address_of(self, copy: Copy) -> bytes:
        """What the Delivered-To line of a copy names."""
        return b"%b@%b" % (copy.address, self._name.encode())

    def _serve(
        self, recipient: Recipient, text: TextStore, deadline: float, served: dict[int, Outcome]
    ) -> Members:
        """Deliver the copies of one recipient that nobody before had; each one's outcome."""
        for copy in recipient.copies:
            if copy.number not in served:
                outcome = text.error or self._deliver(recipient, copy, text, deadline)
                served[copy.number] = outcome
                self._log(self._open_envelope, recipient, copy, outcome)
        return [(copy, served[copy.number]) for copy in recipient.copies]

    def _settle(self, recipient: Recipient, members: Members, text: TextStore) -> Outcome:
        """The outcome of a list of which some are refused for good, once that is told.

        To the owner of the list that each stands in, else to the sender.
        """
        if not is_partial(members):
            return merge(members)
        refused: dict[bytes, list[tuple[bytes, Outcome, Wish]]] = {}
        for copy, outcome in members:
            if not outcome.is_done and copy.wish.has("FAILURE"):
                row = (copy.address, outcome, recipient.wish)
                refused.setdefault(self._sender(copy), []).append(row)
        if not all(self._notify(to, failures, text) for to, failures in refused.items()):
            return merge(members)
        count = sum(outcome.is_done for _, outcome in members)
        told = f"Delivered to {count} of {len(members)} members, and a notice"
        return Outcome(250, "2.1.5", told)

    def conclude(self, results: list[tuple[Recipient, Outcome]]) -> Reply:
        """The one reply that SMTP has for all recipients (RFC 821 4.1.1, DATA).

        250 although some are refused for good, where a notice of that is in the sender's
        mailbox.
        """
        failed = [(recipient, outcome) for recipient, outcome in results if not outcome.is_done]
        is_in_part = 0 < len(failed) < len(results)
        # By SEND the others would be written to again: nothing of it is for a later try.
        is_final = self._open_envelope.verb == "SEND" or not any(
            each.is_temporary for _, each in failed
        )
        if is_in_part and self._text and is_final:
            refused = [
                (recipient.path.text, outcome, recipient.wish)
                for recipient, outcome in failed
                if recipient.wish.has("FAILURE")
            ]
            sender = self._open_envelope.reverse_path.text
            if not refused:
                return replies.SERVED_IN_SILENCE
            if self._notify(sender, refused, self._text):
                return replies.SERVED_IN_PART
        return combine(results, self._open_envelope.verb)

    def _notify(
        self,
        to: bytes,
        rows: list[tuple[bytes, Outcome, Wish]],
        text: TextStore,
        action: Action = "failed",
    ) -> bool:
        """Is a notice of `rows` durably in the mailbox of `to`, a path without brackets?

        Or in the queue, for a mailbox of another host. Never for the null reverse-path (RFC
        821 3.6). What is in the way of a notice leaves the failure to the client.
        """
        path = read_path(to)
        if path is None or not path.text or not self._may_tell(path, rows):
            return False
        from mda.outbound.notice import Row, compose  # needs email, which MAIL seldom does

        domains = Domains(self._config, takes_any=False)
        notice = Transaction(
            self._broker, self._config, Peer("stream"), domains, is_lmtp=False, is_notice=True
        )
        notice.helo, notice.protocol = "localhost", "local"
        try:
            notice.open("MAIL", Path(b"", (), b"", b""))
            if not notice.address(path).is_accepted:
                return False
            mailbox = self._name_fully(path.text[len(path.route_text) :])
            named = [
                Row(self._name_fully(address), outcome, original=wish.original)
                for address, outcome, wish in rows
            ]
            # Nobody can have us send a text of his own choice to whom he likes.
            is_whole = text.is_head_whole and (self._peer.may_relay or not path.domain)
            envelope = self._open_envelope
            head = bytes(text.head)
            notice.write(
                compose(
                    self._name,
                    mailbox,
                    named,
                    head,
                    time.time(),
                    action=action,
                    is_whole=is_whole and envelope.ret != "HDRS",
                    envid=envelope.envid,
                )
            )
            return all(outcome.is_done for _, outcome in notice.finish())
        finally:
            notice.drop()

    def _may_tell(self, path: Path, rows: list[tuple[bytes, Outcome, Wish]]) -> bool:
        """May we send a notice there ourselves?

        To another host an MTA that calls us does it; and by what makes a text look like one that
        has been here, a stranger could have notices sent to whom he likes.
        """
        if Domains(self._config, takes_any=False).is_ours(path.domain):
            return True
        is_looped = any(outcome.enhanced == "5.4.6" for _, outcome, _ in rows)
        is_ours_to_tell = self._peer.is_queue or not self._domains.takes_any
        return is_ours_to_tell and (self._peer.may_relay or not is_looped)

    def _name_fully(self, address: bytes) -> bytes:
        """An address as a notice names it, also to somebody elsewhere."""
        return address if b"@" in address else b"%b@%b" % (address, self._name.encode())

    def _deliver(
        self, recipient: Recipient, copy: Copy, text: TextStore, deadline: float
    ) -> Outcome:
        envelope = self._open_envelope
        address = self._address_of(copy)
        if text.has_been_at(address):
            return replies.to_outcome(replies.DELIVERED_BEFORE)
        block, is_clipped = b"", False
        if envelope.verb in TERMINAL_VERBS:
            block, is_clipped = self._render(envelope, copy, text)
        return self._broker.deliver(
            envelope.verb,
            copy,
            sender=self._sender(copy),
            recipient=recipient.path.text,
            prefix=self._lines_before(recipient, copy, address),
            block=block,
            is_clipped=is_clipped,
            deadline=deadline,
        )

    def _sender(self, copy: Copy) -> bytes:
        """The reverse-path of a copy: a list's is its owner's (RFC 5321 3.9.2)."""
        sender = self._open_envelope.reverse_path.text
        return b"%b@%b" % (copy.owner, self._name.encode()) if sender and copy.owner else sender

    def _lines_before(self, recipient: Recipient, copy: Copy, address: bytes) -> bytes:
        """What stands before the text: the From_ line, and the header lines that we add."""
        envelope = self._open_envelope
        now = time.time()
        sender = self._sender(copy)
        sole = recipient if len(envelope.recipients) == 1 else None
        return b"".join(
            (
                from_line(sender, now),
                return_path(sender),
                original_to(recipient.path.text) if recipient.path.domain else b"",
                delivered_to(address),
                self._stamp(sole),
            )
        )

    def _stamp(self, sole: Recipient | None) -> bytes:
        """The time stamp line; only a sole recipient is named in it (RFC 5321 7.2)."""
        return received(
            self.helo,
            peer_text(self._peer),
            self._name,
            name_protocol(self.protocol, self._open_envelope.is_utf8),
            self._identity,
            sole.path.text.decode("utf-8", "replace") if sole else None,
            time.time(),
        )

    def _render(self, envelope: Envelope, copy: Copy, text: TextStore) -> tuple[bytes, bool]:
        """The block for the recipient's terminal (decision 7)."""
        from mda.content.screen import render  # needs email, which MAIL never does

        terminal = self._config.terminal
        claimed = envelope.reverse_path.text.decode("utf-8", "replace")
        return render(
            bytes(text.head),
            text.is_head_whole,
            sender=self._peer.user or f"<{claimed}>",
            is_verified=bool(self._peer.user),
            via=self._origin(),
            when=time.strftime("%H:%M"),
            width=copy.width or 80,
            lines=terminal.lines,
            limit=terminal.bytes,
            bell=terminal.bell,
            has_mailbox_copy=envelope.verb != "SEND",
        )

    def _origin(self) -> str:
        """The host that sent it: its address, since HELO may be given any name."""
        peer = self._peer
        return f"[{peer.address}]" if peer.kind == "tcp" and peer.address else self.helo

    def _log(self, envelope: Envelope, recipient: Recipient, copy: Copy, outcome: Outcome) -> None:
        log.write(
            "delivered" if outcome.is_done else "deferred" if outcome.is_temporary else "failed",
            log.INFO if outcome.is_done else log.WARNING,
            id=self._identity,
            verb=envelope.verb,
            to=recipient.path.text,
            user=copy.address,
            sender=envelope.reverse_path.text,
            peer=self._peer.address,
            size=self._text.received_size if self._text else 0,
            reply=f"{outcome.code} {outcome.enhanced} {outcome.text}",
        )

    def drop(self) -> None:
        """Forget the envelope and the text (RFC 821 4.1.1: the buffers are cleared)."""
        self._envelope = None
        self._is_full = False
        self._kept.clear()
        if self._text is not None:
            self._text.close()
            self._text = None


def cut(copies: list[Copy]) -> Iterator[list[Copy]]:
    """The copies in parts that one request can name."""
    part: list[Copy] = []
    room = _ROOM
    for copy in copies:
        room -= _LONGEST_NUMBERED + len(copy.wish.original)
        if room < 0 and part:
            yield part
            part, room = [], _ROOM
        part.append(copy)
    if part:
        yield part


def is_partial(members: Members) -> bool:
    """Are some served and the others refused for good, so that nothing is left to be done?"""
    failed = [outcome for _, outcome in members if not outcome.is_done]
    return 0 < len(failed) < len(members) and not any(each.is_temporary for each in failed)


def is_mixed(members: Members) -> bool:
    """Are some served and others not?"""
    return 0 < sum(outcome.is_done for _, outcome in members) < len(members)


def merge(members: Members) -> Outcome:
    """The one outcome of a recipient whose mail goes to several places."""
    if len(members) == 1:
        return members[0][1]
    failed = [(copy, outcome) for copy, outcome in members if not outcome.is_done]
    if not failed:
        return Outcome(250, "2.1.5", f"Delivered to all {len(members)} members")
    copy, worst = min(failed, key=lambda pair: not pair[1].is_temporary)
    who = copy.address[:200].decode("ascii", "replace")
    return Outcome(worst.code, worst.enhanced, f"{who}: {worst.text}")


def combine(results: list[tuple[Recipient, Outcome]], verb: Verb) -> Reply:
    """The one reply that SMTP has for all recipients.

    Without a queue a temporary failure of one makes the whole transaction temporary
    (decision 3), and a permanent one is the client's to know where no notice says so.
    """
    failed = [(recipient, outcome) for recipient, outcome in results if not outcome.is_done]
    if not failed:
        only = results[0][1]
        if len(results) > 1:
            only = Outcome(250, "2.0.0", tell_all(results) if verb in TERMINAL_VERBS else "OK")
        return replies.of_outcome(only)
    recipient, outcome = min(failed, key=lambda pair: not pair[1].is_temporary)
    if len(results) == 1:
        return replies.of_outcome(outcome)
    if outcome.is_temporary and outcome.code != 452:
        outcome = Outcome(451, outcome.enhanced, outcome.text)
    return replies.of_outcome(outcome, subject(recipient.path))


def tell_all(results: list[tuple[Recipient, Outcome]]) -> str:
    """What happened, each thing with how often it did: "Sent to 1 terminal (2 users)"."""
    count: dict[str, int] = {}
    for _, outcome in results:
        count[outcome.text] = count.get(outcome.text, 0) + 1
    text = "; ".join(
        f"{what} ({times} user{'s' if times > 1 else ''})" for what, times in count.items()
    )
    return text if len(text) <= _LONGEST_TEXT else "OK"


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
