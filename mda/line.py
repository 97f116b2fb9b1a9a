"""A channel that is no socket of ours: pipes, a serial line, what another process was given."""

from __future__ import annotations

import os
import select
import stat
import termios
import time
import tty

_AT_A_TIME = 512  # octets for a pipe or terminal, on which a larger write could block
_AT_A_TIME_TO_SOCKET = 65_536


class Line:
    """Two descriptors, to read and to write, with as much of a socket's face as a sender needs.

    Every call ends within the timeout of `settimeout`, in seconds, or raises TimeoutError; all
    raise OSError.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._seconds = 0.0
        self._most = _AT_A_TIME
        if stat.S_ISSOCK(os.fstat(write_fd).st_mode):
            self._most = _AT_A_TIME_TO_SOCKET
            os.set_blocking(write_fd, False)

    def settimeout(self, seconds: float) -> None:
        """How long each call may take from now on."""
        self._seconds = seconds

    def recv(self, size: int) -> bytes:
        """At most `size` octets, none at the end."""
        self._wait(self._read_fd, select.POLLIN, time.monotonic() + self._seconds)
        return os.read(self._read_fd, size)

    def sendall(self, octets: bytes) -> None:
        """All the octets; of each block some must go within the timeout."""
        due = memoryview(octets)
        while due:
            self._wait(self._write_fd, select.POLLOUT, time.monotonic() + self._seconds)
            try:
                due = due[os.write(self._write_fd, due[: self._most]) :]
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Let go of the channel."""
        for fd in {self._read_fd, self._write_fd}:
            os.close(fd)

    @staticmethod
    def _wait(fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError


class RawMode:
    """A terminal passes every octet as it is, within a `with` block; raises OSError.

    No echo, no line editing, no signals, no flow control by characters.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._before: list[object] = []

    def __enter__(self) -> None:
        try:
            self._before = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSANOW)
        except termios.error as error:
            raise OSError(*error.args) from error

    def __exit__(self, *_: object) -> None:
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # type: ignore[arg-type]
        except termios.error:
            return  # the line is gone, and its settings with it
        finally:
            os.close(self._fd)
