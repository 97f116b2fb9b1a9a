"""The queue under the units that `mda install` writes: what has come goes out at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hosts.host import InstalledHost
from hosts.speaking import SMTP, dialogue, message

# The next host is this one: over LMTP every domain is ours for the user mda.
ROUTES = '"far.example" = "unix:/run/mda/lmtp.sock"\n"gone.example" = "127.0.0.1:9"\n'
WAIT = "for i in $(seq 200); do grep -qs {text} /var/mail/{user} && exit; sleep 0.1; done; exit 1"


@pytest.fixture(autouse=True)
def _routes(host: InstalledHost) -> Iterator[None]:
    host.clear_mail()
    host.run("cp -p /etc/mda/mda.toml /etc/mda/kept")
    host.run("sed -i '/^.routes.$/r /dev/stdin' /etc/mda/mda.toml", input=ROUTES)
    host.run("chmod 600 /etc/mda/mda.toml")  # root's alone, as somebody may have it
    yield
    host.run("mv /etc/mda/kept /etc/mda/mda.toml")
    host.run("rm -f /home/alice/.forward; find /var/spool/mda/queue -type f -delete")
    host.clear_mail()


def send(host: InstalledHost, recipients: list[str], text: str) -> str:
    """Mail from bob; the reply to the end of the text."""
    lines = ["EHLO x", *message("MAIL", "bob@example.org", recipients[0], text)[1:-1]]
    at = next(number for number, line in enumerate(lines) if line.startswith("RCPT"))
    lines[at + 1 : at + 1] = [f"RCPT TO:<{each}>" for each in recipients[1:]]
    return dialogue(host, SMTP, [*lines, "QUIT"])[-2]


def test_forwarded_mail_is_on_its_way_at_once(host: InstalledHost) -> None:
    host.run("cat > .forward", user="alice", input="carol@far.example\n")
    assert send(host, ["alice"], "forwarded").startswith("250 2.0.0 Queued as ")
    host.run(WAIT.format(text="forwarded", user="carol"))
    kept = host.mailbox("carol").decode()
    assert "\nReturn-Path: <bob@example.org>\n" in kept
    assert "\nDelivered-To: alice@" in kept
    assert host.run("mda queue list").stdout == "0 messages\n"
    log = host.run("journalctl -b --no-pager -o cat -t mda").stdout
    assert "to=carol@far.example sender=bob@example.org hop=" in log


def test_a_locked_mailbox_gets_its_copy_when_it_is_free(host: InstalledHost) -> None:
    host.run("echo 1 > /var/mail/alice.lock")
    host.run("sed -i 's/^#lock_seconds = .*/lock_seconds = 1/' /etc/mda/mda.toml")
    assert send(host, ["alice", "carol"], "twice").startswith("250 2.0.0")
    host.run(WAIT.format(text="twice", user="carol"))
    assert b"twice" not in host.mailbox("alice")
    host.run("rm /var/mail/alice.lock; mda queue run --now")
    host.run(WAIT.format(text="twice", user="alice"))
    assert host.mailbox("alice").count(b"twice") == 1
    assert host.mailbox("carol").count(b"twice") == 1


def test_what_cannot_be_sent_waits_and_is_shown(host: InstalledHost) -> None:
    host.run("cat > .forward", user="alice", input="x@gone.example\n")
    assert send(host, ["alice"], "waiting").startswith("250 2.0.0")
    shown = "for i in $(seq 100); do mda queue list | grep 'next try in' && exit; sleep 0.1; done"
    host.run(f"{shown}; exit 1")
    listed = host.run("mda queue list").stdout
    assert "<x@gone.example>: 451 4.4.1 No answer: Connection refused\n" in listed
    assert host.run("systemctl is-active mda-queue.path mda-queue.timer").stdout == "active\n" * 2
    refused = host.run("mda queue list", user="bob", check=False)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


def test_a_run_that_fails_is_not_started_again_at_once(host: InstalledHost) -> None:
    host.run("cat > .forward", user="alice", input="carol@far.example\n")
    host.run("chmod 000 /var/spool/mda/queue/log")
    assert send(host, ["alice"], "later").startswith("250 2.0.0")
    host.run("sleep 5")
    count = "journalctl -b --no-pager -o cat -u mda-queue.service | grep -c 'Starting mda'"
    before = int(host.run(count).stdout)
    host.run("sleep 5")
    assert int(host.run(count).stdout) - before <= 2
    host.run("chmod 700 /var/spool/mda/queue/log")
    host.run(WAIT.format(text="later", user="carol"))
