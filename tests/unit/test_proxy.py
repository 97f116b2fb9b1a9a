"""PROXY headers and XCLIENT: from peers that are named, and nothing from others."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sandbox import Sandbox
from support.serving import Served, served

from mda.receiver.proxy import ProxyError, read_xclient, take_header

PROXIED = '[receiver]\nproxy_peers = ["127.0.0.0/8"]\nrelay_networks = ["192.0.2.0/24"]\n'
XCLIENT = '[receiver]\nxclient_peers = ["127.0.0.0/8"]\nrelay_networks = ["192.0.2.0/24"]\n'
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n"


def v2(address: str = "192.0.2.7", *, command: int = 0x21, more: bytes = b"") -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    body = packed + packed + struct.pack(">HH", 4711, 25) + more
    kind = 0x11 if family == socket.AF_INET else 0x21
    return SIGNATURE + bytes([command, kind]) + struct.pack(">H", len(body)) + body


@pytest.fixture
def proxied(sandbox: Sandbox) -> Iterator[Served]:
    file = sandbox.configure(PROXIED)
    with served(sandbox, "--config", file, "--listen", "127.0.0.1:0") as daemon:
        yield daemon


def converse(daemon: Served, octets: bytes, *, gap: float = 0.0) -> bytes:
    """All that is said to `octets`, which are sent one by one where there is a gap."""
    said = b""
    with (
        socket.create_connection(("127.0.0.1", daemon.port), 20) as client,
        contextlib.suppress(ConnectionError),
    ):
        for piece in [octets] if not gap else [octets[:20], octets[20:]]:
            client.sendall(piece)
            time.sleep(gap)
        client.shutdown(socket.SHUT_WR)
        while more := client.recv(65_536):
            said += more
    return said


RELAY = b"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<x@far.example>\r\nRCPT TO:<alice>\r\n"
RELAY += b"DATA\r\nhi\r\n.\r\nQUIT\r\n"


@pytest.mark.parametrize(
    ("header", "may_relay"),
    [
        (V1, True),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 25\r\n", False),
        (b"PROXY UNKNOWN\r\n", False),
        (b"PROXY UNKNOWN ffff:f...f:ffff 65535 65535\r\n", False),
        (v2(), True),
        (v2("198.51.100.7"), False),
        (v2("2001:db8::7"), False),
        (v2(more=b"\x03\x00\x04abcd"), True),
        (v2(command=0x20), False),
    ],
)
def test_the_client_that_the_header_names_counts(
    sandbox: Sandbox, proxied: Served, header: bytes, may_relay: bool
) -> None:
    said = converse(proxied, header + RELAY)
    assert said.startswith(b"220 mda.test ESMTP")
    assert (b"\r\n550 5.7.1 Mailbox" not in said) == may_relay, said
    kept = (sandbox.mailbox("alice") or b"").decode()
    if may_relay:
        assert "Received: from x ([192.0.2.7])" in kept


def test_a_header_may_come_in_pieces(proxied: Served) -> None:
    for header in (V1, v2()):
        assert b"\r\n550 5.7.1" not in converse(proxied, header + RELAY, gap=0.2)


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO x\r\n", b"PROXY\r\n", b"PROXY TCP4 192.0.2.7 198.51.100.1 4711\r\n",
        b"PROXY TCP4 192.0.2.300 198.51.100.1 4711 25\r\n",
        b"PROXY TCP4 2001:db8::7 198.51.100.1 4711 25\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 65536\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 25\r\n", b"PROXY TCP5 a b 1 2\r\n",
        b"PROXY " + b"x" * 200, b"PROXY TCP4  192.0.2.7 198.51.100.1 4711 25\r\n",
        SIGNATURE + b"\x31\x11\0\0", SIGNATURE + b"\x21\x11\xff\xff",
        SIGNATURE + b"\x21\x11\0\x02ab",
        SIGNATURE + b"\x21\x31\0\x04abcd", SIGNATURE + b"\x2f\x11\0\0", b"\0", b"",
        b"proxy TCP4 192.0.2.7 198.51.100.1 4711 25\r\n",
    ],
)  # fmt: skip
def test_without_a_good_header_nothing_is_said(proxied: Served, octets: bytes) -> None:
    assert converse(proxied, octets) == b""


def test_who_says_nothing_is_closed_after_five_seconds(proxied: Served) -> None:
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", proxied.port), 20) as client:
        for octet in b"PROXY ":
            client.sendall(bytes([octet]))
            time.sleep(0.3)
        assert client.recv(100) == b""
    assert 4 < time.monotonic() - begin < 9


def test_from_others_it_is_an_unknown_command(sandbox: Sandbox) -> None:
    file = sandbox.configure(PROXIED.replace("127.0.0.0/8", "192.0.2.0/24"))
    with served(sandbox, "--config", file, "--listen", "127.0.0.1:0") as daemon:
        said = converse(daemon, V1 + b"XCLIENT ADDR=192.0.2.7\r\n" + RELAY)
    replies = said.split(b"\r\n")
    assert [each[:9] for each in replies[1:3]] == [b"502 5.5.1"] * 2
    assert b"\r\n550 5.7.1 Mailbox" in said


@pytest.fixture
def filtered(sandbox: Sandbox) -> Iterator[Served]:
    file = sandbox.configure(XCLIENT)
    with served(sandbox, "--config", file, "--listen", "127.0.0.1:0") as daemon:
        yield daemon


def dialogue(daemon: Served, *lines: bytes) -> list[bytes]:
    """The last line of each reply; each line waits for the one before."""
    said = []
    with (
        socket.create_connection(("127.0.0.1", daemon.port), 20) as client,
        client.makefile("rb") as replies,
    ):
        for line in (b"", *lines):
            client.sendall(line)
            while (reply := replies.readline())[3:4] == b"-":
                continue
            said.append(reply.rstrip())
    return said


def test_xclient_begins_the_session_anew_for_another(sandbox: Sandbox, filtered: Served) -> None:
    said = dialogue(
        filtered,
        b"EHLO a\r\n",
        b"XCLIENT NAME=client.example ADDR=192.0.2.7 HELO=client PROTO=ESMTP LOGIN=me\r\n",
        b"MAIL FROM:<a@b>\r\n",
        b"EHLO b\r\n",
        b"MAIL FROM:<a@b>\r\n",
        b"RCPT TO:<x@far.example>\r\n",
        b"RCPT TO:<alice>\r\n",
        b"DATA\r\n",
        b"Subject: x\r\n\r\nhi\r\n.\r\n",
    )
    assert [each[:3] for each in said] == [
        b"220", b"250", b"220", b"503", b"250", b"250", b"250", b"250", b"354", b"250",
    ]  # fmt: skip
    assert "Received: from b ([192.0.2.7])" in (sandbox.mailbox("alice") or b"").decode()


def test_xclient_may_take_rights_away_and_be_said_again(filtered: Served) -> None:
    said = dialogue(
        filtered,
        b"XCLIENT ADDR=192.0.2.7\r\n",
        b"XCLIENT ADDR=IPV6:2001:db8::7\r\n",
        b"EHLO b\r\n",
        b"MAIL FROM:<a@b>\r\n",
        b"RCPT TO:<x@far.example>\r\n",
        b"XCLIENT ADDR=192.0.2.7\r\n",
    )
    assert [each[:3] for each in said] == [b"220", b"220", b"220", b"250", b"250", b"550", b"503"]


@pytest.mark.parametrize(
    "argument",
    [
        "",
        "ADDR",
        "ADDR=",
        "ADDR=x",
        "ADDR=300.1.1.1",
        "FOO=1",
        "ADDR=192.0.2.7 x",
        "=1",
        "ADDR=[1]",
    ],
)
def test_a_bad_attribute_changes_nothing(filtered: Served, argument: str) -> None:
    said = dialogue(filtered, f"XCLIENT {argument}\r\n".encode(), b"NOOP\r\n")
    assert [each[:3] for each in said] == [b"220", b"501", b"250"]


def test_it_is_offered_to_whom_it_is_for(sandbox: Sandbox, filtered: Served) -> None:
    assert b"\r\n250 XCLIENT NAME ADDR PORT PROTO HELO" in converse(filtered, b"EHLO x\r\nQUIT\r\n")
    with served(sandbox, "--listen", "127.0.0.1:0") as daemon:
        assert b"XCLIENT" not in converse(daemon, b"EHLO x\r\nQUIT\r\n")


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=30).map(lambda b: SIGNATURE + b)))
def test_no_header_makes_it_raise_anything_else(octets: bytes) -> None:
    try:
        found = take_header(octets)
    except ProxyError:
        return
    assert found is None or octets.endswith(found[1])


@given(st.binary(max_size=60))
def test_no_attributes_make_it_raise(octets: bytes) -> None:
    assert read_xclient(octets) is None or b"=" in octets
