"""Whose mailboxes there are, without a name to ask for: where killed deliveries are looked for."""

from __future__ import annotations

import os
import pwd

from mda.delivery.lock import DOTLOCK_SUFFIX
from mda.recipients import passwd
from mda.recipients.resolve import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.model import Account

_MOST_ACCOUNTS = 10_000


def list_locked(
    mailbox: str, *, uid_range: tuple[int, int], postmaster: str, only_uid: int | None
) -> Iterator[Account]:
    """Everybody whose mailbox may have a dotlock beside it.

    Where all mailboxes are in one directory that is whoever has one there, and otherwise
    everybody, as far as the account database can be listed. The arguments are those of
    `resolve`. Raises OSError.
    """
    for user in _list_users(mailbox, only_uid):
        name = "postmaster" if user == postmaster else user
        _, account = resolve(
            os.fsencode(name),
            mailbox=mailbox,
            uid_range=uid_range,
            postmaster=postmaster,
            only_uid=only_uid,
        )
        if account is not None and account.user == user:
            yield account


def _list_users(mailbox: str, only_uid: int | None) -> Iterator[str]:
    folder, name = os.path.split(mailbox)
    if only_uid is not None:
        yield passwd.find_by_uid(only_uid).pw_name
    elif "{" in folder or "{user}" not in name:
        yield from (entry.pw_name for entry in pwd.getpwall()[:_MOST_ACCOUNTS])
    else:
        yield from _read_spool(folder, name)


def _read_spool(folder: str, template: str) -> Iterator[str]:
    """The users whose names the dotlocks in the spool have in them."""
    before, _, after = template.partition("{user}")
    after += DOTLOCK_SUFFIX
    with os.scandir(folder) as entries:
        for entry in entries:
            user = entry.name[len(before) : -len(after)]
            if user and entry.name == before + user + after:
                yield user
