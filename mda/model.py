"""The shared vocabulary: what both processes say about a message and its recipients.

Nothing here does input or output, and nothing here imports a module that costs time
before the greeting (design, decision 10).
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Verb = Literal["MAIL", "SEND", "SOML", "SAML"]
    PeerKind = Literal["unix", "tcp", "stream"]

VERBS: dict[bytes, Verb] = {b"MAIL": "MAIL", b"SEND": "SEND", b"SOML": "SOML", b"SAML": "SAML"}
TERMINAL_VERBS: tuple[Verb, ...] = ("SEND", "SOML", "SAML")

# Printable to Unicode, and yet nothing to see on a terminal.
BLANK_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"


class Outcome:
    """What became of one step for one recipient, as a value.

    `code` is the three-digit SMTP code (2xx done, 4xx try again, 5xx never),
    `enhanced` the RFC 3463 code ("4.3.0") and `text` one line of printable ASCII.
    """

    __slots__ = ("code", "enhanced", "text")

    def __init__(self, code: int, enhanced: str, text: str) -> None:
        self.code = code
        self.enhanced = enhanced
        self.text = text

    def __repr__(self) -> str:
        return f"Outcome({self.code}, {self.enhanced!r}, {self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def is_done(self) -> bool:
        """The step succeeded."""
        return 200 <= self.code < 300

    @property
    def is_temporary(self) -> bool:
        """The same step may succeed later."""
        return 400 <= self.code < 500


def classify_os_error(error: OSError, doing: str) -> Outcome:
    """Turn a failed system call into an outcome: the only such table in mda.

    Whatever is not understood is temporary (design, decision 3). `doing` is a gerund
    phrase of ours ("writing the mailbox"), never text from a client.
    """
    reason = f"{doing}: {errno.errorcode.get(error.errno or 0, 'unknown error')}"
    if error.errno == errno.EDQUOT:
        return Outcome(552, "5.2.2", f"Mailbox full ({reason})")
    # EFBIG is our own limit on what a process may write, or the file system's; no quota.
    if error.errno in (errno.ENOSPC, errno.EFBIG):
        return Outcome(452, "4.3.1", f"Insufficient system storage ({reason})")
    return Outcome(451, "4.3.0", f"Local error ({reason})")


class Path:
    """A reverse-path or forward-path (RFC 821 4.1.2), taken apart.

    `text` is what stood between the angle brackets, unchanged (Return-Path keeps it);
    `route` the source route's hosts; `local_part` without quoting; `domain` as given,
    empty for a bare local part. The null reverse-path `<>` has all of them empty.
    """

    __slots__ = ("domain", "local_part", "route", "text")

    def __init__(
        self, text: bytes, route: tuple[bytes, ...], local_part: bytes, domain: bytes
    ) -> None:
        self.text = text
        self.route = route
        self.local_part = local_part
        self.domain = domain

    def __repr__(self) -> str:
        return f"Path({self.text!r}, {self.route!r}, {self.local_part!r}, {self.domain!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


class Account:
    """A local account as the broker found it: whose mailbox, whose terminals, where.

    `extension` is what stood behind the user's name in the address ("lists" in
    `alice+lists`); `mailbox` a path, which ends in a slash if it is a Maildir.
    """

    __slots__ = ("extension", "gid", "home", "mailbox", "uid", "user")

    def __init__(
        self, user: str, uid: int, gid: int, home: str, mailbox: str, extension: str = ""
    ) -> None:
        self.user = user
        self.uid = uid
        self.gid = gid
        self.home = home
        self.mailbox = mailbox
        self.extension = extension


class Recipient:
    """An accepted forward-path and what the broker said about it at RCPT.

    `user` is the account's name, `folder` the one of its folders that the message goes
    to, "" for its inbox; `width` the columns of the terminal that would show a message
    now, or 0 where none would.
    """

    __slots__ = ("folder", "path", "user", "width")

    def __init__(self, path: Path, user: str, folder: str = "", width: int = 0) -> None:
        self.path = path
        self.user = user
        self.folder = folder
        self.width = width


class Envelope:
    """One open transaction: its verb, its reverse-path, its recipients so far.

    `is_utf8` says that the client has asked for SMTPUTF8 (RFC 6531).
    """

    __slots__ = ("is_utf8", "recipients", "reverse_path", "verb")

    def __init__(self, verb: Verb, reverse_path: Path, is_utf8: bool = False) -> None:
        self.verb: Verb = verb
        self.reverse_path = reverse_path
        self.is_utf8 = is_utf8
        self.recipients: list[Recipient] = []


class Peer:
    """Who is at the other end, read from the descriptor before the processes split.

    `address` is printable ASCII ("127.0.0.1", "uid 1000", "" for a pipe); `uid` is -1
    where the kernel names none; `user` is the login name of a verified person, else "";
    `is_trusted` marks an MTA of this host (decision 8); `may_use_terminals` says
    whether SEND, SOML and SAML are offered to this peer, `may_ask_names` whether VRFY
    and EXPN tell it anything.
    """

    __slots__ = (
        "address",
        "is_trusted",
        "kind",
        "may_ask_names",
        "may_use_terminals",
        "uid",
        "user",
    )

    def __init__(
        self,
        kind: PeerKind,
        address: str = "",
        uid: int = -1,
        user: str = "",
        is_trusted: bool = False,
        may_use_terminals: bool = False,
        may_ask_names: bool = False,
    ) -> None:
        self.kind: PeerKind = kind
        self.address = address
        self.uid = uid
        self.user = user
        self.is_trusted = is_trusted
        self.may_use_terminals = may_use_terminals
        self.may_ask_names = may_ask_names
