"""`mda serve` inside the private view, and what speaks with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.sandbox import PEERS, UIDS, Sandbox, effective_uid, start_command

SMTP = "/run/mda/smtp.sock"
LMTP = "/run/mda/lmtp.sock"


class Served:
    """A running `mda serve`: its master's process, what it has announced, what it logs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.lines: list[str] = []
        self._log = log
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.decode().strip())
            if line.startswith(b"mailbox"):
                return
        raise AssertionError(f"it does not serve: {self.log()}")

    def log(self) -> str:
        return self._log.read_text()

    def expect_in_log(self, text: str) -> None:
        wait_until(lambda: text in self.log())

    @property
    def port(self) -> int:
        """The TCP port of the first `--listen 127.0.0.1:0`."""
        return int(re.findall(r"listening on \S*127\.0\.0\.1:(\d+)", "\n".join(self.lines))[0])

    def nursery(self) -> int:
        """The process that forks the sessions."""
        (found,) = [pid for pid in children_of(self.pid) if os.getsid(pid) == pid]
        return found

    def brokers(self) -> list[int]:
        """The other children of the master; one that is about to end may be among them."""
        nurseries = [pid for pid in children_of(self.pid) if is_leader(pid)]
        return [pid for pid in children_of(self.pid) if pid not in nurseries]

    def broker(self) -> int:
        """The broker of the one connection, when what repairs at the start has ended."""
        wait_until(lambda: len(self.brokers()) == 1)
        return self.brokers()[0]


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    """Look again until it is so; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    """The children of a process, zombies left out."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in found if status_of(int(child)).get("State", "Z")[0] != "Z"]


def is_leader(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status as a table, empty for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def descriptors_of(pid: int) -> list[str]:
    """What a process holds open, as the links in /proc/PID/fd say it."""
    held = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            held.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return held


def sockets_of(pid: int) -> set[str]:
    return {name for name in descriptors_of(pid) if name.startswith("socket:")}


@contextlib.contextmanager
def served(
    sandbox: Sandbox,
    *arguments: str,
    user: str = "root",
    before: list[str] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[Served]:
    """`mda serve` inside, as `user`, until the end of the block; `before` is what execs it."""
    command = [*(before or []), *start_command(), "serve", *arguments]
    if user != "root":
        uid = str(UIDS[user])
        home = ["env", "-u", "XDG_STATE_HOME", f"HOME=/home/{user}"]
        command = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", *home, *command]
    log = sandbox.root / "serve.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            sandbox.inside(command), stdout=subprocess.PIPE, stderr=errors, pass_fds=pass_fds
        )
    try:
        daemon = Served(process, log)
        yield daemon
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
    assert "Traceback" not in daemon.log(), daemon.log()
    assert process.returncode == 0, daemon.log()


def connect(sandbox: Sandbox, path: str, user: str) -> socket.socket:
    """A connection to a Unix socket inside, with the credentials of `user`."""
    holder = sandbox.pid
    target = f"/proc/{holder}/root{path}"
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    # /proc/PID/root is root's alone to pass, so the user gets there by a descriptor.
    directory = os.open(os.path.dirname(target), os.O_PATH)
    try:
        with effective_uid(PEERS.get(user, 0)):
            connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(target)}")
    except OSError:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection


def dial(port: int) -> socket.socket:
    """A connection from loopback."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def read_to_end(connection: socket.socket) -> bytes:
    said = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65_536):
            said += more
    return said


def dialogue(connection: socket.socket, text: bytes) -> bytes:
    """Say `text` and hang up; everything that was answered."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
    return read_to_end(connection)


class Line:
    """A connection that is read reply by reply."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._said = b""

    def say(self, octets: bytes) -> None:
        self.socket.sendall(octets)

    def expect(self, pattern: bytes) -> bytes:
        """Read until a line that begins with `pattern`; returns the line."""
        while not (found := re.search(rb"(?m)^(" + pattern + rb"[^\r]*)\r\n", self._said)):
            more = self.socket.recv(65_536)
            assert more, self._said
            self._said += more
        self._said = self._said[found.end() :]
        return found[1]

    def finish(self) -> bytes:
        """Everything else until the other end hangs up."""
        return self._said + read_to_end(self.socket)
