"""From the client's octets to the text's stored form: MB/s, and the share of each stage.

    python -m tests.bench.stream        or: python tests/bench/stream.py [ROUNDS]

One process, with every policy on. The octets come by read(2), 64 KiB at a time as in
session.py, from a file in memory, so that no client's own speed counts. Seconds are those
of the processor, since nothing here waits for anything. Each round takes every text into
memory and onto disk in turn, so that a noisy machine spoils all alike; the medians are the
figures. A MB is a million octets as the client sends them.
"""

from __future__ import annotations

import cProfile
import itertools
import os
import pstats
import statistics
import sys
import tempfile
import time

from mda.config import Config
from mda.model import Copy, Outcome, Peer
from mda.receiver import session
from mda.receiver.domains import Domains
from mda.receiver.protocol import (
    Addressing,
    EndOfData,
    NeedOctets,
    Opening,
    Protocol,
    Text,
)
from mda.receiver.transaction import Transaction
from mda.wire import Broker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.model import Verb

GOAL = 150
SIZE = 32_000_000
HEADER = b"Received: from a by b\r\nReturn-Path: <x@y>\r\nSubject: figures\r\n\r\n"
# Lines with their CRLF: 72 octets; 10 octets, some with a dot, some From_ lines; 900
# octets; and the worst for quoting, every line a From_ line.
TYPICAL = [b"Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam non.\r\n"]
PLAIN = [b"as it is\r\n", b"and more\r\n", b"and more\r\n"]
SHORT = [
    *[*PLAIN, b"..dotted\r\n", *PLAIN, b"From me \r\n"],
    *[*PLAIN, b"..dotted\r\n", *PLAIN, *PLAIN[:1]],
]
LONG = [
    ("Zwölf Boxkämpfer jagen Viktor quer über den großen Deich. " * 15).encode()[:898] + b"\r\n"
]
FROM = [b"From me \r\n", b">From us\r\n"]
TEXTS = {"typical lines": TYPICAL, "short lines": SHORT, "long lines": LONG, "From_ lines": FROM}
# What one read of 64 KiB goes through, as the profile names it.
STAGES = {
    "read": ("read_piece",),
    "end, dots, CRLF": ("feed:dotstream.py",),
    "line length": ("_measure_lines",),
    "header": ("feed:headers.py",),
    "quoting": ("feed:quoting.py",),
    "write": ("write_all",),
}


class Store(Broker):
    """The broker's side: everybody has a mailbox, the spool is a file in `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def resolve(
        self, verb: Verb, local_part: bytes, size: int, **_: object
    ) -> tuple[Outcome, list[Copy]]:
        return Outcome(250, "2.1.5", "OK"), [Copy(0, "q", local_part, b"")]

    def offer_text(self, form: str, fd: int, size: int) -> None:
        pass

    def open_spool(self, form: str) -> tuple[Outcome, int]:
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        return Outcome(250, "2.0.0", "Spool"), os.open(self._directory, flags, 0o600)

    def deliver(self, *_: object, **__: object) -> Outcome:
        return Outcome(250, "2.0.0", "Delivered to mailbox")


def make_session(lines: list[bytes]) -> bytes:
    """A whole session with one message of SIZE octets made of `lines`, over and over."""
    cycle = b"".join(lines)
    envelope = b"HELO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\nDATA\r\n"
    return envelope + HEADER + cycle * (SIZE // len(cycle)) + b".\r\n"


def read_piece(fd: int) -> bytes:
    """What session.py would read at once."""
    return os.read(fd, session._READ)


def take(fd: int, memory: int) -> float:
    """Seconds to bring the session that `fd` holds to the end of its data."""
    config = Config().with_values(
        "receiver", bare_newlines="reject", text_line=1_000_000, received_lines=100
    )
    config = config.with_values("delivery", memory=memory)
    protocol = Protocol(
        "mda.test",
        config.receiver,
        is_lmtp=False,
        offers_terminals=True,
        offers_names=True,
        offers_who=False,
    )
    domains = Domains(config, takes_any=True)
    store = Store(tempfile.gettempdir())
    transaction = Transaction(store, config, Peer("unix", "bench"), domains, is_lmtp=False)
    os.lseek(fd, 0, os.SEEK_SET)
    began = time.process_time()
    while not obey(protocol, transaction, fd):
        pass
    taken = time.process_time() - began
    transaction.drop()
    return taken


def obey(protocol: Protocol, transaction: Transaction, fd: int) -> bool:
    """Do one event of the session; true at the end of data."""
    event = protocol.next_event()
    match event:
        case NeedOctets():
            protocol.feed(read_piece(fd))
        case Text():
            transaction.write(event.octets)
        case EndOfData():
            (_, outcome), *_ = transaction.finish(event.fault)
            if not outcome.is_done:
                raise SystemExit(f"not taken: {outcome.text}")
            return True
        case Opening():
            protocol.settle(transaction.open(event.verb, event.path).is_accepted)
        case Addressing():
            protocol.settle(transaction.address(event.path).is_accepted)
    return False


def profile(fd: int, memory: int) -> dict[str, float]:
    """The share of each stage; "rest" is the protocol, the store and the loop above."""
    profiler = cProfile.Profile(builtins=False)
    profiler.runcall(take, fd, memory)
    stats = pstats.Stats(profiler)
    seconds: dict[str, float] = {}
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for key in (name, f"{name}:{os.path.basename(file)}"):
            seconds[key] = seconds.get(key, 0.0) + cumulative
    whole = seconds["take"]
    shares = {
        stage: sum(seconds.get(name, 0.0) for name in names) / whole
        for stage, names in STAGES.items()
    }
    return {**shares, "rest": 1 - sum(shares.values())}


def open_session(lines: list[bytes]) -> int:
    """A descriptor of the session with these lines, in memory."""
    fd = os.memfd_create("bench")
    with open(fd, "wb", closefd=False) as file:
        file.write(make_session(lines))
    return fd


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    fds = {name: open_session(lines) for name, lines in TEXTS.items()}
    stores = {"memory": 2 * SIZE, "disk": Config().delivery.memory}
    cases = list(itertools.product(fds, stores))
    taken: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for name, store in cases:
            taken[name, store].append(take(fds[name], stores[store]))
    print(f"median of {rounds} runs (goal: {GOAL} MB/s or more)")
    for (name, store), seconds in taken.items():
        rate = SIZE / statistics.median(seconds) / 1e6
        shares = profile(fds[name], stores[store])
        print(f"{name:14} to {store:6} {rate:4.0f} MB/s ", end="")
        print(", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()))


if __name__ == "__main__":
    main()
