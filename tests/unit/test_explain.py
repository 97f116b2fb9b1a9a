"""`mda explain` and `mda aliases`, as root and as a user run them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.addressing import Host
from support.sandbox import Sandbox, start_command

from mda.cli import check
from mda.config import Config


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    yield Host(sandbox)
    assert sandbox.run(["sh", "-c", "find /home -mindepth 2 -delete"]).returncode == 0


def run(host: Host, *words: str, user: str = "root", config: str = "") -> list[str]:
    done = call(host, *words, user=user, config=config)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().splitlines()


def call(
    host: Host, *words: str, user: str = "root", config: str = ""
) -> subprocess.CompletedProcess[bytes]:
    file = host.sandbox.configure(host.config + config)
    done = host.sandbox.run([*start_command(), *words, "--config", file], user=user)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def test_the_whole_way_is_told(host: Host) -> None:
    host.alias("root: alice\n")
    host.forward("alice", "\\alice, /home/alice/archive\n")
    assert run(host, "explain", "root+x@mda.test") == [
        "root+x@mda.test",
        "  mda.test: the mailbox is on this host",
        f"  root is an alias in {host.aliases}",
        "    alice forwards mail by /home/alice/.forward",
        "      alice has the mailbox /var/mail/alice",
        "      the file /home/alice/archive, written as alice",
        "to the mailbox /var/mail/alice of alice",
        "  not there yet: would be created with 0660 for alice",
        "  rules of the user's: messages y",
        "  SEND would be told 450 4.2.1 User is not logged in",
        "to the file /home/alice/archive, written as alice",
        "  not there yet: would be created with 0600 for alice",
        "RCPT would be told 250 2.1.5 Recipient OK",
    ]
    assert host.sandbox.mailbox("alice") is None


def test_a_mailbox_on_another_host_is_told(host: Host) -> None:
    host.alias("away: user@far.example\n")
    assert run(host, "explain", "away") == [
        "away",
        "  no domain: the mailbox is on this host",
        f"  away is an alias in {host.aliases}",
        "    user@far.example is a mailbox on another host",
        "to user@far.example, by the queue",
        "RCPT would be told 251 2.1.5 User not local; will forward to <user@far.example>",
    ]


def test_a_mailbox_is_told_with_its_owner_its_locks_and_what_is_wrong(host: Host) -> None:
    box = host.sandbox.root / "mail/alice"
    box.write_bytes(b"x" * 100)
    box.chmod(0o660)
    (host.sandbox.root / "mail/alice.lock").touch()
    told = run(host, "explain", "alice", config="[delivery]\nquota_size = 50\n")
    assert "  -rw-rw---- root mail, 100 bytes" in told
    assert "  locks: dotlock /var/mail/alice.lock" in told
    wrong = "a message would be told 451 4.2.0 Mailbox /var/mail/alice is owned by root, not by"
    assert any(wrong in line for line in told)
    assert any("(as root: chown alice /var/mail/alice)" in line for line in told)


def test_a_way_that_ends_is_told_with_its_reason(host: Host) -> None:
    host.forward("alice", "bob\n", mode="666")
    told = run(host, "explain", "alice@mda.test")
    reason = "451 4.3.5 /home/alice/.forward can be written by others"
    assert any(line.strip().startswith(reason) for line in told)
    assert told[-1].startswith(f"RCPT would be told {reason}")
    assert run(host, "explain", "nobody-here")[-1] == (
        "RCPT would be told 550 5.1.1 No such user here"
    )
    elsewhere = run(host, "explain", "x@elsewhere.example")
    assert "it goes on by the queue" in elsewhere[-2]
    assert elsewhere[-1].startswith("Others would be told 550 5.7.1 ")


def test_what_an_mta_hands_over_goes_its_own_way(host: Host) -> None:
    host.forward("alice", "bob\n")
    assert "to the mailbox /var/mail/bob of bob" in run(host, "explain", "alice")
    told = run(host, "explain", "--handed-over", "alice@elsewhere.example")
    assert "to the mailbox /var/mail/alice of alice" in told


def test_a_command_is_told_and_not_run(host: Host) -> None:
    shells = host.sandbox.root / "etc/shells"
    shells.write_text("/bin/bash\n")
    host.sandbox.run(["mount", "--bind", str(shells), "/etc/shells"])
    try:
        host.forward("alice", '"|touch /home/alice/ran"\n')
        told = run(host, "explain", "alice", config="[delivery]\ncommands = true\n")
    finally:
        host.sandbox.run(["umount", "/etc/shells"])
    assert "to the command 'touch /home/alice/ran', run as alice" in told
    assert host.sandbox.run(["ls", "/home/alice"]).stdout == b""


def test_a_user_may_ask_about_himself(host: Host) -> None:
    assert "to the mailbox /var/mail/alice of alice" in run(host, "explain", "alice", user="alice")
    assert run(host, "explain", "bob", user="alice")[-1].startswith("RCPT would be told 550 5.1.1")


def test_the_index_is_made_used_and_checked(host: Host) -> None:
    host.alias("root: alice\nstaff: alice, bob\n")
    assert run(host, "aliases") == [f"{host.aliases}.mda: 2 aliases"]
    assert host.send("root")[-1].startswith(b"250")
    host.alias("root: bob\nstaff: alice, bob\n")
    assert host.send("root")[-1].startswith(b"250")
    assert (host.has("alice"), host.has("bob")) == (1, 1), "a stale index was believed"
    config = Config().with_values("recipients", aliases=str(host.aliases))
    (finding,) = check.check_aliases(config)
    assert finding.remedy == "mda aliases"
    run(host, "aliases")
    assert list(check.check_aliases(config)) == []
    Path(f"{host.aliases}.mda").unlink()


def test_what_is_wrong_in_the_aliases_is_said(host: Host) -> None:
    host.alias("root alice\nstaff: bob\n")
    done = call(host, "aliases")
    assert (done.returncode, done.stderr) == (1, b"Alias root: no colon behind its name\n")
    config = Config().with_values("recipients", aliases=str(host.aliases))
    assert [finding.what for finding in check.check_aliases(config)] == [
        f"{host.aliases}: Alias root: no colon behind its name; mail for it waits"
    ]
    Path(f"{host.aliases}.mda").unlink()
    host.aliases.chmod(0o666)
    assert call(host, "aliases").returncode == 1
    assert call(host, "aliases", user="alice").stderr == b"Error: only root can do this\n"


def test_an_owner_of_files_that_is_root_is_found(host: Host) -> None:
    config = Config().with_values("recipients", aliases=str(host.aliases))
    config = config.with_values("delivery", alias_user="root")
    (finding,) = check.check_aliases(config)
    assert "alias_user" in finding.remedy


@pytest.mark.parametrize(
    ("rules", "told", "answer"),
    [
        ("messages n\\nallow bob\\n", "messages n, allow bob", "not accepting messages"),
        (
            "".join(f"deny u{number}\\n" for number in range(8)),
            "messages y, deny u0, deny u1, deny u2, deny u3, deny u4, and 3 more",
            "not logged in",
        ),
        (
            "nonsense\\n",
            ".config/mda/mesg line 1 is none that `mda mesg` writes, so nobody may write",
            "not accepting messages",
        ),
    ],
)
def test_the_persons_own_rules_about_messages_are_told(
    host: Host, rules: str, told: str, answer: str
) -> None:
    script = f"mkdir -p ~/.config/mda && printf '{rules}' > ~/.config/mda/mesg"
    home = ["env", "HOME=/home/alice", "sh", "-c", script]
    assert host.sandbox.run(home, user="alice").returncode == 0
    said = run(host, "explain", "alice")
    assert f"  rules of the user's: {told}" in said
    assert f"  SEND would be told 450 4.2.1 User is {answer}" in said
