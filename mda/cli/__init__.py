"""The commands of `mda`, one file each; a command is loaded when it is named."""

from __future__ import annotations

import importlib
import os
import sys

import click

from mda import __version__

COMMANDS = {
    "receive": "one SMTP or LMTP connection on standard input and output",
    "serve": "the preloaded listener",
    "deliver": "the delivery command of an MTA: one message on standard input",
    "send": "write to people's terminals, or to their mailboxes",
    "who": "who is logged in here, and who takes messages",
    "check": "what is wrong with this host's set-up, and how to mend it",
    "install": "units, system users, directories, man pages and the command",
    "uninstall": "take away what install put there",
}


class Commands(click.Group):
    """A group that imports only the file of the command that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the manual page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load `mda/cli/NAME.py`, whose `command` it is."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"mda.cli.{cmd_name}").command
        assert isinstance(command, click.Command)  # noqa: S101 (narrows for the reader)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without loading them all."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command("mda", cls=Commands)
@click.version_option(__version__, prog_name="mda")
def group() -> None:
    """Deliver mail to local users, and messages to their terminals."""


def hold_standard_descriptors() -> None:
    """Fill the gaps that closed descriptors leave, so that no socket of ours gets there.

    A message cannot be read from a standard input that was closed: it is no empty one.
    """
    while (fd := os.open(os.devnull, os.O_WRONLY)) <= 2:
        continue
    os.close(fd)


def run() -> int:
    """Run the command that `sys.argv` names; returns the exit status.

    A mistake in the words after `deliver` is the MTA's configuration, no reason to
    bounce the mail: 75 there (decision 12).
    """
    hold_standard_descriptors()
    if sys.argv[1:2] == ["deliver"]:
        try:
            group.main(prog_name="mda", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            return 75
        except click.Abort:
            return 75
        return 0
    status: object = group.main(prog_name="mda", standalone_mode=True)
    return status if isinstance(status, int) else 0
