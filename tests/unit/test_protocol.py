from __future__ import annotations

from typing import Any

import pytest
from support.dialogue import converse, make_protocol

from mda.receiver import replies
from mda.receiver.protocol import (
    HTTP_METHODS,
    NOT_SERVED,
    VERBS,
    Addressing,
    EndOfData,
    Opening,
    Verifying,
)
from mda.receiver.replies import Reply

HELLO = b"HELO client.test\r\n"
MAIL = b"MAIL FROM:<bob@example.org>\r\n"
RCPT = b"RCPT TO:<alice>\r\n"


def codes(text: bytes, **options: Any) -> list[int]:
    return converse([text], make_protocol(**options)).codes


def test_a_transaction_goes_through_in_one_piece() -> None:
    record = converse([HELLO + MAIL + RCPT + b"DATA\r\nSubject: x\r\n\r\nhi\r\n.\r\nQUIT\r\n"])
    assert record.codes == [250, 250, 250, 354, 250, 221]
    assert record.texts == [b"Subject: x\n\nhi\n"]
    assert record.is_closed


@pytest.mark.parametrize("verb", ["mail", "Send", "sOmL", "SAML"])
def test_verbs_and_their_symbols_are_read_in_any_case(verb: str) -> None:
    record = converse(
        [b"helo x\r\n" + verb.encode() + b" from:<Bob@Example.org>\r\nrcpt to:<A>\r\n"]
    )
    assert record.codes == [250, 250, 250]
    assert record.opened[0].verb == verb.upper()
    assert record.opened[0].path.text == b"Bob@Example.org"
    assert record.addressed[0].path.local_part == b"A"


def test_terminal_verbs_that_are_not_offered_get_502_and_are_not_announced() -> None:
    record = converse(
        [b"EHLO x\r\nSEND FROM:<>\r\nSOML FROM:<>\r\nSAML FROM:<>\r\n"],
        make_protocol(offers_terminals=False),
    )
    assert record.codes == [250, 502, 502, 502]
    assert b"SEND" not in record.said
    announced = converse([b"EHLO x\r\n"]).said
    assert [b"SEND" in announced, b"SOML" in announced, b"SAML" in announced] == [True] * 3


def test_mail_before_hello_is_out_of_order() -> None:
    assert codes(MAIL + RCPT + b"DATA\r\n") == [503, 503, 503]


def test_noop_and_rset_work_before_hello() -> None:
    assert codes(b"NOOP\r\nRSET\r\nNOOP ignored\r\n") == [250, 250, 250]


@pytest.mark.parametrize("verb", [b"MAIL", b"SEND", b"SOML", b"SAML"])
def test_a_second_transaction_inside_one_is_503_and_leaves_it_open(verb: bytes) -> None:
    again = verb + b" FROM:<carol>\r\n"
    assert codes(HELLO + MAIL + RCPT + again + b"DATA\r\n") == [250, 250, 250, 503, 354]


def test_hello_ends_an_open_transaction_and_a_refused_one_does_not() -> None:
    assert codes(HELLO + MAIL + RCPT + HELLO + b"DATA\r\n")[-1] == 503
    assert codes(HELLO + MAIL + RCPT + b"HELO\r\nHELO a b\r\nDATA\r\n")[-3:] == [501, 501, 354]


def test_bad_arguments_lose_no_accepted_recipient() -> None:
    spoilt = b"RCPT TO:<al ice>\r\nRCPT TO:<>\r\nDATA now\r\nMAIL FROM:<x>\r\nWHAT\r\n"
    assert codes(HELLO + MAIL + RCPT + spoilt + b"DATA\r\n")[3:] == [501, 501, 501, 503, 500, 354]


def test_data_needs_an_accepted_recipient_and_rcpt_is_possible_after_it() -> None:
    def refuse_carol(event: object) -> Reply:
        is_carol = isinstance(event, Addressing) and event.path.local_part == b"carol"
        return Reply(550, "5.1.1", "No such user here") if is_carol else replies.OK

    record = converse(
        [HELLO + MAIL + b"DATA\r\nRCPT TO:<carol>\r\nDATA\r\n" + RCPT + b"DATA\r\n"],
        answer=refuse_carol,
    )
    assert record.codes == [250, 250, 503, 550, 503, 250, 354]


@pytest.mark.parametrize("final", [replies.OK, Reply(451, "4.3.0", "no")])
def test_after_end_of_data_the_buffers_are_empty(final: Reply) -> None:
    def answer(event: object) -> Reply:
        return final if isinstance(event, EndOfData) else replies.OK

    record = converse([HELLO + MAIL + RCPT + b"DATA\r\n.\r\n" + RCPT + b"DATA\r\n"], answer=answer)
    assert record.codes[-3:] == [final.code, 503, 503]


def test_a_refused_sender_opens_nothing() -> None:
    def refuse(event: object) -> Reply:
        return replies.TOO_LARGE if isinstance(event, Opening) else replies.OK

    assert converse([HELLO + MAIL + RCPT], answer=refuse).codes == [250, 552, 503]


def test_nothing_behind_quit_is_executed_or_answered() -> None:
    record = converse([HELLO + MAIL + RCPT + b"QUIT\r\nNOOP\r\nDATA\r\n", b"NOOP\r\n"])
    assert record.codes == [250, 250, 250, 221]


def test_lmtp_knows_lhlo_and_no_other_hello() -> None:
    assert codes(b"HELO x\r\nEHLO x\r\nLHLO x\r\n", is_lmtp=True) == [500, 500, 250]
    assert codes(b"LHLO x\r\n") == [500]


@pytest.mark.parametrize("line", [b"DATA x", b"RSET x", b"QUIT x"])
def test_verbs_without_argument_refuse_one(line: bytes) -> None:
    assert codes(HELLO + MAIL + RCPT + line + b"\r\nDATA\r\n")[-2:] == [501, 354]


@pytest.mark.parametrize("line", [b"DATA ", b"RSET\t ".replace(b"\t", b" "), b"QUIT  "])
def test_trailing_white_space_is_no_argument(line: bytes) -> None:
    assert codes(HELLO + MAIL + RCPT + line + b"\r\n")[-1] in (354, 250, 221)


def test_one_or_more_spaces_may_stand_before_an_argument_and_after_the_colon() -> None:
    record = converse([b"HELO   x\r\nMAIL   FROM: <bob>\r\nRCPT  TO:  <alice>\r\n"])
    assert record.codes == [250, 250, 250]


@pytest.mark.parametrize(
    "line",
    [
        b"MAIL",
        b"MAIL bob@example.org",
        b"MAIL FROM:<bob",
        b"MAIL FROM:<bob>x",
        b"MAIL FROM:<bob> SIZE=",
        b"MAIL FROM:<bob> SIZE=big",
        b"MAIL FROM:<bob> BODY=9BIT",
        b"MAIL FROM:<bob> SIZE=1 SIZE=2",
        b"MAIL FROM:<bob> SMTPUTF8=yes",
        b"MAIL FROM:<bob> SIZE=1\nBODY=7BIT",
        b"MAIL FROM:<bob> \x0b",
        b"MAIL FROM:<bo\xe9b>",
        b"MAIL FROM:<bo\x07b>",
        b"MAIL FROM:<@a,b:bob@c>",
    ],
)
def test_a_bad_reverse_path_or_parameter_is_501(line: bytes) -> None:
    assert codes(HELLO + line + b"\r\n") == [250, 501]


def test_parameters_that_are_known_pass_and_others_are_555() -> None:
    assert codes(HELLO + b"MAIL FROM:<bob> SIZE=1000 BODY=8BITMIME\r\n") == [250, 250]
    assert codes(HELLO + b"MAIL FROM:<bob> RET=FULL\r\n") == [250, 555]
    assert codes(HELLO + MAIL + b"RCPT TO:<alice> NOTIFY=NEVER\r\n") == [250, 250, 555]


def test_an_unknown_or_empty_or_eight_bit_command_is_500_and_the_session_goes_on() -> None:
    assert codes(b"\r\nWHAT\r\n\xff\xfe\r\nHELO\x00x\r\nNOOP\r\n") == [500, 500, 500, 500, 250]


def test_only_crlf_ends_a_command() -> None:
    assert codes(b"NOOP\nNOOP\rNOOP\r\nNOOP\r\n") == [500, 250]


@pytest.mark.parametrize("size", [510, 511, 5000])
def test_a_command_line_beyond_the_limit_gets_one_500(size: int) -> None:
    line = b"NOOP " + b"x" * (size - 5) + b"\r\n"
    expected = [250, 250] if len(line) <= 512 else [500, 250]
    assert codes(line + b"NOOP\r\n") == expected
    bytewise = [(line + b"NOOP\r\n")[at : at + 1] for at in range(len(line) + 6)]
    assert converse(bytewise).codes == expected


def test_an_overlong_line_costs_no_memory() -> None:
    protocol = make_protocol()
    for _ in range(1000):
        protocol.feed(b"x" * 10_000)
        protocol.next_event()
    assert len(protocol._buffer) < 20_000


def test_every_verb_of_the_table_has_exactly_one_reply() -> None:
    for verb in VERBS:
        record = converse([verb + b"\r\n"])
        assert len(record.codes) == 1, verb


def test_the_enhanced_code_stands_on_every_reply_but_hello_and_354() -> None:
    said = converse([b"EHLO x\r\n" + MAIL + RCPT + b"WHAT\r\nDATA\r\n.\r\nRSET\r\nQUIT\r\n"]).said
    keywords = {"PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "CHUNKING"}
    keywords |= {"EXPN", "HELP", "SEND", "SOML", "SAML"}
    for line in said.decode().splitlines():
        has_code = line[4:].startswith(f"{line[0]}.")
        is_exempt = line.startswith("354") or line[4:].split()[0] in keywords | {"mda.test"}
        assert has_code != is_exempt, line


@pytest.mark.parametrize(
    "line", [b"MAIL FROM:bob@example.org", b"MAIL FROM: <bob>", b"MAIL FROM: bob SIZE=1"]
)
def test_what_everyone_tolerates_is_501_under_strict_syntax(line: bytes) -> None:
    assert codes(HELLO + line + b"\r\n") == [250, 250]
    assert codes(HELLO + line + b"\r\n", strict_syntax=True) == [250, 501]
    to = line.replace(b"MAIL FROM", b"RCPT TO").replace(b" SIZE=1", b"") + b"\r\n"
    assert codes(HELLO + MAIL + to)[-1] == 250
    assert codes(HELLO + MAIL + to, strict_syntax=True)[-1] == 501


@pytest.mark.parametrize("to", [b"bob,carol", b"", b" ", b"bob>", b"@x:bob@y>"])
def test_a_bare_path_is_still_a_path(to: bytes) -> None:
    assert codes(HELLO + MAIL + b"RCPT TO:" + to + b"\r\n")[-1] == 501


def test_a_path_is_accepted_to_the_cap_and_not_beyond() -> None:
    def said(size: int, limit: int) -> int:
        line = b"RCPT TO:<%b>\r\n" % (b"a" * (size - 2))
        return codes(HELLO + MAIL + line, path=limit)[-1]

    assert [said(256, 256), said(257, 256), said(400, 400), said(401, 400)] == [250, 501] * 2
    sender = b"MAIL FROM:<%b@x>\r\n" % (b"a" * 300)
    assert codes(HELLO + sender, path=256) == [250, 501]


def test_an_address_beyond_ascii_needs_smtputf8() -> None:
    record = converse([HELLO + "MAIL FROM:<zoë@bücher.example>\r\n".encode()])
    assert record.codes == [250, 553]
    assert b"553 5.6.7 " in record.said
    assert codes(HELLO + MAIL + "RCPT TO:<zoë>\r\n".encode())[-1] == 553
    utf8 = "MAIL FROM:<zoë@bücher.example> SMTPUTF8\r\nRCPT TO:<zoë>\r\n".encode()
    record = converse([HELLO + utf8])
    assert record.codes == [250, 250, 250]
    assert record.opened[0].is_utf8
    assert record.addressed[0].path.local_part == "zoë".encode()


def test_smtputf8_ends_with_its_transaction() -> None:
    utf8 = b"MAIL FROM:<bob> SMTPUTF8\r\n"
    to = "RCPT TO:<zoë>\r\n".encode()
    assert codes(HELLO + utf8 + b"RSET\r\n" + MAIL + to)[-1] == 553


@pytest.mark.parametrize("name", [b"zo\xeb", b"\xc3", "a\u0085b".encode(), "a\u202eb".encode()])
def test_what_is_no_text_is_no_path_even_with_smtputf8(name: bytes) -> None:
    utf8 = b"MAIL FROM:<bob> SMTPUTF8\r\n"
    assert codes(HELLO + utf8 + b"RCPT TO:<%b>\r\n" % name)[-1] == 501


@pytest.mark.parametrize("verb", [b"VRFY", b"EXPN"])
def test_who_may_ask_is_answered_before_hello_and_changes_nothing(verb: bytes) -> None:
    def answer(event: object) -> Reply:
        return Reply(250, "2.1.5", "yes") if isinstance(event, Verifying) else replies.OK

    record = converse([verb + b" alice\r\n"], answer=answer)
    assert record.said == b"250 2.1.5 yes\r\n"
    between = HELLO + MAIL + RCPT + verb + b" alice\r\nDATA\r\n"
    assert converse([between], answer=answer).codes == [250, 250, 250, 250, 354]


@pytest.mark.parametrize(
    ("vrfy", "vrfy_code", "expn_code"),
    [("local", 252, 550), ("networks", 252, 550), ("nobody", 252, 252)],
)
def test_who_may_not_ask_gets_the_same_for_every_name(
    vrfy: str, vrfy_code: int, expn_code: int
) -> None:
    def never(event: object) -> Reply:
        raise AssertionError(f"{event} was asked")

    text = b"VRFY alice\r\nVRFY nobody-here\r\nEXPN alice\r\nEXPN nobody-here\r\n"
    protocol = make_protocol(offers_names=False, vrfy=vrfy)
    record = converse([text], protocol, never)
    assert record.codes == [vrfy_code, vrfy_code, expn_code, expn_code]
    first, second, third, fourth = record.said.splitlines()
    assert (first, third) == (second, fourth)
    assert (b"Access Denied to You" in third) == (vrfy != "nobody")


def test_who_may_not_ask_is_not_told_of_expn() -> None:
    said = converse([b"EHLO x\r\nHELP\r\n"], make_protocol(offers_names=False)).said
    assert b"EXPN" not in said
    assert b"HELP" in said


@pytest.mark.parametrize("verb", [b"VRFY", b"EXPN"])
def test_a_question_without_a_name_or_with_a_bad_one_is_501(verb: bytes) -> None:
    for string in (b"", b" ", b" SMTPUTF8", b" a\x07b", b" zo\xeb", " zoë".encode()):
        assert codes(verb + string + b"\r\n") == [501], string
        assert codes(verb + string + b"\r\n", offers_names=False) == [501], string
    assert codes(verb + " zoë SMTPUTF8\r\n".encode()) == [250]


def test_help_lists_every_verb_that_is_served_on_one_screen() -> None:
    said = converse([b"HELP\r\n"], make_protocol(offers_more=True)).said.decode()
    words = said.split()
    assert {verb.decode() for verb in VERBS} - {"LHLO", "XWHO"} <= set(words)
    assert "LHLO" not in words
    assert len(said.splitlines()) <= 24
    lmtp = converse([b"HELP\r\n"], make_protocol(is_lmtp=True)).said.split()
    assert b"LHLO" in lmtp
    assert b"EHLO" not in lmtp


def test_help_explains_one_verb_in_any_case_and_no_other_word() -> None:
    for verb in VERBS:
        expected = 504 if verb in (b"LHLO", b"XWHO") else 214
        record = converse([b"help " + verb.lower() + b"\r\n"], make_protocol(offers_more=True))
        assert record.codes == [expected], verb
        if expected == 214:
            assert record.said.startswith(b"214 2.0.0 " + verb)
    assert codes(b"HELP me\r\nHELP a\x1bb\r\nHELP SEND\r\n", offers_terminals=False) == [
        504,
        501,
        504,
    ]


@pytest.mark.parametrize("verb", sorted(NOT_SERVED))
def test_a_verb_that_exists_elsewhere_is_502_and_loses_nothing(verb: bytes) -> None:
    record = converse([HELLO + MAIL + RCPT + verb + b" x\r\nDATA\r\n"])
    assert record.codes == [250, 250, 250, 502, 354]
    assert verb not in converse([b"EHLO x\r\n"]).said


@pytest.mark.parametrize("verb", sorted(HTTP_METHODS))
def test_a_web_browser_is_sent_away(verb: bytes) -> None:
    request = verb + b" / HTTP/1.1\r\nHost: x\r\n\r\n"
    record = converse([request + HELLO + MAIL + RCPT, b"NOOP\r\n"])
    assert record.codes == [421]
    assert record.is_closed


@pytest.mark.parametrize("verb", [b"NOOP", b"HELP"])
def test_a_text_with_control_characters_is_501(verb: bytes) -> None:
    for bad in (b"\x00", b"\x1b[2J", b"\x7f", b"\xc3\xa9", b"a\nb", b"a\rb"):
        assert codes(verb + b" " + bad + b"\r\nNOOP\r\n") == [501, 250], bad


def test_bare_newlines_are_a_fault_only_where_they_are_minded() -> None:
    def answer(event: object) -> Reply:
        fault = event.fault if isinstance(event, EndOfData) else None
        return fault or replies.OK

    text = HELLO + MAIL + RCPT + b"DATA\r\na\nb\r\n.\r\nNOOP\r\n"
    assert converse([text], answer=answer).codes[-2:] == [250, 250]
    minded = converse([text], make_protocol(bare_newlines="reject"), answer)
    assert minded.codes[-2:] == [554, 250]
    good = text.replace(b"a\nb", b"a\r\nb")
    assert converse([good], make_protocol(bare_newlines="reject"), answer).codes[-2:] == [250, 250]


@pytest.mark.parametrize("size", [600, 5000])
def test_a_web_browser_is_known_by_a_long_line_too(size: int) -> None:
    request = b"POST /" + b"x" * size + b" HTTP/1.1\r\n"
    text = request + HELLO + MAIL
    bytewise = [text[at : at + 1] for at in range(len(text))]
    for pieces in ([text], [text[:550], text[550:]], bytewise):
        assert converse(pieces).codes == [421]
