"""A next hop that does as it is told: a real SMTP or LMTP server on a socket, in a thread."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Self

Answer = Callable[[bytes], bytes | None]


class Received:
    """One message as the hop got it: the commands of its envelope, and the octets of DATA."""

    def __init__(self) -> None:
        self.opening = b""
        self.recipients: list[bytes] = []
        self.text = b""
        self.is_encrypted = False


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
        self,
        *keywords: bytes,
        answer: Answer | None = None,
        is_lmtp: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._keywords = keywords
        self.answer = answer or (lambda _line: None)
        self._is_lmtp = is_lmtp
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.messages: list[Received] = []
        self.lines: list[bytes] = []
        self._lock = threading.Lock()
        self._open = 0
        # Transactions between MAIL and the reply to the end of data.
        self.most_at_once = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}" if not self._is_lmtp else f"lmtp:127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            if self._say(connection, self._choose(b"", b"220 hop ESMTP\r\n")):
                self._obey(connection, iter(lines.readline, b""))

    def _encrypt(self, connection: socket.socket) -> None:
        assert self._tls is not None
        with (
            self._tls.wrap_socket(connection, server_side=True) as secret,
            secret.makefile("rb") as lines,
        ):
            self._obey(secret, iter(lines.readline, b""))

    def _count(self, more: int) -> None:
        with self._lock:
            self._open += more
            self.most_at_once = max(self.most_at_once, self._open)

    def _choose(self, line: bytes, usual: bytes) -> bytes:
        special = self.answer(line)
        return usual if special is None else special

    def _say(self, connection: socket.socket, reply: bytes) -> bool:
        """Send a reply; False where there is none, and it hangs up instead."""
        connection.sendall(reply)
        return reply != b""

    def _obey(self, connection: socket.socket, lines: Iterator[bytes]) -> None:
        message = Received()
        for line in lines:
            self.lines.append(line)
            verb = line[:4].upper()
            reply = self._choose(line, self._usual(verb, message))
            if b" FROM:" in line.upper() and reply.startswith(b"2"):
                message = Received()
                message.opening = line.rstrip()
                message.is_encrypted = isinstance(connection, ssl.SSLSocket)
                self._count(1)
            elif verb == b"RCPT" and reply.startswith(b"2"):
                message.recipients.append(line.rstrip())
            if not self._say(connection, reply) or verb == b"QUIT":
                return
            if verb == b"STAR" and self._tls is not None:
                return self._encrypt(connection)
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
            case b"STAR" | b"QUIT":
                return b"220 go\r\n" if verb == b"STAR" else b"221 bye\r\n"
        return b"250 OK\r\n"

    def _end(self, connection: socket.socket, message: Received) -> bool:
        """The end of data: False where it hangs up instead of a reply."""
        ends = len(message.recipients) if self._is_lmtp else 1
        reply = self._choose(b".", b"250 kept\r\n" * ends)
        if reply.startswith(b"2"):
            self.messages.append(message)
        self._count(-1)
        return self._say(connection, reply)
