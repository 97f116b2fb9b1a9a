"""`mda explain`: the way that a message for an address would go, delivering nothing."""

from __future__ import annotations

import grp
import os
import stat

import click

from mda import broker
from mda.answers import Answers
from mda.config import CONFIG_FILE, Config, ConfigError, load, mailbox_mode_for
from mda.delivery import lock, mbox
from mda.model import Outcome
from mda.receiver.domains import Domains
from mda.receiver.peer import local_peer
from mda.receiver.replies import RELAYING_DENIED, to_outcome
from mda.receiver.submission import forward_path
from mda.recipients.expand import expand
from mda.terminal.consent import FILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.model import Account, Target


_MOST_NAMED = 5  # senders of a user's rules


@click.command("explain")
@click.argument("address")
@click.option("--handed-over", is_flag=True, help="As if an MTA had handed the message over.")
@click.option("--config", "config_file", default=CONFIG_FILE, metavar="FILE")
def command(address: str, handed_over: bool, config_file: str) -> None:
    """Say step by step which way a message for ADDRESS would go, delivering nothing.

    A plain user learns this of the own address only.
    """
    try:
        config = load(config_file)
        identities = broker.Identities(config)
    except (ConfigError, broker.SetupError) as error:
        raise click.ClickException(str(error)) from error
    peer = local_peer(os.geteuid(), config)
    answers = Answers(config, peer, identities)
    for line in explain(answers, config, address, is_handed_over=handed_over):
        click.echo(line)


def explain(
    answers: Answers, config: Config, address: str, *, is_handed_over: bool
) -> Iterator[str]:
    """The lines that `mda explain` prints."""
    path = forward_path(address)
    domain = path.domain.decode("utf-8", "replace")
    yield address
    if not Domains(config, takes_any=is_handed_over).is_ours(path.domain):
        yield f"  {domain} is no domain of this host (receiver.local_domains)"
        is_sent = config.outbound.via != "nothing"
        if is_sent:
            yield "  for users of this host, and receiver.relay_networks, it goes on by the queue"
        yield f"{'Others' if is_sent else 'RCPT'} would be told {tell(to_outcome(RELAYING_DENIED))}"
        return
    yield f"  {domain or 'no domain'}: the mailbox is on this host"
    trace: list[str] = []
    is_final = is_handed_over and config.recipients.mta_expands
    targets = expand(
        answers.host, path.local_part, "MAIL", is_final=lambda _: is_final, trace=trace
    )
    yield from (f"  {line}" for line in trace)
    for target in targets:
        yield from describe(answers, config, target)
    yield f"RCPT would be told {tell(answers.judge(targets))}"


def tell(outcome: Outcome) -> str:
    """An outcome as a client reads it."""
    return f"{outcome.code} {outcome.enhanced} {outcome.text}"


def describe(answers: Answers, config: Config, target: Target) -> Iterator[str]:
    """The lines about one target: where it is, and what would be in the way."""
    account = target.account
    if target.kind == "remote":
        yield f"to {lock.printable(target.place)}, by the queue"
    if account is None:
        return  # the trace has said what cannot be followed
    place = lock.printable(target.place)
    match target.kind:
        case "nothing":
            yield "to nowhere (/dev/null)"
        case "command":
            yield f"to the command {place!r}, run as {account.user}"
        case "file":
            yield f"to the file {place}, written as {account.user}"
            yield from describe_place(answers, config, target, account)
        case _:
            yield f"to the mailbox {place} of {account.user}"
            yield from describe_place(answers, config, target, account)
            yield from describe_terminals(answers, target, account)


def describe_place(
    answers: Answers, config: Config, target: Target, account: Account
) -> Iterator[str]:
    """A mailbox or a file: who owns it, who has locked it, how full it is."""
    is_mailbox = target.kind == "mailbox"
    ids = answers.identities
    enter = ids.as_recipient if is_mailbox else ids.as_user
    place = target.place.rstrip("/")
    is_maildir = place != target.place
    try:
        with enter(account):
            status = os.stat(place, follow_symlinks=is_maildir)
            locks = "none, as a Maildir needs none" if is_maildir else lock.describe(place)
    except FileNotFoundError:
        mode = 0o700 if is_maildir else mailbox_mode_for(config) if is_mailbox else 0o600
        yield f"  not there yet: would be created with {mode:04o} for {account.user}"
        return
    except OSError as error:
        yield f"  cannot be looked at: {error.strerror}"
        return
    yield f"  {describe_status(status)}"
    yield f"  locks: {locks}"
    refusal = None if is_maildir else mbox.refuse(place, status, account.uid)
    full = answers.copies.judge_quota(target, 1)
    if refusal or full:
        yield f"  a message would be told {tell(refusal or full or Outcome(250, '', ''))}"


def describe_terminals(answers: Answers, target: Target, account: Account) -> Iterator[str]:
    """What a SEND would meet: the person's terminals, and the answer at RCPT."""
    for row in answers.terminals.list_logins()[1]:
        user, device, idle, takes = os.fsdecode(row).rsplit(" ", 3)
        if user == account.user:
            consent = "takes messages" if takes == "y" else "takes none (mesg n, or a rule)"
            yield f"  terminal {device}: idle for {idle} s, {consent}"
    yield f"  {describe_rules(answers, account)}"
    outcome, width = answers.terminals.probe(target, b"")
    columns = f", {width} columns" if width else ""
    yield f"  SEND would be told {tell(outcome)}{columns}"


def describe_rules(answers: Answers, account: Account) -> str:
    """What the user's own rules say about who may write."""
    try:
        rules = answers.terminals.read_rules(account)
    except OSError as error:
        return f"rules of the user's: cannot be read: {error.strerror}"
    if rules.fault:
        return f"rules of the user's: {FILE} {rules.fault}, so nobody may write"
    named = [f"{'allow' if let else 'deny'} {who}" for who, let in sorted(rules.senders.items())]
    more = [f"and {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    everybody = f"messages {'y' if rules.switches['messages'] else 'n'}"
    return f"rules of the user's: {', '.join([everybody, *named[:_MOST_NAMED], *more])}"


def describe_status(status: os.stat_result) -> str:
    """Owner, group, permissions and size."""
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = f"gid {status.st_gid}"
    owner, mode = mbox.user_name(status.st_uid), stat.filemode(status.st_mode)
    return f"{mode} {owner} {group}, {status.st_size} bytes"
