"""The broker against a session that has been taken over, and its identities, step by step.

Here the test speaks the frames of `wire` with a broker that runs as root inside the
private view: the attacker of decision 1 who owns the session process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import tty
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.sandbox import SESSION_UID, SPOOL_UID, UIDS, Sandbox, start_command
from support.serving import Line, children_of, descriptors_of, status_of, wait_until

from mda import wire

TTY = 5
SPEC = find_spec("mda")
assert SPEC is not None
assert SPEC.origin is not None
STRANDED = """
import os, sys
sys.path.append(sys.argv[1])
from mda import broker, log
from mda.config import Config
log.open_log(may_use_stderr=True)
try:
    with broker.Acting(broker.Identities(Config()), 1001, 1001, []):
        os.setresuid(1001, 1001, 1001)
except OSError:
    os.write(1, b"went on")
"""
PREFIX = b"From bob@example.org Thu Jan  1 00:00:00 1970\nReturn-Path: <bob@example.org>\n"
TEXT = b"Subject: x\n\nhello\n"
STORED = PREFIX + TEXT + b"\n"
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
BROKER = """
import sys
sys.path.append(sys.argv[1])
import _socket
from mda import broker, log
from mda.config import load
from mda.model import Peer
log.open_log(may_use_stderr=True)
config = load(sys.argv[2])
may = sys.argv[3] == "terminals"
peer = Peer("unix", "uid 1002", 1002, "bob", may_use_terminals=may, may_ask_names=may)
link = _socket.socket(fileno=int(sys.argv[4]))
broker.answer_requests(link, config, peer, broker.Identities(config))
"""


class Brokered:
    """A broker inside, and our end of its conversation."""

    def __init__(self, sandbox: Sandbox, config: str, may_use_terminals: bool) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.settimeout(20)
        assert SPEC is not None
        assert SPEC.origin is not None
        package = str(Path(SPEC.origin).parent.parent)
        peer = "terminals" if may_use_terminals else "none"
        arguments = [package, sandbox.configure(config), peer, str(theirs.fileno())]
        self.process = subprocess.Popen(
            sandbox.inside([*start_command()[:-1], "-c", BROKER, *arguments]),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._log = b""

    def ask(self, *fields: bytes, fd: int = -1) -> tuple[list[bytes], int]:
        """One request and its answer with its descriptor."""
        wire.send_frame(self.link, wire.pack(*fields), fd)
        frame, answer_fd = wire.receive_frame(self.link)
        assert frame, self.finish()
        return wire.unpack(frame), answer_fd

    def outcome(self, *fields: bytes, fd: int = -1) -> bytes:
        answer, answer_fd = self.ask(*fields, fd=fd)
        assert answer_fd == -1
        return b" ".join(answer[:2])

    def resolve(self, name: bytes, verb: bytes = b"MAIL") -> bytes:
        """The outcome of the first RCPT of a transaction."""
        return self.outcome(wire.RESOLVE, verb, name, b"0", b"first", b"own", b"", b"", b"")

    def offer(self, fd: int, form: bytes = b"q") -> None:
        assert self.outcome(wire.TEXT, form, b"%d" % len(TEXT), fd=fd) == b"250 2.0.0"

    def deliver(self, fd: int, user: bytes = b"alice", **other: bytes) -> bytes:
        """The outcome of a whole transaction, as the session asks for it."""
        found = self.resolve(user, other.get("verb", b"MAIL"))
        if not found.startswith(b"250"):
            return found
        self.offer(fd)
        return self.outcome(*delivery(**other))

    def spool(self) -> int:
        answer, fd = self.ask(wire.SPOOL, b"q")
        assert answer[0] == b"250", answer
        return fd

    def is_over(self) -> bool:
        """The broker has hung up without an answer."""
        return wire.receive_frame(self.link) == (b"", -1)

    def finish(self) -> str:
        """What it logged; it must have ended, or end now, in good order."""
        self.link.close()
        if self.process.returncode is None:
            _, self._log = self.process.communicate(timeout=20)
        assert b"Traceback" not in self._log, self._log.decode()
        assert self.process.returncode == 0, self._log
        return self._log.decode()


@pytest.fixture
def brokered(sandbox: Sandbox) -> Iterator[Callable[..., Brokered]]:
    started: list[Brokered] = []

    def start(config: str = "", *, may_use_terminals: bool = True) -> Brokered:
        started.append(Brokered(sandbox, config, may_use_terminals))
        return started[-1]

    yield start
    for each in started:
        each.finish()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Descriptors of the things that a hostile session may send, by name."""
    opened: list[int] = []

    def memory(text: bytes, seals: int) -> int:
        fd = os.memfd_create("text", os.MFD_ALLOW_SEALING)
        os.write(fd, text)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    def pipe() -> int:
        read_fd, write_fd = os.pipe()
        opened.append(write_fd)
        return read_fd

    def file() -> int:
        (tmp_path / "file").write_bytes(TEXT)
        return os.open(tmp_path / "file", os.O_RDWR)

    makers: dict[str, Callable[[], int]] = {
        "sealed": lambda: memory(TEXT, SEALS),
        "unsealed": lambda: memory(TEXT, 0),
        "growing": lambda: memory(TEXT, SEALS & ~fcntl.F_SEAL_GROW),
        "shrinking": lambda: memory(TEXT, SEALS & ~fcntl.F_SEAL_SHRINK),
        "changing": lambda: memory(TEXT, SEALS & ~fcntl.F_SEAL_WRITE),
        "smaller": lambda: memory(TEXT[:-1], SEALS),
        "larger": lambda: memory(TEXT + b"x", SEALS),
        "zero": lambda: os.open("/dev/zero", os.O_RDWR),
        "fifo": pipe,
        "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        "path": lambda: os.open("/etc/passwd", os.O_PATH),
        "file": file,
    }

    def make(name: str) -> int:
        opened.append(makers[name]())
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def delivery(**other: bytes) -> list[bytes]:
    """The fields of a good delivery, but for those that are given."""
    fields = {
        "kind": wire.DELIVER,
        "verb": b"MAIL",
        "number": b"0",
        "sender": b"bob@example.org",
        "recipient": b"alice",
        "prefix": PREFIX,
        "block": b"",
        "clipped": b"whole",
        "deadline": b"%d" % int((time.monotonic() + 20) * 1000),
    }
    return list({**fields, **other}.values())


def test_a_good_delivery_is_one(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    assert broker.deliver(files("sealed")) == b"250 2.0.0"
    assert sandbox.mailbox("alice") == STORED
    assert broker.finish() == ""


def resolving(**other: bytes) -> list[bytes]:
    """The fields of a good question for a recipient, but for those that are given."""
    fields = {
        "kind": wire.RESOLVE,
        "verb": b"MAIL",
        "local_part": b"alice",
        "size": b"0",
        "place": b"next",
        "origin": b"own",
        "only": b"",
        "domain": b"",
        "route": b"",
    }
    return list({**fields, **other}.values())


FRAMES = {
    "not fields": b"\0\0",
    "cut short": b"\0\0\0\xff" + b"x",
    "no known request": wire.pack(b"reboot"),
    "an empty request": wire.pack(b""),
    "a field too many to resolve": wire.pack(*resolving(), b"bob"),
    "nothing to resolve": wire.pack(wire.RESOLVE),
    "no verb to resolve": wire.pack(*resolving(verb=b"VRFY")),
    "no size to resolve": wire.pack(*resolving(size=b"-1")),
    "neither first nor next": wire.pack(*resolving(place=b"")),
    "a relay": wire.pack(*resolving(domain=b"far.example")),
    "a relay that an MTA has handed over": wire.pack(
        *resolving(domain=b"far.example", origin=b"handed-over")
    ),
    "another peer": wire.pack(wire.PEER, b"192.0.2.1"),
    "no number": wire.pack(wire.PROBE),
    "a number of nothing to probe": wire.pack(wire.PROBE, b"1", b""),
    "rows that are not there": wire.pack(wire.ROWS, b"2"),
    "two lists": wire.pack(wire.EXPAND, b"staff", b"all"),
    "nothing to verify": wire.pack(wire.VERIFY, b"alice"),
    "a spool of its own": wire.pack(wire.SPOOL, b"/etc"),
    "a text of no form": wire.pack(wire.TEXT, b"x", b"1"),
    "a text of no size": wire.pack(wire.TEXT, b"q", b""),
    "a text of the size of a disk": wire.pack(wire.TEXT, b"q", b"%d" % (1 << 40)),
    "a target that is not there": wire.pack(*delivery(number=b"1")),
    "who about one": wire.pack(wire.WHO, b"alice"),
    "a field too few": wire.pack(*delivery()[:-1]),
    "a field too many": wire.pack(*delivery(), b""),
    "no verb": wire.pack(*delivery(verb=b"")),
    "another verb": wire.pack(*delivery(verb=b"VRFY")),
    "a verb in lower case": wire.pack(*delivery(verb=b"mail")),
    "a broker's own word": wire.pack(wire.STOP),
    **{
        f"{field} {number[:12]!r}": wire.pack(*delivery(**{field: number}))
        for field in ("number", "deadline")
        for number in (
            b"", b"abc", b"-1", b"+1", b"1e3", b" 1", b"1.5", b"0x10", b"9" * 5000, b"9" * 20,
            "\u0663".encode(), b"\xb2",
        )
    },
    "no prefix": wire.pack(*delivery(prefix=b"")),
    "prefix without From_": wire.pack(*delivery(prefix=PREFIX.replace(b"From ", b">From ", 1))),
    "prefix without an end": wire.pack(*delivery(prefix=PREFIX[:-1])),
}  # fmt: skip


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_what_is_no_request_ends_the_conversation(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int], frame: bytes
) -> None:
    broker = brokered()
    assert broker.resolve(b"alice") == b"250 2.1.5"
    broker.offer(files("sealed"))
    wire.send_frame(broker.link, frame, files("sealed"))
    assert broker.is_over()
    assert broker.finish().startswith("mda: broker error=")
    assert os.listdir(sandbox.root / "mail") == []


@pytest.mark.parametrize(
    "name",
    [
        "unsealed", "growing", "shrinking", "changing", "smaller", "larger", "zero", "fifo",
        "directory", "path", "file",
    ],
)  # fmt: skip
def test_only_a_sealed_text_of_its_size_is_read(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int], name: str
) -> None:
    broker = brokered()
    assert broker.resolve(b"alice") == b"250 2.1.5"
    broker.offer(files(name))
    wire.send_frame(broker.link, wire.pack(*delivery()))
    assert broker.is_over()
    assert broker.finish().startswith("mda: broker error=")
    assert os.listdir(sandbox.root / "mail") == []


def test_without_a_text_nothing_is_delivered(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    assert broker.resolve(b"alice") == b"250 2.1.5"
    broker.offer(files("sealed"), form=b"p")  # and an mbox takes only the other one
    wire.send_frame(broker.link, wire.pack(*delivery()))
    assert broker.is_over()
    broker = brokered()
    wire.send_frame(broker.link, wire.pack(wire.TEXT, b"q", b"0"))
    assert broker.is_over()
    assert os.listdir(sandbox.root / "mail") == []


def test_a_number_is_of_this_transaction(
    brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    assert broker.resolve(b"alice") == b"250 2.1.5"
    assert broker.outcome(*resolving(local_part=b"bob")) == b"250 2.1.5"
    assert broker.resolve(b"alice") == b"250 2.1.5"
    broker.offer(files("sealed"))
    wire.send_frame(broker.link, wire.pack(*delivery(number=b"1")))
    assert broker.is_over()


def test_one_copy_is_one_copy_however_often_it_is_asked_for(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    sealed = files("sealed")
    assert broker.deliver(sealed) == b"250 2.0.0"
    assert broker.outcome(*delivery()) == b"250 2.0.0"
    assert sandbox.mailbox("alice") == STORED


def test_a_frame_that_is_too_large_or_brings_too_much_ends_the_conversation(
    brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    sealed = files("sealed")
    large = brokered()
    large.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    socket.send_fds(large.link, [b"\0" * (wire.MAX_FRAME + 1)], [sealed])
    assert large.is_over()
    many = brokered()
    socket.send_fds(many.link, [wire.pack(wire.WHO)], [sealed] * 3)
    assert many.is_over()
    assert "broker error=" in large.finish()
    assert "broker error=" in many.finish()


@pytest.mark.parametrize(
    "name",
    [
        b"al\0ice", b"alice\0", b"../alice", b"a/../alice", b"..", b".", b"", b"root", b"mda-net",
        b"mda", b"nobody", b"\xff\xfe", b"al\nice", b"x" * 60_000, b"{user}", b"alice:x",
    ],
    ids=lambda name: repr(name[:12]),
)  # fmt: skip
def test_a_name_that_is_nobodys_is_refused(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int], name: bytes
) -> None:
    broker = brokered()
    for verb in (b"MAIL", b"SEND", b"SAML"):
        assert broker.resolve(name, verb) == b"550 5.1.1"
        assert broker.outcome(*resolving(verb=verb, local_part=name)) == b"550 5.1.1"
        origin = resolving(verb=verb, local_part=name, origin=b"handed-over")
        assert broker.outcome(*origin) == b"550 5.1.1"
    assert os.listdir(sandbox.root / "mail") == []
    assert broker.deliver(files("sealed")) == b"250 2.0.0", "the conversation went on"


def noticing() -> list[bytes]:
    """The question for a recipient of a notice on another host."""
    return resolving(domain=b"far.example", origin=b"notice", place=b"first")


def test_a_stranger_has_a_notice_where_somebody_was_served_and_no_second(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    assert broker.outcome(*noticing()) == b"550 5.7.1", "nobody was served yet"
    assert broker.deliver(files("sealed")) == b"250 2.0.0"
    for _ in range(3):
        assert broker.outcome(*noticing()) == b"250 2.1.5"
        broker.offer(files("sealed"), b"p")
        assert broker.outcome(*queueing()) == b"250 2.0.0"
    for _ in range(3):
        assert broker.outcome(*noticing()) == b"550 5.7.1"
    assert broker.resolve(b"alice") == b"250 2.1.5"
    assert broker.outcome(*noticing()) == b"550 5.7.1", "a new message, and nobody served"
    assert len(list((sandbox.root / "spool/mda/queue/new").iterdir())) == 3


def queueing(sender: bytes = b"", *, ret: bytes = b"", wish: bytes = b"") -> list[bytes]:
    return [wire.QUEUE, b"MAIL", sender, b"", b"ascii", ret, b"", b"0", wish, b""]


@pytest.mark.parametrize(
    "frame",
    [
        queueing(ret=b"ALL"), queueing(wish=b"ALWAYS"), queueing(wish=b"SUCCESS;DELAY"),
        [*queueing()[:-1], b"a b"], [*queueing()[:-1], b"a\n"], [*queueing()[:-1], b"\xff"],
        [*queueing()[:-1], b"x" * 501], queueing()[:-1], [*queueing(), b"0"],
        [*queueing()[:6], b"a\r\nb", *queueing()[7:]],
    ],
    ids=range(10),
)  # fmt: skip
def test_what_no_recipient_can_have_wished_is_not_queued(
    sandbox: Sandbox,
    brokered: Callable[..., Brokered],
    files: Callable[[str], int],
    frame: list[bytes],
) -> None:
    broker = brokered()
    assert broker.deliver(files("sealed")) == b"250 2.0.0"
    assert broker.outcome(*noticing()) == b"250 2.1.5"
    broker.offer(files("sealed"), b"p")
    wire.send_frame(broker.link, wire.pack(*frame))
    assert broker.is_over()
    assert not list((sandbox.root / "spool/mda").glob("queue/new/*"))


def test_who_was_not_served_earns_no_notice(
    brokered: Callable[..., Brokered], sandbox: Sandbox, files: Callable[[str], int]
) -> None:
    broker = brokered("[delivery]\nlock_seconds = 1\n")
    with lock_of(sandbox, "alice"):
        assert broker.deliver(files("sealed")) == b"451 4.2.0"
        assert broker.outcome(*noticing()) == b"550 5.7.1"


@pytest.mark.parametrize("way", ["queue", "deliver"])
def test_a_notice_has_no_sender(
    sandbox: Sandbox,
    brokered: Callable[..., Brokered],
    files: Callable[[str], int],
    way: str,
) -> None:
    broker = brokered()
    assert broker.deliver(files("sealed")) == b"250 2.0.0"
    assert broker.outcome(*noticing()) == b"250 2.1.5"
    broker.offer(files("sealed"), b"p")
    request = queueing(b"ceo@bank.example")
    frame = wire.pack(*(request if way == "queue" else delivery(sender=b"ceo@bank.example")))
    wire.send_frame(broker.link, frame)
    assert broker.is_over()
    assert not list((sandbox.root / "spool/mda").glob("queue/new/*"))


def test_waiting_never_takes_longer_than_the_configuration_says(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered("[delivery]\nlock_seconds = 1\n")
    with lock_of(sandbox, "alice"):
        deadline = b"%d" % (1 << 59)
        assert broker.deliver(files("sealed"), deadline=deadline) == b"451 4.2.0"
    assert sandbox.mailbox("alice") == b""


def test_a_deadline_that_has_passed_leaves_one_try(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()  # lock_seconds = 60: longer than the test would wait
    with lock_of(sandbox, "alice"):
        assert broker.deliver(files("sealed"), deadline=b"0") == b"451 4.2.0"
    assert broker.deliver(files("sealed"), deadline=b"0") == b"250 2.0.0"


@contextlib.contextmanager
def lock_of(sandbox: Sandbox, user: str) -> Iterator[None]:
    """Hold the fcntl lock of an empty mailbox, as a mail reader would."""
    mailbox = sandbox.root / "mail" / user
    mailbox.touch()
    os.chown(mailbox, UIDS[user], 8)
    with mailbox.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def test_the_spool_is_one_file_of_the_spools_user(brokered: Callable[..., Brokered]) -> None:
    broker = brokered()
    first = broker.spool()
    status = os.fstat(first)
    assert (status.st_uid, status.st_gid, status.st_nlink) == (SPOOL_UID, SPOOL_UID, 0)
    assert stat.S_IFMT(status.st_mode) == stat.S_IFREG
    assert stat.S_IMODE(status.st_mode) == 0o600
    os.write(first, b"x" * 100_000)
    held = len(descriptors_of(broker.process.pid))
    for _ in range(20):
        again = broker.spool()
        assert os.path.samestat(os.fstat(again), status), "a session may fill the disk with many"
        assert os.fstat(again).st_size == 0
        os.close(again)
    assert len(descriptors_of(broker.process.pid)) == held
    os.close(first)


NAME_IT = """
import errno, os, sys
directory = os.open('/var/spool/mda', os.O_RDONLY)
def name(fd, as_name):
    os.link(f'/proc/self/fd/{fd}', as_name, dst_dir_fd=directory, follow_symlinks=True)
plain = os.open('/var/spool/mda', os.O_RDWR | os.O_TMPFILE, 0o600)
name(plain, 'plain')
os.unlink('plain', dir_fd=directory)
try:
    name(int(sys.argv[1]), 'named')
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_nobody_can_give_the_spool_file_a_name(
    sandbox: Sandbox, brokered: Callable[..., Brokered]
) -> None:
    fd = brokered().spool()
    program = [sys.executable, "-I", "-S", "-c", NAME_IT, str(fd)]
    done = sandbox.run(program, pass_fds=[fd])
    os.close(fd)
    assert (done.stdout, done.stderr) == (b"ENOENT\n", b"")
    assert list((sandbox.root / "spool/mda").iterdir()) == []


def test_the_spool_file_is_delivered_from_like_memory(
    sandbox: Sandbox, brokered: Callable[..., Brokered]
) -> None:
    broker = brokered()
    fd = broker.spool()
    os.write(fd, TEXT)
    assert broker.deliver(fd) == b"250 2.0.0"
    assert broker.resolve(b"alice") == b"250 2.1.5"
    os.write(fd, b"more than said")
    wire.send_frame(broker.link, wire.pack(*delivery()))
    assert broker.is_over()
    os.close(fd)
    assert sandbox.mailbox("alice") == STORED


def test_the_broker_keeps_no_descriptor(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    broker = brokered()
    sealed = files("sealed")

    def everything() -> None:
        assert broker.deliver(sealed) == b"250 2.0.0"
        assert broker.deliver(sealed, b"who") == b"550 5.1.1"
        assert broker.outcome(*resolving(local_part=b"bob"), fd=sealed) == b"250 2.1.5"
        broker.ask(wire.PROBE, b"0", b"bob@example.org", fd=sealed)
        broker.ask(wire.WHO, fd=sealed)
        os.close(broker.spool())

    everything()
    before = sorted(descriptors_of(broker.process.pid))
    for _ in range(20):
        everything()
    assert sorted(descriptors_of(broker.process.pid)) == before
    assert (sandbox.mailbox("alice") or b"").count(STORED) == 21


class Terminal:
    """A pseudo-terminal on which a user is logged in, as utmp has it."""

    def __init__(self, sandbox: Sandbox, user: str) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        tty.setraw(self.slave)
        self.device = os.ttyname(self.slave)
        os.fchown(self.slave, UIDS[user], TTY)
        os.fchmod(self.slave, 0o620)
        line = self.device.removeprefix("/dev/").encode()
        record = struct.pack("hi32s4s32s256s", 7, os.getpid(), line, b"", user.encode(), b"")
        self._utmp = f"/proc/{sandbox.pid}/root/run/utmp"
        Path(self._utmp).write_bytes(record.ljust(384, b"\0"))

    def read(self) -> bytes:
        try:
            return os.read(self.master, 65_536)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.unlink(self._utmp)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def alices_terminal(sandbox: Sandbox) -> Iterator[Terminal]:
    terminal = Terminal(sandbox, "alice")
    yield terminal
    terminal.close()


BLOCK = b"\r\n\aMessage from bob\r\n| lunch?\r\n"


def test_a_peer_that_may_not_use_terminals_reaches_none(
    sandbox: Sandbox,
    brokered: Callable[..., Brokered],
    files: Callable[[str], int],
    alices_terminal: Terminal,
) -> None:
    broker = brokered(may_use_terminals=False)
    assert broker.resolve(b"alice", b"SEND") == b"250 2.1.5"
    assert broker.outcome(wire.PROBE, b"0", b"bob@example.org") == b"550 5.7.1"
    assert broker.deliver(files("sealed"), verb=b"SEND", block=BLOCK) == b"554 5.7.1"
    assert sandbox.mailbox("alice") is None
    for verb in (b"SOML", b"SAML"):
        assert broker.deliver(files("sealed"), verb=verb, block=BLOCK) == b"250 2.0.0"
    assert alices_terminal.read() == b""
    assert (sandbox.mailbox("alice") or b"").count(STORED) == 2


def test_a_peer_that_may_use_terminals_reaches_hers_with_a_safe_block_only(
    sandbox: Sandbox,
    brokered: Callable[..., Brokered],
    files: Callable[[str], int],
    alices_terminal: Terminal,
) -> None:
    broker = brokered()
    assert broker.resolve(b"alice", b"SEND") == b"250 2.1.5"
    assert broker.outcome(wire.PROBE, b"0", b"bob@example.org") == b"250 2.1.5"
    for block in (b"\x1b[2J", b"x" * 8193, b"", b"\xff"):
        assert broker.deliver(files("sealed"), verb=b"SEND", block=block) == b"554 5.6.0"
    assert alices_terminal.read() == b""
    assert broker.deliver(files("sealed"), verb=b"SEND", block=BLOCK).startswith(b"250 ")
    assert alices_terminal.read() == BLOCK
    os.fchmod(alices_terminal.slave, 0o600)
    assert broker.outcome(wire.PROBE, b"0", b"bob@example.org") == b"450 4.2.1"
    assert sandbox.mailbox("alice") is None


class Receiving:
    """A real `mda receive` with a client, both processes ours to look at."""

    def __init__(self, sandbox: Sandbox, before: list[str], *arguments: str) -> None:
        ours, theirs = sandbox.connect_as("bob")
        ours.settimeout(20)
        self.line = Line(ours)
        self.process = subprocess.Popen(
            sandbox.inside([*before, *start_command(), "receive", *arguments]),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        )
        theirs.close()

    @property
    def session(self) -> int:
        (found,) = children_of(self.process.pid)
        return found

    def finish(self) -> tuple[int, bytes]:
        self.line.socket.close()
        _, errors = self.process.communicate(timeout=20)
        assert b"Traceback" not in errors, errors.decode()
        return self.process.returncode, errors


@pytest.fixture
def receiving(sandbox: Sandbox) -> Iterator[Callable[..., Receiving]]:
    started: list[Receiving] = []

    def start(*arguments: str, before: list[str] | None = None) -> Receiving:
        started.append(Receiving(sandbox, before or [], *arguments))
        return started[-1]

    yield start
    for each in started:
        each.line.socket.close()
        each.process.communicate(timeout=20)


ENVELOPE = b"EHLO x\r\nMAIL FROM:<bob@example.org>\r\nRCPT TO:<alice>\r\nDATA\r\n"
DATA = b"Subject: x\r\n\r\nhello\r\n.\r\n"


def test_neither_process_keeps_a_group_that_it_was_started_with(
    receiving: Callable[..., Receiving],
) -> None:
    client = receiving(before=["setpriv", "--groups", "4,24", "--"])
    client.line.say(ENVELOPE)
    client.line.expect(b"354")
    assert status_of(client.process.pid)["Groups"] == ""
    assert status_of(client.session)["Groups"] == ""
    client.line.say(DATA + b"QUIT\r\n")
    client.line.expect(b"250 2.0.0 Delivered")
    assert client.line.finish().startswith(b"221")
    assert client.finish()[0] == 0


def test_a_mailbox_at_home_is_written_as_the_user_with_his_own_groups(
    sandbox: Sandbox, brokered: Callable[..., Brokered], files: Callable[[str], int]
) -> None:
    groups = sandbox.root / "etc/group"
    whole = groups.read_text()
    groups.write_text(f"{whole}project:x:2000:alice\n")
    script = (
        "for user in alice bob; do mkdir /home/$user/shared; "
        "chgrp 2000 /home/$user/shared; chmod 770 /home/$user/shared; done"
    )
    try:
        assert sandbox.run(["sh", "-c", script]).returncode == 0
        broker = brokered("[delivery]\nmailbox = '{home}/shared/mbox'\n")
        assert broker.deliver(files("sealed")) == b"250 2.0.0"
        assert broker.deliver(files("sealed"), b"bob") == b"451 4.3.0"
        state = status_of(broker.process.pid)
        assert state["Uid"].split() == state["Gid"].split() == ["0"] * 4
        assert state["Groups"] == "", "alice's groups stayed"
        ls = ["stat", "-c", "%u %g %a", "/home/alice/shared/mbox"]
        assert sandbox.run(ls).stdout == b"1001 1001 600\n"
        assert sandbox.run(["ls", "/home/bob/shared"]).stdout == b""
    finally:
        groups.write_text(whole)
        sandbox.run(["rm", "-r", "/home/alice/shared", "/home/bob/shared"])


def test_a_broker_that_cannot_come_back_ends_at_once(sandbox: Sandbox) -> None:
    """It must not answer one more request as the user whom it had become."""
    assert SPEC is not None
    assert SPEC.origin is not None
    package = str(Path(SPEC.origin).parent.parent)
    done = sandbox.run([*start_command()[:-1], "-c", STRANDED, package])
    assert (done.returncode, done.stdout) == (75, b"")
    assert b"identity" in done.stderr


def test_each_step_is_taken_under_its_own_identity(
    sandbox: Sandbox, receiving: Callable[..., Receiving], alices_terminal: Terminal
) -> None:
    config = sandbox.configure("[delivery]\nmemory = 0\n")
    record = sandbox.root / "identities"
    trace = ["strace", "-f", "-qq", "-o", str(record)]
    trace += ["-e", "trace=setresuid,setresgid,setgroups,openat"]
    client = receiving("--config", config, before=trace)
    client.line.say(ENVELOPE.replace(b"MAIL", b"SAML"))
    client.line.expect(b"354")
    client.line.say(DATA + b"QUIT\r\n")
    client.line.expect(b"250 2.0.0 Sent and mailed")
    client.line.finish()
    assert client.finish()[0] == 0
    assert b"hello" in alices_terminal.read()
    lines = record.read_text().splitlines()
    broker = lines[0].split()[0]
    seen = identities_of([line.partition(" ")[2].strip() for line in lines if broker in line])
    alice, spool_gid = UIDS["alice"], 8
    assert seen["spool"] == {(SPOOL_UID, SPOOL_UID)}
    assert seen["forward"] == {(alice, alice)}
    assert seen["mailbox"] == {(alice, spool_gid)}
    assert seen["terminal"] == {(SESSION_UID, TTY)}


def identities_of(calls: list[str]) -> dict[str, set[tuple[int, int]]]:
    """(effective uid, gid) at the opening of each kind of file.

    Groups are the user's own where a home is read, and none anywhere else.
    """
    uid = gid = groups = 0
    seen: dict[str, set[tuple[int, int]]] = {
        kind: set() for kind in ("spool", "forward", "mailbox", "terminal")
    }
    for call in calls:
        if found := re.match(r"setresuid\((?:-1|\d+), (\d+), ", call):
            uid = int(found[1])
        elif found := re.match(r"setresgid\((?:-1|\d+), (\d+), ", call):
            gid = int(found[1])
        elif found := re.match(r"setgroups\((\d+), ", call):
            groups = int(found[1])
        elif kind := kind_of(call):
            assert groups == (kind == "forward"), call
            seen[kind].add((uid, gid))
    return seen


def kind_of(call: str) -> str:
    """What is opened by a call, "" where it is nothing that belongs to anybody."""
    marks = {
        "spool": "/var/spool/mda.*O_TMPFILE",
        "forward": '"\\.forward"',
        "mailbox": '"alice"',
        "terminal": '"/dev/pts/.*O_WRONLY',
    }
    kinds = [kind for kind, mark in marks.items() if re.match(f"openat\\(.*{mark}", call)]
    return kinds[0] if kinds else ""


def test_a_session_user_that_is_root_is_refused(
    sandbox: Sandbox, receiving: Callable[..., Receiving]
) -> None:
    passwd = sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(whole.replace("mda-net:x:996", "mda-net:x:0"))
    try:
        client = receiving()
        client.line.expect(b"421 4.3.5 mda.test")
        status, errors = client.finish()
    finally:
        passwd.write_text(whole)
    assert status == 0
    assert b"must not be root" in errors


def test_the_session_cannot_write_more_than_a_message_may_become(
    sandbox: Sandbox, receiving: Callable[..., Receiving]
) -> None:
    client = receiving("--config", sandbox.configure("[receiver]\nmessage_size = 65536\n"))
    client.line.expect(b"220")
    limits = Path(f"/proc/{client.session}/limits").read_text()
    found = re.search(r"(?m)^Max file size +(\d+) +(\d+) ", limits)
    assert found is not None
    assert found[1] == found[2]
    assert 2 * 65_536 <= int(found[2]) <= 2 * 65_536 + (1 << 20)


@pytest.mark.parametrize("said", [b"", ENVELOPE, ENVELOPE + b"Subject: x\r\n"])
def test_a_client_is_told_when_the_broker_is_killed(
    sandbox: Sandbox, receiving: Callable[..., Receiving], said: bytes
) -> None:
    client = receiving()
    client.line.say(said)
    client.line.expect(b"354" if said else b"220")
    os.kill(client.process.pid, signal.SIGKILL)
    assert client.line.expect(b"421").startswith(b"421 4.3.0 mda.test")
    assert client.line.finish() == b""
    assert client.finish()[0] == -signal.SIGKILL
    assert os.listdir(sandbox.root / "mail") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_does_not_break_the_delivery_that_waits_for_a_lock(
    sandbox: Sandbox, receiving: Callable[..., Receiving], number: signal.Signals
) -> None:
    client = receiving()
    with lock_of(sandbox, "alice"):
        client.line.say(ENVELOPE)
        client.line.expect(b"354")
        client.line.say(DATA)
        wait_until(lambda: f"\t{UIDS['alice']}\t" in status_of(client.process.pid)["Uid"])
        os.kill(client.process.pid, number)
        assert sandbox.mailbox("alice") == b""
    client.line.expect(b"250 2.0.0 Delivered")
    client.line.expect(b"421 4.3.2")
    client.line.finish()
    assert client.finish()[0] == 0
    kept = sandbox.mailbox("alice") or b""
    assert kept.startswith(b"From bob@example.org ")
    assert kept.endswith(b"\n\nhello\n\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_in_the_middle_of_an_append_tears_no_mailbox(
    sandbox: Sandbox, tmp_path: Path, number: signal.Signals
) -> None:
    deliver = [*start_command(), "deliver", "-f", "b@x", "-d", "alice"]
    assert sandbox.run(deliver, input=b"Subject: before\n\nx\n").returncode == 0
    before = sandbox.mailbox("alice") or b""
    message = tmp_path / "message"
    message.write_bytes(b"Subject: large\n\n" + b"y" * 63 + b"\n" + (b"z" * 63 + b"\n") * 650_000)
    mailbox = sandbox.root / "mail/alice"
    with message.open("rb") as file:
        process = subprocess.Popen(
            sandbox.inside(deliver), stdin=file, stderr=subprocess.PIPE, start_new_session=True
        )
    while mailbox.stat().st_size == len(before) and process.poll() is None:
        pass
    os.killpg(process.pid, number)
    torn = mailbox.stat().st_size
    _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors
    assert process.returncode in (0, 75), errors
    assert len(before) < torn, "it was over before it began"
    assert sandbox.run(deliver, input=b"Subject: after\n\nx\n").returncode == 0
    kept = sandbox.mailbox("alice") or b""
    assert kept.startswith(before)
    rest = kept[len(before) :]
    large, found, after = rest.partition(b"From b@x ")[2].rpartition(b"From b@x ")
    assert after.endswith(b"Subject: after\n\nx\n\n")
    if found:
        assert large.endswith(b"\n\n" + message.read_bytes().partition(b"\n\n")[2] + b"\n")
    else:
        assert process.returncode == 75, "it said 0 and nothing is there"
    assert os.listdir(sandbox.root / "mail") == ["alice"]


def test_an_interrupt_before_the_message_is_whole_defers_it(sandbox: Sandbox) -> None:
    process = subprocess.Popen(
        sandbox.inside([*start_command(), "deliver", "-f", "b@x", "-d", "alice"]),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(b"Subject: half a mess")
    process.stdin.flush()
    # Both are at work: the broker catches what only it does, the session has dropped.
    quitting = 1 << (signal.SIGQUIT - 1)
    wait_until(lambda: bool(int(status_of(process.pid).get("SigCgt", "0"), 16) & quitting))
    (session,) = children_of(process.pid)
    wait_until(lambda: status_of(session)["Uid"].split()[0] == str(SESSION_UID))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 75
    process.communicate()
    assert os.listdir(sandbox.root / "mail") == []


PEOPLE = "[receiver]\nvrfy_names = true\n"


def test_verify_tells_whose_mailbox_a_string_names(brokered: Callable[..., Brokered]) -> None:
    broker = brokered(PEOPLE)
    for string, kind in (
        (b"alice", b"mailbox"),
        (b"ALICE", b"anything"),
        (b"liddell", b"anything"),
    ):
        answer, _ = broker.ask(wire.VERIFY, string, kind)
        assert answer[:2] == [b"250", b"2.1.5"]
        assert answer[3:] == [b"alice", b"Alice Liddell"]
    answer, _ = broker.ask(wire.VERIFY, b"Postmaster", b"mailbox")
    assert answer[3:] == [b"postmaster", b""], "who reads the postmaster's mail is not told"
    assert broker.outcome(wire.VERIFY, b"liddell", b"mailbox").startswith(b"550 5.1.1")
    assert broker.outcome(wire.VERIFY, b"smith", b"anything").startswith(b"553 5.1.4")


@pytest.mark.parametrize(
    "string",
    [
        b"root",
        b"mda-net",
        b"nobody",
        b"",
        b" ",
        b"\0",
        b"al\0ice",
        b"../alice",
        b"\xff",
        b"x" * 60_000,
    ],
    ids=lambda string: repr(string[:12]),
)
def test_verify_knows_persons_only(brokered: Callable[..., Brokered], string: bytes) -> None:
    broker = brokered(PEOPLE)
    for kind in (b"mailbox", b"anything"):
        assert broker.outcome(wire.VERIFY, string, kind).startswith(b"550 5.1.1")


def test_full_names_are_looked_up_only_where_the_configuration_says_so(
    brokered: Callable[..., Brokered],
) -> None:
    assert brokered().outcome(wire.VERIFY, b"liddell", b"anything").startswith(b"550 5.1.1")


def test_a_peer_that_may_not_ask_learns_no_name(brokered: Callable[..., Brokered]) -> None:
    broker = brokered(PEOPLE, may_use_terminals=False)
    for string in (b"alice", b"nobody-here"):
        assert broker.outcome(wire.VERIFY, string, b"anything").startswith(b"550 5.7.1")
