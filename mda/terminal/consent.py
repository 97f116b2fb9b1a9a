"""A user's own say over who may write on the user's terminals: `~/.config/mda/mesg`.

The file is read with the user's rights, which the broker has taken before; `mda mesg`
writes it. One line is one word of it:

    messages y|n        whether others may write, where no line below names them
    allow SENDER        a login name, an address, *@DOMAIN, *@* or *
    deny SENDER
    reason y|n          whether a refusal says why
    bell y|n            whether a message may ring
    utf8 y|n            whether the terminals show more than ASCII
    keep y|n            whether what was shown is kept for `mda messages`
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

FILE = ".config/mda/mesg"
LARGEST = 64 * 1024
MOST_SENDERS = 1000
SWITCHES: Final = ("messages", "reason", "bell", "utf8", "keep")
_LONGEST_SENDER = 320
_ANSWERS = {"y": True, "n": False}


class RulesError(Exception):
    """The rules are not to be understood, or not the user's own; the text says why."""


class Sender:
    """Who sends: `user` is a verified login name or "", `address` what MAIL FROM said.

    `local_name` is the login name that an unverified address claims: its local part,
    where the domain is ours; else "".
    """

    __slots__ = ("address", "local_name", "user")

    def __init__(self, user: str, address: str = "", local_name: str = "") -> None:
        self.user = user
        self.address = address
        self.local_name = local_name


class Rules:
    """What the file says; `senders` are those named by allow (True) and deny (False).

    With a `fault` nothing is believed in it, and nobody may write.
    """

    __slots__ = ("fault", "senders", "switches")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.switches = dict.fromkeys(SWITCHES, True)
        self.senders: dict[str, bool] = {}

    def let(self, sender: Sender) -> bool:
        """May `sender` write: the rule that names him most exactly decides."""
        if self.fault:
            return False
        # What anybody may claim to be opens no door, but it may well shut one.
        claimed = (sender.local_name, sender.local_name.lower())
        if not sender.user and any(self.senders.get(name) is False for name in claimed):
            return False
        for name in _names_of(sender):
            if name in self.senders:
                return self.senders[name]
        return self.switches["messages"]


def _names_of(sender: Sender) -> list[str]:
    """What a rule may call `sender`, the most exact first."""
    if sender.user:
        return [sender.user, "*"]
    address = normalize(sender.address)
    if "@" not in address:  # else it could pass for a login name
        return ["*@*", "*"]
    domain = address.rpartition("@")[2]
    return [address, f"*@{domain}", "*@*", "*"]


def normalize(sender: str) -> str:
    """A sender as rules spell him: the domain, whose case says nothing, in lower case."""
    local_part, at, domain = sender.rpartition("@")
    return f"{local_part}@{domain.lower()}" if at else sender


def parse_rules(text: bytes) -> Rules:
    """What a file says; raises RulesError with the number of the line."""
    rules = Rules()
    for number, line in enumerate(text.decode("utf-8", "replace").split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        match words:
            case [name, ("y" | "n") as answer] if name in SWITCHES:
                rules.switches[name] = _ANSWERS[answer]
            case ["allow" | "deny" as verdict, sender] if len(sender) <= _LONGEST_SENDER:
                rules.senders[normalize(sender)] = verdict == "allow"
            case _:
                raise RulesError(f"line {number} is none that `mda mesg` writes")
    if len(rules.senders) > MOST_SENDERS:
        raise RulesError(f"more than {MOST_SENDERS} senders")
    return rules


def format_rules(rules: Rules) -> bytes:
    """The file that says the same, for a person to read."""
    lines = ["# Who may write on my terminals: see mda-send(1). Written by `mda mesg`."]
    lines += [f"{name} {'y' if rules.switches[name] else 'n'}" for name in SWITCHES]
    lines += [f"{'allow' if let else 'deny'} {who}" for who, let in sorted(rules.senders.items())]
    return "\n".join([*lines, ""]).encode("utf-8", "surrogateescape")


def read_rules(home: str, uid: int) -> Rules:
    """The rules of `uid`, whose home it is; all defaults where there is no file.

    No last link is followed and no FIFO waited for. What cannot be read or understood is
    a fault in the rules, and never as good as none.
    """
    try:
        return parse_rules(_read_own(os.path.join(home, FILE), uid))
    except (FileNotFoundError, NotADirectoryError):
        return Rules()
    except RulesError as error:
        return Rules(str(error))
    except OSError as error:
        return Rules(f"cannot be read: {errno.errorcode.get(error.errno or 0, 'unknown error')}")


def _read_own(path: str, uid: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags)
    try:
        _refuse_others(os.fstat(fd), uid)
        return _read(fd)
    finally:
        os.close(fd)


def _refuse_others(status: os.stat_result, uid: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RulesError("is no regular file")
    if status.st_uid not in (uid, 0):
        raise RulesError(f"is owned by uid {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RulesError("can be written by others (chmod go-w)")


def _read(fd: int) -> bytes:
    text = b""
    while piece := os.read(fd, LARGEST + 1 - len(text)):
        text += piece
    if len(text) > LARGEST:
        raise RulesError(f"is larger than {LARGEST} bytes")
    return text
