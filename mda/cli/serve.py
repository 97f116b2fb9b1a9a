"""`mda serve`: the listener that stays, for a host, or by a user for that user alone."""

from __future__ import annotations

import os

import click

from mda import broker, log
from mda.cli.handover import state_directory
from mda.config import CONFIG_FILE, LMTP_SOCKET, SMTP_SOCKET, Config, ConfigError, load
from mda.receiver import listener

OWN_PORT = "127.0.0.1:2525"


@click.command("serve")
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="ADDR",
    help="127.0.0.1:2525, unix:/path, lmtp+unix:/path or lmtp+127.0.0.1:2424; again for more.",
)
@click.option("--config", "config_file", metavar="FILE", help="Configuration file.")
def command(addresses: tuple[str, ...], config_file: str | None) -> None:
    """Listen and serve: as root for every user of the host, else for yourself alone."""
    log.open_log(may_use_stderr=True)
    try:
        config = read_config(config_file)
        listening = listener.inherited_sockets() or open_all(list(addresses))
        master = listener.Master(listening, lambda: reread_config(config_file), config)
        announce(listening, config)
        master.run()
    except (ConfigError, broker.SetupError, listener.AddressError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot listen: {error}") from error


def read_config(config_file: str | None) -> Config:
    """The host's configuration as root; a user's own mailbox and spool otherwise."""
    if os.geteuid() == 0:
        return load(config_file or CONFIG_FILE)
    config = load(config_file) if config_file else Config()
    state = state_directory()
    os.makedirs(state, 0o700, exist_ok=True)
    return config.with_values(
        "delivery", mailbox=os.path.join(state, "mbox"), mailbox_mode=0o600, spool=state
    )


def reread_config(config_file: str | None) -> Config | None:
    """SIGHUP: the new configuration, or None to keep the old where the new is broken."""
    try:
        return read_config(config_file)
    except ConfigError as error:
        log.write("configuration", log.ERROR, error=str(error), kept="old")
        return None


def open_all(addresses: list[str]) -> list[listener.Listening]:
    """The sockets that --listen names, or the usual ones."""
    if addresses:
        mode = 0o666 if os.geteuid() == 0 else 0o600
        return [listener.open_listening(address, mode) for address in addresses]
    if os.geteuid() == 0:
        usual = [f"unix:{SMTP_SOCKET}", f"lmtp+unix:{LMTP_SOCKET}"]
        os.makedirs(os.path.dirname(SMTP_SOCKET), 0o755, exist_ok=True)
        return [listener.open_listening(address, 0o666) for address in usual]
    state = state_directory()
    own = [f"unix:{state}/smtp.sock", f"lmtp+unix:{state}/lmtp.sock"]
    return [
        *(listener.open_listening(address, 0o600) for address in own),
        open_own_port(),
    ]


def open_own_port() -> listener.Listening:
    """The usual port, or another where somebody has it already."""
    try:
        return listener.open_listening(OWN_PORT, 0)
    except OSError:
        return listener.open_listening("127.0.0.1:0", 0)


def announce(listening: list[listener.Listening], config: Config) -> None:
    """Say where we listen and where the mail goes."""
    for each in listening:
        click.echo(f"listening on {each.name}")
    click.echo(f"mailbox {config.delivery.mailbox}")
