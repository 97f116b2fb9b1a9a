from __future__ import annotations

import pytest
from support.dialogue import converse, make_protocol

from mda.receiver import replies
from mda.receiver.protocol import VERBS, Addressing, EndOfData, Opening
from mda.receiver.replies import Reply

HELLO = b"HELO client.test\r\n"
MAIL = b"MAIL FROM:<bob@example.org>\r\n"
RCPT = b"RCPT TO:<alice>\r\n"


def codes(text: bytes, **options: bool) -> list[int]:
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
    spoilt = b"RCPT TO:alice\r\nRCPT TO:<>\r\nDATA now\r\nMAIL FROM:<x>\r\nWHAT\r\n"
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
        b"MAIL FROM:bob@example.org",
        b"MAIL FROM:<bob",
        b"MAIL FROM:<bob>x",
        b"MAIL FROM:<bob> SIZE=",
        b"MAIL FROM:<bob> SIZE=big",
        b"MAIL FROM:<bob> BODY=9BIT",
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
    keywords = {"PIPELINING", "SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "SEND", "SOML", "SAML"}
    for line in said.decode().splitlines():
        has_code = line[4:].startswith(f"{line[0]}.")
        is_exempt = line.startswith("354") or line[4:].split()[0] in keywords | {"mda.test"}
        assert has_code != is_exempt, line
