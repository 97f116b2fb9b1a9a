"""One message handed over by a program on this host, in place of a dialogue."""

from __future__ import annotations

from mda.model import Outcome, Path
from mda.receiver import grammar, replies
from mda.receiver.domains import Domains
from mda.receiver.transaction import Transaction
from mda.wire import WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from mda.config import Config
    from mda.model import Peer, Recipient, Verb
    from mda.wire import Broker

_LONGEST = 1000  # octets of an address


def submit(
    broker: Broker,
    config: Config,
    peer: Peer,
    verb: Verb,
    sender: str,
    users: list[str],
    message: Iterable[bytes],
) -> list[Outcome]:
    """Deliver `message` (LF or CRLF line ends) to `users`; an outcome for each in order.

    `peer` is who has called, as read before the split. `sender` is a reverse-path without
    brackets, empty for the null one; it has been judged by the program that calls, so what
    is no path is kept as it is.
    """
    domains = Domains(config, takes_any=True)
    transaction = Transaction(broker, config, peer, domains, is_lmtp=True)
    transaction.helo = "localhost"
    transaction.protocol = "local"
    try:
        opened = transaction.open(verb, reverse_path(sender))
        if not opened.is_accepted:
            return [replies.to_outcome(opened)] * len(users)
        return _run(transaction, users, message)
    except WireError:
        return [Outcome(451, "4.3.0", "Local error")] * len(users)
    finally:
        transaction.drop()


def reverse_path(sender: str) -> Path:
    """The path that `sender` is, or one that only carries its text."""
    spelt = grammar.spell_path(grammar.clean_path(sender, _LONGEST)) if sender else ""
    return grammar.read_path(spelt.encode()) or Path(spelt.encode(), (), spelt.encode(), b"")


def forward_path(user: str) -> Path:
    """The path that `user` is (a login name, or an address), or one that is nobody's."""
    text = user.encode("utf-8", "surrogateescape")[:_LONGEST]
    path = grammar.read_path(grammar.spell_path(user).encode("utf-8", "surrogateescape")[:_LONGEST])
    if path is None or not path.text:
        return Path(text, (), text, b"")
    return Path(text, (), path.local_part, path.domain)


def _run(transaction: Transaction, users: list[str], message: Iterable[bytes]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    accepted: list[int] = []
    for number, user in enumerate(users):
        outcomes.append(replies.to_outcome(transaction.address(forward_path(user))))
        if outcomes[-1].is_done:
            accepted.append(number)
    if not accepted:
        return outcomes
    for octets in unix_lines(message):
        transaction.write(octets)
    results: list[tuple[Recipient, Outcome]] = list(transaction.finish())
    for number, (_, outcome) in zip(accepted, results, strict=True):
        outcomes[number] = outcome
    return outcomes


def unix_lines(message: Iterable[bytes]) -> Iterable[bytes]:
    """The stored form: CRLF becomes LF at any chunking, and the last line ends."""
    held = b""
    last = b""
    for piece in message:
        octets = held + piece
        held = b"\r" if octets.endswith(b"\r") else b""
        octets = octets[: len(octets) - len(held)].replace(b"\r\n", b"\n")
        last = octets[-1:] or last
        yield octets
    if held:
        yield held
    if held or last not in (b"\n", b""):
        yield b"\n"
