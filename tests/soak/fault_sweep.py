"""Every call that the shipped command makes on a delivery fails once, and each Nth of it.

    python tests/soak/fault_sweep.py [CALL ...]

Run it as root. For each kind of mailbox, size and command the Nth call of a kind fails, N from
1 until a run has no such call any more; see support/faults.py for what must hold after each.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.faults import Faults, Setting
from support.sandbox import Sandbox

CALLS = {
    "write": ("EIO", "ENOSPC"),
    "writev": ("EIO", "EDQUOT", "EFBIG"),
    "pread64": ("EIO",),
    "fsync": ("EIO", "ENOSPC"),
    "close": ("EIO",),
    "linkat": ("EIO", "EEXIST"),
    "rename": ("EIO",),
    "ftruncate": ("EIO",),
    "unlinkat": ("EROFS",),
    "unlink": ("EROFS",),
    "utimensat": ("EPERM",),
    "mkdirat": ("ENOSPC",),
    "fchmod": ("EPERM",),
    "fcntl": ("ENOLCK",),
    "newfstatat": ("EIO",),
    "sendmsg": ("ENOBUFS",),
    "recvmsg": ("EIO",),
    "memfd_create": ("EMFILE",),
    "setresuid": ("EPERM",),
    "setresgid": ("EPERM",),
    "setgroups": ("EPERM",),
    "clone": ("EAGAIN",),
    "openat": ("EMFILE", "EROFS", "EIO"),
}
SETTINGS = (
    Setting(),
    Setting(size=300_000, memory=0),
    Setting(is_maildir=True),
    Setting(is_session=True),
)


def main(wanted: list[str]) -> None:
    """Sweep the calls that were named, or all."""
    root = Path(tempfile.mkdtemp(prefix="mda-soak-", dir="/var/tmp"))
    sandbox = Sandbox(root)
    total = 0
    try:
        for call in wanted or CALLS:
            for error in CALLS[call]:
                for setting in SETTINGS:
                    # What strace fails to close stays open, and nobody sees a client's end.
                    if call == "close" and setting.is_session:
                        continue
                    begun = time.monotonic()
                    count = len(list(Faults(sandbox, setting).sweep(call, error)))
                    seconds = time.monotonic() - begun
                    print(
                        f"{call} {error}, {setting}: {count} faults in {seconds:.0f} s", flush=True
                    )
                    total += count
    finally:
        sandbox.close()
        shutil.rmtree(root)
    print(f"{total} faults, nothing torn and nothing lost")


if __name__ == "__main__":
    main(sys.argv[1:])
