"""The shared vocabulary: what both processes say about a message and its recipients.

Nothing here does input or output, and nothing here imports a module that costs time
before the greeting (design, decision 10).
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Verb = Literal["MAIL", "SEND", "SOML", "SAML"]
    PeerKind = Literal["unix", "tcp", "stream"]
    TargetKind = Literal["mailbox", "file", "command", "nothing", "remote", "relay", "failure"]

VERBS: dict[bytes, Verb] = {b"MAIL": "MAIL", b"SEND": "SEND", b"SOML": "SOML", b"SAML": "SAML"}
TERMINAL_VERBS: tuple[Verb, ...] = ("SEND", "SOML", "SAML")

_LONGEST_SHOWN = 320  # octets of a path in a reply
_NOT_SHOWN = frozenset(b' <>()"\\;')  # what would be another path there

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


def cannot_keep(error: OSError, doing: str) -> Outcome:
    """A failure of our own store, which is no fault of the message: always temporary."""
    outcome = classify_os_error(error, doing)
    return outcome if outcome.is_temporary else Outcome(452, "4.3.1", outcome.text)


def will_forward(path: bytes) -> Outcome:
    """The mailbox is elsewhere, and we take the message there (RFC 821 3.2).

    `path` is without brackets; it is not shown where no reply can hold it.
    """
    shown = f" to <{path.decode('ascii')}>" if _can_be_shown(path) else ""
    return Outcome(251, "2.1.5", f"User not local; will forward{shown}")


def please_try(path: bytes) -> Outcome:
    """The mailbox is elsewhere, and we do not take the message there (RFC 821 3.2)."""
    if not _can_be_shown(path):
        return Outcome(550, "5.1.6", "User not local; the new address is not told here")
    return Outcome(551, "5.1.6", f"User not local; please try <{path.decode('ascii')}>")


def _can_be_shown(path: bytes) -> bool:
    is_plain = path.isascii() and path.decode("ascii").isprintable()
    return is_plain and 0 < len(path) <= _LONGEST_SHOWN and not set(path) & _NOT_SHOWN


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

    @property
    def route_text(self) -> bytes:
        """What stands before the mailbox: b"@ONE,@TWO:", or nothing."""
        return b",".join(b"@" + host for host in self.route) + b":" if self.route else b""

    def __repr__(self) -> str:
        return f"Path({self.text!r}, {self.route!r}, {self.local_part!r}, {self.domain!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


class Account:
    """A local account as the broker found it: whose mailbox, whose terminals, where.

    `extension` is what stood behind the user's name in the address ("lists" in
    `alice+lists`), `folder` the same where the user has such a folder; `mailbox` is the
    path of the folder or the inbox, `inbox` the one of the inbox: it ends in a slash if it
    is a Maildir.
    """

    __slots__ = ("extension", "folder", "gid", "home", "inbox", "mailbox", "uid", "user")

    def __init__(
        self, user: str, uid: int, gid: int, home: str, mailbox: str, extension: str = ""
    ) -> None:
        self.user = user
        self.uid = uid
        self.gid = gid
        self.home = home
        self.inbox = self.mailbox = mailbox
        self.extension = extension
        self.folder = ""


class Target:
    """One place that a copy of a message goes to, as the broker found it.

    `account` is whose identity is taken for it, and whose terminals they are; `place` the
    mailbox's or file's path, which ends in a slash if it is a Maildir, the command, or the
    mailbox on another host (local part without quoting, "@" and domain), which has no account
    and is "remote" where a file of ours leads there and a "relay" where the client has named
    it, maybe with a source `route` that is left (b"@ONE,@TWO");
    `address` the local part of the Delivered-To line; `owner` the local part of the
    reverse-path that a list puts in the sender's place, or empty. A `failure` has only its
    `outcome`. `forwards` are the targets that take the mailbox's place for a person who
    has both a terminal and a forward file.
    """

    __slots__ = (
        "account",
        "address",
        "forwards",
        "kind",
        "outcome",
        "owner",
        "place",
        "route",
    )

    def __init__(
        self,
        kind: TargetKind,
        account: Account | None,
        place: str = "",
        *,
        address: bytes = b"",
        owner: bytes = b"",
        outcome: Outcome | None = None,
        route: bytes = b"",
    ) -> None:
        self.kind: TargetKind = kind
        self.account = account
        self.place = place
        self.address = address
        self.owner = owner
        self.outcome = outcome
        self.route = route
        self.forwards: list[Target] = []

    @property
    def leaves(self) -> bool:
        """Does the copy leave this host, by the queue?"""
        return self.kind in ("remote", "relay")

    @property
    def key(self) -> tuple[str, int, str]:
        """The same for two targets that are one place, which gets one copy.

        A command reads the address in its environment, so each address is one of its own;
        a person with a forward file is another place than the mailbox itself.
        """
        kind = f"{self.kind} by forward file" if self.forwards else self.kind
        more = f"\0{os.fsdecode(self.address)}" if self.kind == "command" else ""
        if self.leaves:
            local_part, _, domain = self.place.rpartition("@")
            return kind, -1, f"{local_part}@{domain.lower()}\0{os.fsdecode(self.route)}"
        return kind, self.account.uid if self.account else -1, self.place + more

    @property
    def forms(self) -> str:
        """The forms of the text that it needs: "q" (quoted, for an mbox), "p" (plain)."""
        if self.forwards:
            return "".join(sorted({form for each in self.forwards for form in each.forms}))
        if self.kind in ("mailbox", "file"):
            return "p" if self.place.endswith("/") else "q"
        return "p" if self.kind == "command" or self.leaves else ""


class Copy:
    """What the session knows of a `Target`: its number, and what its copy is made from.

    `is_remote` says that it leaves this host, by the queue. `width` is the columns of the
    terminal that would show the message now, or 0 where none would. `wish` is what the sender
    wants to be told of it.
    """

    __slots__ = ("address", "forms", "is_remote", "number", "owner", "width", "wish")

    def __init__(
        self, number: int, forms: str, address: bytes, owner: bytes, *, is_remote: bool = False
    ) -> None:
        self.number = number
        self.forms = forms
        self.address = address
        self.owner = owner
        self.is_remote = is_remote
        self.width = 0
        self.wish = NO_WISH


class Wish:
    """What the sender wants to be told of one recipient (RFC 3461 4.1, 4.2).

    `notify` is what NOTIFY had, such as "NEVER" or "SUCCESS,DELAY", empty where the sender has
    said nothing; `original` is ORCPT as it came ("rfc822;joe+40far.example"), or empty.
    """

    __slots__ = ("notify", "original")

    def __init__(self, notify: str = "", original: bytes = b"") -> None:
        self.notify = notify
        self.original = original

    def has(self, event: str) -> bool:
        """Is the sender to be told of "SUCCESS", "FAILURE" or "DELAY"?"""
        if not self.notify:
            return event != "SUCCESS"
        return event in self.notify.split(",")

    def without_success(self) -> Wish:
        """The same for the members of a list, whose sender is told once."""
        kept = [each for each in self.notify.split(",") if each != "SUCCESS"]
        return Wish(",".join(kept) or "NEVER", self.original) if self.notify else self


NO_WISH = Wish()


class Recipient:
    """An accepted forward-path, the copies that it stands for, and the sender's wish."""

    __slots__ = ("copies", "path", "wish")

    def __init__(self, path: Path, copies: list[Copy], wish: Wish = NO_WISH) -> None:
        self.path = path
        self.copies = copies
        self.wish = wish
        for copy in copies:
            copy.wish = wish if len(copies) == 1 else wish.without_success()

    @property
    def forms(self) -> str:
        """The forms of the text that its copies need."""
        return "".join(copy.forms for copy in self.copies)


class Envelope:
    """One open transaction: its verb, its reverse-path, its recipients so far.

    `size` is what the client has declared, in octets, or 0 (RFC 1870); `is_utf8` says
    that it has asked for SMTPUTF8 (RFC 6531); `ret` is "FULL", "HDRS" or empty, and `envid`
    the envelope's name as it came (RFC 3461 4.3, 4.4).
    """

    __slots__ = ("envid", "is_utf8", "recipients", "ret", "reverse_path", "size", "verb")

    def __init__(
        self,
        verb: Verb,
        reverse_path: Path,
        size: int = 0,
        *,
        is_utf8: bool = False,
        ret: str = "",
        envid: bytes = b"",
    ) -> None:
        self.verb: Verb = verb
        self.reverse_path = reverse_path
        self.size = size
        self.is_utf8 = is_utf8
        self.ret = ret
        self.envid = envid
        self.recipients: list[Recipient] = []


class Peer:
    """Who is at the other end, read from the descriptor before the processes split.

    `address` is printable ASCII ("127.0.0.1", "uid 1000", "" for a pipe); `uid` is -1
    where the kernel names none; `user` is the login name of a verified person, else "";
    `is_trusted` marks an MTA of this host (decision 8); `may_use_terminals` says
    whether its SEND, SOML and SAML reach terminals, `is_queue` that it is our own queue, with
    what has failed here before; `may_ask_names` whether VRFY and EXPN
    tell it anything, `may_relay` whether it may send to other hosts through us,
    `is_offered_terminals` whether EHLO lists the three verbs: also to who stands outside of
    the networks that may; `is_tls_demanded` that it is to begin TLS before all else;
    `is_proxy` that it begins by saying for whom it stands, and `may_xclient` that it may say so;
    `turn_hosts` are the hosts that it may be when it says TURN (RFC 821 3.8), in lower case.
    """

    __slots__ = (
        "address",
        "is_offered_terminals",
        "is_proxy",
        "is_queue",
        "is_tls_demanded",
        "is_trusted",
        "kind",
        "may_ask_names",
        "may_relay",
        "may_use_terminals",
        "may_xclient",
        "turn_hosts",
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
        is_offered_terminals: bool = False,
        is_queue: bool = False,
        may_relay: bool = False,
        is_tls_demanded: bool = False,
        is_proxy: bool = False,
        may_xclient: bool = False,
        turn_hosts: tuple[str, ...] = (),
    ) -> None:
        self.kind: PeerKind = kind
        self.address = address
        self.uid = uid
        self.user = user
        self.is_trusted = is_trusted
        self.is_queue = is_queue
        self.is_tls_demanded = is_tls_demanded
        self.is_proxy = is_proxy
        self.may_xclient = may_xclient
        self.turn_hosts = turn_hosts
        self.may_use_terminals = may_use_terminals
        self.may_ask_names = may_ask_names
        self.may_relay = may_relay
        self.is_offered_terminals = is_offered_terminals or may_use_terminals
