"""The destinations of alias and forward files, as sendmail, Postfix and Exim write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda.recipients.destinations import Destination, DestinationError, parse_file, parse_list


def mailbox(text: bytes, domain: bytes = b"", *, is_final: bool = False) -> Destination:
    return Destination("mailbox", text, domain, is_final=is_final)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"alice", [mailbox(b"alice")]),
        (b"alice, bob ,carol", [mailbox(b"alice"), mailbox(b"bob"), mailbox(b"carol")]),
        (b"alice@example.org", [mailbox(b"alice", b"example.org")]),
        (b"\\alice", [mailbox(b"alice", is_final=True)]),
        (b"Alice Liddell <alice@example.org>", [mailbox(b"alice", b"example.org")]),
        (b'"Liddell, Alice" <alice>', [mailbox(b"alice")]),
        (b"alice (Alice, at home)", [mailbox(b"alice")]),
        (b'"alice b"@example.org', [mailbox(b"alice b", b"example.org")]),
        (b'"a@b"@example.org', [mailbox(b"a@b", b"example.org")]),
        (b'"alice"', [mailbox(b"alice")]),
        (b"/var/spool/archive", [Destination("file", b"/var/spool/archive")]),
        (b'"/var/spool/a b"', [Destination("file", b"/var/spool/a b")]),
        (b"/home/alice/Maildir/", [Destination("file", b"/home/alice/Maildir/")]),
        (b"|/usr/bin/procmail", [Destination("command", b"/usr/bin/procmail")]),
        (b'"|exec /bin/cat, -"', [Destination("command", b"exec /bin/cat, -")]),
        (b'|"exec /bin/cat, -"', [Destination("command", b"exec /bin/cat, -")]),
        (b'"|echo \\"two  words\\""', [Destination("command", b'echo "two  words"')]),
        (b":include:/etc/lists/staff", [Destination("include", b"/etc/lists/staff")]),
        (b'":include:/etc/my lists"', [Destination("include", b"/etc/my lists")]),
        (b':include:"/etc/my lists"', [Destination("include", b"/etc/my lists")]),
        (b"alice,,bob,", [mailbox(b"alice"), mailbox(b"bob")]),
        (b"", []),
        (b" \t ", []),
    ],
)  # fmt: skip
def test_a_list_is_read_as_other_mailers_read_it(text: bytes, expected: list[Destination]) -> None:
    assert parse_list(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        b'"alice',
        b"alice bob",
        b"alice@",
        b"@example.org",
        b"alice@exa mple",
        b"|",
        b'"|"',
        b":include:staff",
        b"a\0b",
        b"x" * 1001,
        b"error:5.1.1 no",
        b"<>",
        b"\\",
    ],
)
def test_what_is_no_destination_is_said_so(text: bytes) -> None:
    with pytest.raises(DestinationError) as caught:
        parse_list(text)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_a_file_has_comments_and_continued_lines() -> None:
    text = b"# mine\nalice,\n  bob\n\n|exec cat\n#carol\ncarol@example.org"
    assert parse_file(text) == [
        mailbox(b"alice"),
        mailbox(b"bob"),
        Destination("command", b"exec cat"),
        mailbox(b"carol", b"example.org"),
    ]


@given(st.binary(max_size=200))
def test_any_bytes_are_destinations_or_an_error(text: bytes) -> None:
    try:
        found = parse_file(text)
    except DestinationError:
        return
    for each in found:
        assert each.text
        assert b"\0" not in each.text + each.domain
        assert b"\n" not in each.text + each.domain
