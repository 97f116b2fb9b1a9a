"""TURN: two hosts on one channel, where each is sender and receiver in turn (RFC 821 3.8)."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dialogue import make_protocol
from support.sandbox import PEERS, SPOOL_UID, Sandbox, effective_uid, start_command
from support.serving import served, wait_until

from mda.cli import turn
from mda.config import Config, ConfigError, load
from mda.line import Line, RawMode
from mda.outbound import queue, turned
from mda.outbound.attempt import Attempts
from mda.outbound.dialogue import Lost
from mda.outbound.queue import Addressee, Envelope, Waiting
from mda.outbound.route import Hop, parse_hop
from mda.receiver import replies
from mda.receiver.listener import pack_peer, unpack_peer
from mda.receiver.peer import identify, local_peer
from mda.receiver.protocol import Say, Turning

HUB = '[receiver]\nturn_peers = [{peers}]\n[routes]\n"vax.test" = "turn:vax.test"\n'
HUB += '".vax.test" = "turn:vax.test"\n"*" = "127.0.0.1:1"\n'
VAX = '[routes]\n"mda.test" = "{route}"\n"*" = "127.0.0.1:1"\n'
VAX += '"down.test" = "smtp+unix:/nonesuch.sock"\n'


class Site:
    """A host with a queue, and what is written and done there."""

    def __init__(self, sandbox: Sandbox, config: str) -> None:
        self.sandbox = sandbox
        self.config = config
        self.file = sandbox.configure(config)

    def write(self, to: str, subject: str, sender: str = "alice") -> None:
        """A message of a user here, which waits in the queue then."""
        recipients = "".join(f"RCPT TO:<{each}>\r\n" for each in to.split())
        lines = f"HELO me\r\nMAIL FROM:<{sender}>\r\n{recipients}DATA\r\n"
        lines += f"Subject: {subject}\r\n\r\nhello\r\n.\r\nQUIT\r\n"
        said = self.sandbox.converse(lines.encode(), config=self.config, peer="alice")
        assert said[-2].startswith(b"250 2.0.0 "), said

    def command(self, *words: str) -> list[str]:
        return self.sandbox.inside([*start_command(), *words])

    def receive(self) -> list[str]:
        return self.command("receive", "--config", self.file)

    def turn(self, *words: str) -> list[str]:
        return self.command("queue", "--config", self.file, "turn", *words)

    def run_queue(self) -> str:
        done = subprocess.run(
            self.command("queue", "--config", self.file, "run"), capture_output=True, check=True
        )
        return done.stderr.decode()

    @property
    def folder(self) -> Path:
        return self.sandbox.root / "spool/mda/queue"

    def waiting(self) -> list[Path]:
        return [each for name in queue.FOLDERS for each in (self.folder / name).glob("*")]

    def subjects(self, user: str) -> list[str]:
        """Of the messages in a mailbox, in their order."""
        kept = (self.sandbox.mailbox(user) or b"").decode()
        return re.findall(r"(?m)^Subject: (.*)$", kept)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    root = tmp_path_factory.mktemp("vax")
    for each in (root, *root.parents[:2]):
        each.chmod(0o755)
    sandbox = Sandbox(root, "vax.test")
    yield sandbox
    sandbox.close()


@pytest.fixture
def vax(far: Sandbox) -> Site:
    far.clear_mail()
    return Site(far, VAX.format(route="turn:mda.test"))


def make_hub(sandbox: Sandbox, *peers: str) -> Site:
    return Site(sandbox, HUB.format(peers=", ".join(f'"{each}"' for each in peers)))


def exchange_over_pipes(hub: Site, vax: Site, *more: str) -> tuple[int, str, str]:
    """`mda queue turn` and `mda receive` face to face; the first's status, what each has logged."""
    to_hub, to_vax = os.pipe(), os.pipe()
    with subprocess.Popen(
        hub.receive(), stdin=to_hub[0], stdout=to_vax[1], stderr=subprocess.PIPE
    ) as receiver:
        with subprocess.Popen(
            vax.turn(*more, "--line", "-", "mda.test"),
            stdin=to_vax[0],
            stdout=to_hub[1],
            stderr=subprocess.PIPE,
        ) as sender:
            for fd in (*to_hub, *to_vax):
                os.close(fd)
            _, vax_log = sender.communicate(timeout=60)
        _, hub_log = receiver.communicate(timeout=60)
    assert receiver.returncode == 0
    assert b"Traceback" not in hub_log + vax_log, (hub_log + vax_log).decode()
    return sender.returncode, hub_log.decode(), vax_log.decode()


def test_mail_goes_both_ways_over_a_pipe(sandbox: Sandbox, vax: Site) -> None:
    hub = make_hub(sandbox, "pipe vax.test")
    for number in (1, 2, 3):
        hub.write("carol@vax.test", f"from hub {number}")
        vax.write("bob@mda.test", f"from vax {number}")
    assert exchange_over_pipes(hub, vax)[0] == 0
    assert vax.subjects("carol") == ["from hub 1", "from hub 2", "from hub 3"]
    assert hub.subjects("bob") == ["from vax 1", "from vax 2", "from vax 3"]
    assert (hub.waiting(), vax.waiting()) == ([], [])
    kept = (vax.sandbox.mailbox("carol") or b"").decode()
    assert kept.startswith("From alice@mda.test ")
    assert "\nReceived: from mda.test" in kept


def glue(masters: tuple[int, int], is_over: threading.Event) -> None:
    """A cable between the two ends, until both have been silent behind the end."""
    while select.select(masters, [], [], 0.2)[0] or not is_over.is_set():
        for fd, other in (masters, masters[::-1]):
            if select.select([fd], [], [], 0)[0]:
                os.write(other, os.read(fd, 256))


def test_mail_goes_both_ways_over_a_serial_line(sandbox: Sandbox, vax: Site) -> None:
    (hub_end, hub_fd), (vax_end, vax_fd) = os.openpty(), os.openpty()
    hub = make_hub(sandbox, f"{os.ttyname(hub_fd)} vax.test")
    hub.write("carol@vax.test", "\x03\x04\x11\x13\x7f eight bits: \xe9")
    vax.write("bob@mda.test", "up the line")
    is_over = threading.Event()
    cable = threading.Thread(target=glue, args=((hub_end, vax_end), is_over))
    with subprocess.Popen(hub.receive(), stdin=hub_fd, stdout=hub_fd, stderr=2) as receiver:
        # The greeting is not to come while the other end still echoes it.
        wait_until(lambda: bool(select.select([hub_end], [], [], 0)[0]))
        sender = subprocess.Popen(vax.turn("--line", os.ttyname(vax_fd), "mda.test"))
        wait_until(lambda: not is_echoing(vax_fd))
        cable.start()
        assert sender.wait(60) == 0
        assert receiver.wait(60) == 0
    is_over.set()
    cable.join(60)
    assert vax.subjects("carol") == ["\x03\x04\x11\x13\x7f eight bits: \xe9"]
    assert hub.subjects("bob") == ["up the line"]
    assert (hub.waiting(), vax.waiting()) == ([], [])
    assert is_echoing(hub_fd), "the line is as it was"
    assert is_echoing(vax_fd)
    for fd in (hub_end, hub_fd, vax_end, vax_fd):
        os.close(fd)


def is_echoing(fd: int) -> bool:
    done = subprocess.run(["stty", "-a"], stdin=fd, capture_output=True, text=True, check=True)
    return " -echo " not in done.stdout and "-icanon" not in done.stdout


def test_mail_goes_both_ways_by_the_socket_of_a_daemon(
    sandbox: Sandbox, far: Sandbox, tmp_path: Path
) -> None:
    sandbox.clear_mail()
    far.clear_mail()
    place = sandbox.root / "hub.sock"
    hub = make_hub(sandbox, "user:root vax.test")
    vax = Site(far, VAX.format(route=f"smtp+unix:{place}"))
    hub.write("carol@vax.test", "down")
    vax.write("bob@mda.test", "up")
    with served(sandbox, "--config", hub.file, "--listen", f"unix:{place}") as daemon:
        done = subprocess.run(vax.turn("mda.test"), capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: daemon.brokers() == [])
        assert "Traceback" not in daemon.log()
    assert (vax.subjects("carol"), hub.subjects("bob")) == (["down"], ["up"])
    assert (hub.waiting(), vax.waiting()) == ([], [])


def test_mail_goes_both_ways_by_a_program(sandbox: Sandbox, vax: Site) -> None:
    hub = make_hub(sandbox, "pipe vax.test")
    hub.write("carol@vax.test", "down")
    vax.write("bob@mda.test", "up")
    done = subprocess.run(
        vax.turn("mda.test", "--", *hub.receive()), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (vax.subjects("carol"), hub.subjects("bob")) == (["down"], ["up"])


def test_who_keeps_the_role_has_our_mail_all_the_same(sandbox: Sandbox, vax: Site) -> None:
    hub = make_hub(sandbox, "pipe another.test")
    hub.write("carol@vax.test", "down")
    vax.write("bob@mda.test", "up")
    status, hub_log, vax_log = exchange_over_pipes(hub, vax)
    assert status == 1
    assert "mda.test: 502 5.5.1 Command not implemented" in vax_log
    assert "turned" not in hub_log
    assert hub.subjects("bob") == ["up"]
    assert vax.subjects("carol") == []
    assert len(hub.waiting()) == 1


def test_only_what_is_for_the_host_goes_and_the_rest_waits_as_before(
    sandbox: Sandbox, vax: Site
) -> None:
    hub = make_hub(sandbox, "pipe vax.test")
    hub.write("x@elsewhere.test", "for others")
    hub.write("carol@vax.test x@elsewhere.test", "for both")
    hub.write("carol@sub.vax.test", "by the route")
    before = {each.name: each.stat().st_mtime for each in hub.waiting()}
    assert exchange_over_pipes(hub, vax)[0] == 0
    assert vax.subjects("carol") == ["for both"]
    # Not a domain of the host, which says so; the sender gets the notice.
    assert len(hub.waiting()) == 3
    after = {each.name: each.stat().st_mtime for each in hub.waiting()}
    assert len(before.items() & after.items()) == 2
    texts = [each.read_text() for each in hub.waiting() if each.name not in before]
    assert len(texts) == 1
    assert re.findall(r"Diagnostic-Code: smtp;\s+(\S+ \S+)", texts[0]) == ["550 5.7.1"]
    assert exchange_over_pipes(hub, vax)[0] == 0
    assert vax.subjects("carol") == ["for both"], "and not once more"


class Peer:
    """The other end of a receiver at the hub, spoken by hand."""

    def __init__(self, hub: Site, user: str = "bob") -> None:
        self.channel, theirs = hub.sandbox.connect_as(user)
        self.channel.settimeout(20)
        self.process = hub.sandbox.start("receive", "--config", hub.file, client=theirs)
        theirs.close()
        self.hear()

    def say(self, octets: bytes) -> bytes:
        self.channel.sendall(octets)
        return self.hear()

    def turn(self) -> None:
        """Up to the first MAIL, of a sender that has been told that we take things one by one."""
        self.say(b"HELO vax.test\r\n")
        self.say(b"TURN\r\n")
        self.say(b"220 x\r\n")
        assert self.say(b"250 x\r\n").startswith(b"MAIL FROM:<alice@mda.test>")

    def take_text(self) -> bytes:
        """From MAIL to the end of a text, which is not answered yet."""
        for reply in (b"250 x\r\n", b"250 x\r\n"):
            self.say(reply)
        text = self.say(b"354 x\r\n")
        while not text.endswith(b"\r\n.\r\n"):
            text += self.hear()
        return text

    def hear(self) -> bytes:
        """One reply, or one piece of what a sender says."""
        return self.channel.recv(65_536)

    def end(self) -> str:
        self.channel.close()
        _, errors = self.process.communicate(timeout=30)
        assert b"Traceback" not in errors, errors.decode()
        assert self.process.returncode == 0
        return errors.decode()


@pytest.fixture
def hub(sandbox: Sandbox) -> Site:
    return make_hub(sandbox, "user:bob vax.test")


def test_after_250_the_new_sender_waits_for_our_greeting_and_says_hello(hub: Site) -> None:
    hub.write("carol@vax.test", "down")
    peer = Peer(hub)
    assert b"250-TURN\r\n" in peer.say(b"EHLO vax.test\r\n")
    assert peer.say(b"TURN\r\n") == b"250 2.0.0 OK, you are the receiver now\r\n"
    assert not select.select([peer.channel], [], [], 0.7)[0], "it speaks before the greeting"
    assert peer.say(b"220 vax.test\r\n") == b"EHLO mda.test\r\n"
    assert peer.say(b"500 what\r\n") == b"HELO mda.test\r\n"
    # The extensions of the other direction are gone: it says nothing of sizes.
    assert peer.say(b"250 vax.test\r\n") == b"MAIL FROM:<alice@mda.test>\r\n"
    assert peer.say(b"250 ok\r\n") == b"RCPT TO:<carol@vax.test>\r\n"
    assert peer.say(b"250 ok\r\n") == b"DATA\r\n"
    text = peer.say(b"354 go\r\n")
    while not text.endswith(b"\r\n.\r\n"):
        text += peer.hear()
    assert b"\r\nSubject: down\r\n\r\nhello\r\n" in text
    assert peer.say(b"250 ok\r\n") == b"QUIT\r\n"
    assert peer.say(b"221 bye\r\n") == b""
    assert "turned peer=" in peer.end()
    assert hub.waiting() == []


def test_the_new_sender_is_the_owner_of_the_queue_and_nobody_else(hub: Site) -> None:
    peer = Peer(hub)
    peer.say(b"HELO vax.test\r\n")
    peer.say(b"TURN\r\n")
    status = Path(f"/proc/{peer.process.pid}/status")
    wait_until(lambda: f"Uid:\t{SPOOL_UID}\t{SPOOL_UID}\t{SPOOL_UID}" in status.read_text())
    fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
    assert fields["Gid"].split() == [str(SPOOL_UID)] * 4
    assert fields["Groups"].split() == []
    assert {int(fields[each], 16) for each in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    children = Path(f"/proc/{peer.process.pid}/task/{peer.process.pid}/children").read_text()
    assert children.split() == [], "the session is gone"
    peer.end()


@pytest.mark.parametrize("hangs_up_behind", ["TURN", "220", "RCPT", "text"])
def test_a_peer_that_is_lost_leaves_the_mail_in_the_queue(hub: Site, hangs_up_behind: str) -> None:
    hub.write("carol@vax.test", "down")
    hub.write("carol@vax.test", "next")
    peer = Peer(hub)
    peer.say(b"HELO vax.test\r\n")
    peer.say(b"TURN\r\n")
    steps = {"220": b"220 x\r\n", "hello": b"250 x\r\n", "MAIL": b"250 x\r\n", "RCPT": b"250 x\r\n"}
    if hangs_up_behind != "TURN":
        for name, reply in steps.items():
            peer.say(reply)
            if name == hangs_up_behind:
                break
        else:
            peer.say(b"354 x\r\n")
    peer.end()
    assert len(hub.waiting()) == 2


def test_a_message_is_sent_as_one_transaction_after_the_other(hub: Site) -> None:
    hub.write("carol@vax.test", "first")
    hub.write("carol@vax.test", "second")
    peer = Peer(hub)
    peer.turn()
    assert b"Subject: first\r\n" in peer.take_text()
    assert peer.say(b"250 x\r\n") == b"RSET\r\n"
    assert peer.say(b"250 x\r\n").startswith(b"MAIL ")
    assert b"Subject: second\r\n" in peer.take_text()
    assert peer.say(b"250 x\r\n") == b"QUIT\r\n"
    assert "sent-by-turn host=vax.test messages=2" in peer.end()


@pytest.mark.parametrize("says", [b"250 taken\r\n250 once more\r\n", b"250 taken\r\n"])
def test_replies_that_do_not_belong_to_their_commands_end_the_channel(
    hub: Site, says: bytes
) -> None:
    """Else a refusal would be booked on a recipient whom it does not mean."""
    hub.write("carol@vax.test", "first")
    hub.write("carol@vax.test", "second")
    peer = Peer(hub)
    peer.turn()
    peer.take_text()
    peer.channel.sendall(says)
    if says.count(b"\n") == 1:
        assert peer.hear() == b"RSET\r\n"
        peer.channel.sendall(b"500 what\r\n")
    assert peer.hear() == b""
    assert "bounced" not in peer.end()
    assert len(hub.waiting()) == 1


def test_a_signal_ends_the_new_sender_behind_the_text_in_hand(hub: Site) -> None:
    hub.write("carol@vax.test", "first")
    hub.write("carol@vax.test", "second")
    peer = Peer(hub)
    peer.turn()
    peer.take_text()
    peer.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert peer.process.poll() is None
    assert peer.say(b"250 taken\r\n") == b"QUIT\r\n"
    peer.end()
    assert len(hub.waiting()) == 1


@pytest.mark.parametrize("behind", ["TURN", "MAIL"])
def test_a_signal_ends_a_sender_that_waits_for_anything_else(hub: Site, behind: str) -> None:
    hub.write("carol@vax.test", "down")
    peer = Peer(hub)
    if behind == "TURN":
        peer.say(b"HELO vax.test\r\n")
        peer.say(b"TURN\r\n")
        status = Path(f"/proc/{peer.process.pid}/status")
        wait_until(lambda: f"Uid:\t{SPOOL_UID}" in status.read_text())
        time.sleep(0.3)
    else:
        peer.turn()
    peer.process.send_signal(signal.SIGTERM)
    assert peer.hear() == b""
    assert peer.process.wait(10) == 0
    peer.end()
    assert len(hub.waiting()) == 1


def test_a_sender_has_no_longer_than_a_session_may_last() -> None:
    ours, theirs = socket.socketpair()
    config = Config().with_values("receiver", session_seconds=0)
    conversation = turned.open_conversation(config, "vax.test", (ours.fileno(),) * 2)
    with ours, theirs, pytest.raises(Lost, match="takes too long"):
        conversation.begin()


def test_a_message_under_way_leaves_the_others_to_a_run_of_the_queue(hub: Site) -> None:
    hub.write("carol@vax.test", "down")
    hub.write("x@elsewhere.test", "for others")
    peer = Peer(hub)
    peer.turn()
    (mine,) = (hub.folder / "wait").iterdir()
    (other,) = (hub.folder / "new").iterdir()
    log = hub.run_queue()
    assert other.name in log
    assert mine.name not in log
    assert list((hub.folder / "new").iterdir()) == [], "nothing that would start a run again"
    peer.say(b"450 not now\r\n")
    peer.end()
    with effective_uid(SPOOL_UID):
        assert Waiting(str(hub.folder), "wait", mine.name).tries == 0


def test_what_a_run_has_let_go_of_is_sent_after_the_others(hub: Site) -> None:
    hub.write("carol@vax.test", "held by a run")
    hub.write("carol@vax.test", "free")
    first = min(hub.waiting(), key=lambda each: each.name)
    with effective_uid(SPOOL_UID):
        message = Waiting(str(hub.folder), "new", first.name, is_claimed=True)
    peer = Peer(hub)
    peer.turn()
    assert b"Subject: free\r\n" in peer.take_text()
    message.release()
    assert peer.say(b"250 x\r\n") == b"RSET\r\n"
    peer.say(b"250 x\r\n")
    assert b"Subject: held by a run\r\n" in peer.take_text()
    assert peer.say(b"250 x\r\n") == b"QUIT\r\n"
    peer.end()
    assert hub.waiting() == []


def test_a_line_that_the_host_need_not_take_is_not_sent_to_it(hub: Site) -> None:
    hub.write("carol@vax.test", "x" * 3000)
    peer = Peer(hub)
    peer.say(b"HELO vax.test\r\n")
    peer.say(b"TURN\r\n")
    peer.say(b"220 x\r\n")
    assert peer.say(b"250 x\r\n") == b"QUIT\r\n"
    assert "bounced" in peer.end()


@pytest.mark.parametrize(
    ("domain", "options", "is_found"),
    [("VAX.test.", "", True), ("b\u00fccher.test", "", True), ("vax.test.example", "", False),
     ("x.vax.test", "", True), ("vax.test", " lines=any name=us.vax.test", True)],
)  # fmt: skip
def test_whose_mail_is_for_a_host(
    tmp_path: Path, domain: str, options: str, is_found: bool
) -> None:
    host = "xn--bcher-kva.test" if domain.startswith("b") else "vax.test"
    routes = {".vax.test": "turn:VAX.test.", "vax.test": f"turn:vax.test{options}"}
    config = Config({"routes": routes})
    name = queue.put(
        str(tmp_path), Envelope("MAIL", b"", [Addressee(b"a", domain.encode())]), [b"x\n"]
    )
    message = Waiting(str(tmp_path), "new", name)
    ways = Attempts(config).find_way_to(message, host)
    assert bool(ways) == is_found
    for hop, numbers in ways.values():
        assert isinstance(hop, Hop)
        assert numbers == [0]
        assert (hop.name, hop.takes_any_line) == (("us.vax.test", True) if options else ("", False))


def test_what_a_run_of_the_queue_has_in_hand_is_not_sent_twice(hub: Site) -> None:
    hub.write("carol@vax.test", "held by a run")
    hub.write("carol@vax.test", "free")
    with effective_uid(SPOOL_UID):
        first = sorted(hub.waiting())[0]
        message = Waiting(str(hub.folder), "new", first.name, is_claimed=True)
        with pytest.raises(BlockingIOError):
            Waiting(str(hub.folder), "new", first.name, is_claimed=True)
    assert first.name not in hub.run_queue()
    peer = Peer(hub)
    peer.say(b"HELO vax.test\r\n")
    peer.say(b"TURN\r\n")
    peer.say(b"220 x\r\n")
    peer.say(b"250-x\r\n250 PIPELINING\r\n")
    text = peer.say(b"250 x\r\n250 x\r\n354 x\r\n")
    while not text.endswith(b"\r\n.\r\n"):
        text += peer.hear()
    assert b"Subject: free\r\n" in text
    assert peer.say(b"250 x\r\n") == b"QUIT\r\n"
    peer.end()
    assert [each.name for each in hub.waiting()] == [first.name]
    message.release()
    with effective_uid(SPOOL_UID):
        Waiting(str(hub.folder), "new", first.name, is_claimed=True).release()


def test_a_claim_is_on_the_message_that_is_there_now(tmp_path: Path) -> None:
    name = queue.put(str(tmp_path), Envelope("MAIL", b"", [Addressee(b"a", b"b")]), [b"x\n"])
    with pytest.raises(FileNotFoundError):
        Waiting(str(tmp_path), "wait", name, is_claimed=True)
    path = tmp_path / "new" / name
    fd = os.open(path, os.O_RDWR)
    path.rename(tmp_path / "new" / "gone")
    path.write_bytes((tmp_path / "new" / "gone").read_bytes())
    with pytest.raises(FileNotFoundError):
        queue._claim(fd, str(path))
    os.close(fd)
    # What cannot be read does not stay claimed.
    (tmp_path / "log" / name).mkdir()
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            Waiting(str(tmp_path), "new", name, is_claimed=True)
    path.write_bytes(b"no envelope\n")
    for _ in range(2):
        with pytest.raises(queue.Unreadable):
            Waiting(str(tmp_path), "new", name, is_claimed=True)


def test_mail_for_a_host_that_turns_waits_for_it(hub: Site) -> None:
    hub.write("carol@vax.test", "down")
    log = hub.run_queue()
    assert 'reply="451 4.4.1 The next host has not come yet to take its mail (TURN)"' in log
    assert "hop=turn:vax.test" in log
    assert len(hub.waiting()) == 1


REFUSED = b"502 5.5.1 Command not implemented\r\n"


@pytest.mark.parametrize(
    ("user", "name"),
    [("bob", "client.example"), ("bob", "vax.test.example"), ("alice", "vax.test"),
     ("root", "vax.test"), ("postfix", "vax.test")],
)  # fmt: skip
def test_who_is_not_named_keeps_the_role(hub: Site, user: str, name: str) -> None:
    hub.write("carol@vax.test", "down")
    peer = Peer(hub, user)
    hello = peer.say(b"EHLO %b\r\n" % name.encode())
    assert (b"TURN" in hello) == (user == "bob")
    assert peer.say(b"TURN\r\n") == REFUSED
    assert peer.say(b"MAIL FROM:<x@example.org>\r\n").startswith(b"250 ")
    assert peer.say(b"QUIT\r\n").startswith(b"221 ")
    peer.end()
    assert len(hub.waiting()) == 1


def test_nobody_on_the_network_may_turn(sandbox: Sandbox) -> None:
    peers = ["user:bob vax.test", "user:root vax.test", "pipe vax.test", "/dev/null vax.test"]
    hub = make_hub(sandbox, *peers)
    hub.config = hub.config.replace("[routes]", 'xclient_peers = ["127.0.0.1"]\n[routes]', 1)
    hub.file = sandbox.configure(hub.config)
    with (
        served(sandbox, "--config", hub.file, "--listen", "127.0.0.1:0") as daemon,
        socket.create_connection(("127.0.0.1", daemon.port), 20) as client,
    ):
        client.recv(65_536)
        for word in (b"NOOP", b"XCLIENT LOGIN=bob ADDR=[UNAVAILABLE]"):
            client.sendall(word + b"\r\n")
            client.recv(65_536)
            client.sendall(b"EHLO vax.test\r\n")
            assert b"TURN" not in client.recv(65_536)
            client.sendall(b"TURN\r\n")
            assert client.recv(65_536) == REFUSED


def test_turn_is_obeyed_only_with_nothing_behind_it(hub: Site) -> None:
    peer = Peer(hub)
    said = peer.say(b"HELO vax.test\r\nTURN\r\nNOOP\r\n")
    while said.count(b"\r\n") < 3:
        said += peer.hear()
    assert said.splitlines()[1:] == [b"503 5.5.1 Nothing may stand behind TURN", b"250 2.0.0 OK"]
    # Also what has not been read yet is behind it.
    peer.process.send_signal(19)
    peer.channel.sendall(b"x" * 10 + b"\r\n" + b"TURN\r\n")
    peer.channel.sendall(b"NOOP\r\n")
    peer.process.send_signal(18)
    said = b""
    while said.count(b"\r\n") < 3:
        said += peer.hear()
    assert said.splitlines()[1] == b"503 5.5.1 Nothing may stand behind TURN"
    peer.say(b"QUIT\r\n")
    peer.end()


def test_a_session_cannot_have_the_mail_of_a_host_that_its_peer_is_not(hub: Site) -> None:
    """The broker judges for itself, whatever the process says that reads the network."""
    peer = local_peer(PEERS["bob"], load(hub.file))
    assert peer.turn_hosts == ()  # no such account outside of the private view
    code = (
        "import sys\n"
        "from mda.answers import Answers\n"
        "from mda.broker import Identities\n"
        "from mda.config import load\n"
        "from mda import wire\n"
        "from mda.receiver.peer import local_peer\n"
        "config = load(sys.argv[1])\n"
        "for uid in (1002, 1001):\n"
        "    answers = Answers(config, local_peer(uid, config), Identities(config))\n"
        "    for host in (b'VAX.test', b'other.test', b''):\n"
        "        print(wire.unpack(answers.answer([wire.TURN, host], -1)[0])[0].decode(),\n"
        "              answers.turned_to)\n"
    )
    python = [start_command()[0], "-B", "-c", code, hub.file]
    done = hub.sandbox.run(python)
    assert done.stdout.decode().splitlines() == [
        "250 vax.test", "502 vax.test", "502 vax.test", "502 ", "502 ", "502 ",
    ], done.stderr  # fmt: skip


def test_in_tls_there_is_no_turn() -> None:
    protocol = make_protocol(offers_more=True)
    protocol.is_encrypted = True
    for line, expected in ((b"EHLO vax.test\r\n", "TURN"), (b"TURN\r\n", "")):
        protocol.feed(line)
        event = protocol.next_event()
        assert isinstance(event, Say)
        if expected:
            assert expected not in event.reply.lines
        else:
            assert event.reply is replies.NOT_OFFERED
    protocol.is_encrypted = False
    protocol.feed(b"TURN\r\n")
    assert isinstance(protocol.next_event(), Turning)


def test_a_channel_has_the_hosts_that_the_configuration_names() -> None:
    master, slave = os.openpty()
    read_fd, write_fd = os.pipe()
    rows = ("pipe P.test", "pipe q.test", f"{os.ttyname(slave)} line.test", "user:root r.test")
    config = Config().with_values("receiver", turn_peers=rows)
    assert identify(read_fd, config).turn_hosts == ("p.test", "q.test")
    assert identify(slave, config).turn_hosts == ("line.test",)
    assert identify(master, config).turn_hosts == ()
    assert local_peer(0, config).turn_hosts == ("r.test",)
    with open("/dev/null", "rb") as null:
        assert identify(null.fileno(), config).turn_hosts == ()
    peer, is_lmtp = unpack_peer(pack_peer(local_peer(0, config), False))
    assert (peer.turn_hosts, is_lmtp) == (("r.test",), False)
    for fd in (master, slave, read_fd, write_fd):
        os.close(fd)


@pytest.mark.parametrize(
    "item", ["vax.test", "pipe", "pipe ", "pipe a b", "tcp vax.test", "user: vax.test",
             "/etc/passwd vax.test", "/dev/../etc/x vax.test", "user:bob vax_.-.test/"],
)  # fmt: skip
def test_a_wrong_peer_is_named(tmp_path: Path, item: str) -> None:
    file = tmp_path / "mda.toml"
    file.write_text(f'[receiver]\nturn_peers = ["{item}"]\n')
    with pytest.raises(ConfigError, match="is not a channel and a host"):
        load(str(file))


def test_the_route_of_a_host_that_turns() -> None:
    hop = parse_hop("turn:VAX.test tls=must name=our.name")
    assert (hop.protocol, hop.host, hop.tls, hop.name) == ("turn", "vax.test", "never", "our.name")
    assert hop.key == "turn:vax.test"
    for wrong in ("turn:", "turn:a b", "turn:-", "turn:vax.test:25"):
        with pytest.raises(ValueError, match="is n"):
            parse_hop(wrong)


def test_a_line_waits_no_longer_than_it_is_told() -> None:
    read_fd, write_fd = os.pipe()
    line = Line(read_fd, write_fd, time.monotonic() + 60)
    line.settimeout(0.05)
    with pytest.raises(TimeoutError):
        line.recv(10)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        line.sendall(b"x" * 1_000_000)
    assert time.monotonic() - began < 10
    assert line.recv(5) == b"xxxxx"
    line.settimeout(60)
    late = Line(read_fd, write_fd, time.monotonic())
    late.settimeout(60)
    with pytest.raises(TimeoutError):
        late.recv(5)
    line.stop()
    for call in (lambda: line.recv(5), lambda: line.sendall(b"x")):
        with pytest.raises(InterruptedError):
            call()
    line.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read_fd)


def test_a_raw_line_passes_every_octet_and_has_one_owner() -> None:
    master, slave = os.openpty()
    translating = "igncr inlcr icrnl iuclc ixon ixoff ixany istrip parmrk brkint"
    subprocess.run(["stty", *translating.split()], stdin=slave, check=True)
    octets = bytes(range(256))
    with RawMode(slave):
        os.write(master, octets)
        assert os.read(slave, 1000) == octets
        os.write(slave, octets)
        assert os.read(master, 1000) == octets
        other = os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY)
        with pytest.raises(BlockingIOError):
            RawMode(other).__enter__()
        os.close(other)
    assert is_echoing(slave)
    shown = subprocess.run(["stty", "-a"], stdin=slave, capture_output=True, text=True, check=True)
    assert " igncr" in shown.stdout
    os.close(master)
    os.close(slave)


class ByHand:
    """A hub that is spoken by hand to `mda queue turn` at the other end of pipes."""

    def __init__(self, vax: Site) -> None:
        self.process = subprocess.Popen(
            vax.turn("--line", "-", "mda.test"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def say(self, octets: bytes) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(octets)
        self.process.stdin.flush()
        return os.read(self.process.stdout.fileno(), 65_536)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        assert b"Traceback" not in errors, errors.decode()
        return self.process.returncode, errors.decode()


def test_words_behind_the_reply_to_turn_change_no_roles(vax: Site) -> None:
    hub = ByHand(vax)
    assert hub.say(b"220 x\r\n") == b"EHLO vax.test\r\n"
    assert hub.say(b"250 x\r\n") == b"TURN\r\n"
    hub.say(b"250 x\r\n250 y\r\n")
    status, errors = hub.end()
    assert status == 1
    assert "mda.test: 0 messages sent\nmda.test: 451 4.5.0" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_is_stopped_does_not_turn(vax: Site, number: signal.Signals) -> None:
    vax.write("bob@mda.test", "first")
    vax.write("bob@mda.test", "second")
    hub = ByHand(vax)
    hub.say(b"220 x\r\n")
    assert hub.say(b"250 PIPELINING\r\n").startswith(b"MAIL ")
    for reply in (b"250 x\r\n", b"250 x\r\n"):
        hub.say(reply)
    assert hub.say(b"354 x\r\n").endswith(b"\r\n.\r\n")
    hub.process.send_signal(number)
    time.sleep(0.3)
    assert hub.process.poll() is None, "nobody would be left to greet"
    assert hub.say(b"250 taken\r\n") == b"QUIT\r\n"
    hub.say(b"221 x\r\n")
    status, errors = hub.end()
    assert status == 1
    assert "mda.test: 1 message sent\nmda.test: 451 4.3.2 Stopped" in errors
    assert len(vax.waiting()) == 1


@pytest.mark.parametrize("way", ["DEVICE", "-"])
def test_a_line_is_raw_as_long_as_somebody_speaks_on_it(vax: Site, way: str) -> None:
    master, slave = os.openpty()
    device = os.ttyname(slave) if way == "DEVICE" else "-"
    end = slave if way == "-" else None
    with subprocess.Popen(vax.turn("--line", device, "mda.test"), stdin=end, stdout=end) as process:
        wait_until(lambda: not is_echoing(slave))
        os.write(master, b"220 x\r\n")
        assert os.read(master, 1000) == b"EHLO vax.test\r\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    assert is_echoing(slave)
    os.close(master)
    os.close(slave)


def test_only_root_turns_a_channel(vax: Site) -> None:
    """Anybody else would receive for himself alone, and what is for others would bounce."""
    words = [*start_command(), "queue", "--config", vax.file, "turn", "--line", "-", "mda.test"]
    done = vax.sandbox.run(words, user="alice", input=b"220 x\r\n250 x\r\n250 x\r\n")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"only root can do this" in done.stderr


def test_who_cannot_read_the_queue_says_so_and_sends_nothing(hub: Site) -> None:
    hub.folder.mkdir(mode=0o700)
    peer = Peer(hub)
    peer.say(b"HELO vax.test\r\n")
    peer.say(b"TURN\r\n")
    peer.say(b"220 x\r\n")
    assert peer.say(b"250 x\r\n") == b"QUIT\r\n"
    assert "mda: queue error=" in peer.end()


def test_who_cannot_read_the_queue_does_not_turn(vax: Site) -> None:
    (vax.folder / "new").parent.mkdir(mode=0o700)
    (vax.folder / "new").write_text("")
    os.chown(vax.folder, 0, 0)
    hub = ByHand(vax)
    hub.say(b"220 x\r\n")
    assert hub.say(b"250 x\r\n") == b"QUIT\r\n"
    hub.say(b"221 x\r\n")
    status, errors = hub.end()
    assert status != 0
    assert f"{vax.folder.name}/new: Permission denied" in errors


def test_what_is_no_terminal_has_no_raw_mode() -> None:
    with open("/dev/null", "rb") as null, pytest.raises(OSError, match="Inappropriate"):  # noqa: SIM117
        with RawMode(null.fileno()):
            pass


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere..test"], "'nowhere..test' is not the name of a host"),
        (["mda.test"], "mda.test: its route is no socket; say --line or a program"),
        (["tcp.test"], "tcp.test: its route is no socket; say --line or a program"),
        (["down.test"], "/nonesuch.sock: No such file or directory"),
        (["--line", "/dev/nonesuch", "mda.test"], "/dev/nonesuch: No such file"),
        (["--line", "/dev/null", "mda.test"], "/dev/null: Inappropriate ioctl"),
        (["--line", "-", "mda.test", "true"], "a line or a program, and not both"),
        (["mda.test", "/nonesuch"], "/nonesuch: No such file or directory"),
        (["mda.test", "true"], "mda.test: 451 4.4.2 The next host hung up"),
    ],
)
def test_what_is_no_channel_is_named(vax: Site, words: list[str], error: str) -> None:
    done = subprocess.run(
        vax.turn(*words), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert error in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_a_program_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    monkeypatch.setattr(turn, "_END_SECONDS", 0.3)
    with turn.run_program(("sh", "-c", f"{trap}echo $$; while :; do sleep 1; done")) as fds:
        pid = int(os.read(fds[0], 100))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_program_of_another_user_is_left_alone_where_it_must_be() -> None:
    script = (
        "from mda.cli import turn\n"
        "turn._END_SECONDS = 0.1\n"
        "words = ('setpriv', '--reuid', '1001', '--clear-groups', 'sleep', '2')\n"
        "with turn.run_program(words): pass\n"
    )
    limit = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+setuid,+setgid"]
    done = subprocess.run(
        [*limit, start_command()[0], "-B", "-c", script], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
