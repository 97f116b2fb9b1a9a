"""`mda sendmail`, as cron, PHP, git and mail readers call it."""

from __future__ import annotations

import email
import re
import subprocess
from collections.abc import Iterator
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.addressing import Host
from support.sandbox import Sandbox, start_command
from support.serving import served

from mda.cli.sendmail import read_to_dot, split_header

TEXT = b"To: carol\nSubject: x\n\nhello\n"


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    host = Host(sandbox)
    with served(sandbox, "--config", sandbox.configure(host.config)):
        yield host


def call(
    host: Host, *words: str, text: bytes = TEXT, user: str = "bob"
) -> subprocess.CompletedProcess[bytes]:
    return host.sandbox.run([*start_command(), "sendmail", *words], user=user, input=text)


def mail_of(host: Host, user: str) -> Message:
    """The one message in a mailbox."""
    kept = host.sandbox.mailbox(user) or b""
    assert kept.count(b"\nReturn-Path: ") == 1, kept
    return email.message_from_bytes(kept)


def queued(host: Host) -> list[bytes]:
    return [path.read_bytes() for path in (host.sandbox.root / "spool/mda/queue/new").glob("*")]


def test_a_message_is_completed_and_delivered(host: Host) -> None:
    done = call(host, "-i", "alice", text=b"Subject: x\n\nhello\n.\nmore\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    message = mail_of(host, "alice")
    assert message["From"] == "Bob <bob@mda.test>"
    assert message["Return-Path"] == "<bob@mda.test>"
    assert re.fullmatch(r"<.+@mda\.test>", message["Message-ID"])
    assert message["Date"]
    assert message.get_payload() == "hello\n.\nmore\n\n"
    assert "local user bob" in message["Received"]


def test_what_is_there_stays_as_it_is(host: Host) -> None:
    head = b"from:Me  <me@x>\nDATE: yesterday\nMessage-Id: <1@x>\nX-Odd: \xe9\n folded\n"
    assert call(host, "alice", text=head + b"\ncaf\xe9\r\n").returncode == 0
    kept = host.sandbox.mailbox("alice") or b""
    assert kept.endswith(head + b"\ncaf\xe9\n\n")


def test_cron_names_root(host: Host) -> None:
    text = b"From: root (Cron Daemon)\nTo: root\nSubject: Cron\n\noutput\n"
    words = ("-FCronDaemon", "-i", "-B8BITMIME", "-oem", "root")
    host.alias("root: alice\n")
    assert call(host, *words, text=text, user="root").returncode == 0
    message = mail_of(host, "alice")
    assert message["From"] == "root (Cron Daemon)"
    assert message["Return-Path"] == "<root@mda.test>"


def test_php_has_the_recipients_in_the_header(host: Host) -> None:
    text = (
        b'To: Alice <alice>,\n\tcarol@mda.test\nCc: "x, y" <joe@far.example>\n'
        b"bcc: Bob <bob@mda.test>, alice\nSubject: x\nFrom: web@mda.test\n\nhello\n"
    )
    assert call(host, "-t", "-i", text=text).returncode == 0
    for user in ("alice", "carol", "bob"):
        message = mail_of(host, user)
        assert message["Bcc"] is None
        assert message["Cc"] == '"x, y" <joe@far.example>'
    (waiting,) = queued(host)
    assert b'"to": [["joe", "far.example", "", "", "", ""]]' in waiting
    assert b"\nbcc" not in waiting


def test_a_message_that_is_resent_goes_to_whom_it_is_resent(host: Host) -> None:
    text = b"Resent-To: carol\nResent-Bcc: bob\nTo: alice\nSubject: x\n\nhello\n"
    assert call(host, "-t", text=text).returncode == 0
    assert host.sandbox.mailbox("alice") is None
    assert mail_of(host, "carol")["Resent-Bcc"] is None
    assert mail_of(host, "bob")["To"] == "alice"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["-f", "me@elsewhere.example"], "<me@elsewhere.example>"),
        (["-fme@elsewhere.example"], "<me@elsewhere.example>"),
        (["-r", "me"], "<me>"),
        (["-f", ""], "<>"),
        (["-f", "<>"], "<>"),
        (["-f", "<me@x.example>"], "<me@x.example>"),
        (["-F", "Somebody Else"], "<bob@mda.test>"),
    ],
)
def test_the_sender_may_be_named(host: Host, words: list[str], path: str) -> None:
    assert call(host, *words, "alice", text=b"\nhello\n").returncode == 0
    message = mail_of(host, "alice")
    assert message["Return-Path"] == path
    if "-F" in words:
        assert message["From"] == "Somebody Else <bob@mda.test>"


@pytest.mark.parametrize(
    ("words", "body"),
    [([], "one\n\n"), (["-i"], "one\n.\ntwo\n\n"), (["-oi"], "one\n.\ntwo\n\n"),
     (["-oem", "-odb", "-v"], "one\n\n")],
)  # fmt: skip
def test_a_lone_dot_ends_a_message_unless_it_is_told_not_to(
    host: Host, words: list[str], body: str
) -> None:
    assert call(host, *words, "--", "alice", text=b"Subject: x\n\none\n.\ntwo\n").returncode == 0
    assert mail_of(host, "alice").get_payload() == body


def test_a_text_without_a_header_is_all_text(host: Host) -> None:
    assert call(host, "alice", text=b"Dear Alice,\nhow are you\n").returncode == 0
    assert mail_of(host, "alice").get_payload() == "Dear Alice,\nhow are you\n\n"


def test_who_is_unknown_is_said_and_the_others_have_it(host: Host) -> None:
    done = call(host, "alice", "nobody-here")
    assert done.returncode == 67
    assert done.stderr.startswith(b"5.1.1 <nobody-here> ")
    assert mail_of(host, "alice")["Subject"] == "x"


@pytest.mark.parametrize(
    "words", [[], ["-t"], ["-Z", "alice"], ["-bd"], ["-bz"], ["-f"]], ids=" ".join
)
def test_wrong_words_are_a_wrong_usage(host: Host, words: list[str]) -> None:
    done = call(host, *words, text=b"Subject: x\n\nhello\n")
    assert done.returncode == 64
    assert done.stderr.startswith(b"sendmail: ")
    assert list((host.sandbox.root / "mail").iterdir()) == []


def test_a_recipient_may_begin_with_a_dash(host: Host) -> None:
    host.alias("-odd: alice\n-dave: carol\n-q: bob\n")
    assert call(host, "-i", "-d8", "--", "-odd", "-dave", "-q").returncode == 0
    for user in ("alice", "carol", "bob"):
        assert mail_of(host, user)["Subject"] == "x"


def test_verifying_sends_nothing(host: Host) -> None:
    done = call(host, "-bv", "alice", "nobody-here", "joe@far.example")
    assert done.returncode == 67
    assert done.stdout.splitlines() == [
        b"alice... deliverable: <alice> Recipient OK",
        b"joe@far.example... deliverable: <joe@far.example> Recipient OK",
    ]
    assert host.sandbox.mailbox("alice") is None
    assert queued(host) == []


def test_smtp_is_spoken_by_the_receiver(host: Host) -> None:
    lines = b"EHLO x\r\nMAIL FROM:<bob@mda.test>\r\nRCPT TO:<alice>\r\nDATA\r\n"
    done = call(host, "-bs", text=lines + b"Subject: x\r\n\r\nhello\r\n.\r\nQUIT\r\n")
    assert done.returncode == 0
    assert done.stdout.startswith(b"220 mda.test ESMTP")
    assert done.stdout.endswith(b"221 2.0.0 mda.test Service closing transmission channel\r\n")
    assert "local user bob" in mail_of(host, "alice")["Received"]


def test_mailq_newaliases_and_a_run_are_ours(host: Host) -> None:
    call(host, "joe@far.example")
    assert b"<joe@far.example>" in call(host, "-bp", user="root").stdout
    assert b"Permission denied" in call(host, "-bp").stderr
    done = call(host, "-bi", user="root")
    assert done.returncode in (0, 1), done.stderr
    assert b"aliases" in done.stdout + done.stderr


def test_without_a_receiver_it_is_for_later(sandbox: Sandbox) -> None:
    done = call(Host(sandbox), "alice")
    assert done.returncode == 75
    assert b"No mda listens here" in done.stderr
    assert call(Host(sandbox), "-bs").returncode == 75


LINES = st.lists(
    st.sampled_from(
        [b"A: b", b" folded", b"", b".", b"text", b"B:\r", b"\t", b"x y: z", b"..", b"\r"]
    )
)


@given(LINES, st.integers(1, 7), st.booleans())
def test_a_header_is_parted_from_its_text_at_any_chunking(
    lines: list[bytes], size: int, is_ended: bool
) -> None:
    text = b"\n".join(lines) + (b"\n" if is_ended else b"")
    fields, rest = split_header(iter([text[at : at + size] for at in range(0, len(text), size)]))
    body = b"".join(rest)
    assert body.startswith((b"\n", b"\r\n", b" \n", b"\t\n")), body
    both = b"".join(fields) + body
    at = len(b"".join(fields))
    plain = both[:at] + both[at + 1 :]
    assert text in (both, plain, both.removesuffix(b"\n"), plain.removesuffix(b"\n"))
    assert all(b":" in field.split(b"\n")[0] for field in fields)


@given(LINES, st.integers(1, 7))
def test_a_text_ends_at_its_dot_at_any_chunking(lines: list[bytes], size: int) -> None:
    text = b"\n".join(lines)
    kept = b"".join(read_to_dot([text[at : at + size] for at in range(0, len(text), size)]))
    dot = next((at for at, line in enumerate(lines) if line.rstrip(b"\r") == b"."), None)
    wanted = text if dot is None else b"".join(line + b"\n" for line in lines[:dot])
    assert kept == wanted


def test_a_line_longer_than_memory_should_be_is_passed_on() -> None:
    text = [b"x" * 50_000, b"y" * 50_000, b".", b"\n.\n", b"not this\n"]
    assert b"".join(read_to_dot(text)) == b"x" * 50_000 + b"y" * 50_000 + b".\n"
