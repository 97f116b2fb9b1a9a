"""One transaction, with a recording stand-in for the other process and nothing else unreal."""

from __future__ import annotations

import fcntl
import os
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from mda import log
from mda.config import Config
from mda.content import screen
from mda.model import Copy, Outcome, Path, Peer, Recipient
from mda.receiver import replies
from mda.receiver.domains import Domains
from mda.receiver.grammar import parse_path
from mda.receiver.transaction import Transaction, combine, name_protocol, peer_text

if TYPE_CHECKING:
    from mda.model import Verb

OK = Outcome(250, "2.1.5", "Recipient OK")
DELIVERED = Outcome(250, "2.0.0", "Delivered to mailbox")
AWAY = Outcome(450, "4.2.1", "User is not logged in")
LOCKED = Outcome(451, "4.2.0", "Mailbox is locked")
BUSY = Outcome(450, "4.2.0", "Busy")
NO_ROOM = Outcome(452, "4.3.1", "Insufficient system storage")
FULL = Outcome(552, "5.2.2", "Mailbox full")
FAILED = Outcome(554, "5.6.0", "No")
UNKNOWN = Outcome(550, "5.1.1", "No such user here")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
BOB = Peer("unix", "uid 1002", 1002, "bob", may_use_terminals=True)
STRANGER = Peer("tcp", "192.0.2.9")


class Delivery:
    """One request to deliver, with what the broker would have seen on the descriptor."""

    def __init__(
        self, verb: Verb, copy: Copy, texts: dict[str, tuple[int, int]], more: Any
    ) -> None:
        self.verb = verb
        self.address = copy.address
        self.sender: bytes = more["sender"]
        self.recipient: bytes = more["recipient"]
        self.prefix: bytes = more["prefix"]
        self.block: bytes = more["block"]
        self.is_clipped: bool = more["is_clipped"]
        self.deadline: float = more["deadline"]
        fd, size = texts[copy.forms]
        self.seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        self.text = os.pread(fd, size, 0)
        self.is_whole = os.fstat(fd).st_size == size


class Broker:
    """`wire.Broker` as the session sees it: it answers as it is told, and keeps what came.

    `lists` are the members of names; all other names are persons, but for the `unknown`.
    """

    def __init__(self, form: str = "q") -> None:
        self.form = form
        self.lists: dict[bytes, list[bytes]] = {}
        self.owners: dict[bytes, bytes] = {}
        self.probed: dict[bytes, tuple[Outcome, int]] = {}
        self.outcomes: dict[bytes, Outcome] = {}
        self.unknown = {b"nobody"}
        self.refusals: dict[bytes, Outcome] = {}
        self.resolved: list[tuple[bytes, int, bool, bool]] = []
        self.addresses: list[bytes] = []
        self.texts: dict[str, tuple[int, int]] = {}
        self.deliveries: list[Delivery] = []

    def resolve(
        self,
        verb: Verb,
        local_part: bytes,
        size: int,
        *,
        is_first: bool,
        is_handed_over: bool,
        **_: object,
    ) -> tuple[Outcome, list[Copy]]:
        self.resolved.append((local_part, size, is_first, is_handed_over))
        if local_part in self.unknown:
            return UNKNOWN, []
        if local_part in self.refusals:
            return self.refusals[local_part], []
        owner = self.owners.get(local_part, b"")
        members = self.lists.get(local_part, [local_part])
        return OK, [self._copy(member.lower(), owner) for member in members]

    def _copy(self, address: bytes, owner: bytes) -> Copy:
        if address not in self.addresses:
            self.addresses.append(address)
        return Copy(self.addresses.index(address), self.form, address, owner)

    def probe(self, copy: Copy, _sender: bytes) -> tuple[Outcome, int]:
        return self.probed.get(copy.address, (AWAY, 0))

    def open_spool(self, form: str) -> tuple[Outcome, int]:
        return NO_ROOM, -1

    def offer_text(self, form: str, fd: int, size: int) -> None:
        self.texts[form] = (fd, size)

    def deliver(self, verb: Verb, copy: Copy, **more: object) -> Outcome:
        self.deliveries.append(Delivery(verb, copy, self.texts, more))
        return self.outcomes.get(copy.address, DELIVERED)


def path(text: str) -> Path:
    return parse_path(f"<{text}>".encode())[0]


def begin(
    broker: Broker,
    *recipients: str,
    verb: Verb = "MAIL",
    peer: Peer = BOB,
    config: Config | None = None,
    sender: str = "bob@example.org",
    is_lmtp: bool = False,
) -> Transaction:
    """A transaction whose recipients have been addressed."""
    config = config or Config().with_values("receiver", hostname="mda.test")
    domains = Domains(config, takes_any=is_lmtp or peer.is_trusted)
    transaction = Transaction(
        broker,  # type: ignore[arg-type]
        config,
        peer,
        domains,
        is_lmtp=is_lmtp,
    )
    transaction.helo = "client.example"
    assert transaction.open(verb, path(sender)).is_accepted
    for recipient in recipients:
        assert transaction.address(path(recipient)).is_accepted
    return transaction


def end(transaction: Transaction, text: bytes = b"Subject: x\n\nhello\n") -> list[Outcome]:
    transaction.write(text)
    outcomes = [outcome for _, outcome in transaction.finish()]
    transaction.drop()
    return outcomes


# -- one reply for all recipients -------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "code", "text"),
    [
        ([DELIVERED], 250, "Delivered to mailbox"),
        ([DELIVERED, DELIVERED], 250, "OK"),
        ([LOCKED], 451, "Mailbox is locked"),
        ([BUSY], 450, "Busy"),
        ([FULL], 552, "Mailbox full"),
        ([NO_ROOM], 452, "Insufficient system storage"),
        ([LOCKED, DELIVERED], 451, "<r0> Mailbox is locked"),
        ([DELIVERED, LOCKED], 451, "<r1> Mailbox is locked"),
        ([DELIVERED, BUSY], 451, "<r1> Busy"),
        ([DELIVERED, NO_ROOM], 452, "<r1> Insufficient system storage"),
        ([FULL, DELIVERED], 552, "<r0> Mailbox full"),
        ([DELIVERED, DELIVERED, FAILED], 554, "<r2> No"),
        ([FULL, FAILED], 552, "<r0> Mailbox full"),
        ([FULL, LOCKED], 451, "<r1> Mailbox is locked"),
        ([LOCKED, FULL], 451, "<r0> Mailbox is locked"),
        ([FULL, DELIVERED, NO_ROOM, LOCKED], 452, "<r2> Insufficient system storage"),
    ],
)
def test_one_reply_speaks_for_all_recipients(outcomes: list[Outcome], code: int, text: str) -> None:
    results = [(Recipient(path(f"r{n}"), []), outcome) for n, outcome in enumerate(outcomes)]
    reply = combine(results, "MAIL")
    assert (reply.code, reply.lines) == (code, (text,))
    failed = [outcome for outcome in outcomes if not outcome.is_done]
    assert reply.enhanced in {outcome.enhanced for outcome in failed or [DELIVERED]}


# -- what the terminal is shown ---------------------------------------------------------


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `render` was called with; it renders none the less."""
    calls: list[dict[str, Any]] = []
    render = screen.render

    def record(head: bytes, is_whole: bool, **options: Any) -> tuple[bytes, bool]:
        calls.append({"head": head, "is_whole": is_whole, **options})
        return render(head, is_whole, **options)

    monkeypatch.setattr(screen, "render", record)
    return calls


def test_the_terminals_block_is_made_for_the_sender_the_terminal_and_the_configuration(
    rendered: list[dict[str, Any]],
) -> None:
    broker = Broker()
    broker.probed = {b"alice": (OK, 132)}
    config = Config().with_values("terminal", lines=7, bytes=999, bell=False)
    transaction = begin(broker, "alice", verb="SEND", config=config, sender="root@example.org")
    assert end(transaction) == [DELIVERED]
    call = rendered[0]
    assert re.fullmatch(r"\d\d:\d\d", call.pop("when"))
    assert call == {
        "head": b"Subject: x\n\nhello\n",
        "is_whole": True,
        "sender": "bob",
        "is_verified": True,
        "via": "client.example",
        "width": 132,
        "lines": 7,
        "limit": 999,
        "bell": False,
        "has_mailbox_copy": False,
    }
    assert broker.deliveries[0].block.startswith(b"\r\nMessage from bob (verified)")


def test_whom_the_kernel_does_not_name_is_shown_as_he_claims_to_be(
    rendered: list[dict[str, Any]],
) -> None:
    broker = Broker()
    transaction = begin(broker, "alice", verb="SAML", peer=STRANGER, sender="root@example.org")
    transaction.helo = ""
    end(transaction)
    call = rendered[0]
    assert (call["sender"], call["is_verified"]) == ("<root@example.org>", False)
    assert call["via"] == "[192.0.2.9]"
    assert call["width"] == 80, "no terminal when asked, but there may be one now"


@pytest.mark.parametrize(("verb", "has_copy"), [("SEND", False), ("SOML", True), ("SAML", True)])
def test_only_send_has_no_copy_in_the_mailbox(
    rendered: list[dict[str, Any]], verb: Verb, has_copy: bool
) -> None:
    broker = Broker()
    broker.probed = {b"alice": (OK, 80)}
    end(begin(broker, "alice", verb=verb))
    assert rendered[0]["has_mailbox_copy"] is has_copy


def test_each_recipient_has_a_block_of_his_own_width(rendered: list[dict[str, Any]]) -> None:
    broker = Broker()
    broker.probed = {b"alice": (OK, 40), b"carol": (OK, 100)}
    end(begin(broker, "alice", "carol", verb="SEND"))
    assert [call["width"] for call in rendered] == [40, 100]


@pytest.mark.parametrize(("extra", "is_whole"), [(0, True), (1, False)])
def test_a_block_is_made_from_the_beginning_of_a_large_text(
    rendered: list[dict[str, Any]], extra: int, is_whole: bool
) -> None:
    broker = Broker()
    broker.probed = {b"alice": (OK, 80)}
    text = b"\n" + b"From x\n" * 100
    text += b"y" * (128 * 1024 + extra - len(text))
    end(begin(broker, "alice", verb="SOML"), text)
    assert rendered[0]["is_whole"] is is_whole
    assert rendered[0]["head"] == text[: 128 * 1024], "without mbox quoting"
    assert broker.deliveries[0].is_clipped is True
    assert broker.deliveries[0].text.startswith(b"\n>From x\n>From x\n")


def test_a_text_that_fits_is_not_clipped() -> None:
    broker = Broker()
    broker.probed = {b"alice": (OK, 80)}
    end(begin(broker, "alice", verb="SEND"))
    assert broker.deliveries[0].is_clipped is False


def test_mail_has_no_block(rendered: list[dict[str, Any]]) -> None:
    broker = Broker()
    end(begin(broker, "alice"))
    assert rendered == []
    assert (broker.deliveries[0].block, broker.deliveries[0].is_clipped) == (b"", False)


# -- what the broker is handed ----------------------------------------------------------


def test_the_broker_gets_a_text_that_nobody_can_change() -> None:
    broker = Broker()
    end(begin(broker, "alice", "carol"))
    for delivery in broker.deliveries:
        assert delivery.seals == SEALS
        assert delivery.is_whole
        assert delivery.text == b"Subject: x\n\nhello\n"


def test_all_recipients_share_one_deadline() -> None:
    broker = Broker()
    config = Config().with_values("delivery", lock_seconds=7)
    before = time.monotonic()
    end(begin(broker, "alice", "carol", config=config))
    after = time.monotonic()
    deadlines = {delivery.deadline for delivery in broker.deliveries}
    assert len(broker.deliveries) == 2
    assert len(deadlines) == 1
    assert before + 7 <= deadlines.pop() <= after + 7


def test_one_copy_for_who_is_named_twice_and_the_outcome_for_both() -> None:
    broker = Broker()
    broker.outcomes = {b"alice": FULL}
    assert end(begin(broker, "alice", "carol", "Alice")) == [FULL, DELIVERED, FULL]
    assert [delivery.address for delivery in broker.deliveries] == [b"alice", b"carol"]


def test_each_folder_of_one_user_gets_a_copy() -> None:
    broker = Broker()
    outcomes = end(begin(broker, "alice+lists", "ALICE", "alice+lists", "alice"))
    assert outcomes == [DELIVERED] * 4
    assert [each.address for each in broker.deliveries] == [b"alice+lists", b"alice"]


def test_a_copy_that_needs_it_so_gets_the_text_as_it_is() -> None:
    broker = Broker(form="p")
    end(begin(broker, "alice"), b"Subject: x\n\nFrom me\n")
    (delivery,) = broker.deliveries
    assert delivery.prefix.startswith(b"From bob@example.org ")
    assert delivery.text == b"Subject: x\n\nFrom me\n"


def test_the_time_stamp_tells_a_sole_recipient_and_never_one_of_several() -> None:
    broker = Broker()
    end(begin(broker, "alice@mda.test"))
    end(begin(broker, "alice", "carol"))
    sole, *several = (delivery.prefix for delivery in broker.deliveries)
    assert b"\tfor <alice@mda.test>; " in sole
    assert not any(b"for <" in prefix for prefix in several)


def test_the_lines_before_the_text_are_in_the_order_that_readers_want() -> None:
    broker = Broker()
    end(begin(broker, "alice"))
    lines = broker.deliveries[0].prefix.split(b"\n")
    assert lines[0].startswith(b"From bob@example.org ")
    assert lines[1] == b"Return-Path: <bob@example.org>"
    assert lines[2] == b"Delivered-To: alice@mda.test"
    assert lines[3] == b"Received: from client.example (local user bob, uid 1002)"
    assert lines[4].startswith(b"\tby mda.test with SMTP id ")


def test_the_address_as_it_came_stands_above_the_one_that_it_was_found_to_be() -> None:
    broker = Broker()
    end(begin(broker, "Alice@MDA.test"))
    lines = broker.deliveries[0].prefix.split(b"\n")
    assert lines[2:4] == [b"X-Original-To: Alice@MDA.test", b"Delivered-To: alice@mda.test"]


def test_a_copy_tells_nothing_of_the_other_recipients() -> None:
    broker = Broker()
    end(begin(broker, "alice@mda.test", "carol@mda.test"))
    alices, carols = (delivery.prefix for delivery in broker.deliveries)
    assert b"carol" not in alices
    assert b"alice" not in carols


@pytest.mark.parametrize(
    ("header", "is_loop"),
    [
        (b"Received: by us\nDelivered-To: alice@mda.test\n", True),
        (b"Received: by us\nSubject: x\ndelivered-to:alice@mda.test \n", True),
        (b"Received: by us\nDelivered-To: bob@mda.test\nDelivered-To: alice@mda.test\n", True),
        (b"Delivered-To: alice@mda.test\nReceived: by us\n", False),
        (b"Received: by us\nDelivered-To: Alice@mda.test\n", False),
        (b"Received: by us\nDelivered-To: alice@elsewhere\n", False),
        (b"Received: by us\n\nDelivered-To: alice@mda.test\n", False),
        (b"Received: by us\nX-Delivered-To: alice@mda.test\n", False),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_message_that_has_been_here_before_is_a_loop(
    header: bytes, is_loop: bool, size: int
) -> None:
    broker = Broker()
    transaction = begin(broker, "alice", "carol")
    for at in range(0, len(header), size):
        transaction.write(header[at : at + size])
    alices, carols = end(transaction, b"\nhello\n")
    assert carols == DELIVERED, "a loop is one recipient's alone"
    if is_loop:
        assert alices == Outcome(554, "5.4.6", "Delivered here before: a mail loop")
    else:
        assert alices == DELIVERED


def test_a_lists_copies_go_out_in_its_owners_name() -> None:
    broker = Broker()
    broker.lists = {b"staff": [b"alice", b"carol"]}
    broker.owners = {b"staff": b"owner-staff"}
    assert end(begin(broker, "staff@mda.test")) == [
        Outcome(250, "2.1.5", "Delivered to all 2 members")
    ]
    for delivery, member in zip(broker.deliveries, (b"alice", b"carol"), strict=True):
        lines = delivery.prefix.split(b"\n")
        assert lines[0].startswith(b"From owner-staff@mda.test ")
        assert lines[1:4] == [
            b"Return-Path: <owner-staff@mda.test>",
            b"X-Original-To: staff@mda.test",
            b"Delivered-To: %b@mda.test" % member,
        ]
        assert delivery.sender == b"owner-staff@mda.test"
        assert delivery.recipient == b"staff@mda.test"


def test_a_host_that_needs_a_mend_says_no_more_to_strangers() -> None:
    broker = Broker()
    broker.refusals = {b"alice": Outcome(451, "4.3.5", "/home/alice/.forward is odd")}
    for peer, text in ((BOB, "<alice> /home/alice/.forward is odd"), (STRANGER, "Mail for this")):
        transaction = begin(broker, peer=peer)
        reply = transaction.address(path("alice"))
        assert (reply.code, reply.enhanced) == (451, "4.3.5")
        assert reply.lines[0].startswith(text)
        transaction.drop()


def test_a_notice_to_a_list_keeps_the_null_reverse_path() -> None:
    broker = Broker()
    broker.owners = {b"staff": b"owner-staff"}
    end(begin(broker, "staff", sender=""))
    assert b"\nReturn-Path: <>\n" in broker.deliveries[0].prefix


def test_a_member_named_twice_gets_one_copy() -> None:
    broker = Broker()
    broker.lists = {b"staff": [b"alice", b"carol"], b"all": [b"carol", b"bob", b"alice"]}
    end(begin(broker, "staff", "carol", "all"))
    assert [each.address for each in broker.deliveries] == [b"alice", b"carol", b"bob"]


def test_a_new_transaction_begins_a_new_table() -> None:
    broker = Broker()
    config = Config().with_values("receiver", hostname="mda.test")
    end(begin(broker, "alice", "carol", config=config))
    end(begin(broker, "alice", config=config, is_lmtp=True))
    assert [(first, handed) for _, _, first, handed in broker.resolved] == [
        (True, False),
        (False, False),
        (True, True),
    ]
    config = config.with_values("recipients", mta_expands=False)
    end(begin(broker, "alice", config=config, is_lmtp=True))
    assert broker.resolved[-1] == (b"alice", 0, True, False)


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (BOB, "local user bob, uid 1002"),
        (Peer("unix", "uid 0", 0), "local, uid 0"),
        (Peer("stream"), "local"),
        (STRANGER, "[192.0.2.9]"),
        (Peer("tcp", "2001:db8::1"), "[IPv6:2001:db8::1]"),
    ],
)
def test_the_time_stamp_says_what_the_kernel_knows_of_the_peer(peer: Peer, text: str) -> None:
    assert peer_text(peer) == text


# -- the text is not to be had ----------------------------------------------------------


def test_a_text_that_cannot_be_kept_is_delivered_to_nobody() -> None:
    broker = Broker()
    config = Config().with_values("delivery", memory=100)
    outcomes = end(begin(broker, "alice", "carol", config=config), b"\n" + b"x" * 200)
    assert outcomes == [NO_ROOM, NO_ROOM]
    assert broker.deliveries == []


def test_a_text_that_is_too_large_is_delivered_to_nobody() -> None:
    broker = Broker()
    config = Config().with_values("receiver", message_size=65_536)
    transaction = begin(broker, "alice", config=config)
    transaction.write(b"\n" + b"x" * 65_535)
    assert [outcome.code for outcome in end(transaction, b"y")] == [552]
    assert broker.deliveries == []


def test_no_descriptor_is_left_after_a_transaction() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        end(begin(Broker(), "alice"))
    assert os.listdir("/proc/self/fd") == before


# -- whose mail it is -------------------------------------------------------------------


def reply_to(recipient: str, config: Config, peer: Peer = BOB, *, is_lmtp: bool = False) -> int:
    transaction = begin(Broker(), config=config, peer=peer, is_lmtp=is_lmtp)
    return transaction.address(path(recipient)).code


DOMAINS = Config().with_values("receiver", hostname="Mda.test", local_domains=("Example.org",))


@pytest.mark.parametrize(
    ("recipient", "code"),
    [
        ("alice", 250),
        ("alice@mda.TEST", 250),
        ("alice@eXample.org", 250),
        ("alice@sub.example.org", 550),
        ("alice@example.or", 550),
        ("alice@localhost", 550),
        ("alice@[127.0.0.1]", 250),
        ("alice@[192.0.2.77]", 550),
    ],
)
def test_local_are_the_named_domains_our_own_name_and_our_addresses(
    recipient: str, code: int
) -> None:
    assert reply_to(recipient, DOMAINS) == code


@pytest.mark.parametrize(
    ("peer", "is_lmtp"), [(Peer("unix", "uid 106", 106, is_trusted=True), False), (STRANGER, True)]
)
def test_for_a_transport_agent_every_domain_is_local(peer: Peer, is_lmtp: bool) -> None:
    assert reply_to("alice@far.example", DOMAINS, peer, is_lmtp=is_lmtp) == 250


def test_rcpt_is_refused_before_the_broker_is_asked_where_the_domain_is_not_ours() -> None:
    broker = Broker()
    transaction = begin(broker, config=DOMAINS)
    assert transaction.address(path("alice@far.example")) is replies.RELAYING_DENIED
    assert broker.resolved == []


@pytest.mark.parametrize(
    ("verb", "probed", "code", "text"),
    [
        ("MAIL", AWAY, 250, "<alice> Recipient OK"),
        ("SEND", AWAY, 450, "<alice> User is not logged in"),
        ("SOML", AWAY, 250, "<alice> User not active now, so will do mail"),
        ("SAML", AWAY, 250, "<alice> User not active now, so will do mail"),
        ("SEND", OK, 250, "<alice> Recipient OK"),
        ("SOML", OK, 250, "<alice> Recipient OK"),
    ],
)
def test_only_send_needs_a_terminal_at_rcpt(
    verb: Verb, probed: Outcome, code: int, text: str
) -> None:
    broker = Broker()
    broker.probed = {b"alice": (probed, 80)}
    reply = begin(broker, verb=verb).address(path("alice"))
    assert (reply.code, reply.lines) == (code, (text,))


# -- the log ----------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(log, "_write", lambda priority, line: lines.append((priority, line)))
    return lines


@pytest.mark.parametrize(
    ("outcome", "event", "priority"),
    [
        (DELIVERED, "delivered", log.INFO),
        (LOCKED, "deferred", log.WARNING),
        (FULL, "failed", log.WARNING),
    ],
)
def test_each_outcome_is_one_line(
    logged: list[tuple[int, str]], outcome: Outcome, event: str, priority: int
) -> None:
    broker = Broker()
    broker.outcomes = {b"alice": outcome}
    end(begin(broker, "alice@mda.test"))
    (line,) = logged
    assert line[0] == priority
    reply = f"{outcome.code} {outcome.enhanced} {outcome.text}"
    assert re.fullmatch(
        rf"{event} id=[0-9a-f.]+ verb=MAIL to=alice@mda\.test user=alice sender=bob@example\.org "
        rf'peer="uid 1002" size=18 reply="{re.escape(reply)}"',
        line[1],
    )
    identity = line[1].split()[1].removeprefix("id=")
    assert f" id {identity}".encode() in broker.deliveries[0].prefix


def test_each_refusal_is_one_line_too(logged: list[tuple[int, str]]) -> None:
    broker = Broker()
    transaction = begin(broker, config=DOMAINS)
    transaction.address(path("alice@far.example"))
    transaction.address(path("nobody"))
    who = 'sender=bob@example.org peer="uid 1002"'
    denied = f"550 5.7.1 {replies.RELAYING_DENIED.lines[0]}"
    assert [line for _, line in logged] == [
        f'refused to=alice@far.example {who} reply="{denied}"',
        f'refused to=nobody {who} reply="550 5.1.1 <nobody> No such user here"',
    ]


def test_an_accepted_recipient_is_no_line_yet(logged: list[tuple[int, str]]) -> None:
    begin(Broker(), "alice", "carol")
    assert logged == []


@pytest.mark.parametrize(
    ("pieces", "is_refused"),
    [
        ([b"x" * 998 + b"\n"], False),
        ([b"x" * 999 + b"\n"], True),
        ([b"x" * 500, b"x" * 498, b"\n", b"y" * 998], False),
        ([b"x" * 500, b"x" * 499 + b"\ny\n"], True),
        ([b"a\n" + b"x" * 500, b"x" * 499], True),
        ([b"x" * 998 + b"\n" + b"x" * 998 + b"\n", b"x"], False),
        ([b"y\n" * 2000 + b"x" * 998 + b"\n" + b"y\n" * 2000], False),
        ([b"y\n" * 2000 + b"x" * 999 + b"\n" + b"y\n" * 2000], True),
        ([b"x" * 500, b"\n" + b"y" * 999 + b"\nz\n"], True),
        ([b"x" * 998, b"x", b"\n"], True),
    ],
)
def test_a_text_line_is_measured_in_any_pieces(pieces: list[bytes], is_refused: bool) -> None:
    config = Config().with_values("receiver", text_line=1000)
    broker = Broker()
    transaction = begin(broker, "alice", config=config)
    for piece in pieces:
        transaction.write(piece)
    (outcome,) = [outcome for _, outcome in transaction.finish()]
    assert (outcome.code == 554) == is_refused
    assert bool(broker.deliveries) != is_refused


def test_what_the_protocol_has_against_a_text_is_everybodys_outcome() -> None:
    broker = Broker()
    transaction = begin(broker, "alice", "bob")
    transaction.write(b"a\rb\n")
    outcomes = [outcome for _, outcome in transaction.finish(replies.BARE_NEWLINE)]
    assert [(each.code, each.enhanced) for each in outcomes] == [(554, "5.6.0")] * 2
    assert broker.deliveries == []


def test_the_time_stamp_names_the_protocol_of_a_utf8_transaction() -> None:
    assert name_protocol("ESMTP", is_utf8=True) == "UTF8SMTP"
    assert name_protocol("LMTP", is_utf8=True) == "UTF8LMTP"
    assert [name_protocol(each, is_utf8=False) for each in ("SMTP", "ESMTP", "LMTP")] == [
        "SMTP",
        "ESMTP",
        "LMTP",
    ]
