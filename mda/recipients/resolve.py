"""Whose mail a local part is: the one person, or why there is none."""

from __future__ import annotations

import os

from mda.model import Account, Outcome, classify_os_error
from mda.recipients import passwd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pwd
    from collections.abc import Iterator

# RFC 821 4.5.3: "The maximum total length of a user name is 64 characters."
_LONGEST_NAME = 64
_NOBODY = 65_534
_FOUND = Outcome(250, "2.1.5", "Recipient OK")
_UNKNOWN = Outcome(550, "5.1.1", "No such user here")


def resolve(
    local_part: bytes,
    *,
    mailbox: str,
    uid_range: tuple[int, int],
    postmaster: str,
    separator: str = "",
    only_uid: int | None = None,
) -> tuple[Outcome, Account | None]:
    """The account that `local_part` (unquoted) names: as written, else in lower case.

    A name that is nobody's is tried without its extension, from the first `separator` on.
    Only persons have mail here: accounts with a uid in `uid_range`, not nobody. Mail for
    postmaster, in any case of letters, goes to the account `postmaster`, whatever its uid
    (RFC 5321 4.5.1). `mailbox` is a template with {user} and {home}. With `only_uid`, the
    mode without privilege, that uid is the only one that there is, and its own postmaster.
    Outcomes: 250; 550 5.1.1; 451 4.3.0 where the database could not be asked.
    """
    try:
        if local_part.lower() == b"postmaster":
            return _resolve_postmaster(postmaster, mailbox, only_uid)
        for written, extension in _read_name(os.fsdecode(local_part), separator):
            for name in dict.fromkeys((written, written.lower())):
                entry = passwd.find(name) if _is_plausible(os.fsencode(name)) else None
                if entry is not None and is_served(entry, uid_range, only_uid):
                    return _open_account(entry, mailbox, extension)
    except OSError as error:
        return classify_os_error(error, "looking up the user"), None
    return _UNKNOWN, None


def _read_name(local_part: str, separator: str) -> Iterator[tuple[str, str]]:
    """What may be the user's name in a local part, and the extension that is then left."""
    yield local_part, ""
    if separator and separator in local_part:
        name, _, extension = local_part.partition(separator)
        yield name, extension


def _is_plausible(name: bytes) -> bool:
    """May a login name look like this: part of a path, and no file that ls would hide."""
    return (
        0 < len(name) <= _LONGEST_NAME
        and not name.startswith(b".")
        and b"/" not in name
        and all(32 <= byte != 127 for byte in name)
    )


def is_served(entry: pwd.struct_passwd, uid_range: tuple[int, int], only_uid: int | None) -> bool:
    """Is this the account of a person, who has mail here?"""
    if only_uid is not None:
        return entry.pw_uid == only_uid
    return uid_range[0] <= entry.pw_uid <= uid_range[1] and entry.pw_uid != _NOBODY


def _resolve_postmaster(
    postmaster: str, mailbox: str, only_uid: int | None
) -> tuple[Outcome, Account | None]:
    if only_uid is not None:
        return _open_account(passwd.find_by_uid(only_uid), mailbox)
    entry = passwd.find(postmaster)
    if entry is None:
        return Outcome(451, "4.3.5", "The account for postmaster's mail is missing"), None
    return _open_account(entry, mailbox)


def _open_account(
    entry: pwd.struct_passwd, mailbox: str, extension: str = ""
) -> tuple[Outcome, Account | None]:
    # The database may have answered with another name than we asked for.
    if not _is_plausible(os.fsencode(entry.pw_name)):
        return _UNKNOWN, None
    if "{home}" in mailbox and not entry.pw_dir.startswith("/"):
        return Outcome(451, "4.3.5", "The user's home directory has no absolute path"), None
    path = mailbox.replace("{user}", entry.pw_name).replace("{home}", entry.pw_dir)
    account = Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, path, extension)
    return _FOUND, account
