"""kill -9 of receivers and of runs of the queue, while mail goes to another host.

    python tests/soak/queue_kills.py [KILLS [MESSAGES]]

Run it as root. Messages for two recipients at one next hop come by `mda receive`, one after
the other, and runs of the queue are started beside it; now and then one of either is killed.
Every message that got its 250 must arrive for both. It may come again only where a run was
killed between the hop's confirmation and its record; how often that was is told.
"""

from __future__ import annotations

import collections
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.nexthop import NextHop
from support.sandbox import Sandbox, start_command
from support.serving import children_of

from mda.outbound.queue import FOLDERS

ENVELOPE = b"HELO x\r\nMAIL FROM:<bob@mda.test>\r\nRCPT TO:<away>\r\nDATA\r\n"


class Load:
    """Receivers and runs, and who of them is killed."""

    def __init__(self, sandbox: Sandbox, hop: NextHop, kills: int, messages: int) -> None:
        aliases = sandbox.root / "etc/test-aliases"
        aliases.write_text("away: a@far.example, b@far.example\n")
        aliases.chmod(0o644)
        config = f"[recipients]\naliases = {str(aliases)!r}\n"
        self._sandbox = sandbox
        self._config = sandbox.configure(f'{config}[routes]\n"*" = "{hop.place}"\n')
        self._random = random.Random(1)  # noqa: S311 (to be had again)
        self._messages = messages
        self._share = kills / messages
        self._is_over = False
        self.taken: list[int] = []
        self.killed: collections.Counter[str] = collections.Counter()

    def go(self) -> None:
        """Send all messages, and let a last run of the queue end."""
        runs = threading.Thread(target=self._run_queue)
        runs.start()
        for number in range(self._messages):
            is_killed = self._random.random() < self._share
            if self._receive(number, self._random.uniform(0, 0.08) if is_killed else None):
                self.taken.append(number)
        self._is_over = True
        runs.join()
        assert self._start_run("--now").wait(300) == 0

    def _receive(self, number: int, seconds: float | None) -> bool:
        """One message; whether it got its 250. With `seconds` it is killed then."""
        command = [*start_command(), "receive", "--config", self._config]
        process = subprocess.Popen(
            self._sandbox.inside(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        text = b"X-Number: %d\r\n\r\ntext\r\n.\r\nQUIT\r\n" % number
        if seconds is not None:
            threading.Timer(seconds, self._kill, [process, "receiver"]).start()
        said, _ = process.communicate(ENVELOPE + text, timeout=60)
        return b"\r\n250 2.1.5 Delivered to all 2 members\r\n" in said

    def _kill(self, process: subprocess.Popen[bytes], kind: str) -> None:
        if process.poll() is None:
            self.killed[kind] += 1
            for child in children_of(process.pid):
                subprocess.run(["kill", "-9", str(child)], check=False)
            process.kill()

    def _start_run(self, *words: str) -> subprocess.Popen[bytes]:
        command = [*start_command(), "queue", "--config", self._config, "run", *words]
        log = (self._sandbox.root / "queue.log").open("ab")
        with log:
            return subprocess.Popen(self._sandbox.inside(command), stderr=log)

    def _run_queue(self) -> None:
        while not self._is_over:
            process = self._start_run("--now")
            if self._random.random() < 0.7:
                time.sleep(self._random.uniform(0.15, 0.5))
                self._kill(process, "run")
            process.wait(300)


def main(kills: int, messages: int) -> None:
    """Let it go, and count at the hop."""
    root = Path(tempfile.mkdtemp(prefix="mda-soak-", dir="/var/tmp"))
    sandbox = Sandbox(root)
    try:
        with NextHop(b"PIPELINING") as hop:
            load = Load(sandbox, hop, kills, messages)
            load.go()
        came: collections.Counter[int] = collections.Counter()
        for message in hop.messages:
            assert len(message.recipients) == 2
            (number,) = re.findall(rb"X-Number: (\d+)\r\n\r\ntext\r\n", message.text)
            came[int(number)] += 1
        lost = [number for number in load.taken if not came[number]]
        twice = sum(times - 1 for times in came.values())
        print(f"{messages} messages, {len(load.taken)} got 250; killed: {dict(load.killed)}")
        assert twice <= load.killed["run"] * 20, "more than were under way"
        print(f"{len(lost)} lost, {twice} confirmed by the hop but killed before that was on disk")
        assert not lost
        places = [root / "spool/mda/queue" / folder for folder in FOLDERS]
        assert [path for place in places for path in place.iterdir()] == []
    finally:
        sandbox.close()
        shutil.rmtree(root)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [400, 1000][len(numbers) :]))
