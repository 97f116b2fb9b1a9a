"""Messages of every kind that transport agents hand on, the same ones in every run."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

MULTIPART = b"""MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="=_b"

preamble
--=_b
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

\xc3\xa9t\xc3\xa9
--=_b
Content-Type: application/octet-stream
Content-Transfer-Encoding: base64

AAECAwQFBgcICQoLDA0ODw==
--=_b--
epilogue
"""
FOLDED = (
    b"X-Folded: one\n two\n\tthree\n    four\nX-8bit: caf\xc3\xa9\nX-Word: =?utf-8?q?=C3=A9?=\n"
    b"X-Empty:\nx-lower:no space\n\nbody\n"
)
EIGHT_BIT = bytes(range(0xA0, 0x100))
CONTROLS = bytes(set(range(1, 32)) - {10, 13}) + b"\x7f"

# Header lines of their own, an empty line, and the text.
BODIES = {
    "empty": b"\n",
    "one line": b"\nhello\n",
    "dots": b"\n.\n..\n...\n.x\n..x\nx.\n. \n",
    "From_ lines": b"\nFrom here\n>From there\n>>From x\nFROM no\n From no\n\nFrom again\n\n",
    "line of 998": b"\n" + b"x" * 998 + b"\n" + b"y" * 997 + b"\n",
    "UTF-8": "\n\u00e9t\u00e9 \u65e5\u672c\u8a9e \U0001f4ec\n".encode(),
    "Latin-1": b"\n" + EIGHT_BIT + b"\n",
    "controls": b"\n" + CONTROLS + b"\n",
    "blanks": b"\n  two before, two behind  \n\t\n \n\n\n",
    "multipart": MULTIPART,
    "folded": FOLDED,
    "a header in the text": b"\nReturn-Path: <x@y>\nReceived: by nobody\nSubject: text\n",
    "NUL": b"\nbefore\0behind\n\0\n",
    "lone CR": b"\nbefore\rbehind\n",
    "megabyte": b"\n" + b"0123456789abcdef" * 4 * 16_384 + b"\n",
}
_LARGE = 3


def make_corpus(count: int, without: tuple[str, ...]) -> Iterator[bytes]:
    """`count` messages with LF line ends, each with its number; no kinds of `without`."""
    choose = random.Random(821)  # noqa: S311 (no secret, and the same in every run)
    kinds = [kind for kind in BODIES if kind not in without]
    large = 0
    for number in range(count):
        kind = kinds[number] if number < len(kinds) else choose.choice(kinds)
        large += kind == "megabyte"
        if kind == "megabyte" and large > _LARGE:
            kind = "one line"
        body = BODIES[kind]
        if kind == "megabyte":
            body = re.sub(rb"(.{64})", rb"\1\n", body)
        yield _header(number, kind) + body


def _header(number: int, kind: str) -> bytes:
    """A whole header, to which no agent has to add anything."""
    lines = (
        f"X-Number: {number}",
        f"Message-ID: <{number}@corpus.example>",
        "Date: Thu, 1 Jan 2026 00:00:00 +0000",
        "From: bob@example.org",
        "To: alice@example.org",
        f"Subject: {kind}",
    )
    return "".join(f"{line}\n" for line in lines).encode()


def read_mbox(text: bytes) -> list[bytes]:
    """The messages of an mboxrd mailbox, without From_ line and quoting."""
    found = re.split(rb"(?m)^From [^\n]*\n", text)
    assert found.pop(0) == b"", "the mailbox does not begin with a From_ line"
    assert all(message.endswith(b"\n\n") for message in found), "no blank line behind a message"
    return [re.sub(rb"(?m)^>(>*From )", rb"\1", message[:-1]) for message in found]


def number_of(message: bytes) -> int:
    """Which message of the corpus this is."""
    found = re.search(rb"(?m)^X-Number: (\d+)$", message)
    assert found is not None, message[:2000]
    return int(found[1])


def below_added_lines(message: bytes) -> bytes:
    """The message from its first own line on: what agents add stands above."""
    return message[message.index(b"X-Number: ") :]
