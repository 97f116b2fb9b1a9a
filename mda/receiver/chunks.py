"""Mail data that comes in chunks of a known size (RFC 3030): no transparency, no end of data."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.receiver.replies import Reply

_MOST_DIGITS = 19


class ChunkStream:
    """One message's data in its stored form: CRLF becomes LF, and the last line ends.

    `size` are the octets that the chunks have announced so far, `fault` is what the protocol
    has against the text; `has_bare_newline` says that a CR or LF stood alone.
    """

    __slots__ = ("_is_line_open", "_pending", "fault", "has_bare_newline", "size")

    def __init__(self) -> None:
        self._pending = b""
        self._is_line_open = False
        self.has_bare_newline = False
        self.size = 0
        self.fault: Reply | None = None

    def feed(self, octets: bytes) -> bytes:
        """The stored form of what `octets` complete; maybe empty."""
        buffer = self._pending + octets
        # A CR at the end may be half of a line's end.
        self._pending = b"\r" if buffer.endswith(b"\r") else b""
        region = buffer[: len(buffer) - len(self._pending)]
        text = region.replace(b"\r", b"")
        if text.replace(b"\n", b"\r\n") != region:
            self.has_bare_newline = True
            text = region.replace(b"\r\n", b"\n")
        if text:
            self._is_line_open = not text.endswith(b"\n")
        return text

    def finish(self) -> bytes:
        """What is left behind the last chunk; nothing when it is asked for again."""
        self.has_bare_newline = self.has_bare_newline or bool(self._pending)
        rest, self._pending = self._pending, b""
        if rest or self._is_line_open:
            rest += b"\n"
        self._is_line_open = False
        return rest


class Chunk:
    """One BDAT under way: the octets that are still to come, and what is said of it then.

    A `refusal` is said in place of taking them: they are swallowed all the same (RFC 3030 2).
    """

    __slots__ = ("is_last", "left", "refusal", "size")

    def __init__(self, size: int, *, is_last: bool, refusal: Reply | None = None) -> None:
        self.size = self.left = size
        self.is_last = is_last
        self.refusal = refusal


def read_chunk(argument: bytes) -> tuple[int, bool] | None:
    """The size and whether it is the last, from `octets [LAST]`; None if it is neither."""
    size, _, last = argument.partition(b" ")
    if not size.isdigit() or len(size) > _MOST_DIGITS:
        return None
    last = last.strip(b" ").upper()
    return None if last not in (b"", b"LAST") else (int(size), last == b"LAST")
