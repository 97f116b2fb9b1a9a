"""From exec of `mda receive` to its first byte, and what its two processes hold in memory.

    python -m tests.bench.start        or: python tests/bench/start.py [ROUNDS]

Run it as root with the interpreter of an installed mda. Each round starts a bare
interpreter and `mda receive` in turn, so that a noisy machine spoils both alike; the
ratio of the medians is the figure. Memory is the proportional set size (PSS) of session
and broker together while a message of 50 MiB has just been taken, by SAML.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.memory import family_of, proportional_set
from support.sandbox import Sandbox, start_command


def time_bare() -> float:
    """Milliseconds of a bare interpreter, from exec to exit."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
    return (time.perf_counter() - begin) * 1000


def time_greeting(sandbox: Sandbox) -> float:
    """Milliseconds from exec to the first byte of the greeting.

    Inside the sandbox by way of nsenter, whose own time is taken off by the caller.
    """
    ours, theirs = sandbox.connect_as("bob")
    with ours:
        begin = time.perf_counter()
        process = sandbox.start("receive", client=theirs)
        theirs.close()
        first = ours.recv(1)
        taken = (time.perf_counter() - begin) * 1000
        assert first == b"2"
        ours.sendall(b"QUIT\r\n")
        process.communicate()
    return taken


def time_wrapper(sandbox: Sandbox) -> float:
    """Milliseconds of entering the sandbox for nothing."""
    begin = time.perf_counter()
    subprocess.run(sandbox.inside(["/bin/true"]), check=True)
    return (time.perf_counter() - begin) * 1000


def measure_memory(sandbox: Sandbox, size: int) -> int:
    """KiB of the pair after a message of `size` bytes, the session still open."""
    ours, theirs = sandbox.connect_as("bob")
    with ours:
        process = sandbox.start("receive", client=theirs)
        theirs.close()
        ours.sendall(
            b"EHLO x\r\nSAML FROM:<bob@x>\r\nRCPT TO:<alice>\r\nDATA\r\nSubject: x\r\n\r\n"
        )
        line = b"x" * 76 + b"\r\n"
        block = line * 800
        most = 0
        for _ in range(size // len(block) + 1):
            ours.sendall(block)
            if not most:
                most = sum(map(proportional_set, family_of(process.pid)))
        ours.sendall(b".\r\n")
        said = b""
        while b"354" not in said or not said.rstrip().rpartition(b"\r\n")[2].startswith(
            b"250 2.0.0"
        ):
            said += ours.recv(65536)
        most = max(most, sum(map(proportional_set, family_of(process.pid))))
        ours.sendall(b"QUIT\r\n")
        process.communicate()
    return most


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    root = Path(tempfile.mkdtemp(prefix="mda-bench-"))
    sandbox = Sandbox(root)
    try:
        figures = [
            (time_bare(), time_wrapper(sandbox), time_greeting(sandbox)) for _ in range(rounds)
        ]
        bare, wrapper, greeting = (
            statistics.median(column) for column in zip(*figures, strict=True)
        )
        print(f"command               {' '.join(start_command())} receive")
        print(f"bare interpreter      {bare:6.1f} ms")
        print(f"entering the sandbox  {wrapper:6.1f} ms, taken off below")
        print(f"exec to first byte    {greeting - wrapper:6.1f} ms")
        print(f"ratio                 {(greeting - wrapper) / bare:6.2f}  (goal: at most 2.5)")
        for size in (4_000, 50_000_000):
            pair = measure_memory(sandbox, size) / 1024
            print(
                f"PSS of the pair after a SAML of {size:,} bytes: {pair:.1f} MiB (goal: under 40)"
            )
    finally:
        sandbox.close()
        subprocess.run(["rm", "-rf", str(root)], check=True)


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
