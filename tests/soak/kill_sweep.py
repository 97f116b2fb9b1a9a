"""kill -9 at random moments of deliveries of 4 KiB to 50 MiB, into mbox and Maildir.

    python tests/soak/kill_sweep.py [COUNT [SEED]]

Run it as root. The broker, the session or both are killed; after each and the next delivery
the mailbox must hold every message that got its 250, each once, and no half message.
"""

from __future__ import annotations

import collections
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.faults import Setting
from support.kills import Kills
from support.sandbox import Sandbox

SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20, 50 << 20)
WEIGHTS = (30, 25, 25, 15, 5)


def main(count: int, seed: int) -> None:
    """Kill `count` deliveries, half of them into each kind of mailbox."""
    root = Path(tempfile.mkdtemp(prefix="mda-soak-", dir="/var/tmp"))
    sandbox = Sandbox(root)
    sizes = random.Random(seed).choices(SIZES, WEIGHTS, k=count)  # noqa: S311 (to be had again)
    seen: collections.Counter[str] = collections.Counter()
    try:
        for number, size in enumerate(sizes):
            setting = Setting(is_maildir=number % 2 == 1)
            killed = Kills(sandbox, setting, seed + number).kill_one(size)
            seen["with 250" if killed.is_taken else "without"] += 1
            seen[f"{size >> 10} KiB"] += 1
            seen[killed.victim] += 1
    finally:
        print(", ".join(f"{name}: {times}" for name, times in sorted(seen.items())))
        sandbox.close()
        shutil.rmtree(root)
    print(f"{count} kills, nothing torn and nothing lost")


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    main(words[0] if words else 500, words[1] if len(words) > 1 else 1)
