"""The text of a message on its way out: CRLF line ends, dots doubled, and what it needs."""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

END_OF_DATA = b".\r\n"
_LINE_END = re.compile(rb"\r\n|\r|\n")
_QUOTED = re.compile(rb">+From ")


def stuff(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The octets of DATA up to the end of data, from text in pieces (RFC 821 4.5.2).

    A CR or LF that stands alone goes out as CRLF, before dots are doubled: no hop may find
    an end of data in it that we have not seen.
    """
    is_at_start = True
    for lines in _end_lines(pieces):
        first = b"." if is_at_start and lines.startswith(b".") else b""
        yield first + lines.replace(b"\n.", b"\n..")
        is_at_start = lines.endswith(b"\n")
    yield END_OF_DATA if is_at_start else b"\r\n" + END_OF_DATA


def _end_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text with every line end as CRLF; a CR at a piece's end waits for what follows."""
    waiting = b""
    for piece in pieces:
        octets = waiting + piece
        waiting = b"\r" if octets.endswith(b"\r") else b""
        octets = octets.removesuffix(b"\r")
        if octets:
            yield _LINE_END.sub(b"\r\n", octets)
    if waiting:
        yield b"\r\n"


class Measures:
    """What a text needs of a hop: its octets as sent, its longest line with CRLF, 8-bit or not."""

    __slots__ = ("has_8bit", "longest_line", "size")

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.size = self.longest_line = 0
        self.has_8bit = False
        line = 0
        for octets in _end_lines(pieces):
            self.size += len(octets)
            self.has_8bit = self.has_8bit or not octets.isascii()
            first, *others = octets.split(b"\n")
            self.longest_line = max(self.longest_line, line + len(first) + bool(others))
            line = len(others[-1]) if others else line + len(first)
            if len(others) > 1:
                self.longest_line = max(self.longest_line, 1 + max(map(len, others[:-1])))
        if line:
            self.size += len(b"\r\n")
            self.longest_line = max(self.longest_line, line + len(b"\r\n"))


def unquote(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The text of an mbox as it was: one ">" less before "From " (mboxrd).

    `lines` end in LF, as a file's do; long ones may come in parts.
    """
    is_at_start = True
    for line in lines:
        yield line[1:] if is_at_start and _QUOTED.match(line) else line
        is_at_start = line.endswith(b"\n")
