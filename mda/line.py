"""A channel that is no socket of ours: pipes, a serial line, what another process was given."""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
import time

_AT_A_TIME = 512  # octets for a pipe or terminal, on which a larger write could block
_AT_A_TIME_TO_SOCKET = 65_536


class Line:
    """Two descriptors, to read and to write, with as much of a socket's face as a sender needs.

    Each read or write waits no longer than `settimeout` says, in seconds, and none beyond
    `until` (time.monotonic()); then TimeoutError. All raise OSError.
    """

    def __init__(self, read_fd: int, write_fd: int, until: float) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._until = until
        self._seconds = 0.0
        self._is_waiting = False
        self._is_stopped = False
        self._most = _AT_A_TIME
        if stat.S_ISSOCK(os.fstat(write_fd).st_mode):
            self._most = _AT_A_TIME_TO_SOCKET
            os.set_blocking(write_fd, False)

    def settimeout(self, seconds: float) -> None:
        """How long one read or write may wait from now on."""
        self._seconds = seconds

    def stop(self) -> None:
        """For a signal's handler: the wait in hand and all to come end with InterruptedError."""
        self._is_stopped = True
        if self._is_waiting:
            raise InterruptedError

    @property
    def has_more(self) -> bool:
        """The other side has said something, or hung up, that has not been read yet."""
        return bool(_poll(self._read_fd, select.POLLIN, 0))

    def recv(self, size: int) -> bytes:
        """At most `size` octets, none at the end."""
        self._wait(self._read_fd, select.POLLIN)
        return os.read(self._read_fd, size)

    def sendall(self, octets: bytes) -> None:
        """All the octets, however many waits a slow line needs for them."""
        due = memoryview(octets)
        while due:
            self._wait(self._write_fd, select.POLLOUT)
            try:
                due = due[os.write(self._write_fd, due[: self._most]) :]
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Let go of the channel."""
        for fd in {self._read_fd, self._write_fd}:
            os.close(fd)

    def _wait(self, fd: int, event: int) -> None:
        left = min(self._seconds, self._until - time.monotonic())
        self._is_waiting = True
        try:
            if self._is_stopped:
                raise InterruptedError
            if left <= 0 or not _poll(fd, event, left):
                raise TimeoutError
        finally:
            self._is_waiting = False


def _poll(fd: int, event: int, seconds: float) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(fd, event)
    return poll.poll(seconds * 1000)


class RawMode:
    """A terminal is ours, and passes every octet as it is, within a `with` block.

    No echo, no line editing, no signals, no translation, no flow control by characters, and no
    waiting for a carrier. Raises OSError, also where another has the line (flock, as other
    programs for serial lines take it).
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._before: list[object] = []

    def __enter__(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._before = termios.tcgetattr(self._fd)
            _, output, control, _, in_speed, out_speed, characters = termios.tcgetattr(self._fd)
            control &= ~(termios.CSIZE | termios.PARENB)
            control |= termios.CS8 | termios.CREAD | termios.CLOCAL
            characters[termios.VMIN], characters[termios.VTIME] = 1, 0
            flags = [termios.IGNBRK, output & ~termios.OPOST, control, 0]
            raw = [*flags, in_speed, out_speed, characters]
            termios.tcsetattr(self._fd, termios.TCSANOW, raw)
        except (OSError, termios.error) as error:
            os.close(self._fd)
            raise OSError(*error.args) from error

    def __exit__(self, *_: object) -> None:
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # type: ignore[arg-type]
        except termios.error:
            return  # the line is gone, and its settings with it
        finally:
            os.close(self._fd)
