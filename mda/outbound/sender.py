"""The one loop between a next hop's socket and the sender's dialogue."""

from __future__ import annotations

import socket
import threading
import time

from mda.model import Outcome, cannot_keep
from mda.outbound import dialogue
from mda.outbound.dialogue import (
    NO_8BIT,
    Hear,
    Lost,
    ReplyReader,
    Request,
    Result,
    Say,
    SayText,
    StartTls,
)
from mda.outbound.text import stuff

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Address = tuple[int, object]  # family, and what connect takes

_CONNECT_SECONDS = 30
_READ = 65_536
_MOST_CONVERTED = 2 << 20  # octets
_CONVERTING = threading.Lock()  # one at a time, for what it takes of memory
_BLOCK = 65_536


def send(
    address: Address,
    request: Request,
    read_text: Callable[[], Iterable[bytes]],
    *,
    host: str = "",
) -> Result:
    """One transaction with the hop at `address`; `host` is its name for TLS.

    `read_text` gives the text as it is stored. What is in the way is in the result.
    """
    result = Result(len(request.paths))
    channel = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        channel.settimeout(_CONNECT_SECONDS)
        channel.connect(address[1])  # type: ignore[arg-type]
    except OSError as error:
        channel.close()
        result.failure = Outcome(451, "4.4.1", f"No answer: {error.strerror or error}")
        return result
    wire = Wire(channel, host, is_verified=request.tls == "must")
    try:
        _drive(dialogue.converse(request, result), wire, read_text)
    finally:
        wire.close()
    return result


def _drive(steps: dialogue.Dialogue, wire: Wire, read_text: Callable[[], Iterable[bytes]]) -> None:
    try:
        step = next(steps)
        while True:
            try:
                reply = wire.do(step, read_text)
            except Lost as lost:
                step = steps.throw(lost)
            except OSError as error:
                why = "takes too long" if isinstance(error, TimeoutError) else "hung up"
                step = steps.throw(Lost(Outcome(451, "4.4.2", f"The next host {why}")))
            else:
                step = steps.send(reply)
    except StopIteration:
        return


def read(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text; raises Lost where it cannot be read, which is no fault of the next host."""
    try:
        yield from pieces
    except OSError as error:
        raise Lost(cannot_keep(error, "reading the message")) from error


def convert_whole(pieces: Iterator[bytes]) -> bytes:
    """The text in seven bits; raises Lost where that cannot be (RFC 6152 3)."""
    from mda.outbound.sevenbit import Inconvertible, convert  # few hops need it

    text = bytearray()
    for piece in pieces:
        text += piece
        if len(text) > _MOST_CONVERTED:
            raise Lost(NO_8BIT)
    try:
        with _CONVERTING:
            return convert(bytes(text))
    except Inconvertible as error:
        raise Lost(NO_8BIT) from error


def gather(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same octets in blocks of `size` at least, but for the last."""
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    yield bytes(block)


class Wire:
    """The channel to the hop, in the clear or not."""

    def __init__(self, channel: socket.socket, host: str, *, is_verified: bool) -> None:
        self._channel = channel
        self._host = host
        self._is_verified = is_verified
        self._reader = ReplyReader()

    def close(self) -> None:
        """Let go of the channel."""
        self._channel.close()

    def do(
        self, step: Say | SayText | Hear | StartTls, read_text: Callable[[], Iterable[bytes]]
    ) -> dialogue.Reply | None:
        """One step; raises Lost or OSError."""
        match step:
            case Say():
                self._channel.settimeout(dialogue.SECONDS["command"])
                self._channel.sendall(step.octets)
            case SayText():
                self._channel.settimeout(dialogue.SECONDS["block"])
                pieces = read(read_text())
                if step.is_7bit:
                    pieces = iter([convert_whole(pieces)])
                for octets in gather(stuff(pieces), _BLOCK):
                    self._channel.sendall(octets)
            case StartTls():
                self._start_tls()
            case Hear():
                return self._hear(step.seconds)
        return None

    def _hear(self, seconds: int) -> dialogue.Reply:
        until = time.monotonic() + seconds
        while (reply := self._reader.next_reply()) is None:
            # The whole reply has this time, however its octets drip.
            self._channel.settimeout(max(0.01, until - time.monotonic()))
            octets = self._channel.recv(_READ)
            if not octets:
                raise Lost(Outcome(451, "4.4.2", "The next host hung up"))
            self._reader.feed(octets)
        return reply

    def _start_tls(self) -> None:
        import ssl  # only where a hop offers it

        context = ssl.create_default_context()
        if not self._is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self._reader.forget()
        try:
            self._channel = context.wrap_socket(self._channel, server_hostname=self._host or None)
        except (ssl.SSLError, ValueError) as error:
            raise Lost(Outcome(451, "4.7.5", f"No TLS: {error}"[:200])) from error
