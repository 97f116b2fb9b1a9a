"""A real terminal with a person in front of it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import tty

from support.sandbox import PEOPLE_UIDS

TTY = 5
# Somebody whose terminals are no other run's.
PERSON = "dora"
PERSON_UID = PEOPLE_UIDS[PERSON]


class Terminal:
    """A pseudo-terminal of `uid`'s, and a process of theirs that has it as its controlling one."""

    def __init__(self, uid: int, columns: int = 80) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        tty.setraw(slave)
        self.device = os.ttyname(slave)
        os.chown(self.device, uid, TTY)
        os.chmod(self.device, 0o620)
        become = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
        self._login = subprocess.Popen(
            [*become, "setsid", "-c", "sh", "-c", "echo ready; exec sleep 600"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        assert os.read(self.master, 100) == b"ready\n"

    def shown(self) -> bytes:
        """What has come to the screen since the last look."""
        screen = b""
        while select.select([self.master], [], [], 0)[0]:
            screen += os.read(self.master, 65_536)
        return screen

    def close(self) -> None:
        """Log out; again, and nothing happens."""
        if self._login.returncode is not None:
            return
        self._login.send_signal(signal.SIGKILL)
        self._login.wait()
        os.close(self.master)
