"""Mail that leaves this host, and mail that waits: from the client's DATA to the next hop."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.addressing import Host
from support.nexthop import NextHop
from support.sandbox import SPOOL_UID, Sandbox, effective_uid, start_command
from support.serving import served, status_of

from mda.cli import check
from mda.config import Config
from mda.model import Outcome, cannot_keep
from mda.outbound import program, queue
from mda.outbound.attempt import pause
from mda.outbound.queue import Addressee, Envelope
from mda.outbound.route import parse_hop

GOOD = [b"250 2.1.5", b"250 2.0.0"]


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    yield Host(sandbox)
    sandbox.run(["sh", "-c", "rm -f /home/*/.forward*"])


def waiting(sandbox: Sandbox, folder: str) -> list[Path]:
    directory = sandbox.root / "spool/mda/queue" / folder
    return sorted(directory.iterdir()) if directory.exists() else []


def all_waiting(sandbox: Sandbox) -> list[Path]:
    return [each for folder in queue.FOLDERS for each in waiting(sandbox, folder)]


def outbound(host: Host, hop: NextHop, more: str = "") -> str:
    return f'{more}\n[routes]\n"*" = "{hop.place}"\n'


def queue_command(host: Host, *words: str, config: str = "") -> str:
    file = host.sandbox.configure(host.config + config)
    done = host.sandbox.run([*start_command(), "queue", "--config", file, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def short(replies: list[bytes]) -> list[bytes]:
    return [each[:9] for each in replies]


def test_an_alias_to_another_host_goes_there(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with NextHop() as hop:
        config = outbound(host, hop)
        assert host.send("away", config=config)[0] == (
            b"251 2.1.5 User not local; will forward to <user@far.example>"
        )
        (kept,) = waiting(host.sandbox, "new")
        assert (kept.stat().st_uid, kept.stat().st_mode & 0o777) == (SPOOL_UID, 0o600)
        queue_command(host, "run", config=config)
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<bob@mda.test>"
    assert message.recipients == [b"RCPT TO:<user@far.example>"]
    lines = message.text.split(b"\r\n")
    assert lines[0] == b"Delivered-To: away@mda.test"
    assert lines[1].startswith(b"Received: from x (local user bob")
    assert message.text.endswith(b"\r\nSubject: x\r\n\r\nFrom me\r\n")
    assert b"Return-Path" not in message.text
    assert b"\n" not in message.text.replace(b"\r\n", b"")
    assert all_waiting(host.sandbox) == []
    assert waiting(host.sandbox, "log") == []
    assert hop.lines[-1] == b"QUIT\r\n"


def test_a_list_has_its_owner_as_sender_and_one_transaction_a_hop(host: Host) -> None:
    host.alias("list: one@far.example, two@far.example, alice\nowner-list: carol\n")
    with NextHop() as hop:
        config = outbound(host, hop)
        assert short(host.send("list", config=config)) == [b"250 2.1.5", b"250 2.1.5"]
        queue_command(host, "run", config=config)
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<owner-list@mda.test>"
    assert len(message.recipients) == 2
    assert b"From me" in (host.sandbox.mailbox("alice") or b"")


def test_a_forward_file_leads_away_and_a_loop_is_seen(host: Host) -> None:
    host.forward("alice", "alice@far.example, \\alice\n")
    with NextHop() as hop:
        config = outbound(host, hop)
        assert short(host.send("alice", config=config))[0] == b"250 2.1.5"
        queue_command(host, "run", config=config)
        (message,) = hop.messages
        begin = b"HELO x\r\nMAIL FROM:<bob@mda.test>\r\nRCPT TO:<alice>\r\nDATA\r\n"
        text = begin + b"Received: by far.example; now\r\n" + message.text
        host.sandbox.clear_mail()
        replies = host.sandbox.converse(text + b".\r\nQUIT\r\n", config=host.config + config)
    assert replies[-2].startswith(b"554 5.4.6")
    assert all_waiting(host.sandbox) == []


def test_without_outbound_mail_for_others_is_deferred(host: Host) -> None:
    host.alias("away: user@far.example\n")
    config = '[outbound]\nvia = "nothing"\n'
    assert host.send("away", config=config)[0].startswith(b"451 4.4.0")


def test_what_the_hop_defers_waits_and_is_tried_again(host: Host) -> None:
    host.alias("away: user@far.example, other@far.example\n")
    codes = {b"user": b"450 4.2.1 not now\r\n"}

    def answer(line: bytes) -> bytes | None:
        return codes.get(b"user") if b"RCPT TO:<user@" in line else None

    with NextHop(answer=answer) as hop:
        config = outbound(host, hop)
        assert short(host.send("away", config=config)) == [b"250 2.1.5", b"250 2.1.5"]
        queue_command(host, "run", config=config)
        assert [each.recipients for each in hop.messages] == [[b"RCPT TO:<other@far.example>"]]
        shown = queue_command(host, "list", config=config)
        assert "<user@far.example>: 450 4.2.1 not now" in shown
        assert "other@" not in shown
        assert re.search(r"next try in [456] min", shown)
        queue_command(host, "run", config=config)
        assert len(hop.messages) == 1, "it was not due yet"
        codes.clear()
        queue_command(host, "run", "--now", config=config)
    assert [each.recipients for each in hop.messages[1:]] == [[b"RCPT TO:<user@far.example>"]]
    assert all_waiting(host.sandbox) == []


@contextlib.contextmanager
def refusing(host: Host, reply: bytes) -> Iterator[NextHop]:
    """A hop that answers every RCPT so, beside a receiver for the notices."""
    with (
        NextHop(answer=lambda line: reply if b"RCPT" in line else None) as hop,
        served(host.sandbox, "--config", host.sandbox.configure(host.config)),
    ):
        yield hop


def test_who_is_refused_for_good_is_told_about_once(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with refusing(host, b"551 5.1.6 try <x@y>\r\n") as hop:
        config = outbound(host, hop)
        host.send("away", config=config)
        queue_command(host, "run", config=config)
    notice = host.sandbox.mailbox("bob") or b""
    assert notice.count(b"\nSubject: Undeliverable mail\n") == 1
    assert b'said this:\n   "551 5.1.6 try <x@y>"\n' in notice
    assert b"Return-Path: <>\n" in notice
    assert all_waiting(host.sandbox) == []
    assert sum(line.startswith(b"RCPT") for line in hop.lines) == 1, "no redirection"


def test_a_notice_that_nobody_takes_goes_to_postmaster_once(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with refusing(host, b"550 no\r\n") as hop:
        config = outbound(host, hop)
        host.send("away", sender="gone@elsewhere.example", config=config)
        queue_command(host, "run", config=config)
    notice = host.sandbox.mailbox("root") or b""
    assert len(re.findall(rb"(?m)^From MAILER-DAEMON ", notice)) == 1
    assert b"<gone@elsewhere.example>" in notice
    assert all_waiting(host.sandbox) == []


def test_a_mailbox_that_fails_for_now_gets_its_copy_later_and_once(host: Host) -> None:
    lock = host.sandbox.root / "mail/alice.lock"
    lock.write_text("1\n")
    config = "[delivery]\nlock_seconds = 1\n"
    assert short(host.send("alice", "carol", config=config)) == [
        b"250 2.1.5",
        b"250 2.1.5",
        b"250 2.0.0",
    ]
    assert host.has("alice") == 0
    with served(host.sandbox, "--config", host.sandbox.configure(host.config + config)):
        queue_command(host, "run", config=config)
        assert "451 4.2.0" in queue_command(host, "list", config=config)
        lock.unlink()
        queue_command(host, "run", "--now", config=config)
    for user in ("alice", "carol"):
        kept = host.sandbox.mailbox(user) or b""
        assert kept.count(b"\n>From me\n") == 1, kept
        assert kept.count(b"Return-Path: <bob@mda.test>\n") == 1
    assert all_waiting(host.sandbox) == []


def test_when_all_fail_for_now_the_client_keeps_the_message(host: Host) -> None:
    lock = host.sandbox.root / "mail/alice.lock"
    lock.write_text("1\n")
    replies = host.send("alice", config="[delivery]\nlock_seconds = 1\n")
    lock.unlink()
    assert replies[-1].startswith(b"451 4.2.0")
    assert all_waiting(host.sandbox) == []


def test_a_message_is_held_released_shown_and_removed(host: Host) -> None:
    host.alias("away: user@far.example\n")
    with NextHop() as hop:
        config = outbound(host, hop)
        for _ in range(2):
            host.send("away", config=config)
        names = [each.name for each in waiting(host.sandbox, "new")]
        queue_command(host, "hold", *names)
        queue_command(host, "run", "--now", config=config)
        assert hop.messages == []
        assert queue_command(host, "list").count(", held, from <bob@mda.test>") == 2
        assert "Subject: x" in queue_command(host, "show", names[0])
        queue_command(host, "remove", names[0])
        queue_command(host, "release", names[1])
        queue_command(host, "run", config=config)
        assert len(hop.messages) == 1
    assert queue_command(host, "list") == "0 messages\n"


def test_half_a_line_of_the_log_counts_for_nothing(tmp_path: Path) -> None:
    addressees = [Addressee(b"a", b"far"), Addressee(b"b", b"far")]
    name = queue.put(str(tmp_path), Envelope("MAIL", b"x@y", addressees), [b"text\n"])
    message = queue.find(str(tmp_path), name)
    assert message is not None
    message.note({0: Outcome(250, "2.0.0", "OK")})
    log = tmp_path / "log" / name
    with log.open("ab") as file:
        file.write(b'{"outcomes": {"1": [250, "2.0')
    again = queue.find(str(tmp_path), name)
    assert again is not None
    assert [each.is_open for each in again.envelope.addressees] == [False, True]
    again.note({1: Outcome(550, "5.1.1", "No")})
    last = queue.find(str(tmp_path), name)
    assert last is not None
    assert [each.outcome and each.outcome.code for each in last.envelope.addressees] == [250, 550]


def test_the_queue_is_on_disk_before_it_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "message")
        fsync(fd)

    def note_rename(source: str, target: str) -> None:
        steps.append("name")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    queue.put(str(tmp_path), Envelope("MAIL", b"", [Addressee(b"a", b"far")]), [b"text\n"])
    assert steps == ["message", "name", "folder"]


# -- hops that fail as hops do ----------------------------------------------------------


def put(host: Host, *paths: bytes, came: float = 0.0, text: bytes = b"Subject: x\n\ntext\n") -> str:
    """One message in the queue, from bob, which nobody has tried yet."""
    directory = host.sandbox.root / "spool/mda/queue"
    parts = [path.partition(b"@") for path in paths]
    addressees = [Addressee(local_part, domain) for local_part, _, domain in parts]
    envelope = Envelope("MAIL", b"bob@mda.test", addressees, came=came)
    with effective_uid(SPOOL_UID):
        return queue.put(str(directory), envelope, [text])


def test_a_hop_that_is_down_holds_up_nobody_else(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()[1]
    for number in range(3):
        put(host, b"a%d@down.example" % number)
    put(host, b"b@down.example", b"c@far.example")
    with NextHop() as hop:
        config = outbound(host, hop) + f'"down.example" = "127.0.0.1:{closed}"\n'
        queue_command(host, "run", config=config)
        shown = queue_command(host, "list", config=config)
    assert [each.recipients for each in hop.messages] == [[b"RCPT TO:<c@far.example>"]]
    assert len(re.findall(r"@down\.example>: 451 4\.4\.1 ", shown)) == 4


@pytest.mark.parametrize("moment", [b"", b"DATA\r\n", b".", b"MAIL FROM:<bob@mda.test>\r\n"])
def test_a_hop_that_hangs_up_gets_the_message_again(host: Host, moment: bytes) -> None:
    moments = [moment]
    put(host, b"a@far.example")
    with NextHop(answer=lambda line: b"" if line in moments else None) as hop:
        config = outbound(host, hop)
        queue_command(host, "run", config=config)
        assert "451 4.4.2" in queue_command(host, "list", config=config)
        moments.clear()
        hop.messages.clear()
        queue_command(host, "run", "--now", config=config)
    assert len(hop.messages) == 1
    assert all_waiting(host.sandbox) == []


def test_the_text_goes_out_with_crlf_and_its_dots(host: Host) -> None:
    text = b"Subject: x\n\n.\n..a\nCR\rLF\r\n\xe9\0\nend"
    put(host, b"a@far.example", text=text)
    with NextHop(b"PIPELINING", b"8BITMIME", b"SIZE 100000") as hop:
        queue_command(host, "run", config=outbound(host, hop))
    (message,) = hop.messages
    assert message.text == b"Subject: x\r\n\r\n..\r\n...a\r\nCR\r\nLF\r\n\xe9\0\r\nend\r\n"
    assert message.opening == b"MAIL FROM:<bob@mda.test> SIZE=39 BODY=8BITMIME"


def test_a_hop_may_speak_lmtp_and_answer_for_each(host: Host) -> None:
    put(host, b"a@far.example", b"b@far.example")
    ends = [b"250 kept\r\n452 4.2.2 full\r\n", None]

    def answer(line: bytes) -> bytes | None:
        return ends[0] if line == b"." else None

    with NextHop(answer=answer, is_lmtp=True) as hop:
        config = outbound(host, hop)
        queue_command(host, "run", config=config)
        shown = queue_command(host, "list", config=config)
        assert "<b@far.example>: 452 4.2.2 full" in shown
        assert "<a@" not in shown
        ends.pop(0)
        queue_command(host, "run", "--now", config=config)
    assert hop.messages[1].recipients == [b"RCPT TO:<b@far.example>"]


def test_two_runs_at_once_send_once(host: Host) -> None:
    for number in range(10):
        put(host, b"a%d@far.example" % number)

    def answer(line: bytes) -> bytes | None:
        time.sleep(0.2 if line == b"." else 0)
        return None

    with NextHop(answer=answer) as hop:
        file = host.sandbox.configure(host.config + outbound(host, hop))
        command = [*start_command(), "queue", "--config", file, "run"]
        runs = [subprocess.Popen(host.sandbox.inside(command)) for _ in range(3)]
        assert [each.wait(60) for each in runs] == [0, 0, 0]
    recipients = sorted(each.recipients[0] for each in hop.messages)
    assert recipients == [b"RCPT TO:<a%d@far.example>" % number for number in range(10)]


def test_after_days_the_sender_is_told_that_it_was_in_vain(host: Host) -> None:
    put(host, b"a@far.example", came=time.time() - 121 * 3600)
    with refusing(host, b"450 no\r\n") as hop:
        queue_command(host, "run", config=outbound(host, hop))
    notice = host.sandbox.mailbox("bob") or b""
    assert b"\nAction: failed\nStatus: 5.4.7\n" in notice
    assert all_waiting(host.sandbox) == []


def test_a_delay_is_told_once_and_never_where_that_is_off(host: Host) -> None:
    put(host, b"a@far.example", came=time.time() - 5 * 3600)
    with refusing(host, b"450 no\r\n") as hop:
        off = "[outbound]\ndelay_notice_hours = 0\n"
        queue_command(host, "run", "--now", config=outbound(host, hop, off))
        assert host.sandbox.mailbox("bob") is None
        for _ in range(2):
            queue_command(host, "run", "--now", config=outbound(host, hop))
    notice = host.sandbox.mailbox("bob") or b""
    assert notice.count(b"\nSubject: Delayed mail\n") == 1
    assert b"\nAction: delayed\nStatus: 4.0.0\n" in notice
    assert len(waiting(host.sandbox, "wait")) == 1


def test_a_line_that_no_hop_need_take_is_not_sent(host: Host) -> None:
    put(host, b"a@far.example", text=b"x" * 999 + b"\n")
    with (
        NextHop() as hop,
        served(host.sandbox, "--config", host.sandbox.configure(host.config)),
    ):
        queue_command(host, "run", config=outbound(host, hop))
    assert hop.messages == []
    assert b"\nStatus: 5.6.0\n" in (host.sandbox.mailbox("bob") or b"")


def test_a_line_of_any_length_goes_where_the_route_says_so(host: Host) -> None:
    put(host, b"a@far.example", text=b"x" * 5000 + b"\n")
    with NextHop() as hop:
        queue_command(host, "run", config=f'[routes]\n"*" = "{hop.place} lines=any"\n')
    assert [each.text for each in hop.messages] == [b"x" * 5000 + b"\r\n"]


def test_octets_above_127_are_quoted_for_a_hop_that_takes_none(host: Host) -> None:
    put(host, b"a@far.example", text=b"Subject: x\n\ncaf\xe9\n.\n")
    with NextHop(b"SIZE 1000") as hop:
        queue_command(host, "run", config=outbound(host, hop))
    (message,) = hop.messages
    assert message.opening == b"MAIL FROM:<bob@mda.test>"
    assert message.text.startswith(b"Subject: x\r\nMIME-Version: 1.0\r\n")
    assert message.text.endswith(b"\r\n\r\ncaf=E9\r\n=2E\r\n")


def test_what_is_too_large_to_be_quoted_comes_back(host: Host) -> None:
    put(host, b"a@far.example", text=b"Subject: x\n\n" + b"\xe9" * 70 * 40_000 + b"\n")
    with NextHop() as hop, served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        queue_command(host, "run", config=f'[routes]\n"*" = "{hop.place} lines=any"\n')
    assert hop.messages == []
    assert b"\nStatus: 5.6.3\n" in (host.sandbox.mailbox("bob") or b"")


def test_what_cannot_be_quoted_for_such_a_hop_comes_back(host: Host) -> None:
    head = b"Subject: x\nMIME-Version: 1.0\nContent-Transfer-Encoding: base64\n\n"
    put(host, b"a@far.example", text=head + b"\xe9\n")
    with NextHop() as hop, served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        queue_command(host, "run", config=outbound(host, hop))
    assert hop.messages == []
    assert b"\nStatus: 5.6.3\n" in (host.sandbox.mailbox("bob") or b"")


def test_a_disk_that_is_nearly_full_keeps_what_is_left(host: Host) -> None:
    host.alias("away: user@far.example\n")
    config = f"[outbound]\nkeep_free = {1 << 50}\n"
    assert host.send("away", config=config)[-1] == (
        b"452 4.3.1 Insufficient system storage (queueing the message: ENOSPC)"
    )
    assert all_waiting(host.sandbox) == []
    assert waiting(host.sandbox, "part") == []


def test_what_is_for_a_terminal_is_given_up_after_an_hour(host: Host) -> None:
    directory = str(host.sandbox.root / "spool/mda/queue")
    for verb, hours in (("SEND", 0.9), ("SEND", 1.1), ("SOML", 1.1)):
        came = time.time() - hours * 3600
        addressees = [Addressee(b"joe", f"{verb}-{hours}.example".encode())]
        queue.put(directory, Envelope(verb, b"bob@mda.test", addressees, came=came), [b"x\n"])
    host.sandbox.run(["chown", "-R", "mda:mda", "/var/spool/mda/queue"])
    with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        queue_command(host, "run", config='[routes]\n"*" = "127.0.0.1:1"\n')
    notice = host.sandbox.mailbox("bob") or b""
    assert notice.count(b"\nFinal-Recipient:") == 1
    assert b"\nFinal-Recipient: rfc822; joe@SEND-1.1.example\n" in notice
    assert len(waiting(host.sandbox, "wait")) == 2


def test_more_than_a_hundred_recipients_are_several_transactions(host: Host) -> None:
    put(host, *(b"a%d@far.example" % number for number in range(230)))
    with NextHop(b"PIPELINING") as hop:
        queue_command(host, "run", config=outbound(host, hop))
    assert [len(each.recipients) for each in hop.messages] == [100, 100, 30]


def test_what_nobody_can_read_is_held(host: Host) -> None:
    name = put(host, b"a@far.example")
    (path,) = waiting(host.sandbox, "new")
    path.write_bytes(b'{"verb": 3}\n')
    with NextHop() as hop:
        queue_command(host, "run", config=outbound(host, hop))
    assert [each.name for each in waiting(host.sandbox, "held")] == [name]


def test_only_the_queue_names_places(sandbox: Sandbox) -> None:
    lines = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice> XPLACE=00\r\nQUIT\r\n"
    for peer in ("bob", "postfix"):
        replies = sandbox.converse(lines, protocol="lmtp", peer=peer)
        assert replies[-2].startswith(b"555 5.5.4")


def test_a_program_of_the_host_takes_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "sendmail"
    monkeypatch.setattr(program, "SENDMAIL", str(script))

    def hand_over(lines: str, sender: bytes) -> Outcome:
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        name = queue.put(str(tmp_path / "q"), Envelope("MAIL", sender, []), [b"one\n", b"two\n"])
        message = queue.find(str(tmp_path / "q"), name)
        assert message is not None
        return program.hand_over(message, [b"-x@far", b"b@far"])

    keep = f'printf "%s\\n" "$@" >{tmp_path}/words; cat >{tmp_path}/text'
    assert hand_over(keep, b"").code == 250
    assert (tmp_path / "words").read_text().split() == ["-i", "-f", "<>", "--", "-x@far", "b@far"]
    assert (tmp_path / "text").read_text() == "one\ntwo\n"
    refused = hand_over("cat >/dev/null; echo no such user >&2; exit 67", b"x")
    assert (refused.code, "no such user" in refused.text) == (554, True)
    assert hand_over("exit 1", b"x").code == 451
    monkeypatch.setattr(program, "_SECONDS", 0.2)
    assert hand_over("exec sleep 60", b"x").text.endswith("has not ended in 0.2 seconds")
    script.unlink()
    monkeypatch.setattr(program, "SENDMAIL", "/nonexistent")
    assert hand_over("", b"x").code == 451


def test_nothing_is_sent_of_which_no_trace_can_be_kept(host: Host) -> None:
    """A full disk must not let the same message go out again and again."""
    put(host, b"a@far.example")
    log = host.sandbox.root / "spool/mda/queue/log"
    log.chmod(0o500)
    with NextHop() as hop:
        queue_command(host, "run", config=outbound(host, hop))
    assert hop.messages == []
    (kept,) = waiting(host.sandbox, "wait")
    assert kept.stat().st_mtime > time.time() + 600
    log.chmod(0o700)


@pytest.fixture
def certificate(host: Host) -> Path:
    """A certificate for localhost that nobody has signed, with its key in the same file."""
    file = host.sandbox.root / "certificate"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(file), "-out", "-"]
    made = subprocess.run(words, check=True, capture_output=True).stdout
    with file.open("ab") as both:
        both.write(made)
    file.chmod(0o644)
    return file


@pytest.mark.parametrize(
    ("place", "trusts", "is_sent"),
    [
        ("localhost:{} tls=may", False, True),
        ("localhost:{} tls=must", True, True),
        ("localhost:{} tls=must", False, False),
        ("127.0.0.1:{} tls=must", True, False),
    ],
)
def test_tls_is_used_and_where_it_must_be_the_name_is_proven(
    host: Host, certificate: Path, place: str, *, trusts: bool, is_sent: bool
) -> None:
    put(host, b"a@far.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with NextHop(b"STARTTLS", tls=context) as hop:
        route = f'[routes]\n"*" = "{place.format(hop.port)}"\n'
        file = host.sandbox.configure(host.config + route)
        trusted = [f"SSL_CERT_FILE={certificate}"] if trusts else []
        command = ["env", *trusted, *start_command(), "queue", "--config", file, "run"]
        assert host.sandbox.run(command).returncode == 0
    assert [message.is_encrypted for message in hop.messages] == [True] * is_sent
    assert (all_waiting(host.sandbox) == []) == is_sent
    if not is_sent:
        assert ": 451 4.7.5 No TLS: " in queue_command(host, "list")


def test_a_hop_whose_tls_is_broken_gets_it_in_the_clear(host: Host) -> None:
    """It is not demanded; where it is, nothing goes out."""
    for number, (tls, count) in enumerate((("may", 1), ("must", 0))):
        put(host, b"a%d@far.example" % number)
        with NextHop(b"STARTTLS", answer=refuse_tls) as hop:
            config = f'[routes]\n"*" = "{hop.place} tls={tls}"\n'
            queue_command(host, "run", config=config)
        assert len(hop.messages) == count
        assert b"STARTTLS\r\n" in hop.lines
    assert "451 4.7.5" in queue_command(host, "list")


def refuse_tls(line: bytes) -> bytes | None:
    """Agree, and then speak no TLS."""
    return b"220 go\r\nno TLS at all\r\n" if line == b"STARTTLS\r\n" else None


@pytest.mark.parametrize(("keywords", "said"), [((), b"MAIL"), ((b"SAML",), b"SAML")])
def test_a_message_for_terminals_goes_on_as_one_where_that_is_known(
    host: Host, keywords: tuple[bytes, ...], said: bytes
) -> None:
    host.alias("away: user@far.example\n")
    with NextHop(*keywords) as hop:
        config = outbound(host, hop)
        replies = host.send("away", verb="SAML", config=config)
        assert [each[:3] for each in replies] == [b"251", b"250"]
        queue_command(host, "run", config=config)
    (message,) = hop.messages
    assert message.opening == said + b" FROM:<bob@mda.test>"


def test_soml_with_a_forward_file_is_mailed_to_the_other_host(host: Host) -> None:
    host.forward("alice", "alice@far.example\n")
    with NextHop() as hop:
        config = outbound(host, hop)
        replies = host.send("alice", verb="SOML", config=config)
        assert replies[-1].startswith(b"250 2.0.0 User is not logged in, so did mail")
        queue_command(host, "run", config=config)
    assert [each.recipients for each in hop.messages] == [[b"RCPT TO:<alice@far.example>"]]
    assert b"Return-Path" not in hop.messages[0].text


def test_what_waits_is_the_message_in_hand_and_no_earlier_one(host: Host) -> None:
    """A session's first message leaves in one form, its second fails in another."""
    host.alias("away: user@far.example\n")
    (host.sandbox.root / "mail/alice.lock").write_text("1\n")
    lines = b"HELO x\r\n"
    for to, text in ((["away"], b"first"), (["alice", "carol"], b"second")):
        lines += b"MAIL FROM:<bob@mda.test>\r\n"
        lines += b"".join(b"RCPT TO:<%b>\r\n" % each.encode() for each in to)
        lines += b"DATA\r\n\r\n" + text + b"\r\n.\r\n"
    config = host.config + "[delivery]\nlock_seconds = 1\n"
    replies = host.sandbox.converse(lines + b"QUIT\r\n", config=config)
    assert [each[:3] for each in replies[-2:]] == [b"250", b"221"]
    texts = [path.read_bytes() for path in waiting(host.sandbox, "new")]
    assert sorted(text.rsplit(b"\n\n", 1)[1] for text in texts) == [b"first\n", b"second\n"]


@contextlib.contextmanager
def locked_out(host: Host, user: str) -> Iterator[str]:
    """The mailbox of a user is locked; the configuration that soon gives up on that."""
    lock = host.sandbox.root / f"mail/{user}.lock"
    lock.write_text("1\n")
    try:
        yield "[delivery]\nlock_seconds = 1\n"
    finally:
        lock.unlink()


def test_mail_that_waits_for_a_mailbox_finds_the_new_one(host: Host) -> None:
    """The host has moved to Maildir in the meantime; nothing comes back to the sender."""
    with locked_out(host, "alice") as config:
        assert host.send("alice", "carol", config=config)[-1].startswith(b"250 ")
    maildirs = "[delivery]\nmailbox = '{home}/Maildir/'\n"
    with served(host.sandbox, "--config", host.sandbox.configure(host.config + maildirs)):
        queue_command(host, "run", config=maildirs)
    assert all_waiting(host.sandbox) == []
    kept = host.sandbox.run(
        ["sh", "-c", "cat /home/alice/Maildir/new/*; rm -r /home/alice/Maildir"]
    )
    assert kept.stdout.count(b"From me\n") == 1


def test_mail_that_waits_for_a_file_goes_to_the_mailbox_once_that_is_no_longer_named(
    host: Host,
) -> None:
    host.sandbox.run(["mkdir", "/home/alice/file"])  # no file to write to
    host.forward("alice", "/home/alice/file\n")
    assert host.send("alice", "carol")[-1].startswith(b"250 ")
    with served(host.sandbox, "--config", host.sandbox.configure(host.config)):
        queue_command(host, "run")
        assert "451 4." in queue_command(host, "list")
        host.sandbox.run(["rm", "/home/alice/.forward"])
        queue_command(host, "run", "--now")
    host.sandbox.run(["rmdir", "/home/alice/file"])
    assert host.has("alice") == 1
    assert host.sandbox.mailbox("bob") is None, "nothing has come back"


def test_a_quota_on_our_own_disk_is_no_full_mailbox() -> None:
    outcome = cannot_keep(OSError(errno.EDQUOT, "x"), "queueing the message")
    assert (outcome.code, outcome.enhanced) == (452, "4.3.1")


def test_a_message_that_is_not_surely_on_disk_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is told to come again, and must not be the second to bring it."""
    fsync = os.fsync

    def fail_for_folders(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "no")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(OSError, match="no"):
        queue.put(str(tmp_path), Envelope("MAIL", b"", [Addressee(b"a", b"far")]), [b"x\n"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_only_what_is_old_is_swept_away(tmp_path: Path) -> None:
    message = queue.put(str(tmp_path), Envelope("MAIL", b"", [Addressee(b"a", b"far")]), [b"x\n"])
    names = [f"{folder}/{name}" for folder in ("part", "log") for name in ("old", "young")]
    names.append(f"log/{message}")
    for name in names:
        (tmp_path / name).touch()
        if not name.endswith("young"):
            os.utime(tmp_path / name, (1, 1))
    queue.sweep(str(tmp_path))
    assert [name for name in names if (tmp_path / name).exists()] == [
        "part/young",
        "log/young",
        f"log/{message}",
    ]


def test_a_slow_hop_has_a_few_connections_and_holds_up_nobody(host: Host) -> None:
    for number in range(12):
        put(host, b"a%d@slow.example" % number)
    put(host, b"b@far.example")
    arrived: list[int] = []

    def dawdle(line: bytes) -> bytes | None:
        time.sleep(0.3 if line == b"." else 0)
        return None

    with NextHop(answer=dawdle) as slow, NextHop() as hop:

        def note(line: bytes) -> bytes | None:
            if line == b".":
                arrived.append(len(slow.messages))
            return None

        hop.answer = note
        config = outbound(host, hop, "[outbound]\nconnections = 3\nconnections_per_hop = 2\n")
        queue_command(host, "run", config=config + f'"slow.example" = "{slow.place}"\n')
    assert (len(slow.messages), slow.most_at_once) == (12, 2)
    assert len(hop.messages) == 1
    assert arrived[0] <= 4, "it did not wait until the others were through"
    assert all_waiting(host.sandbox) == []


def test_what_stands_in_line_and_is_held_stops_nobody_behind_it(host: Host) -> None:
    names = [put(host, b"a%d@far.example" % number) for number in range(6)]
    held: list[str] = []

    def hold(line: bytes) -> bytes | None:
        if line == b"." and not held:
            folder = host.sandbox.root / "spool/mda/queue"
            for name in names:
                if (folder / "new" / name).exists() and not (folder / "log" / name).exists():
                    held.append(name)
                    (folder / "new" / name).rename(folder / "held" / name)
                    break
        return None

    with NextHop(answer=hold) as hop:
        more = "[outbound]\nconnections_per_hop = 1\n"
        queue_command(host, "run", config=outbound(host, hop, more))
    assert len(hop.messages) == 5
    assert [each.name for each in all_waiting(host.sandbox)] == held


@pytest.mark.parametrize(("tries", "minutes"), [(1, 5), (2, 10), (3, 20), (7, 240), (99, 240)])
def test_pauses_grow_up_to_the_most(tries: int, minutes: int) -> None:
    pauses = {pause(tries, 5, 240) for _ in range(50)}
    assert all(0.9 * 60 * minutes <= each <= 1.1 * 60 * minutes for each in pauses)
    assert len(pauses) > 1, "all at one moment"


def test_what_has_no_route_goes_to_the_smarthost(host: Host) -> None:
    put(host, b"a@far.example", b"b@near.example")
    with NextHop() as hop, NextHop() as near:
        config = f'[outbound]\nsmarthost = "{hop.place}"\n'
        config += f'[routes]\n"near.example" = "{near.place}"\n'
        queue_command(host, "run", config=config)
    assert [each.recipients for each in hop.messages] == [[b"RCPT TO:<a@far.example>"]]
    assert [each.recipients for each in near.messages] == [[b"RCPT TO:<b@near.example>"]]


def test_a_route_that_is_none_holds_the_mail_and_is_found_by_check(host: Host) -> None:
    put(host, b"a@far.example")
    config = "[routes]\n'far.example' = 'a..b'\n[outbound]\nsmarthost = 'x;y'\n"
    queue_command(host, "run", config=config)
    assert ": 451 4.3.5 Its route cannot be followed" in queue_command(host, "list")
    loaded = Config({"routes": {"far.example": "a..b"}, "outbound": {"smarthost": "x;y"}})
    found = [finding.what for finding in check.check_outbound(loaded)]
    assert [each.split(":")[0] for each in found] == ["outbound.smarthost", "routes.'far.example'"]
    assert list(check.check_outbound(Config())) == []


def test_check_misses_a_sendmail_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config({"outbound": {"via": "sendmail"}})
    monkeypatch.setattr(check, "SENDMAIL", "/nonexistent")
    assert [each.what for each in check.check_outbound(config)] == [
        "outbound.via: there is no /nonexistent"
    ]


def test_check_misses_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(check.check_outbound(Config())) == []
    monkeypatch.setattr(check, "find_spec", lambda _name: None)
    (finding,) = check.check_outbound(Config())
    assert "mail for other hosts waits in vain" in finding.what
    for values in ({"via": "nothing"}, {"smarthost": "mail.example.org"}):
        assert list(check.check_outbound(Config().with_values("outbound", **values))) == []


def test_our_own_sendmail_is_no_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "systemd/sendmail.sh"
    own = tmp_path / "sendmail"
    own.write_bytes(script.read_bytes())
    own.chmod(0o755)
    monkeypatch.setattr(program, "SENDMAIL", str(own))
    monkeypatch.setattr(check, "SENDMAIL", str(own))
    name = queue.put(str(tmp_path), Envelope("MAIL", b"x@y", [Addressee(b"a", b"far")]), [b"x\n"])
    message = queue.find(str(tmp_path), name)
    assert message is not None
    assert program.hand_over(message, [b"a@far"]).enhanced == "4.3.5"
    config = Config().with_values("outbound", via="sendmail")
    (finding,) = check.check_outbound(config)
    assert "is mda itself" in finding.what


def test_the_example_routes_of_the_shipped_file_are_hops() -> None:
    text = (Path(__file__).parents[2] / "etc/mda.toml").read_text()
    rows = re.findall(r'(?m)^#("[^"]*" = "[^"]*")$', text.partition("[routes]")[2])
    assert len(rows) == 3
    for row in rows:
        parse_hop(row.split('"')[3])


def test_a_run_is_the_user_mda_for_good(host: Host) -> None:
    put(host, b"a@far.example")
    runs: list[subprocess.Popen[bytes]] = []
    seen: list[dict[str, str]] = []

    def look(line: bytes) -> bytes | None:
        if line == b".":
            seen.append(status_of(runs[0].pid))
        return None

    with NextHop(answer=look) as hop:
        file = host.sandbox.configure(host.config + outbound(host, hop))
        command = [*start_command(), "queue", "--config", file, "run"]
        runs.append(subprocess.Popen(host.sandbox.inside(command)))
        assert runs[0].wait(30) == 0
    (status,) = seen
    ids = "\t".join([str(SPOOL_UID)] * 4)
    assert (status["Uid"], status["Gid"], status["Groups"]) == (ids, ids, "")
    assert (int(status["CapEff"], 16), int(status["CapPrm"], 16)) == (0, 0)
