"""`mda install`: units, system users, directories, man pages, configuration, the command.

Everything comes out of the installed package, and everything is written whole or not at
all. A list of what was written stays behind, so that `mda uninstall` takes away just that.
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys

import click
from click.shell_completion import get_completion_class
from filelock import FileLock, Timeout

import mda
from mda.cli import group
from mda.cli.whole import write_whole
from mda.config import CONFIG_FILE, RUN_DIRECTORY, Config
from mda.receiver.listener import AddressError, split_host_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable

UNIT_DIRECTORY = "/etc/systemd/system"
COMMAND = "/usr/local/bin/mda"
COMMAND_MARK = b"Written by `mda install`"
MANIFEST = "/var/lib/mda/installed"
SOCKETS = {"smtp": "mda-smtp.socket", "lmtp": "mda-lmtp.socket"}
UNITS = (*SOCKETS.values(), "mda-queue.path", "mda-queue.timer")
COMMAND_DROPINS = tuple(
    f"{UNIT_DIRECTORY}/mda-{protocol}@.service.d/commands.conf" for protocol in SOCKETS
)
# The names of an MTA's programs, for a host that has none.
SENDMAIL_NAMES = (
    "/usr/sbin/sendmail",
    "/usr/lib/sendmail",
    "/usr/bin/mailq",
    "/usr/bin/newaliases",
)
SYSTEM_USERS = ("mda", "mda-net")
BOOTED_BY_SYSTEMD = "/run/systemd/system"
POLL_LIMIT_SINCE = 255  # older versions have no such limit, and complain about the key
POSTFIX_QUEUE = "/var/spool/postfix"

# What goes where: the file in the package, the file on the host, its permissions.
FILES = (
    ("systemd/mda-smtp.socket", f"{UNIT_DIRECTORY}/mda-smtp.socket", 0o644),
    ("systemd/mda-smtp@.service", f"{UNIT_DIRECTORY}/mda-smtp@.service", 0o644),
    ("systemd/mda-lmtp.socket", f"{UNIT_DIRECTORY}/mda-lmtp.socket", 0o644),
    ("systemd/mda-lmtp@.service", f"{UNIT_DIRECTORY}/mda-lmtp@.service", 0o644),
    ("systemd/mda-queue.path", f"{UNIT_DIRECTORY}/mda-queue.path", 0o644),
    ("systemd/mda-queue.timer", f"{UNIT_DIRECTORY}/mda-queue.timer", 0o644),
    ("systemd/mda-queue.service", f"{UNIT_DIRECTORY}/mda-queue.service", 0o644),
    ("systemd/mda.sysusers", "/etc/sysusers.d/mda.conf", 0o644),
    ("systemd/mda.tmpfiles", "/etc/tmpfiles.d/mda.conf", 0o644),
    ("systemd/mda.sh", COMMAND, 0o755),
    ("man/mda.1", "/usr/local/share/man/man1/mda.1", 0o644),
    ("man/mda-send.1", "/usr/local/share/man/man1/mda-send.1", 0o644),
    ("man/mda.toml.5", "/usr/local/share/man/man5/mda.toml.5", 0o644),
)
# Where each shell looks for what completes a command's words.
COMPLETIONS = {
    "bash": "/usr/local/share/bash-completion/completions/mda",
    "zsh": "/usr/local/share/zsh/site-functions/_mda",
    "fish": "/usr/local/share/fish/vendor_completions.d/mda.fish",
}
SYSUSERS_FILE = "/etc/sysusers.d/mda.conf"
TMPFILES_FILE = "/etc/tmpfiles.d/mda.conf"


# Two of us at once, a person and a configuration manager, would undo each other's work.
LOCK = "/run/mda-install.lock"
LOCK_SECONDS = 60
ALREADY_RUNNING = "another `mda install` or `mda uninstall` is running"


class InstallError(Exception):
    """Nothing was installed, or not all of it; the text says why and what to do."""


class Wishes:
    """What is installed only where it is asked for; None: as it was asked for earlier."""

    def __init__(self, has_commands: bool | None = None, has_sendmail: bool | None = None) -> None:
        if has_commands is None:
            has_commands = os.path.exists(COMMAND_DROPINS[0])
        if has_sendmail is None:
            has_sendmail = is_written_by_us(SENDMAIL_NAMES[0])
        self.has_commands = has_commands
        self.has_sendmail = has_sendmail


class File:
    """One file of the installation: where, with which permissions, what is in it."""

    __slots__ = ("content", "mode", "path")

    def __init__(self, path: str, mode: int, content: bytes) -> None:
        self.path = path
        self.mode = mode
        self.content = content


@click.command("install")
@click.option("--now", is_flag=True, help="Start the sockets too.")
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="ADDR",
    help="Also listen on 127.0.0.1:25, lmtp+127.0.0.1:2424 or unix:/path; again for more. "
    "These replace the addresses of an earlier --listen.",
)
@click.option(
    "--commands/--no-commands",
    "has_commands",
    default=None,
    help="Let the units run users' own commands (delivery.commands), or no longer.",
)
@click.option(
    "--sendmail/--no-sendmail",
    "has_sendmail",
    default=None,
    help="Take the names sendmail, mailq and newaliases, where no MTA has them, or no longer.",
)
def command(
    now: bool, addresses: tuple[str, ...], has_commands: bool | None, has_sendmail: bool | None
) -> None:
    """Install the units, system users, directories, man pages and the command `mda`."""
    require_root()
    os.umask(0o022)
    try:
        with FileLock(LOCK, timeout=LOCK_SECONDS):
            install(addresses, Wishes(has_commands, has_sendmail), start=now)
    except Timeout as error:
        raise click.ClickException(ALREADY_RUNNING) from error
    except (InstallError, AddressError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'install'}: {error.strerror}") from error


def require_root() -> None:
    """Raise ClickException for anybody else."""
    if os.geteuid() != 0:
        raise click.ClickException("only root can do this")


def install(addresses: Iterable[str], wishes: Wishes, *, start: bool) -> None:
    """Do it all, saying in one line each what was done; raises InstallError and OSError.

    Without addresses those that were asked for earlier stay.
    """
    listening = sort_addresses(addresses)
    refuse_used_addresses(listening)
    files = plan_files(find_program(), listening, wishes)
    refuse_foreign_files(files)
    open_program_tree()
    before = read_manifest()
    ours = {file.path for file in files} | missing_folders(files)
    write_manifest(before | ours)
    changed = write_files(files)
    write_config()
    changed += remove_files({path for path in before - ours if not path.endswith("/")})
    write_manifest(ours | {path for path in before if path.endswith("/")})
    create_users()
    create_directories()
    activate(changed, start=start)
    name_postfix_setting()


# -- what is to be written ------------------------------------------------------------


def find_program() -> list[str]:
    """The words that start mda: this interpreter, without site-packages, and our file.

    Raises InstallError if the units cannot name them.
    """
    python = os.path.join(os.path.dirname(sys.executable), "python")
    python = python if os.path.exists(python) else sys.executable
    main = os.path.join(os.path.dirname(os.path.abspath(mda.__file__)), "__main__.py")
    for path in (python, main):
        if not re.fullmatch(r"[A-Za-z0-9/._+-]+", path):
            raise InstallError(f"{path}: a name that units cannot hold; install into /opt/mda")
    return [python, "-I", "-S", "-B", main]


def package_data() -> Traversable:
    """The folder with systemd/, man/ and etc/: in the package, or in the checkout."""
    inside = importlib.resources.files("mda").joinpath("data")
    if inside.is_dir():
        return inside
    return importlib.resources.files("mda").joinpath("..")


def plan_files(
    program: list[str], listening: dict[str, list[str]] | None, wishes: Wishes
) -> list[File]:
    """All files but the configuration; `listening` as from `sort_addresses`.

    With None for it what was asked for earlier stays.
    """
    version = systemd_version()
    files = [
        File(path, mode, fill_in(package_data().joinpath(name).read_bytes(), program, version))
        for name, path, mode in FILES
    ]
    files += [File(path, 0o644, complete_in(shell)) for shell, path in COMPLETIONS.items()]
    for protocol, unit in SOCKETS.items():
        path = f"{UNIT_DIRECTORY}/{unit}.d/listen.conf"
        if listening is None:
            files += [File(path, 0o644, read_file(path))] if os.path.exists(path) else []
        elif listening[protocol]:
            files.append(File(path, 0o644, format_addresses(listening[protocol])))
    if wishes.has_commands:
        content = package_data().joinpath("systemd/commands.conf").read_bytes()
        files += [File(path, 0o644, content) for path in COMMAND_DROPINS]
    if wishes.has_sendmail:
        content = package_data().joinpath("systemd/sendmail.sh").read_bytes()
        files += [File(path, 0o755, content) for path in SENDMAIL_NAMES]
    if os.path.isdir(f"{POSTFIX_QUEUE}/private"):
        path = f"{UNIT_DIRECTORY}/{SOCKETS['lmtp']}.d/postfix.conf"
        files.append(File(path, 0o644, format_addresses([f"{POSTFIX_QUEUE}/private/mda-lmtp"])))
    return files


def fill_in(content: bytes, program: list[str], version: int) -> bytes:
    """The shipped file for this host: its program, and only what its systemd knows."""
    lines = content.replace(b"@PROGRAM@", " ".join(program).encode()).splitlines(keepends=True)
    if version < POLL_LIMIT_SINCE:
        lines = [line for line in lines if not line.startswith(b"PollLimitIntervalSec=")]
    return b"".join(lines)


def complete_in(shell: str) -> bytes:
    """The script that lets a shell ask us how a word goes on."""
    kind = get_completion_class(shell)
    if kind is None:
        raise InstallError(f"this version of click knows nothing of {shell}")
    # Not kind.source(), which runs the shell to ask for its version.
    source = kind.source_template % kind(group, {}, "mda", "_MDA_COMPLETE").source_vars()
    return source.encode()


def systemd_version() -> int:
    """The major version, 0 without systemd."""
    if not shutil.which("systemctl"):
        return 0
    words = run("systemctl", "--version").split()
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def format_addresses(addresses: list[str]) -> bytes:
    """The drop-in that makes a socket unit listen on `addresses` too."""
    lines = [f"ListenStream={address}" for address in addresses]
    return "\n".join(
        ["# Written by `mda install`.", "[Socket]", "FreeBind=yes", *lines, ""]
    ).encode()


def sort_addresses(addresses: Iterable[str]) -> dict[str, list[str]] | None:
    """By protocol, as ListenStream= wants them; None if there are none.

    Raises AddressError.
    """
    sorted_out: dict[str, list[str]] = {"smtp": [], "lmtp": []}
    for address in addresses:
        protocol = "lmtp" if address.startswith("lmtp+") else "smtp"
        place = read_place(address.removeprefix("lmtp+"))
        if protocol == "lmtp" and place.endswith(":25"):
            raise AddressError(f"{address}: LMTP must not be spoken on port 25 (RFC 2033 5)")
        if place not in sorted_out[protocol]:
            sorted_out[protocol].append(place)
    return sorted_out if any(sorted_out.values()) else None


def read_place(place: str) -> str:
    """`unix:/path`, `127.0.0.1:25` or `[::1]:25` as ListenStream= wants it, or AddressError."""
    if place.startswith("unix:"):
        path = place.removeprefix("unix:")
        if not re.fullmatch(r"/[A-Za-z0-9/._+-]+", path) or ".." in path.split("/"):
            raise AddressError(f"{place}: not the full path of a socket")
        return path
    host, port = split_host_port(place)
    if not 0 < port < 65_536:
        raise AddressError(f"{place}: no port of that number")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refuse_used_addresses(listening: dict[str, list[str]] | None) -> None:
    """Raise AddressError for a port that another program has, before anything is written."""
    for protocol, places in (listening or {}).items():
        ours = read_file(f"{UNIT_DIRECTORY}/{SOCKETS[protocol]}.d/listen.conf").decode()
        for place in places:
            if not place.startswith("/") and f"ListenStream={place}\n" not in ours:
                try_address(place)


def try_address(place: str) -> None:
    """Raise AddressError if somebody listens on `place` already."""
    host, port = split_host_port(place)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            # An address that the host has not got yet may come up later.
            if error.errno == errno.EADDRINUSE:
                raise AddressError(f"{place}: another program listens there") from error


# -- writing it -----------------------------------------------------------------------


def refuse_foreign_files(files: list[File]) -> None:
    """Raise InstallError where somebody else's file stands in our way."""
    for file in files:
        try:
            status = os.lstat(file.path)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise InstallError(f"{file.path}: in the way (a link, or masked); remove it first")
    for path in {COMMAND, *SENDMAIL_NAMES} & {file.path for file in files}:
        if os.path.exists(path) and not is_written_by_us(path):
            raise InstallError(f"{path}: another program of this name; remove it first")


def program_tree() -> str:
    """The virtual environment that we run from, or "" outside of one."""
    tree = os.path.dirname(os.path.dirname(sys.executable))
    return tree if os.path.exists(os.path.join(tree, "pyvenv.cfg")) else ""


def open_program_tree() -> None:
    """Let every user run the program, also where root's umask was 077 when pip wrote it.

    Raises InstallError where users could change what root runs, or cannot get there.
    """
    tree = program_tree()
    if not tree:
        return
    check_way_to(tree)
    opened = [let_all_read(path) for path in walk_tree(tree)]
    if any(opened):
        click.echo(f"made {tree} readable for all users")


def check_way_to(tree: str) -> None:
    """Raise InstallError unless all can reach `tree` and only root can put others there."""
    path = tree
    while path != "/":
        status = os.stat(path)
        is_open = bool(status.st_mode & stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
        if status.st_uid != 0 or is_open:
            raise InstallError(f"{path}: not root's alone, but root would run what is in it")
        if path != tree and not status.st_mode & stat.S_IXOTH:
            raise InstallError(f"{path}: users cannot get there; install into /opt/mda")
        path = os.path.dirname(path)


def walk_tree(tree: str) -> Iterable[str]:
    """Every folder and file in `tree`, and itself, but no symbolic link."""
    yield tree
    for folder, folders, names in os.walk(tree):
        for name in folders + names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                yield path


def let_all_read(path: str) -> bool:
    """Give all what the owner has but writing; returns whether that was news."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    wanted = mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0)
    if wanted != mode:
        os.chmod(path, wanted)
    return wanted != mode


def read_file(path: str) -> bytes:
    """What is in `path`, nothing if there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def is_written_by_us(path: str) -> bool:
    """Is it one of our own programs?"""
    return COMMAND_MARK in read_file(path)


def is_written(file: File) -> bool:
    """The file is on the host as it should be."""
    try:
        mode = stat.S_IMODE(os.lstat(file.path).st_mode)
    except FileNotFoundError:
        return False
    return mode == file.mode and read_file(file.path) == file.content


def write_files(files: list[File]) -> list[str]:
    """Write what is not there yet; returns the paths of what was written."""
    missing = [file for file in files if not is_written(file)]
    for file in missing:
        os.makedirs(os.path.dirname(file.path), 0o755, exist_ok=True)
        write_whole(file.path, file.content, file.mode)
        click.echo(f"wrote {file.path}")
    return [file.path for file in missing]


def missing_folders(files: list[File]) -> set[str]:
    """The folders that have to be made for the files, with a slash at the end."""
    missing = set()
    for path in [MANIFEST, *(file.path for file in files)]:
        folder = os.path.dirname(path)
        while not os.path.exists(folder):
            missing.add(f"{folder}/")
            folder = os.path.dirname(folder)
    return missing


def write_config() -> None:
    """Write the configuration file if there is none."""
    if os.path.lexists(CONFIG_FILE):
        return
    os.makedirs(os.path.dirname(CONFIG_FILE), 0o755, exist_ok=True)
    content = package_data().joinpath("etc/mda.toml").read_bytes()
    write_whole(CONFIG_FILE, content, 0o644)
    click.echo(f"wrote {CONFIG_FILE}")


def read_manifest() -> set[str]:
    """What was installed: files, and folders with a slash at the end."""
    return set(read_file(MANIFEST).decode().splitlines())


def write_manifest(paths: set[str]) -> None:
    """Keep the list of what was installed, before anything is: a failure leaves no orphans."""
    os.makedirs(os.path.dirname(MANIFEST), 0o755, exist_ok=True)
    content = "".join(f"{path}\n" for path in sorted(paths)).encode()
    file = File(MANIFEST, 0o644, content)
    if not is_written(file):
        write_whole(file.path, file.content, file.mode)


def remove_files(paths: Iterable[str]) -> list[str]:
    """Remove files, then those of the folders (slash at the end) that are empty now."""
    removed = []
    for path in sorted(paths, key=lambda path: (path.endswith("/"), -len(path))):
        try:
            if path.endswith("/"):
                os.rmdir(path)
            else:
                os.unlink(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
            continue
        removed.append(path)
        click.echo(f"removed {path}")
    return removed


# -- what the host has to do ----------------------------------------------------------


def run(*words: str) -> str:
    """Run a program; returns what it says, or raises InstallError with its complaint."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        raise InstallError(f"{' '.join(words)}: {complaint or f'status {done.returncode}'}")
    return done.stdout.decode("utf-8", "replace").strip()


def answers(*words: str) -> bool:
    """Run a program that answers by its exit status: 0 is yes."""
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def has_user(name: str) -> bool:
    """Is there an account of this name?"""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def create_users() -> None:
    """Create the system users that are missing."""
    missing = [user for user in SYSTEM_USERS if not has_user(user)]
    if missing and shutil.which("systemd-sysusers"):
        run("systemd-sysusers", SYSUSERS_FILE)
    elif missing:
        for user in missing:
            home = Config().delivery.spool if user == "mda" else "/nonexistent"
            run("useradd", "--system", "-U", "-M", "-d", home, "-s", "/usr/sbin/nologin", user)
    for user in missing:
        click.echo(f"created the system user {user}")


def create_directories() -> None:
    """Create /run/mda and the spool, or give them the owners and permissions they need."""
    spool = Config().delivery.spool
    if shutil.which("systemd-tmpfiles"):
        run("systemd-tmpfiles", "--create", TMPFILES_FILE)
        return
    owner = pwd.getpwnam("mda")
    for path, mode, uid, gid in (
        (RUN_DIRECTORY, 0o755, 0, 0),
        (spool, 0o700, owner.pw_uid, owner.pw_gid),
    ):
        os.makedirs(path, exist_ok=True)
        os.chown(path, uid, gid)
        os.chmod(path, mode)


def is_booted_by_systemd() -> bool:
    """The same test as sd_booted(3)."""
    return os.path.isdir(BOOTED_BY_SYSTEMD)


def activate(changed: list[str], *, start: bool) -> None:
    """Enable the sockets and what runs the queue, and start them if asked to."""
    units = list(UNITS)
    if not is_booted_by_systemd():
        if shutil.which("systemctl"):
            run("systemctl", "enable", *units)
        click.echo("systemd does not run here; for inetd.conf:")
        click.echo(f"smtp stream tcp nowait root {COMMAND} mda receive")
        click.echo(f"for the crontab of root: * * * * * {COMMAND} queue run")
        return
    if any(path.startswith(UNIT_DIRECTORY) for path in changed):
        run("systemctl", "daemon-reload")
    if not all(answers("systemctl", "is-enabled", "--quiet", unit) for unit in units):
        run("systemctl", "enable", *units)
        click.echo(f"enabled {' and '.join(units)}")
    for unit in units:
        activate_unit(unit, is_changed=any(unit in path for path in changed), start=start)
    if not changed:
        click.echo("everything is in place")


def activate_unit(unit: str, *, is_changed: bool, start: bool) -> None:
    """Start a unit, or start it anew if it was changed: connections and runs go on."""
    is_active = answers("systemctl", "is-active", "--quiet", unit)
    if not start:
        if not is_active or is_changed:
            verb = "restart" if is_active else "start"
            click.echo(f"still to do: systemctl {verb} {unit}")
    elif is_active and is_changed:
        run("systemctl", "restart", unit)
        click.echo(f"restarted {unit}")
    elif not is_active:
        run("systemctl", "start", unit)
        click.echo(f"started {unit}")


def name_postfix_setting() -> None:
    """Say what Postfix needs to hand its mail to us."""
    if os.path.isdir(f"{POSTFIX_QUEUE}/private"):
        click.echo("for Postfix, in main.cf: mailbox_transport = lmtp:unix:private/mda-lmtp")
