"""`mda check`: what is wrong with this host's set-up, and how to mend it.

Each finding is two lines, what and how. A plain user sees less than root does, but
nothing wrong: what cannot be looked at is not reported.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import socket
import stat
from importlib.util import find_spec

import click

from mda import broker
from mda.cli.aliases import list_faults
from mda.cli.install import (
    COMMAND_DROPINS,
    FILES,
    MANIFEST,
    SOCKETS,
    SYSTEM_USERS,
    UNIT_DIRECTORY,
    UNITS,
    InstallError,
    Wishes,
    answers,
    check_way_to,
    find_program,
    has_user,
    is_booted_by_systemd,
    is_written,
    plan_files,
    program_tree,
)
from mda.config import (
    CONFIG_FILE,
    LMTP_SOCKET,
    RUN_DIRECTORY,
    SMTP_SOCKET,
    Config,
    ConfigError,
    load,
    local_domains,
    mailbox_folder,
    official_name,
)
from mda.delivery.lock import printable
from mda.outbound.program import SENDMAIL, is_our_own
from mda.outbound.route import parse_hop
from mda.receiver.tls import Tls
from mda.recipients.aliases import INDEX_SUFFIX, is_index_stale

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.model import Account, Outcome

PATIENCE = 10  # seconds for a greeting: above the start of an interpreter on a busy host
INSTALL = "mda install --now"


class Finding:
    """One thing that is wrong, and what mends it."""

    __slots__ = ("remedy", "what")

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        self.remedy = remedy


@click.command("check")
@click.option("--config", "config_file", default=CONFIG_FILE, metavar="FILE")
def command(config_file: str) -> None:
    """Say what is wrong with this host's set-up, and how to mend it."""
    findings = list(check_host(config_file))
    for finding in findings:
        click.echo(f"{finding.what}\n    {finding.remedy}")
    if findings:
        raise SystemExit(1)
    click.echo("all is well")


def check_host(config_file: str) -> Iterator[Finding]:
    """All findings; with a broken configuration the rest is held against the defaults."""
    config = Config()
    try:
        config = load(config_file)
    except ConfigError as error:
        yield Finding(str(error), "correct it; see mda.toml(5)")
    yield from check_config_file(config_file)
    if not is_installed():
        yield Finding("mda is not installed on this host", INSTALL)
        return
    yield from check_names(config)
    yield from check_accounts(config)
    yield from check_aliases(config)
    yield from check_commands(config)
    yield from check_mail_spool(config)
    yield from check_mailboxes(config)
    yield from check_own_spool(config)
    yield from check_outbound(config)
    yield from check_program()
    yield from check_installation()
    yield from check_run_directory()
    yield from check_units()
    for path in (SMTP_SOCKET, LMTP_SOCKET):
        yield from check_socket(path)


def is_installed() -> bool:
    """Is there anything of what `mda install` writes?"""
    return any(os.path.lexists(path) for path in (MANIFEST, *(path for _, path, _ in FILES)))


def status_of(path: str) -> os.stat_result | None:
    """The status of `path`, or None if it is not there or not to be seen."""
    try:
        return os.stat(path)
    except OSError:
        return None


def check_config_file(config_file: str) -> Iterator[Finding]:
    """Who may write the configuration file may become anybody on the host."""
    for path in (config_file, os.path.dirname(os.path.abspath(config_file))):
        status = status_of(path)
        if status is not None and (status.st_uid != 0 or status.st_mode & 0o022):
            yield Finding(
                f"{path}: others than root can write it",
                f"chown root:root {path} && chmod go-w {path}",
            )


def check_names(config: Config) -> Iterator[Finding]:
    """Mail for our own name must be local."""
    name = official_name(config)
    if name.lower() not in local_domains(config):
        yield Finding(
            f"the host name {name} is not among the local domains",
            f'add "{name}" to receiver.local_domains in {CONFIG_FILE}',
        )


def check_accounts(config: Config) -> Iterator[Finding]:
    """The system users, the terminals' group, and somebody who reads postmaster's mail."""
    for user in SYSTEM_USERS:
        if not has_user(user):
            yield Finding(f"there is no system user {user}", INSTALL)
        elif pwd.getpwnam(user).pw_uid == 0:
            yield Finding(f"the system user {user} is root", f"userdel {user} && {INSTALL}")
    postmaster = config.recipients.postmaster
    if not has_user(postmaster):
        yield Finding(
            f"mail for postmaster has no destination: there is no account {postmaster!r}",
            f"name an account in recipients.postmaster in {CONFIG_FILE}",
        )
    if config.terminal.enabled and not has_group(config.terminal.group):
        yield Finding(
            f"there is no group {config.terminal.group!r}, which terminals belong to",
            f"name it in terminal.group in {CONFIG_FILE}, or groupadd --system tty",
        )


def has_group(name: str) -> bool:
    """Is there a group of this name?"""
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def check_aliases(config: Config) -> Iterator[Finding]:
    """The alias file is one to follow, its entries can be read, its index is of today."""
    path = config.recipients.aliases
    if not path or not os.access(path, os.R_OK):
        return
    for text in list_faults(path):
        yield Finding(f"{path}: {text}; mail for it waits", "correct it; see aliases(5)")
    if is_index_stale(path):
        yield Finding(f"{path}{INDEX_SUFFIX} is older than {path}, and not used", "mda aliases")
    user = config.delivery.alias_user
    if not has_user(user) or pwd.getpwnam(user).pw_uid == 0:
        yield Finding(
            f"files and commands of the aliases belong to {user!r}: no account, or root",
            f"name another in delivery.alias_user in {CONFIG_FILE}",
        )


def check_commands(config: Config) -> Iterator[Finding]:
    """Commands that are allowed can run: the units of this host are for them."""
    if not config.delivery.commands or not is_booted_by_systemd():
        return
    if not all(os.path.exists(path) for path in COMMAND_DROPINS):
        yield Finding(
            "commands are allowed (delivery.commands), and the units keep them from working",
            "mda install --commands",
        )


def check_mail_spool(config: Config) -> Iterator[Finding]:
    """The folder of the mailboxes, where each user's delivery creates mailbox and dotlock.

    That is done with the user's uid and the folder's group (design, decision 1).
    """
    folder = mailbox_folder(config)
    if "{" in folder:
        return
    remedy = f"install -d -o root -g mail -m 2775 {folder}"
    status = status_of(folder)
    if status is None or not stat.S_ISDIR(status.st_mode):
        yield Finding(f"{folder}: no such directory, so no mailbox can be created", remedy)
        return
    is_for_all = bool(status.st_mode & stat.S_IWOTH)
    if is_for_all and not status.st_mode & stat.S_ISVTX:
        yield Finding(f"{folder}: any user can remove the mailboxes of others", remedy)
    elif not is_for_all and not status.st_mode & stat.S_IWGRP:
        yield Finding(f"{folder}: its group cannot write, so no mail can be delivered", remedy)
    elif status.st_uid != 0:
        yield Finding(f"{folder}: belongs to {status.st_uid}, not to root", remedy)


def check_mailboxes(config: Config) -> Iterator[Finding]:
    """What a killed delivery has left in a mailbox is taken away, and that is said."""
    if os.geteuid() != 0:
        return
    try:
        identities = broker.Identities(config)
    except broker.SetupError:
        return  # the accounts have been checked
    reading, writing = os.pipe()

    def report(account: Account, notes: list[str], failure: Outcome | None) -> None:
        mailbox = printable(account.mailbox)
        for note in notes:
            click.echo(f"{mailbox}: {note}")
        if failure is not None:
            os.write(writing, f"{mailbox}: {failure.text}\n".encode())

    pid = broker.start_repair(config, identities, lambda: os.close(reading), report)
    os.close(writing)
    with open(reading, encoding="ascii") as failures:
        for failure in failures:
            what = f"a delivery was killed, and cannot be undone now: {failure.strip()}"
            yield Finding(what, "mda check, once more, when that is mended")
    if os.waitpid(pid, 0)[1] != 0:
        yield Finding("not every mailbox could be looked at", "journalctl -t mda may say why")


def check_outbound(config: Config) -> Iterator[Finding]:
    """The next hops can be understood, and what they need is there."""
    outbound = config.outbound
    places = [("outbound.smarthost", outbound.smarthost)] if outbound.smarthost else []
    places += [(f"routes.{name!r}", place) for name, place in vars(config.routes).items()]
    for key, place in places:
        try:
            parse_hop(place)
        except ValueError as error:
            yield Finding(f"{key}: {error}", "correct it; see mda.toml(5)")
    has_way = outbound.smarthost or "*" in vars(config.routes) or find_spec("dns")
    if outbound.via == "smtp" and not has_way:
        yield Finding(
            "mail for other hosts waits in vain: there is neither dnspython, nor a smarthost, nor "
            'a route for "*"',
            'pip install dnspython, or set outbound.via to "nothing"',
        )
    yield from check_relay_networks(config)
    yield from check_certificate(config)
    if outbound.via == "sendmail" and not os.access(SENDMAIL, os.X_OK):
        yield Finding(f"outbound.via: there is no {SENDMAIL}", 'set it to "smtp", or install one')
    elif outbound.via == "sendmail" and is_our_own(SENDMAIL):
        yield Finding(f"outbound.via: {SENDMAIL} is mda itself", 'set it to "smtp"')


def check_certificate(config: Config) -> Iterator[Finding]:
    """The certificate can be used, and nobody else can read its key."""
    certificate = config.receiver.tls_certificate
    if not certificate:
        return
    key = config.receiver.tls_key or certificate
    status = status_of(key)
    if status is not None and status.st_mode & 0o007:
        yield Finding(f"{key}: others can read the key", f"chmod 640 {key}")
    if os.geteuid() != 0:
        return
    try:
        Tls(certificate, config.receiver.tls_key)
    except OSError as error:
        yield Finding(f"receiver.tls_certificate: {certificate}: {error}", "STARTTLS is told 454")
    else:
        ids = pwd.getpwnam("mda-net") if has_user("mda-net") else None
        is_readable = status is not None and (
            bool(status.st_mode & 0o004)
            or (ids is not None and status.st_gid == ids.pw_gid and bool(status.st_mode & 0o040))
        )
        if ids is not None and not is_readable:
            remedy = f"chgrp mda-net {key} && chmod 640 {key}"
            yield Finding(f"{key}: the session's user mda-net cannot read it", remedy)


def check_relay_networks(config: Config) -> Iterator[Finding]:
    """Not everybody may send through us."""
    for network in config.receiver.relay_networks:
        if ipaddress.ip_network(network).prefixlen == 0:
            yield Finding(
                f"receiver.relay_networks: {network} is everybody: an open relay",
                "name the networks of your own hosts",
            )


def check_own_spool(config: Config) -> Iterator[Finding]:
    """The folder where large messages wait: the user mda's alone."""
    if not has_user("mda"):
        return
    folder = config.delivery.spool
    status = status_of(folder)
    remedy = f"install -d -o mda -g mda -m 700 {folder}"
    if status is None or not stat.S_ISDIR(status.st_mode):
        yield Finding(f"{folder}: no such directory, so no large message is taken", remedy)
    elif status.st_uid != pwd.getpwnam("mda").pw_uid or stat.S_IMODE(status.st_mode) != 0o700:
        yield Finding(f"{folder}: must belong to the user mda, with permissions 0700", remedy)


def check_program() -> Iterator[Finding]:
    """Every user can run the program, and only root can change it."""
    tree = program_tree()
    if not tree:
        return
    try:
        check_way_to(tree)
    except InstallError as error:
        yield Finding(str(error), "then mda install --now")
    status = status_of(tree)
    if status is not None and not status.st_mode & stat.S_IXOTH:
        yield Finding(f"{tree}: users cannot run what is in it", INSTALL)


def check_installation() -> Iterator[Finding]:
    """The files of `mda install` are there, as it writes them."""
    try:
        files = plan_files(find_program(), None, Wishes())
    except InstallError as error:
        yield Finding(str(error), "then mda install --now")
        return
    for file in files:
        remedy = INSTALL
        if file.path.startswith(UNIT_DIRECTORY):
            remedy += " (changes of your own belong into a drop-in: systemctl edit)"
        if not os.path.lexists(file.path):
            yield Finding(f"{file.path} is missing", INSTALL)
        elif os.access(file.path, os.R_OK) and not is_written(file):
            yield Finding(f"{file.path} is not as `mda install` writes it", remedy)
    if not os.path.exists(MANIFEST):
        yield Finding(f"{MANIFEST} is missing: `mda uninstall` would do nothing", INSTALL)


def check_run_directory() -> Iterator[Finding]:
    """Who can write /run/mda can put his own sockets there."""
    status = status_of(RUN_DIRECTORY)
    if status is not None and (status.st_uid != 0 or status.st_mode & 0o022):
        yield Finding(
            f"{RUN_DIRECTORY}: others than root can write it",
            f"chown root:root {RUN_DIRECTORY} && chmod 755 {RUN_DIRECTORY}",
        )


def check_units() -> Iterator[Finding]:
    """Sockets and queue are enabled, and systemd has not given up on one."""
    if not is_booted_by_systemd():
        return
    for unit in UNITS:
        if answers("systemctl", "is-failed", "--quiet", unit):
            yield Finding(
                f"{unit} has failed; journalctl -u {unit} says why",
                f"systemctl reset-failed {unit} && systemctl restart {unit}",
            )
        if not answers("systemctl", "is-enabled", "--quiet", unit):
            yield Finding(f"{unit} is not enabled: gone after a reboot", f"systemctl enable {unit}")


def check_socket(path: str) -> Iterator[Finding]:
    """Somebody listens on the socket and greets."""
    unit = SOCKETS["smtp" if path == SMTP_SOCKET else "lmtp"]
    try:
        greeting = read_greeting(path)
    except OSError as error:
        yield Finding(f"{path}: {error.strerror or 'no greeting in time'}", start_hint(unit))
        return
    if not greeting.startswith("220"):
        said = greeting or "nothing"
        yield Finding(f"{path}: the greeting is {said!r}, not 220", "journalctl -t mda says why")


def start_hint(unit: str) -> str:
    """What makes somebody listen."""
    if is_booted_by_systemd():
        return f"systemctl start {unit}"
    return "run `mda serve`, or let inetd run `mda receive`"


def read_greeting(path: str) -> str:
    """The first line that comes from the socket, printable; raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        with connection.makefile("rb") as lines:
            greeting = lines.readline(512)
            if greeting.startswith(b"220"):
                connection.sendall(b"QUIT\r\n")
                lines.readline(512)  # a client that does not wait is logged as lost
    return greeting.decode("ascii", "replace").strip()
