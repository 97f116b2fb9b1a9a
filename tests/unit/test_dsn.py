"""What senders want to be told of their mail (RFC 3461), from RCPT to the notice."""

from __future__ import annotations

import email
import os
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.addressing import Host
from support.nexthop import NextHop
from support.sandbox import Sandbox, start_command
from support.serving import served

from mda.model import Wish
from mda.outbound import queue
from mda.outbound.notice import read_xtext
from mda.outbound.queue import Addressee, Envelope
from mda.receiver.grammar import is_xtext

LOCKED = "[delivery]\nlock_seconds = 1\n"


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    yield Host(sandbox)
    sandbox.run(["sh", "-c", "rm -f /home/*/.forward*"])


def send(
    host: Host,
    *recipients: str,
    mail: str = "",
    config: str = "",
    sender: str = "bob@mda.test",
) -> list[bytes]:
    """One message; each recipient is a path and its parameters. The replies behind MAIL's."""
    lines = f"EHLO x\r\nMAIL FROM:<{sender}> {mail}\r\n"
    lines += "".join(f"RCPT TO:{each}\r\n" for each in recipients)
    lines += "DATA\r\nSubject: x\r\n\r\nhello\r\n.\r\nQUIT\r\n"
    said = host.sandbox.converse(lines.encode(), config=host.config + config)
    return [line for line in said if line[:5] in (b"250 2", b"251 2") or line[:1] in b"45"][1:]


def notices(host: Host, user: str = "bob") -> list[Message]:
    kept = (host.sandbox.mailbox(user) or b"").split(b"From MAILER-DAEMON ")[1:]
    return [email.message_from_bytes(each.partition(b"\n")[2]) for each in kept]


def statuses(notice: Message) -> list[dict[str, str]]:
    parts: Any = notice.get_payload()
    return [dict(block.items()) for block in parts[1].get_payload()]


def run_queue(host: Host, config: str) -> None:
    file = host.sandbox.configure(host.config + config)
    done = host.sandbox.run([*start_command(), "queue", "--config", file, "run", "--now"])
    assert done.returncode == 0, done.stderr


def waiting(host: Host) -> list[Path]:
    directory = host.sandbox.root / "spool/mda/queue"
    return [each for folder in queue.FOLDERS for each in (directory / folder).glob("*")]


def routed(hop: NextHop) -> str:
    return f'[routes]\n"*" = "{hop.place}"\n'


def test_who_asks_is_told_of_a_delivery(host: Host) -> None:
    send(
        host, "<alice> NOTIFY=SUCCESS ORCPT=rfc822;Alice+2BX+40far.example", "<carol>",
        mail="ENVID=no+2B1 RET=FULL",
    )  # fmt: skip
    (notice,) = notices(host)
    assert notice["Subject"] == "Mail delivered"
    first, of_alice = statuses(notice)
    assert first["Original-Envelope-Id"] == "no+1"
    assert of_alice["Original-Recipient"] == "rfc822; Alice+X@far.example"
    assert of_alice["Final-Recipient"] == "rfc822; alice@mda.test"
    assert (of_alice["Action"], of_alice["Status"]) == ("delivered", "2.0.0")
    assert "bob, your message to alice@mda.test was delivered.\n" in str(notice)
    assert "Sorry" not in str(notice)
    assert "\nhello\n" not in str(notice), "only what is lost goes back"
    assert host.has("carol") == 1


@pytest.mark.parametrize("notify", ["", "NOTIFY=NEVER", "NOTIFY=FAILURE,DELAY"])
def test_who_does_not_ask_is_told_of_none(host: Host, notify: str) -> None:
    send(host, f"<alice> {notify}")
    assert host.has("alice") == 1
    assert host.sandbox.mailbox("bob") is None


def test_nobody_is_told_of_a_message_without_a_sender(host: Host) -> None:
    send(host, "<alice> NOTIFY=SUCCESS", sender="")
    assert host.has("alice") == 1
    assert waiting(host) == []


def test_of_a_list_it_is_told_once(host: Host) -> None:
    host.alias("list: alice, carol\n")
    send(host, "<list> NOTIFY=SUCCESS")
    (notice,) = notices(host)
    assert [each["Action"] for each in statuses(notice)[1:]] == ["expanded"]


def fill_mailbox(host: Host) -> str:
    box = host.sandbox.root / "mail/alice"
    box.write_bytes(b"x" * 5990)
    os.chown(box, 1001, 8)
    return "[delivery]\nquota_size = 6000\n"


@pytest.mark.parametrize(
    ("notify", "is_told"),
    [("", True), ("NOTIFY=NEVER", False), ("NOTIFY=FAILURE", True), ("NOTIFY=SUCCESS", False),
     ("NOTIFY=DELAY", False)],
)  # fmt: skip
def test_of_a_failure_beside_others_who_asks_is_told(
    host: Host, notify: str, is_told: bool
) -> None:
    replies = send(host, "<carol>", f"<alice> {notify}", config=fill_mailbox(host))
    assert replies[-1].startswith(b"250 2.0.0 OK for some")
    assert (host.sandbox.mailbox("bob") is not None) == is_told
    assert (b"sender gets a notice" in replies[-1]) == is_told


@pytest.mark.parametrize(("ret", "is_whole"), [("", True), ("RET=FULL", True), ("RET=HDRS", False)])
def test_a_failure_brings_back_what_was_asked_for(host: Host, ret: str, is_whole: bool) -> None:
    send(host, "<carol>", "<alice>", mail=ret, config=fill_mailbox(host))
    assert ("\nhello\n" in str(notices(host)[0])) == is_whole


def test_wishes_go_on_to_a_hop_that_knows_them(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with NextHop(b"DSN", b"PIPELINING") as hop:
        config = routed(hop)
        send(
            host,
            "<away> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;away+40x",
            "<one@far.example> NOTIFY=NEVER",
            mail="RET=HDRS ENVID=e1", config=config,
        )  # fmt: skip
        run_queue(host, config)
    said = {line for line in hop.lines if line[:4] in (b"MAIL", b"RCPT")}
    assert said == {
        b"MAIL FROM:<bob@mda.test> RET=HDRS ENVID=e1\r\n",
        b"RCPT TO:<user@far.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;away+40x\r\n",
        b"RCPT TO:<one@far.example> NOTIFY=NEVER\r\n",
    }
    assert host.sandbox.mailbox("bob") is None
    assert waiting(host) == []


def test_a_hop_that_knows_none_is_where_we_tell_of_the_last(host: Host) -> None:
    with NextHop(b"PIPELINING") as hop:
        config = routed(hop)
        send(host, "<one@far.example> NOTIFY=SUCCESS", "<two@far.example>", config=config)
        with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
            run_queue(host, config)
    assert b"NOTIFY" not in b"".join(hop.lines)
    (notice,) = notices(host)
    assert [(each["Final-Recipient"], each["Action"]) for each in statuses(notice)[1:]] == [
        ("rfc822; one@far.example", "relayed")
    ]
    assert notice["Subject"] == "Mail sent on"
    assert waiting(host) == []


@pytest.mark.parametrize(
    ("notify", "is_told"), [("", True), ("NEVER", False), ("FAILURE", True), ("DELAY", False)]
)
def test_of_what_cannot_be_sent_who_asks_is_told(host: Host, notify: str, is_told: bool) -> None:
    def answer(line: bytes) -> bytes | None:
        return b"550 no\r\n" if line.startswith(b"RCPT") else None

    with NextHop(answer=answer) as hop:
        config = routed(hop)
        wish = f"NOTIFY={notify}" if notify else ""
        send(host, f"<one@far.example> {wish}", config=config)
        with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
            run_queue(host, config)
    assert (host.sandbox.mailbox("bob") is not None) == is_told
    assert waiting(host) == []


@pytest.mark.parametrize(
    ("notify", "is_told"), [("", True), ("NEVER", False), ("FAILURE", False), ("DELAY", True)]
)
def test_of_a_delay_who_asks_is_told(host: Host, notify: str, is_told: bool) -> None:
    directory = str(host.sandbox.root / "spool/mda/queue")
    addressee = Addressee(b"one", b"far.example")
    addressee.wish = Wish(notify)
    envelope = Envelope("MAIL", b"bob@mda.test", [addressee], came=time.time() - 5 * 3600)
    queue.put(directory, envelope, [b"x\n"])
    host.sandbox.run(["chown", "-R", "mda:mda", "/var/spool/mda/queue"])
    with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        run_queue(host, '[routes]\n"*" = "127.0.0.1:1"\n')
    assert (host.sandbox.mailbox("bob") is not None) == is_told
    assert len(waiting(host)) == 1


def test_a_mailbox_that_is_free_later_has_its_delivery_told(host: Host) -> None:
    lock = host.sandbox.root / "mail/alice.lock"
    lock.write_text("1\n")
    send(host, "<alice> NOTIFY=SUCCESS", "<carol>", config=LOCKED)
    assert host.sandbox.mailbox("bob") is None
    lock.unlink()
    with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        run_queue(host, "")
        run_queue(host, "")
    (notice,) = notices(host)
    (of_alice,) = statuses(notice)[1:]
    assert (of_alice["Final-Recipient"], of_alice["Action"]) == (
        "rfc822; alice@mda.test",
        "delivered",
    )


@given(st.binary(max_size=50))
def test_xtext_is_read_back(octets: bytes) -> None:
    text = b"".join(
        b"+%02X" % octet if octet in b"+=" or not 33 <= octet <= 126 else bytes([octet])
        for octet in octets
    )
    assert read_xtext(text) == octets
    assert is_xtext(text) or not octets
