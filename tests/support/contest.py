"""Many processes of ours and of another program's that write to one mailbox at once.

Four run `mda deliver`, four speak LMTP, four are the other program. What each of them was
told went well is in the mailbox once and whole when all have ended.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from support.lockers import Locker
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import LMTP, Line, connect, served

EACH = 4
# Whom others do not let in for so long is refused, which is no loss.
LOCK_SECONDS = 20
FROM_LINE = b"From carol@example.org Tue Jan  6 10:00:00 2026\n"
# Most messages are one write, some are several.
LINES = [1] * 12 + [50] * 3 + [2000]
# Dovecot's own message in a mailbox that would be empty.
_INTERNAL = b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n"


class Message:
    """One message: its text follows from its name, its subject and the number of its lines."""

    def __init__(self, name: str, subject: str, lines: int) -> None:
        self.name = name
        self.subject = subject
        self.is_ours = not name.startswith("foreign")
        self.is_accepted = False
        head = f"Subject: {subject}\nX-Id: {name}\nX-Lines: {lines}\n\n"
        self.text = head.encode() + write_body(name, lines)


def write_body(name: str, lines: int) -> bytes:
    return f"{name} {'.' * 60}\n".encode() * lines + b"end\n"


def make_messages(writer: str) -> Iterator[Message]:
    """The messages of one writer; every third is chaff, for others to delete."""
    chance = random.Random(writer)  # noqa: S311 (the same messages every time)
    for number in itertools.count():
        yield Message(f"{writer}-{number}", "keep" if number % 3 else "chaff", chance.choice(LINES))


class Contest:
    """The mailbox of one sandbox, who writes to it, and what became of every message."""

    def __init__(self, sandbox: Sandbox, locker: Locker, seconds: float) -> None:
        self._sandbox = sandbox
        self._locker = locker
        self._config = sandbox.configure(locker.configuration(LOCK_SECONDS))
        self._box = sandbox.root / "mail/alice"
        self._box.touch()
        os.chown(self._box, UIDS["alice"], 8)
        self._box.chmod(0o660)
        self._until = time.monotonic() + seconds
        self.messages: dict[str, Message] = {}
        self._deletions: list[bool] = []

    def run(self) -> None:
        """Let them all write until the time is over; then nothing but chaff is deleted."""
        writers: list[tuple[Callable[[str], list[Message]], str]] = []
        for number in range(EACH):
            writers.append((self._deliver, f"deliver{number}"))
            writers.append((self._speak_lmtp, f"lmtp{number}"))
            writers.append((self._let_write, f"foreign{number}"))
        with (
            served(self._sandbox, "--config", self._config),
            ThreadPoolExecutor(len(writers)) as pool,
        ):
            for future in [pool.submit(write, name) for write, name in writers]:
                self.messages |= {message.name: message for message in future.result()}
        if self._locker.delete:
            assert self._locker.run(self._sandbox, self._locker.delete)

    def _in_time(self, writer: str) -> Iterator[Message]:
        for message in make_messages(writer):
            if time.monotonic() > self._until:
                return
            yield message

    def _deliver(self, writer: str) -> list[Message]:
        command = [*start_command(), "deliver", "-f", "bob@example.org", "-d", "alice"]
        sent = []
        for message in self._in_time(writer):
            done = self._sandbox.run([*command, "--config", self._config], input=message.text)
            assert done.returncode in (0, 75), done.stderr
            message.is_accepted = done.returncode == 0
            sent.append(message)
        return sent

    def _speak_lmtp(self, writer: str) -> list[Message]:
        line = Line(connect(self._sandbox, LMTP, "root"))
        line.say(b"LHLO x\r\n")
        sent = []
        for message in self._in_time(writer):
            line.say(b"MAIL FROM:<bob@example.org>\r\nRCPT TO:<alice>\r\nDATA\r\n")
            line.expect(b"354")
            line.say(message.text.replace(b"\n", b"\r\n") + b".\r\n")
            message.is_accepted = line.expect(rb"(?:250 2\.0|4)").startswith(b"250")
            sent.append(message)
            # Without a pause ours would hardly ever let others in.
            time.sleep(0.02)
        line.say(b"QUIT\r\n")
        line.finish()
        return sent

    def _let_write(self, writer: str) -> list[Message]:
        locker, sent = self._locker, []
        for message in self._in_time(writer):
            text = FROM_LINE + message.text + b"\n"
            message.is_accepted = locker.run(self._sandbox, locker.append, text)
            sent.append(message)
            if int(writer[-1]) < locker.deleters:
                self._deletions.append(locker.run(self._sandbox, locker.delete))
        return sent

    def count(self, *, ours: bool) -> str:
        """How many messages were accepted, of how many."""
        mine = [message for message in self.messages.values() if message.is_ours == ours]
        return f"{sum(message.is_accepted for message in mine)} of {len(mine)}"

    def accepted(self, *, ours: bool) -> int:
        """How many messages were accepted."""
        return sum(m.is_accepted and m.is_ours == ours for m in self.messages.values())

    @property
    def deletions(self) -> int:
        """How often chaff was deleted while others wrote."""
        return sum(self._deletions)

    def complaints(self) -> list[str]:
        """Whatever is in the mailbox and should not be, or is not and should; and locks."""
        found: Counter[str] = Counter()
        complaints = [f"left: {name}" for name in os.listdir(self._box.parent) if name != "alice"]
        for stored in re.split(rb"(?m)^(?=From )", self._box.read_bytes()):
            name = self._identify(stored)
            if name not in self.messages:
                complaints += [f"torn: {stored[:300]!r}"] if stored and name else []
            found[name] += 1
        for name, message in self.messages.items():
            # A program that fails may have written; ours may not.
            is_certain = message.is_accepted or message.is_ours
            due = message.is_accepted and (message.subject == "keep" or not self._locker.delete)
            if found[name] > 1 or (is_certain and found[name] != due):
                complaints.append(f"{name} is there {found[name]} times, not {due:d}")
        return complaints

    def _identify(self, stored: bytes) -> str:
        """The name of a message that is whole, "" where there is none, else what is wrong."""
        head, _, body = stored.partition(b"\n\n")
        if not stored or _INTERNAL in head + b"\n":
            return ""
        fields = dict(re.findall(rb"(?m)^(X-Id|X-Lines): (\S+)$", head))
        name, lines = fields.get(b"X-Id", b"?").decode(), int(fields.get(b"X-Lines", b"0"))
        is_whole = body.rstrip(b"\n") == write_body(name, lines).rstrip(b"\n")
        return name if is_whole else f"torn {name}"
