"""Our processes and another program's on one mailbox, for each program that locks mailboxes.

    python tests/soak/lock_matrix.py [SECONDS [PROGRAM ...]]

Run it as root; without words each program gets a minute. Four `mda deliver` and four LMTP
clients of ours write to Alice's mailbox beside four processes of the other program, which
appends and, where it can, deletes what is called chaff. At the end every message that was
said to be delivered must be there once and whole, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.contest import Contest
from support.lockers import LOCKERS
from support.sandbox import Sandbox


def try_program(name: str, seconds: float) -> list[str]:
    """Let it write beside ours and print what came of it; what is wrong in the end."""
    locker = LOCKERS[name]
    root = Path(tempfile.mkdtemp(prefix="mda-soak-", dir="/var/tmp"))
    sandbox = Sandbox(root)
    try:
        contest = Contest(sandbox, locker, seconds)
        contest.run()
        complaints = contest.complaints()
        size = (root / "mail/alice").stat().st_size
    finally:
        sandbox.close()
        shutil.rmtree(root)
    print(
        f"{name} ({', '.join(locker.locks)}): delivered {contest.count(ours=True)} of ours, "
        f"{contest.count(ours=False)} of theirs, {contest.deletions} rounds of deleting, "
        f"{size:,} bytes in the end, {len(complaints)} wrong",
        flush=True,
    )
    return complaints


def main() -> None:
    """Try the programs one after the other; fail if a message is lost, torn or there twice."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    complaints = []
    for name in sys.argv[2:] or LOCKERS:
        complaints += try_program(name, seconds)
    if complaints:
        raise SystemExit("\n".join(complaints[:20]))


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
