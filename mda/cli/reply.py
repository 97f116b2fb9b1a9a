"""`mda reply`: an answer to whoever wrote to your terminals last."""

from __future__ import annotations

import click

from mda.cli.messages import read_entries
from mda.cli.send import deliver_text, verb_options


@click.command("reply")
@verb_options
@click.argument("words", nargs=-1, metavar="[TEXT]...")
def command(verb: str | None, subject: str, words: tuple[str, ...]) -> None:
    """Answer the last sender, with TEXT or with what is typed.

    Whoever was not verified may have claimed an address that is somebody else's; it is
    named before anything is sent.
    """
    entries = read_entries()
    if not entries:
        raise click.ClickException("nobody's message is kept; see `mda mesg show`")
    last = entries[-1]
    if not last.sender:
        raise click.ClickException("the last message has no sender to answer")
    if not last.is_verified:
        click.echo(f"To {last.sender}, who was not verified.", err=True)
    text = " ".join(words) + "\n" if words else None
    raise SystemExit(deliver_text(verb, subject, [last.sender], text))
