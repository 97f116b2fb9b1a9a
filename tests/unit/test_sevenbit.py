"""A text in seven bits for a hop that takes no others: what it says stays the same."""

from __future__ import annotations

import email
from email.header import decode_header
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda.outbound.sevenbit import Inconvertible, convert


def leaves(text: bytes) -> list[Message]:
    assert text.isascii()
    return [part for part in email.message_from_bytes(text).walk() if not part.is_multipart()]


def contents(text: bytes) -> list[bytes]:
    return [bytes(part.get_payload(decode=True)) for part in leaves(text)]


def test_what_has_no_header_for_it_gets_one() -> None:
    text = convert(b"Subject: x\n\ncaf\xe9 = \n.\nFrom me\n")
    (part,) = leaves(text)
    assert part.get_payload(decode=True) == b"caf\xe9 = \n.\nFrom me\n"
    assert part["MIME-Version"] == "1.0"
    assert part["Content-Transfer-Encoding"] == "quoted-printable"
    assert part.get_content_charset() == "unknown-8bit"
    assert text.startswith(b"Subject: x\n")


def test_only_the_parts_that_need_it_are_written_anew() -> None:
    before = (
        b"""Received: from a (very long comment that somebody has folded
\tbelow, and there)
\tby b; now
X-Long: """
        + b"x" * 500
        + b"""
MIME-Version: 1.0
Content-Type: multipart/mixed;
  boundary="=b="
Content-Transfer-Encoding: 8bit

preamble
--=b=
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

gr\xc3\xbc\xc3\x9fe
--=b=
Content-Type: image/png
Content-Transfer-Encoding: base64

iVBORw0KGgo=
--=b=
Content-Type: message/rfc822
Content-Transfer-Encoding: 8bit

Subject: inner

na\xc3\xafve
--=b=--
"""
    )
    after = convert(before)
    assert contents(after) == [
        "grüße".encode(),
        b"\x89PNG\r\n\x1a\n",
        "naïve".encode(),
    ]
    head = before.partition(b"Content-Transfer-Encoding")[0]
    assert after.startswith(head), after
    assert b"\nContent-Transfer-Encoding: 8bit" not in after
    assert b"\n\niVBORw0KGgo=\n" in after


def test_a_header_that_is_not_ascii_becomes_encoded_words() -> None:
    text = convert("Subject: Grüße\nTo: x@y\n\nok\n".encode())
    assert text.isascii()
    ((octets, charset),) = decode_header(email.message_from_bytes(text)["Subject"])
    assert (octets, charset) == ("Grüße".encode(), "unknown-8bit")
    assert text.endswith(b"\n\nok\n")


def test_quoted_printable_that_is_none_becomes_some() -> None:
    head = b"MIME-Version: 1.0\nContent-Transfer-Encoding: quoted-printable\n\n"
    assert contents(convert(head + b"caf=E9 \xe9=\n!\n")) == [b"caf\xe9 \xe9!\n"]


NESTED = b"".join(
    b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(900)
)
NESTED += b"\n\xe9\n"


@pytest.mark.parametrize(
    "text",
    [
        b"MIME-Version: 1.0\nContent-Transfer-Encoding: base64\n\nYW\xe9Jj\n",
        b"MIME-Version: 1.0\nContent-Transfer-Encoding: x-own\n\n\xe9\n",
        b"MIME-Version: 1.0\nContent-Type: multipart/mixed\n\n\xe9\n",
        b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n\xe9\n--b\n\nx\n--b--\n",
        b"From: J\xfcrgen <j@x>\n\nx\n",
        b'Content-Type: text/plain; name="\xfc.txt"\n\n\xe9\n',
        b"Content-Type: text/plain; charset=undefined\n\n\xe9\n",
        b"Content-Type: text/plain; charset=idna\n\n\xe9.\xe9\n",
        b'Content-Type: text/plain; charset="a\0b"\n\n\xe9\n',
        NESTED,
    ],
    ids=lambda text: repr(text[:70]),
)
def test_what_cannot_be_said_in_seven_bits_is_not(text: bytes) -> None:
    with pytest.raises(Inconvertible):
        convert(text)


@given(st.binary(max_size=300).map(lambda octets: octets.replace(b"\r", b"")))
def test_any_body_comes_back(body: bytes) -> None:
    head = b"MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n\n"
    assert contents(convert(head + body)) == [body]
