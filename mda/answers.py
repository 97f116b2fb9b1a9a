"""The requests of one session, answered: what names mean, who is at a terminal, deliveries.

A request is fields from a process that parses what the network says, and is believed in
nothing: it names targets by their numbers in a table that is kept here (`wire.py`).
"""

from __future__ import annotations

import os
import time

from mda import wire
from mda.config import largest_text
from mda.delivery.copies import Copies, Message, name_place
from mda.delivery.deliver import run
from mda.model import VERBS, Outcome, Target, Wish, will_forward
from mda.recipients import expand, fullname
from mda.rights import remote_peer
from mda.terminal.terminals import Terminals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.broker import Identities
    from mda.config import Config
    from mda.model import Account, Peer

_FOUND = Outcome(250, "2.1.5", "Recipient OK")
_NO_RELAY = Outcome(550, "5.7.1", "No mail leaves this host from here")
_NO_NAMES = Outcome(550, "5.7.1", "Names are not for this peer")
_LEADS_ELSEWHERE = Outcome(550, "5.1.1", "The address leads elsewhere by now")
_NOTHING_FAILED = Outcome(451, "4.3.0", "Nothing that another try could mend")
_LONGEST_WORD = 500
_ROWS = Outcome(250, "2.0.0", "Rows")
_TAKEN = Outcome(250, "2.0.0", "Text")
_NO_TURN = Outcome(502, "5.5.1", "The peer is no host that may turn the channel")
_NOTICES_EACH = 3  # to each sender: of what was delivered, of lists, and of what was not
_MOST_TARGETS = 20_000  # of one transaction
_LARGEST_DECLARED = 1 << 64
_LATEST_DEADLINE = 1 << 60


class Answers:
    """The requests of one session, each answered by a frame and maybe a descriptor."""

    def __init__(self, config: Config, peer: Peer, identities: Identities) -> None:
        self._config = config
        self._peer = peer
        self.identities = identities
        self.host = expand.Host(
            config,
            identities.only_uid,
            identities.as_user,
            tells_moved=self._tells_moved(),
        )
        self.copies = Copies(config, identities)
        self.terminals = Terminals(config, peer, identities, self.host.is_ours)
        # Of the transaction in hand: what its addresses mean, by number.
        self._targets: list[Target] = []
        self._asked: list[bytes] = []
        self._numbers: dict[tuple[str, int, str], int] = {}
        # Of the last message: its senders, whom notices may go to, and how many it has served
        # and told. A session gone astray has not many more notices than it has delivered.
        self._senders: set[bytes] = set()
        self._served = 0
        self._told = 0
        self._rows: list[bytes] = []
        # The host whose mail the peer is to get when the session is over, or "".
        self.turned_to = ""

    def _tells_moved(self) -> bool:
        """May the peer know where the mail of who has moved goes?"""
        told = self._config.recipients.tell_forwarding
        return told == "everybody" or (told == "names" and self._peer.may_ask_names)

    def answer(self, request: list[bytes], fd: int) -> tuple[bytes, int]:
        """One request; raises WireError for anything but a request of `wire.py`."""
        match request:
            case [wire.RESOLVE | wire.EXPAND | wire.VERIFY | wire.ROWS | wire.WHO, *_]:
                return self._answer_about_names(request), -1
            case [wire.PROBE, number, sender]:
                outcome, width = self.terminals.probe(self._target(number), sender)
                return wire.pack_outcome(outcome, b"%d" % width), -1
            case [wire.SPOOL, form] if form in wire.FORMS:
                outcome, spool_fd = self.copies.open_spool(form)
                return wire.pack_outcome(outcome), spool_fd
            case [wire.TEXT, form, size] if form in wire.FORMS:
                self.copies.take_text(form, fd, wire.read_number(size, largest_text(self._config)))
                return wire.pack_outcome(_TAKEN), -1
            case [wire.DELIVER, *fields]:
                return wire.pack_outcome(self._deliver(fields)), -1
            case [(wire.PEER | wire.TURN) as kind, word]:
                outcome = self._stand_for(word) if kind == wire.PEER else self._turn(word)
                return wire.pack_outcome(outcome), -1
            case [wire.QUEUE, *fields]:
                return wire.pack_outcome(self._queue(fields)), -1
        raise wire.WireError("unknown request")

    def _stand_for(self, address: bytes) -> Outcome:
        """The peer is a proxy, or one that may say for whom it stands: that is the peer now."""
        if not (self._peer.is_proxy or self._peer.may_xclient):
            raise wire.WireError("a peer that stands for itself")
        peer = remote_peer(read_word(address), self._config)
        peer.may_xclient = self._peer.may_xclient
        peer.is_proxy = False
        self._peer = peer
        self._begin(is_notice=False)
        self.host.tells_moved = self._tells_moved()
        self.terminals = Terminals(self._config, peer, self.identities, self.host.is_ours)
        return _TAKEN

    def _turn(self, name: bytes) -> Outcome:
        """May the peer, which calls itself so, have what waits for the host of that name?"""
        host = read_word(name).lower().rstrip(".")
        if host not in self._peer.turn_hosts:
            return _NO_TURN
        self.turned_to = host
        return _TAKEN

    def _answer_about_names(self, request: list[bytes]) -> bytes:
        match request:
            case [wire.RESOLVE, *fields]:
                outcome, self._rows = self._resolve(fields)
            case [wire.EXPAND, string]:
                outcome, self._rows = self._list_members(string)
            case [wire.WHO]:
                outcome, self._rows = self.terminals.list_logins()
            case [wire.ROWS, begin]:
                at = wire.read_number(begin, len(self._rows))
                return wire.pack_rows(_ROWS, self._rows, at)
            case [wire.VERIFY, string, kind]:
                outcome, *names = self._verify(string, may_be_full_name=kind == b"anything")
                return wire.pack_outcome(outcome, *map(os.fsencode, names))
            case _:
                raise wire.WireError("unknown request")
        return wire.pack_rows(outcome, self._rows)

    def _resolve(self, fields: list[bytes]) -> tuple[Outcome, list[bytes]]:
        """The targets of one address, as rows for the session; each has a number here."""
        match fields:
            case [verb, local_part, size, (b"first" | b"next") as place, *more] if (
                verb in VERBS and len(more) == 4
            ):
                declared = wire.read_number(size, _LARGEST_DECLARED)
            case _:
                raise wire.WireError("malformed request")
        if place == b"first":
            self._begin(is_notice=more[0] == b"notice")
        targets = self._find_targets(verb, local_part, *more)
        if verb != b"SEND":
            targets = [self._refuse_full(target, declared) for target in targets]
        outcome = self.judge(targets)
        if outcome.is_done and len(self._targets) + len(targets) > _MOST_TARGETS:
            outcome = Outcome(452, "4.5.3", "Too many members of too many lists")
        if not outcome.is_done:
            return outcome, []
        rows = []
        for target in targets:
            number = b"%d" % self._number(target, local_part)
            way = b"away" if target.leaves else b"here"
            forms = target.forms.encode("ascii")
            rows.append(wire.pack(number, forms, target.address, target.owner, way))
        return outcome, rows

    def judge(self, targets: list[Target]) -> Outcome:
        """What RCPT is told about an address with these targets, of which there is one."""
        outcome = judge_targets(targets)
        path = expand.moved_to(targets) if self.host.tells_moved else b""
        return will_forward(path) if path and outcome.is_done else outcome

    def _find_targets(
        self,
        verb: bytes,
        local_part: bytes,
        origin: bytes,
        only: bytes,
        domain: bytes,
        route: bytes,
    ) -> list[Target]:
        """Those of another host's mailbox, of the one place that is asked for, or of a name."""
        if domain:
            return [self._relay(local_part, domain, route, is_notice=origin == b"notice")]
        if only:
            return self._pick(local_part, only)
        return self._expand(local_part, verb, is_handed_over=origin == b"handed-over")

    def _expand(self, local_part: bytes, verb: bytes, *, is_handed_over: bool) -> list[Target]:
        return expand.expand(
            self.host,
            local_part,
            VERBS[verb],
            is_final=lambda account: is_handed_over and self._is_final(account),
        )

    def _pick(self, local_part: bytes, only: bytes) -> list[Target]:
        """The one place that has failed before, or what has taken its place since.

        What cannot be followed now may lead there again. A person's mail that can no longer
        go where it should have gone, since the person has changed that or the host where
        mailboxes are, is for the mailbox.
        """
        if not self._peer.is_queue:
            raise wire.WireError("a place that only the queue may ask for")
        targets = [
            target
            for is_handed_over in (False, True)
            for target in self._expand(local_part, b"MAIL", is_handed_over=is_handed_over)
        ]
        uid = only.partition(b".")[0]
        found = [each for each in targets if name_place(each).encode("ascii") == only]
        found += [each for each in targets if each.outcome and each.outcome.is_temporary]
        found += [
            each
            for each in targets
            if each.kind == "mailbox" and each.account and b"%d" % each.account.uid == uid
        ]
        found.append(Target("failure", None, address=local_part, outcome=_LEADS_ELSEWHERE))
        return found[:1]

    def _relay(self, local_part: bytes, domain: bytes, route: bytes, *, is_notice: bool) -> Target:
        """The target for a mailbox of another host, for who may relay, and for a notice."""
        most = _NOTICES_EACH * min(len(self._senders), self._served)
        if is_notice and self._told < most:
            self._told += 1
        elif is_notice:
            return Target("failure", None, address=local_part, outcome=_NO_RELAY)
        elif not self._peer.may_relay:
            raise wire.WireError("a relay that is not for this peer")
        if self.identities.only_uid is not None or self._config.outbound.via == "nothing":
            return Target("failure", None, address=local_part, outcome=_NO_RELAY)
        place = os.fsdecode(b"%b@%b" % (local_part, domain))
        return Target("relay", None, place, route=route)

    def _is_final(self, account: Account) -> bool:
        """Is a handed over message for this person to go no further?

        From a program, yes; but a person is no MTA, unless one has made him run us for
        his own mail.
        """
        return self._peer.user in ("", account.user)

    def _begin(self, *, is_notice: bool) -> None:
        """A new transaction: nothing that the last one was told is true any more."""
        self.host.forget()
        if not is_notice:
            self._senders.clear()
            self._served = self._told = 0
        self._targets.clear()
        self._asked.clear()
        self._numbers.clear()
        self.copies.begin()

    def _refuse_full(self, target: Target, declared: int) -> Target:
        """The target, or a failure in the place of a mailbox with no room for that many bytes."""
        if target.forwards:
            target.forwards = [self._refuse_full(each, declared) for each in target.forwards]
            return target
        full = self.copies.judge_quota(target, max(1, declared))
        if full is None:
            return target
        return Target("failure", None, address=target.address, outcome=full)

    def _number(self, target: Target, local_part: bytes) -> int:
        """The target's place in the table; one place that is named twice has one."""
        known = self._numbers.get(target.key)
        if known is not None and target.kind != "failure":
            return known
        self._targets.append(target)
        self._asked.append(local_part)
        self._numbers[target.key] = len(self._targets) - 1
        return len(self._targets) - 1

    def _target(self, number: bytes) -> Target:
        if not self._targets:
            raise wire.WireError("no such target")
        return self._targets[wire.read_number(number, len(self._targets) - 1)]

    def _verify(self, string: bytes, *, may_be_full_name: bool) -> tuple[Outcome, str, str]:
        """Whose mailbox `string` is or, where that is allowed, who is called so."""
        if not self._peer.may_ask_names:
            return _NO_NAMES, "", ""
        if string.lower() == b"postmaster":
            outcome, account = self.host.find_account(string)
            return outcome, "postmaster" if account else "", ""
        self.host.forget()
        name = expand.name_person(self.host, string)
        if name is not expand.IS_LIST and (moved := self._verify_moved(string)):
            return moved
        if isinstance(name, Outcome):
            return name, "", ""
        outcome, account = self.host.find_account(name)
        recipients = self._config.recipients
        if outcome.code == 550 and may_be_full_name and self._config.receiver.vrfy_names:
            persons = (recipients.uid_min, recipients.uid_max)
            outcome, user = fullname.find_person(string, persons, self.identities.only_uid)
            if outcome.is_done:
                outcome, account = self.host.find_account(os.fsencode(user))
        if account is None:
            return outcome, "", ""
        return outcome, account.user, self._full_name(account.user)

    def _verify_moved(self, name: bytes) -> tuple[Outcome, str, str] | None:
        """The answer about somebody whose mail goes to another host; None for anybody else."""
        targets = self._expand(name, b"MAIL", is_handed_over=False)
        refusal = targets[0].outcome
        if refusal and refusal.enhanced == "5.1.6":
            return refusal, "", ""
        path = expand.moved_to(targets)
        if not path:
            return None
        if not self.host.tells_moved:
            return _FOUND, os.fsdecode(name), ""
        return will_forward(path), os.fsdecode(path), ""

    def _full_name(self, user: str) -> str:
        try:
            return fullname.full_name(user)
        except OSError:
            return ""

    def _list_members(self, name: bytes) -> tuple[Outcome, list[bytes]]:
        """One row for each member of a list: local part, domain and full name."""
        if not self._peer.may_ask_names:
            return _NO_NAMES, []
        self.host.forget()
        found = expand.list_members(self.host, name)
        if found is None:
            return Outcome(550, "5.1.1", "No such list here"), []
        if isinstance(found, Outcome):
            return found, []
        rows = []
        for each in found[:_MOST_TARGETS]:
            is_ours = not each.domain or self.host.is_ours(each.domain)
            account = self.host.find_account(each.text)[1] if is_ours else None
            full_name = self._full_name(account.user) if account else ""
            rows.append(wire.pack(each.text, each.domain, os.fsencode(full_name)))
        return Outcome(250, "2.1.5", "Members"), rows

    def _deliver(self, fields: list[bytes]) -> Outcome:
        """One copy, by the verb table: the mailbox's step, and the terminal's."""
        if len(fields) != 8 or fields[0] not in VERBS:
            raise wire.WireError("malformed request")
        verb, number, sender, recipient, prefix, block, clipped, deadline = fields
        latest = time.monotonic() + self._config.delivery.lock_seconds
        asked = wire.read_number(deadline, _LATEST_DEADLINE) / 1000
        until = min(asked + self.copies.seconds_of_commands, latest)
        if not prefix.startswith(b"From ") or not prefix.endswith(b"\n"):
            raise wire.WireError("a delivery without a From_ line")
        target = self._target(number)
        if target.kind == "relay":
            raise wire.WireError("a delivery where there is no mailbox")
        message = Message(sender, recipient, prefix, until)
        outcome = run(
            VERBS[verb],
            clipped == b"clipped",
            lambda: self.copies.mail(target, message),
            lambda: self.terminals.show(target, sender, block),
        )
        self._count(sender, outcome)
        return outcome

    def _count(self, sender: bytes, outcome: Outcome) -> None:
        self._senders.add(sender)
        self._served += outcome.is_done

    def _queue(self, fields: list[bytes]) -> Outcome:
        """One message into the queue, for targets that leave us and for those that failed."""
        match fields:
            case [
                verb,
                sender,
                head,
                (b"utf8" | b"ascii") as charset,
                (b"" | b"FULL" | b"HDRS") as ret,
                envid,
                *copies,
            ] if verb in VERBS and copies and len(copies) % 3 == 0:
                pass
            case _:
                raise wire.WireError("malformed request")
        if head and not head.endswith(b"\n"):
            raise wire.WireError("header lines without an end")
        items = []
        for number, notify, original in zip(*[iter(copies)] * 3, strict=True):
            wish = read_wish(notify, original)
            target = self._target(number)
            if target.kind == "relay" and sender and not self._peer.may_relay:
                raise wire.WireError("a notice that has a sender")
            places = [target] if target.leaves else self.copies.failed(target)
            asked = self._asked[int(number)]
            items += [(place, asked, wish) for place in places]
        if not items:
            return _NOTHING_FAILED
        outcome = self.copies.queue(
            VERBS[verb],
            sender,
            head,
            items,
            is_utf8=charset == b"utf8",
            ret=ret.decode("ascii"),
            envid=read_word(envid),
        )
        if sender:
            self._count(sender, outcome)
        return outcome


def read_wish(notify: bytes, original: bytes) -> Wish:
    """What a copy's sender wants to be told; raises WireError for what no RCPT can have said."""
    words = read_word(notify).split(",")
    if not set(words) <= {"", "NEVER", "SUCCESS", "FAILURE", "DELAY"}:
        raise wire.WireError("no wish for notices")
    return Wish(",".join(words), read_word(original).encode("ascii"))


def read_word(field: bytes) -> str:
    """A field that is one printable word, or empty; raises WireError."""
    if len(field) > _LONGEST_WORD or not all(33 <= octet < 127 for octet in field):
        raise wire.WireError("a word that is none")
    return field.decode("ascii")


def judge_targets(targets: list[Target]) -> Outcome:
    """What RCPT is told about an address with these targets, of which there is one.

    Without a queue one that cannot be reached now holds up the others (decision 3).
    """
    outcomes = [
        judge_targets(each.forwards) if each.forwards else each.outcome or _FOUND
        for each in targets
    ]
    failed = [each for each in outcomes if not each.is_done]
    for each in failed:
        if each.is_temporary:
            return each
    return _FOUND if len(failed) < len(outcomes) else failed[0]
