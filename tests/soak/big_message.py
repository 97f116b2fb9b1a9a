"""A message of a GiB through `mda receive`: what it costs in memory, and that it arrives.

    python tests/soak/big_message.py [MIB]

Run it as root; it needs three times the message's size under /var/tmp for a while. It goes
into an mbox and then into a Maildir; every policy is on. The sizes and sums of the text as
it was sent and as it lies in the mailbox, its quoting undone, must be the same, and the
session and the broker together must stay under GOAL. What the text itself takes in memory
before it moves to the spool, at most delivery.memory, is a file without a name and no
process's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.memory import family_of, peak_resident_set, proportional_set
from support.sandbox import Sandbox

MIB = 1 << 20
GOAL = 40  # MiB of PSS
PAUSE = 0.02  # seconds between two looks at the memory
BLOCKS = 16
BEGIN = b"Subject: a big message\n\n"
CONFIG = """[receiver]
message_size = 1099511627776
bare_newlines = "reject"
text_line = 1000000

[delivery]
mailbox = "%s"
"""
MAILBOXES = {"mbox": "/var/mail/{user}", "Maildir": "/var/mail/{user}/"}
ENVELOPE = b"EHLO x\r\nMAIL FROM:<bob@x>\r\nRCPT TO:<alice>\r\nDATA\r\n"


class Sum:
    """The size in octets and the SHA-256 of a text that comes in pieces."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()

    def add(self, octets: bytes) -> None:
        """One more piece."""
        self.size += len(octets)
        self._hash.update(octets)

    def __str__(self) -> str:
        return f"{self.size:,} octets, sha256 {self._hash.hexdigest()}"


class Watch:
    """Looks at the PSS of a process and those below it, in KiB, until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.looks: list[dict[int, int]] = []
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(PAUSE):
            self.look()

    def look(self) -> dict[int, int]:
        """The PSS now, by pid."""
        self.looks.append({each: proportional_set(each) for each in family_of(self._pid)})
        return self.looks[-1]

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()

    @property
    def most(self) -> dict[int, int]:
        """The look at which it was the most."""
        return max(self.looks, key=lambda look: sum(look.values()))


def make_block(chance: random.Random) -> bytes:
    """About 256 KiB of lines with LF: long and short, dots, From_ lines, 8-bit, NUL."""
    lines = []
    size = 0
    while size < MIB // 4:
        start = chance.choice([b"", b"", b"", b".", b"..", b"From ", b">From ", b">>From ", b">"])
        body = chance.randbytes(chance.choice([0, 3, 40, 70, 70, 70, 900, 20_000]))
        lines.append(start + body.translate(None, b"\r\n") + b"\n")
        size += len(lines[-1])
    return b"".join(lines)


def stuff(block: bytes) -> bytes:
    """Whole lines as a client sends them (RFC 821 4.5.2)."""
    return (b"\r\n" + block.replace(b"\n", b"\r\n")).replace(b"\r\n.", b"\r\n..")[2:]


def send_text(client: socket.socket, size: int) -> Sum:
    """Send a text of at least `size` octets, without its end; its sum in LF form."""
    chance = random.Random(821)  # noqa: S311 (the same message every time)
    blocks = [(block, stuff(block)) for block in (make_block(chance) for _ in range(BLOCKS))]
    sent = Sum()
    sent.add(BEGIN)
    client.sendall(stuff(BEGIN))
    while sent.size < size:
        block, wire = chance.choice(blocks)
        client.sendall(wire)
        sent.add(block)
    return sent


def read_until(client: socket.socket, end: bytes) -> bytes:
    """What is said until a line begins with `end`."""
    said = b""
    while not re.search(rb"(?m)^%b.*\n" % end, said):
        more = client.recv(4096)
        if not more:
            raise SystemExit(f"gone after {said!r}")
        said += more
    return said


def stored_pieces(mailbox: Path) -> Iterator[bytes]:
    """The text in a mailbox of one message: from an mbox in whole lines, the quoting undone."""
    is_maildir = mailbox.is_dir()
    if is_maildir:
        (mailbox,) = mailbox.glob("new/*")
    with mailbox.open("rb") as file:
        file.seek(file.read(4096).index(b"\n" + BEGIN) + 1)
        left = mailbox.stat().st_size - file.tell() - (0 if is_maildir else len(b"\n"))
        begun = b""
        while piece := file.read(min(MIB, left)):
            left -= len(piece)
            whole, newline, begun = (begun + piece).rpartition(b"\n")
            whole += newline
            yield whole if is_maildir else re.sub(rb"(?m)^>(>*From )", rb"\1", whole)
        yield begun


def transfer(sandbox: Sandbox, mailbox: str, size: int) -> tuple[Sum, int]:
    """Send the message and print what it costs; its sum, and the most PSS in KiB."""
    ours, theirs = sandbox.connect_as("bob")
    file = sandbox.configure(CONFIG % mailbox)
    process = sandbox.start("receive", "--config", file, client=theirs)
    theirs.close()
    with ours, process:
        ours.settimeout(600)
        ours.sendall(ENVELOPE)
        read_until(ours, b"354")
        watch = Watch(process.pid)
        try:
            sent = converse(ours, size)
        finally:
            watch.stop()
        report(watch)
        ours.sendall(b"QUIT\r\n")
    return sent, sum(watch.most.values())


def converse(client: socket.socket, size: int) -> Sum:
    """From the text's first octet to the reply; prints how long it took."""
    began = time.monotonic()
    sent = send_text(client, size)
    sent_at = time.monotonic()
    client.sendall(b".\r\n")
    reply = read_until(client, b"[245]").decode().strip()
    rate = sent.size / (sent_at - began) / 1e6
    print(f"taken in {sent_at - began:.1f} s ({rate:.0f} MB/s, with the client's own work)")
    print(f"delivered in {time.monotonic() - sent_at:.1f} s: {reply}")
    return sent


def report(watch: Watch) -> None:
    """Print what the pair held and, while it is still there, holds."""
    most, last = watch.most, watch.look()
    print(f"most PSS of {len(watch.looks)} looks: {show(most.values())} MiB, goal: {GOAL}")
    print(f"PSS just before the exit: {show(last.values())} MiB")
    peaks = [peak_resident_set(each) for each in last]
    print(f"most RSS ever, shared pages counted in each: {show(peaks)} MiB")


def show(kibs: Iterable[int]) -> str:
    """The terms and their sum, from KiB to MiB."""
    figures = list(kibs)
    return f"{' + '.join(f'{kib / 1024:.1f}' for kib in figures)} = {sum(figures) / 1024:.1f}"


def main() -> None:
    """Print the figures; fail if a message is another one, or too much memory was held."""
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 1024) * MIB
    if shutil.disk_usage("/var/tmp").free < 3 * size:
        raise SystemExit("too little room under /var/tmp")
    for kind, mailbox in MAILBOXES.items():
        print(f"-- {kind}")
        deliver_one(mailbox, size)


def deliver_one(mailbox: str, size: int) -> None:
    """One message into such a mailbox, in a view of the host that is made for it."""
    root = Path(tempfile.mkdtemp(prefix="mda-soak-", dir="/var/tmp"))
    sandbox = Sandbox(root)
    root.joinpath("mail").chmod(0o3777)  # a Maildir there is for the user to make
    try:
        sent, most = transfer(sandbox, mailbox, size)
        stored = Sum()
        for piece in stored_pieces(root / "mail/alice"):
            stored.add(piece)
    finally:
        sandbox.close()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(root)
    print(f"sent    {sent}\nstored  {stored}")
    if str(sent) != str(stored):
        raise SystemExit("the mailbox holds another message")
    if most > GOAL * 1024:
        raise SystemExit("too much memory")


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
