"""`mda deliver`: the delivery command of an MTA, one message on standard input.

Only 0, 65, 67, 75 and 77 leave it, since an MTA bounces mail for any other status
(design, decision 12).
"""

from __future__ import annotations

import os
import pwd
import sys

import click

from mda import broker, log
from mda.cli import handover
from mda.config import CONFIG_FILE, Config, ConfigError, load
from mda.model import Outcome
from mda.receiver.peer import local_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mda.model import Peer, Verb
    from mda.wire import Broker

VERBS: dict[str, Verb] = {"mail": "MAIL", "send": "SEND", "soml": "SOML", "saml": "SAML"}

DELIVERED = 0
DATA_ERROR = 65
NO_USER = 67
TEMPORARY_FAILURE = 75
NO_PERMISSION = 77

_BLOCK = 64 * 1024


@click.command("deliver")
@click.option("-f", "sender", default="", metavar="SENDER", help="Reverse-path; empty for none.")
@click.option("-d", "users", multiple=True, metavar="USER", help="Recipient; again for more.")
@click.option("-a", "extension", default="", metavar="EXTENSION", help="As in USER+EXTENSION.")
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
    try:
        raise SystemExit(deliver(sender, list(users), extension, VERBS[verb], config_file))
    except Exception as error:
        log.write_traceback("deliver")
        click.echo(f"4.3.0 mda deliver: {error}", err=True)
        raise SystemExit(TEMPORARY_FAILURE) from error


def deliver(sender: str, users: list[str], extension: str, verb: Verb, config_file: str) -> int:
    """Deliver as root by our own broker, as anybody else by the daemon's."""
    users = users or [pwd.getpwuid(os.getuid()).pw_name]
    if extension:
        users = [f"{user}+{extension}" for user in users]
    sender = sender.strip().removeprefix("<").removesuffix(">")
    if sender == "MAILER-DAEMON":
        sender = ""
    if os.geteuid() == 0:
        return deliver_as_root(sender, users, verb, config_file)
    return hand_over(sender, users, verb)


def hand_over(sender: str, users: list[str], verb: Verb) -> int:
    """Give the message to the LMTP socket (decision 2): a user cannot write the spool."""
    try:
        client = handover.Client()
        try:
            recipients = [quote_local_part(user) for user in users]
            return report(users, client.deliver(verb, sender, recipients, read_message()))
        finally:
            client.close()
    except handover.Refused as refused:
        return report(users, [refused.outcome] * len(users))


def quote_local_part(user: str) -> str:
    """`user` as the mailbox of a forward-path (RFC 821 4.1.2)."""
    local_part, at, domain = user.rpartition("@") if "@" in user else (user, "", "")
    if all(character.isalnum() or character in "!#$%&'*+-/=?^_`{|}~." for character in local_part):
        return user
    escaped = local_part.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"{at}{domain}'


def read_message() -> Iterator[bytes]:
    """Standard input in blocks, without an mbox From_ line at its beginning."""
    first = os.read(0, _BLOCK)
    while first.startswith(b"From ") and b"\n" not in first and len(first) < _BLOCK:
        more = os.read(0, _BLOCK)
        if not more:
            break
        first += more
    if first.startswith(b"From "):
        first = first.partition(b"\n")[2]
    while first:
        yield first
        first = os.read(0, _BLOCK)


def deliver_as_root(sender: str, users: list[str], verb: Verb, config_file: str) -> int:
    """Split as `receive` does; the session process reads the message from our input."""
    try:
        config = load(config_file)
    except ConfigError as error:
        return report(users, [Outcome(451, "4.3.5", str(error))] * len(users))
    try:
        peer = local_peer(os.getuid(), config)
        status = broker.split(config, peer, lambda: load_session(config, peer, sender, users, verb))
        return status if status >= 0 else TEMPORARY_FAILURE  # killed by a signal
    except broker.SetupError as error:
        return report(users, [Outcome(451, "4.3.5", str(error))] * len(users))


def load_session(
    config: Config, peer: Peer, sender: str, users: list[str], verb: Verb
) -> Callable[[Broker], int]:
    """In the session process alone: load the code that parses the message."""
    from mda.receiver.submission import submit

    return lambda link: report(
        users, submit(link, config, peer, verb, sender, users, read_message())
    )


def report(users: list[str], outcomes: list[Outcome]) -> int:
    """Say what failed, the enhanced code first, and give the exit status that fits all.

    A temporary failure of one is the status of all: the MTA then tries again, and one
    copy too many is better than one lost.
    """
    for user, outcome in zip(users, outcomes, strict=True):
        if not outcome.is_done:
            sys.stderr.write(f"{outcome.enhanced} <{user}> {outcome.text}\n")
    failed = [outcome for outcome in outcomes if not outcome.is_done]
    if not failed:
        return DELIVERED
    if any(outcome.is_temporary for outcome in failed):
        return TEMPORARY_FAILURE
    return exit_status(failed[0])


def exit_status(outcome: Outcome) -> int:
    """The exit status of a permanent failure (delivery by Postfix, Exim, OpenSMTPD)."""
    if outcome.enhanced.startswith("5.1."):
        return NO_USER
    if outcome.enhanced.startswith(("5.2.", "5.7.")):
        return NO_PERMISSION
    return DATA_ERROR
