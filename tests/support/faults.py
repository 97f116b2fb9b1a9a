"""System calls that fail, one after the other, in the shipped command as it delivers.

The command is run under strace, which lets the Nth of a kind of call fail, from the shell
wrapper to the last process; then the mailbox is looked at, and a delivery without faults
must come after it as if nothing had been.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.sandbox import Sandbox, start_command

STATUSES = (0, 65, 67, 75, 77)
BEFORE = b"From x Thu Jan  1 00:00:00 1970\nSubject: before\n\nx\n\n"
BEFORE_NS = 1_000_000_000 * 1_000_000_000
NO_SHELL = b"sh: "
SCRIPT = Path(__file__).parents[2] / "systemd/mda.sh"


def wrapped_command(sandbox: Sandbox, before: list[str] | None = None) -> list[str]:
    """The `mda` that is installed: the shell script around the interpreter.

    `before` is what starts the interpreter there.
    """
    script = sandbox.root / "mda.sh"
    program = shlex.join([*(before or []), *start_command()])
    script.write_text(SCRIPT.read_text().replace("@PROGRAM@", program))
    return ["sh", str(script)]


@dataclass
class Setting:
    """What is delivered how: the kind of mailbox, the size of the text, by which command."""

    is_maildir: bool = False
    size: int = 100
    is_session: bool = False  # `mda receive`, and not `mda deliver`
    memory: int = 1_048_576

    def __str__(self) -> str:
        command = "receive" if self.is_session else "deliver"
        return f"{command}-{'maildir' if self.is_maildir else 'mbox'}-{self.size}"

    @property
    def config(self) -> str:
        mailbox = "mailbox = '{home}/Maildir/'\n" if self.is_maildir else ""
        # A text of 50 MiB has its header besides. A shell that cannot copy descriptor 0 gives
        # us another one, from which nothing comes.
        receiver = "[receiver]\nmessage_size = 100000000\nidle_seconds = 10\n"
        return f"{receiver}[delivery]\nmemory = {self.memory}\n{mailbox}"


class Faults:
    """One setting on one sandbox: deliveries with a fault, each followed by one without."""

    def __init__(self, sandbox: Sandbox, setting: Setting) -> None:
        self._sandbox = sandbox
        self._setting = setting
        self._record = sandbox.root / "faults"
        self._command = wrapped_command(sandbox)
        self._text = b"y" * 70 + b"\n"
        self._text *= setting.size // len(self._text) + 1

    def sweep(self, call: str, error: str, most: int = 10_000) -> Iterator[int]:
        """Let the first, the second ... call fail until a run has no such call any more.

        Each number is one run whose every promise was kept; AssertionError says which one
        was not, and where.
        """
        for number in range(1, most + 1):
            self._prepare()
            fault = f"inject={call}:error={error}:when={number}"
            if not self._try(fault, f"{call} {error} {number}"):
                return
            yield number

    def _try(self, fault: str, where: str) -> bool:
        """One faulty delivery and one good one; whether there was a fault at all."""
        trace = ["strace", "-f", "-qq", "-o", str(self._record), "-e", fault]
        is_taken = self._deliver(trace, b"first", where)
        was_there = "(INJECTED)" in self._record.read_text("latin-1")
        kept = self._mailbox()
        assert [kept.count(self._message(b"first")), is_taken] in (
            [0, False],
            [1, False],
            [1, True],
        ), f"{where}: {'250' if is_taken else 'refused'} and {kept[-300:]!r}"
        if not kept.count(b"Subject: first\n"):
            self._expect_untouched(where)
        assert self._deliver([], b"second", where), f"{where}: the next delivery fails"
        after = self._mailbox()
        assert after.count(self._message(b"second")) == 1, f"{where}: the next message is not there"
        whole = sum(after.count(self._message(each)) for each in (b"first", b"second"))
        assert after.count(b"\nSubject: ") == whole + (not self._setting.is_maildir), (
            f"{where}: half a message"
        )
        self._expect_clean(where)
        return was_there

    def _deliver(self, before: list[str], subject: bytes, where: str) -> bool:
        config = self._sandbox.configure(self._setting.config)
        text = b"Subject: %b\n\n%b" % (subject, self._text)
        if self._setting.is_session:
            return self._speak(before, config, text)
        words = ["deliver", "--config", config, "-f", "b@x", "-d", "alice"]
        command = [*before, *self._command]
        if where.startswith("close "):
            # What strace fails to close stays open: a shell would wait for the end of a pipe
            # that it holds itself.
            command = wrapped_command(self._sandbox, before)
        done = self._sandbox.run([*command, *words], input=text)
        if done.stderr.startswith(NO_SHELL):
            return False  # and nobody of ours was there to say 75
        assert done.returncode in STATUSES, f"{where}: status {done.returncode}: {done.stderr!r}"
        # Where the fault was in saying so, or in the shell's own descriptors, none may come.
        if done.returncode and not where.startswith(("write ", "close ", "fcntl ")):
            assert re.search(rb"(?m)^[45]\.\d+\.\d+ ", done.stderr), f"{where}: {done.stderr!r}"
        return done.returncode == 0

    def _speak(self, before: list[str], config: str, text: bytes) -> bool:
        """The same by SMTP on a pipe; whether the end of data was answered with 250."""
        envelope = b"HELO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\nDATA\r\n"
        said = self._sandbox.run(
            [*before, *self._command, "receive", "--config", config],
            input=envelope + text.replace(b"\n", b"\r\n") + b".\r\nQUIT\r\n",
        ).stdout
        return b"\r\n354 " in said and b"\r\n250 2.0.0 " in said

    def _message(self, subject: bytes) -> bytes:
        end = b"" if self._setting.is_maildir else b"\n"
        return b"\nSubject: %b\n\n%b%b" % (subject, self._text, end)

    def _prepare(self) -> None:
        if self._setting.is_maildir:
            self._sandbox.run(["sh", "-c", "rm -rf /home/alice/Maildir"])
            return
        script = (
            'cat > "$1" && chown alice:mail "$1" && chmod 660 "$1" && touch -d @1000000000 "$1"'
        )
        path = "/var/mail/alice"
        self._sandbox.run(["sh", "-c", f"rm -f {path}*; {script}", "sh", path], input=BEFORE)

    def _mailbox(self) -> bytes:
        """All messages that a reader would see, one behind the other."""
        if self._setting.is_maildir:
            script = "cat /home/alice/Maildir/new/* 2>/dev/null; true"
            return self._sandbox.run(["sh", "-c", script]).stdout
        return self._sandbox.mailbox("alice") or b""

    def _expect_untouched(self, where: str) -> None:
        if self._setting.is_maildir:
            assert self._mailbox() == b"", f"{where}: something was left in new"
            return
        path = self._sandbox.root / "mail/alice"
        kept, mtime = path.read_bytes(), path.stat().st_mtime_ns
        assert (kept, mtime) == (BEFORE, BEFORE_NS), f"{where}: {kept[-200:]!r} {mtime}"

    def _expect_clean(self, where: str) -> None:
        """No lock stays after the next delivery; in tmp a file may, which readers clear."""
        left = sorted(path.name for path in (self._sandbox.root / "mail").iterdir())
        assert left in ([], ["alice"]), f"{where}: {left}"
