"""Mail that comes to us and is for other hosts: who may, which way, and under whose name."""

from __future__ import annotations

import json
import os
import re
import smtplib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.addressing import Host
from support.nexthop import NextHop
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import served
from support.terminal import Terminal

from mda.cli import check
from mda.config import Config, ConfigError, load
from mda.outbound import queue
from mda.outbound.attempt import Attempts
from mda.outbound.queue import Addressee, Envelope
from mda.rights import remote_peer

HONOUR = '[relay]\nsource_routes = "honour"\n'


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    yield Host(sandbox)
    sandbox.run(["sh", "-c", "rm -f /home/*/.forward*"])


def all_waiting(host: Host) -> list[Path]:
    directory = host.sandbox.root / "spool/mda/queue"
    return [each for folder in queue.FOLDERS for each in (directory / folder).glob("*")]


def routed(hop: NextHop, more: str = "", options: str = "") -> str:
    return f'{more}\n[routes]\n"*" = "{hop.place}{options}"\n'


def run_queue(host: Host, config: str) -> None:
    file = host.sandbox.configure(host.config + config)
    done = host.sandbox.run([*start_command(), "queue", "--config", file, "run"])
    assert done.returncode == 0, done.stderr


def say(host: Host, lines: str, *, config: str, peer: str = "bob") -> list[bytes]:
    """What is answered to a dialogue that begins after the hello and ends before QUIT."""
    octets = f"HELO x\r\n{lines}QUIT\r\n".encode()
    return host.sandbox.converse(octets, config=host.config + config, peer=peer)[2:-1]


def relay(
    host: Host,
    hop: NextHop,
    *to: str,
    sender: str = "joe@hostw.example",
    config: str = "",
    options: str = "",
) -> None:
    """One message from a local user, taken and sent on."""
    config = routed(hop, config, options)
    replies = host.send(*to, sender=sender, config=config)
    assert [each[:3] for each in replies] == [b"250"] * (len(to) + 1)
    run_queue(host, config)


@pytest.mark.parametrize(
    ("config", "to", "opening", "recipient"),
    [
        ("", "user@far.example", "joe@hostw.example", "user@far.example"),
        ("", "@mda.test:user@far.example", "joe@hostw.example", "user@far.example"),
        ("", "@b.example,@c.example:user@d.example", "joe@hostw.example", "user@d.example"),
        (HONOUR, "@mda.test,@b.example:user@d.example", "@mda.test:joe@hostw.example",
         "@b.example:user@d.example"),
        (HONOUR, "@mda.test:user@d.example", "@mda.test:joe@hostw.example", "user@d.example"),
        (HONOUR, "@localhost,@MDA.test:user@d.example", "@mda.test:joe@hostw.example",
         "user@d.example"),
        (HONOUR, "@b.example,@c.example:user@d.example", "@mda.test:joe@hostw.example",
         "@b.example,@c.example:user@d.example"),
        (HONOUR, "@b.example,@mda.test:user@d.example", "@mda.test:joe@hostw.example",
         "@b.example,@mda.test:user@d.example"),
        (HONOUR, "@b.example:alice@mda.test", "@mda.test:joe@hostw.example",
         "@b.example:alice@mda.test"),
        (HONOUR, "user@d.example", "@mda.test:joe@hostw.example", "user@d.example"),
        (HONOUR, '@#3221225991,@[203.0.113.1]:"a b"@d.example', "@mda.test:joe@hostw.example",
         '@#3221225991,@[203.0.113.1]:"a b"@d.example'),
    ],
)  # fmt: skip
def test_a_route_is_left_out_or_followed_as_the_host_says(
    host: Host, config: str, to: str, opening: str, recipient: str
) -> None:
    with NextHop() as hop:
        relay(host, hop, to, config=config)
    (message,) = hop.messages
    assert message.opening == f"MAIL FROM:<{opening}>".encode()
    assert message.recipients == [f"RCPT TO:<{recipient}>".encode()]
    assert host.sandbox.mailbox("alice") is None
    assert all_waiting(host) == []


def test_the_first_host_of_a_route_is_the_next_hop(host: Host) -> None:
    with NextHop() as first, NextHop() as last:
        config = HONOUR + f'[routes]\n"b.example" = "{first.place}"\n"*" = "{last.place}"\n'
        host.send("@b.example:user@d.example", "user@d.example", config=config)
        run_queue(host, config)
    assert [each.recipients for each in first.messages] == [
        [b"RCPT TO:<@b.example:user@d.example>"]
    ]
    assert [each.recipients for each in last.messages] == [[b"RCPT TO:<user@d.example>"]]


def test_the_reverse_path_grows_under_the_name_that_is_known_there(host: Host) -> None:
    with NextHop() as hop:
        relay(
            host, hop, "@mda.test:user@d.example", config=HONOUR, options=" name=inner.example",
            sender="@hostx.example:joe@hostw.example",
        )  # fmt: skip
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<@inner.example,@hostx.example:joe@hostw.example>"
    assert hop.lines[0] == b"EHLO inner.example\r\n"


@pytest.mark.parametrize("config", ["", HONOUR])
def test_the_null_reverse_path_stays_null(host: Host, config: str) -> None:
    with NextHop() as hop:
        relay(host, hop, "@mda.test:user@d.example", config=config, sender="")
    assert hop.messages[0].opening == b"MAIL FROM:<>"


def test_what_is_forwarded_is_not_relayed(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with NextHop() as hop:
        config = routed(hop, HONOUR)
        host.send("away", sender="joe@hostw.example", config=config)
        run_queue(host, config)
    assert hop.messages[0].opening == b"MAIL FROM:<joe@hostw.example>"


def test_a_relayed_text_gets_a_time_stamp_and_nothing_else(host: Host) -> None:
    text = "Return-Path: <old@x>\r\nReceived: by old\r\nTo: x\r\n\r\nFrom me\r\n"
    with NextHop() as hop:
        config = routed(hop)
        say(
            host,
            f"MAIL FROM:<joe@hostw.example>\r\nRCPT TO:<user@d.example>\r\nDATA\r\n{text}.\r\n",
            config=config,
        )
        run_queue(host, config)
    kept = hop.messages[0].text.decode()
    assert re.fullmatch(r"Received: from x (.*\r\n)+?" + re.escape(text[22:]), kept), kept


def test_a_route_through_us_to_our_own_user_is_delivered_here(host: Host) -> None:
    for config in ("", HONOUR):
        for peer in ("daemon", "bob"):
            assert host.send("@mda.test:alice@mda.test", peer=peer, config=config)[-1] == (
                b"250 2.0.0 Delivered to mailbox"
            )
    assert host.send("@b.example:alice@mda.test", peer="daemon", config=HONOUR)[-1] == (
        b"250 2.0.0 Delivered to mailbox"
    )
    assert host.has("alice") == 5


# What open relays have been found by; each leads elsewhere, or to nobody.
TRICKS = [
    "victim@far.example", "victim@FAR.example", "<victim@far.example>", '"victim@far.example"',
    "victim%far.example", "victim%far.example@mda.test", "victim%far.example@localhost",
    "victim%far.example@[127.0.0.1]", "victim%far.example@#2130706433",
    '"victim%far.example"@mda.test', '"victim@far.example"@mda.test',
    '"victim@far.example"@localhost', "victim@far.example@mda.test", "victim@mda.test@far.example",
    "far.example!victim", "far.example!victim@mda.test", "mda.test!far.example!victim",
    "far.example!victim@localhost", "mda.test!victim@far.example", "victim@far.example!mda.test",
    "@mda.test:victim@far.example", "@localhost:victim@far.example",
    "@[127.0.0.1]:victim@far.example", "@far.example:victim@far.example",
    "@mda.test,@far.example:victim@far.example", "@mda.test,@mda.test:victim@far.example",
    "@mda.test:victim%far.example@mda.test", "@mda.test:far.example!victim@mda.test",
    "@mda.test:@far.example:victim@mda.test", "victim@far.example,alice@mda.test",
    "alice@mda.test,victim@far.example", "victim@", "@far.example", "@far.example:", "",
    "victim@far.example.", "victim@.far.example", "victim@[192.0.2.7]", "victim@[IPv6:2001:db8::7]",
    "victim@#3221225991", "victim@far.example\\@mda.test", "victim\\@far.example",
    "victim\\@far.example@mda.test", "victim@far.example mda.test", "victim@far.example\0@mda.test",
    "victim@mda.test.far.example", "victim@far.example#mda.test", "victim@far.example:25",
    "victim@[far.example]", "victim=far.example@mda.test", "victim+far.example@mda.test",
    '""@far.example', '"victim"@"far.example"', "victim(x)@far.example", "relay:victim@far.example",
    "smtp:victim@far.example", "!victim@far.example", "%victim@far.example@mda.test",
]  # fmt: skip


@pytest.mark.parametrize("config", ["", HONOUR])
@pytest.mark.parametrize("sender", ["x@far.example", "alice@mda.test", "", "postmaster"])
def test_no_trick_makes_us_an_open_relay(host: Host, config: str, sender: str) -> None:
    assert len(TRICKS) >= 40
    config += "[receiver]\nerrors = 1000\n"
    lines = "".join(f"RCPT TO:<{each}>\r\nRCPT TO:{each}\r\n" for each in TRICKS)
    replies = say(host, f"MAIL FROM:<{sender}>\r\n{lines}DATA\r\n", config=config, peer="daemon")
    told = list(zip([each for each in TRICKS for _ in "ab"], replies[1:-1], strict=True))
    assert [each for each in told if not each[1].startswith((b"55", b"501"))] == []
    assert replies[-1].startswith(b"503 5.5.1")
    assert all_waiting(host) == []
    for foreign in ("victim@far.example", "@mda.test:victim@far.example", "victim@[192.0.2.7]"):
        assert (foreign, b"550 5.7.1") in [(trick, reply[:9]) for trick, reply in told]


@pytest.mark.parametrize(
    ("peer", "may"), [("bob", True), ("root", True), ("daemon", False), ("postfix", False)]
)
def test_persons_and_root_may_relay(host: Host, peer: str, may: bool) -> None:
    """An MTA's domains are ours, so what it says is here or nowhere."""
    reply = host.send("victim@far.example", peer=peer)[0]
    assert reply.startswith(b"250" if may else b"55"), reply


def test_where_no_mail_leaves_nobody_relays(host: Host) -> None:
    reply = host.send("user@far.example", config='[outbound]\nvia = "nothing"\n')[0]
    assert reply.startswith(b"550 5.7.1")


@pytest.mark.parametrize(
    ("networks", "reply"),
    [("[]", b"550 5.7.1"), ('["127.0.0.0/8"]', b"250"), ('["192.0.2.0/24"]', b"550 5.7.1")],
)
def test_networks_relay_where_they_are_named(host: Host, networks: str, reply: bytes) -> None:
    config = f"{host.config}[receiver]\nrelay_networks = {networks}\n"
    words = ("--config", host.sandbox.configure(config), "--listen", "127.0.0.1:0")
    with (
        served(host.sandbox, *words) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        client.helo("x")
        client.mail("joe@hostw.example")
        code, text = client.rcpt("user@far.example")
    assert (b"%d %b" % (code, text)).startswith(reply)


def test_send_to_another_host_is_a_try_and_never_mail(host: Host) -> None:
    with NextHop(b"SEND") as able, NextHop() as unable:
        config = f'[routes]\n"able.example" = "{able.place}"\n"unable.example" = "{unable.place}"\n'
        for domain in ("able", "unable"):
            assert host.send(f"joe@{domain}.example", verb="SEND", config=config) == [
                f"251 2.1.5 User not local; will forward to <joe@{domain}.example>".encode(),
                host_reply(host),
            ]
        run_queue(host, config)
    assert [each.opening for each in able.messages] == [b"SEND FROM:<bob@mda.test>"]
    assert unable.messages == []
    assert b"5.3.3" in all_waiting_text(host)


def host_reply(host: Host) -> bytes:
    """The reply to the end of data names the message in the queue."""
    newest = max(all_waiting(host), key=lambda path: path.stat().st_mtime_ns)
    return b"250 2.0.0 Queued as " + newest.name.encode()


def all_waiting_text(host: Host) -> bytes:
    return b"".join(each.read_bytes() for each in all_waiting(host))


def test_scenario_3_the_relay_host_goes_on_to_the_destination(host: Host) -> None:
    config = '[receiver]\nhostname = "USC-ISIE.ARPA"\n' + HONOUR
    text = (
        "Date: 2 Nov 81 22:33:44\r\nFrom: John Q. Public <JQP@MIT-AI.ARPA>\r\n"
        "Subject:  The Next Meeting of the Board\r\nTo: Jones@BBN-Vax.ARPA\r\n\r\nBill:\r\n"
        "The next meeting of the board of directors will be\r\non Tuesday.\r\n"
        "                                             John.\r\n"
    )
    with NextHop() as hop:
        config = routed(hop, config)
        say(
            host,
            "MAIL FROM:<JQP@MIT-AI.ARPA>\r\nRCPT TO:<@USC-ISIE.ARPA:Jones@BBN-VAX.ARPA>\r\n"
            f"DATA\r\n{text}.\r\n",
            config=config,
        )
        run_queue(host, config)
    assert [line for line in hop.lines if line[:4] != b"NOOP"] == [
        b"EHLO USC-ISIE.ARPA\r\n",
        b"MAIL FROM:<@USC-ISIE.ARPA:JQP@MIT-AI.ARPA>\r\n",
        b"RCPT TO:<Jones@BBN-VAX.ARPA>\r\n",
        b"DATA\r\n",
        b"QUIT\r\n",
    ]
    (message,) = hop.messages
    stamp = message.text.decode().removesuffix(text)
    assert re.fullmatch(r"Received: from x .*\r\n\tby USC-ISIE\.ARPA with .*(\r\n\t.*)*\r\n", stamp)


def test_scenario_7_two_lists_are_expanded_and_served_by_a_relay_host(host: Host) -> None:
    host.alias(
        "Example-People: ABC@MIT-MC.ARPA, Fonebone@USC-ISIQ.ARPA, alice, "
        "Q-Smith@ISI-VAXA.ARPA, joe@foo-unix.ARPA, xyz@bar-unix.ARPA\n"
    )
    assert say(host, "EXPN Example-People\r\n", config="") == [
        b"250-2.1.5 <ABC@MIT-MC.ARPA>",
        b"250-2.1.5 <Fonebone@USC-ISIQ.ARPA>",
        b"250-2.1.5 Alice Liddell <alice@mda.test>",
        b"250-2.1.5 <Q-Smith@ISI-VAXA.ARPA>",
        b"250-2.1.5 <joe@foo-unix.ARPA>",
        b"250 2.1.5 <xyz@bar-unix.ARPA>",
    ]
    config = '[receiver]\nhostname = "USC-ISIE.ARPA"\n' + HONOUR
    paths = [
        "ABC@MIT-MC.ARPA", "Fonebone@USC-ISIQ.ARPA", "XYZ@MIT-AI.ARPA",
        "@USC-ISIF.ARPA:Q-Smith@ISI-VAXA.ARPA", "joe@FOO-UNIX.ARPA", "xyz@BAR-UNIX.ARPA",
        "fred@BBN-UNIX.ARPA",
    ]  # fmt: skip
    with NextHop() as hop:
        to = [f"@USC-ISIE.ARPA{',' if each[0] == '@' else ':'}{each}" for each in paths]
        relay(host, hop, *to, sender="Account.Person@SU-SCORE.ARPA", config=config)
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<@USC-ISIE.ARPA:Account.Person@SU-SCORE.ARPA>"
    assert message.recipients == [f"RCPT TO:<{each}>".encode() for each in paths]


def test_scenario_8_who_has_moved_gets_mail_at_the_other_host(host: Host) -> None:
    config = '[receiver]\nhostname = "USC-ISIF.ARPA"\n[forward]\nfred = "Jones@USC-ISI.ARPA"\n'
    with NextHop() as hop:
        config = routed(hop, config)
        host.send("fred@USC-ISIF.ARPA", sender="mo@LBL-UNIX.ARPA", config=config, peer="daemon")
        run_queue(host, config)
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<mo@LBL-UNIX.ARPA>"
    assert message.recipients == [b"RCPT TO:<Jones@USC-ISI.ARPA>"]
    assert message.text.startswith(b"Delivered-To: fred@USC-ISIF.ARPA\r\n")


def test_scenario_10_what_does_not_fit_goes_in_another_transaction(host: Host) -> None:
    full = b"552 Recipient storage full, try again in another transaction\r\n"
    openings: list[bytes] = []

    def answer(line: bytes) -> bytes | None:
        if line.startswith(b"MAIL"):
            openings.append(line)
        is_second = line.startswith(b"RCPT TO:<eric@") and len(openings) == 1
        return full if is_second else None

    with NextHop(answer=answer) as hop:
        relay(host, hop, "fabry@BERKELEY.ARPA", "eric@BERKELEY.ARPA", sender="Postel@USC-ISIF.ARPA")
    assert [each.recipients for each in hop.messages] == [
        [b"RCPT TO:<fabry@BERKELEY.ARPA>"],
        [b"RCPT TO:<eric@BERKELEY.ARPA>"],
    ]
    assert {each.opening for each in hop.messages} == {b"MAIL FROM:<Postel@USC-ISIF.ARPA>"}
    assert all_waiting(host) == []


@pytest.mark.parametrize(
    ("config", "back"),
    [(HONOUR, b"@HOSTX.ARPA:JOE@HOSTW.ARPA"), ("", b"JOE@HOSTW.ARPA")],
)
def test_example_7_the_notice_goes_back_the_way_that_the_message_came(
    host: Host, config: str, back: bytes
) -> None:
    def answer(line: bytes) -> bytes | None:
        return b"550 No Such User\r\n" if line == b"RCPT TO:<SAM@HOSTZ.ARPA>\r\n" else None

    with NextHop(answer=answer) as hop:
        relay(
            host, hop, "@HOSTY.ARPA:SAM@HOSTZ.ARPA", sender="@HOSTX.ARPA:JOE@HOSTW.ARPA",
            config='[receiver]\nhostname = "HOSTY.ARPA"\n' + config,
        )  # fmt: skip
    (notice,) = hop.messages
    assert notice.opening == b"MAIL FROM:<>"
    assert notice.recipients == [b"RCPT TO:<%b>" % back]
    assert b"\r\nFrom: Mail Delivery System <MAILER-DAEMON@HOSTY.ARPA>\r\n" in notice.text
    assert b"\r\nTo: <JOE@HOSTW.ARPA>\r\n" in notice.text
    assert (
        b"Sorry JOE, your message to SAM@HOSTZ.ARPA lost.\r\n"
        b"[127.0.0.1] said this:\r\n"
        b'   "550 5.0.0 No Such User"\r\n'
    ) in notice.text
    assert b"\r\nFrom me\r\n" in notice.text, "the message comes back"
    assert all_waiting(host) == []


def test_who_is_refused_after_others_were_served_is_told_of_to_another_host(host: Host) -> None:
    """RFC 821 4.1.1 DATA: 250 and a notice, wherever the sender is."""
    host.alias("list: alice, gone\n")
    with NextHop() as hop:
        config = routed(hop)
        replies = host.send("list", sender="joe@hostw.example", config=config, peer="daemon")
        assert replies[-1] == b"250 2.1.5 Delivered to 1 of 2 members, and a notice"
        run_queue(host, config)
    (notice,) = hop.messages
    assert (notice.opening, notice.recipients) == (
        b"MAIL FROM:<>",
        [b"RCPT TO:<joe@hostw.example>"],
    )
    assert b"your message to gone@mda.test lost.\r\n" in notice.text
    assert host.has("alice") == 1


def test_each_sender_of_a_message_for_lists_is_told(host: Host) -> None:
    """There are as many notices as there are reverse-paths: the sender's, and the owners'."""
    host.alias(
        "one: alice, gone1\ntwo: carol, gone2\nowner-two: chief@far.example\n"
        "three: bob, gone3\nowner-three: boss@far.example\n"
    )
    with NextHop() as hop:
        config = routed(hop)
        lists = ("one", "two", "three")
        replies = host.send(*lists, sender="joe@hostw.example", config=config, peer="daemon")
        assert replies[-1].startswith(b"250 2.0.0"), replies
        run_queue(host, config)
    assert sorted(each.recipients[0] for each in hop.messages) == [
        b"RCPT TO:<boss@far.example>",
        b"RCPT TO:<chief@far.example>",
        b"RCPT TO:<joe@hostw.example>",
    ]


@pytest.mark.parametrize(
    ("steer", "is_told", "policy", "reply"),
    [
        ("alias", True, "accept", b"251 2.1.5 User not local; will forward to <user@far.example>"),
        ("forward", True, "accept",
         b"251 2.1.5 User not local; will forward to <user@far.example>"),
        ("alias", False, "accept", b"250 2.1.5 <away> Recipient OK"),
        ("forward", False, "accept", b"250 2.1.5 <away> Recipient OK"),
        ("alias", True, "refuse", b"551 5.1.6 User not local; please try <user@far.example>"),
        ("forward", True, "refuse", b"551 5.1.6 User not local; please try <user@far.example>"),
        ("alias", False, "refuse",
         b"550 5.1.6 <away> User not local; the new address is not told here"),
    ],
)  # fmt: skip
def test_a_forwarding_is_told_to_who_may_ask_for_names(
    host: Host, steer: str, is_told: bool, policy: str, reply: bytes
) -> None:
    if steer == "alias":
        host.alias("away: user@far.example\n")
    else:
        host.alias("away: alice\n")
        host.forward("alice", "user@far.example\n")
    config = f'[recipients]\naliases = "{host.aliases}"\nforwarding = "{policy}"\n'
    config += f'[receiver]\nvrfy = "{"local" if is_told else "nobody"}"\n'
    path = host.sandbox.configure(config)
    lines = b"HELO x\r\nMAIL FROM:<joe@hostw.example>\r\nRCPT TO:<away>\r\nVRFY away\r\nQUIT\r\n"
    with (
        served(host.sandbox, "--config", path, "--listen", "127.0.0.1:0") as server,
        socket.create_connection(("127.0.0.1", server.port), 20) as client,
    ):
        client.sendall(lines)
        said = b"".join(iter(lambda: client.recv(65_536), b"")).splitlines()
    assert said[3] == reply
    assert said[4] == reply if is_told else said[4].startswith(b"252 2.5.0")


@pytest.mark.parametrize(
    "aliases",
    ["away: user@far.example, alice\n", "away: user@far.example\nowner-away: carol\n",
     "away: alice\n"],
)  # fmt: skip
def test_only_one_mailbox_elsewhere_is_a_forwarding(host: Host, aliases: str) -> None:
    host.alias(aliases)
    config = host.config.replace("[recipients]\n", '[recipients]\nforwarding = "refuse"\n')
    lines = b"HELO x\r\nMAIL FROM:<bob@mda.test>\r\nRCPT TO:<away>\r\nQUIT\r\n"
    assert host.sandbox.converse(lines, config=config)[3] == b"250 2.1.5 <away> Recipient OK"


def test_who_has_moved_stands_in_front_of_the_account(host: Host) -> None:
    config = '[forward]\nAlice = "alice@far.example"\n'
    with NextHop() as hop:
        config = routed(hop, config)
        assert host.send("alice", config=config)[0].startswith(b"251 ")
        run_queue(host, config)
    assert hop.messages[0].recipients == [b"RCPT TO:<alice@far.example>"]
    assert host.sandbox.mailbox("alice") is None


def test_who_has_moved_back_here_is_here_and_a_circle_is_none(host: Host) -> None:
    config = '[forward]\nold = "alice@mda.test"\none = "two@mda.test"\ntwo = "one@mda.test"\n'
    assert host.send("old", config=config)[0] == b"250 2.1.5 <old> Recipient OK"
    assert host.has("alice") == 1
    assert host.send("one", config=config)[0].startswith(b"451 4.3.5")


def test_check_finds_networks_that_are_everybody() -> None:
    networks = ("192.0.2.0/24", "0.0.0.0/0", "::/0")
    config = Config().with_values("receiver", relay_networks=networks)
    assert [finding.what for finding in check.check_outbound(config)] == [
        "receiver.relay_networks: 0.0.0.0/0 is everybody: an open relay",
        "receiver.relay_networks: ::/0 is everybody: an open relay",
    ]


def test_explain_tells_who_has_moved(host: Host) -> None:
    file = host.sandbox.configure(f'{host.config}[forward]\nfred = "jones@far.example"\n')
    done = host.sandbox.run([*start_command(), "explain", "--config", file, "fred"])
    lines = done.stdout.decode().splitlines()
    assert "  fred has moved to jones@far.example ([forward])" in lines
    assert lines[-1] == (
        "RCPT would be told 251 2.1.5 User not local; will forward to <jones@far.example>"
    )


@pytest.mark.parametrize(
    "value",
    ["jones", "@far.example", "jones@", "551 jones", "a b@far.example", "<jones@far.example>",
     "251 jones@far.example", "jones@far.example\n", 7],
)  # fmt: skip
def test_an_entry_that_is_no_mailbox_is_found_at_the_start(tmp_path: Path, value: object) -> None:
    file = tmp_path / "mda.toml"
    file.write_text(f"[forward]\nfred = {json.dumps(value)}\n")
    with pytest.raises(ConfigError, match=r"mda\.toml:2: forward\.fred: must be "):
        load(str(file), str(tmp_path / "none"))


def test_named_programs_may_relay_too(host: Host) -> None:
    config = '[receiver]\nrelay_users = ["daemon"]\n'
    assert host.send("x@far.example", peer="daemon", config=config)[0].startswith(b"250")


def test_an_address_of_any_kind_is_in_a_network_or_not() -> None:
    config = Config().with_values("receiver", relay_networks=("10.0.0.0/8", "2001:db8::/32"))
    for address, may in (
        ("10.1.2.3", True),
        ("192.0.2.1", False),
        ("2001:db8::7", True),
        ("::ffff:0:102:304", False),
        ("no address", False),
    ):
        assert remote_peer(address, config).may_relay == may, address


LOOPED = "Received: by x\r\nDelivered-To: alice@mda.test\r\nSubject: x\r\n\r\nbuy this\r\n"


def test_a_stranger_cannot_have_notices_sent_to_whom_he_likes(host: Host) -> None:
    lines = "MAIL FROM:<victim@far.example>\r\nRCPT TO:<bob>\r\nRCPT TO:<alice>\r\nDATA\r\n"
    replies = say(host, f"{lines}{LOOPED}.\r\n", config="", peer="daemon")
    assert replies[-1].startswith(b"554 5.4.6")
    assert all_waiting(host) == []
    assert host.has("alice") == 0


def test_a_stranger_has_only_his_header_sent_back(host: Host) -> None:
    host.alias("list: alice, gone\n")
    host.send("list", sender="victim@far.example", peer="daemon")
    host.send("list", sender="friend@far.example", peer="bob")
    texts = {b"victim" in each.read_bytes(): each.read_bytes() for each in all_waiting(host)}
    assert b"text/rfc822-headers" in texts[True]
    assert b"From me" not in texts[True]
    assert b"message/rfc822" in texts[False]
    assert b"From me" in texts[False]


def test_mail_for_postmaster_that_nobody_takes_goes_round_in_no_circle(host: Host) -> None:
    host.alias("postmaster: admin@far.example\n")

    def answer(line: bytes) -> bytes | None:
        return b"550 no\r\n" if line.startswith(b"RCPT") else None

    with NextHop(answer=answer) as hop:
        config = routed(hop)
        file = host.sandbox.configure(host.config + config)
        with served(host.sandbox, "--config", file):
            host.send("postmaster", sender="joe@hostw.example", config=config, peer="daemon")
            run_queue(host, config)
    refused = [line for line in hop.lines if line.startswith(b"RCPT")]
    assert refused == [
        b"RCPT TO:<admin@far.example>\r\n",
        b"RCPT TO:<joe@hostw.example>\r\n",
        b"RCPT TO:<admin@far.example>\r\n",
    ]
    assert all_waiting(host) == []


def test_a_notice_to_postmaster_elsewhere_is_told_to_ours(host: Host) -> None:
    def answer(line: bytes) -> bytes | None:
        return b"550 no\r\n" if line.startswith(b"RCPT") else None

    with NextHop(answer=answer) as hop:
        config = routed(hop)
        host.send("postmaster@far.example", sender="", config=config)
        with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
            run_queue(host, config)
    assert b"message to postmaster@far.example lost" in (host.sandbox.mailbox("root") or b"")


def test_who_stands_beside_a_mailbox_elsewhere_that_must_wait_waits_too(host: Host) -> None:
    config = f"[outbound]\nkeep_free = {1 << 50}\n"
    host.alias("list: carol, user@far.example\n")
    assert host.send("alice", "user@far.example", config=config)[-1].startswith(b"452 4.3.1")
    assert host.has("alice") == 0
    replies = host.send("alice", "list", config=config, protocol="lmtp", peer="postfix")
    assert [each[:3] for each in replies[-2:]] == [b"250", b"452"]
    assert (host.has("alice"), host.has("carol")) == (1, 0)


def test_a_postmaster_elsewhere_is_never_refused(host: Host) -> None:
    host.alias("postmaster: admin@far.example\naway: user@far.example\n")
    config = host.config.replace("[recipients]\n", '[recipients]\nforwarding = "refuse"\n')
    lines = b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<postmaster>\r\nRCPT TO:<away>\r\nQUIT\r\n"
    assert [each[:3] for each in host.sandbox.converse(lines, config=config)[3:5]] == [
        b"251",
        b"551",
    ]


@pytest.mark.parametrize("verb", ["MAIL", "SOML", "SAML"])
def test_a_refusal_is_for_every_verb(host: Host, verb: str) -> None:
    host.forward("alice", "alice@far.example\n")
    config = host.config.replace("[recipients]\n", '[recipients]\nforwarding = "refuse"\n')
    lines = f"HELO x\r\n{verb} FROM:<bob@x>\r\nRCPT TO:<alice>\r\nQUIT\r\n".encode()
    assert host.sandbox.converse(lines, config=config)[3].startswith(b"551 5.1.6")


def test_who_moves_while_mail_waits_gets_it_where_it_was_to_go(host: Host) -> None:
    lock = host.sandbox.root / "mail/alice.lock"
    lock.write_text("1\n")
    config = "[delivery]\nlock_seconds = 1\n"
    host.send("alice", "carol", config=config)
    lock.unlink()
    moved = '[forward]\nalice = "alice@far.example"\n'
    with served(host.sandbox, "--config", host.sandbox.configure(host.config + moved)):
        run_queue(host, moved)
    assert host.has("alice") == 1
    assert all_waiting(host) == []


def test_a_sender_without_a_domain_gets_ours_elsewhere(host: Host) -> None:
    with NextHop() as hop:
        relay(host, hop, "user@far.example", sender="bob")
    assert hop.messages[0].opening == b"MAIL FROM:<bob@mda.test>"


def test_what_we_say_of_a_hop_is_not_its_word(host: Host) -> None:
    with NextHop() as hop:
        config = routed(hop)
        host.send("user@far.example", verb="SEND", config=config)
        with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
            run_queue(host, config)
    notice = (host.sandbox.mailbox("bob") or b"").decode()
    assert 'mda.test said this:\n   "554 5.3.3 ' in notice
    assert "Remote-MTA" not in notice


def test_a_notice_has_no_line_that_no_hop_need_take(host: Host) -> None:
    def answer(line: bytes) -> bytes | None:
        return b"550 no\r\n" if line.startswith(b"RCPT TO:<user@") else None

    with NextHop(answer=answer) as hop:
        config = routed(hop, options=" lines=any")
        lines = "MAIL FROM:<joe@hostw.example>\r\nRCPT TO:<user@far.example>\r\nDATA\r\n"
        text = f"References: {'x' * 1200}\r\n\r\n{'y' * 1200}\r\n.\r\n"
        say(host, lines + text, config=config)
        run_queue(host, config.replace(" lines=any", ""))
        run_queue(host, config)
    (notice,) = hop.messages
    assert notice.recipients == [b"RCPT TO:<joe@hostw.example>"]
    assert max(map(len, notice.text.split(b"\r\n"))) <= 998


def test_this_host_has_many_numbers(host: Host) -> None:
    for literal in ("[0.0.0.0]", "#0", "[IPv6:::]", "[IPv6:::ffff:127.0.0.1]", "[IPv6:::1]"):
        assert host.send(f"alice@{literal}", peer="daemon")[0].startswith(b"250"), literal


def test_who_got_it_on_a_terminal_has_it_once_and_the_sender_hears_of_the_other(
    host: Host, log_in: Callable[..., Terminal]
) -> None:
    terminal = log_in()
    config = "[delivery]\nquota_size = 3000\n"
    box = host.sandbox.root / "mail/alice"
    box.write_bytes(b"x" * 2900)
    os.chown(box, UIDS["alice"], 8)
    file = host.sandbox.configure(host.config + config)
    words = b"HELO x\r\nSOML FROM:<joe@hostw.example>\r\nRCPT TO:<dora>\r\nRCPT TO:<alice>\r\n"
    text = b"DATA\r\nSubject: x\r\n\r\nat noon?" + b"y" * 200 + b"\r\n.\r\nQUIT\r\n"
    with (
        served(host.sandbox, "--config", file, "--listen", "127.0.0.1:0") as server,
        socket.create_connection(("127.0.0.1", server.port), 20) as client,
    ):
        client.sendall(words + text)
        said = b"".join(iter(lambda: client.recv(65_536), b"")).splitlines()
    assert said[-2] == b"250 2.0.0 OK for some; the sender gets a notice about the others"
    assert b"at noon?" in terminal.shown()
    (waiting,) = all_waiting(host)
    assert b"message to alice@mda.test lost" in waiting.read_bytes()


def test_what_fails_unforeseen_is_not_tried_for_ever(host: Host) -> None:
    directory = str(host.sandbox.root / "queue")
    came = time.time() - 121 * 3600
    for age in (came, time.time()):
        addressee = Addressee(b"user", b"far.example")
        name = queue.put(directory, Envelope("MAIL", b"x@y", [addressee], came=age), [b"x\n"])
        message = queue.find(directory, name)
        assert message is not None
        Attempts(Config()).put_off(message, 900)
        again = queue.find(directory, name)
        assert again is not None
        assert again.due > time.time() + 800
        assert again.envelope.addressees[0].is_to_be_told == (age == came)
