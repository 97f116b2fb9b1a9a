"""A next hop that does as it is told: a real SMTP or LMTP server on a socket, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

Answer = Callable[[bytes], bytes | None]


class Received:
    """One message as the hop got it: the commands of its envelope, and the octets of DATA."""

    def __init__(self) -> None:
        self.opening = b""
        self.recipients: list[bytes] = []
        self.text = b""


def read_text(lines: Iterator[bytes], message: Received) -> bool:
    """The text up to the end of data; False where the client is gone before."""
    for line in lines:
        if line == b".\r\n":
            return True
        message.text += line
    return False


class NextHop:
    """Listens on loopback; `answer` may give another reply to a line, b"" to hang up.

    The line before the greeting is b"" and the one at the end of data b".".
    """

    def __init__(
        self, *keywords: bytes, answer: Answer | None = None, is_lmtp: bool = False
    ) -> None:
        self._keywords = keywords
        self._answer = answer or (lambda _line: None)
        self._is_lmtp = is_lmtp
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.messages: list[Received] = []
        self.lines: list[bytes] = []
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}" if not self._is_lmtp else f"lmtp:127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with connection, connection.makefile("rb") as lines:
            try:
                if self._say(connection, b"", b"220 hop ESMTP\r\n"):
                    self._obey(connection, iter(lines.readline, b""))
            except OSError:
                return

    def _say(self, connection: socket.socket, line: bytes, usual: bytes) -> bool:
        """The reply to a line: False where it hangs up instead."""
        special = self._answer(line)
        if special != b"":
            connection.sendall(usual if special is None else special)
        return special != b""

    def _obey(self, connection: socket.socket, lines: Iterator[bytes]) -> None:
        message = Received()
        for line in lines:
            self.lines.append(line)
            verb = line[:4].upper()
            usual = self._usual(verb, message)
            special = self._answer(line)
            reply = usual if special is None else special
            if b" FROM:" in line.upper() and reply.startswith(b"2"):
                message = Received()
                message.opening = line.rstrip()
            elif verb == b"RCPT" and reply.startswith(b"2"):
                message.recipients.append(line.rstrip())
            if not self._say(connection, line, usual) or verb == b"QUIT":
                return
            is_text = reply.startswith(b"354")
            if is_text and not (read_text(lines, message) and self._end(connection, message)):
                return

    def _usual(self, verb: bytes, message: Received) -> bytes:
        match verb:
            case b"EHLO" | b"LHLO":
                rows = [b"250-%b\r\n" % each for each in (b"hop", *self._keywords)]
                return b"".join([*rows, b"250 HELP\r\n"])
            case b"DATA":
                return b"354 go\r\n" if message.recipients else b"503 no recipients\r\n"
            case b"QUIT":
                return b"221 bye\r\n"
        return b"250 OK\r\n"

    def _end(self, connection: socket.socket, message: Received) -> bool:
        """The end of data: False where it hangs up instead of a reply."""
        special = self._answer(b".")
        if special is None or special.startswith(b"2"):
            self.messages.append(message)
        ends = len(message.recipients) if self._is_lmtp else 1
        return self._say(connection, b".", b"250 kept\r\n" * ends)
