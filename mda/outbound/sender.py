"""The one loop between a next hop's channel and the sender's dialogue."""

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
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import TypeVar

    from mda.line import Line

    Address = tuple[int, object]  # family, and what connect takes
    Step = Say | SayText | Hear | StartTls
    Text = Callable[[], Iterable[bytes]]
    T = TypeVar("T")

_CONNECT_SECONDS = 30
_READ = 65_536
_MOST_CONVERTED = 2 << 20  # octets
_CONVERTING = threading.Lock()  # one at a time, for what it takes of memory
_BLOCK = 65_536
_LOST = Outcome(451, "4.4.2", "The channel is lost")
_UNASKED = Outcome(451, "4.5.0", "The next host has said more than it was asked")


def send(
    address: Address,
    request: Request,
    read_text: Text,
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


def name_loss(error: OSError) -> Outcome:
    """Why a channel is lost."""
    if isinstance(error, InterruptedError):
        return Outcome(451, "4.3.2", "We were stopped before it was sent")
    why = "takes too long" if isinstance(error, TimeoutError) else "hung up"
    return Outcome(451, "4.4.2", f"The next host {why}")


class Conversation:
    """Several messages on one channel that was not made for them, as behind TURN.

    `helo` is our name, `host` the other's; `sent` counts the messages that somebody there has
    taken, and `loss` is why the channel can carry no more.
    """

    def __init__(self, line: Line, helo: str, host: str) -> None:
        self.host = host
        self.sent = 0
        self.loss: Outcome | None = None
        self._helo = helo
        self._line = line
        self._wire = Wire(line, host, is_verified=False)
        self._extensions: dict[str, str] = {}
        self._is_first = True
        self._result: Result | None = None

    def begin(self) -> None:
        """Hear the greeting and say hello; raises Lost."""
        request = Request("MAIL", b"", [], helo=self._helo)
        self._extensions = _drive(dialogue.introduce(request), self._wire, _no_text)

    def send(self, request: Request, read_text: Text) -> Result:
        """One transaction, as for `send`; once the channel is lost nothing more can go."""
        result = Result(len(request.paths))
        result.host = self.host
        # A reply too many would be taken for the next command's, and all that follow.
        if self.loss is None and self._has_more:
            self.loss = _UNASKED
        if self.loss is not None:
            result.failure = self.loss
            return result
        self._result = result
        steps = dialogue.transact(request, result, self._extensions, is_first=self._is_first)
        if not _drive(steps, self._wire, read_text):
            self.loss = result.failure or _LOST
        self._result = None
        self._is_first = False
        self.sent += any(each is not None and each.is_done for each in result.outcomes)
        return result

    @property
    def _has_more(self) -> bool:
        return self._wire.has_more or self._line.has_more

    def turn(self) -> Outcome:
        """Ask for the receiver's role: 2xx means that it is ours; raises Lost."""
        if self._has_more:
            raise Lost(_UNASKED)
        outcome = _drive(dialogue.turn(), self._wire, _no_text)
        if outcome.is_done and self._has_more:
            raise Lost(_UNASKED)
        return outcome

    def stop(self) -> None:
        """For a signal's handler: wait for nothing more, but for the reply to a text."""
        if self._result is None or not self._result.is_text_begun:
            self._line.stop()

    def end(self) -> None:
        """QUIT, where there is somebody to hear it."""
        if self.loss is None:
            _drive(dialogue.part(), self._wire, _no_text)

    def close(self) -> None:
        """Let go of the channel."""
        self._wire.close()


def _no_text() -> Iterable[bytes]:
    return ()


def _drive(steps: Generator[Step, dialogue.Reply | None, T], wire: Wire, read_text: Text) -> T:
    """Take the steps to their end, and return what they do."""
    try:
        step = next(steps)
        while True:
            try:
                reply = wire.do(step, read_text)
            except Lost as lost:
                step = steps.throw(lost)
            except OSError as error:
                step = steps.throw(Lost(name_loss(error)))
            else:
                step = steps.send(reply)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


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

    def __init__(self, channel: socket.socket | Line, host: str, *, is_verified: bool) -> None:
        self._channel = channel
        self._host = host
        self._is_verified = is_verified
        self._reader = ReplyReader()

    @property
    def has_more(self) -> bool:
        """The other side has said more than was asked."""
        return self._reader.has_more

    def close(self) -> None:
        """Let go of the channel."""
        self._channel.close()

    def do(self, step: Step, read_text: Text) -> dialogue.Reply | None:
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

        if not isinstance(self._channel, socket.socket):
            raise Lost(dialogue.NO_TLS)
        context = ssl.create_default_context()
        if not self._is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self._reader.forget()
        try:
            self._channel = context.wrap_socket(self._channel, server_hostname=self._host or None)
        except (ssl.SSLError, ValueError) as error:
            raise Lost(Outcome(451, "4.7.5", f"No TLS: {error}"[:200])) from error
