"""A host without an MTA: the names of sendmail are ours, and programs that know them work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hosts.host import InstalledHost, wait_until

NAMES = ("/usr/sbin/sendmail", "/usr/lib/sendmail", "/usr/bin/mailq", "/usr/bin/newaliases")
PACKAGES = "cron git-email libmailtools-perl php-cli"
PATCH = r"""
set -e
rm -rf repo && git init -q repo && cd repo
git config user.name Bob && git config user.email bob@example.org
echo one > file && git add file && git commit -q -m 'a patch for alice'
git send-email -q --confirm=never --to=alice HEAD~0 -1 >/dev/null
"""


@pytest.fixture(scope="module")
def named(host: InstalledHost) -> Iterator[InstalledHost]:
    """The host with our sendmail, and with what calls one."""
    host.run(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "
        f"{PACKAGES}",
        timeout=600,
    )  # fmt: skip
    host.run("mda install --now --sendmail")
    yield host
    host.run("mda install --now --no-sendmail")
    assert host.run(["ls", *NAMES], check=False).stdout == ""


@pytest.fixture(autouse=True)
def _empty_spool(named: InstalledHost) -> None:
    named.clear_mail()


def wait_for(host: InstalledHost, user: str, text: str, seconds: float = 30) -> str:
    wait_until(lambda: text.encode() in host.mailbox(user), f"{text!r} for {user}", seconds)
    return host.mailbox(user).decode()


def test_the_names_stay_with_the_next_installation(named: InstalledHost) -> None:
    named.run("mda install --now")
    assert named.run(["ls", *NAMES]).stdout.split() == sorted(NAMES)
    assert named.run("mailq").stdout == "0 messages\n"
    assert "all is well" in named.run("mda check").stdout


def test_a_mail_reader_sends_by_it(named: InstalledHost) -> None:
    named.run("s-nail -s lunch -b carol alice", user="bob", input="at noon?\n")
    kept = wait_for(named, "alice", "at noon?")
    assert "\nSubject: lunch\n" in kept
    assert f"\nReturn-Path: <bob@{named.name}.example.org>\n" in kept
    assert "Bcc" not in wait_for(named, "carol", "at noon?")


def test_cron_mails_what_a_job_has_said(named: InstalledHost) -> None:
    named.run("crontab -", user="alice", input="* * * * * echo the job has run\n")
    try:
        kept = wait_for(named, "alice", "the job has run", 130)
    finally:
        named.run("crontab -r", user="alice")
    assert "\nSubject: Cron <alice@" in kept


def test_git_sends_a_patch(named: InstalledHost) -> None:
    named.run(PATCH, user="bob")
    kept = wait_for(named, "alice", "a patch for alice")
    assert "\nX-Mailer: git-send-email" in kept


def test_php_mails_as_a_program_of_the_web(named: InstalledHost) -> None:
    call = "mail('alice', 'from the web', \"line\\n.\\nline\\n\", 'From: web@example.org');"
    named.run(["setpriv", "--reuid=www-data", "--clear-groups", "php", "-r", call])
    kept = wait_for(named, "alice", "from the web")
    assert "\nline\n.\nline\n" in kept
    refused = "exit(mail('x@far.example', 'x', 'y') ? 0 : 1);"
    words = ["setpriv", "--reuid=www-data", "--clear-groups", "php", "-r", refused]
    done = named.run(words, check=False)
    assert done.returncode == 1
    assert "5.7.1 <x@far.example>" in done.stderr


def test_where_an_mta_has_the_names_they_are_its(named: InstalledHost) -> None:
    named.run("mda install --no-sendmail")
    named.run("echo an MTA > /usr/sbin/sendmail")
    done = named.run("mda install --sendmail", check=False)
    assert done.returncode == 1
    assert "/usr/sbin/sendmail: another program of this name" in done.stderr
    named.run("rm /usr/sbin/sendmail; mda install --now --sendmail")
