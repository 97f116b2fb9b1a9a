"""`mda deliver`: the delivery command of an MTA, one message on standard input.

Only 0, 65, 67, 75 and 77 leave it, since an MTA bounces mail for any other status
(design, decision 12).
"""

from __future__ import annotations

import os
import pwd
import re
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
_FROM_LINE = 1000  # a longer first line is none
# `From sender Www Mmm dd hh:mm:ss yyyy`, maybe with a zone: a sentence does not end so.
_FROM_LINE_PATTERN = re.compile(
    rb"\AFrom [^\n]* [A-Z][a-z]{2} +[A-Z][a-z]{2} +\d{1,2} +\d\d:\d\d(:\d\d)?"
    rb"( +[A-Z]{3,4}| +[+-]\d{4})? +\d{4}( +[+-]\d{4})?\r?\n"
)
_ATOM_MARKS = "!#$%&'*+-/=?^_`{|}~"
# What the recipient's own name may be the fault of (RFC 3463 3.2); the rest of 5.1 is not.
_BAD_RECIPIENT = ("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10")


@click.command("deliver")
@click.option("-f", "sender", default="", metavar="SENDER", help="Reverse-path; empty for none.")
@click.option("-d", "users", multiple=True, metavar="USER", help="Recipient; again for more.")
@click.option(
    "-a",
    "extension",
    default="",
    metavar="EXTENSION",
    help="As in USER+EXTENSION; the mail goes to USER.",
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
    del extension  # a name for a place of one's own in a mailbox; there is one place
    log.open_log(may_use_stderr=False)
    try:
        status = deliver(sender, list(users), VERBS[verb], config_file)
    except KeyboardInterrupt:
        status = give_up("interrupted")
    except Exception as error:  # noqa: BLE001 (the outermost: nothing here may bounce)
        log.write_traceback("deliver")
        status = give_up(str(error))
    raise SystemExit(status)


def give_up(why: str) -> int:
    """Say on one line why the MTA should try again."""
    sys.stderr.write(f"4.3.0 mda deliver: {why}\n")
    return TEMPORARY_FAILURE


def deliver(sender: str, users: list[str], verb: Verb, config_file: str) -> int:
    """Deliver as root by our own broker, as anybody else by the daemon's."""
    users = users or [pwd.getpwuid(os.getuid()).pw_name]
    sender = sender.strip().removeprefix("<").removesuffix(">")
    if sender == "MAILER-DAEMON":
        sender = ""
    if os.geteuid() == 0:
        return deliver_as_root(sender, users, verb, config_file)
    return hand_over(sender, users, verb)


def hand_over(sender: str, users: list[str], verb: Verb) -> int:
    """Give the message to the LMTP socket (decision 2): a user cannot write the spool."""
    recipients = [quote_local_part(user) for user in users]
    try:
        client = handover.Client()
        try:
            outcomes = client.deliver(verb, speakable(sender), recipients, read_message())
        finally:
            client.close()
    except handover.Refused as refused:
        outcomes = [refused.outcome] * len(users)
    return report(users, outcomes)


def speakable(sender: str) -> str:
    """The reverse-path as MAIL FROM takes it: the MTA that calls has judged it already."""
    text = "".join(c if " " <= c <= "~" else "?" for c in sender)[:1000]
    return quote_local_part(text) if text and not text.startswith("@") else text


def quote_local_part(address: str) -> str:
    """`address` as the mailbox of a path: the local part in quotes where it needs them.

    RFC 821 4.1.2; a local part that has its quotes already keeps them.
    """
    local_part, at, domain = address.rpartition("@") if "@" in address else (address, "", "")
    parts = local_part.split(".")
    if all(part and all(c.isalnum() or c in _ATOM_MARKS for c in part) for part in parts):
        return address
    if len(local_part) > 1 and local_part[0] == local_part[-1] == '"':
        return address
    escaped = local_part.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"{at}{domain}'


def read_message() -> Iterator[bytes]:
    """Standard input in blocks to its end, without an mbox From_ line at its beginning."""
    first = b""
    while b"\n" not in first and b"From ".startswith(first[:5]) and len(first) < _FROM_LINE:
        block = os.read(0, _BLOCK)
        if not block:
            break
        first += block
    yield _FROM_LINE_PATTERN.sub(b"", first, count=1)
    while block := os.read(0, _BLOCK):
        yield block


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
    if outcome.enhanced in _BAD_RECIPIENT:
        return NO_USER
    if outcome.enhanced.startswith(("5.2.", "5.7.")):
        return NO_PERMISSION
    return DATA_ERROR
