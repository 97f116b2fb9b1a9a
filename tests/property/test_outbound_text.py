"""For any text and any cut: what a hop gets is the text, with CRLF for every line end."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from mda.content.quoting import Quoter
from mda.outbound.text import Measures, stuff, unquote
from mda.receiver.dotstream import DotStream

PIECES = st.lists(st.text(alphabet="a.\r\n\0>\xe9").map(str.encode), max_size=8)


def as_sent(text: bytes) -> bytes:
    sent = re.sub(rb"\r\n|\r|\n", b"\r\n", text)
    return sent if sent.endswith(b"\r\n") or not sent else sent + b"\r\n"


@given(PIECES)
@example([b"a\r", b"\n.", b"\n.\r\n"])
@example([b"\r", b"\r", b"\n"])
@example([b".\n", b"."])
def test_the_text_arrives_and_nothing_else_ends_it(pieces: list[bytes]) -> None:
    octets = b"".join(stuff(pieces))
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", octets)
    dots = DotStream()
    kept = dots.feed(octets)
    assert (dots.is_ended, dots.rest) == (True, b"")
    assert kept.replace(b"\n", b"\r\n") == as_sent(b"".join(pieces))


@given(PIECES)
def test_what_is_measured_is_what_is_sent(pieces: list[bytes]) -> None:
    text = as_sent(b"".join(pieces))
    measures = Measures(pieces)
    assert measures.size == len(text)
    assert measures.has_8bit == (not text.isascii())
    assert measures.longest_line == max(map(len, text.splitlines(keepends=True)), default=0)


def test_a_part_of_a_line_is_no_line() -> None:
    assert b"".join(unquote([b"x", b">From y\n", b">From z\n"])) == b"x>From y\nFrom z\n"


@given(st.lists(st.sampled_from([b"From me\n", b">From x\n", b">>From\n", b"a\n", b"From "])))
def test_quoting_is_undone(lines: list[bytes]) -> None:
    text = b"".join(lines)
    quoter = Quoter()
    quoted = quoter.feed(text) + quoter.finish()
    assert b"".join(unquote(quoted.splitlines(keepends=True))) == text
