"""A host whose power is cut while mail arrives: what got its 250 is there afterwards.

    python tests/soak/power_cut.py [BOOTS]

Run it as root; it needs qemu-system-x86, linux-image-cloud-amd64, initramfs-tools, what the
host tests need, and 3 GiB under /var/tmp. A Debian 12 with mda, installed by the README's
command, boots in a virtual machine. Clients outside send it mail, by SMTP into an mbox and
by LMTP into a Maildir, and note every 250. At a random moment the machine is killed.

Its disk has a cache that forgets: of what was written after the last flush only a random
half reaches the disk. The next boot gets one more message for each mailbox, and then every
message that got its 250 must be there, each one whole, and no half of any other.

A boot takes long, so MOMENTS more are tried of each: from the log of its writes the disk is
made as a cut at that moment would have left it, and mounted here for the next delivery.

The disk and the counts stay in DIRECTORY, and the next run goes on from there.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import smtplib
import socket
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts.corpus import below_added_lines, number_of, read_mbox
from hosts.host import free_port, wait_until
from soak.machine import build_disk, greets, qemu_command
from soak.write_log import Entry, cut_power, read_log

DIRECTORY = Path("/var/tmp/mda-power-cut")
DISK, COUNTS = DIRECTORY / "disk", DIRECTORY / "counts.json"
SCRATCH, MOUNTED = DIRECTORY / "scratch", DIRECTORY / "mounted"
NEXT = 1_000_000_000  # the number of the message that is delivered after a cut
LOAD_SECONDS = 20.0  # the cut comes at a random moment of these
CLIENTS = 3  # for each mailbox
MOMENTS = 10
SIZES = (0, 100, 5_000, 60_000, 400_000, 1_500_000)  # the last does not stay in memory
WEIGHTS = (4, 8, 8, 4, 2, 1)
UP_SECONDS = 300
TRIES = 3

# Ports inside: the two ways in, and two for the test itself.
SMTP, LMTP, ARCHIVE, CLEAR = 2525, 2424, 2323, 2222
PREPARATION = f"""
mda install --listen 0.0.0.0:{SMTP} --listen lmtp+0.0.0.0:{LMTP}
sed 's|^#mailbox = .*|mailbox = "{{home}}/Maildir/"|' /etc/mda/mda.toml > /etc/mda/maildir.toml
mkdir -p /etc/systemd/system/mda-lmtp@.service.d
cat > /etc/systemd/system/mda-lmtp@.service.d/maildir.conf <<END
[Service]
ExecStart=
ExecStart=/usr/local/bin/mda receive --protocol lmtp --config /etc/mda/maildir.toml
END
serve archive {ARCHIVE} '/bin/tar -C / -c var/mail home/bob'
serve clear {CLEAR} '/bin/sh -c "rm -rf /var/mail/* /home/bob/Maildir; sync; echo done"'
systemctl mask -q getty@tty1
"""


@dataclass
class Counts:
    """What all runs have seen; `kept` holds, by mailbox, the numbers that got their 250."""

    boots: int = 0
    cuts: int = 0
    sent: int = 0
    accepted: int = 0
    deferred: int = 0
    writes: int = 0
    writes_lost: int = 0
    torn: int = 0
    number: int = 0
    kept: dict[str, list[int]] = field(default_factory=lambda: {"alice": [], "bob": []})

    @classmethod
    def load(cls) -> Self:
        return cls(**json.loads(COUNTS.read_text())) if COUNTS.exists() else cls()

    def save(self) -> None:
        fresh = COUNTS.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self)))
        fresh.rename(COUNTS)

    def __str__(self) -> str:
        return (
            f"{self.boots} boots, {self.cuts} cuts, {self.sent} messages begun, "
            f"{self.accepted} got 250, {self.deferred} deferred, "
            f"{self.torn} halves seen before the next delivery; "
            f"{self.writes_lost} of {self.writes} writes lost"
        )


def make_message(number: int) -> bytes:
    """The message of that number, with LF line ends: the same one whenever asked for."""
    chance = random.Random(number)  # noqa: S311 (no secret)
    (size,) = chance.choices(SIZES, WEIGHTS)
    lines = [b"X-Number: %d\n" % number, b"Subject: before the cut\n\n"]
    block = chance.randbytes(3000).hex().encode()
    for at in range(0, size, 70):
        start = b"From " if at % 7000 == 0 else b""
        lines.append(start + block[at % 5900 : at % 5900 + 69 - len(start)] + b"\n")
    return b"".join(lines)


# -- the machine ----------------------------------------------------------------------


class Machine:
    """The virtual machine, from its boot to the cut. `ports` leads to those inside."""

    def __init__(self) -> None:
        self.ports = {inside: free_port() for inside in (SMTP, LMTP, ARCHIVE, CLEAR)}
        self.log = DIRECTORY / "writes"
        running = DIRECTORY / "running"
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", DISK, running], check=True)
        self.log.unlink(missing_ok=True)
        self.log.touch()
        self._console = (DIRECTORY / "console").open("wb")
        self._qemu = subprocess.Popen(
            self._command(running),
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
        )

    def _command(self, running: Path) -> list[str]:
        logged = f"driver=blklogwrites,node-name=disk,file.driver=file,file.filename={running}"
        return [
            *qemu_command(DIRECTORY, self.ports),
            "-nographic",
            *("-blockdev", f"{logged},log.driver=file,log.filename={self.log}"),
            *("-device", "virtio-blk-pci,drive=disk,discard=off,write-zeroes=off"),
        ]

    def is_up(self) -> bool:
        """Wait until both ways in say their greeting; False if qemu itself has crashed."""
        for inside in (SMTP, LMTP):
            wait_until(partial(self._is_settled, inside), "the machine is up", UP_SECONDS)
        return self._qemu.poll() is None

    def _is_settled(self, inside: int) -> bool:
        return self._qemu.poll() is not None or greets(self.ports[inside])

    def read(self, inside: int) -> bytes:
        """All that a port says."""
        address = ("127.0.0.1", self.ports[inside])
        with (
            socket.create_connection(address, 120) as connection,
            connection.makefile("rb") as file,
        ):
            return file.read()

    def cut(self) -> None:
        """No signal to the system, no flush: the processor is gone."""
        self._qemu.send_signal(signal.SIGKILL)
        self._qemu.wait()
        self._console.close()


def boot() -> Machine:
    """A machine that is up. qemu crashes now and then, before anything has happened."""
    for _ in range(TRIES):
        machine = Machine()
        try:
            if machine.is_up():
                return machine
        except BaseException:
            machine.cut()
            raise
        machine.cut()
    raise SystemExit(f"qemu has crashed {TRIES} times")


class Load:
    """Clients that send mail until the machine is gone.

    `noted` are the 250s: for whom, which message, and how long the log was by then.
    """

    def __init__(self, machine: Machine, counts: Counts) -> None:
        self._machine = machine
        self._counts = counts
        self.noted: list[tuple[str, int, int]] = []
        self._numbers = itertools.count(counts.number)
        self._lock = threading.Lock()
        self._all_connected = threading.Barrier(2 * CLIENTS + 1)
        self._threads = [
            threading.Thread(target=self._send_all, args=(user,))
            for user in ("alice", "bob") * CLIENTS
        ]

    def start(self) -> None:
        """Let them all begin, as soon as the last has been greeted."""
        for thread in self._threads:
            thread.start()
        self._all_connected.wait(UP_SECONDS)

    def join(self) -> None:
        """Until all have seen that the machine is gone."""
        for thread in self._threads:
            thread.join()

    def _send_all(self, user: str) -> None:
        try:
            with self.connect(user) as client:
                self._all_connected.wait(UP_SECONDS)
                while True:
                    self.send(client, user)
        except (OSError, smtplib.SMTPException):
            return

    def connect(self, user: str) -> smtplib.SMTP:
        """The way to the mailbox of `user`: SMTP to alice's mbox, LMTP to bob's Maildir."""
        if user == "alice":
            return smtplib.SMTP("127.0.0.1", self._machine.ports[SMTP], timeout=120)
        return smtplib.LMTP("127.0.0.1", self._machine.ports[LMTP], timeout=120)

    def send(self, client: smtplib.SMTP, user: str) -> None:
        """One message, noted if it gets its 250; raises where it gets no reply."""
        with self._lock:
            number = next(self._numbers)
            self._counts.number = number + 1
            self._counts.sent += 1
        try:
            text = make_message(number).replace(b"\n", b"\r\n")
            client.sendmail("carol@example.org", [user], text)
        except smtplib.SMTPResponseException as refusal:
            print(f"{user}: {refusal}", flush=True)
            with self._lock:
                self._counts.deferred += 1
            return
        with self._lock:
            self._counts.accepted += 1
            self._counts.kept[user].append(number)
            self.noted.append((user, number, self._machine.log.stat().st_size))


# -- the mail -------------------------------------------------------------------------


def read_archive(archive: bytes) -> dict[str, bytes]:
    """The files in a tar archive by their names."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = ((member, tar.extractfile(member)) for member in tar)
        return {member.name: file.read() for member, file in found if file is not None}


def check_message(message: bytes) -> int:
    """The number of a stored message; AssertionError unless it is whole."""
    number = number_of(message)
    assert below_added_lines(message) == make_message(number), f"{number} is not whole"
    return number


def numbers_in(files: dict[str, bytes]) -> dict[str, list[int]]:
    """The messages in both mailboxes; AssertionError if one is not whole."""
    inbox = files.get("var/mail/alice", b"")
    folders = ("home/bob/Maildir/new/", "home/bob/Maildir/cur/")
    return {
        "alice": [check_message(message) for message in read_mbox(inbox)],
        "bob": [check_message(text) for name, text in files.items() if name.startswith(folders)],
    }


def count_torn(files: dict[str, bytes]) -> int:
    """Does the mbox hold half a message, as the cut has left it?"""
    try:
        numbers_in({name: text for name, text in files.items() if name == "var/mail/alice"})
    except AssertionError:
        return 1
    return 0


def compare(kept: dict[str, list[int]], files: dict[str, bytes], what: str) -> None:
    """All that got 250 must be there, and nothing that is not whole."""
    found = numbers_in(files)
    for user, numbers in kept.items():
        lost = set(numbers) - set(found[user])
        if lost:
            raise SystemExit(f"{what}: LOST, of {user}'s: {sorted(lost)}")


def check(machine: Machine, load: Load, counts: Counts) -> None:
    """What the last cut has left, after the next delivery."""
    counts.torn += count_torn(read_archive(machine.read(ARCHIVE)))
    for user in counts.kept:
        before = counts.accepted
        with load.connect(user) as client:
            load.send(client, user)
        if counts.accepted == before:
            raise SystemExit(f"the next message for {user} was refused")
    compare(counts.kept, read_archive(machine.read(ARCHIVE)), "after the boot")


# Mounted where nobody else sees it, and gone with the shell.
AFTER_A_CUT = f"""
mount -o loop {SCRATCH} {MOUNTED}
mount -t proc proc {MOUNTED}/proc
mda() {{ chroot {MOUNTED} /usr/local/bin/mda deliver -f carol@example.org "$@"; }}
tar -C {MOUNTED} -cf {DIRECTORY}/before.tar var/mail home/bob
mda -d alice <{DIRECTORY}/next >&2
mda -d bob --config /etc/mda/maildir.toml <{DIRECTORY}/next >&2
tar -C {MOUNTED} -c var/mail home/bob
"""


def try_moment(entries: list[Entry], kept: dict[str, list[int]], counts: Counts, what: str) -> None:
    """Make the disk that a cut behind the entries leaves, deliver once more, and look."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", DISK, SCRATCH], check=True)
    writes, lost = cut_power(entries, SCRATCH)
    MOUNTED.mkdir(exist_ok=True)
    (DIRECTORY / "next").write_bytes(make_message(NEXT))
    words = ["unshare", "--mount", "sh", "-ec", AFTER_A_CUT]
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{what}: {done.stderr.decode()}")
    counts.cuts += 1
    counts.writes += writes
    counts.writes_lost += lost
    counts.torn += count_torn(read_archive((DIRECTORY / "before.tar").read_bytes()))
    compare(
        {user: [*numbers, NEXT] for user, numbers in kept.items()}, read_archive(done.stdout), what
    )


def try_moments(
    load: Load, begun: int, entries: list[Entry], counts: Counts, kept: dict[str, list[int]]
) -> None:
    """Cuts at random moments since the log was `begun` bytes long and `kept` was there."""
    possible = [at for at, entry in enumerate(entries, 1) if entry.end > begun]
    for at in sorted(random.sample(possible, min(MOMENTS, len(possible)))):
        end = entries[at - 1].end
        there = {user: list(numbers) for user, numbers in kept.items()}
        for user, number, size in load.noted:
            if begun < size <= end:
                there[user].append(number)
        try_moment(entries[:at], there, counts, f"boot {counts.boots}, entry {at}")


def boot_once(counts: Counts) -> None:
    """Boot, check what the last cut has left, load, and cut at a random moment."""
    machine = boot()
    try:
        load = Load(machine, counts)
        check(machine, load, counts)
        if counts.boots % 2:
            machine.read(CLEAR)
            counts.kept = {"alice": [], "bob": []}
        kept = {user: list(numbers) for user, numbers in counts.kept.items()}
        begun = machine.log.stat().st_size
        load.start()
        time.sleep(random.uniform(0, LOAD_SECONDS))  # noqa: S311 (no secret)
    finally:
        machine.cut()
    load.join()
    entries = list(read_log(machine.log))
    try_moments(load, begun, entries, counts, kept)
    writes, lost = cut_power(entries, DISK)
    counts.writes += writes
    counts.writes_lost += lost
    counts.boots += 1
    counts.cuts += 1
    counts.save()


def main() -> None:
    """Boot and cut as often as asked for, and check once more after the last."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no machine is left behind
    if not DISK.exists():
        build_disk(DIRECTORY, PREPARATION)
    counts = Counts.load()
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        began = time.monotonic()
        boot_once(counts)
        print(f"{counts} ({time.monotonic() - began:.0f} s)", flush=True)
    machine = boot()
    try:
        check(machine, Load(machine, counts), counts)
    finally:
        machine.cut()
    print("everything that got its 250 is there, and every message is whole")


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
