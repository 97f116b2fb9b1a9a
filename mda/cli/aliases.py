"""`mda aliases`: compile the alias file into the index beside it, and say what is wrong in it."""

from __future__ import annotations

import click

from mda.cli.install import require_root
from mda.config import CONFIG_FILE, ConfigError, load
from mda.recipients import aliases
from mda.recipients.steering import Distrusted


@click.command("aliases")
@click.option("--config", "config_file", default=CONFIG_FILE, metavar="FILE")
def command(config_file: str) -> None:
    """Compile the alias file into an index, which spares each delivery the reading."""
    require_root()
    try:
        path = load(config_file).recipients.aliases
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    if not path:
        raise click.ClickException("recipients.aliases is empty: this host has no aliases")
    try:
        count = aliases.write_index(path)
    except Distrusted as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or path}: {error.strerror}") from error
    click.echo(f"{path}{aliases.INDEX_SUFFIX}: {count} aliases")
    faults = list_faults(path)
    for text in faults:
        click.echo(text, err=True)
    if faults:
        raise SystemExit(1)


def list_faults(path: str) -> list[str]:
    """What is wrong in the alias file, or with it; mail for such a name waits."""
    found = aliases.load(path)
    if isinstance(found, aliases.Aliases):
        return [text for _, text in found.faults()]
    return [found.text]
