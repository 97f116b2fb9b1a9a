"""People on booted hosts who write to each other, with the commands that people type."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import pytest

from hosts.host import InstalledHost, Login, LoginKind, wait_until

CONFIGURE = (
    "cp /etc/mda/mda.toml /etc/mda/kept && printf '[terminal]\\n%s\\n' '{}' > /etc/mda/mda.toml"
)
RESTORE = "test ! -e /etc/mda/kept || mv /etc/mda/kept /etc/mda/mda.toml"
FORGET = "rm -rf /home/*/.config/mda /home/*/.local/state/mda /run/mda/terminal-rates"


@pytest.fixture(autouse=True)
def as_before(host: InstalledHost) -> Iterator[None]:
    """No mail, no rules, nothing kept, nothing counted; the configuration as installed."""
    host.clear_mail()
    host.run(FORGET)
    yield
    host.run(RESTORE)
    host.run(FORGET)
    host.clear_mail()


@pytest.fixture
def log_in(host: InstalledHost) -> Iterator[Callable[[str, LoginKind], Login]]:
    logins: list[Login] = []

    def start(user: str, kind: LoginKind = "ssh") -> Login:
        logins.append(host.login(user, kind))
        logins[-1].mesg("y")
        return logins[-1]

    yield start
    for login in logins:
        login.cut()
    wait_until(
        lambda: not any(host.terminals(user) for user in ("alice", "bob", "carol")),
        "everybody is logged out",
    )


def send(host: InstalledHost, user: str, *words: str) -> tuple[int, str]:
    done = host.run(["mda", "send", *words], user=user, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_terminals_own_switch_is_set_with_the_rule(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    alice = log_in("alice", "console")
    for word, mode in (("n", "600"), ("y", "620")):
        alice.command(f"mda mesg {word}")
        assert host.run(["stat", "-c", "%a", alice.tty]).stdout == f"{mode}\n"
    alice.command("mda mesg n")
    host.run(["chmod", "g+w", alice.tty])
    status, said = send(host, "bob", "--send", "alice", "by the rule")
    assert (status, "not accepting messages" in said) == (75, True), "the rule holds by itself"
    assert "by the rule" not in alice.screen()


def test_a_rule_about_a_sender_is_his_alone(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    alice = log_in("alice")
    alice.command("mda mesg deny bob")
    alice.command("mda mesg show")
    alice.wait_for("deny bob")
    alice.wait_for("User is accepting messages")
    status, said = send(host, "bob", "--send", "alice", "from bob")
    assert (status, "not accepting messages" in said) == (75, True)
    assert send(host, "carol", "--send", "alice", "from carol")[0] == 0
    alice.wait_for("| from carol")
    assert "from bob" not in alice.screen()
    assert send(host, "bob", "alice", "by mail then")[1].endswith("so did mail\n")
    assert b"by mail then" in host.mailbox("alice")


def test_who_is_logged_in_twice_reads_it_where_she_typed_last(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    console, ssh = log_in("alice", "console"), log_in("alice", "ssh")
    # A terminal's clock moves every eight seconds.
    host.run(["touch", "-a", "-d", "1 hour ago", ssh.tty])
    host.run(["touch", "-a", console.tty])
    assert send(host, "bob", "alice", "to one")[1] == "alice: Sent to 1 terminal\n"
    console.wait_for("| to one")
    assert "| to one" not in ssh.screen()
    host.run(CONFIGURE.format('choose = "all"'))
    assert send(host, "bob", "alice", "to both")[1] == "alice: Sent to 2 terminals\n"
    for login in (console, ssh):
        login.wait_for("| to both")


@pytest.mark.parametrize("kind", ["tmux", "screen"])
def test_in_a_multiplexer_it_is_seen_in_the_pane(
    host: InstalledHost, log_in: Callable[..., Login], kind: LoginKind
) -> None:
    alice = log_in("alice", kind)
    alice.command("clear")
    assert send(host, "bob", "-s", "lunch", "alice", "at noon?")[0] == 0
    alice.wait_for("-- end of message --")
    if kind == "tmux":
        picture = host.run(["tmux", "capture-pane", "-p"], user="alice").stdout
    else:
        host.run(["screen", "-X", "hardcopy", "/tmp/picture"], user="alice")
        wait_until(lambda: host.path("/tmp/picture").exists(), "a picture")
        time.sleep(0.2)
        picture = host.run(["cat", "/tmp/picture"]).stdout
        host.run(["rm", "/tmp/picture"])
    rows = [row.rstrip() for row in picture.splitlines()]
    at = next(n for n, row in enumerate(rows) if row.startswith("Message from"))
    assert re.fullmatch(r"Message from bob \(verified\) at \d\d:\d\d", rows[at])
    assert rows[at + 1 : at + 4] == ["Subject: lunch", "| at noon?", "-- end of message --"]


def test_a_reply_goes_back_and_both_can_read_it_again(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    alice, bob = log_in("alice", "console"), log_in("bob")
    bob.command('mda send alice "lunch?"')
    alice.wait_for("| lunch?")
    alice.command('mda reply "at noon"')
    alice.wait_for("bob: Sent to 1 terminal")
    bob.wait_for("| at noon")
    assert "Message from alice (verified)" in bob.screen()
    for user, text in (("alice", "| lunch?"), ("bob", "| at noon")):
        assert text in host.run(["mda", "messages"], user=user).stdout
        file = host.path(f"/home/{user}/.local/state/mda/messages")
        assert file.stat().st_mode & 0o777 == 0o600
    assert host.mailbox("alice") == host.mailbox("bob") == b""


def test_two_people_type_to_each_other_until_one_leaves(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    alice, bob = log_in("alice", "console"), log_in("bob")
    bob.type("mda send alice\n")
    bob.wait_for("line by line")
    alice.wait_for("Message from bob (verified)")
    bob.type("hello\n")
    alice.wait_for("bob| hello")
    alice.type("mda reply\n")
    alice.wait_for("To bob, line by line")
    bob.wait_for("Message from alice (verified)")
    alice.type("hello yourself\n")
    bob.wait_for("alice| hello yourself")
    bob.type("how are you?\n")
    alice.wait_for("bob| how are you?")
    alice.type("\x04")
    bob.wait_for("-- end of messages from alice --")
    alice.logout()
    bob.type("are you there?\n")
    bob.wait_for("alice: User is not logged in: that line was not shown, and no more will be.")
    bob.command("true")
    assert host.mailbox("alice") == b"", "no line becomes mail"


def test_nobody_floods_a_terminal(host: InstalledHost, log_in: Callable[..., Login]) -> None:
    host.run(CONFIGURE.format("sender_rate = 5"))
    alice = log_in("alice")
    codes = [send(host, "bob", "--send", "alice", f"n{number}")[0] for number in range(8)]
    assert codes == [0] * 5 + [75] * 3
    status, said = send(host, "bob", "alice", "by mail then")
    assert (status, said) == (0, "alice: Too many messages in one minute, so did mail\n")
    assert send(host, "carol", "--send", "alice", "from carol")[0] == 0
    alice.wait_for("| from carol")
    assert alice.screen().count("Message from bob") == 5


def test_who_shows_each_asker_what_holds_for_him(
    host: InstalledHost, log_in: Callable[..., Login]
) -> None:
    alice = log_in("alice")
    alice.command("mda mesg deny bob")
    takes = {}
    for user in ("bob", "carol"):
        rows = json.loads(host.run(["mda", "who", "--json"], user=user).stdout)
        (takes[user],) = [row["takes_messages"] for row in rows if row["terminal"] == alice.tty]
    assert takes == {"bob": False, "carol": True}


def test_the_shell_completes_words(host: InstalledHost) -> None:
    script = "/usr/local/share/bash-completion/completions/mda"
    ask = "COMP_WORDS=(mda send al); COMP_CWORD=2; _mda_completion mda; echo ${COMPREPLY[@]}"
    done = host.run(["bash", "-c", f"source {script}; {ask}"], user="bob")
    assert done.stdout == "alice\n"
    assert host.path("/usr/local/share/zsh/site-functions/_mda").exists()
    assert host.path("/usr/local/share/fish/vendor_completions.d/mda.fish").exists()
