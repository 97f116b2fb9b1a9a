"""From an address to the places that its mail goes to: aliases, lists, forward files.

What cannot be followed becomes a target too, a `failure` with its outcome: nothing is left
out in silence. Names are looked up as aliases first, and a name that an alias stands for
itself is the account (aliases(5)).
"""

from __future__ import annotations

import os
import stat
import time

from mda.config import own_domains
from mda.delivery.maildir import find_folder
from mda.model import Account, Outcome, Target, classify_os_error, please_try
from mda.recipients import aliases, passwd
from mda.recipients.destinations import Destination, DestinationError, parse_file
from mda.recipients.forward import read_forward
from mda.recipients.resolve import resolve
from mda.recipients.steering import (
    Distrusted,
    cannot_read,
    nobodys,
    open_trusted,
    read_whole,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from mda.config import Config
    from mda.model import TargetKind, Verb
    from mda.recipients.aliases import Aliases

    IsFinal = Callable[[Account], bool]
    Enter = Callable[[Account], AbstractContextManager[None]]

SHELLS_FILE = "/etc/shells"
_DEEPEST = 30  # aliases and forward files in one another
_MOST_TARGETS = 5000  # for one address
_MOST_ACCOUNTS = 1000  # kept in memory
_LARGEST_LIST = 1 << 20
_MOST_SECONDS = 20  # for one address
_NO_LOGIN = Outcome(550, "5.3.3", "Not the login name of a person; use SOML")
_POSTMASTER = b"postmaster"
_REMOTE = Outcome(451, "4.4.0", "Mail for other hosts cannot be forwarded from here")
_NO_COMMANDS = Outcome(451, "4.3.5", "Commands are not run on this host (delivery.commands)")
_TOO_DEEP = Outcome(451, "4.3.5", "Aliases and forward files are nested too deeply")
_TOO_MANY = Outcome(451, "4.3.5", f"More than {_MOST_TARGETS} members")
IS_LIST = Outcome(550, "5.1.4", "That is a list and no user; EXPN shows its members")
_TOO_LONG = Outcome(451, "4.3.5", "Aliases and forward files that take too long to follow")
_LOOP = Outcome(451, "4.3.5", "Aliases and forward files that lead in a circle")


class Host:
    """What the names of this host mean, as far as one session has asked.

    `enter` is the broker's: it takes an account's identity for a `with` block. With
    `only_uid`, the mode without privilege, there is one account and no file that steers
    mail. `tells_moved` says that the peer may know where somebody else's mail goes now.
    """

    def __init__(
        self, config: Config, only_uid: int | None, enter: Enter, *, tells_moved: bool = True
    ) -> None:
        self.tells_moved = tells_moved
        known = vars(config.forward) if only_uid is None else {}
        self._moved = {os.fsencode(each).lower(): str(value) for each, value in known.items()}
        self.config = config
        self.only_uid = only_uid
        self.enter = enter
        self._aliases: Aliases | Outcome = aliases.NO_ALIASES
        self._is_fresh = False
        self._accounts: dict[bytes, tuple[Outcome, Account | None]] = {}
        self._domains: frozenset[str] = frozenset()

    def forget(self) -> None:
        """A new transaction: aliases that have changed since count."""
        self._is_fresh = False

    def aliases(self) -> Aliases | Outcome:
        """The aliases, or why they cannot be followed."""
        path = self.config.recipients.aliases if self.only_uid is None else ""
        known = self._aliases
        is_same = not isinstance(known, Outcome) and known.stamp == aliases.stamp_of(path)
        if not self._is_fresh and not (path and is_same):
            self._aliases = aliases.load(path)
        self._is_fresh = True
        return self._aliases

    def find_account(self, name: bytes) -> tuple[Outcome, Account | None]:
        """Whose name this is, with the folder that its extension names (`resolve`)."""
        if name in self._accounts:
            return self._accounts[name]
        recipients = self.config.recipients
        found = resolve(
            name,
            mailbox=self.config.delivery.mailbox,
            uid_range=(recipients.uid_min, recipients.uid_max),
            postmaster=recipients.postmaster,
            separator=recipients.extension_separator,
            only_uid=self.only_uid,
        )
        if found[1] is not None and found[1].extension:
            try:
                self._choose_folder(found[1])
            except OSError as error:
                return classify_os_error(error, "looking for the folder"), None
        # A client that guesses names must not fill our memory, nor a failure of the
        # account database outlast itself.
        if found[0].is_done and len(self._accounts) < _MOST_ACCOUNTS:
            self._accounts[name] = found
        return found

    def _choose_folder(self, account: Account) -> None:
        """Turn to the folder that the extension names, if there is one; raises OSError."""
        if account.mailbox.endswith("/"):
            with self.enter(account):
                folder = find_folder(account.mailbox, account.extension)
            if folder:
                account.mailbox = folder
                account.folder = account.extension

    def alias_account(self) -> Account | Outcome:
        """Who delivers to the files and commands of the aliases: never root."""
        user = self.config.delivery.alias_user
        try:
            entry = passwd.find(user)
        except OSError as error:
            return classify_os_error(error, "looking up delivery.alias_user")
        if entry is None or entry.pw_uid == 0:
            fault = "does not exist" if entry is None else "must not be root"
            return Outcome(451, "4.3.5", f"The account of delivery.alias_user {fault}")
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, "/", "")

    def refuse_moved(self, path: bytes) -> Outcome:
        """The refusal of mail for who has moved, with the new path for who may know it."""
        return please_try(path if self.tells_moved else b"")

    def is_ours(self, domain: bytes) -> bool:
        """Is a domain in one of our own files one of ours?"""
        if not self._domains:
            self._domains = own_domains(self.config)
        return domain.decode("utf-8", "replace").lower() in self._domains

    def find_moved(self, name: bytes) -> str | None:
        """The entry of `[forward]` for a name, by itself or without its extension."""
        found = (self._moved.get(each.lower()) for each in self.names_of(name))
        return next((each for each in found if each is not None), None)

    def names_of(self, name: bytes) -> list[bytes]:
        """The names that may be aliases in a local part: the whole, and without extension."""
        separator = self.config.recipients.extension_separator.encode("ascii")
        bare = name.split(separator, 1)[0] if separator else name
        return [name] if bare in (name, b"") else [name, bare]


def expand(
    host: Host,
    local_part: bytes,
    verb: Verb,
    *,
    is_final: IsFinal,
    trace: list[str] | None = None,
) -> list[Target]:
    """The targets of mail for `local_part` (unquoted), at least one, each place once.

    A person for whom `is_final` says so has the mail and no alias or forward file counts:
    an MTA has followed them already. SEND is for a person's terminal, and so for a login
    name and nothing else; with SOML and SAML a forward file counts only for the mailbox.
    `trace` gets a line of text for each step.
    """
    walk = _Walk(host, verb, is_final, trace)
    if verb == "SEND" and (refusal := _judge_login(host, local_part, is_final)):
        walk.fail(refusal, local_part)
    else:
        walk.follow_name(local_part, _Origin())
    if host.config.recipients.forwarding == "refuse" and local_part.lower() != _POSTMASTER:
        sole = walk.targets[0].forwards if len(walk.targets) == 1 else []
        if path := moved_to(walk.targets) or moved_to(sole):
            return [_failure(host.refuse_moved(path), local_part)]
    return walk.targets or [_failure(_LOOP)]


def moved_to(targets: list[Target]) -> bytes:
    """The path of the one mailbox elsewhere that a name means, or empty.

    A list of one, which has an owner, is still a list.
    """
    if len(targets) != 1 or targets[0].kind != "remote" or targets[0].owner:
        return b""
    return os.fsencode(targets[0].place)


def _judge_login(host: Host, name: bytes, is_final: IsFinal) -> Outcome | None:
    """Why this is not simply somebody who could be logged in; None if it is, or is nobody."""
    account = host.find_account(name)[1]
    if account is not None and is_final(account):
        return None
    if host.find_moved(name) is not None:
        return None
    known = host.aliases() if host.only_uid is None else aliases.NO_ALIASES
    if isinstance(known, Outcome):
        return known
    is_alias = any(known.find(each) is not None for each in host.names_of(name))
    is_extended = account is not None and bool(account.extension)
    if is_alias or is_extended or name.lower() == _POSTMASTER:
        return _NO_LOGIN
    return None


class _Origin:
    """What a destination has from where it stands: the alias or the forward file.

    `account` delivers to its files and commands, None for `delivery.alias_user`;
    `may_run` says that such destinations are allowed there.
    """

    __slots__ = ("account", "address", "may_run", "owner")

    def __init__(
        self,
        account: Account | None = None,
        address: bytes = b"",
        owner: bytes = b"",
        *,
        may_run: bool = True,
    ) -> None:
        self.account = account
        self.address = address
        self.owner = owner
        self.may_run = may_run


class _Walk:
    """One address followed to its ends."""

    def __init__(self, host: Host, verb: Verb, is_final: IsFinal, trace: list[str] | None) -> None:
        self._host = host
        self._verb: Verb = verb
        self._is_final = is_final
        self._trace = trace
        # What is being followed, outermost first, and what has been once.
        self._under_way: list[tuple[str, bytes]] = []
        self._seen: set[tuple[str, bytes]] = set()
        self._keys: set[tuple[str, int, str]] = set()
        self._until = time.monotonic() + _MOST_SECONDS
        self.targets: list[Target] = []

    def note(self, text: str) -> None:
        """Tell the trace about a step, further in the deeper it is."""
        if self._trace is not None:
            self._trace.append("  " * len(self._under_way) + text)

    def mailbox(self, account: Account, origin: _Origin) -> Target:
        """The target that an account's own mailbox is."""
        address = account.user
        if account.folder:
            address += f"{self._host.config.recipients.extension_separator}{account.folder}"
        self.note(f"{account.user} has the mailbox {account.mailbox}")
        return Target(
            "mailbox",
            account,
            account.mailbox,
            address=os.fsencode(address),
            owner=origin.owner,
        )

    def add(self, target: Target) -> None:
        """One more place, unless it is among them already."""
        if target.kind != "failure":
            if target.key in self._keys:
                return
            self._keys.add(target.key)
        if len(self.targets) < _MOST_TARGETS:
            self.targets.append(target)
        elif len(self.targets) == _MOST_TARGETS:
            self.targets.append(_failure(_TOO_MANY))

    def fail(self, outcome: Outcome, what: bytes = b"", owner: bytes = b"") -> None:
        """What cannot be followed; `what` is the name or path, `owner` who is to hear of it."""
        self.note(f"{outcome.code} {outcome.enhanced} {outcome.text}")
        self.add(_failure(outcome, what, owner))

    def follow_name(self, name: bytes, origin: _Origin) -> None:
        """A local part: an alias, else a person, else nobody."""
        host = self._host
        outcome, account = host.find_account(name)
        if name.lower() == _POSTMASTER:
            self._follow_postmaster(outcome, account, origin)
        elif account is not None and self._is_final(account):
            self.add(self.mailbox(account, origin))
        elif (moved := host.find_moved(name)) is not None:
            self._follow_moved(name, moved, origin)
        elif host.only_uid is None and self.follow_alias(name, origin):
            return
        elif account is not None:
            self.follow_person(account, origin)
        elif outcome.is_temporary or not self._is_in_circle(name):
            self.note(f"{_shown(name)} is no alias, and no person of this host")
            self.fail(outcome, name, origin.owner)

    def _follow_moved(self, name: bytes, entry: str, origin: _Origin) -> None:
        """An entry of `[forward]`: the mailbox elsewhere, or "551 " and a mailbox."""
        path = os.fsencode(entry.removeprefix("551 "))
        self.note(f"{_shown(name)} has moved to {_shown(path)} ([forward])")
        if entry.startswith("551 "):
            self.fail(self._host.refuse_moved(path), name, origin.owner)
            return
        local_part, _, domain = path.rpartition(b"@")
        there = [Destination("mailbox", local_part, domain)]
        self._follow_all(("moved", name.lower()), there, _Origin(None, name, origin.owner))

    def _is_in_circle(self, name: bytes) -> bool:
        """Is an alias further out named again: its members are being followed already.

        An alias that names itself means the account of that name, and is none.
        """
        steps = [("alias", each.lower()) for each in self._host.names_of(name)]
        return any(step in self._under_way[:-1] for step in steps)

    def _follow_postmaster(
        self, outcome: Outcome, account: Account | None, origin: _Origin
    ) -> None:
        """The alias, and where that does not reach everybody the configured account.

        Mail for postmaster is never refused (RFC 5321 4.5.1).
        """
        begin = len(self.targets)
        if self._host.only_uid is None and not isinstance(self._host.aliases(), Outcome):
            self.follow_alias(_POSTMASTER, origin)
        reached = [each for each in self.targets[begin:] if each.kind != "failure"]
        if reached and len(reached) == len(self.targets) - begin:
            return
        self.targets[begin:] = reached
        if account is None:
            self.fail(outcome, _POSTMASTER, origin.owner)
            return
        self.note(f"{account.user} is this host's account for postmaster (recipients.postmaster)")
        self.add(self.mailbox(account, origin))

    def follow_alias(self, name: bytes, origin: _Origin) -> bool:
        """Follow the alias that the name is, if any; False if it is none, or names itself."""
        known = self._host.aliases()
        if isinstance(known, Outcome):
            self.fail(known, name, origin.owner)
            return True
        for each in self._host.names_of(name):
            found = known.find(each)
            step = ("alias", each.lower())
            if found is None or step in self._under_way:
                continue
            if isinstance(found, Outcome):
                self.fail(found, name, origin.owner)
                return True
            owner = origin.owner
            if known.has(b"owner-" + each):
                owner = b"owner-" + each
            self.note(f"{_shown(each)} is an alias in {self._host.config.recipients.aliases}")
            self._follow_all(step, found, _Origin(None, name, owner))
            return True
        return False

    def follow_person(self, account: Account, origin: _Origin) -> None:
        """A person's forward file, else the mailbox."""
        user = os.fsencode(account.user)
        # Named by the own forward file, whichever that is, a person has the mailbox.
        is_own = any(
            kind == "forward" and name.startswith(user + b"\0") for kind, name in self._under_way
        )
        if is_own or self._verb == "SEND" or not self._reads_forwards(account):
            self.add(self.mailbox(account, origin))
            return
        try:
            with self._host.enter(account):
                found = read_forward(account)
        except OSError as error:
            found = classify_os_error(error, "reading the forward file")
        if isinstance(found, Outcome):
            self.fail(found, user, origin.owner)
        elif not found[1]:
            self.add(self.mailbox(account, origin))
        else:
            self.note(f"{account.user} forwards mail by {found[0]}")
            step = ("forward", user + b"\0" + os.fsencode(found[0]))
            own = _Origin(account, self._address_of(account), origin.owner)
            if self._verb == "MAIL":
                self._follow_all(step, found[1], own)
            else:
                self.add(self._fork_at(account, step, found[1], own))

    def _address_of(self, account: Account) -> bytes:
        """The local part that a person's forward file was asked for."""
        separator = self._host.config.recipients.extension_separator
        more = f"{separator}{account.extension}" if account.extension else ""
        return os.fsencode(account.user + more)

    def _reads_forwards(self, account: Account) -> bool:
        is_wanted = self._host.config.recipients.forward and self._host.only_uid is None
        return is_wanted and not self._is_final(account)

    def _fork_at(
        self,
        account: Account,
        step: tuple[str, bytes],
        destinations: list[Destination],
        origin: _Origin,
    ) -> Target:
        """A person whose terminal is the first choice, or the second, and mail goes on."""
        walk = _Walk(self._host, "MAIL", self._is_final, self._trace)
        walk._under_way = list(self._under_way)
        walk._follow_all(step, destinations, origin)
        target = self.mailbox(account, origin)
        target.forwards = walk.targets or [_failure(_LOOP)]
        return target

    def _follow_all(
        self, step: tuple[str, bytes], destinations: list[Destination], origin: _Origin
    ) -> None:
        if step in self._seen:
            return  # its members are among the targets already
        if len(self._under_way) >= _DEEPEST:
            self.fail(_TOO_DEEP, owner=origin.owner)
            return
        if time.monotonic() > self._until:
            self.fail(_TOO_LONG, owner=origin.owner)
            return
        self._seen.add(step)
        self._under_way.append(step)
        for destination in destinations:
            if len(self.targets) <= _MOST_TARGETS:
                self._follow(destination, origin)
        self._under_way.pop()

    def _follow(self, destination: Destination, origin: _Origin) -> None:
        match destination.kind:
            case "mailbox" if destination.domain and not self._host.is_ours(destination.domain):
                self._follow_remote(destination, origin)
            case "mailbox" if destination.is_final:
                self._follow_final(destination.text, origin)
            case "mailbox":
                self.follow_name(destination.text, origin)
            case "include":
                self._follow_include(destination.text, origin)
            case "file" | "command":
                self._follow_place(destination, origin)

    def _follow_remote(self, destination: Destination, origin: _Origin) -> None:
        """A mailbox on another host, to which the queue takes the mail."""
        address = b"%b@%b" % (destination.text, destination.domain)
        if self._host.config.outbound.via == "nothing":
            self.fail(_REMOTE, address, origin.owner)
            return
        self.note(f"{_shown(address)} is a mailbox on another host")
        place = os.fsdecode(address)
        self.add(Target("remote", None, place, address=origin.address, owner=origin.owner))

    def _follow_final(self, name: bytes, origin: _Origin) -> None:
        """`\\name`: the account, and nothing that steers its mail."""
        outcome, account = self._host.find_account(name)
        if account is None:
            self.fail(outcome, name, origin.owner)
        else:
            self.add(self.mailbox(account, origin))

    def _follow_include(self, path: bytes, origin: _Origin) -> None:
        """A list in a file of its own, which is read once however often it is named."""
        step = ("include", path)
        if step in self._seen:
            return
        found = read_include(self._host, path)
        if isinstance(found, Outcome):
            self._seen.add(step)
            self.fail(found, path, origin.owner)
            return
        members, is_roots = found
        self.note(f"{_shown(path)} lists {len(members)}")
        # What root has written counts as root's only where no other had a say on the way.
        may_run = origin.may_run and is_roots
        self._follow_all(
            step, members, _Origin(None, origin.address, origin.owner, may_run=may_run)
        )

    def _follow_place(self, destination: Destination, origin: _Origin) -> None:
        """A file or a command, which the account that it stands with delivers to."""
        place = os.fsdecode(destination.text)
        account = origin.account or self._host.alias_account()
        if isinstance(account, Outcome):
            self.fail(account, destination.text, origin.owner)
        elif not origin.may_run:
            reason = "files and commands count only in lists that root owns"
            outcome = Outcome(451, "4.3.5", f"{_shown(origin.address)}: {reason}")
            self.fail(outcome, destination.text, origin.owner)
        elif destination.kind == "file":
            kind: TargetKind = "nothing" if place == os.devnull else "file"
            self.note(f"the file {_shown(destination.text)}, written as {account.user}")
            self.add(Target(kind, account, place, address=origin.address, owner=origin.owner))
        elif refusal := self._refuse_command(origin.account):
            self.fail(refusal, destination.text, origin.owner)
        else:
            self.note(f"the command {_shown(destination.text)!r}, run as {account.user}")
            self.add(Target("command", account, place, address=origin.address, owner=origin.owner))

    def _refuse_command(self, account: Account | None) -> Outcome | None:
        """Why no command of this account (None: of the aliases) is run here, if so."""
        if not self._host.config.delivery.commands:
            return _NO_COMMANDS
        if account is None:
            return None
        try:
            entry = passwd.find(account.user)
            with open(SHELLS_FILE, "rb") as file:
                shells = file.read(65_536).split(b"\n")
        except OSError as error:
            return classify_os_error(error, "looking up the user's shell")
        if entry is None or os.fsencode(entry.pw_shell) not in shells:
            return Outcome(451, "4.3.5", f"The shell of {account.user} is not in {SHELLS_FILE}")
        return None


def read_include(host: Host, path: bytes) -> tuple[list[Destination], bool] | Outcome:
    """The members in an `:include:` file, and whether root owns it; an outcome is why not.

    It is read with the rights of `delivery.alias_user`; whoever owns it keeps the list.
    """
    reader = host.alias_account()
    if isinstance(reader, Outcome):
        return reader
    shown = os.fsdecode(path)
    try:
        with host.enter(reader):
            fd = open_trusted(shown, None, nobodys)
        try:
            is_roots = os.fstat(fd).st_uid == 0 and is_below_roots_directories(shown)
            return parse_file(read_whole(shown, fd, _LARGEST_LIST)), is_roots
        finally:
            os.close(fd)
    except Distrusted as distrusted:
        return distrusted.outcome
    except DestinationError as error:
        return Outcome(451, "4.3.5", f"{_shown(path)}: {error}")
    except OSError as error:
        return cannot_read(shown, error)


def is_below_roots_directories(path: str) -> bool:
    """Does root alone decide what stands under `path`: no link, and no directory of others?

    A link leads to what its owner likes, also to files of root's that he has filled himself.
    """
    if os.path.realpath(path) != path:
        return False
    while path != "/":
        path = os.path.dirname(path)
        status = os.stat(path)
        is_open = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid != 0 or is_open:
            return False
    return True


def list_members(host: Host, name: bytes) -> list[Destination] | Outcome | None:
    """Whom the list `name` names itself: mailboxes only, nested lists as their own names.

    Included files count as if they stood there; None where there is no such alias. What a
    list has for files and commands is not told: where nothing is left it stands for itself.
    """
    known = host.aliases()
    if isinstance(known, Outcome):
        return known
    names = [each for each in host.names_of(name) if known.has(each)]
    if not names:
        return None
    found = known.find(names[0]) or []
    members: list[Destination] = []
    for each in found if isinstance(found, list) else []:
        if each.kind == "include":
            included = read_include(host, each.text)
            if isinstance(included, Outcome):
                return included
            members += included[0]
        else:
            members.append(each)
    if isinstance(found, Outcome):
        return found
    shown = [each for each in members if each.kind == "mailbox"]
    return shown or [Destination("mailbox", names[0])]


def name_person(host: Host, name: bytes) -> bytes | Outcome:
    """The name that aliases of one member each lead to; 550 5.1.4 where one is a list.

    An outcome of 451 is for an alias that leads away from this host's mailboxes.
    """
    for _ in range(_DEEPEST):
        known = host.aliases()
        if isinstance(known, Outcome):
            return known
        alias = next((each for each in host.names_of(name) if known.has(each)), b"")
        found = known.find(alias) if alias else None
        if found is None or isinstance(found, Outcome):
            return name if found is None else found
        if len(found) > 1 or found[0].kind == "include" or known.has(b"owner-" + alias):
            return IS_LIST
        member = found[0]
        if member.kind != "mailbox" or (member.domain and not host.is_ours(member.domain)):
            return _REMOTE
        if member.is_final or member.text.lower() == alias.lower():
            return member.text
        name = member.text
    return _LOOP


def _failure(outcome: Outcome, what: bytes = b"", owner: bytes = b"") -> Target:
    return Target("failure", None, address=what, owner=owner, outcome=outcome)


def _shown(name: bytes) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in name[:200].decode("ascii", "replace"))
