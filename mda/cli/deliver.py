"""`mda deliver`: the delivery command of an MTA, one message on standard input.

Only 0, 65, 67, 75 and 77 leave it, since an MTA bounces mail for any other status
(design, decision 12).
"""

from __future__ import annotations

import os
import pwd
import re

import click

from mda import broker, log
from mda.cli import TEMPORARY_FAILURE, complain, give_up, keep_from_bouncing
from mda.config import CONFIG_FILE, Config, ConfigError, load
from mda.receiver.peer import local_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mda.model import Outcome, Peer, Verb
    from mda.wire import Broker

VERBS: dict[str, Verb] = {"mail": "MAIL", "send": "SEND", "soml": "SOML", "saml": "SAML"}

DELIVERED = 0
DATA_ERROR = 65
NO_USER = 67
NO_PERMISSION = 77
_STATUSES = (DELIVERED, DATA_ERROR, NO_USER, TEMPORARY_FAILURE, NO_PERMISSION)

_BLOCK = 64 * 1024
_LONGEST_SENDER = 1000  # octets: a command line holds that, even quoted
_FROM_LINE = 1000  # a longer first line is none
# `From sender Www Mmm dd hh:mm:ss yyyy`, maybe with a zone: a sentence does not end so.
_FROM_LINE_PATTERN = re.compile(
    rb"\AFrom [^\n]* [A-Z][a-z]{2} +[A-Z][a-z]{2} +\d{1,2} +\d\d:\d\d(:\d\d)?"
    rb"( +[A-Z]{3,4}| +[+-]\d{4})? +\d{4}( +[+-]\d{4})?\r?\n"
)
# What the recipient's own name may be the fault of (RFC 3463 3.2); the rest of 5.1 is not.
_BAD_RECIPIENT = ("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10")


@click.command("deliver")
@click.option("-f", "sender", default="", metavar="SENDER", help="Reverse-path; empty for none.")
@click.option("-d", "users", multiple=True, metavar="USER", help="Recipient; again for more.")
@click.option(
    "-a", "extension", default="", metavar="EXTENSION", help="As if every USER were USER+EXTENSION."
)
@click.option(
    "-o",
    "verb",
    type=click.Choice(list(VERBS)),
    default="mail",
    help="Mailbox, terminal, terminal or mailbox, terminal and mailbox.",
)
@click.option("--config", "config_file", default=CONFIG_FILE, metavar="FILE")
def command(
    sender: str, users: tuple[str, ...], extension: str, verb: str, config_file: str
) -> None:
    """Deliver the message on standard input to local users (yourself, without -d)."""
    log.open_log(may_use_stderr=False)
    raise SystemExit(
        keep_from_bouncing(
            lambda: deliver(sender, list(users), extension, VERBS[verb], config_file)
        )
    )


def deliver(sender: str, users: list[str], extension: str, verb: Verb, config_file: str) -> int:
    """Deliver as root by our own broker, as anybody else by the daemon's."""
    users = users or [pwd.getpwuid(os.getuid()).pw_name]
    sender = sender.strip()
    if sender.startswith("<") and sender.endswith(">"):
        sender = sender[1:-1]
    if sender == "MAILER-DAEMON":
        sender = ""
    if os.geteuid() == 0:
        config = load_or_defer(config_file)
        users = [extend(user, extension, config) for user in users]
        return deliver_as_root(sender, users, verb, config)
    if extension:
        users = [extend(user, extension, load_or_defer(config_file)) for user in users]
    return hand_over(sender, users, verb)


def load_or_defer(config_file: str) -> Config:
    """The configuration; a broken one is an error that defers the message."""
    try:
        return load(config_file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def extend(user: str, extension: str, config: Config) -> str:
    """The address of `user` with an extension, where this host has extensions."""
    separator = config.recipients.extension_separator
    if not extension or not separator:
        return user
    local_part, at, domain = user.rpartition("@") if "@" in user else (user, "", "")
    return f"{local_part}{separator}{extension}{at}{domain}"


def hand_over(sender: str, users: list[str], verb: Verb) -> int:
    """Give the message to the LMTP socket (decision 2): a user cannot write the spool."""
    # Both parse, and so are nothing for root, who is a broker.
    from mda.cli import handover
    from mda.receiver.grammar import clean_path, spell_path

    # The MTA that calls has judged the sender; what no command can carry becomes "?".
    reverse_path = spell_path(clean_path(sender, _LONGEST_SENDER))
    forward_paths = [spell_path(user) for user in users]
    try:
        with handover.Client() as client:
            outcomes = client.deliver(verb, reverse_path, forward_paths, read_message())
    except handover.Refused as refused:
        outcomes = [refused.outcome] * len(users)
    return report(users, outcomes)


class NoMessage(click.ClickException):
    """Standard input cannot be read, or not to its end: foreseen, and nothing to trace."""


def read_message() -> Iterator[bytes]:
    """Standard input in blocks to its end, without an mbox From_ line at its beginning.

    Raises NoMessage.
    """
    first = b""
    while b"\n" not in first and b"From ".startswith(first[:5]) and len(first) < _FROM_LINE:
        block = _read_block()
        if not block:
            break
        first += block
    yield _FROM_LINE_PATTERN.sub(b"", first, count=1)
    while block := _read_block():
        yield block


def _read_block() -> bytes:
    try:
        return os.read(0, _BLOCK)
    except OSError as error:
        raise NoMessage(f"no message on standard input: {error.strerror}") from error


def deliver_as_root(sender: str, users: list[str], verb: Verb, config: Config) -> int:
    """Split as `receive` does; the session process reads the message from our input."""
    try:
        peer = local_peer(os.getuid(), config)
        status, _ = broker.split(
            config, peer, lambda: load_session(config, peer, sender, users, verb)
        )
    except broker.SetupError as error:
        raise click.ClickException(str(error)) from error
    if status not in _STATUSES:
        return give_up("4.3.0", f"the session has ended with {status}")
    return status


def load_session(
    config: Config, peer: Peer, sender: str, users: list[str], verb: Verb
) -> Callable[[Broker], int]:
    """In the session process alone: load the code that parses the message."""
    from mda.receiver.submission import submit

    def run(link: Broker) -> int:
        return report(users, submit(link, config, peer, verb, sender, users, read_message()))

    return lambda link: keep_from_bouncing(lambda: run(link))


def report(users: list[str], outcomes: list[Outcome]) -> int:
    """Say what failed, the enhanced code first, and give the exit status that fits all.

    A temporary failure of one is the status of all: the MTA then tries again, and one
    copy too many is better than one lost.
    """
    for user, outcome in zip(users, outcomes, strict=True):
        if not outcome.is_done:
            complain(f"{outcome.enhanced} <{user}> {outcome.text}")
    failed = [outcome for outcome in outcomes if not outcome.is_done]
    if not failed:
        return DELIVERED
    if any(outcome.is_temporary for outcome in failed):
        return TEMPORARY_FAILURE
    return exit_status(failed[0])


def exit_status(outcome: Outcome) -> int:
    """The exit status of a permanent failure (delivery by Postfix, Exim, OpenSMTPD)."""
    if outcome.enhanced in _BAD_RECIPIENT:
        return NO_USER
    if outcome.enhanced.startswith(("5.2.", "5.7.")):
        return NO_PERMISSION
    return DATA_ERROR
