"""A user's own say over where the mail goes: `~/.forward` and `~/.forward+extension`.

Read with the user's rights, which the broker has taken before. What stands in the way of
reading it is temporary: a home that is not mounted yet is no home without a forward file.
"""

from __future__ import annotations

import grp
import os
from functools import partial

from mda.model import Outcome
from mda.recipients.destinations import Destination, DestinationError, parse_file
from mda.recipients.steering import (
    Distrusted,
    cannot_read,
    judge_writers,
    open_trusted,
    printable,
    read_whole,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.model import Account

_LARGEST = 64 * 1024
_MOST = 100  # destinations
_LONGEST_EXTENSION = 64
# What accounts without a home have for one (Debian Policy 9.2.3).
_NO_HOMES = ("", "/", "/nonexistent", "/dev/null", "/var/empty")
# What other mailers run as programs of their own, and we must not take for addresses.
_FILTERS = ((b"# exim filter", "an Exim filter"), (b"# sieve filter", "a Sieve filter"))


def read_forward(account: Account) -> tuple[str, list[Destination]] | Outcome:
    """The path and the destinations of the forward file that counts; ("", []) for none.

    An outcome, always temporary, says why it cannot be told or must not be followed.
    """
    home = account.home
    if home in _NO_HOMES:
        return "", []
    shown = os.path.join(home, ".forward")
    try:
        home_fd = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name, fd = _open(account, home_fd)
            shown = os.path.join(home, name)
            return (shown, _read(shown, fd)) if name else ("", [])
        finally:
            os.close(home_fd)
    except Distrusted as distrusted:
        return distrusted.outcome
    except DestinationError as error:
        return Outcome(451, "4.3.5", f"{printable(shown)}: {error}")
    except OSError as error:
        return cannot_read(shown, error)


def _open(account: Account, home_fd: int) -> tuple[str, int]:
    """The name and a descriptor of the file that counts, ("", -1) for none."""
    owners = (account.uid, 0)
    is_private = partial(_is_private, account)
    for name in _names(account.extension):
        path = os.path.join(account.home, name)
        try:
            fd = open_trusted(path, owners, is_private, home_fd)
        except FileNotFoundError:
            continue
        try:
            # Who may write the home could have put the file there.
            judge_writers(account.home, os.fstat(home_fd), owners, is_private)
        except Distrusted:
            os.close(fd)
            raise
        return name, fd
    return "", -1


def _names(extension: str) -> list[str]:
    is_plain = "/" not in extension and len(extension) <= _LONGEST_EXTENSION
    own = [f".forward+{extension}"] if extension and is_plain else []
    return [*own, ".forward"]


def _is_private(account: Account, gid: int) -> bool:
    """Is this the user's own group, and nobody else's (as Debian makes them)?"""
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = gid == account.gid and group.gr_name == account.user
    return is_own and set(group.gr_mem) <= {account.user}


def _read(path: str, fd: int) -> list[Destination]:
    try:
        text = read_whole(path, fd, _LARGEST)
    finally:
        os.close(fd)
    for mark, kind in _FILTERS:
        if text[:100].lower().startswith(mark):
            raise DestinationError(f"is {kind}, which this host does not run")
    destinations = parse_file(text)
    if len(destinations) > _MOST:
        raise DestinationError(f"more than {_MOST} destinations")
    if any(each.kind == "include" for each in destinations):
        raise DestinationError(":include: is for the aliases of the host")
    return destinations
