"""Line by line to other people's terminals: one banner, then each line as it is typed.

Each line is a SEND of its own: so a line is shown or refused before the next is typed, and
none is ever turned into mail.
"""

from __future__ import annotations

import click

from mda.cli import handover
from mda.cli.handover import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mda.model import Outcome

    # A part of the conversation ("begin", "line", "end") and its text, as octets to send.
    Compose = Callable[[str, str], bytes]

_SUCCESS, _FAILURE = 0, 75
_TOO_FAST = "4.7.1"


class Conversation:
    """What is typed, and who is still there; `names` are people as they were named."""

    def __init__(self, sender: str, paths: list[str], names: list[str], compose: Compose) -> None:
        self._sender = sender
        self._names = dict(zip(paths, names, strict=True))
        self._compose = compose
        self._has_lost = False

    def hold(self, lines: Iterable[str]) -> int:
        """Send all lines, until there are no more or nobody is left; the exit status."""
        try:
            self._send("begin", "")
            for line in lines if self._names else ():
                self._send("line", line)
                if not self._names:
                    break
        except KeyboardInterrupt:
            click.echo(err=True)
        if self._names:
            self._send("end", "")
        return _FAILURE if self._has_lost else _SUCCESS

    def _send(self, part: str, text: str) -> None:
        """One line to all who are there; whoever does not get it is there no more."""
        paths = list(self._names)
        try:
            with handover.Client() as client:
                outcomes = client.deliver("SEND", self._sender, paths, [self._compose(part, text)])
        except Refused as refused:
            outcomes = [refused.outcome] * len(paths)
        for path, outcome in zip(paths, outcomes, strict=True):
            if not outcome.is_done:
                self._miss(path, outcome, part)

    def _miss(self, path: str, outcome: Outcome, part: str) -> None:
        name = self._names[path]
        reason = outcome.text.removeprefix(f"<{path}> ")
        if outcome.enhanced == _TOO_FAST and part == "line":
            click.echo(f"{name}: {reason}: that line was not shown.", err=True)
            return
        del self._names[path]
        if part == "end":
            return
        self._has_lost = True
        lost = "that line was not shown, and no more will be" if part == "line" else "stopped"
        click.echo(f"{name}: {reason}: {lost}.", err=True)
