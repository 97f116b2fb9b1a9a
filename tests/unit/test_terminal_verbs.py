"""SEND, SOML and SAML from the socket to the screen, through `mda receive` as it is started.

The terminal is a real one, with a process of its user in front of it. The user has a uid of
this run's own, so that no other run's terminals are hers; nothing but that process makes the
login known here (no utmp, no logind, no slices).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import tty
from collections.abc import Callable, Iterator

import pytest
from support.sandbox import Sandbox, start_command

TTY = 5
USER = "dora"
UID = 10_000 + os.getpid() % 50_000
TEXT = b"Subject: lunch\r\n\r\nat noon?\r\n"


class Terminal:
    """A pseudo-terminal of USER, and a process of hers that has it as its controlling one."""

    def __init__(self, columns: int = 80) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        tty.setraw(slave)
        self.device = os.ttyname(slave)
        os.chown(self.device, UID, TTY)
        os.chmod(self.device, 0o620)
        become = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
        self._login = subprocess.Popen(
            [*become, "setsid", "-c", "sh", "-c", "echo ready; exec sleep 600"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        assert os.read(self.master, 100) == b"ready\n"

    def shown(self) -> bytes:
        """What has come to the screen since the last look."""
        screen = b""
        while select.select([self.master], [], [], 0)[0]:
            screen += os.read(self.master, 65_536)
        return screen

    def close(self) -> None:
        self._login.send_signal(signal.SIGKILL)
        self._login.wait()
        os.close(self.master)


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The private view with USER among its accounts."""
    passwd = sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(f"{whole}{USER}:x:{UID}:{UID}::/home/{USER}:/bin/sh\n")
    yield sandbox
    passwd.write_text(whole)


@pytest.fixture
def log_in(host: Sandbox) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(columns: int = 80) -> Terminal:
        terminals.append(Terminal(columns))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def terminal(log_in: Callable[..., Terminal]) -> Terminal:
    return log_in()


def converse(host: Sandbox, lines: bytes, *, peer: str = "bob", config: str = "") -> list[bytes]:
    """All replies to `lines` from one `mda receive`."""
    ours, theirs = host.connect_as(peer)
    with ours:
        ours.settimeout(30)
        process = host.start("receive", "--config", host.configure(config), client=theirs)
        theirs.close()
        said = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.sendall(lines)
            while more := ours.recv(65_536):
                said += more
        _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors, errors
    assert process.returncode == 0
    return said.splitlines()


def dialogue(verb: bytes, text: bytes = TEXT, sender: bytes = b"bob@example.org") -> bytes:
    envelope = b"HELO client.example\r\n%b FROM:<%b>\r\nRCPT TO:<%b>\r\n"
    return envelope % (verb, sender, USER.encode()) + b"DATA\r\n" + text + b".\r\nQUIT\r\n"


def say(host: Sandbox, verb: bytes, text: bytes = TEXT, **options: str) -> tuple[bytes, bytes]:
    """The reply to RCPT and the one to the end of the data (or to DATA, if it was refused)."""
    replies = converse(host, dialogue(verb, text), **options)
    assert replies[2].startswith(b"250 2.1.0"), replies
    at = 5 if replies[4].startswith(b"354") else 4
    return replies[3], replies[at]


def rows(screen: bytes) -> list[str]:
    """The rows of one block, each clock time as TIME."""
    text = screen.decode().replace("\r\n", "\n").strip("\n")
    return re.sub(r" at \d\d:\d\d$", " at TIME", text, flags=re.MULTILINE).split("\n")


SHOWN = ["Subject: lunch", "| at noon?", "-- end of message --"]
VERIFIED = ["\aMessage from bob (verified) at TIME", *SHOWN]


def test_send_shows_the_text_and_mails_nothing(host: Sandbox, terminal: Terminal) -> None:
    to, end = say(host, b"SEND")
    assert to == b"250 2.1.5 <dora> User is accepting messages"
    assert end == b"250 2.1.5 Sent to 1 terminal"
    assert rows(terminal.shown()) == VERIFIED
    assert host.mailbox(USER) is None


def test_soml_is_content_with_the_terminal(host: Sandbox, terminal: Terminal) -> None:
    to, end = say(host, b"SOML")
    assert to.startswith(b"250 2.1.5")
    assert end == b"250 2.1.5 Sent to 1 terminal"
    assert rows(terminal.shown()) == VERIFIED
    assert host.mailbox(USER) is None


def test_saml_does_both(host: Sandbox, terminal: Terminal) -> None:
    to, end = say(host, b"SAML")
    assert to.startswith(b"250 2.1.5")
    assert end == b"250 2.0.0 Sent and mailed"
    assert rows(terminal.shown()) == VERIFIED
    kept = host.mailbox(USER) or b""
    assert kept.endswith(b"\nSubject: lunch\n\nat noon?\n\n")
    assert kept.count(b"From ") == 1


def test_mail_does_not_come_to_the_terminal(host: Sandbox, terminal: Terminal) -> None:
    assert say(host, b"MAIL")[1].startswith(b"250 2.0.0 Delivered")
    assert terminal.shown() == b""
    assert host.mailbox(USER) is not None


@pytest.mark.parametrize("sender", [b"root@mda.test", b"carol", b"", b"bob@example.org"])
def test_who_sends_is_what_the_kernel_says_and_not_the_client(
    host: Sandbox, terminal: Terminal, sender: bytes
) -> None:
    converse(host, dialogue(b"SEND", sender=sender))
    assert rows(terminal.shown())[0] == "\aMessage from bob (verified) at TIME"


def test_root_is_shown_as_unverified(host: Sandbox, terminal: Terminal) -> None:
    assert say(host, b"SEND", peer="root")[1].startswith(b"250")
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
    host: Sandbox, terminal: Terminal
) -> None:
    command = [sys.executable, "-I", "-c", LOOPBACK, *start_command(), "receive"]
    done = host.run(command, input=dialogue(b"SEND", sender=b"root@mda.test"))
    assert b"250 2.1.5 Sent to 1 terminal" in done.stdout, done.stderr
    line = "\aMessage from <root@mda.test> (unverified, via client.example) at TIME"
    assert rows(terminal.shown())[0] == line


@pytest.mark.parametrize("columns", [40, 132])
def test_no_row_is_wider_than_the_terminal(
    host: Sandbox, log_in: Callable[..., Terminal], columns: int
) -> None:
    terminal = log_in(columns)
    words = b"word " * 60
    say(host, b"SEND", b"Subject: x\r\n\r\n" + words + b"\r\n")
    widths = [len(row.replace("\a", "")) for row in rows(terminal.shown())]
    assert columns - 7 < max(widths) < columns


LONG = b"Subject: x\r\n\r\n" + b"".join(b"line %d\r\n" % n for n in range(1, 31))


def test_send_refuses_what_does_not_fit(host: Sandbox, terminal: Terminal) -> None:
    _, end = say(host, b"SEND", LONG)
    assert end == b"552 5.3.4 Message too long for a terminal; use SOML or SAML"
    assert terminal.shown() == b""
    assert host.mailbox(USER) is None


@pytest.mark.parametrize("verb", [b"SOML", b"SAML"])
def test_what_does_not_fit_is_begun_on_the_terminal_and_whole_in_the_mailbox(
    host: Sandbox, terminal: Terminal, verb: bytes
) -> None:
    _, end = say(host, verb, LONG)
    assert end == b"250 2.0.0 Sent and mailed"
    shown = rows(terminal.shown())
    assert shown[2:22] == [f"| line {n}" for n in range(1, 21)]
    assert shown[22:] == ["[10 more lines: the whole message is in your mailbox]"]
    assert (host.mailbox(USER) or b"").endswith(LONG.replace(b"\r\n", b"\n") + b"\n")


def test_how_many_lines_are_shown_is_the_configurations_to_say(
    host: Sandbox, terminal: Terminal
) -> None:
    lines = "[terminal]\nlines = %d\n"
    assert say(host, b"SEND", LONG, config=lines % 29)[1].startswith(b"552")
    assert say(host, b"SEND", LONG, config=lines % 30)[1].startswith(b"250")
    assert rows(terminal.shown())[-2:] == ["| line 30", "-- end of message --"]
    say(host, b"SOML", LONG, config=lines % 3)
    assert rows(terminal.shown())[-2:] == [
        "| line 3",
        "[27 more lines: the whole message is in your mailbox]",
    ]


def test_how_many_bytes_are_shown_is_the_configurations_to_say(
    host: Sandbox, terminal: Terminal
) -> None:
    limit = "[terminal]\nbytes = %d\n"
    assert say(host, b"SEND", LONG, config=limit % 4096 + "lines = 60\n")[1].startswith(b"250")
    assert 256 < len(terminal.shown()) <= 4096
    assert say(host, b"SEND", LONG, config=limit % 256 + "lines = 60\n")[1].startswith(b"552")
    say(host, b"SOML", LONG, config=limit % 256 + "lines = 60\n")
    shown = terminal.shown()
    assert 128 < len(shown) <= 256
    assert b"the whole message is in your mailbox]" in shown


@pytest.mark.parametrize(("bell", "rung"), [("true", 1), ("false", 0)])
def test_the_bell_rings_once_or_not_at_all(
    host: Sandbox, terminal: Terminal, bell: str, rung: int
) -> None:
    say(host, b"SEND", TEXT.replace(b"noon", b"\a\a"), config=f"[terminal]\nbell = {bell}\n")
    assert terminal.shown().count(b"\a") == rung


def test_control_characters_do_not_reach_the_screen(host: Sandbox, terminal: Terminal) -> None:
    text = b"Subject: =?utf-8?q?=1b[2J?=\r\n\r\n\x1b]0;owned\x07 \xc2\x9b2J\r\n"
    assert say(host, b"SEND", text)[1].startswith(b"250")
    shown = terminal.shown()
    assert shown.count(b"\x1b") == 0
    assert shown.count(b"\a") == 1
    assert b"\xc2\x9b" not in shown
    assert b"owned" in shown


def test_with_messages_off_send_fails_and_the_others_mail(
    host: Sandbox, terminal: Terminal
) -> None:
    os.chmod(terminal.device, 0o600)
    to, end = say(host, b"SEND")
    assert to == b"450 4.2.1 <dora> User is not accepting messages"
    assert end.startswith(b"503 5.5.1")
    assert host.mailbox(USER) is None
    for count, verb in enumerate((b"SOML", b"SAML"), 1):
        to, end = say(host, verb)
        assert to == b"250 2.1.5 <dora> User not active now, so will do mail"
        assert end == b"250 2.0.0 User is not accepting messages, so did mail"
        assert (host.mailbox(USER) or b"").count(b"at noon?") == count
    assert terminal.shown() == b""


def test_who_has_logged_out_is_not_logged_in(host: Sandbox) -> None:
    assert say(host, b"SEND")[0] == b"450 4.2.1 <dora> User is not logged in"
    assert say(host, b"SOML")[1] == b"250 2.0.0 User is not logged in, so did mail"


def test_messages_switched_off_after_rcpt_are_seen_at_the_end_of_the_data(
    host: Sandbox, terminal: Terminal
) -> None:
    """SEND is decided twice (decision 7); after the data RFC 821 4.3 has no 450."""
    whole = dialogue(b"SEND")
    at = whole.index(b"DATA\r\n")
    ours, theirs = host.connect_as("bob")
    with ours:
        ours.settimeout(30)
        process = host.start("receive", "--config", host.configure(""), client=theirs)
        theirs.close()
        ours.sendall(whole[:at])
        said = b""
        while b"accepting messages" not in said:
            said += ours.recv(65_536)
        os.chmod(terminal.device, 0o600)
        ours.sendall(whole[at:])
        while more := ours.recv(65_536):
            said += more
        process.communicate(timeout=30)
    assert b"\r\n451 4.2.1 User is not accepting messages\r\n" in said
    assert terminal.shown() == b""
    assert host.mailbox(USER) is None


def test_a_terminal_of_another_group_takes_no_messages(host: Sandbox, terminal: Terminal) -> None:
    os.chown(terminal.device, UID, 8)
    assert say(host, b"SEND")[0].startswith(b"450 4.2.1")
    to, end = say(host, b"SEND", config='[terminal]\ngroup = "mail"\n')
    assert (to[:3], end[:3]) == (b"250", b"250")
    assert rows(terminal.shown()) == VERIFIED


def test_a_terminal_of_another_owner_is_not_hers(host: Sandbox, terminal: Terminal) -> None:
    os.chown(terminal.device, UID + 1, TTY)
    assert say(host, b"SEND")[0] == b"450 4.2.1 <dora> User is not logged in"
    assert terminal.shown() == b""


@pytest.mark.parametrize("config", ["[terminal]\npeers = []\n", "[terminal]\nenabled = false\n"])
def test_where_nobody_may_the_verbs_are_not_there(
    host: Sandbox, terminal: Terminal, config: str
) -> None:
    lines = b"EHLO x\r\nSEND FROM:<b>\r\nSOML FROM:<b>\r\nSAML FROM:<b>\r\nQUIT\r\n"
    replies = converse(host, lines, config=config)
    assert not any(word in reply for reply in replies[:-4] for word in (b"SEND", b"SOML", b"SAML"))
    assert [reply[:9] for reply in replies[-4:-1]] == [b"502 5.5.1"] * 3
    assert terminal.shown() == b""


@pytest.mark.parametrize("bound", [f"uid_max = {UID - 1}", f"uid_min = {UID + 1}"])
def test_an_account_that_is_no_person_gets_neither_mail_nor_messages(
    host: Sandbox, terminal: Terminal, bound: str
) -> None:
    for verb in (b"MAIL", b"SEND"):
        replies = converse(host, dialogue(verb), peer="root", config=f"[recipients]\n{bound}\n")
        assert replies[3].startswith(b"550 5.1.1 <dora>")
    assert host.mailbox(USER) is None
    assert terminal.shown() == b""


def test_a_message_goes_to_the_one_terminal_last_typed_at(
    host: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    first, second = log_in(), log_in()
    os.utime(first.device, (2_000_000_000, 1))
    os.utime(second.device, (1_000_000_000, 1))
    say(host, b"SEND")
    assert rows(first.shown()) == VERIFIED
    assert second.shown() == b""


def test_the_same_person_named_twice_is_told_once(host: Sandbox, terminal: Terminal) -> None:
    again = dialogue(b"SEND").replace(b"DATA", b"RCPT TO:<Dora@mda.test>\r\nDATA", 1)
    replies = converse(host, again)
    assert [reply[:3] for reply in replies[3:7]] == [b"250", b"250", b"354", b"250"]
    assert rows(terminal.shown()) == VERIFIED


def test_a_socket_without_a_peer_offers_nothing(host: Sandbox, terminal: Terminal) -> None:
    with socket.socket(socket.AF_UNIX) as alone:
        process = host.start("receive", client=alone)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert terminal.shown() == b""
