"""Whatever is said, in whatever pieces: one reply a command, in order, with a code of its row."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dialogue import answer_from, converse, cut, make_protocol
from support.sandbox import Sandbox
from support.sequences import attribute
from support.serving import LMTP, SMTP, connect, served

from mda.receiver import replies

LINES = st.sampled_from(
    [
        b"HELO x",
        b"EHLO x",
        b"LHLO x",
        b"HELO",
        b"MAIL FROM:<bob@x>",
        b"MAIL FROM:<bob@x> SIZE=99999999999",
        "mail from: <björn@x> smtputf8".encode(),
        b"SEND FROM:<>",
        b"SOML FROM:<@a,@b:c@d>",
        b"SAML FROM:bob",
        b"RCPT TO:<alice>",
        b"RCPT TO:carol",
        b"RCPT TO:<nobody-here>",
        b"RCPT TO:<alice@far.example>",
        b"RCPT TO:<>",
        "RCPT TO:<zoë>".encode(),
        b"MAIL FROM:<bob@x> SMTPUTF8",
        "RCPT TO:<a@[1.1.1.1].\u05d0>".encode(),
        b"DATA",
        b"DATA now",
        b".",
        b"..",
        b"a\n.\nb\r.\rc",
        b"RSET",
        b"NOOP",
        b"NOOP \x1b",
        b"HELP",
        b"HELP data",
        b"HELP what",
        b"VRFY alice",
        b"VRFY nobody-here",
        b"EXPN alice",
        b"EXPN",
        b"TURN",
        b"TURN x",
        b"STARTTLS",
        b"XCLIENT ADDR=192.0.2.1",
        b"XCLIENT \xff",
        b"MAIL FROM:<bob@x> RET=HDRS ENVID=a+2B",
        b"RCPT TO:<alice> NOTIFY=NEVER ORCPT=rfc822;x",
        b"RCPT TO:<alice> NOTIFY=,\xff ORCPT=+",
        b"BDAT 0 LAST",
        b"BDAT 9999999",
        b"BDAT 5 LAST",
        b"XWHO",
        b"QUIT now",
        b"QUIT",
        b"",
        b"\x00",
        b"x" * 600,
        b"NOOP " + b"x" * 5000,
    ]
)
# Sessions that get as far as the text come up often enough by these.
WORDS = st.one_of(
    LINES.map(lambda line: line + b"\r\n"),
    st.sampled_from(
        [
            b"HELO x\r\nMAIL FROM:<bob@x>\r\nRCPT TO:<alice>\r\n",
            b"RCPT TO:<alice>\r\nRCPT TO:<carol>\r\nDATA\r\nhi\r\n",
            b"DATA\r\n..x\r\n.\r\n",
        ]
    ),
    st.binary(max_size=12),
)
SESSIONS = st.lists(WORDS, max_size=25).map(b"".join)
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@given(
    SESSIONS,
    PLACES,
    st.lists(st.integers(0, 100), min_size=1, max_size=20),
    st.sampled_from(["accept", "reject"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_protocol_answers_each_command_once_and_in_order(
    octets: bytes,
    places: list[int],
    choices: list[int],
    bare_newlines: str,
    offers_names: bool,
    strict_syntax: bool,
    offers_more: bool,
) -> None:
    protocol = make_protocol(
        offers_names=offers_names,
        bare_newlines=bare_newlines,
        strict_syntax=strict_syntax,
        offers_more=offers_more,
    )
    answer = answer_from(itertools.cycle(choices))
    record = converse(cut(octets, places), protocol, answer, has_tls=False)
    greeting = replies.greeting("mda.test").render()
    assert attribute(octets, greeting + record.said)[0] == ("CONNECTION", 220)


@pytest.fixture(scope="module")
def listening(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """A real daemon on Unix sockets, whose sessions end neither by errors nor by junk."""
    limits = "[receiver]\nerrors = 1000\njunk_commands = 1000\n"
    config = shared_sandbox.configure(limits)
    places = ["--listen", f"unix:{SMTP}", "--listen", f"lmtp+unix:{LMTP}", "--config", config]
    with served(shared_sandbox, *places):
        yield shared_sandbox
    shared_sandbox.clear_mail()


@given(octets=SESSIONS, places=PLACES, is_lmtp=st.booleans())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_real_daemon_answers_each_command_once_and_in_order(
    listening: Sandbox, octets: bytes, places: list[int], is_lmtp: bool
) -> None:
    said = b""
    with connect(listening, LMTP if is_lmtp else SMTP, "bob") as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in cut(octets, places):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65_536):
                said += more
    assert attribute(octets, said, is_lmtp=is_lmtp)[0] == ("CONNECTION", 220)
