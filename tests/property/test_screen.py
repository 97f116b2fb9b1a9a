"""Whatever comes in, what goes to a terminal is harmless and within its bounds."""

from __future__ import annotations

from unicodedata import east_asian_width

from hypothesis import given, settings
from hypothesis import strategies as st

from mda.content.screen import render
from mda.terminal.tty import is_safe_block

PIECES = (
    b"\n",
    b"\n\n",
    b"\r\n",
    b"Subject: ",
    b"Content-Type: ",
    b"text/plain",
    b"text/html",
    b"multipart/mixed",
    b"multipart/alternative",
    b'; boundary="b"',
    b"; charset=",
    b"utf-7",
    b"utf-16",
    b"iso-2022-jp",
    b"; name*0*=utf-7''+2AA-",
    b"; filename*=",
    b"Content-Transfer-Encoding: ",
    b"Content-Disposition: attachment",
    b"base64",
    b"quoted-printable",
    b"x-uuencode",
    b"--b",
    b"--b--",
    b"=?utf-8?B?G1sySg==?=",
    b"=?utf-8?Q?=1B=E2=80=AE?=",
    b"=1B[2J",
    b"G1sySg==",
    b"\x1b[2J",
    b"\x9b",
    b"\a",
    b"\xe2\x80\xae",
    b"\xcc\x81\xcc\x96\xcc\x81\xcc\x96",
    b"\xe6\x97\xa5",
    b"<p>",
    b"<script>",
    b"</script",
    b"&#27;",
    b"&#8238;",
    b"<![CDATA[",
    b"word ",
)
MESSAGES = st.one_of(
    st.binary(max_size=3000),
    st.text(max_size=1000).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)), max_size=60).map(b"".join),
)
NAMES = st.text(max_size=400)


@settings(max_examples=300, deadline=None)
@given(
    head=MESSAGES,
    is_whole=st.booleans(),
    sender=NAMES,
    is_verified=st.booleans(),
    via=NAMES,
    when=NAMES,
    width=st.integers(0, 600),
    lines=st.integers(1, 60),
    limit=st.integers(256, 8192),
    bell=st.booleans(),
    has_mailbox_copy=st.booleans(),
)
def test_every_block_is_safe_and_within_its_bounds(
    head: bytes,
    is_whole: bool,
    sender: str,
    is_verified: bool,
    via: str,
    when: str,
    width: int,
    lines: int,
    limit: int,
    bell: bool,
    has_mailbox_copy: bool,
) -> None:
    block, is_clipped = render(
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
    assert is_safe_block(block)
    assert len(block) <= limit
    rows = block.decode("utf-8").replace("\a", "").split("\r\n")
    assert rows[0] == rows[-1] == ""
    assert [row.startswith("Message from") for row in rows].count(True) == 1
    columns = max(sum(2 if east_asian_width(c) in "WF" else 1 for c in row) for row in rows[1:-1])
    marks = 3 * max(len(row) for row in rows)
    assert columns <= max(20, min(width, 500) - 1) + marks
    assert rows[-2].endswith(("]", "-- end of message --"))
    if not is_clipped:
        assert is_whole
        assert rows[-2] == "-- end of message --"


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["begin", "line", "end"]),
    text=st.text(max_size=600),
    sender=st.from_regex(r"[a-z_][-a-z0-9_.]{0,31}", fullmatch=True),
    width=st.integers(0, 600),
    lines=st.integers(1, 60),
    limit=st.integers(256, 8192),
)
def test_every_line_of_a_conversation_stands_behind_its_senders_name(
    kind: str, text: str, sender: str, width: int, lines: int, limit: int
) -> None:
    block, _ = render(
        f"Mda-Conversation: {kind}\n\n{text}\n".encode(),
        True,
        sender=sender,
        is_verified=True,
        via="",
        when="12:00",
        width=width,
        lines=lines,
        limit=limit,
        bell=True,
        has_mailbox_copy=False,
    )
    assert is_safe_block(block)
    assert len(block) <= limit
    rows = block.decode("utf-8").split("\r\n")
    assert rows[0] == ""
    name = sender if len(sender) < max(20, min(width, 500) - 1) // 2 else sender[:5]
    for row in rows[1:]:
        if kind == "line" and block != b"\r\n":
            assert row.startswith(name[: limit // 8 - 4])
            assert "| " in row or row.endswith("|")
        if kind == "end" and row:
            assert row.startswith(("-- end of", "| "))
    assert block.count(b"\a") == (kind == "begin")


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t"), max_size=400))
def test_nothing_in_a_line_leaves_its_margin(text: str) -> None:
    block, _ = render(
        b"\n" + text.encode("utf-8"),
        True,
        sender="bob",
        is_verified=True,
        via="",
        when="14:03",
        width=60,
        lines=20,
        limit=8192,
        bell=False,
        has_mailbox_copy=True,
    )
    rows = block.decode("utf-8").split("\r\n")
    assert rows[1] == "Message from bob (verified) at 14:03"
    assert all(row.startswith("| ") for row in rows[2:-2])
