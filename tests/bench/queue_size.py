"""What a long queue costs: time and memory of listing it, and of a run's start.

    python tests/bench/queue_size.py [MESSAGES...]

Run it as root. For each size so many messages are queued for a host that is down; then `mda
queue list` and a run that has nothing due are timed, and a run for which all is due until it
has tried the first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.sandbox import SPOOL_UID, Sandbox, start_command

from mda.outbound import queue
from mda.outbound.queue import Addressee, Envelope

_TEXT = b"Subject: x\n\n" + b"x" * 70 + b"\n"


def fill(directory: str, count: int) -> None:
    """So many messages that are due in an hour, as `mda` would own them.

    Written without the pauses for the disk that `queue.put` makes.
    """
    queue.make_folders(directory)
    due = time.time() + 3600
    for number in range(count):
        addressee = Addressee(b"user", b"far.example")
        envelope = Envelope("MAIL", b"bob@mda.test", [addressee])
        path = os.path.join(directory, "wait", f"{number:x}")
        Path(path).write_bytes(queue._pack_envelope(envelope) + _TEXT)
        os.utime(path, (due, due))
        os.chown(path, SPOOL_UID, SPOOL_UID)
    for folder in ("", *os.listdir(directory)):
        os.chown(os.path.join(directory, folder), SPOOL_UID, SPOOL_UID)


def time_command(sandbox: Sandbox, *words: str) -> tuple[float, int, bytes]:
    """Seconds, the most KiB in memory (or this process's, if more), and how the output ends."""
    command = [*start_command(), "queue", *words]
    begin = time.monotonic()
    process = subprocess.Popen(sandbox.inside(command), stdout=subprocess.PIPE)
    assert process.stdout is not None
    end = b""
    while piece := process.stdout.read(1 << 20):
        end = (end + piece)[-200:]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    process.stdout.close()
    return time.monotonic() - begin, usage.ru_maxrss, end


def time_first_try(sandbox: Sandbox, config: str, hop: socket.socket) -> float:
    """Seconds from the start of a run to its first connection."""
    words = [*start_command(), "queue", "--config", config, "run", "--now"]
    begin = time.monotonic()
    process = subprocess.Popen(sandbox.inside(words), stderr=subprocess.DEVNULL)
    hop.accept()[0].close()
    taken = time.monotonic() - begin
    process.terminate()
    process.wait()
    return taken


def main(sizes: list[int]) -> None:
    """One line a size."""
    for size in sizes:
        sandbox = Sandbox(Path(tempfile.mkdtemp(prefix="mda-bench-", dir="/var/tmp")))
        with socket.create_server(("127.0.0.1", 0)) as hop:
            route = f'[routes]\n"*" = "127.0.0.1:{hop.getsockname()[1]}"\n'
            config = sandbox.configure(route)
            fill(str(sandbox.root / "spool/mda/queue"), size)
            listing, list_memory, end = time_command(sandbox, "list")
            assert end.endswith(b"%d messages\n" % size), end
            run, run_memory, _ = time_command(sandbox, "--config", config, "run")
            first = time_first_try(sandbox, config, hop)
        print(
            f"{size:7} messages: list {listing:6.2f} s {list_memory // 1024:3} MiB, "
            f"run with nothing due {run:5.2f} s {run_memory // 1024:3} MiB, "
            f"first try after {first:5.2f} s",
            flush=True,
        )
        sandbox.close()
        subprocess.run(["rm", "-rf", str(sandbox.root)], check=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1000, 10_000, 100_000])
