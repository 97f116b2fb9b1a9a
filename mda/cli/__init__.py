"""The commands of `mda`, one file each; a command is loaded when it is named."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from mda import __version__, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TEMPORARY_FAILURE = 75
COMMANDS = {
    "receive": "one SMTP or LMTP connection on standard input and output",
    "serve": "the preloaded listener",
    "deliver": "the delivery command of an MTA: one message on standard input",
    "send": "write to people's terminals, or to their mailboxes",
    "reply": "answer whoever wrote to your terminals last",
    "messages": "read back what your terminals were shown",
    "who": "who is logged in here, and who takes messages",
    "mesg": "say who may write on your terminals",
    "explain": "the way that a message for an address would go, and why",
    "sendmail": "what programs expect of sendmail, where there is no MTA",
    "queue": "what waits for another host, or for another try",
    "aliases": "compile the alias file into an index",
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
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) ignores, and so do we
                signal.signal(number, signal.default_int_handler)
        return keep_from_bouncing(lambda: group.main(prog_name="mda", standalone_mode=False) or 0)
    status: object = group.main(prog_name="mda", standalone_mode=True)
    return status if isinstance(status, int) else 0


def keep_from_bouncing(deliver: Callable[[], int]) -> int:
    """The exit status that `deliver` returns, or 75 with a line that says why there is none.

    The outermost of a process that an MTA waits for: whatever goes wrong in it is no fault
    of the message, and its traceback is for the log.
    """
    try:
        return deliver()
    except (KeyboardInterrupt, click.Abort):
        return give_up("4.3.0", "interrupted")
    except click.ClickException as error:
        return give_up("4.3.5", error.format_message())
    except Exception as error:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("deliver")
        return give_up("4.3.0", str(error))


def give_up(enhanced: str, why: str) -> int:
    """Say on one line why the MTA should try again; the exit status that means it."""
    complain(f"{enhanced} mda deliver: {why}")
    return TEMPORARY_FAILURE


def paint(text: str, colour: str) -> str:
    """`text` in a colour, where a terminal shows it and nobody minds (NO_COLOR)."""
    if os.environ.get("NO_COLOR") or not os.isatty(1):
        return text
    return click.style(text, fg=colour)


def complain(line: str) -> None:
    """Write one line to standard error, where somebody may read it or not."""
    clean = "".join(character if character.isprintable() else " " for character in line)
    try:
        os.write(2, f"{clean}\n".encode("utf-8", "replace"))
    except OSError:
        log.write("lost", line=clean)
