"""SEND, SOML and SAML on booted hosts, to people who have really logged in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import get_args

import pytest

from hosts.host import InstalledHost, Login, LoginKind, wait_until
from hosts.speaking import LMTP, SMTP, dialogue, message, net_smtp

METHODS = {"SEND": "send", "SOML": "send_or_mail", "SAML": "send_and_mail"}


@pytest.fixture(params=get_args(LoginKind))
def alice(request: pytest.FixtureRequest, host: InstalledHost) -> Iterator[Login]:
    """Alice, logged in with messages on, and no mail."""
    host.clear_mail()
    login = host.login("alice", request.param)
    login.mesg("y")
    yield login
    login.logout()
    host.clear_mail()


@pytest.fixture
def console(host: InstalledHost) -> Iterator[Login]:
    host.clear_mail()
    login = host.login("alice", "console")
    login.mesg("y")
    yield login
    login.hang_up()
    host.clear_mail()


def say(host: InstalledHost, verb: str, text: str, address: str = SMTP) -> list[str]:
    """Send Alice a message by `verb`; the replies to verb, RCPT and end of data."""
    lines = message(verb, "bob@example.org", "alice", text)
    if address == LMTP:
        lines[0] = "LHLO client.example"
    answers = dialogue(host, address, lines)
    return [answers[2], answers[3], answers[5] if len(answers) > 6 else answers[4]]


def test_each_verb_does_what_rfc_821_says_to_a_person_who_is_willing(
    host: InstalledHost, alice: Login
) -> None:
    for verb, is_mailed in (("SEND", False), ("SOML", False), ("SAML", True)):
        host.clear_mail()
        opened, accepted, done = say(host, verb, f"text by {verb}")
        assert (opened[:3], accepted[:3], done[:3]) == ("250", "250", "250")
        alice.wait_for(f"| text by {verb}")
        assert bool(host.mailbox("alice")) == is_mailed, verb
    assert "Message from bob (verified)" in alice.screen()
    assert alice.screen().count("| text by SEND") == 1


def test_each_verb_does_what_rfc_821_says_to_a_person_who_is_not(
    host: InstalledHost, alice: Login
) -> None:
    alice.mesg("n")
    check_fallback(host, "not accepting messages")
    assert "fallback" not in alice.screen()


def test_each_verb_does_what_rfc_821_says_to_a_person_who_is_away(host: InstalledHost) -> None:
    wait_until(lambda: not host.terminals("alice"), "Alice is logged out")
    host.clear_mail()
    check_fallback(host, "not logged in")


def check_fallback(host: InstalledHost, reason: str) -> None:
    assert say(host, "SEND", "fallback")[1].startswith("450 4.2.1 ")
    assert reason in say(host, "SEND", "fallback")[1]
    assert host.mailbox("alice") == b""
    for number, verb in enumerate(("SOML", "SAML"), 1):
        _, accepted, done = say(host, verb, "fallback")
        assert "User not active now, so will do mail" in accepted
        assert done.startswith("250 2.0.0 ")
        assert host.mailbox("alice").count(b"\n\nfallback\n\n") == number


def test_net_smtp_which_nobody_here_wrote(
    host: InstalledHost,
    console: Login,
    port: int,
) -> None:
    for verb, method in METHODS.items():
        host.clear_mail()
        steps = net_smtp(host, port, method)
        assert (steps["from"], steps["to"], steps["data"]) == ("1 250", "1 250", "1 250")
        console.wait_for(f"| text by {method}")
        assert bool(host.mailbox("alice")) == (verb == "SAML")
    assert "<bob@example.org> (unverified" in console.screen()
    console.mesg("n")
    host.clear_mail()
    assert net_smtp(host, port, "send")["to"] == "0 450"
    assert host.mailbox("alice") == b""
    assert net_smtp(host, port, "send_or_mail")["data"] == "1 250"
    assert b"text by send_or_mail" in host.mailbox("alice")


def test_the_same_by_lmtp_and_by_the_delivery_command(host: InstalledHost, console: Login) -> None:
    assert say(host, "SEND", "by lmtp", LMTP)[2].startswith("250 2.1.5 <alice> Sent to 1 terminal")
    console.wait_for("| by lmtp")
    for user in ("root", "bob"):
        words = ["mda", "deliver", "-f", "x@example.org", "-d", "alice", "-o", "send"]
        host.run(words, user=user, input=f"\nby {user}\n")
        console.wait_for(f"| by {user}")
    assert host.mailbox("alice") == b""


def test_mda_send_shows_who_really_wrote(host: InstalledHost, console: Login) -> None:
    done = host.run(["mda", "send", "alice", "lunch?"], user="bob")
    assert done.stdout == "alice: Sent to 1 terminal\n"
    console.wait_for("| lunch?")
    forged = message("SEND", f"root@{host.name}", "alice", "give me your password")
    assert dialogue(host, SMTP, forged)[5].startswith("250")
    console.wait_for("| give me your password")
    assert console.screen().count("Message from bob (verified)") == 2
    assert "root" not in console.screen().partition("| lunch?")[2]
    assert host.mailbox("alice") == b""


def test_what_reaches_the_screen_is_harmless(host: InstalledHost, console: Login) -> None:
    before = len(console.screen())
    text = "\x1b[2J\x1b]0;x\x07 \x9b5n\rMessage from root (verified)\x00 \xe2\x80\xaereversed"
    assert say(host, "SEND", text)[2].startswith("250")
    console.wait_for("reversed")
    shown = console.screen()[before:]
    assert "^[[2J" in shown
    block = shown[shown.index("Message from bob") : shown.index("-- end")]
    assert "\x1b" not in block
    assert "\\x9b" in block
    assert "\u202e" not in block
    assert "\nMessage from root" not in block.replace("\r", "\n")


def test_a_user_who_logs_out_between_rcpt_and_data_gets_it_by_mail_or_not(
    host: InstalledHost,
) -> None:
    host.clear_mail()
    alice = host.login("alice", "ssh")
    conversation = host.start(
        ["python3", "-I", "-u", "-c", _TWO_STEPS, SMTP, "SEND", "SOML"], user="bob"
    )
    assert conversation.stdout is not None
    assert conversation.stdin is not None
    assert conversation.stdout.readline() == b"250 250\n"
    alice.hang_up()
    conversation.stdin.write(b"go\n")
    said, _ = conversation.communicate(timeout=60)
    send, soml = said.decode().splitlines()
    assert send.startswith("451 4.2.1")
    assert soml.startswith("250 2.0.0")
    assert host.mailbox("alice").count(b"Subject: ") == 1
    assert b"Subject: SOML" in host.mailbox("alice")


_TWO_STEPS = """
import socket, sys
open_ones = []
for verb in sys.argv[2:]:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    replies = connection.makefile('rb')
    replies.readline()
    for line in ('HELO x', verb + ' FROM:<b@x>', 'RCPT TO:<alice>'):
        connection.sendall(line.encode() + b'\\r\\n')
        last = replies.readline()
    open_ones.append((verb, connection, replies, last[:3].decode()))
print(' '.join(each[3] for each in open_ones))
sys.stdin.readline()
for verb, connection, replies, _ in open_ones:
    connection.sendall(b'DATA\\r\\n')
    replies.readline()
    connection.sendall(b'Subject: ' + verb.encode() + b'\\r\\n\\r\\nx\\r\\n.\\r\\n')
    print(replies.readline().decode().strip())
"""


def test_who_as_any_user_lists_alice(host: InstalledHost, alice: Login) -> None:
    rows = json.loads(host.run(["mda", "who", "--json"], user="carol").stdout)
    (row,) = [row for row in rows if row["terminal"] == alice.tty]
    assert row["user"] == "alice"
    assert row["takes_messages"] is True
    assert 0 <= row["idle_seconds"] < 120
    alice.mesg("n")
    plain = host.run(["mda", "who"], user="carol").stdout
    (line,) = [line for line in plain.splitlines() if alice.tty.removeprefix("/dev/") + " " in line]
    assert line.split()[0] == "alice"
    assert line.endswith("messages n")


def test_a_program_is_not_offered_the_verbs(host: InstalledHost) -> None:
    words = ["setpriv", "--reuid=mail", "--regid=mail", "--clear-groups", "python3", "-I", "-c"]
    program = (
        "import socket; c = socket.socket(socket.AF_UNIX); c.connect('/run/mda/smtp.sock');"
        "c.sendall(b'EHLO x\\r\\nSEND FROM:<>\\r\\nQUIT\\r\\n'); f = c.makefile();"
        "print(f.read())"
    )
    said = host.run([*words, program]).stdout
    assert "250 XWHO" in said
    assert "SEND" not in said
    assert "502 5.5.1" in said


# Each way of finding a login alone, on the host and by the login where the others are blind.
ONLY = """
from mda.terminal import sessions
def silence(*_): return None
for way in {ways}:
    setattr(sessions, way, silence)
print([terminal.device for terminal in sessions.find_terminals({uid}).terminals])
"""
WAYS = ("read_utmp", "read_logind", "list_processes")


def found_by(host: InstalledHost, way: str) -> list[str]:
    """The terminals of Alice that root finds with one way and no other."""
    uid = int(host.run("id -u alice").stdout)
    program = ONLY.format(ways=[other for other in WAYS if other != way], uid=uid)
    said = host.run(["/opt/mda/bin/python", "-I", "-c", program]).stdout
    found: list[str] = json.loads(said.replace("'", '"'))
    return found


def test_each_way_of_finding_a_login_finds_what_only_it_can(host: InstalledHost) -> None:
    kinds: tuple[LoginKind, ...] = get_args(LoginKind)
    seen = {}
    for kind in kinds:
        login = host.login("alice", kind)
        for way in WAYS:
            seen[kind, way] = login.tty in found_by(host, way)
        login.hang_up() if kind in ("console", "ssh") else login.logout()
    if host.name == "debian12":
        assert seen["console", "read_utmp"]
        assert seen["ssh", "read_utmp"]
    else:
        assert not any(seen[kind, "read_utmp"] for kind in kinds), "Debian 13 has no utmp"
        assert seen["console", "read_logind"]
        assert not seen["ssh", "read_logind"], "sshd has begun to tell logind its terminal"
        assert not seen["tmux", "read_logind"]
    assert seen["ssh", "list_processes"]
    assert seen["tmux", "list_processes"]
    assert seen["screen", "list_processes"]


def test_a_login_that_only_utmp_knows_is_found(host: InstalledHost) -> None:
    """An old-style login, without PAM and outside of every slice (Debian 12 keeps utmp)."""
    if host.name != "debian12":
        assert not host.path("/run/utmp").exists()
        return
    host.clear_mail()
    login = host.start(["script", "-qfc", _OLD_STYLE_LOGIN, "/dev/null"])
    assert login.stdout is not None
    assert login.stdin is not None
    shown = b""
    while b"ready" not in shown:
        shown += login.stdout.read1(1000)  # type: ignore[attr-defined]
    try:
        assert found_by(host, "list_processes") == []
        assert found_by(host, "read_logind") == []
        assert len(found_by(host, "read_utmp")) == 1
        assert say(host, "SEND", "to an old-style login")[2].startswith("250")
        while b"| to an old-style login" not in shown:
            shown += login.stdout.read1(1000)  # type: ignore[attr-defined]
    finally:
        login.kill()
        login.communicate()
    host.run(["python3", "-I", "-c", _LOG_OUT])


_UTMP = """
import os, struct, sys, time
def record(kind, pid, line, user):
    return struct.pack('<hxxi32s4s32s256shhiii4i20x', kind, pid, line.encode(),
        line[-4:].encode(), user.encode(), b'', 0, 0, 0, int(time.time()), 0, 0, 0, 0, 0)
"""
_OLD_STYLE_LOGIN = (
    "chown alice:tty $(tty); chmod 620 $(tty); python3 -I -c '"
    + _UTMP.replace("'", '"')
    + 'open("/run/utmp", "ab").write(record(7, os.getpid(), os.ttyname(0)[5:], "alice"))'
    + "'; echo ready; exec sleep 60"
)
_LOG_OUT = """
size = 384
with open('/run/utmp', 'r+b') as file:
    records = [file.read(size)]
    while records[-1]:
        records.append(file.read(size))
    file.seek(0)
    file.truncate()
    file.write(b''.join(each for each in records if each[44:50] != b'alice\\0'))
"""
