"""Mail data as it comes from the client, taken out of its transparency (RFC 821 4.5.2).

Only CRLF.CRLF ends the data. A dot that is first on its line, after a CRLF and nothing
else, is taken away; CRLF becomes LF; every other octet stays (design, decision 4).
"""

from __future__ import annotations

_END = b"\r\n.\r\n"


class DotStream:
    """One message's data; feed it what arrives until `is_ended`.

    `rest` then holds the octets that came behind the end of data. `has_bare_newline` says
    that a CR or LF stood alone so far.
    """

    __slots__ = (
        "_is_first",
        "_pending",
        "has_bare_newline",
        "is_ended",
        "rest",
    )

    def __init__(self) -> None:
        self.has_bare_newline = False
        # The first line follows DATA's own CRLF, so a dot there is first on its line.
        self._pending = b"\r\n"
        self._is_first = True
        self.is_ended = False
        self.rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The stored form (LF line ends) of what `chunk` completes; maybe empty."""
        buffer = self._pending + chunk
        end = buffer.find(_END)
        if end >= 0:
            self.is_ended = True
            self.rest = buffer[end + len(_END) :]
            region, self._pending = buffer[: end + 2], b""
        else:
            held = _held_back(buffer)
            region, self._pending = buffer[: len(buffer) - held], buffer[len(buffer) - held :]
        unstuffed = region.replace(b"\r\n.", b"\r\n")
        # Single octets are replaced several times as fast as pairs, and that it can be
        # undone proves that there were only pairs.
        text = unstuffed.replace(b"\r", b"")
        if text.replace(b"\n", b"\r\n") != unstuffed:
            self.has_bare_newline = True
            text = unstuffed.replace(b"\r\n", b"\n")
        if self._is_first and text:
            self._is_first = False
            return text[1:]
        return text


def _held_back(buffer: bytes) -> int:
    """How many octets at the end could be the beginning of the end of data."""
    for size in range(min(len(_END) - 1, len(buffer)), 0, -1):
        if buffer.endswith(_END[:size]):
            return size
    return 0
