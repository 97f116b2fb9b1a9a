"""The undeliverable-mail notice: what it says, who gets it, and what is said to the client."""

from __future__ import annotations

import email
import os
from typing import Any

import pytest
from support.sandbox import UIDS, Sandbox

from mda.model import Outcome
from mda.outbound.notice import Row, compose

FULL = Outcome(552, "5.2.2", "Mailbox full")
GONE = Outcome(550, "5.1.1", "No such user here")
QUOTA = "[delivery]\nquota_size = 3000\n"


def notice(**other: object) -> bytes:
    arguments = {
        "name": "mda.test",
        "to": b"bob@mda.test",
        "rows": [Row(b"alice@mda.test", FULL), Row(b"gone@mda.test", GONE, host="far.example")],
        "head": b"Subject: lunch\nX-Odd: \xff\x1b[2J\n\nsecret\n",
        "when": 86_400.0,
    }
    return compose(**{**arguments, **other})  # type: ignore[arg-type]


def parts(text: bytes) -> list[Any]:
    message = email.message_from_bytes(text)
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    found: Any = message.get_payload()
    assert isinstance(found, list)
    return found


def test_a_notice_is_for_the_sender_and_answers_nobody() -> None:
    message = email.message_from_bytes(notice())
    assert message["From"] == "Mail Delivery System <MAILER-DAEMON@mda.test>"
    assert message["To"] == "<bob@mda.test>"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["Date"]
    assert message["Message-ID"].endswith("@mda.test>")


def test_a_notice_names_each_failure_for_people_and_for_programs() -> None:
    text, status, header = parts(notice())
    assert text.get_content_type() == "text/plain"
    words = text.get_payload(decode=True)
    assert words == (
        b"Sorry bob, your message to alice@mda.test lost.\n"
        b"mda.test said this:\n"
        b'   "552 5.2.2 Mailbox full"\n\n'
        b"Sorry bob, your message to gone@mda.test lost.\n"
        b"far.example said this:\n"
        b'   "550 5.1.1 No such user here"\n\n'
        b"This is the mail system of mda.test."
    )
    assert status.get_content_type() == "message/delivery-status"
    blocks = status.get_payload()
    assert blocks[0]["Reporting-MTA"] == "dns; mda.test"
    assert [dict(block.items()) for block in blocks[1:]] == [
        {
            "Final-Recipient": "rfc822; alice@mda.test",
            "Action": "failed",
            "Status": "5.2.2",
            "Diagnostic-Code": "smtp; 552 5.2.2 Mailbox full",
        },
        {
            "Final-Recipient": "rfc822; gone@mda.test",
            "Action": "failed",
            "Status": "5.1.1",
            "Remote-MTA": "dns; far.example",
            "Diagnostic-Code": "smtp; 550 5.1.1 No such user here",
        },
    ]
    assert header.get_content_type() == "text/rfc822-headers"
    assert header.get_payload() == "Subject: lunch\nX-Odd: ??[2J"


def test_a_notice_is_ascii_whatever_it_is_about() -> None:
    text = notice(
        to="zo\u00eb@mda.test".encode(),
        rows=[Row("j\u00f6rg\n x<y>@mda.test".encode(), FULL)],
        head=b"\xff" * 100_000,
    )
    assert text.isascii()
    assert len(text) < 20_000
    blocks = parts(text)[1].get_payload()
    assert blocks[1]["Final-Recipient"].split()[-1] == (
        "j\\x{F6}rg\\x{0A}\\x{20}x\\x{3C}y\\x{3E}@mda.test"
    )
    assert b"\nTo: <zo\\x{EB}@mda.test>\n" in text


@pytest.mark.parametrize(
    ("head", "is_given_back"),
    [
        (b"Subject: lunch\n\nFrom me\n.\n", True),
        (b"Subject: lunch\n\n" + b"x" * 998 + b"\n", True),
        (b"Subject: lunch\n\n" + b"x" * 999 + b"\n", False),
        (b"Subject: lunch\n\n" + b"x\n" * 30_000, False),
        (b"Subject: lunch\n\ncaf\xe9\n", False),
        (b"Subject: lunch\n\na\rb\n", False),
        (b"Subject: lunch\n\na\0b\n", False),
    ],
)
def test_a_message_that_is_small_and_plain_comes_back_whole(
    head: bytes, is_given_back: bool
) -> None:
    text = notice(head=head, is_whole=True)
    assert text.isascii()
    assert len(text) < 80_000
    given = parts(text)[2]
    kind = given.get_content_type()
    assert kind == ("message/rfc822" if is_given_back else "text/rfc822-headers")
    if is_given_back:
        assert head in text
    else:
        assert given.get_payload() == "Subject: lunch"
    assert parts(notice(head=head))[2].get_content_type() == "text/rfc822-headers"


def send(sandbox: Sandbox, *recipients: str, sender: str, protocol: str = "smtp") -> list[bytes]:
    """One message of some size after alice's mailbox has been filled; the last replies."""
    box = sandbox.root / "mail/alice"
    box.write_bytes(b"x" * 2900)
    os.chown(box, UIDS["alice"], 8)
    hello = b"LHLO x\r\n" if protocol == "lmtp" else b"HELO x\r\n"
    lines = hello + f"MAIL FROM:<{sender}>\r\n".encode()
    lines += b"".join(f"RCPT TO:<{each}>\r\n".encode() for each in recipients)
    lines += b"DATA\r\nSubject: x\r\n\r\n" + b"y" * 200 + b"\r\n.\r\nQUIT\r\n"
    said = sandbox.converse(lines, config=QUOTA, protocol=protocol)
    return said[said.index(b"354 Start mail input; end with <CRLF>.<CRLF>") + 1 : -1]


def test_who_is_served_is_served_and_the_sender_is_told_of_the_others(sandbox: Sandbox) -> None:
    assert send(sandbox, "alice@mda.test", "carol", sender="bob@mda.test") == [
        b"250 2.0.0 OK for some; the sender gets a notice about the others"
    ]
    assert b"Subject: x\n" in (sandbox.mailbox("carol") or b"")
    kept = sandbox.mailbox("bob") or b""
    assert kept.startswith(b"From MAILER-DAEMON ")
    assert b"\nReturn-Path: <>\n" in kept
    assert b"\nFinal-Recipient: rfc822; alice@mda.test\n" in kept
    assert b"\nSubject: Undeliverable mail\n" in kept
    assert b"\n\n" + b"y" * 200 + b"\n" in kept, "the text is sent back"


@pytest.mark.parametrize("sender", ["", "nobody-here@mda.test"])
def test_without_a_mailbox_for_the_notice_the_client_hears_of_it(
    sandbox: Sandbox, sender: str
) -> None:
    (reply,) = send(sandbox, "carol", "alice", sender=sender)
    assert reply == b"552 5.2.2 <alice> Mailbox full"


def test_a_notice_that_cannot_be_kept_leaves_the_failure_to_the_client(sandbox: Sandbox) -> None:
    (sandbox.root / "mail/bob").mkdir()
    try:
        (reply,) = send(sandbox, "carol", "alice", sender="bob@mda.test")
        assert reply == b"552 5.2.2 <alice> Mailbox full"
    finally:
        (sandbox.root / "mail/bob").rmdir()


def test_a_sender_whose_own_mailbox_is_full_hears_of_it(sandbox: Sandbox) -> None:
    (reply,) = send(sandbox, "carol", "alice", sender="alice@mda.test")
    assert reply == b"552 5.2.2 <alice> Mailbox full"


def test_who_fails_for_now_holds_up_nobody(sandbox: Sandbox) -> None:
    """RFC 5321 4.2.5: it is tried again, and not for the notice."""
    (sandbox.root / "mail/dora").mkdir()
    try:
        (reply,) = send(sandbox, "carol", "alice", "dora", sender="bob@mda.test")
        assert reply == b"250 2.0.0 OK for some; the sender gets a notice about the others"
        assert b"dora" not in (sandbox.mailbox("bob") or b"")
        assert len(list((sandbox.root / "spool/mda/queue/new").iterdir())) == 1
    finally:
        (sandbox.root / "mail/dora").rmdir()


def test_where_all_fail_there_is_no_notice(sandbox: Sandbox) -> None:
    (reply,) = send(sandbox, "alice", "ALICE", sender="bob@mda.test")
    assert reply == b"552 5.2.2 <alice> Mailbox full"
    assert sandbox.mailbox("bob") is None


def test_over_lmtp_each_recipient_has_his_own_reply_and_no_notice(sandbox: Sandbox) -> None:
    replies = send(sandbox, "alice", "carol", sender="bob@mda.test", protocol="lmtp")
    assert [reply[:9] for reply in replies] == [b"552 5.2.2", b"250 2.0.0"]
    assert sandbox.mailbox("bob") is None


def test_the_next_message_of_the_session_is_as_good_as_the_first(sandbox: Sandbox) -> None:
    """A notice is a transaction of its own, and its text must not stay with the broker."""
    box = sandbox.root / "mail/alice"
    box.write_bytes(b"x" * 9900)
    os.chown(box, UIDS["alice"], 8)
    quota = "[delivery]\nquota_size = 10000\n"
    message = (
        b"MAIL FROM:<bob@mda.test>\r\nRCPT TO:<carol>\r\nRCPT TO:<alice>\r\nRCPT TO:<dora>\r\n"
        b"DATA\r\nSubject: x%d\r\n\r\n" + b"y" * 200 + b"\r\n.\r\n"
    )
    said = sandbox.converse(b"HELO x\r\n" + message % 1 + message % 2 + b"QUIT\r\n", config=quota)
    assert sum(line.startswith(b"250 2.0.0 OK for some") for line in said) == 2
    for user in ("carol", "dora"):
        kept = sandbox.mailbox(user) or b""
        assert kept.count(b"\nSubject: x1\n") == kept.count(b"\nSubject: x2\n") == 1
