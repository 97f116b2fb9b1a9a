"""mboxrd quoting of plain cases; tests/property holds the laws."""

from __future__ import annotations

import time

import pytest

from mda.content.quoting import Quoter


def quote(text: bytes, step: int = 0) -> bytes:
    quoter = Quoter()
    chunks = [text[at : at + step] for at in range(0, len(text), step)] if step else [text]
    return b"".join(map(quoter.feed, chunks)) + quoter.finish()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        (b"From x\n", b">From x\n"),
        (b">From x\n", b">>From x\n"),
        (b">>>From x\n", b">>>>From x\n"),
        (b"a\nFrom x\nb\n>From y\n", b"a\n>From x\nb\n>>From y\n"),
        (b"a\n\nFrom From From \n", b"a\n\n>From From From \n"),
        (b" From x\n> From x\na>From x\nfrom x\nFROM x\n", b""),
        (b"From\nFrom:\nFrom\tx\nFro\n>\n>>\nF", b""),
        (b"a\rFrom x\r\x0bFrom y\x0cFrom z\x85From \xe2\x80\xa8From ", b""),
        (b"\0\nFrom \xff\0\n", b"\0\n>From \xff\0\n"),
        (b"", b""),
        (b"a\nFrom ", b"a\n>From "),
        (b"a\nFrom", b""),
    ],
)
def test_every_line_that_looks_like_a_from_line_is_quoted(
    text: bytes, quoted: bytes, step: int
) -> None:
    assert quote(text, step) == (quoted or text)


def test_at_most_four_bytes_wait_for_the_next_chunk() -> None:
    quoter = Quoter()
    assert quoter.feed(b">" * 100_000) == b">" * 100_000
    assert quoter.feed(b"From") == b""
    assert quoter.feed(b"x" * 100_000) == b"From" + b"x" * 100_000


def test_a_line_of_nothing_but_from_is_no_slower_than_its_length() -> None:
    line = b">From " * 200_000
    began = time.process_time()
    quote(line, 65_536)
    assert time.process_time() - began < 2
