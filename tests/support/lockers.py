"""Programs of other people's that lock a mailbox, each as Debian has it by default.

What one of them is told to do is a line for the shell, run as Alice, with `$BOX` as her
mailbox. A writer appends its standard input.
"""

from __future__ import annotations

import subprocess
import sys

from support.sandbox import UIDS, Sandbox

BOX = "/var/mail/alice"
_MAIL = "8"

# CPython opens the mailbox before it has the lock, so whoever uses it looks again.
_PYTHON = """
import mailbox, os, sys, time
path = os.environ["BOX"]
for _ in range(300):
    box = mailbox.mbox(path, create=False)
    try:
        box.lock()
    except mailbox.ExternalClashError:
        pass
    else:
        if os.path.samestat(os.stat(path), os.fstat(box._file.fileno())):
            break
        box.unlock()
    box.close()
    time.sleep(0.1)
else:
    sys.exit("locked for too long")
if sys.argv[1] == "append":
    box.add(sys.stdin.buffer.read())
else:
    for key in box.keys():
        if b"\\nSubject: chaff\\n" in b"\\n" + box.get_bytes(key)[:1000]:
            box.remove(key)
box.close()
"""
# As a person's session with the mailbox of the system: of another file it rewrites, it
# would lose what has come since it looked.
_S_NAIL_DELETE = """
printf 'delete @subject@chaff\\nquit\\n' | s-nail -n -S hold -S keep -f %
"""
_DOVEADM_APPEND = """
message=$(mktemp) && cat >"$message" && doveadm save -m INBOX "$message"
status=$?; rm "$message"; exit $status
"""


class Locker:
    """One program: the locks that it takes, in their order, and how it appends and deletes.

    `holds` says that it keeps its locks as long as its standard input goes on, and not only
    when it has read all. `deleters` of it may delete the messages called chaff at a time.
    `gid` is what it runs with where it does not take the group of the spool itself.
    """

    def __init__(
        self,
        locks: str,
        append: str,
        delete: str = "",
        *,
        gid: str = "",
        deleters: int = 0,
        holds: bool = True,
    ) -> None:
        self.locks = locks.split()
        self.append = append
        self.delete = delete
        self.deleters = deleters
        self.holds = holds
        self._gid = gid or str(UIDS["alice"])

    @property
    def takes_only_flock(self) -> bool:
        """Does it know no lock that ours takes by default?"""
        return self.locks == ["flock"]

    def configuration(self, lock_seconds: int) -> str:
        """Ours, for a mailbox that this program writes to as well."""
        flock = str(self.takes_only_flock).lower()
        return f"[delivery]\nlock_seconds = {lock_seconds}\nflock = {flock}\n"

    def command(self, sandbox: Sandbox, script: str) -> list[str]:
        """How a script of this program's is run."""
        become = ["setpriv", "--reuid", str(UIDS["alice"]), "--regid", self._gid, "--clear-groups"]
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        names = ["HOME=/home/alice", "USER=alice", "LOGNAME=alice", f"MAIL={BOX}", f"BOX={BOX}"]
        return sandbox.inside([*become, "env", "-i", path, *names, "sh", "-c", script])

    def run(self, sandbox: Sandbox, script: str, text: bytes = b"") -> bool:
        """Run a script of this program's to its end; did it succeed?"""
        command = self.command(sandbox, script)
        return subprocess.run(command, input=text, capture_output=True, check=False).returncode == 0


def _python(what: str) -> str:
    return f"{sys.executable} -I -c '{_PYTHON}' {what}"


_DOTLOCKFILE = (
    'dotlockfile -l -p -r 60 -i 1 "$BOX.lock" && cat >>"$BOX" && dotlockfile -u "$BOX.lock"'
)

LOCKERS = {
    "dotlockfile": Locker("dotlock", _DOTLOCKFILE),
    "lockfile": Locker("dotlock", 'lockfile -1 -r 60 -ml && cat >>"$BOX" && lockfile -mu'),
    "mutt_dotlock": Locker(
        "dotlock", 'mutt_dotlock -p -r 60 "$BOX" && cat >>"$BOX" && mutt_dotlock -u -p "$BOX"'
    ),
    "lockmail": Locker("fcntl dotlock", 'lockmail.maildrop -t 60 "$BOX" sh -c \'cat >>"$BOX"\''),
    "exim_lock": Locker(
        "dotlock fcntl",
        'exim_lock -q -retries 60 -interval 1 "$BOX" \'cat >>"$BOX"\'',
        gid=_MAIL,
    ),
    "flock": Locker("flock", 'flock "$BOX" sh -c \'cat >>"$BOX"\''),
    "python": Locker(
        "fcntl dotlock", _python("append"), _python("delete"), gid=_MAIL, deleters=4, holds=False
    ),
    # In a spool where it may not make a dotlock CPython goes without, and says nothing.
    "python-user": Locker("fcntl", _python("append"), holds=False),
    "dovecot": Locker(
        "dotlock fcntl",
        _DOVEADM_APPEND,
        "doveadm expunge mailbox INBOX HEADER Subject chaff",
        gid=_MAIL,
        deleters=4,
        holds=False,
    ),
    # Only reads and deletes here, and once at a time: it appends without a lock where two
    # seconds do not bring one, and two sessions of it undo what the other has deleted.
    "s-nail": Locker("fcntl dotlock", _DOTLOCKFILE, _S_NAIL_DELETE, deleters=1, holds=False),
}
