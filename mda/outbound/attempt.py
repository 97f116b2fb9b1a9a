"""One try at one message: its recipients to their next hops, and what follows from that."""

from __future__ import annotations

import os
import random
import threading
import time
from functools import partial

from mda import log
from mda.config import LMTP_SOCKET, official_name, own_domains, queue_directory
from mda.model import VERBS, Outcome
from mda.outbound import notice, queue, sender
from mda.outbound.dialogue import MOST_RECIPIENTS, NO_TLS, OWN_WORDS, Request, Result
from mda.outbound.program import hand_over
from mda.outbound.queue import Addressee, Envelope, Waiting
from mda.outbound.route import WAITS_FOR_TURN, Hop, find_addresses, find_hop, plain_name
from mda.outbound.text import Measures, unquote
from mda.receiver.domains import Domains
from mda.receiver.grammar import read_path, spell_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from mda.config import Config
    from mda.outbound.notice import Action
    from mda.outbound.sender import Conversation

    # Where mail goes, or why that cannot be told now; and the numbers of those that go there.
    Way = tuple[Hop | Outcome, list[int]]

_LOCAL = Hop("lmtp", path=LMTP_SOCKET, tls="never", takes_any_line=True)
_PROGRAM = Hop("sendmail")
_POSTMASTER = b"postmaster"
_DOWN_SECONDS = 60
_SEND_HOURS = 1  # what is for a terminal is for now
_LONGEST_LINE = 1000  # octets with CRLF (RFC 821 4.5.3)
_HEAD = 65_536  # octets of the text that a notice is made from
_LINE_TOO_LONG = Outcome(554, "5.6.0", "A line longer than 1,000 octets, which no hop need take")
_HOP_DOWN = Outcome(451, "4.4.1", "The next host did not answer a moment ago")
_NEVER_TRIED = Outcome(451, "4.4.0", "Not tried yet")


class Attempts:
    """What the tries of one run share: the configuration, and which hops are down.

    With a `conversation` all goes on its channel.
    """

    def __init__(self, config: Config, conversation: Conversation | None = None) -> None:
        self._config = config
        self._conversation = conversation
        self._name = official_name(config)
        self._own_domains = own_domains(config)
        self._domains = Domains(config, takes_any=False)
        self._lock = threading.Lock()
        self._down: dict[str, float] = {}

    def find_ways(self, message: Waiting) -> dict[str, Way]:
        """The ways of the addressees that are still open, by the key of each."""
        ways: dict[str, Way] = {}
        for number, each in enumerate(message.envelope.addressees):
            if each.is_open:
                hop = self._find_hop(each)
                key = hop.key if isinstance(hop, Hop) else hop.text
                ways.setdefault(key, (hop, []))[1].append(number)
        return ways

    def find_way_to(self, message: Waiting, host: str) -> dict[str, Way]:
        """The way of those addressees that are for `host` (as of `plain_name`), by their domain
        or by its hop.
        """
        numbers = [
            number
            for number, each in enumerate(message.envelope.addressees)
            if each.is_open and each.domain and self._is_for(each, host)
        ]
        if not numbers:
            return {}
        route = self._find_hop(Addressee(b"", host.encode("ascii")))
        way = Hop("turn", host, tls="never")
        if isinstance(route, Hop):
            way.name, way.takes_any_line = route.name, route.takes_any_line
        return {way.key: (way, numbers)}

    def _is_for(self, addressee: Addressee, host: str) -> bool:
        hop = self._find_hop(addressee)
        is_hop = isinstance(hop, Hop) and plain_name(hop.host) == host
        return is_hop or plain_name(next_domain(addressee)) == host

    def _find_hop(self, addressee: Addressee) -> Hop | Outcome:
        outbound = self._config.outbound
        if not addressee.domain:
            return _LOCAL
        if outbound.via == "sendmail":
            return _PROGRAM
        domain = next_domain(addressee)
        try:
            return find_hop(domain, vars(self._config.routes), outbound.smarthost)
        except ValueError as error:
            return Outcome(451, "4.3.5", f"Its route cannot be followed: {str(error)!a}")

    def make(self, message: Waiting, ways: dict[str, Way]) -> None:
        """Try all that is open, and keep what becomes of it; raises OSError."""
        # First, so that nothing is sent of which no trace can be kept.
        # A host that takes its mail puts off nobody else's next try.
        if self._conversation is None:
            message.note_try()
        else:
            message.note({})
        for key, (hop, numbers) in ways.items():
            self._go(message, key, hop, numbers)
        self._conclude(message)

    def _go(self, message: Waiting, key: str, hop: Hop | Outcome, numbers: list[int]) -> None:
        """One way: in transactions of so many recipients, or more where the hop wants it."""
        while numbers:
            part, numbers = numbers[:MOST_RECIPIENTS], numbers[MOST_RECIPIENTS:]
            result = self._send_unless_down(message, key, hop, part)
            left = [part[at] for at in result.leftover]
            outcomes = {
                number: outcome
                for number, outcome in zip(part, result.outcomes, strict=True)
                if outcome is not None and number not in left
            }
            own = {
                n for n, outcome in outcomes.items() if any(outcome is each for each in OWN_WORDS)
            }
            is_passed_on = result.has_dsn or hop is _LOCAL
            message.note(outcomes, result.host, own, is_passed_on=is_passed_on)
            self._log(message, key, outcomes)
            numbers = left + numbers

    def _send_unless_down(
        self, message: Waiting, key: str, hop: Hop | Outcome, numbers: list[int]
    ) -> Result:
        """A hop that has not answered is left alone for a while."""
        if self._conversation is not None and isinstance(hop, Hop):
            result = self._send_on(self._conversation, message, hop, numbers)
            if result.failure is not None:
                result.settle(result.failure)
            return result
        with self._lock:
            is_down = self._down.get(key, 0.0) > time.monotonic()
        if is_down:
            return settled(len(numbers), _HOP_DOWN)
        if isinstance(hop, Outcome):
            return settled(len(numbers), hop)
        result = self._send(message, hop, numbers)
        if result.failure is not None:
            result.settle(result.failure)
            if not result.is_greeted:
                with self._lock:
                    self._down[key] = time.monotonic() + _DOWN_SECONDS
        return result

    def _send_on(
        self, conversation: Conversation, message: Waiting, hop: Hop, numbers: list[int]
    ) -> Result:
        paths = [spell(message.envelope.addressees[number]) for number in numbers]
        read = partial(read_text, message)
        measures = Measures(read())
        if is_line_too_long(measures, hop):
            return settled(len(paths), _LINE_TOO_LONG)
        request = self._request(message, hop, numbers, paths, measures)
        return conversation.send(request, read)

    def _send(self, message: Waiting, hop: Hop, numbers: list[int]) -> Result:
        addressees = [message.envelope.addressees[number] for number in numbers]
        if hop is _PROGRAM:
            # Which way it goes is the program's to say.
            mailboxes = [spell_mailbox(each) for each in addressees]
            return settled(len(mailboxes), hand_over(message, mailboxes))
        if hop.protocol == "turn":
            return settled(len(addressees), WAITS_FOR_TURN)
        paths = [spell(each) for each in addressees]
        read = partial(read_text, message)
        measures = Measures(read())
        if is_line_too_long(measures, hop):
            return settled(len(paths), _LINE_TOO_LONG)
        found = find_addresses(hop, self._own_domains)
        if isinstance(found, Outcome):
            return settled(len(paths), found)
        request = self._request(message, hop, numbers, paths, measures)
        result = Result(len(paths))
        for host, address in found:
            request.tls = hop.tls
            result = sender.send(address, request, read, host=host)
            is_tls = result.failure is not None and result.failure.enhanced == NO_TLS.enhanced
            if is_tls and hop.tls == "may":
                request.tls = "never"
                result = sender.send(address, request, read, host=host)
            result.host = spell_host(host) if result.is_greeted else ""
            if result.failure is None:
                break
        return result

    def _request(
        self, message: Waiting, hop: Hop, numbers: list[int], paths: list[bytes], measures: Measures
    ) -> Request:
        envelope = message.envelope
        places = [envelope.addressees[number].place.encode("ascii") for number in numbers]
        return Request(
            # Who had his message on no terminal then is not to have it on one hours later.
            VERBS[b"MAIL" if hop is _LOCAL else envelope.verb.encode("ascii")],
            self._reverse_path(envelope, hop),
            paths,
            helo=hop.name or self._name,
            parameters=[b"XPLACE=" + each if each else b"" for each in places],
            dsn=[name_envelope(envelope)]
            + [name_wish(envelope.addressees[number]) for number in numbers],
            size=measures.size,
            has_8bit=measures.has_8bit,
            is_utf8=envelope.is_utf8 or not b"".join([envelope.sender, *paths]).isascii(),
            is_lmtp=hop.protocol == "lmtp",
            tls=hop.tls,
        )

    def _reverse_path(self, envelope: Envelope, hop: Hop) -> bytes:
        """The sender, who has a domain elsewhere, with our name in front where source routes are
        honoured (RFC 821 3.6): the one by which the hop knows us. The null path stays null.
        """
        sender = envelope.sender
        path = read_path(sender) if sender and hop is not _LOCAL else None
        if path is None:
            return sender
        if not path.domain:
            sender = b"%b@%b" % (sender, self._name.encode("ascii"))
        if self._config.relay.source_routes != "honour" or not envelope.is_relayed:
            return sender
        separator = b"," if path.route else b":"
        return b"@%b%b%b" % ((hop.name or self._name).encode("ascii"), separator, sender)

    def _log(self, message: Waiting, key: str, outcomes: dict[int, Outcome]) -> None:
        for number, outcome in outcomes.items():
            log.write(
                "sent" if outcome.is_done else "deferred" if outcome.is_temporary else "bounced",
                log.INFO if outcome.is_done else log.WARNING,
                queue=message.name,
                to=spell(message.envelope.addressees[number]),
                sender=message.envelope.sender,
                hop=key,
                reply=f"{outcome.code} {outcome.enhanced} {outcome.text}",
            )

    def _conclude(self, message: Waiting) -> None:
        """What follows from the try: a notice, another try, or the end."""
        settings = self._config.outbound
        addressees = message.envelope.addressees
        age = time.time() - message.envelope.came
        is_send = message.envelope.verb == "SEND"
        if age > (_SEND_HOURS if is_send else settings.give_up_hours) * 3600:
            message.note({n: give_up(each) for n, each in enumerate(addressees) if each.is_open})
        failed = [n for n, each in enumerate(addressees) if each.is_to_be_told]
        if failed:
            self._tell(message, failed)
            message.note_told(failed)
        gone = [n for n, each in enumerate(addressees) if each.is_to_be_confirmed]
        if gone:
            self._tell(message, gone, "relayed")
            message.note_told(gone)
        still = [n for n, each in enumerate(addressees) if each.is_open]
        if not still:
            message.remove()
        elif self._conversation is None:
            self._conclude_later(message, still, age)

    def _conclude_later(self, message: Waiting, still: list[int], age: float) -> None:
        """Another try, and maybe a notice that it takes longer."""
        settings = self._config.outbound
        late = [n for n in still if message.envelope.addressees[n].wish.has("DELAY")]
        delay = settings.delay_notice_hours * 3600
        if delay and age > delay and late and not message.is_delay_told:
            self._tell(message, late, "delayed")
            message.note_delay_told()
        seconds = pause(message.tries, settings.retry_minutes, settings.retry_most_minutes)
        message.wait_until(time.time() + seconds)

    def put_off(self, message: Waiting, seconds: float) -> None:
        """What went wrong unforeseen is not to go wrong again at once, nor for ever.

        Raises OSError.
        """
        if time.time() - message.envelope.came > self._config.outbound.give_up_hours * 3600:
            addressees = enumerate(message.envelope.addressees)
            # The next try finds nothing to send, and tells the sender.
            message.note({n: give_up(each) for n, each in addressees if each.is_open})
        message.wait_until(time.time() + seconds)

    def _tell(self, message: Waiting, numbers: list[int], action: Action = "failed") -> None:
        """Queue a notice to the sender; what nobody can be told goes to postmaster, once."""
        envelope = message.envelope
        to = self._find_reader(envelope, is_lost=action == "failed")
        head = b"".join(read_text(message, most=_HEAD))
        is_last = not envelope.sender and notice.is_last_word(head, self._name)
        if to is None or is_last:
            log.write("dropped", log.WARNING, queue=message.name, why="nobody to tell")
            return
        failures = [
            notice.Row(
                self._name_fully(each),
                each.outcome or _NEVER_TRIED,
                host=each.host,
                original=each.wish.original,
            )
            for each in (envelope.addressees[number] for number in numbers)
        ]
        reader = self._name_fully(to)
        text = notice.compose(
            self._name,
            reader,
            failures,
            head,
            time.time(),
            action=action,
            is_whole=message.size <= _HEAD and envelope.ret != "HDRS",
            envid=envelope.envid.encode("ascii"),
            is_last=not envelope.sender,
        )
        queue.put(queue_directory(self._config), Envelope("MAIL", b"", [to]), [text])

    def _find_reader(self, envelope: Envelope, *, is_lost: bool) -> Addressee | None:
        """Who is told: the sender; of a notice nobody but postmaster, and of that nobody."""
        to = read_path(envelope.sender)
        if to is None or not to.text:
            is_last = [(each.local_part, each.domain) for each in envelope.addressees] == [
                (_POSTMASTER, b"")
            ]
            return None if is_last or not is_lost else Addressee(_POSTMASTER, b"")
        # The last mailbox (RFC 5321 6.1), but along the route where that is honoured.
        is_honoured = self._config.relay.source_routes == "honour"
        domain, route = self._domains.lead_away(to, is_honoured=is_honoured)
        return Addressee(to.local_part, domain, route=route)

    def _name_fully(self, addressee: Addressee) -> bytes:
        """An addressee as a notice names it, also to somebody elsewhere."""
        domain = addressee.domain or self._name.encode("ascii")
        return spell(Addressee(addressee.local_part, domain))


def is_line_too_long(measures: Measures, hop: Hop) -> bool:
    """Has the text a line that this hop need not take?"""
    return measures.longest_line > _LONGEST_LINE and not hop.takes_any_line


def next_domain(addressee: Addressee) -> str:
    """The domain that mail for an addressee goes to next, along its source route."""
    first = addressee.route.split(b",")[0].removeprefix(b"@") or addressee.domain
    return first.decode("utf-8", "replace")


def settled(count: int, outcome: Outcome) -> Result:
    """The result where so many have one outcome, and no host was spoken to."""
    result = Result(count)
    result.settle(outcome)
    return result


def spell_host(host: str) -> str:
    """A host as reports name it: an address in brackets (RFC 5321 4.1.3)."""
    if ":" in host:
        return f"[IPv6:{host}]"
    return f"[{host}]" if host.replace(".", "").isdigit() else host


def give_up(addressee: Addressee) -> Outcome:
    """The outcome of what has been tried for too long."""
    last = addressee.outcome or _NEVER_TRIED
    return Outcome(554, "5.4.7", f"Given up after many tries: {last.text}")


def pause(tries: int, first_minutes: int, most_minutes: int) -> float:
    """Seconds until the next try: doubled each time, a tenth more or less by lot."""
    seconds = 60.0 * min(most_minutes, first_minutes * 2.0 ** min(tries - 1, 30))
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311


def name_envelope(envelope: Envelope) -> bytes:
    """The parameters of MAIL for notices (RFC 3461 4.3, 4.4)."""
    words = [("RET", envelope.ret), ("ENVID", envelope.envid)]
    return " ".join(f"{key}={value}" for key, value in words if value).encode("ascii")


def name_wish(addressee: Addressee) -> bytes:
    """The parameters of RCPT for notices (RFC 3461 4.1, 4.2)."""
    words = [("NOTIFY", addressee.wish.notify), ("ORCPT", addressee.wish.original.decode("ascii"))]
    return " ".join(f"{key}={value}" for key, value in words if value).encode("ascii")


def spell(addressee: Addressee) -> bytes:
    """The forward-path of an addressee, without brackets, with what is left of its route."""
    mailbox = spell_mailbox(addressee)
    return b"%b:%b" % (addressee.route, mailbox) if addressee.route else mailbox


def spell_mailbox(addressee: Addressee) -> bytes:
    """The mailbox of an addressee as it stands in a path."""
    local_part = os.fsdecode(addressee.local_part)
    domain = os.fsdecode(addressee.domain)
    return os.fsencode(spell_path(f"{local_part}@{domain}" if domain else local_part))


def read_text(message: Waiting, most: int = 0) -> Iterable[bytes]:
    """The text as it was before it was kept, in pieces; about `most` bytes, 0 for all."""
    pieces = message.read_text()
    if message.envelope.form == "q":
        pieces = unquote(message.read_lines())
    size = 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if 0 < most <= size:
            return
