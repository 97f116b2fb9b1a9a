"""Drive a Protocol in memory: answer everything it asks, and write down what happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from mda.config import Config
from mda.receiver import replies
from mda.receiver.protocol import (
    Addressing,
    AskingWho,
    Closing,
    Dropped,
    EndOfData,
    NamingClient,
    NeedOctets,
    Opening,
    Protocol,
    Say,
    StartingTls,
    Text,
    Turning,
    Verifying,
)
from mda.receiver.replies import Reply
from support.sequences import ADDED, RFC821


def make_protocol(
    *,
    is_lmtp: bool = False,
    offers_terminals: bool = True,
    offers_names: bool = True,
    offers_more: bool = False,
    **limits: object,
) -> Protocol:
    config = Config().with_values(
        "receiver", **{"command_line": 512, "message_size": 100_000, **limits}
    )
    return Protocol(
        "mda.test",
        config.receiver,
        is_lmtp=is_lmtp,
        offers_terminals=offers_terminals,
        offers_names=offers_names,
        offers_who=False,
        offers_dsn=offers_more,
        offers_tls=offers_more,
        offers_xclient=offers_more,
        offers_turn=offers_more,
    )


def accept_everything(event: object) -> Reply:
    return replies.OK


# What answers an event may have: any code of its row but those the protocol says itself.
CODES: dict[str, list[int]] = {
    verb: sorted((RFC821[verb] | ADDED[verb]) - {421, 500, 501, 502, 504})
    for verb in ("MAIL", "RCPT", ".", "VRFY", "EXPN")
}


def answer_from(choices: Iterator[int], text: str = "so it is") -> Callable[[object], Reply]:
    """Answers that a transaction might give: any code of the event's own row."""

    def answer(event: object) -> Reply:
        verb = {Opening: "MAIL", EndOfData: "."}.get(type(event), "RCPT")
        if isinstance(event, Verifying):
            verb = "EXPN" if event.is_list else "VRFY"
        code = CODES[verb][next(choices) % len(CODES[verb])]
        return Reply(code, f"{code // 100}.0.0", text)

    return answer


class Record:
    """What a protocol did: the octets it said, the texts it took, whether it closed."""

    def __init__(self, *, is_lmtp: bool = False, has_tls: bool = True) -> None:
        self._is_lmtp = is_lmtp
        self._has_tls = has_tls
        self._accepted = 0
        self.said = b""
        self.texts: list[bytes] = []
        self.opened: list[Opening] = []
        self.addressed: list[Addressing] = []
        self.is_closed = False
        self._text = b""

    @property
    def codes(self) -> list[int]:
        return [int(line[:3]) for line in self.said.splitlines() if line[3:4] == b" "]

    def take(self, protocol: Protocol, answer: Callable[[object], Reply]) -> None:
        """Work through every event that is there."""
        while not self.is_closed:
            event = protocol.next_event()
            match event:
                case NeedOctets():
                    return
                case Text():
                    self._text += event.octets
                case Say():
                    self.said += event.reply.render()
                    if isinstance(event, Dropped):
                        self._text = b""
                    self.is_closed = isinstance(event, Closing)
                case StartingTls() | NamingClient() | Turning():
                    self._begin_anew(protocol, event)
                case Opening() | Addressing() | EndOfData() | Verifying() | AskingWho():
                    self._ask(protocol, event, answer)

    def _begin_anew(self, protocol: Protocol, event: object) -> None:
        """TLS begins here; with XCLIENT another session does, with TURN another role."""
        if isinstance(event, StartingTls) and not self._has_tls:
            self.said += replies.NO_TLS_NOW.render()
            protocol.settle(False)
            return
        self.is_closed = isinstance(event, NamingClient | Turning)
        is_turned = isinstance(event, Turning)
        self.said += (replies.TURNED if is_turned else replies.READY_FOR_TLS).render()
        self._text = b""
        protocol.settle(not self.is_closed)

    def _ask(self, protocol: Protocol, event: object, answer: Callable[[object], Reply]) -> None:
        due = 1
        if isinstance(event, Opening):
            self.opened.append(event)
        elif isinstance(event, Addressing):
            self.addressed.append(event)
        elif isinstance(event, EndOfData):
            self.texts.append(self._text)
            self._text = b""
            due = self._accepted if self._is_lmtp else 1
        said = [answer(event) for _ in range(due)]
        self.said += b"".join(reply.render() for reply in said)
        self._count(event, said[-1].is_accepted)
        protocol.settle(said[-1].is_accepted)

    def _count(self, event: object, is_accepted: bool) -> None:
        if is_accepted and isinstance(event, Opening):
            self._accepted = 0
        elif is_accepted and isinstance(event, Addressing):
            self._accepted += 1


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    """`octets` in pieces, cut at `places` wherever those are."""
    at = sorted({0, len(octets), *(place % (len(octets) + 1) for place in places)})
    return [octets[a:b] for a, b in itertools.pairwise(at)]


def converse(
    pieces: list[bytes],
    protocol: Protocol | None = None,
    answer: Callable[[object], Reply] = accept_everything,
    *,
    is_lmtp: bool = False,
    has_tls: bool = True,
) -> Record:
    """Feed the pieces one by one and return the record.

    With `is_lmtp` the end of data is answered for each recipient; without `has_tls` there is no
    certificate just now.
    """
    protocol = protocol or make_protocol()
    record = Record(is_lmtp=is_lmtp, has_tls=has_tls)
    for piece in pieces:
        protocol.feed(piece)
        record.take(protocol, answer)
    return record
