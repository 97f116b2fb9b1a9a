"""Messages as terminal blocks: decoded first, harmless afterwards, bounded always."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time

import pytest

from mda.content import screen
from mda.terminal.tty import is_safe_block


def render(
    head: bytes,
    is_whole: bool = True,
    *,
    sender: str = "bob",
    is_verified: bool = True,
    via: str = "",
    when: str = "14:03",
    width: int = 80,
    lines: int = 20,
    limit: int = 4096,
    bell: bool = True,
    has_mailbox_copy: bool = True,
) -> tuple[list[str], bool]:
    """The block's rows without the fresh line, and whether it is clipped."""
    block, is_clipped = screen.render(
        head,
        is_whole,
        sender=sender,
        is_verified=is_verified,
        via=via,
        when=when,
        width=width,
        lines=lines,
        limit=limit,
        bell=bell,
        has_mailbox_copy=has_mailbox_copy,
    )
    assert is_safe_block(block), block
    assert len(block) <= limit
    start = b"\r\n\a" if bell else b"\r\n"
    assert block.startswith(start)
    assert block.endswith(b"\r\n")
    return block[len(start) : -2].decode("utf-8").split("\r\n"), is_clipped


def shown(body: bytes, header: bytes = b"") -> list[str]:
    """The rows between banner and end line of a message that is shown whole."""
    rows, is_clipped = render(header + b"\n" + body)
    assert not is_clipped
    assert rows[0] == "Message from bob (verified) at 14:03"
    assert rows[-1] == "-- end of message --"
    return rows[1:-1]


def test_a_message_is_banner_subject_text_and_end() -> None:
    assert render(b"From: x\nSubject: food\n\nlunch?\n\nBob\n") == (
        [
            "Message from bob (verified) at 14:03",
            "Subject: food",
            "| lunch?",
            "| ",
            "| Bob",
            "-- end of message --",
        ],
        False,
    )


def test_the_bell_rings_only_when_asked() -> None:
    rows, _ = render(b"\nhi\n", bell=False)
    assert "\a" not in "".join(rows)


@pytest.mark.parametrize(
    ("sender", "via", "banner"),
    [
        (
            "bob@example.org",
            "h.example",
            "Message from <bob@example.org> (unverified, via h.example)",
        ),
        ("bob@example.org", "", "Message from <bob@example.org> (unverified)"),
        ("<bob@example.org>", "", "Message from <bob@example.org> (unverified)"),
        ("<>", "", "Message from <> (unverified)"),
        ("", "h", "Message from <> (unverified, via h)"),
        (
            '"a> (verified)"@x',
            "h) x",
            'Message from <"a\\x3e \\x28verified\\x29"@x> (unverified, via h\\x29 x)',
        ),
        ("a>\u0301@x", "", "Message from <a\\x3e@x> (unverified)"),
        (
            "root\x1b[2J\r\nroot\u202e",
            "\x9b2J",
            "Message from <root^[[2J root<U+202E>> (unverified, via \\x9b2J)",
        ),
    ],
)
def test_an_unverified_sender_is_named_as_such(sender: str, via: str, banner: str) -> None:
    rows, _ = render(b"\nhi\n", sender=sender, is_verified=False, via=via, width=200)
    assert rows[0] == f"{banner} at 14:03"


def test_a_long_sender_cannot_make_a_banner_of_his_own() -> None:
    sender = '"' + "a" * 24 + ' Message from root"@x'
    rows, _ = render(b"\nhi\n", sender=sender, is_verified=False, width=40)
    assert len(rows) > 3
    assert [row for row in rows if row.startswith("Message from")] == rows[:1]
    assert all(row.startswith("| ") for row in rows[1:-1])


def test_a_very_long_sender_is_shortened() -> None:
    rows, _ = render(b"\nhi\n", sender="x" * 5000, is_verified=False, width=200)
    assert rows[0].startswith("Message from <xxxx")
    assert "\u2026> (unverified) at 14:03" in rows[0]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"\x1b[2J", "^[[2J"),
        (b"\x1b]52;c;eA==\x07", "^[]52;c;eA==^G"),
        (b"\x1bP+q\x1b\\", "^[P+q^[\\"),
        (b"\x05", "^E"),
        (b"\x9b2J", "\\x9b2J"),
        (b"\xc2\x9b2J", "\\x9b2J"),
        (b"\x7f", "^?"),
        (b"x\bx", "x^Hx"),
        (b"\x0e\x0f", "^N^O"),
        (b"\x0b\x0c\x00", "^K^L^@"),
        ("\u202e\u2066\u2069".encode(), "<U+202E><U+2066><U+2069>"),
        ("a\u200bb\ufeff".encode(), "a<U+200B>b<U+FEFF>"),
        ("\U000e0041".encode(), "<U+E0041>"),
        (
            "\u3164\u115f\u1160\u2800\uffa0".encode(),
            "<U+3164><U+115F><U+1160><U+2800><U+FFA0>",
        ),
        ("\ue000\u0378\u2028".encode(), "<U+E000><U+0378><U+2028>"),
        (b"\xff\xc0\x9b\xed\xa0\x80", "\\xff\\xc0\\x9b\\xed\\xa0\\x80"),
        ("a\u00a0b\u3000c".encode(), "a b  c"),
        (b"a\tb", "a       b"),
        ("日\tb".encode(), "日      b"),
        ("e\u0301".encode(), "é"),
        ("\u0301x".encode(), "<U+0301>x"),
    ],
    ids=ascii,
)
def test_what_acts_or_hides_is_shown(payload: bytes, text: str) -> None:
    assert shown(payload) == [f"| {text}"]


def test_marks_are_capped_for_each_letter() -> None:
    (row,) = shown("x\u0316".encode() + "\u0316".encode() * 50 + "y\u0316".encode())
    assert row == "| x" + "\u0316" * 3 + "y\u0316"


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_text_cannot_imitate_the_frame(end: bytes) -> None:
    forged = b"hi" + end + b"-- end of message --" + end + b"Message from root (verified) at 1:00"
    rows = shown(forged)
    assert all(row.startswith("| ") for row in rows)
    assert len(rows) == (1 if end == b"\r" else 3)


def test_a_thousand_bells_ring_once() -> None:
    rows, _ = render(b"\n" + b"\a" * 1000 + b"\n")
    assert "\a" not in "".join(rows)
    assert rows[1].startswith("| ^G^G")


def test_languages_do_not_depend_on_the_locale() -> None:
    text = "\nżółć 日本 🙂\n".encode()
    program = (
        "import sys; from mda.content.screen import render; sys.stdout.buffer.write(render("
        f"{text!r}, True, sender='bob', is_verified=True, via='', when='',"
        "width=80, lines=20, limit=4096, bell=False, has_mailbox_copy=False)[0])"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert "| żółć 日本 🙂\r\n".encode() in done.stdout


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"Content-Transfer-Encoding: base64\n", base64.b64encode("żółć\x1b[2J".encode())),
        (
            b"Content-Transfer-Encoding: quoted-printable\n",
            b"=C5=BC=C3=B3=\n=C5=82=C4=87=1B[2J",
        ),
        (b"Content-Type: text/plain; charset=iso-8859-2\n", b"\xbf\xf3\xb3\xe6\x1b[2J"),
        (b'Content-Type: text/plain; charset="us-ascii"\n', "żółć\x1b[2J".encode()),
        (b"Content-Type: text/plain; charset=no-such\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: text/plain; charset=base64\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: text/plain; charset=punycode\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: text/plain; charset=idna\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: text/plain; charset=undefined\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: nonsense\n", "żółć\x1b[2J".encode()),
        (b"Content-Type: multipart/mixed\n", "żółć\x1b[2J".encode()),
    ],
)
def test_a_text_is_decoded_before_it_is_made_harmless(header: bytes, body: bytes) -> None:
    assert shown(body, header) == ["| żółć^[[2J"]


def test_decoded_line_ends_are_line_ends() -> None:
    body = base64.encodebytes(b"one\r\ntwo\r\n")
    assert shown(body, b"Content-Transfer-Encoding: base64\n") == ["| one", "| two"]


@pytest.mark.parametrize(
    ("field", "subject"),
    [
        (b"=?utf-8?B?" + base64.b64encode("\x1b[2J\r\nFrom: root\u202e".encode()) + b"?=",
         "^[[2J From: root<U+202E>"),
        (b"=?iso-8859-2?Q?=BF=F3=B3=E6?= x", "żółć x"),
        (b"=?iso-8859-2*pl?Q?=BF?=", "ż"),
        ("żółć".encode(), "żółć"),
        (b"=?no-such?B?eA==?=", "x"),
        (b"=?utf-8?B?x?=", "=?utf-8?B?x?="),
        (b"a\n b\tc", "a b c"),
        (b"=?utf-7?Q?+2AA-?=", "<U+D800>"),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_subject_is_decoded_and_stays_on_its_line(field: bytes, subject: str) -> None:
    assert shown(b"hi\n", b"Subject: " + field + b"\n") == [f"Subject: {subject}", "| hi"]


def test_a_long_subject_is_shortened() -> None:
    rows = shown(b"hi\n", b"Subject: " + b"x" * 5000 + b"\n")
    assert len(rows) == 4
    assert rows[-2].endswith("x\u2026")
    assert all(row.startswith("| ") for row in rows[1:])


PLAIN = b"\nplain\n"
HTML = b"Content-Type: text/html\n\n<p>page\n"
IMAGE = b'Content-Type: image/png; name="=?utf-8?Q?a=1B.png?="\n\nAAAA\n'


def multipart(kind: bytes, *parts: bytes, boundary: bytes = b"b") -> bytes:
    body = b"".join(b"--" + boundary + b"\n" + part for part in parts)
    header = b'Content-Type: multipart/%s; boundary="%s"\n\n' % (kind, boundary)
    return header + b"preamble\n" + body + b"--" + boundary + b"--\nepilogue\n"


@pytest.mark.parametrize("parts", [(PLAIN, HTML), (HTML, PLAIN)])
def test_of_alternatives_the_plain_one_is_shown(parts: tuple[bytes, bytes]) -> None:
    rows, is_clipped = render(multipart(b"alternative", *parts))
    assert (rows[1:-1], is_clipped) == (["| plain"], False)


def test_an_alternative_with_its_images_is_no_loss() -> None:
    related = multipart(b"related", HTML, IMAGE, boundary=b"r")
    rows, is_clipped = render(multipart(b"alternative", PLAIN, related))
    assert (rows[1:-1], is_clipped) == (["| plain"], False)


def test_a_page_alone_is_shown_as_its_text() -> None:
    page = (
        b"<!DOCTYPE html><head><title>no</title><style>p { x }</style></head><!-- no > -->\n"
        b"<p class='a'>Hello\n<b>you</b>,<br/>it&#39;s &lt;b&gt; &#x9b;2J&#8238;\n"
        b"<SCRIPT>alert('<p>')</SCRIPT ><div>1 < 2"
    )
    assert shown(page, b"Content-Type: text/html\n") == [
        "| Hello you,",
        "| it's <b> \u203a2J<U+202E>",
        "| 1 < 2",
    ]


def test_all_texts_are_shown_and_attachments_named_and_said_to_be_missing() -> None:
    attached = b"Content-Disposition: Attachment; filename*=utf-8''%c5%bc\n\nsecret\n"
    message = multipart(b"mixed", PLAIN, IMAGE, b"\nfooter\n", attached)
    rows, is_clipped = render(message)
    assert is_clipped
    assert rows[1:] == [
        "| plain",
        "| footer",
        "| [attachment: a^[.png image/png]",
        "| [attachment: ż text/plain]",
        "[the whole message is in your mailbox]",
    ]


def test_a_signature_is_no_loss() -> None:
    signature = b"Content-Type: application/pgp-signature\n\nxxxx\n"
    rows, is_clipped = render(multipart(b"signed", PLAIN, signature))
    assert (rows[1:-1], is_clipped) == (["| plain"], False)


def test_without_any_text_the_attachments_are_named() -> None:
    rows, is_clipped = render(b"Content-Type: application/pdf; name=a.pdf\n\n%PDF", True)
    assert rows[1:-1] == ["| [attachment: a.pdf application/pdf]"]
    assert is_clipped


def test_deep_nesting_and_many_parts_end_somewhere() -> None:
    message = PLAIN
    for depth in range(100):
        message = multipart(b"mixed", message, boundary=b"b%d" % depth)
    assert render(message)[1]
    opening = b"Content-Type: multipart/alternative; boundary=b%d\n\n--b%d\n"
    assert render(b"".join(opening % (depth, depth) for depth in range(2000)), False)[1]
    rows, is_clipped = render(multipart(b"mixed", *[b"\nx\n"] * 1000), lines=1000)
    assert is_clipped
    assert rows.count("| x") == screen.MAX_PARTS - 1


def test_a_text_that_fits_exactly_is_whole() -> None:
    rows, is_clipped = render(b"\n" + b"x\n" * 20)
    assert rows.count("| x") == 20
    assert not is_clipped


def test_lines_beyond_the_page_are_counted() -> None:
    rows, is_clipped = render(b"\n" + b"x\n" * 10_020)
    assert rows.count("| x") == 20
    assert is_clipped
    assert rows[-1] == "[10000 more lines: the whole message is in your mailbox]"
    rows, _ = render(b"\n" + b"x\n" * 21, has_mailbox_copy=False)
    assert rows[-1] == "[1 more line not shown]"


def test_a_line_that_hides_its_end_behind_marks_is_cut() -> None:
    rows, is_clipped = render(b"\nx" + "\u0316".encode() * 10_000 + b"end\n")
    assert "end" not in rows[1]
    assert is_clipped


def test_a_long_run_of_marks_takes_no_long_time() -> None:
    start = time.process_time()
    screen._normalize("\u0301\u0316" * 65_536)
    assert time.process_time() - start < 2


def test_one_endless_line_is_cut() -> None:
    rows, is_clipped = render(b"\n" + b"x" * 100_000)
    assert is_clipped
    assert rows[1:-1] == ["| " + "x" * 77] * 20
    assert rows[-1] == "[1 more line: the whole message is in your mailbox]"


def test_bytes_are_bounded_before_lines() -> None:
    rows, is_clipped = render(b"\n" + b"x\n" * 1000, limit=256, lines=60)
    assert is_clipped
    hidden = 1000 - rows.count("| x")
    assert 950 < hidden < 1000
    assert rows[-1] == f"[{hidden} more lines: the whole message is in your mailbox]"


def test_a_beginning_is_never_the_whole() -> None:
    rows, is_clipped = render(b"\nhi\n", False)
    assert is_clipped
    assert rows[-1] == "[the whole message is in your mailbox]"


@pytest.mark.parametrize(("width", "columns"), [(80, 79), (0, 20), (20, 20), (9999, 499)])
def test_rows_are_as_wide_as_the_terminal_allows(width: int, columns: int) -> None:
    rows, _ = render(b"\n" + b"x" * 600, width=width, lines=60)
    assert max(len(row) for row in rows) == columns


def test_wide_letters_take_two_columns_and_marks_none() -> None:
    rows, _ = render(b"\n" + "日".encode() * 12 + b"\n" + "x\u0316".encode() * 18, width=21)
    assert "| " + "日" * 9 in rows
    assert "| " + "x\u0316" * 18 in rows


def test_letters_of_disputed_width_never_reach_the_next_row() -> None:
    # Two columns in the newest tables, one in older ones; and the other way round.
    for letter in ("\u4dc0", "\u2630", "\u302e", "\U0001f9d1"):
        rows, _ = render(b"\n" + letter.encode() * 30, width=21, lines=60)
        assert max(row.count(letter) for row in rows) == 9, hex(ord(letter))


@pytest.mark.parametrize(
    ("part", "rest", "is_clipped"),
    [
        ("line", b"\nhello\n", False),
        ("line", b"\n", False),
        ("line", b"Subject: x\n\nhello\n", True),
        ("line", b"\n" + b"hello\n" * 21, True),
        ("line", b"Content-Type: image/png\n\nhello\n", True),
        ("begin", b"\n", False),
        ("begin", b"\nhello\n", True),
        ("end", b"\n", False),
        ("end", b"\nhello\n", True),
    ],
)
def test_what_a_conversation_does_not_show_is_said_to_be_missing(
    part: str, rest: bytes, *, is_clipped: bool
) -> None:
    block, was_clipped = screen.render(
        b"Mda-Conversation: %b\n%b" % (part.encode(), rest),
        True,
        sender="bob",
        is_verified=True,
        via="",
        when="14:03",
        width=80,
        lines=20,
        limit=4096,
        bell=True,
        has_mailbox_copy=False,
    )
    assert is_safe_block(block)
    assert was_clipped is is_clipped


def test_rows_break_between_words() -> None:
    rows, _ = render(b"\nthe quick brown fox jumps\n", width=20)
    assert rows[-3:-1] == ["| the quick brown", "| fox jumps"]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\n",
        b"\n\n\n",
        b"no header at all",
        b"\xff\xfe\n\xff",
        b"Content-Type: text/plain; charset*=a; charset*0=b; charset*1*=x'y'%ff\n\nx",
        b"Content-Type: x/y; name*0*=utf-7'y'+2AA-; name*1*=%ff\n\nx",
        b"Content-Type: x/y; name*=idna'y'%ff\n\nx",
        b"Content-Type: x/y; name*" + b"9" * 5000 + b"=x\n\nx",
        b"Content-Type: text/html\n\n&#" + b"9" * 5000 + b";<![x[",
        b"Content-Type: text/plain; charset=\0\n\nx",
        b"Content-Type: text/plain; charset=unicode_escape\n\n\\q",
        b"Content-Transfer-Encoding: base64\n\n=A=",
        b"Content-Transfer-Encoding: x-uuencode\n\nbegin 644 x\n\xff",
        b"Content-Transfer-Encoding: \xff\n\nx",
        b"Subject: =?utf-8?B?\xff?= =?\xff?Q?x?= =?idna?Q?\xff?=\n\nx",
        b"Content-Type: multipart/mixed; boundary*=utf-7''+2AA-\n\n--\n--x",
    ],
    ids=lambda head: ascii(head[:40]),
)
def test_broken_messages_are_shown_somehow(head: bytes) -> None:
    rows, _ = render(head)
    assert rows[0].startswith("Message from bob (verified)")
    assert rows[-1].startswith(("-- end of message", "[")), "an end, or where the rest is"


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        (b"", b"a:\n"),
        (b'Content-Type: text/plain; x="', b";"),
        (b"Subject: ", b"=?a?q?"),
        (b"", b"Content-Type:multipart/x;boundary=a\n\n--a\n"),
        (b"Content-Type: multipart/x;boundary=a\n\n", b"--a\n"),
        (b"\n", "\u0301\u0316".encode()),
        (b"\n", "a\u0301\u0316\u0301\u0316".encode()),
        (b"Content-Type: text/plain; charset=punycode\n\n", b"ab-cd9"),
        *[
            (b"Content-Type: text/html\n\n", unit)
            for unit in (b"<", b"<!--", b"<a ", b"<a b='", b"</script", b"<script>", b"&#", b"<![")
        ],
    ],
    ids=ascii,
)
def test_no_message_takes_long(header: bytes, unit: bytes) -> None:
    head = (header + unit * (131_072 // len(unit)))[:131_072]
    start = time.process_time()
    render(head, False, width=500, limit=8192, lines=60)
    assert time.process_time() - start < 1
