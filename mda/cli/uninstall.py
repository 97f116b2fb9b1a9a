"""`mda uninstall`: take away what `mda install` put on this host, and nothing else.

Mailboxes and the configuration stay, and so does the program itself, which pip or the
administrator has put there.
"""

from __future__ import annotations

import os
import shutil

import click
from filelock import FileLock, Timeout

from mda.cli.install import (
    ALREADY_RUNNING,
    COMMAND,
    LOCK,
    LOCK_SECONDS,
    MANIFEST,
    SENDMAIL_NAMES,
    SOCKETS,
    SYSTEM_USERS,
    UNITS,
    InstallError,
    answers,
    has_user,
    is_booted_by_systemd,
    is_written_by_us,
    program_tree,
    read_manifest,
    remove_files,
    require_root,
    run,
)
from mda.config import CONFIG_FILE, RUN_DIRECTORY, Config, queue_directory
from mda.outbound.queue import FOLDERS, list_names


@click.command("uninstall")
def command() -> None:
    """Remove the units, system users, directories, man pages and the command `mda`."""
    require_root()
    try:
        with FileLock(LOCK, timeout=LOCK_SECONDS):
            uninstall()
    except Timeout as error:
        raise click.ClickException(ALREADY_RUNNING) from error
    except InstallError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'uninstall'}: {error.strerror}") from error


def uninstall() -> None:
    """Do it all, saying in one line each what was done; raises InstallError and OSError."""
    if not os.path.exists(MANIFEST):
        click.echo(f"{MANIFEST} is missing: nothing was installed, or it has been removed")
        return
    stop_units()
    installed = read_manifest()
    is_spool_empty = remove_directories()
    remove_files(path for path in installed if is_ours(path))
    if is_booted_by_systemd():
        run("systemctl", "daemon-reload")
    if is_spool_empty:
        remove_users()
    os.unlink(MANIFEST)
    remove_files(path for path in installed if path.endswith("/"))
    name_what_stays()


def is_ours(path: str) -> bool:
    """Is it a file of the installation, and not one that has taken its name since?"""
    is_program = path in (COMMAND, *SENDMAIL_NAMES)
    return not path.endswith("/") and (not is_program or is_written_by_us(path))


def stop_units() -> None:
    """Close the sockets and let the deliveries in hand end."""
    if not shutil.which("systemctl"):
        return
    if is_booted_by_systemd():
        run("systemctl", "stop", *UNITS)
        services = [unit.replace(".socket", "@*.service") for unit in SOCKETS.values()]
        run("systemctl", "stop", *services, "mda-queue.service")
        click.echo(f"stopped {', '.join(UNITS)}")
    run("systemctl", "disable", *UNITS)


def remove_directories() -> bool:
    """Remove /run/mda, and the spool if it is empty; returns whether it was."""
    if os.path.isdir(RUN_DIRECTORY):
        shutil.rmtree(RUN_DIRECTORY)
        click.echo(f"removed {RUN_DIRECTORY}")
    spool = Config().delivery.spool
    if not os.path.isdir(spool):
        return True
    remove_empty_queue(queue_directory(Config()))
    if os.listdir(spool):
        click.echo(f"{spool} and the user mda stay: mail is waiting there")
        return False
    os.rmdir(spool)
    click.echo(f"removed {spool}")
    return True


def remove_empty_queue(directory: str) -> None:
    """Remove the queue, unless something waits in it."""
    if not any(True for folder in FOLDERS for _ in list_names(directory, folder)):
        shutil.rmtree(directory, ignore_errors=True)


def remove_users() -> None:
    """Remove the system users, who own nothing any more."""
    for user in SYSTEM_USERS:
        if has_user(user):
            run("userdel", user)
            click.echo(f"removed the system user {user}")
        if answers("getent", "group", user):
            run("groupdel", user)


def name_what_stays() -> None:
    """Say what is left to the administrator."""
    if os.path.exists(CONFIG_FILE):
        click.echo(f"{CONFIG_FILE} stays: it is yours")
    click.echo("mailboxes stay: they are their users'")
    tree = program_tree()
    if tree:
        click.echo(f"{tree} stays: it is the program that you are running")
