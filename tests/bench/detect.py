"""What it costs to find one user's terminals on a full host.

    python tests/bench/detect.py [USERS [PROCESSES]]

Run it as root. Users log in, as far as this process can make them: each has a
pseudo-terminal of their own, a record in utmp, a session of logind's, and a slice with
processes, all of them real. Everything stands in a private view of this host.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

from mda.terminal import sessions

FIRST_UID = 20_000
GOAL = 5.0  # ms
TRIALS = 300
IS_PRIVATE = "MDA_BENCH_IS_PRIVATE"
SET_UP = """set -e
mount --make-rprivate /
for folder in /run /sys/fs/cgroup; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mount -t tmpfs -o mode=755 tmpfs /mnt
cp /etc/passwd /mnt/passwd
cat >> /mnt/passwd
mount --bind /mnt/passwd /etc/passwd
mkdir -p /run/systemd/seats /run/systemd/sessions /run/systemd/users
"""


def enter_private_view(users: int) -> None:
    """Have accounts, and places for records of logins, that nobody else sees."""
    if os.environ.get(IS_PRIVATE) != "1":
        # Python 3.11 has no os.unshare.
        os.environ[IS_PRIVATE] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])  # noqa: S606
    accounts = "".join(
        f"user{n}:x:{FIRST_UID + n}:100:User {n}:/nonexistent:/bin/sh\n" for n in range(users)
    )
    subprocess.run(["sh", "-c", SET_UP], input=accounts, text=True, check=True)


def log_in(number: int, processes: int) -> list[subprocess.Popen[bytes]]:
    """One user with a terminal, the three records of it, and processes on it."""
    uid = FIRST_UID + number
    _, slave = os.openpty()
    device = os.ttyname(slave)
    os.fchown(slave, uid, 5)
    os.fchmod(slave, 0o620)
    started = [subprocess.Popen(["sleep", "900"], stdin=slave) for _ in range(processes)]
    scope = Path(f"/sys/fs/cgroup/user.slice/user-{uid}.slice/session-{number}.scope")
    scope.mkdir(parents=True)
    (scope / "cgroup.procs").write_text("".join(f"{each.pid}\n" for each in started))
    line = device.removeprefix("/dev/")
    Path(f"/run/systemd/sessions/{number}").write_text(
        f"UID={uid}\nUSER=user{number}\nACTIVE=1\nSTATE=active\nREMOTE=0\n"
        f"TYPE=tty\nCLASS=user\nTTY={line}\n"
    )
    Path(f"/run/systemd/users/{uid}").write_text(f"NAME=user{number}\nSESSIONS={number}\n")
    record = struct.pack(
        "hi32s4s32s256s", 7, started[0].pid, line.encode(), b"", f"user{number}".encode(), b""
    )
    with open("/run/utmp", "ab") as utmp:
        utmp.write(record.ljust(384, b"\0"))
    return started


def measure(users: int) -> list[float]:
    """Milliseconds for each of many searches, for users at random."""
    chance = random.Random(821)  # noqa: S311 (the same users every time)
    times = []
    for _ in range(TRIALS):
        number = chance.randrange(users)
        began = time.perf_counter()
        found = sessions.find_terminals(FIRST_UID + number)
        times.append((time.perf_counter() - began) * 1000)
        assert len(found.terminals) == 1, found.terminals
    return sorted(times)


def main() -> None:
    """Print how long a search takes, the first one with what it loads apart."""
    words = [int(word) for word in sys.argv[1:]]
    users = words[0] if words else 500
    processes = words[1] if len(words) > 1 else 3000
    enter_private_view(users)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    started = []
    try:
        for number in range(users):
            started += log_in(number, processes // users)
        began = time.perf_counter()
        sessions.find_terminals(FIRST_UID)
        first = (time.perf_counter() - began) * 1000
        times = measure(users)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
    print(f"{users} users logged in, {len(started)} processes of theirs")
    print(f"the first search, which loads psutil and libsystemd: {first:.1f} ms")
    print(
        f"one user's terminals: {statistics.median(times):.2f} ms, "
        f"the slowest of a hundred {times[-len(times) // 100]:.2f} ms (goal: under {GOAL:.0f})"
    )


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
