"""`mda messages`: what your terminals were shown, read back."""

from __future__ import annotations

import os
import time

import click

from mda.cli import paint
from mda.cli.person import own_account
from mda.terminal import record
from mda.terminal.tty import is_safe_block

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.terminal.record import Entry


@click.command("messages")
@click.argument("count", default=10, type=click.IntRange(min=1), metavar="[N]")
def command(count: int) -> None:
    """Show the last N messages that came to your terminals, 10 if not given."""
    entries = read_entries()[-count:]
    if not entries:
        click.echo("Nothing is kept.", err=True)
    last = ""
    for entry in entries:
        moment = time.strftime("%a %d %b %Y %H:%M", time.localtime(entry.when))
        if moment != last:
            click.echo(paint(moment, "cyan"))
        last = moment
        click.echo(spell_block(entry.block))


def read_entries() -> list[Entry]:
    """What is kept for whoever runs this, the oldest first."""
    home = own_account().pw_dir
    try:
        return record.read(home)
    except OSError as error:
        path = os.path.join(home, record.FILE)
        raise click.ClickException(f"{path}: {error.strerror}") from error


def spell_block(block: bytes) -> str:
    """The rows of a block as lines, without its bell; the file may have been written to."""
    if not is_safe_block(block):
        return "(something that no terminal was shown)"
    return block.decode("utf-8").replace("\a", "").replace("\r\n", "\n").strip("\n")
