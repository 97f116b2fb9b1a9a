"""Clients that nobody here wrote: swaks, curl and Net::SMTP speak to an installed mda."""

from __future__ import annotations

import re

import pytest

from hosts.host import InstalledHost
from hosts.speaking import LMTP, SMTP

TEXT = "Subject: t\n\n.\n..\n.x\nFrom me\nlast\n"
KEPT = "Subject: t\n\n.\n..\n.x\n>From me\nlast\n\n"


@pytest.fixture(autouse=True)
def _empty_spool(host: InstalledHost) -> None:
    host.clear_mail()


@pytest.mark.parametrize(("protocol", "path"), [("ESMTP", SMTP), ("LMTP", LMTP)])
def test_swaks_pipelines(host: InstalledHost, protocol: str, path: str) -> None:
    words = ["swaks", "--protocol", protocol, "--socket", path, "--pipeline", "-f", "bob@x"]
    words += ["-t", "alice,nobody-here,carol,alice", "--data", "-"]
    said = host.run(words, user="bob", input=TEXT.removesuffix("\n"), check=False).stdout
    replies = re.findall(r"(?m)^<(?:-|\*\*) +(\d{3}) (.*)$", said)
    assert [code for code, _ in replies if code == "550"] == ["550"]
    assert [code for code, _ in replies].count("354") == 1
    final = ["250", "250", "250"] if protocol == "LMTP" else ["250"]
    assert [code for code, _ in replies][-1 - len(final) :] == [*final, "221"]
    for user in ("alice", "carol"):
        assert host.mailbox(user).decode().endswith("0000\n" + KEPT)
        assert host.mailbox(user).count(b"\nSubject: t\n") == 1


def curl(host: InstalledHost, port: int, *words: str, text: str = "") -> str:
    """What curl shows of the replies, or prints; it must be content."""
    url = f"smtp://127.0.0.1:{port}/client.example"
    return host.run(["curl", "-sS", url, *words], user="bob", input=text).stdout


def test_curl_sends_a_message(host: InstalledHost, port: int) -> None:
    words = ["--mail-from", "bob@example.org", "--mail-rcpt", f"alice@{host.name}.example.org"]
    curl(host, port, *words, "--crlf", "--upload-file", "-", text=TEXT)
    kept = host.mailbox("alice").decode()
    assert kept.endswith("0000\n" + KEPT)
    assert "Received: from client.example ([127.0.0.1])" in kept


def test_curl_asks_for_help_and_names(host: InstalledHost, port: int) -> None:
    assert re.search(r"(?m)^214-2\.0\.0 HELO EHLO MAIL RCPT DATA", curl(host, port))
    mailbox = f"<alice@{host.name}.example.org>"
    assert curl(host, port, "--mail-rcpt", "alice").rstrip().endswith(f"250 2.1.5 {mailbox}")
    assert mailbox in curl(host, port, "--mail-rcpt", "alice", "--request", "EXPN")
    assert "250 2.0.0 OK" in curl(host, port, "--request", "NOOP")


NET_SMTP = """
use strict; use Net::SMTP;
my $smtp = Net::SMTP->new('127.0.0.1', Port => $ARGV[0], Hello => 'perl.example') or die 'no';
print 'verify ', ($smtp->verify('alice') ? 1 : 0), ' ', $smtp->code, ' ', $smtp->message;
print 'nobody ', ($smtp->verify('nobody-here') ? 1 : 0), ' ', $smtp->code, "\\n";
print 'expand ', join('|', map { s/\\n//r } $smtp->expand('alice')), "\\n";
print 'help ', scalar(my @lines = split(/\\n/, $smtp->help())), ' ', $smtp->code, "\\n";
print 'reset ', ($smtp->reset() ? 1 : 0), ' ', $smtp->code, "\\n";
print 'quit ', ($smtp->quit ? 1 : 0), ' ', $smtp->code, "\\n";
"""


def test_net_smtp_verifies_and_expands(host: InstalledHost, port: int) -> None:
    said = host.run(["perl", "-e", NET_SMTP, str(port)], user="bob").stdout
    answers = dict(line.split(" ", 1) for line in said.splitlines())
    mailbox = f"<alice@{host.name}.example.org>"
    assert answers["verify"] == f"1 250 2.1.5 {mailbox}"
    assert answers["nobody"] == "0 550"
    assert mailbox in answers["expand"]
    assert answers["help"] == "4 214"
    assert (answers["reset"], answers["quit"]) == ("1 250", "1 221")
