"""Deliveries that are killed at some moment, by SIGKILL, and what the next one finds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass

from support.faults import Setting
from support.sandbox import Sandbox, start_command
from support.serving import children_of


@dataclass
class Killed:
    """What came of one delivery: when and who was killed, and whether it was answered 250."""

    size: int
    seconds: float
    victim: str
    is_taken: bool


class Kills:
    """One mailbox of alice's, and deliveries into it by `mda receive`, killed or not."""

    def __init__(self, sandbox: Sandbox, setting: Setting, seed: int) -> None:
        self._sandbox = sandbox
        self._setting = setting
        self._random = random.Random(seed)  # noqa: S311 (to be had again)
        self._config = sandbox.configure(setting.config)
        self._dialogue = sandbox.root / "dialogue"

    def kill_one(self, size: int) -> Killed:
        """Kill a delivery of `size` bytes, then deliver another; AssertionError if one is torn.

        The moment is within the time that a delivery of that size takes.
        """
        self._empty()
        text = self._text(size)
        begun = time.monotonic()
        assert self._deliver(text, b"measured") is True
        seconds = self._random.uniform(0, 1.1 * (time.monotonic() - begun))
        self._empty()
        victim = self._random.choice(["broker", "session", "both"])
        is_taken = self._deliver(text, b"killed", victim, seconds)
        assert self._deliver(b"z\n", b"after"), "the next delivery fails"
        self._judge(text, is_taken=is_taken, where=f"{size} bytes, {victim} after {seconds:.4f} s")
        return Killed(size, seconds, victim, is_taken)

    def _text(self, size: int) -> bytes:
        line = b"%016x" % self._random.getrandbits(64) * 4 + b"\n"
        return line * (size // len(line) + 1)

    def _deliver(self, text: bytes, subject: bytes, victim: str = "", seconds: float = 0) -> bool:
        """One message by SMTP; whether the end of data was answered with 250."""
        envelope = b"HELO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\nDATA\r\n"
        header = b"Subject: %b\r\n\r\n" % subject
        with self._dialogue.open("wb") as file:
            file.write(envelope + header + text.replace(b"\n", b"\r\n") + b".\r\nQUIT\r\n")
        with self._dialogue.open("rb") as file:
            process = subprocess.Popen(
                self._sandbox.inside([*start_command(), "receive", "--config", self._config]),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            if victim:
                time.sleep(seconds)
                kill(process.pid, victim)
            said, _ = process.communicate(timeout=120)
        return b"\r\n354 " in said and b"\r\n250 2.0.0 " in said

    def _judge(self, text: bytes, *, is_taken: bool, where: str) -> None:
        kept = self._mailbox()
        end = b"" if self._setting.is_maildir else b"\n"
        whole = kept.count(b"\nSubject: killed\n\n" + text + end)
        assert whole <= 1, f"{where}: twice"
        assert whole or not is_taken, f"{where}: it got its 250 and is not there"
        assert kept.count(b"\nSubject: killed\n") == whole, f"{where}: half a message"
        assert kept.count(b"\nSubject: after\n\nz\n" + end) == 1, f"{where}: {kept[-300:]!r}"
        if not self._setting.is_maildir:
            assert kept.count(text[:65]) == whole * (len(text) // 65), f"{where}: a piece of it"
            left = [path.name for path in (self._sandbox.root / "mail").iterdir()]
            assert left == ["alice"], f"{where}: {left}"

    def _empty(self) -> None:
        self._sandbox.run(["sh", "-c", "rm -rf /var/mail/alice* /home/alice/Maildir"])

    def _mailbox(self) -> bytes:
        if self._setting.is_maildir:
            script = "cat /home/alice/Maildir/new/*"
            return self._sandbox.run(["sh", "-c", script]).stdout
        return self._sandbox.mailbox("alice") or b""


def kill(broker: int, victim: str) -> None:
    """SIGKILL for one of the two processes or for both, as far as they are there."""
    pids = {
        "broker": [broker],
        "session": children_of(broker),
        "both": [broker, *children_of(broker)],
    }[victim]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
