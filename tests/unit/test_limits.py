"""What runs out, octet by octet and descriptor by descriptor, in the shipped command."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.faults import NO_SHELL, wrapped_command
from support.mailboxes import Mailbox, number_of
from support.sandbox import UIDS, Sandbox
from support.serving import SMTP, Line, connect, served

FOLDER = "/home/small"
PAGE = 4096
ALICE = UIDS["alice"]
TEXT = b"X-Number: 1\nSubject: x\n\nFrom me\n"
ENVELOPE = b"MAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\n"


class Disk:
    """A file system of 64 KiB inside, at FOLDER, as it is seen from outside."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.path = Path(f"/proc/{sandbox.pid}/root{FOLDER}")
        self.mount("-t tmpfs -o size=64k,mode=2775,gid=8 none", make=True)

    def mount(self, options: str, *, make: bool = False) -> None:
        """Mount it with these options; `make` its mount point first."""
        script = f"mkdir {FOLDER} && " * make + f"mount {options} {FOLDER}"
        assert self._sandbox.run(["sh", "-c", script]).returncode == 0

    def remove(self) -> None:
        """Unmount it, with all that is on it."""
        script = f"umount {FOLDER} && rmdir {FOLDER}"
        assert self._sandbox.run(["sh", "-c", script]).returncode == 0

    def fill(self, *, pages: int) -> None:
        """Take the free room but for so many pages."""
        status = os.statvfs(self.path)
        left = status.f_bavail * status.f_frsize - pages * PAGE
        (self.path / "filler").write_bytes(b"x" * left)

    def make_room(self) -> None:
        """Give back what `fill` has taken."""
        (self.path / "filler").unlink()

    def names(self) -> list[str]:
        """Everything on it."""
        return sorted(str(each.relative_to(self.path)) for each in self.path.rglob("*"))


@pytest.fixture
def disk(sandbox: Sandbox) -> Iterator[Disk]:
    made = Disk(sandbox)
    yield made
    made.remove()


@contextlib.contextmanager
def session(sandbox: Sandbox, config: str) -> Iterator[tuple[Line, int]]:
    """A conversation with one `mda receive`, and the pid of its broker."""
    ours, theirs = sandbox.connect_as("bob")
    ours.settimeout(30)
    process = sandbox.start("receive", "--config", sandbox.configure(config), client=theirs)
    theirs.close()
    line = greet(ours)
    yield line, process.pid
    line.say(b"QUIT\r\n")
    assert line.finish().startswith(b"221 ")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Traceback" not in errors, errors


def greet(connection: socket.socket) -> Line:
    """The beginning of a conversation."""
    line = Line(connection)
    line.expect(b"220 ")
    line.say(b"HELO x\r\n")
    line.expect(b"250 ")
    return line


def send(line: Line, text: bytes = TEXT) -> bytes:
    """One transaction; the reply to its end of data, or the first refusal before it."""
    line.say(ENVELOPE)
    line.expect(b"250 ")
    reply = line.expect(b"")
    if reply.startswith(b"250 "):
        line.say(b"DATA\r\n")
        line.expect(b"354 ")
        line.say(text.replace(b"\n", b"\r\n") + b".\r\n")
        return line.expect(b"")
    line.say(b"RSET\r\n")
    line.expect(b"250 ")
    return reply


def mailbox_on(disk: Disk, *, is_maildir: bool) -> tuple[Mailbox, str]:
    """Alice's mailbox there, with one old message, and the configuration that leads to it."""
    box = Mailbox(disk.path / "alice", ALICE, is_maildir=is_maildir)
    box.put_old()
    name = "{user}/" if is_maildir else "{user}"
    patience = "[receiver]\nerrors = 100000\njunk_commands = 100000\n"
    return box, f"{patience}[delivery]\nmailbox = '{FOLDER}/{name}'\n"


def test_full_disk_at_any_octet_of_a_message_leaves_the_mailbox_as_it_was(
    sandbox: Sandbox, disk: Disk
) -> None:
    box, config = mailbox_on(disk, is_maildir=False)
    begin = box.path.read_bytes()
    with session(sandbox, config) as (line, _):
        assert send(line).startswith(b"250 "), "there is room"
        size = len(box.path.read_bytes()) - len(begin)
        assert 200 < size < PAGE - len(begin)
        for octets in range(size):
            # So many more fit on the last page; the dotlock's record takes the one that is free.
            padding = b"y" * (2 * PAGE - len(begin) - octets - 2) + b"\n\n"
            box.path.write_bytes(begin + padding)
            disk.fill(pages=1)
            before = box.state()
            assert send(line).startswith(b"452 4.3.1 "), octets
            assert box.state() == before, octets
            disk.make_room()
            assert disk.names() == ["alice"], octets
        assert send(line).startswith(b"250 ")
        assert box.path.read_bytes().count(TEXT.replace(b"From me", b">From me")) == 1


@pytest.mark.parametrize("is_maildir", [False, True], ids=["mbox", "maildir"])
def test_limit_of_a_files_size_at_any_octet_leaves_the_mailbox_as_it_was(
    sandbox: Sandbox, disk: Disk, *, is_maildir: bool
) -> None:
    box, config = mailbox_on(disk, is_maildir=is_maildir)
    with session(sandbox, config) as (line, broker):
        old = len(box.path.read_bytes()) if not is_maildir else 0
        limits = resource.prlimit(broker, resource.RLIMIT_FSIZE)
        before = box.state()
        names = disk.names()
        most = old + PAGE
        for limit in range(most):
            resource.prlimit(broker, resource.RLIMIT_FSIZE, (limit, limits[1]))
            reply = send(line)
            if reply.startswith(b"250 "):
                break
            assert reply.startswith(b"452 4.3.1 "), (limit, reply)
            assert box.state() == before, limit
            assert disk.names() == names, limit
        resource.prlimit(broker, resource.RLIMIT_FSIZE, limits)  # for what it writes at its end
        assert old + 200 < limit < most - 1
        assert sorted(map(number_of, box.messages())) == [0, 1]
        added = set(box.files()) - set(before) or {box.path}
        assert max(each.stat().st_size for each in added) == limit, "it went when it could"


@pytest.mark.parametrize("is_maildir", [False, True], ids=["mbox", "maildir"])
def test_disk_that_may_not_be_written_defers(
    sandbox: Sandbox, disk: Disk, *, is_maildir: bool
) -> None:
    box, config = mailbox_on(disk, is_maildir=is_maildir)
    before = box.state()
    disk.mount("-o remount,ro")
    with session(sandbox, config) as (line, _):
        reply = send(line)
        assert reply.startswith(b"451 4."), reply
        assert box.state() == before
        disk.mount("-o remount,rw")
        assert send(line).startswith(b"250 ")
    assert sorted(map(number_of, box.messages())) == [0, 1]


@pytest.mark.parametrize("is_maildir", [False, True], ids=["mbox", "maildir"])
def test_want_of_descriptors_defers(sandbox: Sandbox, disk: Disk, *, is_maildir: bool) -> None:
    box, config = mailbox_on(disk, is_maildir=is_maildir)
    file = sandbox.configure(config)
    before = box.state()
    words = ["deliver", "--config", file, "-f", "b@x", "-d", "alice"]
    command = [*wrapped_command(sandbox), *words]
    seen = set()
    for most in range(4, 64):
        done = sandbox.run(["prlimit", f"--nofile={most}:64", *command], input=TEXT)
        if done.stderr.startswith(NO_SHELL):
            continue  # and nobody of ours was there to say 75
        seen.add(done.returncode)
        if done.returncode == 0:
            break
        assert done.returncode == 75, (most, done.stderr)
        assert box.state() == before, most
    assert seen == {0, 75}
    assert sorted(map(number_of, box.messages())) == [0, 1]


def test_a_thousand_messages_by_ten_connections_are_all_there(sandbox: Sandbox) -> None:
    box = Mailbox(sandbox.root / "mail/alice", ALICE, is_maildir=False)
    replies: list[bytes] = []

    def send_hundred(connection: socket.socket, first: int) -> None:
        with connection:
            line = greet(connection)
            replies.extend(send(line, numbered(first + number)) for number in range(100))

    with served(sandbox):
        connections = [connect(sandbox, SMTP, "bob") for _ in range(10)]
        with ThreadPoolExecutor(len(connections)) as pool:
            for number, connection in enumerate(connections):
                pool.submit(send_hundred, connection, 100 * number)
    assert {reply[:4] for reply in replies} == {b"250 "}
    assert len(replies) == 1000
    found = sorted(box.messages(), key=number_of)
    assert found == [numbered(number) for number in range(1000)]


def numbered(number: int) -> bytes:
    """A message of a size of its own."""
    return b"X-Number: %d\n\n%b" % (number, b"y\n" * number)
