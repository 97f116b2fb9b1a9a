"""Laws of mboxrd quoting and of the header filter: chunks do not matter, nothing is lost."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from mda.content.headers import HeaderFilter
from mda.content.quoting import Quoter

texts = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([b"From ", b">", b"\n", b"F", b"From", b"x", b"\r", b" ", b"\0", b"rom "]),
        max_size=40,
    ).map(b"".join),
)
cuts = st.lists(st.integers(0, 300), max_size=12)
header_texts = st.lists(
    st.sampled_from(
        [
            b"Return-Path: <a@b>\n",
            b"rEturn-pAth :\n",
            b"Return-Path",
            b"Received: x\n",
            b"Subject: x\n",
            b"\tfolded\n",
            b" ",
            b"\n",
            b"From me Tue\n",
            b">From me Tue\n",
            b"no field\n",
            b"x" * 300,
            b":",
        ]
    ),
    max_size=12,
).map(b"".join)


def pieces(text: bytes, at: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(cut, len(text)) for cut in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def quote(chunks: list[bytes]) -> bytes:
    quoter = Quoter()
    return b"".join(map(quoter.feed, chunks)) + quoter.finish()


@given(texts)
def test_quoting_is_what_the_regular_expression_says(text: bytes) -> None:
    # In Python's re, ^ with MULTILINE means after LF and nothing else.
    assert quote([text]) == re.sub(rb"(?m)^(>*From )", rb">\1", text)


@given(texts, cuts)
def test_quoting_does_not_depend_on_the_chunks(text: bytes, at: list[int]) -> None:
    assert quote(pieces(text, at)) == quote([text])


@given(texts, cuts)
def test_quoting_can_be_undone(text: bytes, at: list[int]) -> None:
    assert re.sub(rb"(?m)^>(>*From )", rb"\1", quote(pieces(text, at))) == text


@given(texts)
def test_nothing_quoted_begins_a_message(text: bytes) -> None:
    assert re.search(rb"(?m)^From ", quote([text])) is None


@given(header_texts, cuts)
def test_header_filter_does_not_depend_on_the_chunks(text: bytes, at: list[int]) -> None:
    whole, cut = HeaderFilter(), HeaderFilter()
    expected = whole.feed(text) + whole.finish()
    assert b"".join(map(cut.feed, pieces(text, at))) + cut.finish() == expected
    assert cut.received_count == whole.received_count


@given(st.binary(max_size=300), cuts)
def test_header_filter_keeps_what_is_no_return_path(text: bytes, at: list[int]) -> None:
    if b"return-path" not in text.lower():
        kept = HeaderFilter()
        assert b"".join(map(kept.feed, pieces(text, at))) + kept.finish() == text
