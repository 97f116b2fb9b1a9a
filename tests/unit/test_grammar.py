from __future__ import annotations

import pytest

from mda.receiver.grammar import PathError, parse_parameters, parse_path


@pytest.mark.parametrize(
    ("text", "route", "local_part", "domain"),
    [
        (b"<alice>", (), b"alice", b""),
        (b"<Smith@USC-ISIF.ARPA>", (), b"Smith", b"USC-ISIF.ARPA"),
        (b"<@ONE,@TWO:JOE@THREE>", (b"ONE", b"TWO"), b"JOE", b"THREE"),
        (b"<@us:alice>", (b"us",), b"alice", b""),
        (b"<Joe\\,Smith@x>", (), b"Joe,Smith", b"x"),
        (b'<"Joe\\,Smith"@x>', (), b"Joe,Smith", b"x"),
        (b'<"alice">', (), b"alice", b""),
        (b'<"a b"@x>', (), b"a b", b"x"),
        (b"<a\\.@x>", (), b"a.", b"x"),
        (b"<a.b.c@x.y>", (), b"a.b.c", b"x.y"),
        (b"<user+box@4two.example>", (), b"user+box", b"4two.example"),
        (b"<u@[127.0.0.1]>", (), b"u", b"[127.0.0.1]"),
        (b"<u@[IPv6:::1]>", (), b"u", b"[IPv6:::1]"),
        (b"<u@#123456>", (), b"u", b"#123456"),
        (b"<u@[001.02.003.255]>", (), b"u", b"[001.02.003.255]"),
        (b"<u@x.#12.[1.2.3.4]>", (), b"u", b"x.#12.[1.2.3.4]"),
        (b"<u@3com.example>", (), b"u", b"3com.example"),
        (b"<u@a>", (), b"u", b"a"),
        (b"<a\\..b@x>", (), b"a..b", b"x"),
        (b'<""@x>', (), b"", b"x"),
        (
            "<b\u00fccher@b\u00fccher.example>".encode(),
            (),
            "b\u00fccher".encode(),
            "b\u00fccher.example".encode(),
        ),
        ('<"\u00fc \u4e2d">'.encode(), (), "\u00fc \u4e2d".encode(), b""),
        (b"<>", (), b"", b""),
    ],
)
def test_a_path_is_taken_apart(
    text: bytes, route: tuple[bytes, ...], local_part: bytes, domain: bytes
) -> None:
    path, rest = parse_path(text + b" SIZE=1")
    assert (path.text, path.route, path.local_part, path.domain) == (
        text[1:-1],
        route,
        local_part,
        domain,
    )
    assert rest == b" SIZE=1"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"alice",
        b"<alice",
        b"<a b>",
        b"<.a>",
        b"<a..b>",
        b"<a.>",
        b"<a@>",
        b"<@x>",
        b"<@x:>",
        b"<@x,y:a@b>",
        b"<@x a@b>",
        b'<"a>',
        b'<"a\nb">',
        b"<a\\>",
        b"<a@b..c>",
        b"<a@-b>",
        b"<a@b->",
        b"<a@[1.2.3.256]>",
        b"<a@[1.2.3]>",
        b"<a@[1.2.3.0004]>",
        b"<a@[IPv6:1.2.3.4]>",
        b"<a@[IPv6:::g]>",
        b"<a@[tag:x]>",
        b"<a\xff@b>",
        b"<a\xed\xa0\x80@b>",
        "<a\u0085b>".encode(),
        "<a\u202eb>".encode(),
        '<"a\u2028b">'.encode(),
        b"<@x, @y:a@b>",
        b"<@x: a@b>",
        b"<a@.b>",
        b"<a@" + b"x" * 64 + b">",
        b"<a@[]>",
        b"<a@[1 2]>",
        b"<a@#>",
        b"<a@b>".replace(b"@", b"\x00"),
        b"<a\xe9@b>",
        b"<a@b@c>",
        b"< a@b>",
    ],
)
def test_what_is_no_path_is_refused(text: bytes) -> None:
    with pytest.raises(PathError):
        parse_path(text)


def test_parameters_are_read_in_any_case_of_their_names() -> None:
    assert parse_parameters(b" size=10 Body=8BITMIME FLAG") == {
        b"SIZE": b"10",
        b"BODY": b"8BITMIME",
        b"FLAG": b"",
    }
    assert parse_parameters(b"") == {}


@pytest.mark.parametrize("text", [b"x", b" =1", b" a=", b" a=b=c", b" a=\x07", b" _a=1"])
def test_bad_parameters_are_none(text: bytes) -> None:
    assert parse_parameters(text) is None
