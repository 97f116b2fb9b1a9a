from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda import log


@given(st.one_of(st.text(), st.binary()))
def test_what_anybody_sends_stays_inside_its_value(value: str | bytes) -> None:
    line = log.format_line("event", {"key": value})
    assert line.isascii()
    assert line.isprintable()
    assert line.startswith("event key=")
    quoted = line.removeprefix("event key=")
    if quoted.startswith('"'):
        inner = quoted[1:-1].replace("\\\\", "").replace('\\"', "")
        assert '"' not in inner
    else:
        assert quoted
        assert " " not in quoted
        assert "=" not in quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"alice@example.org", "alice@example.org"),
        ("", '""'),
        ('a "b" \\', '"a \\"b\\" \\\\"'),
        (b"\x1b[2J\r\nfake", '"\\x1b[2J\\x0d\\x0afake"'),
        ("\u202e", '"\\u{202e}"'),
        (17, "17"),
    ],
)
def test_harmless_values_are_plain_and_others_are_escaped(value: object, shown: str) -> None:
    assert log.quote(value) == shown


def test_a_long_value_is_cut() -> None:
    assert len(log.quote("x" * 10_000)) < 600


def test_lines_reach_the_journal_with_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    kept = os.dup(2)
    os.dup2(write_fd, 2)
    try:
        status = os.fstat(2)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.open_log(may_use_stderr=False)
        log.write("delivered", log.WARNING, to=b"alice")
    finally:
        os.dup2(kept, 2)
        monkeypatch.delenv("JOURNAL_STREAM")
        log.open_log(may_use_stderr=False)
    assert os.read(read_fd, 1000) == b"<4>delivered to=alice\n"
    for fd in (read_fd, write_fd, kept):
        os.close(fd)
