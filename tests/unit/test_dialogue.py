"""The sender's dialogue: what it says to a hop, and what it makes of the replies."""

from __future__ import annotations

from typing import Any

import pytest

from mda.model import Outcome
from mda.outbound import dialogue
from mda.outbound.dialogue import (
    Hear,
    Lost,
    Reply,
    ReplyReader,
    Request,
    Result,
    Say,
    SayText,
    StartTls,
    outcome_of,
)

EXTENDED = ["250-hop", "250-PIPELINING", "250 8BITMIME"]


class Spoken:
    """A dialogue held with replies from a list; what was said, and what came of it."""

    def __init__(self, request: Request, *replies: str) -> None:
        self.said: list[bytes] = []
        self.waits: list[int] = []
        self.result = Result(len(request.paths))
        self._reader = ReplyReader()
        self._left = [f"{each}\r\n".encode() for each in replies]
        steps = dialogue.converse(request, self.result)
        try:
            step: Any = next(steps)
            while True:
                try:
                    reply = self._do(step)
                except Lost as lost:
                    step = steps.throw(lost)
                else:
                    step = steps.send(reply)
        except StopIteration:
            assert self._left == [], "replies that nobody has waited for"

    def _do(self, step: Say | SayText | StartTls | Hear) -> Reply | None:
        match step:
            case Say():
                self.said.append(step.octets)
            case SayText():
                self.said.append(b"TEXT")
            case StartTls():
                self.said.append(b"TLS")
            case Hear():
                self.waits.append(step.seconds)
                return self._hear()
        return None

    def _hear(self) -> Reply:
        while (reply := self._reader.next_reply()) is None:
            if not self._left:
                raise Lost(Outcome(451, "4.4.2", "gone"))
            self._reader.feed(self._left.pop(0))
        return reply

    @property
    def outcomes(self) -> list[str]:
        return [f"{each.code} {each.enhanced}" if each else "" for each in self.result.outcomes]


def request(*paths: bytes, **other: Any) -> Request:
    fields: dict[str, Any] = {"helo": "mda.test", **other}
    return Request(
        fields.pop("verb", "MAIL"), b"bob@mda.test", list(paths or (b"a@far",)), **fields
    )


def test_one_command_at_a_time_where_nothing_else_is_offered() -> None:
    spoken = Spoken(
        request(b"a@far", b"b@far"),
        "220 hop", "500 what?", "250 hop", "250 ok", "251 will forward", "550 5.1.1 no", "354 go",
        "250 2.0.0 kept", "221 bye",
    )  # fmt: skip
    assert spoken.said == [
        b"EHLO mda.test\r\n",
        b"HELO mda.test\r\n",
        b"MAIL FROM:<bob@mda.test>\r\n",
        b"RCPT TO:<a@far>\r\n",
        b"RCPT TO:<b@far>\r\n",
        b"DATA\r\n",
        b"TEXT",
        b"QUIT\r\n",
    ]
    assert spoken.outcomes == ["250 2.0.0", "550 5.1.1"]
    assert spoken.waits == [300, 300, 300, 300, 300, 300, 120, 600, 30]


def test_the_envelope_goes_out_at_once_where_pipelining_is_offered() -> None:
    spoken = Spoken(
        request(b"a@far", b"b@far", has_8bit=True, size=77),
        "220 hop", *EXTENDED[:2], "250-SIZE 1000", "250 8bitmime", "250 ok", "250 ok", "450 no",
        "354 go", "250 kept", "221 bye",
    )  # fmt: skip
    assert spoken.said[1:] == [
        (
            b"MAIL FROM:<bob@mda.test> SIZE=77 BODY=8BITMIME\r\n"
            b"RCPT TO:<a@far>\r\nRCPT TO:<b@far>\r\nDATA\r\n"
        ),
        b"TEXT",
        b"QUIT\r\n",
    ]
    assert spoken.outcomes == ["250 2.0.0", "450 4.0.0"]


def test_a_text_that_is_waited_for_although_nobody_gets_it_is_empty() -> None:
    """RFC 2920 3.1."""
    spoken = Spoken(
        request(), "220 hop", *EXTENDED, "250 ok", "550 no", "354 go", "554 no recipients", "221 x"
    )
    assert spoken.said[2:] == [b".\r\n", b"QUIT\r\n"]
    assert spoken.outcomes == ["550 5.0.0"]


def test_a_reverse_path_that_is_refused_is_everybodys_outcome() -> None:
    for extended in ([], EXTENDED):
        hello = extended or ["250 hop"]
        more = ["503 no", "503 no"] if extended else []
        spoken = Spoken(request(), "220 hop", *hello, "550 5.7.1 not you", *more, "221 bye")
        assert spoken.outcomes == ["550 5.7.1"]
        assert b"TEXT" not in spoken.said


@pytest.mark.parametrize(
    ("verb", "listed", "said", "outcome"),
    [
        ("SEND", True, b"SEND", "250 2.0.0"),
        ("SOML", True, b"SOML", "250 2.0.0"),
        ("SAML", False, b"MAIL", "250 2.0.0"),
        ("SOML", False, b"MAIL", "250 2.0.0"),
    ],
)
def test_terminals_are_asked_for_where_they_are_listed(
    verb: str, listed: bool, said: bytes, outcome: str
) -> None:
    hello = ["250-hop", f"250 {verb}"] if listed else ["250 hop"]
    spoken = Spoken(
        request(verb=verb), "220 hop", *hello, "250 ok", "250 ok", "354 go", "250 kept", "221 bye"
    )
    assert spoken.said[1] == said + b" FROM:<bob@mda.test>\r\n"
    assert spoken.outcomes == [outcome]


def test_send_never_becomes_mail() -> None:
    spoken = Spoken(request(verb="SEND"), "220 hop", "250 hop", "221 bye")
    assert spoken.said[1:] == [b"QUIT\r\n"]
    assert spoken.outcomes == ["554 5.3.3"]


def test_what_is_too_large_or_needs_utf8_is_not_even_offered() -> None:
    large = Spoken(request(size=2000), "220 hop", "250-hop", "250 SIZE 1000", "221 bye")
    assert (large.said[1:], large.outcomes) == ([b"QUIT\r\n"], ["552 5.3.4"])
    wide = Spoken(request("\u00e9@far".encode(), is_utf8=True), "220 hop", "250 hop", "221 bye")
    assert (wide.said[1:], wide.outcomes) == ([b"QUIT\r\n"], ["550 5.6.7"])


@pytest.mark.parametrize("code", ["452", "552"])
def test_too_many_recipients_get_a_transaction_of_their_own(code: str) -> None:
    """RFC 821 Appendix F, scenario 10; RFC 5321 4.5.3.1.10."""
    spoken = Spoken(
        request(b"a@far", b"b@far"),
        "220 hop", "250 hop", "250 ok", "250 ok", f"{code} too many", "354 go", "250 kept", "221 x",
    )  # fmt: skip
    assert spoken.result.leftover == [1]
    assert spoken.outcomes == ["250 2.0.0", "452 4.5.3"]


def test_the_first_recipient_refused_with_552_is_refused() -> None:
    spoken = Spoken(request(), "220 hop", "250 hop", "250 ok", "552 5.2.2 full", "221 bye")
    assert (spoken.result.leftover, spoken.outcomes) == ([], ["552 5.2.2"])


@pytest.mark.parametrize(
    ("replies", "outcome"),
    [
        (["250 ok", "354 what"], "451 4.5.0"),
        (["250 ok", "150 what"], "451 4.5.0"),
        (["354 what", "221 bye"], "451 4.5.0"),
        (["250 ok", "250 ok", "250 no text wanted"], "451 4.5.0"),
        (["250 ok", "250 ok", "354 go", "354 again"], "451 4.5.0"),
        (["250 ok", "250 ok", "354 go", "421 4.3.2 down"], "421 4.3.2"),
        (["250 ok", "250 ok", "354 go"], "451 4.4.2"),
    ],
)
def test_a_reply_out_of_place_is_a_failure_for_now(replies: list[str], outcome: str) -> None:
    """RFC 821 4.4."""
    is_told_goodbye = outcome == "451 4.5.0" and replies[-1] != "221 bye"
    goodbye = ["221 bye"] if is_told_goodbye else []
    spoken = Spoken(request(), "220 hop", "250 hop", *replies, *goodbye)
    assert spoken.outcomes == [outcome]


@pytest.mark.parametrize(
    "replies", [[], ["554 go away"], ["220 hop", "421 no"], ["220 hop", "550 x", "550 y"]]
)
def test_a_hop_that_does_not_greet_has_failed_as_a_hop(replies: list[str]) -> None:
    spoken = Spoken(request(), *replies)
    assert spoken.result.failure is not None
    assert spoken.result.failure.is_temporary
    assert spoken.outcomes == [""]


@pytest.mark.parametrize(
    ("replies", "failure"),
    [
        ([], "451 4.4.2"),
        (["250 ok"], "451 4.4.2"),
        (["250 ok", "nonsense"], "451 4.5.0"),
        (["250 ok", "250 ok"], "451 4.4.2"),
        (["421 4.3.2 down"], "421 4.3.2"),
        (["250 ok", "421 4.3.2 down"], "421 4.3.2"),
    ],
)
def test_a_hop_that_is_lost_before_the_text_leaves_it_to_another(
    replies: list[str], failure: str
) -> None:
    """RFC 5321 5.1: the next address is to be tried, and nobody can have the message twice."""
    result = Spoken(request(), "220 hop", "250 hop", *replies).result
    assert result.failure is not None
    assert f"{result.failure.code} {result.failure.enhanced}" == failure
    assert result.outcomes == [None]


def test_lmtp_has_a_reply_for_each_and_needs_lhlo() -> None:
    spoken = Spoken(
        request(b"a", b"b", is_lmtp=True, parameters=[b"XPLACE=ff", b""]),
        "220 hop", "250 hop", "250 ok", "250 ok", "250 ok", "354 go", "250 2.0.0 x", "452 4.2.2 y",
        "221 bye",
    )  # fmt: skip
    assert spoken.said[:1] == [b"LHLO mda.test\r\n"]
    assert spoken.said[2] == b"RCPT TO:<a> XPLACE=ff\r\n"
    assert spoken.outcomes == ["250 2.0.0", "452 4.2.2"]


def test_tls_comes_first_and_what_was_said_before_counts_for_nothing() -> None:
    spoken = Spoken(
        request(tls="may", size=5),
        "220 hop", "250-hop", "250-SIZE 1", "250 STARTTLS", "220 go", "250 hop", "250 ok", "250 ok",
        "354 go", "250 kept", "221 bye",
    )  # fmt: skip
    assert spoken.said[1:4] == [b"STARTTLS\r\n", b"TLS", b"EHLO mda.test\r\n"]
    assert spoken.outcomes == ["250 2.0.0"]


def test_tls_that_is_demanded_and_not_offered_fails_the_hop() -> None:
    spoken = Spoken(request(tls="must"), "220 hop", "250 hop")
    assert spoken.result.failure == dialogue.NO_TLS


@pytest.mark.parametrize(
    "path",
    [
        b"a\r\nRSET@far",
        b"a b@far",
        b"x" * 600,
        b"a\x7f@far",
        b'"a"> NOTIFY=NEVER "b"@x',
        b"a>b<c@x",
        b'"a@x',
        b"\xff@x",
        b"",
    ],
)
def test_a_path_that_no_command_can_hold_is_never_said(path: bytes) -> None:
    spoken = Spoken(
        request(path, b"b@far"),
        "220 hop", "250 hop", "250 ok", "250 ok", "354 go", "250 kept", "221 bye",
    )  # fmt: skip
    assert spoken.outcomes == ["553 5.1.3", "250 2.0.0"]
    assert [each for each in spoken.said if each.startswith(b"RCPT")] == [b"RCPT TO:<b@far>\r\n"]


def test_a_reply_is_read_however_it_is_cut() -> None:
    octets = b"250-2.1.0 one\r\n250 two\x1b\xff\r\n"
    reader = ReplyReader()
    found = []
    for octet in octets:
        reader.feed(bytes([octet]))
        found.append(reader.next_reply())
    assert [each for each in found[:-1] if each] == []
    last = found[-1]
    assert last is not None
    assert (last.code, last.lines) == (250, ["2.1.0 one", "two??"])
    outcome = outcome_of(last)
    assert (outcome.enhanced, outcome.text) == ("2.1.0", "one two??")


def test_the_enhanced_code_is_taken_off_every_line() -> None:
    outcome = outcome_of(Reply(550, ["5.1.1 No such", "5.1.1 user here"]))
    assert (outcome.enhanced, outcome.text) == ("5.1.1", "No such user here")


def test_replies_are_bounded() -> None:
    for flood in (b"2" * 10_000, b"250 " + b"x" * 10_000 + b"\r\n", b"250-x\r\n" * 300):
        reader = ReplyReader()
        reader.feed(flood)
        with pytest.raises(Lost):
            reader.next_reply()


@pytest.mark.parametrize(
    ("is_lmtp", "replies"),
    [(False, ["550 no", "250 ok", "354 go"]), (True, ["250 ok", "550 no", "354 go"])],
)
def test_no_empty_text_goes_where_it_could_be_delivered(is_lmtp: bool, replies: list[str]) -> None:
    spoken = Spoken(request(is_lmtp=is_lmtp), "220 hop", *EXTENDED, *replies)
    assert spoken.outcomes == ["550 5.0.0"]
    assert len(spoken.said) == 2


def test_what_is_left_over_waits_where_the_channel_is_lost() -> None:
    spoken = Spoken(
        request(b"a@far", b"b@far"), "220 hop", "250 hop", "250 ok", "250 ok", "452 many", "354 go"
    )
    assert (spoken.result.leftover, spoken.outcomes) == ([], ["451 4.4.2", "452 4.5.3"])
