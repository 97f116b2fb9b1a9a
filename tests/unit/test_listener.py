"""`mda serve`: what is handed to it, what is in its way, and what it lives through."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandbox import SESSION_UID, UIDS, Sandbox, start_command
from support.serving import (
    LMTP,
    SMTP,
    Line,
    Served,
    children_of,
    connect,
    dial,
    dialogue,
    served,
    sockets_of,
    status_of,
    wait_until,
)

from mda.model import Peer
from mda.receiver import listener

MAIL = b"MAIL FROM:<b@example.org>\r\nRCPT TO:<alice>\r\nDATA\r\nSubject: x\r\n\r\nhello\r\n.\r\n"
TCP = ("--listen", "127.0.0.1:0")
UNIX = ("--listen", f"unix:{SMTP}", "--listen", f"lmtp+unix:{LMTP}")
# What systemd does: the sockets from descriptor 3 on, and their owner's pid.
HAND_OVER = """
import os, sys
pid, names, *fds = sys.argv[1].split(",")
for number, fd in enumerate(fds):
    os.dup2(int(fd), 3 + number)
os.environ.update(LISTEN_PID=pid or str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.environ.update({"LISTEN_FDNAMES": names} if names else {})
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def handed_over(sandbox: Sandbox, names: str, pid: str = "") -> Iterator[tuple[Served, list[int]]]:
    """`mda serve` with two TCP sockets from somebody else, and their ports."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        fds = tuple(fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in made)
        for fd in fds:
            stack.callback(os.close, fd)
        row = ",".join([pid, names, *map(str, fds)])
        before = [sys.executable, "-I", "-S", "-c", HAND_OVER, row]
        ports = [each.getsockname()[1] for each in made]
        yield stack.enter_context(served(sandbox, before=before, pass_fds=fds)), ports


def test_sockets_that_are_handed_over_speak_what_their_names_say(sandbox: Sandbox) -> None:
    with handed_over(sandbox, "lmtp:smtp") as (daemon, ports):
        assert [line.split()[-1] for line in daemon.lines[:-1]] == ["lmtp", "smtp"]
        said = dialogue(dial(ports[0]), b"EHLO x\r\nLHLO x\r\n" + MAIL)
        assert b"500 5.5.1 This is LMTP" in said
        assert b"250 2.0.0 <alice> Delivered" in said
        said = dialogue(dial(ports[1]), b"LHLO x\r\nEHLO x\r\n" + MAIL)
        assert b"500 5.5.1 This is SMTP" in said
        assert b"250 2.0.0 Delivered" in said
    assert (sandbox.mailbox("alice") or b"").count(b"\n\nhello\n\n") == 2


def test_without_a_name_smtp_is_spoken(sandbox: Sandbox) -> None:
    with handed_over(sandbox, "") as (_, ports):
        for port in ports:
            assert b"250-mda.test" in dialogue(dial(port), b"EHLO x\r\n")


def test_sockets_meant_for_another_process_are_left_alone(sandbox: Sandbox) -> None:
    with handed_over(sandbox, "smtp:lmtp", pid="1") as (daemon, ports):
        assert f"listening on unix:{SMTP}" in daemon.lines
        assert b"221" in dialogue(connect(sandbox, SMTP, "bob"), b"QUIT\r\n")
        connection = dial(ports[0])
        connection.settimeout(0.3)
        with connection, pytest.raises(TimeoutError):
            connection.recv(100)


def refuse_to_listen(sandbox: Sandbox, path: Path) -> None:
    done = sandbox.run([*start_command(), "serve", "--listen", f"unix:{path}"])
    assert done.returncode == 1
    assert b"cannot listen" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_file_in_the_way_of_a_socket_is_never_removed(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    refuse_to_listen(sandbox, file)
    assert file.read_text() == "data"
    link = tmp_path / "link"
    link.symlink_to(file)
    refuse_to_listen(sandbox, link)
    assert link.is_symlink()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refuse_to_listen(sandbox, fifo)
    assert fifo.is_fifo()


def test_a_live_socket_in_the_way_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "live"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        inode = path.stat().st_ino
        refuse_to_listen(sandbox, path)
        assert path.stat().st_ino == inode


def test_a_stale_socket_is_replaced_and_ours_goes_at_the_end(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with served(sandbox, "--listen", f"unix:{path}"):
        assert b"221" in dialogue(connect(sandbox, str(path), "root"), b"QUIT\r\n")
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert not path.exists()


def test_at_the_end_only_the_socket_that_we_made_is_removed(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    path = tmp_path / "taken-over"
    with served(sandbox, "--listen", f"unix:{path}"):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_clients_of_the_network_cannot_shut_local_users_out(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nconnections = 4\n")
    with (
        contextlib.ExitStack() as stack,
        served(sandbox, "--config", config, *UNIX, *TCP) as daemon,
    ):

        def greet(connection: socket.socket) -> bytes:
            stack.enter_context(connection)
            return connection.recv(1000)[:9]

        greetings = [greet(dial(daemon.port)) for _ in range(5)]
        inside = greetings.index(b"421 4.7.0")
        assert greetings == [b"220 mda.t"] * inside + [b"421 4.7.0"] * (5 - inside)
        assert 1 <= inside < 4, "the network may have all places"
        assert greet(connect(sandbox, SMTP, "bob")) == b"220 mda.t"
        for user in ("root", "postfix", "root", "postfix"):
            assert greet(connect(sandbox, SMTP, user)) == b"220 mda.t"
        assert greet(connect(sandbox, SMTP, "carol")) == b"421 4.7.0", "there is no limit in all"


def test_a_place_that_is_left_is_free_again(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nconnections = 1\n")
    with served(sandbox, "--config", config, *TCP) as daemon:
        for _ in range(3):
            held = Line(dial(daemon.port))
            held.expect(b"220")
            assert dialogue(dial(daemon.port), b"").startswith(b"421 4.7.0")
            held.say(b"QUIT\r\n")
            held.finish()
            wait_until(lambda: not daemon.brokers())


def test_what_the_master_knows_of_a_peer_reaches_the_session(sandbox: Sandbox) -> None:
    asked = b"EHLO x\r\nSEND FROM:<b>\r\nRSET\r\nMAIL FROM:<b>\r\n"
    asked += b"RCPT TO:<alice@far.example>\r\nQUIT\r\n"
    with served(sandbox, *UNIX, *TCP) as daemon:
        mta = dialogue(connect(sandbox, SMTP, "postfix"), asked)
        assert b"250 2.1.5 <alice@far.example>" in mta
        assert b"502 5.5.1" in mta
        assert b"250-SEND" not in mta
        bob = dialogue(connect(sandbox, SMTP, "bob"), asked)
        assert b"250 2.1.5 <alice@far.example>" in bob
        program = dialogue(connect(sandbox, SMTP, "daemon"), asked)
        assert b"550 5.7.1 Mailbox" in program
        assert b"250 2.1.0 Sender OK, will SEND" in bob
        assert b"250-SEND" in bob
        network = dialogue(dial(daemon.port), asked)
        assert b"550 5.7.1" in network
        assert b"XWHO" not in network


@pytest.mark.parametrize("is_lmtp", [False, True])
@pytest.mark.parametrize(
    "peer",
    [
        Peer("unix", "uid 990", 990, "", True, False),
        Peer("unix", "uid 1002", 1002, "bob", False, True),
        Peer("unix", "uid 1", 1, "\udcff", False, False),
        Peer("tcp", "2001:db8::1", -1, "", False, True),
        Peer("tcp", "192.0.2.1", may_relay=True, may_ask_names=True),
        Peer("unix"),
    ],
)
def test_a_peer_comes_out_of_the_nursery_as_it_went_in(peer: Peer, is_lmtp: bool) -> None:
    there, spoken = listener.unpack_peer(listener.pack_peer(peer, is_lmtp))
    assert spoken == is_lmtp
    for name in Peer.__slots__:
        assert getattr(there, name) == getattr(peer, name), name


def test_each_process_has_its_identity_and_only_the_session_has_the_client(
    sandbox: Sandbox,
) -> None:
    groups = ["setpriv", "--groups", "4,24", "--"]
    with served(sandbox, *UNIX, *TCP, before=groups) as daemon:
        line = Line(connect(sandbox, SMTP, "bob"))
        line.say(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice>\r\n")
        line.expect(b"250 2.1.5")
        broker = daemon.broker()
        (session,) = children_of(daemon.nursery())
        state = status_of(session)
        assert state["Uid"].split() == [str(SESSION_UID)] * 4
        assert state["Gid"].split() == [str(SESSION_UID)] * 4
        assert state["Groups"] == ""
        assert {state[name].strip("0") for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {""}
        assert status_of(broker)["Uid"].split() == ["0"] * 4
        assert status_of(broker)["Groups"] == ""
        assert status_of(daemon.nursery())["Uid"].split() == ["0"] * 4, "a session can stop it"
        held = sockets_of(session)
        assert len(held) == 2, "more than the client and the broker"
        for pid in (broker, daemon.pid, daemon.nursery()):
            assert not held & sockets_of(pid), status_of(pid)["Name"]
        assert len(sockets_of(broker)) == 1, "more than the session"
        line.say(b"QUIT\r\n")
        line.finish()


def limit_processes(sandbox: Sandbox, pid: int, most: str) -> None:
    """A process of carol's cannot fork (`most` "1:", for she has two), or can again."""
    command = ["prlimit", "--pid", str(pid), f"--nproc={most}"]
    done = sandbox.run(command, user="carol")
    assert done.returncode == 0, done.stderr


def test_a_fork_that_fails_costs_one_client_and_not_the_daemon(sandbox: Sandbox) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    with served(sandbox, *TCP, user="carol") as daemon:
        for pid in (daemon.pid, daemon.nursery()):
            before = daemon.log().count("mda: fork ")
            limit_processes(sandbox, pid, "1:")
            said = dialogue(dial(daemon.port), b"QUIT\r\n")
            assert said == b"" or said.startswith(b"421 4.3.2"), said
            assert daemon.log().count("mda: fork ") == before + 1
            limit_processes(sandbox, pid, "unlimited:" if most == -1 else f"{most}:")
            assert b"221 2.0.0" in dialogue(dial(daemon.port), b"QUIT\r\n")
        wait_until(lambda: not daemon.brokers())


def test_a_nursery_that_has_stopped_is_replaced(sandbox: Sandbox) -> None:
    with served(sandbox, *UNIX) as daemon:
        nursery = daemon.nursery()
        os.kill(nursery, signal.SIGSTOP)
        waiting: list[socket.socket] = []
        try:
            until = time.monotonic() + 20
            while "nursery-gone" not in daemon.log():
                assert len(waiting) < 1000
                assert time.monotonic() < until, "the master waits for it"
                with contextlib.suppress(BlockingIOError):  # the master is not so fast
                    waiting.append(connect(sandbox, SMTP, "root"))
            waiting[-1].settimeout(20)
            assert b"221" in dialogue(waiting.pop(), b"QUIT\r\n")
        finally:
            for each in waiting:
                each.close()
            os.kill(nursery, signal.SIGCONT)
        wait_until(lambda: not daemon.brokers())
        wait_until(lambda: not os.path.exists(f"/proc/{nursery}"))
        assert b"221" in dialogue(connect(sandbox, SMTP, "bob"), b"QUIT\r\n")


def test_the_end_reaches_sessions_that_have_only_just_begun(sandbox: Sandbox) -> None:
    with served(sandbox, *UNIX) as daemon, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(sandbox, SMTP, "root"))
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.process.wait(60) == 0


def size_offered(sandbox: Sandbox) -> bytes:
    said = dialogue(connect(sandbox, SMTP, "bob"), b"EHLO x\r\nQUIT\r\n")
    return said.partition(b"250-SIZE ")[2].partition(b"\r\n")[0]


def test_sessions_of_a_retired_nursery_are_told_of_the_end(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 70000\n")
    with served(sandbox, "--config", config, *UNIX) as daemon:
        held = Line(connect(sandbox, SMTP, "carol"))
        held.expect(b"220")
        sandbox.configure("[receiver]\nmessage_size = 80000\n")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.expect_in_log("kept=new")
        held.say(b"EHLO x\r\n")
        assert held.expect(b"250-SIZE") == b"250-SIZE 70000", "a running session was changed"
        held.expect(b"250 ")
        os.kill(daemon.pid, signal.SIGTERM)
        assert held.expect(b"421") == (
            b"421 4.3.2 mda.test Shutting down, closing transmission channel"
        )
        assert held.finish() == b""
        assert daemon.process.wait(30) == 0


def test_a_broken_place_of_the_configuration_keeps_the_old_one(sandbox: Sandbox) -> None:
    config = Path(sandbox.configure("[receiver]\nmessage_size = 70000\n"))
    with served(sandbox, "--config", str(config), *UNIX) as daemon:
        config.unlink()
        config.mkdir()
        try:
            os.kill(daemon.pid, signal.SIGHUP)
            daemon.expect_in_log("kept=old")
            assert size_offered(sandbox) == b"70000"
        finally:
            config.rmdir()
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: daemon.log().count("kept=old") == 2)
        assert size_offered(sandbox) == b"70000"


def test_without_the_session_user_a_reload_keeps_the_old_configuration(sandbox: Sandbox) -> None:
    config = sandbox.configure("[receiver]\nmessage_size = 70000\n")
    passwd = sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    with served(sandbox, "--config", config, *UNIX) as daemon:
        sandbox.configure("[receiver]\nmessage_size = 80000\n")
        passwd.write_text(whole.replace("mda-net:x:996", "mda-net:x:0"))
        try:
            os.kill(daemon.pid, signal.SIGHUP)
            daemon.expect_in_log("kept=old")
        finally:
            passwd.write_text(whole)
        assert size_offered(sandbox) == b"70000"


def test_brokers_use_the_configuration_of_the_last_reload(sandbox: Sandbox) -> None:
    config = sandbox.configure("")
    to_postmaster = b"EHLO x\r\n" + MAIL.replace(b"<alice>", b"<postmaster>") + b"QUIT\r\n"
    with served(sandbox, "--config", config, *UNIX) as daemon:
        assert b"250 2.0.0 D" in dialogue(connect(sandbox, SMTP, "bob"), b"EHLO x\r\n" + MAIL)
        assert b"250 2.0.0 D" in dialogue(connect(sandbox, SMTP, "bob"), to_postmaster)
        sandbox.configure("[delivery]\nmailbox_mode = 0o600\n[recipients]\npostmaster = 'carol'\n")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.expect_in_log("kept=new")
        assert b"250 2.0.0 D" in dialogue(connect(sandbox, SMTP, "bob"), to_postmaster)
    mail = sandbox.root / "mail"
    assert sorted(os.listdir(mail)) == ["alice", "carol", "root"]
    assert stat.S_IMODE((mail / "alice").stat().st_mode) == 0o660
    assert stat.S_IMODE((mail / "carol").stat().st_mode) == 0o600
    assert (mail / "carol").stat().st_uid == UIDS["carol"]


def test_a_delivery_in_hand_is_finished_before_the_end(sandbox: Sandbox) -> None:
    mailbox = sandbox.root / "mail/alice"
    mailbox.touch()
    os.chown(mailbox, UIDS["alice"], 8)
    with served(sandbox, *UNIX) as daemon:
        with mailbox.open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            line = Line(connect(sandbox, SMTP, "bob"))
            line.say(b"EHLO x\r\n" + MAIL)
            line.expect(b"354")
            broker = daemon.broker()
            wait_until(lambda: f"\t{UIDS['alice']}\t" in status_of(broker)["Uid"])
            os.kill(daemon.pid, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(f"/proc/{daemon.pid}/root{SMTP}"))
        line.expect(b"250 2.0.0 Delivered")
        line.expect(b"421 4.3.2")
        line.finish()
    assert mailbox.read_bytes().endswith(b"\n\nhello\n\n")


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_a_client_that_vanishes_at_every_octet_leaves_nothing(
    sandbox: Sandbox, protocol: str
) -> None:
    hello = b"EHLO x\r\n" if protocol == "smtp" else b"LHLO x\r\n"
    text = hello + MAIL.replace(b"DATA", b"RCPT TO:<carol>\r\nDATA")
    path = SMTP if protocol == "smtp" else LMTP
    config = sandbox.configure("[delivery]\nmemory = 0\n")
    with served(sandbox, "--config", config, *UNIX) as daemon:
        for end in range(len(text)):
            dialogue(connect(sandbox, path, "root"), text[:end])
            # And one that does not wait for its replies.
            with connect(sandbox, path, "root") as hasty:
                hasty.sendall(text[:end])
        wait_until(lambda: not daemon.brokers())
        assert os.listdir(sandbox.root / "mail") == []
        assert list((sandbox.root / "spool/mda").iterdir()) == []
        assert dialogue(connect(sandbox, path, "root"), text).count(b"250 2.0.0") in (1, 2)
        wait_until(lambda: not daemon.brokers())
        assert sorted(os.listdir(sandbox.root / "mail")) == ["alice", "carol"]
