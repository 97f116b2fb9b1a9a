"""`mda queue`: what waits for other hosts, or for another try at a mailbox here."""

from __future__ import annotations

import time

import click

from mda import broker, log
from mda.cli import turn
from mda.config import CONFIG_FILE, Config, ConfigError, load, queue_directory
from mda.outbound import queue
from mda.outbound.attempt import spell
from mda.outbound.runner import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.outbound.queue import Addressee, Waiting


@click.group("queue")
@click.option("--config", "config_file", default=CONFIG_FILE, metavar="FILE")
@click.pass_context
def command(context: click.Context, config_file: str) -> None:
    """Look at the queue, or change it; for root, who becomes its owner, the user mda."""
    try:
        config = load(config_file)
        # Who turns a channel is the receiver then, for which root is needed.
        if context.invoked_subcommand != turn.command.name:
            broker.become_spool_user()
    except (ConfigError, broker.SetupError) as error:
        raise click.ClickException(str(error)) from error
    context.obj = config


@command.command("list")
@click.pass_obj
def list_all(config: Config) -> None:
    """One message after the other: its name, and who is still to get it, and why not yet."""
    count = 0
    for folder in queue.FOLDERS:
        for waiting in read_folder(queue_directory(config), folder):
            count += 1
            for line in describe(waiting):
                click.echo(line)
    click.echo(f"{count} message{'' if count == 1 else 's'}")


def read_folder(directory: str, folder: str) -> Iterator[Waiting]:
    """The messages of a folder; one that nobody can read is named on standard error."""
    try:
        for name, _ in queue.list_names(directory, folder):
            try:
                yield queue.Waiting(directory, folder, name)
            except FileNotFoundError:
                continue  # sent in the meantime
            except queue.Unreadable as error:
                click.echo(f"cannot be read: {error}", err=True)
    except OSError as error:
        raise click.ClickException(f"{directory}: {error.strerror}") from error


def describe(waiting: Waiting) -> Iterator[str]:
    """The lines about one message: what it is, and each recipient that is still open."""
    envelope = waiting.envelope
    came = time.strftime("%Y-%m-%d %H:%M", time.localtime(envelope.came))
    state = {"new": "new", "held": "held"}.get(waiting.folder) or describe_due(waiting.due)
    sender = show(envelope.sender)
    yield f"{waiting.name}  {waiting.size} bytes, came {came}, {state}, from <{sender}>"
    for each in envelope.addressees:
        if each.is_open:
            yield f"    <{show(spell(each))}>{describe_outcome(each)}"


def describe_due(due: float) -> str:
    """When the next try is."""
    minutes = max(0, round((due - time.time()) / 60))
    return f"next try in {minutes} min" if minutes else "due"


def describe_outcome(addressee: Addressee) -> str:
    """What the last try was told, if there was one."""
    outcome = addressee.outcome
    return f": {outcome.code} {outcome.enhanced} {outcome.text}" if outcome else ""


def show(path: bytes) -> str:
    """A path as a terminal may have it."""
    text = path.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def find(config: Config, name: str) -> Waiting:
    """The message of that name; raises ClickException."""
    try:
        waiting = queue.find(queue_directory(config), name)
    except queue.Unreadable as error:
        raise click.ClickException(f"cannot be read: {error}") from error
    except OSError as error:
        raise click.ClickException(f"{name}: {error.strerror}") from error
    if waiting is None:
        raise click.ClickException(f"{name}: no such message in the queue")
    return waiting


@command.command("show")
@click.argument("name")
@click.pass_obj
def show_one(config: Config, name: str) -> None:
    """One message: its recipients with what became of each, and its header."""
    waiting = find(config, name)
    for line in describe(waiting):
        click.echo(line)
    for each in waiting.envelope.addressees:
        if not each.is_open:
            click.echo(f"    <{show(spell(each))}>{describe_outcome(each)}")
    click.echo("")
    head = next(iter(waiting.read_text()), b"").split(b"\n\n", 1)[0]
    for line in head.decode("utf-8", "replace").split("\n"):
        click.echo("".join(c if c.isprintable() or c == "\t" else "?" for c in line))


@command.command("run")
@click.option("--now", is_flag=True, help="Try everything, also what is not due yet.")
@click.pass_obj
def run_now(config: Config, now: bool) -> None:
    """Try what is due; waits for another run that is at work."""
    log.open_log(may_use_stderr=True)
    try:
        run(config, is_now=now)
    except OSError as error:
        raise click.ClickException(f"{queue_directory(config)}: {error.strerror}") from error


def move(config: Config, names: tuple[str, ...], folder: str) -> None:
    """Put messages into another folder; raises ClickException at the first that is not there."""
    for name in names:
        waiting = find(config, name)
        try:
            waiting.move(folder)
        except OSError as error:
            raise click.ClickException(f"{name}: {error.strerror}") from error


@command.command("hold")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def hold(config: Config, names: tuple[str, ...]) -> None:
    """Try these messages no more until they are released."""
    move(config, names, "held")


@command.command("release")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def release(config: Config, names: tuple[str, ...]) -> None:
    """Try these messages again, and at once."""
    move(config, names, "new")


@command.command("remove")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def remove(config: Config, names: tuple[str, ...]) -> None:
    """Forget these messages; nobody is told."""
    for name in names:
        waiting = find(config, name)
        try:
            waiting.remove()
        except OSError as error:
            raise click.ClickException(f"{name}: {error.strerror}") from error


command.add_command(turn.command)
