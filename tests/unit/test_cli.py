"""The commands, run as their users run them, inside a private view of the host."""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.sandbox import UIDS, Sandbox, effective_uid, start_command

from mda.cli.deliver import report
from mda.cli.who import spell_idle
from mda.model import Outcome

MDA = start_command()
MESSAGE = b"Subject: hello\n\nFrom here\n.\n..\nlast line"
STORED = b"Subject: hello\n\n>From here\n.\n..\nlast line\n\n"


def body(mailbox: bytes | None) -> bytes:
    assert mailbox is not None
    return mailbox[mailbox.index(b"Subject:") :]


class Served(NamedTuple):
    """A running `mda serve`: its master's process and what it has announced."""

    pid: int
    lines: list[str]

    def nursery(self) -> int:
        """The process that forks the sessions."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        (found,) = [int(pid) for pid in children if os.getsid(int(pid)) == int(pid)]
        return found


@contextlib.contextmanager
def served(sandbox: Sandbox, *arguments: str, user: str = "root") -> Iterator[Served]:
    """`mda serve` inside, as `user`, until the end of the block."""
    command = [*MDA, "serve", *arguments]
    if user != "root":
        uid = str(UIDS[user])
        home = ["env", "-u", "XDG_STATE_HOME", f"HOME=/home/{user}"]
        identity = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]
        command = [*identity, *home, *command]
    process = subprocess.Popen(
        sandbox.inside(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("mailbox"):
            break
    try:
        yield Served(process.pid, lines)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert "Traceback" not in errors, errors
        assert process.returncode == 0, errors


def connect(sandbox: Sandbox, path: str, user: str) -> socket.socket:
    """A connection to a Unix socket inside, with the credentials of `user`."""
    held = sandbox.inside([])[2]
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    with effective_uid(0):
        target = f"/proc/{held}/root{path}"
    # /proc/PID/root is root's alone to pass, so the user gets there by a descriptor.
    directory = os.open(os.path.dirname(target), os.O_PATH)
    with effective_uid(UIDS.get(user, 0)):
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(target)}")
    os.close(directory)
    return connection


def dialogue(connection: socket.socket, text: bytes) -> bytes:
    with connection:
        said = b""
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                said += more
    return said


def test_deliver_as_root_puts_it_into_each_mailbox(sandbox: Sandbox) -> None:
    done = sandbox.run(
        [*MDA, "deliver", "-f", "bob@example.org", "-d", "alice", "-d", "carol"], input=MESSAGE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for user in ("alice", "carol"):
        kept = sandbox.mailbox(user)
        assert kept is not None
        assert kept.startswith(b"From bob@example.org ")
        assert b"\nReturn-Path: <bob@example.org>\n" in kept
        assert body(kept) == STORED
        assert (sandbox.root / "mail" / user).stat().st_uid == UIDS[user]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (b"From old@x Mon Jan  1 00:00:00 2024\n" + MESSAGE, STORED),
        (MESSAGE.replace(b"\n", b"\r\n"), STORED),
        (b"Subject: a\n\n\rlone\r\r\n\n", b"Subject: a\n\n\rlone\r\n\n\n"),
    ],
)
def test_deliver_takes_what_mtas_give(sandbox: Sandbox, text: bytes, kept: bytes) -> None:
    done = sandbox.run([*MDA, "deliver", "-f", "b@x", "-d", "alice"], input=text)
    assert done.returncode == 0, done.stderr
    assert body(sandbox.mailbox("alice")) == kept
    assert (sandbox.mailbox("alice") or b"").count(b"\nFrom ") == 0


@pytest.mark.parametrize(
    ("arguments", "status", "first"),
    [
        (["-d", "nobody-here"], 67, b"5.1.1 <nobody-here>"),
        (["-d", "alice", "-d", "nobody-here"], 67, b"5.1.1 <nobody-here>"),
        (["-d", "alice", "-o", "send"], 75, b"4.2.1 <alice>"),
        (["-d", "../alice"], 67, b"5.1.1"),
        (["-d", "alice;id"], 67, b"5.1.1"),
        (["--what"], 75, b"Usage"),
        (["-d", "alice", "--config", "/nonexistent.toml"], 75, b"4.3.5"),
    ],
)
def test_deliver_leaves_only_the_statuses_that_mtas_understand(
    sandbox: Sandbox, arguments: list[str], status: int, first: bytes
) -> None:
    done = sandbox.run([*MDA, "deliver", "-f", "b@x", *arguments], input=MESSAGE)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(first)


def test_deliver_of_a_message_that_cannot_be_stored_is_75(sandbox: Sandbox) -> None:
    (sandbox.root / "mail/alice").mkdir()
    try:
        done = sandbox.run([*MDA, "deliver", "-d", "alice"], input=MESSAGE)
    finally:
        (sandbox.root / "mail/alice").rmdir()
    assert done.returncode == 75
    assert done.stderr.startswith(b"4.")


def test_deliver_without_privilege_and_without_a_daemon_is_75(sandbox: Sandbox) -> None:
    done = sandbox.run([*MDA, "deliver", "-d", "alice"], user="alice", input=MESSAGE)
    assert done.returncode == 75
    assert done.stderr.startswith(b"4.4.1 <alice> No mda listens here")


def test_deliver_without_privilege_hands_over_to_the_daemon(sandbox: Sandbox) -> None:
    with served(sandbox):
        done = sandbox.run(
            [*MDA, "deliver", "-f", "bob@example.org", "-d", "alice"], user="alice", input=MESSAGE
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert body(sandbox.mailbox("alice")) == STORED
        big = b"Subject: big\n\n" + b".dots\nFrom x\n" * 100_000
        done = sandbox.run([*MDA, "deliver"], user="carol", input=big)
        assert (done.returncode, done.stderr) == (0, b"")
    kept = body(sandbox.mailbox("carol"))
    assert kept == big.replace(b"\nFrom", b"\n>From") + b"\n"


def test_send_reports_per_recipient_what_happened(sandbox: Sandbox) -> None:
    with served(sandbox):
        done = sandbox.run([*MDA, "send", "alice,nobody-here", "lunch?"], user="bob")
        assert done.stdout == b"alice: User is not logged in, so did mail\n"
        assert done.stderr.startswith(b"5.1.1 <nobody-here>")
        assert done.returncode == 67
        done = sandbox.run([*MDA, "send", "alice", "carol"], user="bob", input=b"from stdin\n")
        assert done.returncode == 0
        assert done.stdout.count(b"so did mail") == 2
        done = sandbox.run([*MDA, "send", "--send", "alice", "now"], user="bob")
        assert (done.returncode, done.stdout) == (75, b"")
        done = sandbox.run(
            [*MDA, "send", "--mail", "-s", "caf\xe9", "alice", "za\u017c"], user="bob"
        )
        assert done.returncode == 0, done.stderr
    kept = sandbox.mailbox("alice") or b""
    assert kept.count(b"From: bob@mda.test\n") == 3
    assert b"\n\nlunch?\n\n" in kept
    assert b"\n\nfrom stdin\n\n" in kept
    assert b"za\xc5\xbc\n" in kept
    assert b"(local user bob, uid 1002)" in kept


def test_who_without_a_daemon_says_so(sandbox: Sandbox) -> None:
    done = sandbox.run([*MDA, "who"], user="bob")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"No mda listens here" in done.stderr


def test_who_as_json_is_a_list(sandbox: Sandbox) -> None:
    with served(sandbox):
        done = sandbox.run([*MDA, "who", "--json"], user="bob")
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), list)


def test_serve_delivers_over_both_sockets_and_tcp(sandbox: Sandbox) -> None:
    listen = ["unix:/run/mda/smtp.sock", "lmtp+unix:/run/mda/lmtp.sock", "127.0.0.1:0"]
    with served(sandbox, *(word for each in listen for word in ("--listen", each))) as daemon:
        port = int(re.findall(r"listening on 127\.0\.0\.1:(\d+)", "\n".join(daemon.lines))[0])
        smtp = (
            b"EHLO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\nDATA\r\nSubject: 1\r\n.\r\nQUIT\r\n"
        )
        lmtp = smtp.replace(b"EHLO", b"LHLO")
        assert b"250 2.0.0 Delivered" in dialogue(
            connect(sandbox, "/run/mda/smtp.sock", "bob"), smtp
        )
        assert b"250 2.0.0 <alice> Deliv" in dialogue(
            connect(sandbox, "/run/mda/lmtp.sock", "bob"), lmtp
        )
        said = dialogue(socket.create_connection(("127.0.0.1", port)), smtp)
        assert b"250 2.0.0 Delivered" in said
    kept = sandbox.mailbox("alice") or b""
    assert kept.count(b"(local user bob, uid 1002)") == 2
    assert kept.count(b"([127.0.0.1])") == 1


def test_serve_holds_each_user_to_his_share_and_serves_the_next(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nconnections_per_user = 3\n")
    with served(sandbox, "--config", config):
        held = [connect(sandbox, "/run/mda/smtp.sock", "bob") for _ in range(3)]
        assert [each.recv(100)[:4] for each in held] == [b"220 "] * 3
        assert b"421 4.7.0" in dialogue(connect(sandbox, "/run/mda/smtp.sock", "bob"), b"")
        assert b"221 2.0.0" in dialogue(
            connect(sandbox, "/run/mda/smtp.sock", "carol"), b"QUIT\r\n"
        )
        assert b"221 2.0.0" in dialogue(held.pop(), b"QUIT\r\n")
        until = time.monotonic() + 10
        while b"220" not in dialogue(connect(sandbox, "/run/mda/smtp.sock", "bob"), b"QUIT\r\n"):
            assert time.monotonic() < until
        for each in held:
            each.close()


def test_a_nursery_that_is_killed_is_replaced(sandbox: Sandbox) -> None:
    with served(sandbox) as daemon:
        nursery = daemon.nursery()
        os.kill(nursery, signal.SIGKILL)
        while os.path.exists(f"/proc/{nursery}"):
            time.sleep(0.01)
        for _ in range(2):
            said = dialogue(connect(sandbox, "/run/mda/smtp.sock", "bob"), b"QUIT\r\n")
            assert b"221 2.0.0" in said


def test_reload_takes_a_good_configuration_and_keeps_the_old_for_a_broken_one(
    sandbox: Sandbox,
) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 70000\n")

    def size() -> bytes:
        said = dialogue(connect(sandbox, "/run/mda/smtp.sock", "bob"), b"EHLO x\r\nQUIT\r\n")
        found = re.search(rb"SIZE (\d+)", said)
        assert found is not None
        return found[1]

    with served(sandbox, "--config", config) as daemon:
        assert size() == b"70000"
        held = connect(sandbox, "/run/mda/smtp.sock", "carol")
        held.recv(100)
        sandbox.configure("[receiver]\nmessage_size = 80000\n")
        os.kill(daemon.pid, signal.SIGHUP)
        until = time.monotonic() + 10
        while size() != b"80000":
            assert time.monotonic() < until
        sandbox.configure("[receiver]\nmessage_sizes = 90000\n")
        os.kill(daemon.pid, signal.SIGHUP)
        time.sleep(0.2)
        assert size() == b"80000"
        assert b"221" in dialogue(held, b"QUIT\r\n"), "a running session was cut"


def test_at_the_end_open_sessions_are_told(sandbox: Sandbox) -> None:
    with served(sandbox):
        held = connect(sandbox, "/run/mda/smtp.sock", "bob")
        held.recv(100)
    assert held.recv(1000).startswith(b"421 4.3.2 mda.test Shutting down")
    held.close()


def test_a_user_serves_himself_alone(sandbox: Sandbox) -> None:
    with served(sandbox, user="carol") as daemon:
        assert daemon.lines[-1] == "mailbox /home/carol/.local/state/mda/mbox"
        port = int(re.findall(r"listening on 127\.0\.0\.1:(\d+)", "\n".join(daemon.lines))[0])
        smtp = (
            b"EHLO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<carol>\r\nRCPT TO:<alice>\r\n"
            b"DATA\r\nSubject: 1\r\n.\r\nQUIT\r\n"
        )
        said = dialogue(socket.create_connection(("127.0.0.1", port)), smtp)
        assert b"250 2.1.5 <carol>" in said
        assert b"550 5.1.1 <alice>" in said
        assert b"250 2.0.0 Delivered" in said
        own = ["env", "HOME=/home/carol"]
        done = sandbox.run([*own, *MDA, "send", "carol", "note to self"], user="carol")
        assert done.stdout == b"carol: User is not logged in, so did mail\n", done.stderr
        done = sandbox.run([*own, *MDA, "deliver"], user="carol", input=MESSAGE)
        assert done.returncode == 0, done.stderr
    done = sandbox.run(["cat", "/home/carol/.local/state/mda/mbox"], user="carol")
    assert done.stdout.count(b"\nReturn-Path: ") == 3
    assert b"note to self" in done.stdout
    assert sandbox.mailbox("carol") is None


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "lmtp+0.0.0.0:25", "unix:here"])
def test_a_bad_address_is_refused_at_once(sandbox: Sandbox, address: str) -> None:
    done = sandbox.run([*MDA, "serve", "--listen", address])
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: ")
    assert b"Traceback" not in done.stderr


def test_the_commands_list_themselves(sandbox: Sandbox) -> None:
    done = sandbox.run([*MDA, "--help"])
    listed = re.findall(rb"(?m)^  (\w+) ", done.stdout.partition(b"Commands:")[2])
    assert listed == b"receive serve deliver send who check install uninstall".split()
    for name in listed:
        assert sandbox.run([*MDA, name.decode(), "--help"]).returncode in (0, 2)


def pipe_slowly(sandbox: Sandbox, pieces: list[bytes], *arguments: str) -> int:
    """Run `mda deliver` as root with a standard input that comes in these pieces."""
    process = subprocess.Popen(sandbox.inside([*MDA, "deliver", *arguments]), stdin=subprocess.PIPE)
    assert process.stdin is not None
    for piece in pieces:
        process.stdin.write(piece)
        process.stdin.flush()
        time.sleep(0.3)  # the reader has to see each piece as a read of its own
    process.stdin.close()
    return process.wait(30)


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (
            [b"From b@x Mon Jan  1 00:00:00 2024\n", b"Subject: p\n\nbody\n"],
            b"Subject: p\n\nbody\n\n",
        ),
        (
            [b"Fr", b"om b@x Mon Jan  1 00:00:00 2024\nSubject: p\n", b"\nx\n"],
            b"Subject: p\n\nx\n\n",
        ),
        (
            [b"From today on we meet at nine.\nSubject: none\n"],
            b">From today on we meet at nine.\nSubject: none\n\n",
        ),
        ([b"From " + b"x" * 100_000 + b"\nend\n"], b">From " + b"x" * 100_000 + b"\nend\n\n"),
    ],
)
def test_deliver_takes_off_a_from_line_and_nothing_else(
    sandbox: Sandbox, pieces: list[bytes], kept: bytes
) -> None:
    assert pipe_slowly(sandbox, pieces, "-f", "b@x", "-d", "alice") == 0
    mailbox = sandbox.mailbox("alice") or b""
    assert mailbox.endswith(b" +0000\n" + kept), mailbox[-300:]


def test_the_two_ways_of_deliver_take_the_same_senders_and_recipients(sandbox: Sandbox) -> None:
    senders = ["a..b@docomo.ne.jp", "a b@x", "é@x", "<x@y>", "MAILER-DAEMON", "", "@h:a@b"]
    with served(sandbox):
        for user in ("root", "bob"):
            for sender in senders:
                words = [*MDA, "deliver", "-f", sender, "-d", "alice@mda.test", "-a", "box"]
                done = sandbox.run(words, user=user, input=MESSAGE)
                assert (done.returncode, done.stderr) == (0, b""), (user, sender)
    kept = sandbox.mailbox("alice") or b""
    paths = re.findall(rb"(?m)^Return-Path: <(.*)>$", kept)
    assert len(paths) == 2 * len(senders)
    assert paths.count(b"x@y") == 2
    assert paths.count(b"") == 4
    assert kept.count(b"From MAILER-DAEMON ") == 4
    assert b"(local user mda-net" not in kept, "the session process is no person"


@pytest.mark.parametrize("user", ["root", "alice"])
def test_deliver_without_a_standard_input_is_75_and_does_not_hang(
    sandbox: Sandbox, user: str
) -> None:
    with served(sandbox):
        words = ["sh", "-c", 'exec "$@" <&-', "sh", *MDA, "deliver", "-d", "alice"]
        assert sandbox.run(words, user=user).returncode == 75
    assert sandbox.mailbox("alice") is None


def test_deliver_as_a_user_passes_the_verb_on(sandbox: Sandbox) -> None:
    with served(sandbox):
        words = [*MDA, "deliver", "-d", "alice", "-o", "send"]
        done = sandbox.run(words, user="bob", input=MESSAGE)
        assert done.returncode == 75
        assert done.stderr.startswith(b"4.2.1 <alice>")
    assert sandbox.mailbox("alice") is None


def test_an_address_smuggles_no_command(sandbox: Sandbox) -> None:
    with served(sandbox):
        words = [*MDA, "deliver", "-d", "alice>\r\nRCPT TO:<carol"]
        done = sandbox.run(words, user="bob", input=MESSAGE)
    assert done.returncode == 67
    assert sandbox.mailbox("carol") is None
    assert sandbox.mailbox("alice") is None


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([(250, "2.0.0")], 0),
        ([(550, "5.1.1")], 67),
        ([(552, "5.2.2")], 77),
        ([(550, "5.7.1")], 77),
        ([(552, "5.3.4")], 65),
        ([(501, "5.1.7")], 65),
        ([(554, "5.6.0")], 65),
        ([(550, "5.1.1"), (451, "4.2.0")], 75),
        ([(250, "2.0.0"), (550, "5.1.1")], 67),
    ],
)
def test_each_outcome_has_the_status_that_mtas_understand(
    capsys: pytest.CaptureFixture[str], outcomes: list[tuple[int, str]], status: int
) -> None:
    values = [Outcome(code, enhanced, "text") for code, enhanced in outcomes]
    assert report([f"user{n}" for n in range(len(values))], values) == status
    failed = [enhanced for code, enhanced in outcomes if code >= 400]
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == failed


def test_a_message_beyond_the_limit_is_a_data_error(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 65536\n")
    words = [*MDA, "deliver", "-d", "alice", "--config", config]
    done = sandbox.run(words, input=b"x" * 70_000)
    assert done.returncode == 65
    assert done.stderr.startswith(b"5.3.4 <alice>")


@pytest.mark.parametrize("words", [[",", "hi"], ["a\nb", "hi"], ["alice\r\nX: y", "hi"], []])
def test_send_to_nobody_is_a_mistake_and_says_so(sandbox: Sandbox, words: list[str]) -> None:
    done = sandbox.run([*MDA, "send", *words], user="bob")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"Error" in done.stderr


def test_send_writes_a_message_that_mail_readers_understand(sandbox: Sandbox) -> None:
    with served(sandbox):
        words = [*MDA, "send", "--saml", "-s", "Über uns", "alice,alice", "text"]
        done = sandbox.run(words, user="bob")
        assert done.stdout == b"alice: User is not logged in, so did mail\n"
    message = email.message_from_bytes(
        (sandbox.mailbox("alice") or b"").partition(b"\n")[2], policy=email.policy.default
    )
    assert message["Subject"] == "Über uns"
    assert message["From"] == "bob@mda.test"
    assert message["To"] == "alice"
    assert message["Message-ID"].endswith("@mda.test>")
    assert message["Date"].datetime is not None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "active"),
        (59, "active"),
        (60, "1m"),
        (3599, "59m"),
        (11_220, "3h07m"),
        (187_200, "2d04h"),
    ],
)
def test_idle_time_is_spelled_shortly(seconds: int, shown: str) -> None:
    assert spell_idle(seconds) == shown


def test_what_a_user_serves_is_for_that_user_alone(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as _, served(sandbox, user="alice") as daemon:
        state = Path(f"/proc/{daemon.pid}/root/home/alice/.local/state/mda")
        assert state.stat().st_mode & 0o777 == 0o700
        modes = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
        assert modes == {"smtp.sock": 0o600, "lmtp.sock": 0o600}


def test_the_host_s_sockets_are_for_everybody(sandbox: Sandbox) -> None:
    with served(sandbox) as daemon:
        run = Path(f"/proc/{daemon.pid}/root/run/mda")
        modes = {path.name: path.stat().st_mode & 0o777 for path in run.glob("*.sock")}
    assert modes == {"smtp.sock": 0o666, "lmtp.sock": 0o666}
