"""From a socket's octets to the stored form, with every policy switched on.

    python tests/bench/stream.py [ROUNDS]

Each round feeds the same text to protocol and text store in reads of 64 KiB, as the
session does: the search for the end, unstuffing, CRLF to LF, bare newlines, the length of
lines, the header's filter, mbox quoting, and the write into memory. Below the sum stand the
stages alone, on the same text, for what takes the time.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.dialogue import make_protocol

from mda.config import Config
from mda.content.headers import HeaderFilter
from mda.content.quoting import Quoter
from mda.model import Outcome
from mda.receiver.dotstream import DotStream
from mda.receiver.protocol import EndOfData, NeedOctets, Text
from mda.receiver.transaction import TextStore

SIZE = 16 << 20  # octets of a text
READ = 64 * 1024
POLICIES: dict[str, Any] = {
    "bare_newlines": "reject",
    "text_line": 1_000_000,
    "message_size": 1 << 30,
}
CONFIG = (
    Config().with_values("receiver", **POLICIES).with_values("delivery", memory=SIZE + (1 << 20))
)
ENVELOPE = b"EHLO x\r\nMAIL FROM:<bob@x>\r\nRCPT TO:<alice>\r\nDATA\r\n"
HEAD = b"Received: by elsewhere\r\nSubject: x\r\n\r\n"


class NoBroker:
    """The text stays in memory, so that no disk is measured."""

    def open_spool(self) -> tuple[Outcome, int]:
        raise AssertionError("the text is too large")


def make_text(lines: list[bytes]) -> bytes:
    """Stuffed lines in a random order, about SIZE octets."""
    choose = random.Random(821)  # noqa: S311 (no secret, and the same in every run)
    block = b"\r\n".join(choose.choices(lines, k=2000)) + b"\r\n"
    stuffed = (b"\r\n" + block).replace(b"\r\n.", b"\r\n..")[2:]
    return HEAD + stuffed * (SIZE // len(stuffed))


TEXTS = {
    "lines of 72": make_text([b"word from " * 7] * 97 + [b".", b"From y", b">From y"]),
    "lines of 10": make_text([b"x" * 10, b"From y", b".", b"", b"0123456789", b">>From z"]),
    "lines of 900, 8-bit": make_text([b"\xe9" * 900, bytes(range(128, 256)) * 7]),
}


def receive(text: bytes) -> None:
    """What the session does with one message."""
    protocol = make_protocol(command_line=2048, **POLICIES)
    store = TextStore(NoBroker(), CONFIG)  # type: ignore[arg-type]
    protocol.feed(ENVELOPE)
    octets = memoryview(text + b".\r\n")
    try:
        while not isinstance(event := protocol.next_event(), EndOfData):
            if isinstance(event, Text):
                store.write(event.octets)
            elif isinstance(event, NeedOctets):
                protocol.feed(bytes(octets[:READ]))
                octets = octets[READ:]
            elif protocol._asking is not None:
                protocol.settle(True)
        store.finish()
        assert event.fault is None
        assert store.error is None
    finally:
        store.close()


def each_read(octets: bytes, take: Callable[[bytes], object]) -> None:
    for at in range(0, len(octets), READ):
        take(octets[at : at + READ])


def measure_lines(octets: bytes) -> None:
    store = TextStore(NoBroker(), CONFIG)  # type: ignore[arg-type]
    each_read(octets, store._measure_lines)
    store.close()


def stages(text: bytes) -> dict[str, Callable[[], None]]:
    stored = text.replace(b"\r\n", b"\n")
    return {
        "end, dots, newlines": lambda: each_read(text, DotStream(minds_newlines=True).feed),
        "the same, newlines kept": lambda: each_read(text, DotStream().feed),
        "length of lines": lambda: measure_lines(stored),
        "header": lambda: each_read(stored, HeaderFilter().feed),
        "quoting": lambda: each_read(stored, Quoter().feed),
    }


def rate(run: Callable[[], None], size: int) -> float:
    """Millions of octets a second, once."""
    begin = time.perf_counter()
    run()
    return size / (time.perf_counter() - begin) / 1e6


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    for name, text in TEXTS.items():
        whole = [rate(lambda text=text: receive(text), len(text)) for _ in range(rounds)]  # type: ignore[misc]
        print(f"{name:24} {statistics.median(whole):7.0f} MB/s  (goal: 150)")
        for stage, run in stages(text).items():
            alone = statistics.median(rate(run, len(text)) for _ in range(rounds))
            print(f"  {stage:22} {alone:7.0f} MB/s")


if __name__ == "__main__":
    main()
