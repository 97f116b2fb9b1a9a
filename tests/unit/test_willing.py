"""Who may write on a person's terminals, from the socket to the screen.

The host's configuration, the person's own rules, the rates; what a refusal says; and what
is kept of what was shown. As in test_terminal_verbs, the terminal is a real one.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sandbox import PEOPLE_UIDS, UIDS, Sandbox, start_command
from support.serving import dial, served
from support.serving import dialogue as speak
from support.terminal import PERSON as USER
from support.terminal import PERSON_UID as UID
from support.terminal import Terminal

FRIEND, FRIEND_UID = "eric", PEOPLE_UIDS["eric"]
TEXT = b"Subject: lunch\r\n\r\nat noon?\r\n"
pytestmark = pytest.mark.usefixtures("no_counts")

AWAY = b"250 2.1.5 <dora> User not active now, so will do mail"


def write_rules(home: Path, text: str, owner: int = UID) -> None:
    folder = home / ".config/mda"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mesg").write_text(text)
    os.chown(folder / "mesg", owner, owner)


def dialogue(verb: str, sender: str, *recipients: str, text: bytes = TEXT) -> bytes:
    to = "".join(f"RCPT TO:<{each}>\r\n" for each in recipients or (USER,))
    lines = f"HELO client.example\r\n{verb} FROM:<{sender}>\r\n{to}DATA\r\n"
    return lines.encode() + text + b".\r\nQUIT\r\n"


def say(
    sandbox: Sandbox, verb: str, *, sender: str = "bob@example.org", peer: str = "bob", **more: str
) -> tuple[bytes, bytes]:
    """The reply to RCPT, and the one to the end of the data or to DATA."""
    replies = sandbox.converse(dialogue(verb, sender), peer=peer, **more)
    assert replies[2].startswith(b"250 2.1.0"), replies
    return replies[3], replies[5 if replies[4].startswith(b"354") else 4]


# -- the host ---------------------------------------------------------------------------


def test_an_account_that_never_gets_any_is_refused_and_mailed(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    passwd = sandbox.root / "etc/passwd"
    before = passwd.read_text()
    passwd.write_text(f"{before}other:x:{UID}:65534::/nonexistent:/bin/sh\n")
    try:
        for name in (USER, "other"):
            lines = f"HELO x\r\nSEND FROM:<b>\r\nRCPT TO:<{name}>\r\nQUIT\r\n"
            config = "[terminal]\nnever = ['nobody-here', 'other']\n"
            assert sandbox.converse(lines.encode(), config=config)[3].startswith(b"550 5.7.1")
    finally:
        passwd.write_text(before)
    config = f"[terminal]\nnever = ['root', '{USER}']\n"
    assert say(sandbox, "SEND", config=config)[0].startswith(b"550 5.7.1 <dora> No terminal ")
    to, end = say(sandbox, "SOML", config=config)
    assert to.endswith(b"No terminal messages for this account, so will do mail")
    assert end.startswith(b"250 2.0.0 ")
    assert terminal.shown() == b""
    assert (sandbox.mailbox(USER) or b"").count(b"at noon?") == 1


@pytest.mark.parametrize(
    "name",
    ["doras", "people", "owner-people", "cat", "file", "far", "postmaster", f"{USER}+lists"],
)
def test_send_is_for_a_login_name_and_soml_for_the_others(
    sandbox: Sandbox, terminal: Terminal, name: str
) -> None:
    aliases = sandbox.root / "etc/aliases"
    aliases.write_text(
        f'doras: {USER}\npeople: {USER}, bob\nowner-people: bob\ncat: "|cat"\n'
        f"file: /tmp/file\nfar: a@far.example\npostmaster: {USER}\n"
    )
    lines = f"HELO x\r\nSEND FROM:<b@x>\r\nRCPT TO:<{name}>\r\nQUIT\r\n".encode()
    try:
        replies = sandbox.converse(lines, config=f"[recipients]\naliases = '{aliases}'\n")
    finally:
        aliases.write_text("")
    assert replies[3] == f"550 5.3.3 <{name}> Not the login name of a person; use SOML".encode()
    assert terminal.shown() == b""


HIDE = """
mount -t proc -o hidepid=4 proc /proc
exec setpriv --inh-caps=-all --bounding-set=-all,+setuid,+setgid "$@"
"""


def converse_blindly(sandbox: Sandbox, lines: bytes, config: str = "") -> list[bytes]:
    """All reply lines on a host that has neither utmp, logind nor slices, nor shows processes."""
    ours, theirs = sandbox.connect_as("bob")
    words = ["unshare", "--mount", "sh", "-c", HIDE, "sh", *start_command(), "receive"]
    process = subprocess.Popen(
        sandbox.inside([*words, "--config", sandbox.configure(config)]),
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
    )
    theirs.close()
    with ours:
        ours.settimeout(30)
        ours.sendall(lines)
        replies = b"".join(iter(lambda: ours.recv(65_536), b"")).splitlines()
    assert process.wait(30) == 0
    return replies


@pytest.mark.parametrize(("idle_minutes", "is_found"), [(1, True), (3, False)])
def test_where_it_cannot_be_told_the_terminal_counts_if_the_host_wants_it_so(
    sandbox: Sandbox, terminal: Terminal, idle_minutes: int, *, is_found: bool
) -> None:
    then = time.time() - 60 * idle_minutes
    os.utime(terminal.device, (then, then))
    config = "[terminal]\nscan = true\nscan_minutes = 2\n"
    replies = converse_blindly(sandbox, dialogue("SEND", "bob@x"), config)
    assert replies[3][:9] == (b"250 2.1.5" if is_found else b"450 4.2.1")
    assert (b"at noon?" in terminal.shown()) == is_found


@pytest.mark.parametrize(
    ("verb", "to", "end"),
    [
        ("SEND", b"451 4.3.0 <dora> Cannot tell who is logged in on this host", b""),
        ("SOML", b"250 2.1.5 <dora> Cannot tell who is logged in on this host, so will do", b"250"),
        ("SAML", b"250 2.1.5 <dora> Cannot tell who is logged in on this host, so will do", b"250"),
    ],
)
def test_where_it_cannot_be_told_nobody_is_said_to_be_away(
    sandbox: Sandbox, terminal: Terminal, verb: str, to: bytes, end: bytes
) -> None:
    replies = converse_blindly(sandbox, dialogue(verb, "bob@example.org"))
    assert replies[3].startswith(to)
    assert replies[-2].startswith(end or b"50")
    assert terminal.shown() == b""
    assert bool(sandbox.mailbox(USER)) == (verb != "SEND")


@pytest.mark.parametrize(
    ("network", "to", "end"),
    [
        ("127.0.0.0/8", b"250 2.1.5 User is accepting", b"250 2.1.5 Sent to 1 terminal"),
        ("192.0.2.0/24", b"550 5.7.1 Terminals are not for this peer", b"503 5.5.1"),
    ],
)
def test_a_network_that_may_not_is_told_so_at_rcpt(
    sandbox: Sandbox, terminal: Terminal, network: str, to: bytes, end: bytes
) -> None:
    keys = f"[terminal]\npeers = ['networks']\nnetworks = ['{network}']\n"
    words = ["--listen", "127.0.0.1:0", "--config", sandbox.configure(keys)]
    with served(sandbox, *words) as daemon:
        offered = speak(dial(daemon.port), b"EHLO x\r\nQUIT\r\n")
        send = speak(dial(daemon.port), dialogue("SEND", "bob@x")).splitlines()
        soml = speak(dial(daemon.port), dialogue("SOML", "bob@x")).splitlines()
    assert b"\r\n250-SEND\r\n" in offered
    assert send[2].startswith(b"250 2.1.0")
    assert send[3].replace(b"<dora> ", b"").startswith(to)
    assert send[5 if send[4][:3] == b"354" else 4].startswith(end)
    assert soml[-2].startswith(b"250 2.")
    is_let = to.startswith(b"250")
    assert terminal.shown().count(b"at noon?") == (2 if is_let else 0)
    assert bool(sandbox.mailbox(USER)) == (not is_let)


# -- the user's own rules ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "is_let"),
    [
        ("messages n\n", False),
        ("messages n\nallow bob\n", True),
        ("deny bob\n", False),
        ("deny carol\ndeny *@*\n", True),
        ("deny *\n", False),
        ("messages maybe\n", False),
    ],
)
def test_the_persons_rules_decide_before_the_terminal(
    sandbox: Sandbox, home: Path, terminal: Terminal, rules: str, *, is_let: bool
) -> None:
    write_rules(home, rules)
    to, end = say(sandbox, "SEND")
    if is_let:
        assert end == b"250 2.1.5 Sent to 1 terminal"
        assert b"at noon?" in terminal.shown()
        return
    assert to == b"450 4.2.1 <dora> User is not accepting messages"
    assert say(sandbox, "SOML") == (
        AWAY,
        b"250 2.0.0 User is not accepting messages, so did mail",
    )
    assert say(sandbox, "SAML")[1].startswith(b"250 2.0.0 User is not accepting")
    assert terminal.shown() == b""
    assert (sandbox.mailbox(USER) or b"").count(b"at noon?") == 2


def test_rules_of_somebody_elses_making_are_none(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    write_rules(home, "messages y\n", owner=UIDS["bob"])
    assert say(sandbox, "SEND")[0].startswith(b"450 4.2.1")
    assert terminal.shown() == b""


def test_who_only_claims_a_name_is_not_let_in_by_it(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    write_rules(home, "messages n\nallow bob\nallow carol@example.org\n")
    for sender in ("bob", "bob@mda.test", "<>"):
        assert say(sandbox, "SEND", sender=sender.strip("<>"), peer="root")[0].startswith(b"450")
    assert say(sandbox, "SEND", sender="@a,@b:carol@example.org", peer="root")[1][:3] == b"250"
    write_rules(home, "deny bob\n")
    for sender in ("bob", "bob@mda.test", "BOB@LOCALHOST", '"b\\ob"@mda.test', "@a:bob@mda.test"):
        assert say(sandbox, "SEND", sender=sender, peer="root")[0].startswith(b"450"), sender
    assert say(sandbox, "SEND", sender="bob@far.example", peer="root")[1][:3] == b"250"
    assert terminal.shown().count(b"at noon?") == 2


@pytest.mark.parametrize("state", ["refuses", "closed", "away"])
@pytest.mark.parametrize("by", ["host", "user"])
def test_the_reason_of_a_refusal_can_be_hidden(
    sandbox: Sandbox, home: Path, log_in: Callable[..., Terminal], state: str, by: str
) -> None:
    if state != "away":
        os.chmod(log_in().device, 0o600 if state == "closed" else 0o620)
    rules = "messages n\n" if state == "refuses" else ""
    write_rules(home, rules + ("reason n\n" if by == "user" else ""))
    config = "[terminal]\nhide = true\n" if by == "host" else ""
    assert say(sandbox, "SEND", config=config)[0] == b"450 4.2.1 <dora> User cannot be reached now"
    assert say(sandbox, "SOML", config=config) == (
        AWAY,
        b"250 2.0.0 User cannot be reached now, so did mail",
    )


def test_the_person_can_have_the_bell_off(sandbox: Sandbox, home: Path, terminal: Terminal) -> None:
    write_rules(home, "bell n\n")
    assert say(sandbox, "SEND")[1].startswith(b"250")
    shown = terminal.shown()
    assert shown.startswith(b"\r\nMessage from bob (verified)")
    assert b"\a" not in shown


def test_the_person_can_have_it_in_ascii(sandbox: Sandbox, home: Path, terminal: Terminal) -> None:
    write_rules(home, "utf8 n\n")
    text = "Subject: x\r\n\r\n" + "é字e\u0301\u0316x" * 30 + "\r\n"
    assert sandbox.converse(dialogue("SEND", "b@x", text=text.encode()))[-2].startswith(b"250")
    shown = terminal.shown()
    assert shown.isascii()
    assert b"| ???x???x" in shown
    assert max(len(row) for row in shown.split(b"\r\n")) < 80


def test_rules_that_change_after_rcpt_hold_at_the_end_of_the_data(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    replies = sandbox.converse_around(
        dialogue("SEND", "bob@x"), lambda: write_rules(home, "deny bob\n")
    )
    assert replies[-2] == b"451 4.2.1 User is not accepting messages"
    assert terminal.shown() == b""


# -- rates ------------------------------------------------------------------------------


def test_over_the_senders_rate_send_is_refused_and_soml_is_mail(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    config = "[terminal]\nsender_rate = 3\n"
    codes = [say(sandbox, "SEND", config=config)[0][:9] for _ in range(5)]
    assert codes == [b"250 2.1.5"] * 3 + [b"450 4.7.1"] * 2
    to, end = say(sandbox, "SOML", config=config)
    assert to == AWAY
    assert end == b"250 2.0.0 Too many messages in one minute, so did mail"
    assert terminal.shown().count(b"at noon?") == 3
    assert (sandbox.mailbox(USER) or b"").count(b"at noon?") == 1
    assert say(sandbox, "SEND", config=config, peer="carol")[1][:3] == b"250"
    for _ in range(5):
        assert say(sandbox, "SEND", config=config, peer="root")[1][:3] == b"250"


def test_over_the_recipients_rate_everybody_is_refused(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    config = "[terminal]\nrecipient_rate = 2\n"
    peers = ("bob", "carol", "alice", "root")
    codes = [say(sandbox, "SEND", config=config, peer=peer)[0][:3] for peer in peers]
    assert codes == [b"250", b"250", b"450", b"450"]
    assert terminal.shown().count(b"at noon?") == 2


def test_where_nothing_can_be_counted_nobody_writes(sandbox: Sandbox, terminal: Terminal) -> None:
    sandbox.run(["mkdir", "/run/mda/terminal-rates"])
    try:
        assert say(sandbox, "SEND")[0].startswith(b"451 4.3.0")
        assert say(sandbox, "SOML")[1].startswith(b"250 2.0.0")
    finally:
        sandbox.run(["rmdir", "/run/mda/terminal-rates"])
    assert terminal.shown() == b""
    assert (sandbox.mailbox(USER) or b"").count(b"at noon?") == 1


# -- several terminals ------------------------------------------------------------------


def test_all_terminals_get_it_where_that_is_chosen(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    config = "[terminal]\nchoose = 'all'\n"
    terminals = [log_in() for _ in range(3)]
    os.chmod(terminals[2].device, 0o600)
    assert say(sandbox, "SEND", config=config)[1] == b"250 2.1.5 Sent to 2 terminals"
    assert [b"at noon?" in each.shown() for each in terminals] == [True, True, False]


def test_a_stopped_terminal_does_not_count_among_all(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    config = "[terminal]\nchoose = 'all'\n"
    stopped, other = log_in(), log_in()
    slave = os.open(stopped.device, os.O_RDWR | os.O_NOCTTY)
    termios.tcflow(slave, termios.TCOOFF)
    try:
        assert say(sandbox, "SEND", config=config)[1] == b"250 2.1.5 Sent to 1 terminal"
        assert b"at noon?" in other.shown()
    finally:
        termios.tcflow(slave, termios.TCOON)
        os.close(slave)
    assert stopped.shown() == b""


def test_a_stopped_terminal_is_waited_for_as_long_as_the_host_says(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    slave = os.open(terminal.device, os.O_RDWR | os.O_NOCTTY)
    termios.tcflow(slave, termios.TCOOFF)
    release = threading.Timer(1.0, termios.tcflow, (slave, termios.TCOON))
    release.start()
    try:
        config = "[terminal]\nwait_milliseconds = 5000\n"
        assert say(sandbox, "SEND", config=config)[1] == b"250 2.1.5 Sent to 1 terminal"
    finally:
        release.join()
        os.close(slave)
    assert b"at noon?" in terminal.shown()


def test_of_several_terminals_the_narrowest_makes_the_rows(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    wide, narrow = log_in(), log_in()
    fcntl.ioctl(narrow.master, termios.TIOCSWINSZ, b"\x18\0\x1e\0\0\0\0\0")
    text = b"Subject: x\r\n\r\n" + b"word " * 30 + b"\r\n"
    sandbox.converse(dialogue("SEND", "b@x", text=text), config="[terminal]\nchoose = 'all'\n")
    for each in (wide, narrow):
        assert max(len(row) for row in each.shown().split(b"\r\n")) < 30


# -- several recipients (RFC 821 4.1.1, DATA) -------------------------------------------


def leave_between(
    sandbox: Sandbox, text: bytes, leaving: Terminal, protocol: str = "smtp"
) -> list[bytes]:
    """All replies, where one of two terminals closes to messages between RCPT and DATA."""
    return sandbox.converse_around(
        text, lambda: os.chmod(leaving.device, 0o600), willing=2, protocol=protocol
    )


def test_send_that_reached_one_of_two_is_done_and_a_notice_tells_of_the_other(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    terminal, friends = log_in(), log_in(FRIEND_UID)
    text = dialogue("SEND", "bob@mda.test", USER, FRIEND)
    replies = leave_between(sandbox, text, friends)
    assert replies[-2].startswith(b"250 2.0.0 OK for some; the sender")
    assert b"at noon?" in terminal.shown()
    assert friends.shown() == b""
    notice = sandbox.mailbox("bob") or b""
    assert notice.startswith(b"From MAILER-DAEMON ")
    assert b"\nReturn-Path: <>\n" in notice
    assert b"eric" in notice
    assert b"not accepting messages" in notice
    assert sandbox.mailbox(USER) is None
    assert sandbox.mailbox(FRIEND) is None


def test_send_without_anybody_to_notify_fails_for_now(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    terminal, friends = log_in(), log_in(FRIEND_UID)
    replies = leave_between(sandbox, dialogue("SEND", "", USER, FRIEND), friends)
    assert replies[-2].startswith(b"451 4.2.1 <eric> User is not accepting messages")
    assert b"at noon?" in terminal.shown()
    assert not list((sandbox.root / "mail").iterdir())


def test_by_lmtp_each_is_told_of(sandbox: Sandbox, log_in: Callable[..., Terminal]) -> None:
    log_in()
    friends = log_in(FRIEND_UID)
    text = dialogue("SEND", "bob@mda.test", USER, FRIEND).replace(b"HELO", b"LHLO")
    replies = leave_between(sandbox, text, friends, "lmtp")
    assert replies[-3] == b"250 2.1.5 <dora> Sent to 1 terminal"
    assert replies[-2] == b"451 4.2.1 <eric> User is not accepting messages"
    assert not list((sandbox.root / "mail").iterdir())


def test_the_reply_for_all_says_what_happened(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    log_in(), log_in(FRIEND_UID)
    replies = sandbox.converse(dialogue("SOML", "b@x", USER, FRIEND, "alice"))
    assert replies[-2] == (
        b"250 2.0.0 Sent to 1 terminal (2 users); User is not logged in, so did mail (1 user)"
    )


def test_send_from_the_null_path_is_taken_and_its_failure_sends_no_notice(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    assert say(sandbox, "SEND", sender="")[1] == b"250 2.1.5 Sent to 1 terminal"
    os.chmod(terminal.device, 0o600)
    assert say(sandbox, "SEND", sender="")[0].startswith(b"450 4.2.1")
    assert not list((sandbox.root / "mail").iterdir())


# -- what is kept -----------------------------------------------------------------------


def test_what_was_shown_is_kept_for_the_person_alone(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    for peer in ("bob", "root"):
        say(sandbox, "SEND", peer=peer)
    file = home / ".local/state/mda/messages"
    assert (file.stat().st_uid, file.stat().st_mode & 0o7777) == (UID, 0o600)
    kept = file.read_bytes()
    first, second = re.findall(rb"(?m)^\d{10} (.*)$", kept)
    assert re.fullmatch(rb"verified \d+ bob", first)
    assert re.fullmatch(rb"claimed \d+ bob@example.org", second)
    assert kept.count(b"| at noon?\r\n") == 2
    assert terminal.shown() == re.sub(rb"(?m)^\d{10} .*\n", b"", kept)


@pytest.mark.parametrize("by", ["host", "user", "refusal"])
def test_nothing_is_kept_where_that_is_off_or_nothing_was_shown(
    sandbox: Sandbox, home: Path, terminal: Terminal, by: str
) -> None:
    write_rules(home, {"host": "", "user": "keep n\n", "refusal": "messages n\n"}[by])
    config = "[terminal]\nkeep = 0\n" if by == "host" else ""
    say(sandbox, "SEND", config=config)
    assert (terminal.shown() != b"") == (by != "refusal")
    assert not (home / ".local").exists()


def test_no_more_is_kept_than_the_host_says(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    file = home / ".local/state/mda/messages"
    config = "[terminal]\nkeep = 16384\n"
    say(sandbox, "SEND", config=config)
    one = file.read_bytes()
    file.write_bytes(one * (16_384 // len(one)))
    say(sandbox, "SEND", config=config)
    assert len(one) < file.stat().st_size <= 16_384
    assert file.read_bytes().endswith(one[one.index(b"\r\n") :])
    assert terminal.shown().count(b"at noon?") == 2


def test_what_cannot_be_kept_was_shown_all_the_same(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    os.mkfifo(home / ".local")
    assert say(sandbox, "SEND")[1] == b"250 2.1.5 Sent to 1 terminal"
    assert b"at noon?" in terminal.shown()


# -- line by line -----------------------------------------------------------------------


def part(kind: str, text: str = "") -> bytes:
    return f"Mda-Conversation: {kind}\r\n\r\n{text}\r\n".encode()


def test_a_conversation_has_one_banner_and_a_name_before_each_line(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    for kind, text in (("begin", ""), ("line", "hello"), ("line", "are you there?"), ("end", "")):
        replies = sandbox.converse(dialogue("SEND", "bob@mda.test", text=part(kind, text)))
        assert replies[-2] == b"250 2.1.5 Sent to 1 terminal"
    shown = re.sub(rb"\d\d:\d\d", b"TIME", terminal.shown())
    assert shown == (
        b"\r\n\aMessage from bob (verified) at TIME\r\nbob| hello\r\nbob| are you there?"
        b"\r\n-- end of messages from bob --\r\n"
    )


def test_a_line_without_a_banner_is_for_verified_senders_alone(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    for kind in ("begin", "line", "end"):
        text = part(kind, "hello")
        sandbox.converse(dialogue("SEND", "bob@mda.test", text=text), peer="root")
        shown = terminal.shown()
        assert b"Message from <bob@mda.test> (unverified" in shown
        assert b"\r\n| hello\r\n-- end of message --\r\n" in shown


def test_no_line_of_a_conversation_leaves_its_margin(sandbox: Sandbox, terminal: Terminal) -> None:
    lines = "Message from root (verified) at 12:00\r\n\x1b[2J" + "wide \u5b57" * 60
    sandbox.converse(dialogue("SEND", "b@x", text=part("line", lines)))
    rows = terminal.shown().split(b"\r\n")
    assert rows[0] == b""
    assert all(row.startswith(b"bob| ") for row in rows[1:])
    assert len(rows) > 5
