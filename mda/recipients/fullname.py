"""The persons of this host by name: what VRFY and EXPN look up (RFC 821 3.3)."""

from __future__ import annotations

import os
import pwd

from mda.model import Outcome
from mda.recipients import passwd
from mda.recipients.resolve import is_served

_FOUND = Outcome(250, "2.1.5", "User")
_AMBIGUOUS = Outcome(553, "5.1.4", "User ambiguous")
_UNKNOWN = Outcome(550, "5.1.1", "String does not match anything")


def find_person(
    name: bytes, uid_range: tuple[int, int], only_uid: int | None
) -> tuple[Outcome, str]:
    """The login name of the one person whose full name or surname is `name`, in any case.

    Outcomes: 250; 550 5.1.1; 553 5.1.4 for several. Reads the whole account database, as
    far as it can be listed.
    """
    wanted = _fold(os.fsdecode(name))
    found = {
        entry.pw_name
        for entry in pwd.getpwall()
        if is_served(entry, uid_range, only_uid) and _is_called(_full_name(entry), wanted)
    }
    if len(found) == 1:
        return _FOUND, found.pop()
    return (_AMBIGUOUS if found else _UNKNOWN), ""


def full_name(user: str) -> str:
    """The full name that passwd has for the account, "" if none; raises OSError."""
    entry = passwd.find(user)
    return _full_name(entry) if entry else ""


def _full_name(entry: pwd.struct_passwd) -> str:
    """The first field of GECOS, where "&" stands for the login name (passwd(5))."""
    login = entry.pw_name[:1].upper() + entry.pw_name[1:]
    return entry.pw_gecos.split(",")[0].replace("&", login).strip()


def _is_called(full: str, wanted: str) -> bool:
    words = _fold(full)
    return bool(wanted) and wanted in (words, words.rpartition(" ")[2])


def _fold(name: str) -> str:
    return " ".join(name.casefold().split())
