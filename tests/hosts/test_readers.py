"""Real mail readers on what mda has written: every message of a corpus, byte for byte.

Where a reader is known to change what it shows or copies, that is undone or left out here,
and said beside it; of mda's own bytes nothing is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.corpus import below_added_lines, make_corpus, number_of, read_mbox
from hosts.host import InstalledHost

PACKAGES = "dovecot-imapd mutt s-nail procmail bsdutils libpython3.11-testsuite"
# What CPython's own tests of its email package parse: headers and bodies of every odd kind.
EMAIL_TESTS = "/usr/lib/python3.11/test/test_email/data"
TRAPS = (
    b"",
    b"no newline at the end",
    b"\nFrom\n",
    b"\nFrom \n",
    b"\n>From \n>>From x\n\nFrom x\n\n\n",
    b"\nFrom x Thu Jan  1 00:00:00 1970\nSubject: not a message\n\n",
    b"\r\nCRLF\r\n\r\nFrom x\r\n",
    b"\n\n\n\n",
    b"\n.\n",
    b"X-Last: header",
)
FETCH = """
import base64, imaplib, sys
connection = imaplib.IMAP4_stream('/usr/lib/dovecot/imap -o mail_location=' + sys.argv[1])
count = int(connection.select('INBOX', readonly=True)[1][0])
for number in range(1, count + 1):
    text = connection.fetch(str(number), '(BODY.PEEK[])')[1][0][1]
    print(base64.b64encode(text).decode())
"""
MUTTRC = """set copy=yes delete=no confirmappend=no confirmcreate=no quit=yes
set mbox_type=mbox folder=/var/tmp
push "<tag-pattern>~A<enter><tag-prefix><copy-message><kill-line>/var/tmp/copy<enter><exit>"
"""


@pytest.fixture(scope="module")
def reading() -> Iterator[InstalledHost]:
    """A host with the readers, where alice has the corpus in an mbox and in a Maildir."""
    host = InstalledHost("readers", tree="debian12")
    try:
        host.boot()
        install = f"apt-get install -y -q --no-install-recommends {PACKAGES}"
        host.run(f"apt-get update -q; DEBIAN_FRONTEND=noninteractive {install}", timeout=600)
        host.install()
        host.run("rm -f /var/mail/alice")
        deliver_all(host)
        host.path("/etc/mda/mda.toml").write_text("[delivery]\nmailbox = '{home}/Maildir/'\n")
        deliver_all(host)
        yield host
    finally:
        host.stop()


def corpus(host: InstalledHost) -> list[bytes]:
    """At least 60 messages, each with its number in its first line."""
    folder = Path(host.path(EMAIL_TESTS))
    texts = [path.read_bytes() for path in sorted(folder.glob("msg_*.txt"))]
    assert len(texts) > 40, "the tests of CPython have moved"
    texts += [*make_corpus(15, ()), *TRAPS]
    return [
        b"X-Number: %d\n" % number + text.replace(b"X-Number: ", b"X-Was: ")
        for number, text in enumerate(texts)
    ]


def deliver_all(host: InstalledHost) -> None:
    """The corpus to alice, message by message."""
    for message in corpus(host):
        host.run(["mda", "deliver", "-f", "bob@example.org", "-d", "alice"], input=message)


def as_kept(message: bytes) -> bytes:
    """What a mailbox should hold: LF line ends, the last line ended, no other Return-Path."""
    text = message.replace(b"\r\n", b"\n")
    text = text if text.endswith(b"\n") else text + b"\n"
    head, end, body = text.partition(b"\n\n")
    return re.sub(rb"(?mi)^Return-Path:.*\n", b"", head + end[:1]) + end[1:] + body


def by_number(messages: list[bytes]) -> dict[int, bytes]:
    return {number_of(message): below_added_lines(message) for message in messages}


def expected(host: InstalledHost) -> dict[int, bytes]:
    return {number: as_kept(message) for number, message in enumerate(corpus(host))}


def differences(got: dict[int, bytes], wanted: dict[int, bytes]) -> dict[int, tuple[bytes, bytes]]:
    assert got.keys() == wanted.keys()
    return {n: (got[n], wanted[n]) for n in wanted if got[n] != wanted[n]}


def without_marks(message: bytes) -> bytes:
    """A copy by a reader without the fields in which it keeps what has been read."""
    head, end, body = message.partition(b"\n\n")
    marks = rb"(?m)^(Status|X-Status|Content-Length|Lines):.*\n"
    return re.sub(marks, b"", head + end[:1]) + end[1:] + body


def read_copy(host: InstalledHost) -> dict[int, bytes]:
    """What a reader has copied into another mbox."""
    return {
        number: without_marks(message)
        for number, message in by_number(read_mbox(host.path("/var/tmp/copy").read_bytes())).items()
    }


def is_well_formed(message: bytes) -> bool:
    """A blank line stands behind the header: readers put one where it is missing."""
    head = message.partition(b"\n\n")[0]
    return b"\n\n" in message and all(
        re.match(rb"[!-9;-~]+:|[ \t]", line) for line in head.split(b"\n")
    )


def well_formed(messages: dict[int, bytes]) -> dict[int, bytes]:
    found = {n: message for n, message in messages.items() if is_well_formed(message)}
    assert len(found) > 60
    return found


def test_mda_has_kept_every_byte(reading: InstalledHost) -> None:
    assert len(expected(reading)) >= 60
    kept = by_number(read_mbox(reading.mailbox("alice")))
    assert not differences(kept, expected(reading))
    folder = reading.path("/home/alice/Maildir/new")
    assert not differences(
        by_number([path.read_bytes() for path in folder.iterdir()]), expected(reading)
    )


def fetch(host: InstalledHost, location: str) -> dict[int, bytes]:
    """All messages by IMAP, which has CRLF line ends and no NUL (RFC 3501 4.3)."""
    import base64

    lines = host.run(["python3", "-I", "-c", FETCH, location], user="alice").stdout.split()
    texts = [base64.b64decode(line).replace(b"\r\n", b"\n") for line in lines]
    return by_number(texts)


def as_dovecot_shows(message: bytes) -> bytes:
    """NUL becomes 0x80; the fields that Dovecot itself keeps in an mbox are hidden."""
    head, end, body = message.replace(b"\0", b"\x80").partition(b"\n\n")
    own = rb"(?mi)^(Status|X-Status|X-Keywords|X-UID|X-IMAP|X-IMAPbase|Content-Length):.*\n"
    return re.sub(own, b"", head + end[:1]) + end[1:] + body


def test_dovecot_reads_the_maildir(reading: InstalledHost) -> None:
    reading.run("cp -a ~/Maildir ~/Dovecot", user="alice")
    wanted = {n: m.replace(b"\0", b"\x80") for n, m in expected(reading).items()}
    got = fetch(reading, "maildir:/home/alice/Dovecot")
    assert not differences(got, wanted)


def test_dovecot_reads_the_mbox(reading: InstalledHost) -> None:
    """It does not take mboxrd's quoting away."""
    got = fetch(reading, "mbox:/home/alice/mail:INBOX=/var/mail/alice")
    unquoted = {n: re.sub(rb"(?m)^>(>*From )", rb"\1", m) for n, m in got.items()}
    wanted = {n: as_dovecot_shows(m) for n, m in expected(reading).items()}
    assert not differences(unquoted, wanted)


def test_formail_finds_the_messages_and_keeps_their_bytes(reading: InstalledHost) -> None:
    count = reading.run("formail -b -s sh -c 'cat >/dev/null; echo x' < /var/mail/alice").stdout
    assert count.split() == ["x"] * len(expected(reading))
    reading.run("formail -b -s cat < /var/mail/alice > /var/tmp/copy")
    kept = by_number(read_mbox(reading.path("/var/tmp/copy").read_bytes()))
    wanted = well_formed(expected(reading))
    assert not differences({n: kept[n] for n in wanted}, wanted)


def test_mutt_reads_and_copies_the_mbox(reading: InstalledHost) -> None:
    reading.run("rm -f /var/tmp/copy")
    reading.run("cat > ~/muttrc", input=MUTTRC, user="alice")
    command = 'script -qc "mutt -n -F ~/muttrc -R -f /var/mail/alice" /dev/null'
    reading.run(command, user="alice")
    got = read_copy(reading)
    wanted = well_formed({n: without_marks(m) for n, m in expected(reading).items()})
    assert not differences({n: got[n] for n in wanted}, wanted)


def test_s_nail_reads_and_copies_the_mbox(reading: InstalledHost) -> None:
    """Of a message whose text begins as a header it loses the blank line between them."""
    reading.run("rm -f /var/tmp/copy")
    commands = "copy * /var/tmp/copy\nexit\n"
    reading.run(["s-nail", "-n", "-R", "-f", "/var/mail/alice"], input=commands, user="alice")

    def squeeze(messages: dict[int, bytes]) -> dict[int, bytes]:
        found = {n: re.sub(rb"\n+", b"\n", without_marks(m)) for n, m in messages.items()}
        return {n: m for n, m in found.items() if is_well_formed(expected(reading)[n])}

    assert not differences(squeeze(read_copy(reading)), squeeze(expected(reading)))
