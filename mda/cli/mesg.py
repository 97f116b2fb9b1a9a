"""`mda mesg`: a user's own say over who may write on the user's terminals."""

from __future__ import annotations

import grp
import os
import pwd
import stat

import click

from mda.cli import handover, paint
from mda.cli.handover import Refused
from mda.cli.person import host_config, own_account
from mda.cli.whole import write_whole
from mda.receiver.grammar import spell_path
from mda.terminal import consent
from mda.terminal.consent import SWITCHES, Rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_GROUP_WRITE = stat.S_IWGRP
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@click.group("mesg", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Say who may write on your terminals; alone, show what you have said."""
    if context.invoked_subcommand is None:
        show()


@command.command("y")
def yes() -> None:
    """Take messages: as a rule, and on this terminal."""
    change(lambda rules: rules.switches.update(messages=True))
    set_terminal(takes=True)


@command.command("n")
def no() -> None:
    """Take none: as a rule, and on this terminal."""
    change(lambda rules: rules.switches.update(messages=False))
    set_terminal(takes=False)


@command.command("allow")
@click.argument("sender")
def allow(sender: str) -> None:
    """Take messages from SENDER: a login name, an address, *@DOMAIN, *@* or *."""
    name_sender(sender, is_let=True)


@command.command("deny")
@click.argument("sender")
def deny(sender: str) -> None:
    """Take none from SENDER."""
    name_sender(sender, is_let=False)


@command.command("forget")
@click.argument("sender")
def forget(sender: str) -> None:
    """Take back an allow or deny of SENDER."""

    def remove(rules: Rules) -> None:
        if rules.senders.pop(consent.normalize(sender), None) is None:
            raise click.ClickException(f"there is no rule about {sender}")

    change(remove)


def make_switch(name: str, help_text: str) -> click.Command:
    """The command that sets one of the rules that are yes or no."""

    @click.command(name, help=help_text)
    @click.argument("answer", type=click.Choice(["y", "n"]))
    def switch(answer: str) -> None:
        change(lambda rules: rules.switches.update({name: answer == "y"}))

    return switch


for _name, _help in (
    ("reason", "Whether who is refused learns why: not logged in, or not accepting."),
    ("bell", "Whether a message may ring the bell, once."),
    ("utf8", "Whether your terminals show more than ASCII; n puts ? for the rest."),
    ("keep", "Whether what you were shown is kept for `mda messages`."),
):
    command.add_command(make_switch(_name, _help))


@command.command("show")
def show_command() -> None:
    """Show your rules, your terminals, and what would happen to a message."""
    show()


# -- the rules ------------------------------------------------------------------------


def name_sender(sender: str, *, is_let: bool) -> None:
    """A rule about one sender, in the place of an older one about the same."""
    if not sender.isprintable() or len(sender.split()) != 1:
        raise click.UsageError(f"{sender!r} is no sender")
    change(lambda rules: rules.senders.update({consent.normalize(sender): is_let}))


def change(edit: Callable[[Rules], None]) -> None:
    """Read the rules, edit them, and write them back whole."""
    account = own_account()
    rules = consent.read_rules(account.pw_dir, account.pw_uid)
    path = os.path.join(account.pw_dir, consent.FILE)
    if rules.fault:
        raise click.ClickException(f"{path} {rules.fault}; mend or remove it first")
    edit(rules)
    if len(rules.senders) > consent.MOST_SENDERS:
        raise click.ClickException(f"more than {consent.MOST_SENDERS} senders")
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        write_whole(path, consent.format_rules(rules), 0o600)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error


# -- the terminal ---------------------------------------------------------------------


def own_terminal() -> int:
    """The descriptor of the terminal that this runs on, -1 if it runs on none."""
    return next((fd for fd in (0, 1, 2) if os.isatty(fd)), -1)


def set_terminal(*, takes: bool) -> None:
    """Set this terminal's own bit, as mesg(1) does, and say what came of it."""
    fd = own_terminal()
    if fd == -1:
        click.echo("This runs on no terminal: only the rule is set.", err=True)
        return
    mode = os.fstat(fd).st_mode
    mode = mode | _GROUP_WRITE if takes else mode & ~_OTHERS_WRITE
    try:
        os.fchmod(fd, stat.S_IMODE(mode))
    except OSError as error:
        click.echo(f"{os.ttyname(fd)}: {error.strerror}: only the rule is set.", err=True)
        return
    described = describe_bit(os.ttyname(fd))
    if takes and described != "y":
        click.echo(f"{os.ttyname(fd)}: {described}", err=True)


def describe_bit(device: str) -> str:
    """What a terminal says of itself: y, n, or why it takes no messages though it is on."""
    try:
        status = os.stat(device)
        name = host_config().terminal.group
        group = grp.getgrnam(name).gr_gid
    except (OSError, KeyError):
        return "cannot be told"
    if not status.st_mode & _GROUP_WRITE:
        return "n"
    return "y" if status.st_gid == group else f"n (its group is not {name})"


# -- what holds now -------------------------------------------------------------------


def show() -> None:
    """Print the rules, the terminals, and what a message would meet."""
    account = own_account()
    show_rules(account)
    show_terminals(account.pw_name)
    path = spell_path(account.pw_name)
    try:
        with handover.Client() as client:
            (outcome,) = client.ask("SEND", path, [path])
    except Refused as refused:
        outcome = refused.outcome
    text = outcome.text.removeprefix(f"<{path}> ")
    answer = paint(text, "green" if outcome.is_done else "red")
    click.echo(f"A message to you from yourself would be told: {answer}")


def show_rules(account: pwd.struct_passwd) -> None:
    """Print the rules, or what is wrong with their file."""
    path = os.path.join(account.pw_dir, consent.FILE)
    rules = consent.read_rules(account.pw_dir, account.pw_uid)
    if rules.fault:
        fault = paint(f"{path} {rules.fault}", "red")
        click.echo(f"{fault}: nobody can write to you until that is mended")
        return
    switches = (f"{name} {'y' if rules.switches[name] else 'n'}" for name in SWITCHES)
    click.echo(f"Rules: {', '.join(switches)}")
    for sender, is_let in sorted(rules.senders.items()):
        click.echo(f"  {'allow' if is_let else 'deny'} {sender}")


def show_terminals(user: str) -> None:
    """Print what each of the user's terminals says of itself."""
    fd = own_terminal()
    here = os.ttyname(fd) if fd != -1 else ""
    try:
        found = {row[1] for row in handover.list_logins() if row[0] == user}
    except Refused:
        found = set()
    for device in sorted(found | ({here} - {""})):
        place = " (this one)" if device == here else ""
        click.echo(f"Terminal {device.removeprefix('/dev/')}{place}: {describe_bit(device)}")
