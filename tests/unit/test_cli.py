"""The commands, run as their users run them, inside a private view of the host."""

from __future__ import annotations

import contextlib
import email
import email.policy
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import children_of, connect, dial, dialogue, served, wait_until

from mda.cli import handover
from mda.cli.deliver import report
from mda.cli.who import spell_idle
from mda.model import Outcome

MDA = start_command()
MESSAGE = b"Subject: hello\n\nFrom here\n.\n..\nlast line"
STORED = b"Subject: hello\n\n>From here\n.\n..\nlast line\n\n"


def body(mailbox: bytes | None) -> bytes:
    assert mailbox is not None
    return mailbox[mailbox.index(b"Subject:") :]


@contextlib.contextmanager
def answering(path: Path, script: list[bytes]) -> Iterator[list[bytes]]:
    """A receiver at `path` that greets and answers by the script, then hangs up.

    The first reply is the greeting; each other waits for a line, that after a 354 for the
    end of data. Yields the lines that the client has said.
    """
    said: list[bytes] = []

    def converse() -> None:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as lines:
            is_greeting, is_text = True, False
            for reply in script:
                line = b""
                while not is_greeting and not (line == b".\r\n" if is_text else line):
                    line = lines.readline()
                    if not line:
                        return
                    said.append(line)
                connection.sendall(reply)
                is_greeting, is_text = False, reply.startswith(b"354")

    path.parent.mkdir(exist_ok=True, parents=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen()
        listening.settimeout(30)
        thread = threading.Thread(target=converse)
        thread.start()
        try:
            yield said
        finally:
            thread.join(30)
            path.unlink()
            assert not thread.is_alive()


def run_beside(
    sandbox: Sandbox, script: list[bytes], *words: str, protocol: str = "lmtp"
) -> tuple[subprocess.CompletedProcess[bytes], list[bytes]]:
    """Run `mda WORDS` as Bob, whose own receiver answers by the script."""
    state = sandbox.root / "state"
    with answering(state / "mda" / f"{protocol}.sock", script) as said:
        command = ["env", f"XDG_STATE_HOME={state}", *MDA, *words]
        done = sandbox.run(command, user="bob", input=MESSAGE)
    return done, said


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
        (["--what"], 75, b"4.3.5 mda deliver: No such option"),
        (["-o", "shout"], 75, b"4.3.5 mda deliver: "),
        (["-d", "alice", "alice"], 75, b"4.3.5 mda deliver: "),
        (["-d", "postmaster", "-o", "send"], 77, b"5.7.1 <postmaster>"),
        (["-d", "alice", "-o", "send", "-d", "nobody-here"], 75, b"4.2.1 <alice>"),
        (["-d", "alice", "--config", "/nonexistent.toml"], 75, b"4.3.5"),
    ],
)
def test_deliver_leaves_only_the_statuses_that_mtas_understand(
    sandbox: Sandbox, arguments: list[str], status: int, first: bytes
) -> None:
    done = sandbox.run([*MDA, "deliver", "-f", "b@x", *arguments], input=MESSAGE)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(first)
    assert b"Traceback" not in done.stderr
    assert sandbox.mailbox("alice") is None or "nobody-here" in arguments


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
        wait_until(
            lambda: b"220" in dialogue(connect(sandbox, "/run/mda/smtp.sock", "bob"), b"QUIT\r\n")
        )
        for each in held:
            each.close()


def test_a_nursery_that_is_killed_is_replaced(sandbox: Sandbox) -> None:
    with served(sandbox) as daemon:
        nursery = daemon.nursery()
        os.kill(nursery, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{nursery}"))
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
        wait_until(lambda: size() == b"80000")
        sandbox.configure("[receiver]\nmessage_sizes = 90000\n")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.expect_in_log("kept=old")
        assert "receiver.message_sizes" in daemon.log()
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
    assert (
        listed
        == (
            b"receive serve deliver send reply messages who mesg explain sendmail queue aliases"
            b" check install uninstall"
        ).split()
    )
    for name in listed:
        assert sandbox.run([*MDA, name.decode(), "--help"]).returncode in (0, 2)


def octets_waiting(fd: int) -> int:
    """What has been written into a pipe and not been read."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def write_until_read(process: subprocess.Popen[bytes], piece: bytes) -> None:
    assert process.stdin is not None
    fd = process.stdin.fileno()
    process.stdin.write(piece)
    process.stdin.flush()
    wait_until(lambda: octets_waiting(fd) == 0)


def pipe_slowly(sandbox: Sandbox, pieces: list[bytes], *arguments: str) -> int:
    """Run `mda deliver` as root with a standard input that comes in these pieces."""
    process = subprocess.Popen(sandbox.inside([*MDA, "deliver", *arguments]), stdin=subprocess.PIPE)
    assert process.stdin is not None
    for piece in pieces:
        write_until_read(process, piece)
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
        ([b"F"], b"F\n\n"),
        ([b"From x Mon Jan  1 00:00:00 99\n"], b">From x Mon Jan  1 00:00:00 99\n\n"),
        (
            [b"From a  Mon Jan  1 00:00:00 CET 2024\r\nFrom b@x Mon Jan  1 00:00:00 2024\n"],
            b">From b@x Mon Jan  1 00:00:00 2024\n\n",
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


SENDERS = {
    "a..b@docomo.ne.jp": '"a..b"@docomo.ne.jp',
    "a b@x": '"a b"@x',
    "é@x": "é@x",
    "\udce9\x07\x85@x": "???@x",
    "<x@y>": "x@y",
    "MAILER-DAEMON": "",
    "": "",
    "<>": "",
    "<>@x": '"<>"@x',
    " <x@y> ": "x@y",
    "-f@x": "-f@x",
    "@h:a@b": "@h:a@b",
    '"a b"@x': '"a b"@x',
    "a@b..c": '"a@b..c"',
    "@": '"@"',
    'say"so@x': '"say\\"so"@x',
    "DOM\\joe@x": '"DOM\\\\joe"@x',
    "a\r\nRCPT TO:<carol>@x": '"a??RCPT TO:<carol>"@x',
}


def test_deliver_as_a_user_takes_every_sender_that_an_mta_has_taken(sandbox: Sandbox) -> None:
    with served(sandbox):
        for sender in SENDERS:
            words = [*MDA, "deliver", "-f", sender, "-d", "alice@mda.test", "-a", "box"]
            done = sandbox.run(words, user="bob", input=MESSAGE)
            assert (done.returncode, done.stderr) == (0, b""), sender
    kept = (sandbox.mailbox("alice") or b"").decode()
    assert re.findall(r"(?m)^Return-Path: <(.*)>$", kept) == list(SENDERS.values())
    assert sandbox.mailbox("carol") is None


def test_deliver_as_root_takes_them_too(sandbox: Sandbox) -> None:
    for sender in SENDERS:
        words = [*MDA, "deliver", "-f", sender, "-d", "alice@mda.test", "-a", "box"]
        done = sandbox.run(words, input=MESSAGE)
        assert (done.returncode, done.stderr) == (0, b""), sender
    kept = (sandbox.mailbox("alice") or b"").decode()
    assert re.findall(r"(?m)^Return-Path: <(.*)>$", kept) == list(SENDERS.values())
    assert "(local user mda-net" not in kept, "the session process is no person"


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.parametrize("redirection", ["<&-", "<&- >&-", "0>/dev/null"])
def test_deliver_without_a_readable_input_is_75_and_does_not_hang(
    sandbox: Sandbox, user: str, redirection: str
) -> None:
    with served(sandbox):
        words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *MDA, "deliver", "-d", "alice"]
        done = sandbox.run(words, user=user)
    assert done.returncode == 75
    assert done.stderr.startswith(b"4.3.5 mda deliver: no message on standard input: ")
    assert done.stderr.count(b"\n") == 1
    assert sandbox.mailbox("alice") is None


@pytest.mark.parametrize("user", ["root", "alice"])
def test_deliver_with_nobody_to_complain_to_keeps_its_status(sandbox: Sandbox, user: str) -> None:
    with served(sandbox):
        words = ["sh", "-c", 'exec "$@" 2>&- >&-', "sh", *MDA, "deliver", "-d", "nobody-here"]
        assert sandbox.run(words, user=user, input=MESSAGE).returncode == 67


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_deliver_that_is_interrupted_is_75(sandbox: Sandbox, user: str, number: int) -> None:
    uid = str(UIDS.get(user, 0))
    identity = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"] if uid != "0" else []
    with served(sandbox):
        process = subprocess.Popen(
            sandbox.inside([*identity, *MDA, "deliver", "-d", "alice"]),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        write_until_read(process, MESSAGE)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 75
        assert errors == b"4.3.0 mda deliver: interrupted\n"
    assert sandbox.mailbox("alice") is None


def test_deliver_under_nohup_goes_on(sandbox: Sandbox) -> None:
    with served(sandbox):
        uid = str(UIDS["alice"])
        identity = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]
        process = subprocess.Popen(
            sandbox.inside([*identity, "nohup", *MDA, "deliver"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        write_until_read(process, MESSAGE)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert body(sandbox.mailbox("alice")) == STORED


def test_deliver_whose_session_is_killed_is_75(sandbox: Sandbox) -> None:
    process = subprocess.Popen(
        sandbox.inside([*MDA, "deliver", "-d", "alice"]),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    write_until_read(process, MESSAGE)
    (session,) = children_of(process.pid)
    os.kill(session, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors.startswith(b"4.3.0 mda deliver: ")
    assert errors.count(b"\n") == 1
    assert sandbox.mailbox("alice") is None


RUN_BROKEN = """
import sys
sys.path.append({folder!r})
sys.argv = ["mda", "deliver", "-d", "alice"]
{breakage}
from mda.cli import run
sys.exit(run())
"""


@pytest.mark.parametrize(
    ("breakage", "user", "first"),
    [
        ("sys.modules['mda.receiver.peer'] = None", "root", b"4.3.0 mda deliver: import of "),
        ("sys.modules['smtplib'] = None", "bob", b"4.3.0 mda deliver: import of "),
        ("import pwd; del pwd.getpwnam", "root", b"4.3.0 mda deliver: module 'pwd' has "),
        (
            "sys.modules['mda.receiver.grammar'] = None",
            "root",
            b"4.3.0 mda deliver: the session has ended with 70",
        ),
    ],
)
def test_deliver_in_a_broken_installation_is_75(
    sandbox: Sandbox, breakage: str, user: str, first: bytes
) -> None:
    folder = str(Path(handover.__file__).parents[2])
    program = RUN_BROKEN.format(folder=folder, breakage=breakage)
    done = sandbox.run([*MDA[:-1], "-c", program], user=user, input=MESSAGE)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith(first)
    assert done.stderr.count(b"\n") == 1


def test_deliver_on_a_host_that_is_not_set_up_is_75(sandbox: Sandbox) -> None:
    passwd = sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(whole.replace("mda-net:", "mda-not:"))
    try:
        done = sandbox.run([*MDA, "deliver", "-d", "alice"], input=MESSAGE)
    finally:
        passwd.write_text(whole)
    assert done.returncode == 75
    assert done.stderr == b"4.3.5 mda deliver: no system user mda-net: run `mda install`\n"


REPORT_BROKER = """
from mda import broker
real = broker.answer_requests
def answer_requests(*arguments):
    real(*arguments)
    sys.stdout = open({report!r}, 'w')
    print('\\n'.join(sys.modules), file=sys.stdout, flush=True)
broker.answer_requests = answer_requests
"""


def test_the_broker_of_deliver_never_loads_what_parses(sandbox: Sandbox) -> None:
    report_file = sandbox.root / "loaded"
    breakage = REPORT_BROKER.format(report=str(report_file))
    folder = str(Path(handover.__file__).parents[2])
    program = RUN_BROKEN.format(folder=folder, breakage=breakage)
    done = sandbox.run([*MDA[:-1], "-c", program], input=MESSAGE)
    assert done.returncode == 0, done.stderr
    loaded = set(report_file.read_text().split())
    assert "mda.delivery.mbox" in loaded
    assert not loaded & {"email", "smtplib", "html", "mda.receiver.grammar", "mda.content"}


def test_deliver_as_a_user_passes_the_verb_on(sandbox: Sandbox) -> None:
    with served(sandbox):
        words = [*MDA, "deliver", "-d", "alice", "-o", "send"]
        done = sandbox.run(words, user="bob", input=MESSAGE)
        assert done.returncode == 75
        assert done.stderr.startswith(b"4.2.1 <alice>")
        assert sandbox.mailbox("alice") is None
        words = [*MDA, "deliver", "-d", "alice", "-o", "saml"]
        assert sandbox.run(words, user="bob", input=MESSAGE).returncode == 0
        assert sandbox.mailbox("alice") is not None


def test_where_terminals_are_off_only_send_is_refused(sandbox: Sandbox) -> None:
    config = sandbox.configure("[terminal]\nenabled = false\n")
    with served(sandbox, "--config", config):
        for verb, status in (("send", 77), ("soml", 0), ("saml", 0)):
            words = [*MDA, "deliver", "-d", "alice", "-o", verb]
            done = sandbox.run(words, user="bob", input=MESSAGE)
            assert done.returncode == status, done.stderr
            assert done.stderr.startswith(b"5.7.1 <alice>" if status else b"")
    assert (sandbox.mailbox("alice") or b"").count(b"Return-Path") == 2


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
        ([(553, "5.1.8")], 65),
        ([(553, "5.1.10")], 67),
        ([(553, "5.1.2")], 67),
        ([(501, "5.1.3")], 67),
        ([(551, "5.1.6")], 67),
        ([(554, "5.4.6")], 65),
        ([(452, "4.2.2")], 75),
        ([(552, "5.2.2"), (550, "5.1.1")], 77),
        ([(554, "5.6.0")], 65),
        ([(550, "5.1.1"), (451, "4.2.0")], 75),
        ([(250, "2.0.0"), (550, "5.1.1")], 67),
    ],
)
def test_each_outcome_has_the_status_that_mtas_understand(
    capfd: pytest.CaptureFixture[str], outcomes: list[tuple[int, str]], status: int
) -> None:
    values = [Outcome(code, enhanced, "text") for code, enhanced in outcomes]
    assert report([f"user{n}" for n in range(len(values))], values) == status
    failed = [enhanced for code, enhanced in outcomes if code >= 400]
    assert [line.split()[0] for line in capfd.readouterr().err.splitlines()] == failed


def test_a_message_beyond_the_limit_is_a_data_error(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 65536\n")
    with served(sandbox, "--config", config):
        for user, more in (("root", ["--config", config]), ("bob", [])):
            words = [*MDA, "deliver", "-d", "alice", *more]
            done = sandbox.run(words, user=user, input=b"x" * 70_000)
            assert done.returncode == 65
            assert done.stderr.startswith(b"5.3.4 <alice>")
    assert sandbox.mailbox("alice") is None


GREETED = [b"220 x\r\n", b"250-x\r\n250 SEND\r\n"]
ADDRESSED = [*GREETED, b"250 2.1.0 OK\r\n", b"250 2.1.5 OK\r\n"]


@pytest.mark.parametrize(
    ("script", "status", "first"),
    [
        ([], 75, b"4.4.2 "),
        ([b"421 4.7.0 Too many connections\r\n"], 75, b"4.7.0 <bob> Too many connections"),
        ([b"554 5.3.2 No service\r\n"], 75, b"4.5.0 <bob> "),
        ([b"221 2.0.0 Bye\r\n"], 75, b"4.5.0 <bob> "),
        ([b"hello\r\n"], 75, b"4.5.0 <bob> "),
        ([b"220 x\r\n", b"421 4.3.2 Shutting down\r\n"], 75, b"4.3.2 <bob> Shutting"),
        (GREETED, 75, b"4.4.2 "),
        ([*GREETED, b"354 what?\r\n"], 75, b"4.5.0 "),
        ([*GREETED, b"451 4.3.0 Local error\r\n"], 75, b"4.3.0 <bob> Local error"),
        (ADDRESSED, 75, b"4.4.2 "),
        ([*ADDRESSED[:3], b"550 5.1.1 No such user\r\n"], 67, b"5.1.1 <bob> No such user"),
        ([*ADDRESSED[:3], b"199 what?\r\n"], 75, b"4.5.0 <bob> "),
        ([*ADDRESSED, b"250 2.0.0 OK\r\n"], 75, b"4.5.0 "),
        ([*ADDRESSED, b"354 go\r\n"], 75, b"4.4.2 "),
        ([*ADDRESSED, b"354 go\r\n", b"what?\r\n"], 75, b"4.5.0 <bob> "),
        ([*ADDRESSED, b"354 go\r\n", b"552 5.2.2 Full\r\n"], 77, b"5.2.2 <bob> Full"),
        ([*ADDRESSED, b"354 go\r\n", b"250-2.0.0 De\r\n250 2.0.0 livered\r\n"], 0, b""),
    ],
)
def test_deliver_understands_a_receiver_in_trouble(
    sandbox: Sandbox, script: list[bytes], status: int, first: bytes
) -> None:
    done, _ = run_beside(sandbox, script, "deliver")
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(first)
    assert done.stderr.count(b"\n") == bool(status)


def test_deliver_to_several_says_each_reply_of_each(sandbox: Sandbox) -> None:
    script = [*ADDRESSED, b"550 5.1.1 No\r\n", b"250 2.1.5 OK\r\n", b"354 go\r\n"]
    final = b"250 2.0.0 <a> Delivered\r\n452 4.2.2 <c> Full\r\n"
    words = [f"-d{name}" for name in ("a", "b", "c")]
    done, said = run_beside(sandbox, [*script, final], "deliver", "-f", "x@y", *words)
    assert done.returncode == 75
    lines = done.stderr.splitlines()
    assert lines == [b"5.1.1 <b> No", b"4.2.2 <c> <c> Full"]
    assert said[1:6] == [
        b"MAIL FROM:<x@y>\r\n",
        b"RCPT TO:<a>\r\n",
        b"RCPT TO:<b>\r\n",
        b"RCPT TO:<c>\r\n",
        b"DATA\r\n",
    ]


def test_an_interrupted_text_is_followed_by_no_quit(sandbox: Sandbox) -> None:
    state = sandbox.root / "state"
    script = [*ADDRESSED, b"354 go\r\n", b"250 2.0.0 OK\r\n"]
    with answering(state / "mda/lmtp.sock", script) as said:
        words = ["sh", "-c", 'exec "$@" 0>/dev/null', "sh", "env", f"XDG_STATE_HOME={state}"]
        done = sandbox.run([*words, *MDA, "deliver"], user="bob")
    assert done.returncode == 75
    assert said[-1] == b"DATA\r\n"


def test_a_users_own_socket_is_where_the_state_directory_is(sandbox: Sandbox) -> None:
    done, said = run_beside(sandbox, [*ADDRESSED, b"354 go\r\n", b"250 OK\r\n"], "deliver")
    assert done.returncode == 0
    assert said[2] == b"RCPT TO:<bob>\r\n"
    assert handover.state_directory() != "state/mda"


def test_a_relative_state_home_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    for value, directory in (
        ("", "/home/x/.local/state/mda"),
        ("state", "/home/x/.local/state/mda"),
        ("/srv/x", "/srv/x/mda"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert handover.state_directory() == directory


def test_the_hosts_socket_comes_before_the_users_own(sandbox: Sandbox) -> None:
    with served(sandbox, user="carol"), served(sandbox):
        words = ["env", "HOME=/home/carol", *MDA, "deliver"]
        assert sandbox.run(words, user="carol", input=MESSAGE).returncode == 0
    assert sandbox.mailbox("carol") is not None


@pytest.mark.parametrize("text", [b"", b".", b"\n", b".a\n.\n..\r\n.x\r.\n\n.", b"a\r\n\r\r\n.\r"])
def test_a_text_is_sent_the_same_in_all_pieces(text: bytes) -> None:
    lines = re.sub(rb"(?<!\r)\n", b"\r\n", text).split(b"\r\n")
    whole = b"\r\n".join(b"." * line.startswith(b".") + line for line in lines)
    whole += b"" if text.endswith(b"\n") or not text else b"\r\n"
    for size in range(1, len(text) + 2):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert b"".join(handover.stuff(pieces)) == whole + b".\r\n", size


@pytest.mark.parametrize(
    "words",
    [[",", "hi"], ["a\nb", "hi"], ["alice\r\nX: y", "hi"], [b"a\xe9", "hi"], [], ["--shout", "a"]],
)
def test_send_to_nobody_is_a_mistake_and_says_so(
    sandbox: Sandbox, words: list[str | bytes]
) -> None:
    done = sandbox.run([*MDA, "send", *words], user="bob")  # type: ignore[list-item]
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"Error: " in done.stderr


def test_send_without_a_text_says_so(sandbox: Sandbox) -> None:
    words = ["sh", "-c", 'exec "$@" <&-', "sh", *MDA, "send", "alice"]
    done = sandbox.run(words, user="bob")
    assert done.returncode == 1
    assert done.stderr == b"Error: no text on standard input: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("subject", "shown"),
    [
        ("lunch", "lunch"),
        ("Über uns", "Über uns"),
        (" two\nlines\t", "two lines"),
        (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"),
        ("x" * 200 + " é", "x" * 200 + " é"),
    ],
)
def test_send_writes_a_message_that_mail_readers_understand(
    sandbox: Sandbox, subject: str | bytes, shown: str
) -> None:
    with served(sandbox):
        words = [
            *MDA,
            "send",
            "--mail",
            "-s",
            subject,
            "alice,carol@mda.test,alice",
            b"caf\xe9 \xc3\xa9",
        ]
        done = sandbox.run(words, user="bob")  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        lines = [line.split(b": ")[0] for line in done.stdout.splitlines()]
        assert lines == [b"alice", b"carol@mda.test"]
    kept = sandbox.mailbox("alice") or b""
    message = email.message_from_bytes(kept.partition(b"\n")[2], policy=email.policy.default)
    assert message["Subject"] == shown
    assert message["From"] == "bob@mda.test"
    assert message["To"] == "alice@mda.test, carol@mda.test"
    assert message["Message-ID"].endswith("@mda.test>")
    assert message["Date"].datetime is not None
    assert isinstance(message, email.message.EmailMessage)
    assert message.get_content() == "caf\N{REPLACEMENT CHARACTER} é\n\n"


VERB_OF = {(): b"SOML", ("--send",): b"SEND", ("--saml",): b"SAML", ("--mail",): b"MAIL"}


@pytest.mark.parametrize("options", VERB_OF)
def test_send_says_the_verb_that_was_asked_for(sandbox: Sandbox, options: tuple[str, ...]) -> None:
    offer = b"250-x\r\n250-SEND\r\n250-SOML\r\n250 SAML\r\n"
    script = [GREETED[0], offer, b"451 4.3.0 Local error\r\n"]
    done, said = run_beside(sandbox, script, "send", *options, "alice", "hi")
    assert done.returncode == 75
    assert said[1].startswith(VERB_OF[options] + b" FROM:<bob@mda.test>")


def test_send_mails_by_saml_and_not_by_send(sandbox: Sandbox) -> None:
    with served(sandbox):
        done = sandbox.run([*MDA, "send", "--send", "alice", "hi"], user="bob")
        assert (done.returncode, sandbox.mailbox("alice")) == (75, None)
        done = sandbox.run([*MDA, "send", "--saml", "alice", "hi"], user="bob")
        assert (done.returncode, done.stdout) == (
            0,
            b"alice: User is not logged in, so did mail\n",
        )
    assert b"\n\nhi\n\n" in (sandbox.mailbox("alice") or b"")


def test_send_keeps_what_it_cannot_decode_from_standard_input(sandbox: Sandbox) -> None:
    with served(sandbox):
        done = sandbox.run([*MDA, "send", "alice"], user="bob", input=b"caf\xe9\n")
        assert done.returncode == 0
    assert b"\ncaf\xef\xbf\xbd\n" in (sandbox.mailbox("alice") or b"")


def test_send_does_not_need_a_configuration(sandbox: Sandbox) -> None:
    script = """set -e
        mkdir /run/etc /run/etc/mda
        cd /etc
        cp -r passwd group hosts nsswitch.conf ld.so* /run/etc
        echo '[reciever]' >/run/etc/mda/mda.toml
        mount --bind /run/etc /etc
        cd /
        exec setpriv --reuid 1002 --regid 1002 --clear-groups "$@"
        """
    with served(sandbox):
        words = ["unshare", "--mount", "sh", "-c", script, "sh", *MDA, "send", "alice", "hi"]
        done = sandbox.run(words)
        sandbox.run(["rm", "-r", "/run/etc"])
    assert done.returncode == 0, done.stderr
    assert b"From: bob@mda.test\n" in (sandbox.mailbox("alice") or b"")


WHO = [
    b"220 x\r\n",
    (
        b"250-2.0.0 bob /dev/pts/2 3661 n\r\n250-2.0.0 alice /dev/pts/1 70 y\r\n"
        b"250-2.0.0 alice /dev/tty1 5 n\r\n250 2.0.0 3 terminals\r\n"
    ),
    b"221 2.0.0 x\r\n",
]


def test_who_lists_by_name_and_the_least_idle_first(sandbox: Sandbox) -> None:
    done, said = run_beside(sandbox, WHO, "who", protocol="smtp")
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line.split() for line in done.stdout.decode().splitlines()] == [
        ["alice", "tty1", "active", "messages", "n"],
        ["alice", "pts/1", "1m", "messages", "y"],
        ["bob", "pts/2", "1h01m", "messages", "n"],
    ]
    assert said == [b"XWHO\r\n", b"QUIT\r\n"]


def test_who_for_programs_says_true_and_false(sandbox: Sandbox) -> None:
    done, _ = run_beside(sandbox, WHO, "who", "--json", protocol="smtp")
    rows = json.loads(done.stdout)
    assert [tuple(row.values()) for row in rows] == [
        ("alice", "/dev/tty1", 5, False),
        ("alice", "/dev/pts/1", 70, True),
        ("bob", "/dev/pts/2", 3661, False),
    ]
    assert list(rows[0]) == ["user", "terminal", "idle_seconds", "takes_messages"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([], b"The receiver hung up"),
        ([b"421 4.7.0 x Too many connections\r\n"], b"x Too many connections"),
        ([b"220 x\r\n", b"500 5.5.2 Command not recognized\r\n"], b"Command not recognized"),
        ([b"220 x\r\n", b"451 4.3.0 Cannot tell\r\n"], b"Cannot tell"),
        ([b"220 x\r\n", b"250-2.0.0 alice /dev/tty1 5 y\r\n"], b"The receiver hung up"),
        ([b"220 x\r\n", b"250-2.0.0 alice /dev/tty1 5"], b"The receiver hung up"),
        ([b"220 x\r\n", b"what?\r\n"], b"The receiver hung up"),
        ([b"220 x\r\n", b"250-2.0.0 alice\r\n250 2.0.0 1\r\n"], b"Not understood: alice"),
    ],
)
def test_who_says_what_it_could_not_learn(
    sandbox: Sandbox, script: list[bytes], said: bytes
) -> None:
    done, _ = run_beside(sandbox, script, "who", protocol="smtp")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"mda who: " + said + b"\n")


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
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # whoever has it: it is taken
            stack.enter_context(socket.create_server(("127.0.0.1", 2525)))
        daemon = stack.enter_context(served(sandbox, user="alice"))
        assert daemon.port not in (0, 2525)
        words = ["env", "HOME=/home/alice", *MDA, "deliver"]
        assert sandbox.run(words, user="alice", input=MESSAGE).returncode == 0
        state = Path(f"/proc/{daemon.pid}/root/home/alice/.local/state/mda")
        assert state.stat().st_mode & 0o777 == 0o700
        modes = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
        assert {"mbox", "smtp.sock", "lmtp.sock"} <= set(modes)
        assert set(modes.values()) == {0o600}


def test_a_user_may_serve_by_a_configuration_of_his_own(sandbox: Sandbox) -> None:
    config = sandbox.configure(
        '[receiver]\nmessage_size = 70000\n[delivery]\nmailbox = "/var/mail/{user}"\n'
    )
    with served(sandbox, "--listen", "127.0.0.1:0", "--config", config, user="alice") as daemon:
        assert daemon.lines[-1] == "mailbox /home/alice/.local/state/mda/mbox"
        said = dialogue(dial(daemon.port), b"EHLO x\r\nQUIT\r\n")
    assert b"SIZE 70000" in said
    broken = sandbox.configure("[reciever]\n")
    done = sandbox.run(["env", "HOME=/home/alice", *MDA, "serve", "--config", broken], user="alice")
    assert done.returncode == 1
    assert b"Error: " in done.stderr
    assert b"reciever" in done.stderr


def test_the_host_s_sockets_are_for_everybody(sandbox: Sandbox) -> None:
    with served(sandbox) as daemon:
        run = Path(f"/proc/{daemon.pid}/root/run/mda")
        modes = {path.name: path.stat().st_mode & 0o777 for path in run.glob("*.sock")}
    assert modes == {"smtp.sock": 0o666, "lmtp.sock": 0o666}


@pytest.mark.parametrize("user", ["root", "bob"])
def test_a_backslash_in_a_login_name_leads_to_nobody_else(sandbox: Sandbox, user: str) -> None:
    """`DOMAIN\\user` is a name of winbind's, and no quoted pair of a path."""
    with served(sandbox):
        done = sandbox.run([*MDA, "deliver", "-d", "ali\\ce"], user=user, input=MESSAGE)
    assert done.returncode == 67, done.stderr
    assert sandbox.mailbox("alice") is None


@pytest.mark.parametrize("user", ["root", "bob"])
def test_a_login_name_beyond_ascii_gets_its_mail(sandbox: Sandbox, user: str) -> None:
    with served(sandbox):
        done = sandbox.run([*MDA, "deliver", "-d", "zoë"], user=user, input=MESSAGE)
        assert (done.returncode, done.stderr) == (0, b"")
        done = sandbox.run([*MDA, "send", "zoë@mda.test", "hello"], user=user)
        assert (done.returncode, done.stderr) == (0, b"")
        done = sandbox.run([*MDA, "deliver", "-d", "zoè"], user=user, input=MESSAGE)
        assert done.returncode == 67
    kept = (sandbox.mailbox("zoë") or b"").decode()
    assert kept.count("Return-Path") == 2
    assert "\nTo: zoë@mda.test\n" in kept


def test_a_receiver_that_knows_no_utf8_is_not_sent_any(sandbox: Sandbox) -> None:
    script = [*ADDRESSED, b"250 2.1.5 OK\r\n", b"354 go\r\n", b"250 2.0.0 OK\r\n"]
    words = ["-dzoë", "-da"]
    done, said = run_beside(sandbox, script[:3] + script[4:], "deliver", *words)
    assert done.returncode == 65
    assert done.stderr.startswith("5.6.7 <zoë> An address holds a character".encode())
    assert said[1:4] == [b"MAIL FROM:<>\r\n", b"RCPT TO:<a>\r\n", b"DATA\r\n"]
