"""SEND, SOML and SAML from the socket to the screen, through `mda receive` as it is started.

The terminal is a real one, with a process of its user in front of it. The user has a uid of
this run's own, so that no other run's terminals are hers; nothing but that process makes the
login known here (no utmp, no logind, no slices).
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable

import pytest
from support.sandbox import Sandbox, start_command
from support.terminal import PERSON as USER
from support.terminal import PERSON_UID as UID
from support.terminal import TTY, Terminal

TEXT = b"Subject: lunch\r\n\r\nat noon?\r\n"


def dialogue(verb: bytes, text: bytes = TEXT, sender: bytes = b"bob@example.org") -> bytes:
    envelope = b"HELO client.example\r\n%b FROM:<%b>\r\nRCPT TO:<%b>\r\n"
    return envelope % (verb, sender, USER.encode()) + b"DATA\r\n" + text + b".\r\nQUIT\r\n"


def say(sandbox: Sandbox, verb: bytes, text: bytes = TEXT, **options: str) -> tuple[bytes, bytes]:
    """The reply to RCPT and the one to the end of the data (or to DATA, if it was refused)."""
    replies = sandbox.converse(dialogue(verb, text), **options)
    assert replies[2].startswith(b"250 2.1.0"), replies
    at = 5 if replies[4].startswith(b"354") else 4
    return replies[3], replies[at]


def rows(screen: bytes) -> list[str]:
    """The rows of one block, each clock time as TIME."""
    text = screen.decode().replace("\r\n", "\n").strip("\n")
    return re.sub(r" at \d\d:\d\d$", " at TIME", text, flags=re.MULTILINE).split("\n")


SHOWN = ["Subject: lunch", "| at noon?", "-- end of message --"]
VERIFIED = ["\aMessage from bob (verified) at TIME", *SHOWN]


def test_send_shows_the_text_and_mails_nothing(sandbox: Sandbox, terminal: Terminal) -> None:
    to, end = say(sandbox, b"SEND")
    assert to == b"250 2.1.5 <dora> User is accepting messages"
    assert end == b"250 2.1.5 Sent to 1 terminal"
    assert rows(terminal.shown()) == VERIFIED
    assert sandbox.mailbox(USER) is None


def test_soml_is_content_with_the_terminal(sandbox: Sandbox, terminal: Terminal) -> None:
    to, end = say(sandbox, b"SOML")
    assert to.startswith(b"250 2.1.5")
    assert end == b"250 2.1.5 Sent to 1 terminal"
    assert rows(terminal.shown()) == VERIFIED
    assert sandbox.mailbox(USER) is None


def test_saml_does_both(sandbox: Sandbox, terminal: Terminal) -> None:
    to, end = say(sandbox, b"SAML")
    assert to.startswith(b"250 2.1.5")
    assert end == b"250 2.0.0 Sent and mailed"
    assert rows(terminal.shown()) == VERIFIED
    kept = sandbox.mailbox(USER) or b""
    assert kept.endswith(b"\nSubject: lunch\n\nat noon?\n\n")
    assert kept.count(b"From ") == 1


def test_mail_does_not_come_to_the_terminal(sandbox: Sandbox, terminal: Terminal) -> None:
    assert say(sandbox, b"MAIL")[1].startswith(b"250 2.0.0 Delivered")
    assert terminal.shown() == b""
    assert sandbox.mailbox(USER) is not None


@pytest.mark.parametrize("sender", [b"root@mda.test", b"carol", b"", b"bob@example.org"])
def test_who_sends_is_what_the_kernel_says_and_not_the_client(
    sandbox: Sandbox, terminal: Terminal, sender: bytes
) -> None:
    sandbox.converse(dialogue(b"SEND", sender=sender))
    assert rows(terminal.shown())[0] == "\aMessage from bob (verified) at TIME"


def test_root_is_shown_as_unverified(sandbox: Sandbox, terminal: Terminal) -> None:
    assert say(sandbox, b"SEND", peer="root")[1].startswith(b"250")
    line = "\aMessage from <bob@example.org> (unverified, via client.example) at TIME"
    assert rows(terminal.shown())[0] == line


LOOPBACK = """
import socket, subprocess, sys
listening = socket.create_server(('127.0.0.1', 0))
ours = socket.create_connection(listening.getsockname())
theirs, _ = listening.accept()
process = subprocess.Popen(sys.argv[1:], stdin=theirs, stdout=theirs)
theirs.close()
ours.sendall(sys.stdin.buffer.read())
while more := ours.recv(65536):
    sys.stdout.buffer.write(more)
sys.exit(process.wait())
"""


def test_over_loopback_nobody_is_verified_and_the_host_is_named(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    command = [sys.executable, "-I", "-c", LOOPBACK, *start_command(), "receive"]
    done = sandbox.run(command, input=dialogue(b"SEND", sender=b"root@mda.test"))
    assert b"250 2.1.5 Sent to 1 terminal" in done.stdout, done.stderr
    line = "\aMessage from <root@mda.test> (unverified, via [127.0.0.1]) at TIME"
    assert rows(terminal.shown())[0] == line


@pytest.mark.parametrize("columns", [40, 132])
def test_no_row_is_wider_than_the_terminal(
    sandbox: Sandbox, log_in: Callable[..., Terminal], columns: int
) -> None:
    terminal = log_in(columns=columns)
    words = b"word " * 60
    say(sandbox, b"SEND", b"Subject: x\r\n\r\n" + words + b"\r\n")
    widths = [len(row.replace("\a", "")) for row in rows(terminal.shown())]
    assert columns - 7 < max(widths) < columns


LONG = b"Subject: x\r\n\r\n" + b"".join(b"line %d\r\n" % n for n in range(1, 31))


def test_send_refuses_what_does_not_fit(sandbox: Sandbox, terminal: Terminal) -> None:
    _, end = say(sandbox, b"SEND", LONG)
    assert end == b"552 5.3.4 Message too long for a terminal; use SOML or SAML"
    assert terminal.shown() == b""
    assert sandbox.mailbox(USER) is None


@pytest.mark.parametrize("verb", [b"SOML", b"SAML"])
def test_what_does_not_fit_is_begun_on_the_terminal_and_whole_in_the_mailbox(
    sandbox: Sandbox, terminal: Terminal, verb: bytes
) -> None:
    _, end = say(sandbox, verb, LONG)
    assert end == b"250 2.0.0 Sent and mailed"
    shown = rows(terminal.shown())
    assert shown[2:22] == [f"| line {n}" for n in range(1, 21)]
    assert shown[22:] == ["[10 more lines: the whole message is in your mailbox]"]
    assert (sandbox.mailbox(USER) or b"").endswith(LONG.replace(b"\r\n", b"\n") + b"\n")


def test_how_many_lines_are_shown_is_the_configurations_to_say(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    lines = "[terminal]\nlines = %d\n"
    assert say(sandbox, b"SEND", LONG, config=lines % 29)[1].startswith(b"552")
    assert say(sandbox, b"SEND", LONG, config=lines % 30)[1].startswith(b"250")
    assert rows(terminal.shown())[-2:] == ["| line 30", "-- end of message --"]
    say(sandbox, b"SOML", LONG, config=lines % 3)
    assert rows(terminal.shown())[-2:] == [
        "| line 3",
        "[27 more lines: the whole message is in your mailbox]",
    ]


def test_how_many_bytes_are_shown_is_the_configurations_to_say(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    limit = "[terminal]\nbytes = %d\n"
    assert say(sandbox, b"SEND", LONG, config=limit % 4096 + "lines = 60\n")[1].startswith(b"250")
    assert 256 < len(terminal.shown()) <= 4096
    assert say(sandbox, b"SEND", LONG, config=limit % 256 + "lines = 60\n")[1].startswith(b"552")
    say(sandbox, b"SOML", LONG, config=limit % 256 + "lines = 60\n")
    shown = terminal.shown()
    assert 128 < len(shown) <= 256
    assert b"the whole message is in your mailbox]" in shown


@pytest.mark.parametrize(("bell", "rung"), [("true", 1), ("false", 0)])
def test_the_bell_rings_once_or_not_at_all(
    sandbox: Sandbox, terminal: Terminal, bell: str, rung: int
) -> None:
    say(sandbox, b"SEND", TEXT.replace(b"noon", b"\a\a"), config=f"[terminal]\nbell = {bell}\n")
    assert terminal.shown().count(b"\a") == rung


def test_control_characters_do_not_reach_the_screen(sandbox: Sandbox, terminal: Terminal) -> None:
    text = b"Subject: =?utf-8?q?=1b[2J?=\r\n\r\n\x1b]0;owned\x07 \xc2\x9b2J\r\n"
    assert say(sandbox, b"SEND", text)[1].startswith(b"250")
    shown = terminal.shown()
    assert shown.count(b"\x1b") == 0
    assert shown.count(b"\a") == 1
    assert b"\xc2\x9b" not in shown
    assert b"owned" in shown


def test_with_messages_off_send_fails_and_the_others_mail(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    os.chmod(terminal.device, 0o600)
    to, end = say(sandbox, b"SEND")
    assert to == b"450 4.2.1 <dora> User is not accepting messages"
    assert end.startswith(b"503 5.5.1")
    assert sandbox.mailbox(USER) is None
    for count, verb in enumerate((b"SOML", b"SAML"), 1):
        to, end = say(sandbox, verb)
        assert to == b"250 2.1.5 <dora> User not active now, so will do mail"
        assert end == b"250 2.0.0 User is not accepting messages, so did mail"
        assert (sandbox.mailbox(USER) or b"").count(b"at noon?") == count
    assert terminal.shown() == b""


def test_who_has_logged_out_is_not_logged_in(sandbox: Sandbox) -> None:
    assert say(sandbox, b"SEND")[0] == b"450 4.2.1 <dora> User is not logged in"
    assert say(sandbox, b"SOML")[1] == b"250 2.0.0 User is not logged in, so did mail"


def test_messages_switched_off_after_rcpt_are_seen_at_the_end_of_the_data(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    """SEND is decided twice (decision 7); after the data RFC 821 4.3 has no 450."""
    replies = sandbox.converse_around(dialogue(b"SEND"), lambda: os.chmod(terminal.device, 0o600))
    assert replies[-2] == b"451 4.2.1 User is not accepting messages"
    assert terminal.shown() == b""
    assert sandbox.mailbox(USER) is None


def test_a_terminal_of_another_group_takes_no_messages(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    os.chown(terminal.device, UID, 8)
    assert say(sandbox, b"SEND")[0].startswith(b"450 4.2.1")
    to, end = say(sandbox, b"SEND", config='[terminal]\ngroup = "mail"\n')
    assert (to[:3], end[:3]) == (b"250", b"250")
    assert rows(terminal.shown()) == VERIFIED


def test_a_terminal_of_another_owner_is_not_hers(sandbox: Sandbox, terminal: Terminal) -> None:
    os.chown(terminal.device, UID + 1, TTY)
    assert say(sandbox, b"SEND")[0] == b"450 4.2.1 <dora> User is not logged in"
    assert terminal.shown() == b""


@pytest.mark.parametrize("config", ["[terminal]\npeers = []\n", "[terminal]\nenabled = false\n"])
def test_where_nobody_may_the_verbs_are_not_there(
    sandbox: Sandbox, terminal: Terminal, config: str
) -> None:
    lines = b"EHLO x\r\nSEND FROM:<b>\r\nSOML FROM:<b>\r\nSAML FROM:<b>\r\nQUIT\r\n"
    replies = sandbox.converse(lines, config=config)
    assert not any(word in reply for reply in replies[:-4] for word in (b"SEND", b"SOML", b"SAML"))
    assert [reply[:9] for reply in replies[-4:-1]] == [b"502 5.5.1"] * 3
    assert terminal.shown() == b""


@pytest.mark.parametrize("bound", [f"uid_max = {UID - 1}", f"uid_min = {UID + 1}"])
def test_an_account_that_is_no_person_gets_neither_mail_nor_messages(
    sandbox: Sandbox, terminal: Terminal, bound: str
) -> None:
    for verb in (b"MAIL", b"SEND"):
        replies = sandbox.converse(dialogue(verb), peer="root", config=f"[recipients]\n{bound}\n")
        assert replies[3].startswith(b"550 5.1.1 <dora>")
    assert sandbox.mailbox(USER) is None
    assert terminal.shown() == b""


def test_a_message_goes_to_the_one_terminal_last_typed_at(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    first, second = log_in(), log_in()
    os.utime(first.device, (2_000_000_000, 1))
    os.utime(second.device, (1_000_000_000, 1))
    say(sandbox, b"SEND")
    assert rows(first.shown()) == VERIFIED
    assert second.shown() == b""


def test_the_same_person_named_twice_is_told_once(sandbox: Sandbox, terminal: Terminal) -> None:
    again = dialogue(b"SEND").replace(b"DATA", b"RCPT TO:<Dora@mda.test>\r\nDATA", 1)
    replies = sandbox.converse(again)
    assert [reply[:3] for reply in replies[3:7]] == [b"250", b"250", b"354", b"250"]
    assert rows(terminal.shown()) == VERIFIED


def test_a_socket_without_a_peer_offers_nothing(sandbox: Sandbox, terminal: Terminal) -> None:
    with socket.socket(socket.AF_UNIX) as alone:
        process = sandbox.start("receive", client=alone)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert terminal.shown() == b""
