"""The programs of users under the real units: `mda install --commands`, and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hosts.host import InstalledHost
from hosts.speaking import SMTP, dialogue, message

PROCMAIL = '"|/usr/bin/procmail"'
ENABLE = "sed -i 's/^#commands = .*/commands = true/' /etc/mda/mda.toml"
DISABLE = "sed -i 's/^commands = .*/#commands = false/' /etc/mda/mda.toml"


@pytest.fixture(autouse=True)
def _clean(host: InstalledHost) -> Iterator[None]:
    host.clear_mail()
    yield
    host.clear_mail()
    host.run("rm -f .forward seen", user="alice")


@contextmanager
def allowed(host: InstalledHost, option: str) -> Iterator[None]:
    """The configuration allows commands, and `mda install` has been run with `option`."""
    host.run(f"{ENABLE}; mda install --now {option}")
    try:
        yield
    finally:
        host.run(f"{DISABLE}; mda install --now --no-commands")


def send(host: InstalledHost, forward: str, *texts: str) -> list[str]:
    """Mail from bob to alice in one session after she has written her forward file.

    The replies to RCPT and, where there is one, to the end of the text, for each message.
    """
    host.run("cat > .forward", user="alice", input=f"{forward}\n")
    lines = ["EHLO client.example"]
    for text in texts:
        lines += message("MAIL", "bob@example.org", "alice", text)[1:-1]
    replies = dialogue(host, SMTP, [*lines, "QUIT"])[2:-1]
    return [reply for reply in replies if not reply.startswith(("354", "250 2.1.0"))]


def test_a_users_command_runs_as_the_user(host: InstalledHost) -> None:
    with allowed(host, "--commands"):
        replies = send(host, '"|(id -un; cat) > seen"', "for a command")
    assert replies[-1] == "250 2.0.0 Delivered to command"
    seen = host.path("/home/alice/seen")
    assert seen.read_bytes().startswith(b"alice\nFrom bob@example.org ")
    assert seen.read_bytes().endswith(b"\nSubject: MAIL\n\nfor a command\n")
    assert host.run("stat -c %U:%G /home/alice/seen").stdout == "alice:alice\n"
    assert host.mailbox("alice") == b""


def test_procmail_delivers_to_a_mailbox_that_is_there(host: InstalledHost) -> None:
    host.run("install -m 660 -o alice -g mail /dev/null /var/mail/alice")
    with allowed(host, "--commands"):
        replies = send(host, PROCMAIL, "by procmail")
    assert replies[-1] == "250 2.0.0 Delivered to command"
    assert host.mailbox("alice").endswith(b"\nSubject: MAIL\n\nby procmail\n\n")
    assert not list(host.path("/var/mail").glob("*.lock"))


def test_mail_for_procmail_waits_where_that_cannot_make_a_mailbox(host: InstalledHost) -> None:
    # Set to root by its file, it has no more than the unit's two capabilities.
    with allowed(host, "--commands"):
        replies = send(host, PROCMAIL, "by procmail")
    assert replies[-1].startswith("451 4.3.0 ")
    assert host.mailbox("alice") == b""


@pytest.mark.parametrize(("option", "group"), [("--commands", "mail"), ("--no-commands", "alice")])
def test_install_decides_whether_a_program_gets_its_files_group(
    host: InstalledHost, option: str, group: str
) -> None:
    host.run("install -m 2755 -g mail /usr/bin/id /usr/local/bin/setgid-id")
    try:
        with allowed(host, option):
            replies = send(host, '"|setgid-id -gn > seen"', "text")
    finally:
        host.run("rm /usr/local/bin/setgid-id")
    assert replies[-1] == "250 2.0.0 Delivered to command"
    assert host.path("/home/alice/seen").read_text() == f"{group}\n"


def test_what_a_command_leaves_running_is_ended(host: InstalledHost) -> None:
    forward = '"|pgrep -x -u alice sleep >> seen; setsid sleep 987 & sleep 987 & cat >/dev/null"'
    with allowed(host, "--commands"):
        replies = send(host, forward, "first", "second")
    assert replies.count("250 2.0.0 Delivered to command") == 2
    assert host.path("/home/alice/seen").read_bytes() == b"", "what the first one left"


def test_mail_for_a_command_waits_where_commands_are_not_run(host: InstalledHost) -> None:
    replies = send(host, PROCMAIL, "by procmail")
    assert replies[0].startswith("451 4.3.5 ")
    assert "delivery.commands" in replies[0]
    assert host.mailbox("alice") == b""
