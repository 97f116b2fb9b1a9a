"""The commands of people at a shell: mesg, messages, reply, and typing to somebody."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.sandbox import PEOPLE_UIDS, UIDS, Sandbox, start_command
from support.serving import served, wait_until
from support.terminal import PERSON, PERSON_UID, TTY, Terminal

pytestmark = pytest.mark.usefixtures("no_counts")

FRIEND_UID = PEOPLE_UIDS["eric"]
MDA = start_command()


@pytest.fixture
def serving(sandbox: Sandbox, home: Path) -> Iterator[Path]:
    """A running `mda serve`, and the home of the person whose terminals there are."""
    with served(sandbox, "--config", sandbox.configure("")):
        yield home


def as_person(*command: str) -> list[str]:
    uid = str(PERSON_UID)
    return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", *command]


def run(sandbox: Sandbox, *words: str, user: str = "") -> subprocess.CompletedProcess[bytes]:
    """`mda WORDS` as the person, or as another `user`."""
    if user:
        return sandbox.run([*MDA, *words], user=user)
    return sandbox.run(as_person(*MDA, *words))


class Typist:
    """`mda WORDS` with a terminal of its user's own for all three descriptors."""

    def __init__(self, sandbox: Sandbox, uid: int, *words: str) -> None:
        self.master, slave = os.openpty()
        self.device = os.ttyname(slave)
        os.chown(self.device, uid, TTY)
        os.chmod(self.device, 0o620)
        become = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
        self.process = subprocess.Popen(
            sandbox.inside([*become, "setsid", "-c", *MDA, *words]),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.screen = b""

    def look(self) -> bytes:
        """All that the screen has shown so far."""
        try:
            while more := os.read(self.master, 65_536):
                self.screen += more
        except (BlockingIOError, OSError):
            pass
        return self.screen

    def wait_for(self, text: bytes) -> None:
        wait_until(lambda: text in self.look())

    def type(self, octets: bytes) -> None:
        os.write(self.master, octets)

    def finish(self) -> int:
        """The exit status."""
        status = self.process.wait(30)
        self.look()
        os.close(self.master)
        return status


def wait_to_see(terminal: Terminal, text: bytes) -> bytes:
    shown = b""

    def look() -> bool:
        nonlocal shown
        shown += terminal.shown()
        return text in shown

    wait_until(look)
    return shown


# -- mesg -------------------------------------------------------------------------------


def test_mesg_sets_the_rule_and_the_terminals_bit(sandbox: Sandbox, serving: Path) -> None:
    file = serving / ".config/mda/mesg"
    for word, bits, rule in (("n", 0o600, "messages n"), ("y", 0o620, "messages y")):
        typist = Typist(sandbox, PERSON_UID, "mesg", word)
        status = typist.process.wait(30)
        assert (status, typist.look()) == (0, b"")
        assert os.stat(typist.device).st_mode & 0o777 == bits
        typist.finish()
        assert rule in file.read_text().split("\n")
    assert (file.stat().st_uid, file.stat().st_mode & 0o7777) == (PERSON_UID, 0o600)
    assert file.parent.stat().st_mode & 0o7777 == 0o700


@pytest.mark.usefixtures("serving")
def test_mesg_y_on_a_terminal_that_stays_closed_says_so(sandbox: Sandbox) -> None:
    typist = Typist(sandbox, UIDS["bob"], "who")
    typist.process.wait(30)
    os.chown(typist.device, UIDS["carol"], 8)
    uid = str(UIDS["carol"])
    slave = os.open(typist.device, os.O_RDWR | os.O_NOCTTY)
    done = sandbox.run(
        ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", *MDA, "mesg", "y"],
        stdin=slave,
    )
    os.close(slave)
    typist.finish()
    assert done.returncode == 0
    assert done.stderr.endswith(b": n (its group is not tty)\n")


def test_mesg_without_a_terminal_sets_the_rule_alone(sandbox: Sandbox, serving: Path) -> None:
    done = run(sandbox, "mesg", "n")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"This runs on no terminal: only the rule is set.\n"
    assert "messages n" in (serving / ".config/mda/mesg").read_text()


@pytest.mark.usefixtures("serving")
def test_senders_are_allowed_denied_and_forgotten(sandbox: Sandbox, terminal: Terminal) -> None:
    for words in (("n",), ("allow", "bob"), ("deny", "*@Far.Example"), ("deny", "carol")):
        assert run(sandbox, "mesg", *words).returncode == 0
    assert run(sandbox, "send", PERSON, "hello", user="bob").stdout == b"dora: Sent to 1 terminal\n"
    done = run(sandbox, "send", "--send", PERSON, "hello", user="carol")
    assert (done.returncode, done.stdout) == (75, b"")
    assert b"User is not accepting messages" in done.stderr
    shown = run(sandbox, "mesg").stdout.decode()
    assert shown.startswith("Rules: messages n, reason y, bell y, utf8 y, keep y\n")
    assert "\n  allow bob\n  deny *@far.example\n  deny carol\n" not in shown, "sorted by sender"
    assert "\n  deny *@far.example\n  allow bob\n  deny carol\n" in shown
    assert run(sandbox, "mesg", "forget", "bob").returncode == 0
    assert run(sandbox, "send", "--send", PERSON, "hi", user="bob").returncode == 75
    again = run(sandbox, "mesg", "forget", "bob")
    assert (again.returncode, again.stderr) == (1, b"Error: there is no rule about bob\n")
    assert terminal.shown().count(b"| h") == 1


def test_mesg_show_says_what_would_happen(
    sandbox: Sandbox, serving: Path, terminal: Terminal
) -> None:
    name = terminal.device.removeprefix("/dev/")
    shown = run(sandbox, "mesg", "show").stdout.decode()
    assert f"Terminal {name}: y\n" in shown
    assert shown.endswith("would be told: User is accepting messages\n")
    os.chmod(terminal.device, 0o600)
    shown = run(sandbox, "mesg", "show").stdout.decode()
    assert f"Terminal {name}: n\n" in shown
    assert shown.endswith("would be told: User is not accepting messages\n")
    file = serving / ".config/mda/mesg"
    file.parent.mkdir(parents=True)
    file.write_text("nonsense\n")
    os.chown(file, PERSON_UID, PERSON_UID)
    shown = run(sandbox, "mesg", "show").stdout.decode()
    fault = "mesg line 1 is none that `mda mesg` writes: nobody can write to you until"
    assert fault in shown
    done = run(sandbox, "mesg", "y")
    assert done.returncode == 1
    assert b"mend or remove it first" in done.stderr
    assert file.read_text() == "nonsense\n"


@pytest.mark.parametrize("sender", ["", "a b", "x\n", "\x1b[2J"])
def test_what_is_no_sender_makes_no_rule(sandbox: Sandbox, serving: Path, sender: str) -> None:
    assert run(sandbox, "mesg", "allow", sender).returncode == 2
    assert not (serving / ".config/mda/mesg").exists()


def test_a_rule_that_cannot_be_written_is_said(sandbox: Sandbox, serving: Path) -> None:
    (serving / ".config").write_text("in the way")
    done = run(sandbox, "mesg", "n")
    assert done.returncode == 1
    assert b".config/mda/mesg" in done.stderr


@pytest.mark.parametrize(("switch", "sign"), [("bell", b"\a"), ("keep", b"")])
def test_switches_are_set(
    sandbox: Sandbox, serving: Path, terminal: Terminal, switch: str, sign: bytes
) -> None:
    assert run(sandbox, "mesg", switch, "n").returncode == 0
    run(sandbox, "send", PERSON, "hello", user="bob")
    shown = terminal.shown()
    assert b"| hello" in shown
    assert (b"\a" in shown) == (switch != "bell")
    assert (serving / ".local").exists() == (switch != "keep")
    assert sign == b"" or sign not in shown


# -- messages and reply -----------------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_messages_reads_back_the_last_ones(sandbox: Sandbox, terminal: Terminal) -> None:
    assert run(sandbox, "messages").stderr == b"Nothing is kept.\n"
    for number in range(12):
        run(sandbox, "send", "-s", f"n{number}", PERSON, f"text {number}", user="bob")
    terminal.shown()
    shown = run(sandbox, "messages").stdout.decode()
    assert re.findall(r"(?m)^\| text (\d+)$", shown) == [str(n) for n in range(2, 12)]
    assert "\a" not in shown
    assert "\r" not in shown
    assert re.match(r"\w{3} \d\d \w{3} \d{4} \d\d:\d\d\nMessage from bob \(verified\)", shown)
    shown = run(sandbox, "messages", "2").stdout.decode()
    assert re.findall(r"(?m)^Subject: n(\d+)$", shown) == ["10", "11"]
    assert run(sandbox, "messages", "0").returncode == 2
    assert run(sandbox, "messages", user="bob").stdout == b"", "another's are another's"


def test_what_no_terminal_was_shown_is_not_shown_now(sandbox: Sandbox, serving: Path) -> None:
    file = serving / ".local/state/mda/messages"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1000000000 verified 5 bob\n\x1b[2J\n")
    os.chown(file, PERSON_UID, PERSON_UID)
    assert b"\x1b" not in run(sandbox, "messages").stdout


@pytest.mark.usefixtures("serving")
def test_reply_goes_to_the_last_sender(sandbox: Sandbox, log_in: Callable[..., Terminal]) -> None:
    terminal, bobs = log_in(), log_in(UIDS["bob"])
    assert b"nobody's message is kept" in run(sandbox, "reply", "hello").stderr
    run(sandbox, "send", PERSON, "hello", user="carol")
    run(sandbox, "send", PERSON, "lunch?", user="bob")
    terminal.shown()
    done = run(sandbox, "reply", "at", "noon")
    assert (done.returncode, done.stdout) == (0, b"bob: Sent to 1 terminal\n")
    assert b"Message from dora (verified)" in (shown := bobs.shown())
    assert b"| at noon\r\n" in shown
    bobs.close()
    assert run(sandbox, "reply", "--send", "late").returncode == 75
    assert run(sandbox, "reply", "late").returncode == 0
    assert b"\nlate\n" in (sandbox.mailbox("bob") or b"")


@pytest.mark.usefixtures("serving")
def test_reply_to_whom_nobody_verified_names_him(sandbox: Sandbox, terminal: Terminal) -> None:
    words = ["-f", "bob@far.example", "-d", PERSON, "-o", "send", "--config"]
    sandbox.run(
        [*MDA, "deliver", *words, sandbox.configure("")], input=b"Subject: x\n\nfrom afar\n"
    )
    assert b"from afar" in terminal.shown()
    done = run(sandbox, "reply", "hello")
    assert done.stderr.startswith(b"To bob@far.example, who was not verified.\n")
    assert done.returncode == 0
    assert done.stdout.startswith(b"bob@far.example: Queued as ")
    assert sandbox.mailbox("bob") is None, "another bob"


@pytest.mark.usefixtures("serving")
def test_a_message_for_another_host_is_queued_and_never_typed_line_by_line(
    sandbox: Sandbox,
) -> None:
    done = run(sandbox, "send", "joe@far.example,alice", "--mail", "lunch?", user="bob")
    assert done.returncode == 0, done.stderr
    queued, here = done.stdout.splitlines()
    assert queued.startswith(b"joe@far.example: Queued as ")
    assert here == b"alice: Delivered to mailbox"
    (waiting,) = (sandbox.root / "spool/mda/queue/new").iterdir()
    assert b"\nTo: joe@far.example, alice@mda.test\n" in waiting.read_bytes()
    assert b'"to": [["joe", "far.example", "", "", "", ""]]' in waiting.read_bytes()
    typist = Typist(sandbox, UIDS["bob"], "send", "--send", "joe@far.example")
    typist.wait_for(b"To joe@far.example; end with Control-D.")
    typist.type(b"hello\n")
    typist.type(b"\x04")
    typist.wait_for(b"joe@far.example: Queued as ")
    assert typist.finish() == 0


# -- typing to somebody -----------------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_each_line_is_shown_as_it_is_typed(sandbox: Sandbox, terminal: Terminal) -> None:
    typist = Typist(sandbox, UIDS["bob"], "send", PERSON)
    typist.wait_for(b"To dora, line by line; end with Control-D.")
    shown = wait_to_see(terminal, b"Message from bob (verified)")
    assert b"|" not in shown
    typist.type(b"hello\n")
    wait_to_see(terminal, b"\r\nbob| hello")
    typist.type("żółć \x16\x1b[2J\n".encode())
    shown = wait_to_see(terminal, "żółć".encode())
    assert "\r\nbob| żółć ^[[2J".encode() in shown
    typist.type(b"\x04")
    assert wait_to_see(terminal, b"--").endswith(b"\r\n-- end of messages from bob --\r\n")
    assert typist.finish() == 0
    assert sandbox.mailbox(PERSON) is None


@pytest.mark.usefixtures("serving")
def test_who_leaves_ends_it_and_nothing_becomes_mail(
    sandbox: Sandbox, log_in: Callable[..., Terminal]
) -> None:
    terminal, friends = log_in(), log_in(FRIEND_UID)
    typist = Typist(sandbox, UIDS["bob"], "send", f"{PERSON},eric")
    wait_to_see(terminal, b"Message from bob")
    wait_to_see(friends, b"Message from bob")
    os.chmod(terminal.device, 0o600)
    typist.type(b"are you there?\n")
    typist.wait_for(
        b"dora: User is not accepting messages: that line was not shown, and no more will be."
    )
    wait_to_see(friends, b"bob| are you there?")
    friends.close()
    typist.type(b"and you?\n")
    typist.wait_for(b"eric: User is not logged in: that line was not shown")
    assert typist.finish() == 75
    assert not list((sandbox.root / "mail").iterdir())
    assert b"bob|" not in terminal.shown()


@pytest.mark.usefixtures("serving")
def test_an_interrupt_ends_it_like_the_end_of_the_input(
    sandbox: Sandbox, terminal: Terminal
) -> None:
    typist = Typist(sandbox, UIDS["bob"], "send", "--send", PERSON)
    wait_to_see(terminal, b"Message from bob")
    typist.type(b"half a l\x03")
    shown = wait_to_see(terminal, b"-- end of messages from bob --")
    assert b"half" not in shown
    assert typist.finish() == 0


def test_too_fast_a_typist_loses_a_line_and_not_the_other_side(
    sandbox: Sandbox, home: Path, terminal: Terminal
) -> None:
    assert home.exists()
    with served(sandbox, "--config", sandbox.configure("[terminal]\nsender_rate = 2\n")):
        typist = Typist(sandbox, UIDS["bob"], "send", PERSON)
        wait_to_see(terminal, b"Message from bob")
        typist.type(b"one\n")
        wait_to_see(terminal, b"bob| one")
        typist.type(b"two\n")
        typist.wait_for(b"dora: Too many messages in one minute: that line was not shown.")
        sandbox.run(["rm", "/run/mda/terminal-rates"])
        typist.type(b"three\n")
        wait_to_see(terminal, b"bob| three")
        typist.type(b"\x04")
        assert typist.finish() == 0


@pytest.mark.usefixtures("serving")
def test_to_who_is_away_one_typed_message_is_mailed(sandbox: Sandbox) -> None:
    typist = Typist(sandbox, UIDS["bob"], "send", PERSON)
    typist.wait_for(b"dora: User is not logged in.")
    typist.wait_for(b"end with Control-D")
    typist.type(b"first\nsecond\n\x04")
    assert typist.finish() == 0
    assert (sandbox.mailbox(PERSON) or b"").endswith(b"\nfirst\nsecond\n\n")
    typist = Typist(sandbox, UIDS["bob"], "send", "--send", PERSON)
    assert typist.finish() == 75
    assert b"User is not logged in" in typist.screen


# -- who, colours, completion -----------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_who_knows_the_rules_for_the_one_who_asks(sandbox: Sandbox, terminal: Terminal) -> None:
    run(sandbox, "mesg", "deny", "carol")
    name = terminal.device.removeprefix("/dev/").encode()
    for user, takes in (("bob", b"y"), ("carol", b"n")):
        rows = run(sandbox, "who", user=user).stdout.splitlines()
        (row,) = [each for each in rows if each.split()[1] == name]
        assert row.endswith(b"messages " + takes)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(("environment", "is_coloured"), [("X=1", True), ("NO_COLOR=1", False)])
def test_colours_are_for_terminals_that_may_show_them(
    sandbox: Sandbox, terminal: Terminal, environment: str, *, is_coloured: bool
) -> None:
    assert terminal.device
    assert b"\x1b" not in run(sandbox, "who").stdout
    typist = Typist(sandbox, UIDS["bob"], "who")
    typist.finish()
    assert b"\x1b[32m" in typist.screen
    words = ["env", environment, *MDA, "who"]
    master, slave = os.openpty()
    sandbox_run = subprocess.run(
        sandbox.inside(["setpriv", "--reuid", "1002", "--regid", "1002", "--clear-groups", *words]),
        stdout=slave,
        check=True,
    )
    os.close(slave)
    assert sandbox_run.returncode == 0
    time.sleep(0.05)
    assert (b"\x1b[" in os.read(master, 65_536)) == is_coloured
    os.close(master)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["mda", "se"], ["send", "sendmail", "serve"]),
        (["mda", "send", "do"], ["dora"]),
        (["mda", "send", "bob,al"], ["bob,alice"]),
        (["mda", "send", "ro"], []),
        (
            ["mda", "mesg", ""],
            ["allow", "bell", "deny", "forget", "keep", "n", "reason", "show", "utf8", "y"],
        ),
        (["mda", "mesg", "bell", ""], ["n", "y"]),
    ],
)
def test_the_shell_can_complete(sandbox: Sandbox, words: list[str], completed: list[str]) -> None:
    environment = [
        "_MDA_COMPLETE=bash_complete",
        f"COMP_WORDS={' '.join(words)}",
        f"COMP_CWORD={len(words) - 1}",
    ]
    done = sandbox.run(["env", *environment, *MDA])
    found = [line.partition(b",")[2].decode() for line in done.stdout.split()]
    assert sorted(found) == completed, done.stderr
