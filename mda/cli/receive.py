"""`mda receive` in the list of commands; it never runs by way of click (decision 10)."""

from __future__ import annotations

import click

from mda.receiver import inetd


@click.command("receive")
@click.option("--protocol", type=click.Choice(["smtp", "lmtp"]), default="smtp", show_default=True)
@click.option("--config", "config_file", metavar="FILE", help="Configuration file.")
def command(protocol: str, config_file: str | None) -> None:
    """Serve one connection on standard input and output (inetd, Accept=yes, a pipe)."""
    arguments = ["--protocol", protocol]
    if config_file:
        arguments += ["--config", config_file]
    raise SystemExit(inetd.main(arguments))
