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
    EndOfData,
    NeedOctets,
    Opening,
    Protocol,
    Say,
    Text,
    Verifying,
)
from mda.receiver.replies import Reply
from support.sequences import ADDED, RFC821

_VERB_OF: dict[type, str] = {Opening: "MAIL", Addressing: "RCPT", EndOfData: "."}


def make_protocol(
    *,
    is_lmtp: bool = False,
    offers_terminals: bool = True,
    offers_names: bool = True,
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
    )


def accept_everything(event: object) -> Reply:
    return replies.OK


def answer_from(choices: Iterator[int]) -> Callable[[object], Reply]:
    """Answers that a transaction might give: any code of the event's own row."""

    def answer(event: object) -> Reply:
        verb = _VERB_OF.get(type(event), "NOOP")
        if isinstance(event, Verifying):
            verb = "EXPN" if event.is_list else "VRFY"
        codes = sorted((RFC821[verb] | ADDED.get(verb, set())) - {421, 500, 501, 502, 504})
        code = codes[next(choices) % len(codes)]
        return Reply(code, f"{code // 100}.0.0", "so it is")

    return answer


class Record:
    """What a protocol did: the octets it said, the texts it took, whether it closed."""

    def __init__(self) -> None:
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
                    self.is_closed = isinstance(event, Closing)
                case Opening() | Addressing() | EndOfData() | Verifying() | AskingWho():
                    self._ask(protocol, event, answer)

    def _ask(self, protocol: Protocol, event: object, answer: Callable[[object], Reply]) -> None:
        if isinstance(event, Opening):
            self.opened.append(event)
        elif isinstance(event, Addressing):
            self.addressed.append(event)
        elif isinstance(event, EndOfData):
            self.texts.append(self._text)
            self._text = b""
        reply = answer(event)
        self.said += reply.render()
        protocol.settle(reply.is_accepted)


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    """`octets` in pieces, cut at `places` wherever those are."""
    at = sorted({0, len(octets), *(place % (len(octets) + 1) for place in places)})
    return [octets[a:b] for a, b in itertools.pairwise(at)]


def converse(
    pieces: list[bytes],
    protocol: Protocol | None = None,
    answer: Callable[[object], Reply] = accept_everything,
) -> Record:
    """Feed the pieces one by one and return the record."""
    protocol = protocol or make_protocol()
    record = Record()
    for piece in pieces:
        protocol.feed(piece)
        record.take(protocol, answer)
    return record
