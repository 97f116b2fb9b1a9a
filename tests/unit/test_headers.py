"""The header lines we add, and the filter that takes the old Return-Path away."""

from __future__ import annotations

import email.utils
import os
import time
from typing import TYPE_CHECKING

import pytest

from mda.content import headers

if TYPE_CHECKING:
    from collections.abc import Iterator

WHEN = 1_767_690_000.0


@pytest.fixture(params=["UTC", "LMT+04:30", "Europe/Berlin"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield request.param
    time.tzset()


def filter_text(text: bytes, step: int) -> tuple[bytes, int]:
    kept = headers.HeaderFilter()
    chunks = [text[at : at + step] for at in range(0, len(text), step)] if step else [text]
    return b"".join(map(kept.feed, chunks)) + kept.finish(), kept.received_count


@pytest.mark.parametrize("step", [0, 1, 3, 7])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (b"Return-Path: <a@b>\nSubject: x\n\nhi\n", b"Subject: x\n\nhi\n"),
        (b"A: 1\nRETURN-path : <a\n\tb>\n c\nB: 2\n\n", b"A: 1\nB: 2\n\n"),
        (b"Return-Path: a\nReturn-Path: b\nA: 1\nreturn-path:\n\n", b"A: 1\n\n"),
        (b"A: 1\n 2\nReturn-Path: x", b"A: 1\n 2\n"),
        (b"Return-Path: x\n\nReturn-Path: y\n", b"\nReturn-Path: y\n"),
        (b"\nReturn-Path: y\n", b"\nReturn-Path: y\n"),
        (b"no header here\nReturn-Path: y\n", b"no header here\nReturn-Path: y\n"),
        (b" odd\nReturn-Path: y\n", b" odd\nReturn-Path: y\n"),
        (b"Return-Paths: y\nX-Return-Path: z\n\n", b"Return-Paths: y\nX-Return-Path: z\n\n"),
        (b"Return-Path", b"Return-Path"),
        (b"From me\n>From me\nReturn-Path: x\nA: 1\n\n", b"From me\n>From me\nA: 1\n\n"),
        (b"From : me\n 2\nReturn-Path: x\n\n", b"From : me\n 2\n\n"),
        (b"A: \0\r\xff\nReturn-Path: " + b"x" * 5000 + b"\n\nb\0", b"A: \0\r\xff\n\nb\0"),
        (b"A: " + b"y" * 5000 + b"\nReturn-Path:\n\n", b"A: " + b"y" * 5000 + b"\n\n"),
        (b"y" * 5000 + b": 1\nReturn-Path:\n\n", b"y" * 5000 + b": 1\nReturn-Path:\n\n"),
        (b"", b""),
    ],
)
def test_every_return_path_of_the_header_goes_and_all_else_stays(
    text: bytes, kept: bytes, step: int
) -> None:
    assert filter_text(text, step)[0] == kept


@pytest.mark.parametrize("step", [0, 1])
def test_received_fields_of_the_header_are_counted(step: int) -> None:
    text = b"Received: a\n b\nrEceived : c\nReceived-SPF: d\n\nReceived: e\n"
    assert filter_text(text, step) == (text, 2)


def test_little_is_kept_of_an_endless_line() -> None:
    kept = headers.HeaderFilter()
    assert kept.feed(b"x" * 255) == b""
    assert kept.feed(b"x") == b"x" * 256
    assert kept.feed(b"x" * 70_000) == b"x" * 70_000


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize(
    ("sender", "shown"),
    [
        (b"bob@example.org", b"bob@example.org"),
        (b"", b"MAILER-DAEMON"),
        (b'"a b"@x', b'"a-b"@x'),
        (b"a\nFrom b\r\0\x7f\t@x", b"a-From-b----@x"),
        (b"j\xc3\xb6rg@x", b"j\xc3\xb6rg@x"),
    ],
)
def test_from_line_is_one_line_in_local_time(sender: bytes, shown: bytes) -> None:
    expected = time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(WHEN)).encode()
    assert headers.from_line(sender, WHEN) == b"From " + shown + b" " + expected + b"\n"


def test_from_line_fits_into_a_lock_record() -> None:
    assert len(headers.from_line(b"x" * 5000, WHEN)) < 400


def test_return_path_keeps_the_text_and_cannot_break() -> None:
    assert headers.return_path(b"") == b"Return-Path: <>\n"
    text = b'"a b"@x,\xc3\xb6\n\r\0'
    assert headers.return_path(text) == b'Return-Path: <"a b"@x,\xc3\xb6???>\n'


def test_date_reads_back_as_the_same_moment(zone: str) -> None:
    text = headers.format_date(WHEN)
    assert email.utils.parsedate_to_datetime(text).timestamp() == WHEN, zone
    expected = {"UTC": "+0000", "LMT+04:30": "-0430", "Europe/Berlin": "+0100"}[zone]
    assert text.endswith(expected)


def test_time_stamp_line_has_the_form_of_rfc_5321(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        both = [
            headers.received("pc.example", "[127.0.0.1]", "lab", "ESMTP", "4f2a", to, WHEN)
            for to in ("alice@lab", None)
        ]
    time.tzset()
    origin = b"Received: from pc.example ([127.0.0.1])\n\tby lab with ESMTP id 4f2a"
    date = b"Tue, 6 Jan 2026 09:00:00 +0000\n"
    assert both == [origin + b"\n\tfor <alice@lab>; " + date, origin + b";\n\t" + date]


def test_time_stamp_line_cannot_be_broken_by_its_parts() -> None:
    evil = 'x\r\ny ;()<>\\\0\x1b\u202e"z'
    line = headers.received(evil, evil, evil, evil, evil, evil, WHEN)
    assert line.count(b"\n") == 3
    assert all(byte in b"\n\t" or 32 <= byte < 127 for byte in line)
    assert line.count(b"<") == line.count(b">") == 1
    assert line.split(b"for <")[0].count(b"(") == 1
    x = "x" * 9999
    assert max(map(len, headers.received(x, x, x, x, x, x, WHEN).split(b"\n"))) < 998


@pytest.mark.parametrize(
    ("protocol", "shown"), [("ESMTP", b"<j?rg?@x>"), ("UTF8SMTP", "<jörg?@x>".encode())]
)
def test_utf_8_recipient_is_shown_only_where_the_protocol_allows(
    protocol: str, shown: bytes
) -> None:
    line = headers.received("", "", "lab", protocol, "1", "jörg\u202e@x", WHEN)
    assert line.startswith(b"Received: from unknown\n")
    assert shown in line


def test_undecodable_recipient_does_not_fail() -> None:
    recipient = os.fsdecode(b"\xff@x")
    assert b"for <?@x>" in headers.received("", "", "lab", "UTF8SMTP", "1", recipient, WHEN)


def test_neither_a_quote_in_hello_nor_half_a_recipient_swallows_what_follows() -> None:
    line = headers.received('x"', "local", "mda.test", "SMTP", "1.2", '"a b"@mda.test', 0).decode()
    assert line.startswith("Received: from x? (local)\n\tby mda.test with SMTP id 1.2\n\tfor <")
    long = '"' + "a; " * 100 + '"@mda.test'
    line = headers.received("x", "local", "mda.test", "SMTP", "1.2", long, 0).decode()
    assert line.startswith("Received: from x (local)\n\tby mda.test with SMTP id 1.2;\n\t")
    assert " for " not in line
