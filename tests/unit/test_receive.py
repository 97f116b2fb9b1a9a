"""`mda receive` as two real processes, under real identities, with real clients."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.sandbox import SESSION_UID, UIDS, Sandbox, start_command
from support.serving import status_of

ENVELOPE = b"EHLO x\r\nMAIL FROM:<bob@example.org>\r\nRCPT TO:<alice>\r\nDATA\r\n"
TEXT = b"Subject: x\r\n\r\nhello\r\n.\r\n"


class Client:
    """One connection to a fresh `mda receive`."""

    def __init__(self, sandbox: Sandbox, *arguments: str, user: str = "bob") -> None:
        self.socket, theirs = sandbox.connect_as(user)
        self.socket.settimeout(30)
        self.process = sandbox.start("receive", *arguments, client=theirs)
        theirs.close()
        self.said = b""

    def say(self, octets: bytes) -> None:
        self.socket.sendall(octets)

    def expect(self, pattern: bytes) -> bytes:
        """Read until a line that begins with `pattern`; returns the line."""
        while not (found := re.search(rb"(?m)^(" + pattern + rb"[^\r]*)\r\n", self.said)):
            more = self.socket.recv(65536)
            assert more, self.said
            self.said += more
        self.said = self.said[found.end() :]
        return found[1]

    def finish(self) -> bytes:
        """Read to the end; the processes must end with status 0 and without traceback."""
        with contextlib.suppress(ConnectionResetError):
            while more := self.socket.recv(65536):
                self.said += more
        self.socket.close()
        _, errors = self.process.communicate(timeout=30)
        assert b"Traceback" not in errors
        assert self.process.returncode == 0, errors
        return self.said

    def processes(self) -> tuple[int, int]:
        """The broker's and the session's process ids."""
        broker = self.process.pid
        children = Path(f"/proc/{broker}/task/{broker}/children").read_text().split()
        assert len(children) == 1
        return broker, int(children[0])


@pytest.fixture
def connect(sandbox: Sandbox) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def start(*arguments: str, user: str = "bob") -> Client:
        clients.append(Client(sandbox, *arguments, user=user))
        return clients[-1]

    yield start
    for client in clients:
        client.socket.close()
        client.process.communicate(timeout=30)


def test_the_session_has_lost_every_privilege_and_the_broker_the_client(
    connect: Callable[..., Client],
) -> None:
    client = connect()
    client.expect(b"220")
    client.say(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice>\r\n")
    client.expect(b"250 2.1.5")
    broker, session = client.processes()
    state = status_of(session)
    assert state["Uid"].split() == [str(SESSION_UID)] * 4
    assert state["Gid"].split() == [str(SESSION_UID)] * 4
    assert state["Groups"] == ""
    assert {state[name].strip("0") for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {""}
    assert status_of(broker)["Uid"].split() == ["0"] * 4
    assert status_of(broker)["Groups"] == ""
    ends = {fd: os.readlink(f"/proc/{broker}/fd/{fd}") for fd in os.listdir(f"/proc/{broker}/fd")}
    assert (ends["0"], ends["1"]) == ("/dev/null", "/dev/null")
    client_end = os.readlink(f"/proc/{session}/fd/0")
    assert client_end.startswith("socket:")
    assert client_end not in ends.values()
    held = {os.readlink(f"/proc/{session}/fd/{fd}") for fd in os.listdir(f"/proc/{session}/fd")}
    assert not any("connections" in path for path in held), "the session holds a file of ours"
    client.say(b"QUIT\r\n")
    client.finish()


def test_with_two_capabilities_and_no_more_everything_works(sandbox: Sandbox) -> None:
    ours, theirs = sandbox.connect_as("bob")
    caps = ["setpriv", "--bounding-set=-all,+setuid,+setgid"]
    process = subprocess.Popen(
        sandbox.inside([*caps, *start_command(), "receive"]),
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
    )
    theirs.close()
    with ours:
        ours.sendall(ENVELOPE + TEXT + b"QUIT\r\n")
        said = b""
        while more := ours.recv(65536):
            said += more
    process.wait(30)
    assert b"250 2.0.0 Delivered" in said
    mailbox = sandbox.root / "mail/alice"
    assert (mailbox.stat().st_uid, mailbox.stat().st_gid) == (UIDS["alice"], 8)
    assert mailbox.stat().st_mode & 0o7777 == 0o660


def test_a_client_that_vanishes_at_any_octet_leaves_nothing(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    text = ENVELOPE + TEXT
    for end in range(0, len(text) - 1, 3):
        client = connect()
        client.say(text[:end])
        client.socket.shutdown(socket.SHUT_WR)
        client.finish()
        assert os.listdir(sandbox.root / "mail") == [], text[:end]
    assert not list((sandbox.root / "spool/mda").iterdir())


def test_a_reset_instead_of_an_end_is_no_error_either(connect: Callable[..., Client]) -> None:
    client = connect()
    client.expect(b"220")
    client.say(b"NOOP\r\n" * 100)
    client.socket.close()  # with replies unread: the receiver's write fails
    client.process.communicate(timeout=30)
    assert client.process.returncode == 0


def test_sigterm_between_commands_says_421(connect: Callable[..., Client]) -> None:
    client = connect()
    client.expect(b"220")
    client.say(b"NOOP\r\n")
    client.expect(b"250")
    broker, session = client.processes()
    for pid in (broker, session):
        os.kill(pid, signal.SIGTERM)
    assert client.expect(b"421").startswith(b"421 4.3.2 mda.test Shutting down")
    client.finish()


def test_sigterm_does_not_break_a_delivery_in_hand(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    mailbox = sandbox.root / "mail/alice"
    mailbox.touch()
    os.chown(mailbox, UIDS["alice"], 8)
    with mailbox.open("r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        client = connect()
        client.expect(b"220")
        client.say(ENVELOPE)
        client.expect(b"354")
        client.say(TEXT)
        time.sleep(0.3)
        for pid in client.processes():
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        assert mailbox.stat().st_size == 0
    client.expect(b"250 2.0.0 Delivered")
    client.expect(b"421 4.3.2")
    client.finish()
    assert b"\n\nhello\n\n" in (sandbox.mailbox("alice") or b"")


def test_a_message_too_large_for_memory_goes_by_disk_and_arrives_the_same(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    config = sandbox.configure("[delivery]\nmemory = 10000\n")
    body = b"From x\r\n" + b"".join(b"%06d %s\r\n" % (n, b"y" * 60) for n in range(30_000))
    client = connect("--config", config)
    client.expect(b"220")
    client.say(ENVELOPE)
    client.expect(b"354")
    client.say(b"\r\n" + body + b".\r\n")
    client.expect(b"250 2.0.0 Delivered")
    client.say(b"QUIT\r\n")
    client.finish()
    kept = (sandbox.mailbox("alice") or b"").partition(b"\n\n")[2]
    assert kept == b">" + body.replace(b"\r\n", b"\n") + b"\n"


def test_a_spool_that_is_missing_defers(sandbox: Sandbox, connect: Callable[..., Client]) -> None:
    config = sandbox.configure("[delivery]\nmemory = 0\nspool = '/var/spool/none'\n")
    client = connect("--config", config)
    client.expect(b"220")
    client.say(ENVELOPE)
    client.expect(b"354")
    client.say(TEXT)
    client.expect(b"451 4.3.0")
    client.say(b"QUIT\r\n")
    client.finish()
    assert sandbox.mailbox("alice") is None


def test_a_message_over_the_limit_is_swallowed_and_refused(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 65536\n")
    client = connect("--config", config)
    client.expect(b"220")
    client.say(b"EHLO x\r\nMAIL FROM:<b> SIZE=65537\r\n")
    client.expect(b"552 5.3.4")
    client.say(ENVELOPE)
    client.expect(b"354")
    client.say(b"x" * 70_000 + b"\n.\nNOOP\n\r\n.\r\nNOOP\r\n")
    client.expect(b"552 5.3.4")
    client.expect(b"250 2.0.0")
    client.say(b"QUIT\r\n")
    assert b"250" not in client.finish()
    assert sandbox.mailbox("alice") is None


def test_a_mail_loop_is_ended(sandbox: Sandbox, connect: Callable[..., Client]) -> None:
    client = connect()
    client.expect(b"220")
    client.say(ENVELOPE)
    client.expect(b"354")
    client.say(b"Received: by x\r\n" * 101 + b"\r\n.\r\n")
    client.expect(b"554 5.4.6")
    client.say(b"QUIT\r\n")
    client.finish()
    assert sandbox.mailbox("alice") is None


def test_a_client_that_only_errs_is_sent_away(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    config = sandbox.configure("[receiver]\nerrors = 5\n")
    client = connect("--config", config)
    client.say(b"WHAT\r\n" * 100)
    said = client.finish()
    assert said.count(b"500 5.5.2") == 5
    assert said.count(b"421 4.7.0 mda.test Too many errors") == 1


def test_recipients_beyond_the_limit_are_refused_and_the_rest_kept(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    config = sandbox.configure("[receiver]\nrecipients = 100\n")
    client = connect("--config", config)
    client.say(b"HELO x\r\nMAIL FROM:<b>\r\n" + b"RCPT TO:<alice>\r\n" * 101 + b"DATA\r\n")
    client.expect(b"354")
    client.say(TEXT + b"QUIT\r\n")
    client.finish()
    assert (sandbox.mailbox("alice") or b"").count(b"From bob") == 0
    assert (sandbox.mailbox("alice") or b"").count(b"\n\nhello\n\n") == 1, "one copy"


def test_the_101st_recipient_gets_452(sandbox: Sandbox, connect: Callable[..., Client]) -> None:
    config = sandbox.configure("[receiver]\nrecipients = 100\n")
    client = connect("--config", config)
    client.say(b"HELO x\r\nMAIL FROM:<b>\r\n" + b"RCPT TO:<alice>\r\n" * 102 + b"QUIT\r\n")
    said = client.finish()
    assert said.count(b"250 2.1.5") == 100
    assert said.count(b"452 4.5.3") == 2


def test_one_user_cannot_hold_more_connections_than_his_share(
    sandbox: Sandbox, connect: Callable[..., Client]
) -> None:
    config = sandbox.configure("[receiver]\nconnections_per_user = 2\n")
    held = [connect("--config", config), connect("--config", config)]
    for client in held:
        client.expect(b"220")
    third = connect("--config", config)
    third.expect(b"421 4.7.0 mda.test Too many connections")
    third.finish()
    carol = connect("--config", config, user="carol")
    carol.expect(b"220")
    held[0].say(b"QUIT\r\n")
    held[0].finish()
    again = connect("--config", config)
    again.expect(b"220")


def test_under_inetd_rules_the_client_reads_no_diagnostics(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nhostnam = 'x'\n")
    for arguments in (["--config", config], ["--config", "/nonexistent"], []):
        ours, theirs = sandbox.connect_as("bob")
        with ours:
            process = subprocess.Popen(
                sandbox.inside([*start_command(), "receive", *arguments]),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=theirs.fileno(),
            )
            theirs.close()
            ours.sendall(b"HELO x\r\nRCPT TO:<a>\r\nQUIT\r\n")
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while more := ours.recv(65536):
                    said += more
            assert process.wait(30) == 0
        for line in said.decode("ascii").splitlines():
            assert re.match(r"\d{3}[ -]", line), said


def test_a_host_without_our_users_answers_421(sandbox: Sandbox) -> None:
    passwd = sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(whole.replace("mda-net:", "other-net:"))
    try:
        client = Client(sandbox)
        client.expect(b"421 4.3.5 mda.test")
        client.finish()
    finally:
        passwd.write_text(whole)


NETNS_PROBE = """
import socket, subprocess, sys
address = sys.argv[1]
family = socket.AF_INET6 if ':' in address else socket.AF_INET
listening = socket.create_server((address, 0), family=family)
ours = socket.create_connection(listening.getsockname()[:2])
theirs, _ = listening.accept()
process = subprocess.Popen(sys.argv[2:], stdin=theirs, stdout=theirs)
theirs.close()
lines = 'EHLO x', 'SEND FROM:<x>', 'MAIL FROM:<x>', 'RCPT TO:<alice@far.example>', 'QUIT'
ours.sendall(''.join(line + '\\r\\n' for line in lines).encode())
while more := ours.recv(65536):
    sys.stdout.buffer.write(more)
"""


@pytest.mark.parametrize(
    ("address", "is_offered"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False)]
)
def test_only_loopback_is_offered_the_terminal_verbs_over_tcp(
    sandbox: Sandbox, address: str, is_offered: bool
) -> None:
    script = 'ip link set lo up; ip addr add 192.0.2.1/32 dev lo; exec "$@"'
    probe = [sys.executable, "-I", "-c", NETNS_PROBE, address, *start_command(), "receive"]
    done = sandbox.run(["unshare", "--net", "sh", "-c", script, "sh", *probe])
    assert (b"250-SEND" in done.stdout) == is_offered, done.stderr
    assert (b"502 5.5.1" in done.stdout) != is_offered
    assert b"XWHO" not in done.stdout
    assert b"550 5.7.1" in done.stdout, "the network may relay"


PORT_25 = """
import os, socket, subprocess, sys
listening = socket.create_server(('127.0.0.1', 25))
if sys.argv[1] == 'serve':
    os.dup2(os.dup(listening.fileno()), 3)
    os.set_inheritable(3, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])
ours = socket.create_connection(('127.0.0.1', 25))
theirs, _ = listening.accept()
process = subprocess.Popen(sys.argv[3:] + ['--protocol', sys.argv[2]], stdin=theirs, stdout=theirs)
theirs.close()
ours.sendall(b'QUIT\\r\\n')
sys.stdout.write(ours.makefile().readline())
"""


def on_port_25(sandbox: Sandbox, command: str, protocol: str) -> tuple[bytes, bytes]:
    """What `mda COMMAND` says, and logs, when its socket is one on TCP port 25."""
    probe = [sys.executable, "-I", "-c", PORT_25, command, protocol, *start_command(), command]
    script = 'ip link set lo up; exec "$@"'
    done = sandbox.run(["unshare", "--net", "sh", "-c", script, "sh", *probe])
    return done.stdout, done.stderr


def test_lmtp_is_never_spoken_on_port_25(sandbox: Sandbox) -> None:
    said, logged = on_port_25(sandbox, "receive", "lmtp")
    assert said.startswith(b"421 4.3.5 mda.test Configuration error")
    assert b"LMTP is not for TCP port 25" in logged
    said, _ = on_port_25(sandbox, "receive", "smtp")
    assert said.startswith(b"220 mda.test ESMTP")
    said, logged = on_port_25(sandbox, "serve", "lmtp")
    assert (said, b"LMTP must not be spoken on TCP port 25" in logged) == (b"", True)


def test_pipes_will_do_as_well_as_a_socket(sandbox: Sandbox) -> None:
    done = sandbox.run([*start_command(), "receive"], input=ENVELOPE + TEXT + b"QUIT\r\n")
    assert b"250 2.0.0 Delivered" in done.stdout
    assert b"SEND" not in done.stdout, "nobody is verified behind a pipe"


@pytest.mark.parametrize("arguments", [["--protocol", "uucp"], ["--what"], ["--config"]])
def test_bad_usage_is_said_and_has_a_status_of_its_own(
    sandbox: Sandbox, arguments: list[str]
) -> None:
    done = sandbox.run([*start_command(), "receive", *arguments])
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"usage: mda receive")
