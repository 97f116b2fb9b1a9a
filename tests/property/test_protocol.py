"""No octets make the protocol raise, and how they are cut up changes nothing."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st
from support.dialogue import converse, cut, make_protocol

from mda.config import Config
from mda.receiver.dotstream import DotStream
from mda.receiver.protocol import Protocol
from mda.receiver.textstore import TextStore

WORDS = st.sampled_from(
    [
        b"HELO x\r\n",
        b"EHLO x\r\n",
        b"LHLO x\r\n",
        b"MAIL FROM:<bob@x>\r\n",
        b"SEND FROM:<>\r\n",
        b"SOML FROM:<@a,@b:c@d>\r\n",
        b"RCPT TO:<alice>\r\n",
        b"RCPT TO:<>\r\n",
        b"STARTTLS\r\n",
        b"TURN\r\n",
        b"XCLIENT ADDR=192.0.2.1 NAME=[UNAVAILABLE]\r\n",
        b"XCLIENT ADDR=\xff\r\n",
        b"MAIL FROM:<bob@x> RET=HDRS ENVID=a+2B\r\n",
        b"RCPT TO:<alice> NOTIFY=NEVER ORCPT=rfc822;x\r\n",
        b"RCPT TO:<alice> NOTIFY=,\xff ORCPT=+\r\n",
        b"DATA\r\n",
        b"BDAT 5\r\nhello",
        b"BDAT 3 LAST\r\na\r\n",
        b"BDAT 0 LAST\r\n",
        b"BDAT 7\r\n",
        b"BDAT 99999999999\r\n",
        b"BDAT 5 x\r\n",
        b".\r\n",
        b"..\r\n",
        b"\r\n.\r\n",
        b"\n.\n",
        b"\r.\r",
        b"RSET\r\n",
        b"NOOP\r\n",
        b"QUIT\r\n",
        b"\r\n",
        b"\x00",
        b"\xff\r\n",
        b"x" * 600 + b"\r\n",
    ]
)
SESSIONS = st.lists(st.one_of(WORDS, st.binary(max_size=20)), max_size=30).map(b"".join)


@given(SESSIONS, st.lists(st.integers(0, 10_000), max_size=20), st.booleans())
def test_chunking_changes_nothing(octets: bytes, places: list[int], is_lmtp: bool) -> None:
    def make() -> Protocol:
        return make_protocol(is_lmtp=is_lmtp, offers_more=True)

    # What stands behind STARTTLS is dropped with the piece that it comes in, and TURN is obeyed
    # if nothing has come behind it yet.
    octets = octets.split(b"STARTTLS\r\n")[0].split(b"TURN\r\n")[0]
    whole = converse([octets], make())
    pieces = converse(cut(octets, places), make())
    bytewise = converse([octets[i : i + 1] for i in range(len(octets))], make())
    assert whole.said == pieces.said == bytewise.said
    assert whole.texts == pieces.texts == bytewise.texts


@given(SESSIONS)
def test_every_reply_line_is_printable_and_short(octets: bytes) -> None:
    said = converse([octets], make_protocol(offers_more=True)).said
    for line in said.split(b"\r\n"):
        assert len(line) <= 510
        assert all(32 <= char < 127 for char in line)


def stuff(message: bytes) -> bytes:
    """What a sender does (RFC 821 4.5.2): message has CRLF line ends."""
    stuffed = (b"\r\n" + message).replace(b"\r\n.", b"\r\n..")[2:]
    end = b".\r\n" if message.endswith(b"\r\n") or not message else b"\r\n.\r\n"
    return stuffed + end


@given(
    st.binary(max_size=300), st.lists(st.integers(0, 10_000), max_size=10), st.binary(max_size=9)
)
@example(b"\r\n.\r\n", [], b"")
@example(b".", [], b"")
@example(b"\r", [], b"")
def test_a_stuffed_body_comes_back(body: bytes, places: list[int], behind: bytes) -> None:
    stream = DotStream()
    text = b""
    waiting = cut(stuff(body) + behind, places)
    while waiting and not stream.is_ended:
        text += stream.feed(waiting.pop(0))
    assert stream.is_ended
    ended = body if body.endswith(b"\r\n") or not body else body + b"\r\n"
    assert text == ended.replace(b"\r\n", b"\n")
    assert stream.rest + b"".join(waiting) == behind


@given(
    st.lists(st.integers(990, 1010) | st.integers(0, 40), max_size=12),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_a_line_is_too_long_in_whatever_pieces_it_comes(
    sizes: list[int], places: list[int]
) -> None:
    text = b"\n".join(b"x" * size for size in sizes)
    config = Config().with_values("receiver", text_line=1000)
    store = TextStore(None, config, "q")  # type: ignore[arg-type] # memory will do
    for piece in cut(text, places):
        store.write(piece)
    store.close()
    assert (store.error is not None) == any(size > 998 for size in sizes)


NEWLINES = st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b".", b"x", b"\r\n."]), max_size=30)


@given(NEWLINES.map(b"".join), st.lists(st.integers(0, 100), max_size=10))
def test_every_cr_or_lf_that_stands_alone_is_seen_and_kept(body: bytes, places: list[int]) -> None:
    stream = DotStream()
    text = b"".join(map(stream.feed, cut(stuff(body), places)))
    is_bare = re.search(rb"\r(?!\n)|(?<!\r)\n", body) is not None
    assert stream.has_bare_newline == is_bare
    ended = body if body.endswith(b"\r\n") or not body else body + b"\r\n"
    assert text == ended.replace(b"\r\n", b"\n")
