"""A private view of this host: its own accounts, mail spool, /run and name.

The tests that need real identities run `mda` as root inside it; nothing that they do
reaches the host's own /etc/passwd or /var/mail.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

NAME = "mda.test"
UIDS = {"alice": 1001, "bob": 1002, "carol": 1003}
# The persons of RFC 821's examples, with uids of this run's own: no other run's terminals
# are theirs.
PEOPLE = {
    "jones": "",
    "brown": "Charlie Brown",
    "Admin.MRC": "Mark Crispin,Room 12,555-1234",
    "fabry": "",
    "eric": "",
    "smith.f": "Fred Smith",
    "smith.q": "Quincy Smith",
    "postel": "Jon Postel",
    "zo\u00eb": "Zo\u00eb Washburne",
    "odd": "& <root@mda.test> Ball",
    "dora": "",
}
PEOPLE_UIDS = {
    name: 10_000 + 20 * (os.getpid() % 2400) + number for number, name in enumerate(PEOPLE)
}
# Who may be at the other end; anybody else is root.
PEERS = {**UIDS, "postfix": 990, "daemon": 1}
SESSION_UID = 996
SPOOL_UID = 997

_ACCOUNTS = """root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
postfix:x:990:990::/var/spool/postfix:/usr/sbin/nologin
mda-net:x:996:996::/nonexistent:/usr/sbin/nologin
mda:x:997:997::/var/spool/mda:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
alice:x:1001:1001:Alice Liddell:/home/alice:/bin/bash
bob:x:1002:1002:Bob:/home/bob:/bin/bash
carol:x:1003:1003:Carol:/home/carol:/bin/bash
"""
_GROUPS = """root:x:0:
daemon:x:1:
tty:x:5:
mail:x:8:
postfix:x:990:
mda-net:x:996:
mda:x:997:
nogroup:x:65534:
alice:x:1001:
bob:x:1002:
carol:x:1003:
"""
_SET_UP = """set -e
mount --make-rprivate /
for file in passwd group hosts nsswitch.conf; do mount --bind {root}/etc/$file /etc/$file; done
[ ! -e /etc/mailname ] || mount --bind /dev/null /etc/mailname
[ ! -e /etc/aliases ] || mount --bind {root}/etc/aliases /etc/aliases
{more}
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /home
[ ! -d /sys/fs/cgroup ] || mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
mount --bind {root}/mail /var/mail
mount --bind {root}/spool /var/spool
mkdir /run/mda
for user in alice bob carol; do install -d -m 755 -o $user -g $user /home/$user; done
hostname {name}
echo ready
exec cat
"""


def start_command() -> list[str]:
    """How the units and the wrapper start mda, with the interpreter of this test run.

    Coverage of child processes hangs on the site module, and so does an editable
    installation; otherwise -S as the units have it.
    """
    spec = find_spec("mda")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    flags = ["-I", "-B"]
    is_installed = package.parent == Path(sysconfig.get_path("purelib"))
    is_covered = any(name.startswith("COVERAGE_PROCESS") for name in os.environ)
    if is_installed and not is_covered:
        flags.append("-S")
    return [sys.executable, *flags, str(package / "__main__.py")]


class Sandbox:
    """Mount and UTS namespaces, held open by a process of their own.

    With `nameserver`, the address of one, it has a network of its own too.
    """

    def __init__(self, root: Path, name: str = NAME, *, nameserver: str = "") -> None:
        self.root = root
        self._has_network = bool(nameserver)
        root.chmod(0o755)
        for folder in ("etc", "mail", "spool"):
            (root / folder).mkdir()
        people = "".join(
            f"{name}:x:{PEOPLE_UIDS[name]}:65534:{full_name}:/nonexistent:/bin/sh\n"
            for name, full_name in PEOPLE.items()
        )
        (root / "etc/passwd").write_text(_ACCOUNTS + people)
        (root / "etc/group").write_text(_GROUPS)
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name} mda\n")
        (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (root / "etc/aliases").touch(0o644)
        os.chown(root / "mail", 0, 8)
        (root / "mail").chmod(0o2775)
        (root / "spool/mda").mkdir(mode=0o700)
        os.chown(root / "spool/mda", SPOOL_UID, SPOOL_UID)
        (root / "etc/resolv.conf").write_text(f"nameserver {nameserver}\n")
        more = f"mount --bind {root}/etc/resolv.conf /etc/resolv.conf" if nameserver else ""
        script = _SET_UP.format(root=shlex.quote(str(root)), name=name, more=more)
        network = ["--net"] if nameserver else []
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--uts", *network, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    def close(self) -> None:
        """Let the namespaces go."""
        self._holder.communicate()

    def inside(self, command: list[str]) -> list[str]:
        """`command` as it is run inside."""
        network = ["-n"] if self._has_network else []
        return ["nsenter", "-t", self.pid, "-m", "-u", *network, "--", *command]

    @property
    def pid(self) -> str:
        """The process that holds the namespaces."""
        return str(self._holder.pid)

    def run(
        self, command: list[str], user: str = "root", **options: object
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `command` inside as `user` and wait for it; captures what it prints."""
        if user != "root":
            uid = str(UIDS[user])
            command = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", *command]
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            self.inside(command), capture_output=True, timeout=60, check=False, **options
        )

    def start(self, *arguments: str, client: socket.socket) -> subprocess.Popen[bytes]:
        """Start `mda ARGUMENTS` inside with `client` as standard input and output."""
        return subprocess.Popen(
            self.inside([*start_command(), *arguments]),
            stdin=client.fileno(),
            stdout=client.fileno(),
            stderr=subprocess.PIPE,
        )

    def connect_as(self, user: str, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, ...]:
        """A connected pair whose credentials are `user`'s: ours, and the one for mda."""
        with effective_uid(PEERS.get(user, 0)):
            return socket.socketpair(socket.AF_UNIX, kind)

    def converse(
        self, lines: bytes, *, peer: str = "bob", config: str = "", protocol: str = "smtp"
    ) -> list[bytes]:
        """All reply lines to `lines` from one `mda receive` with `config` as its file."""
        ours, theirs = self.connect_as(peer)
        file = self.configure(config)
        with ours:
            ours.settimeout(30)
            process = self.start("receive", "--protocol", protocol, "--config", file, client=theirs)
            theirs.close()
            said = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                ours.sendall(lines)
                while more := ours.recv(65_536):
                    said += more
            _, errors = process.communicate(timeout=30)
        assert b"Traceback" not in errors, errors
        assert process.returncode == 0
        return said.splitlines()

    def converse_around(
        self, lines: bytes, act: Callable[[], object], *, willing: int = 1, protocol: str = "smtp"
    ) -> list[bytes]:
        """All reply lines to `lines` from bob, where `act` is done between RCPT and DATA.

        That is when so many recipients are said to accept messages.
        """
        at = lines.index(b"DATA\r\n")
        ours, theirs = self.connect_as("bob")
        with ours:
            ours.settimeout(30)
            words = ["receive", "--protocol", protocol, "--config", self.configure("")]
            process = self.start(*words, client=theirs)
            theirs.close()
            ours.sendall(lines[:at])
            said = b""
            while said.count(b"accepting messages") < willing:
                said += ours.recv(65_536)
            act()
            ours.sendall(lines[at:])
            while more := ours.recv(65_536):
                said += more
            process.communicate(timeout=30)
        return said.splitlines()

    def mailbox(self, user: str) -> bytes | None:
        """What is in the mailbox of `user`, or None if there is none."""
        path = self.root / "mail" / user
        return path.read_bytes() if path.exists() else None

    def clear_mail(self) -> None:
        """Empty the spool and the queue."""
        for path in (self.root / "mail").iterdir():
            path.unlink()
        shutil.rmtree(self.root / "spool/mda/queue", ignore_errors=True)

    def configure(self, text: str) -> str:
        """Write a configuration and return its path inside."""
        path = self.root / "etc/mda.toml"
        path.write_text(text)
        path.chmod(0o644)
        return str(path)


@contextlib.contextmanager
def effective_uid(uid: int) -> Iterator[None]:
    """Make sockets as `uid`: SO_PEERCRED is read from who made the pair."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
