"""Where mail for a domain goes next: routes as they are written, exchangers as the DNS has them."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

import pytest
from support.nameserver import NameServer

from mda.model import Outcome
from mda.outbound.route import (
    LOOP,
    NO_RESOLVER,
    Hop,
    find_addresses,
    find_exchangers,
    find_hop,
    order,
    parse_hop,
)

ZONE = {
    ("two.example.", "MX"): ["20 b.example.", "10 a.example."],
    ("a.example.", "A"): ["203.0.113.1"],
    ("b.example.", "A"): ["203.0.113.2"],
    ("b.example.", "AAAA"): ["2001:db8::2"],
    ("null.example.", "MX"): ["0 ."],
    ("plain.example.", "A"): ["203.0.113.7"],
    ("six.example.", "AAAA"): ["2001:db8::6"],
    ("alias.example.", "CNAME"): ["two.example."],
    ("gone.example.", "MX"): ["10 nowhere.example."],
    ("broken.example.", "MX"): ["10 fails.example."],
    ("loop.example.", "MX"): ["10 mda.test.", "20 a.example."],
    ("empty.example.", "TXT"): ['"x"'],
    ("hostile.example.", "MX"): ["5 x\\010y.example.", "6 x\\;y.example.", "10 a.example."],
    ("x\\010y.example.", "A"): ["203.0.113.66"],
    ("x\\;y.example.", "A"): ["203.0.113.66"],
    ("odd.example.", "MX"): ["5 x\\;y.example."],
    ("hosts.example.", "MX"): [f"{each} h{each}.example." for each in range(1, 16)],
    **{(f"h{each}.example.", "A"): [f"203.0.113.{each}"] for each in range(1, 16)},
    ("many.example.", "A"): [f"203.0.113.{each}" for each in range(1, 31)],
    ("slow.example.", "MX"): [f"{each} s{each}.example." for each in range(1, 11)],
    ("half.example.", "MX"): ["10 s1.example.", "20 a.example."],
}
SILENT = frozenset({"silent.example.", *(f"s{each}.example." for each in range(1, 11))})


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    failing = {"fails.example.", "servfail.example."}
    lame = frozenset({"lame.example."})
    with NameServer(ZONE, failing, refusing=lame, silent=SILENT) as server:
        yield server


def places(found: object) -> object:
    if not isinstance(found, list):
        assert isinstance(found, Outcome)
        return f"{found.code} {found.enhanced}"
    return [(host, address[1][0]) for host, address in found]


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (
            "two.example",
            [
                ("a.example", "203.0.113.1"),
                ("b.example", "203.0.113.2"),
                ("b.example", "2001:db8::2"),
            ],
        ),
        ("plain.example", [("plain.example", "203.0.113.7")]),
        ("six.example", [("six.example", "2001:db8::6")]),
        (
            "alias.example",
            [
                ("a.example", "203.0.113.1"),
                ("b.example", "203.0.113.2"),
                ("b.example", "2001:db8::2"),
            ],
        ),
        ("null.example", "556 5.1.10"),
        ("none.example", "550 5.1.2"),
        ("empty.example", "550 5.4.4"),
        ("gone.example", "550 5.4.4"),
        ("broken.example", "451 4.4.3"),
        ("servfail.example", "451 4.4.3"),
        ("loop.example", "554 5.4.6"),
        ("lame.example", "451 4.4.3"),
        ("hostile.example", [("a.example", "203.0.113.1")]),
        ("odd.example", "550 5.4.4"),
    ],
)
def test_exchangers_are_found(names: NameServer, domain: str, expected: object) -> None:
    found = find_exchangers(domain, frozenset({"mda.test"}), names.resolver)
    assert places(found) == expected


@pytest.mark.parametrize("domain", ["silent.example", "slow.example"])
def test_all_lookups_together_have_their_time(names: NameServer, domain: str) -> None:
    names.asked.clear()
    start = time.monotonic()
    found = find_exchangers(domain, frozenset(), names.resolver, seconds=1)
    assert places(found) == "451 4.4.3"
    assert time.monotonic() - start < 5, "far below what each alone would take"
    assert f"{domain}." in names.asked


def test_a_silent_exchanger_leaves_time_for_the_next(names: NameServer) -> None:
    found = find_exchangers("half.example", frozenset(), names.resolver, seconds=2)
    assert places(found) == [("a.example", "203.0.113.1")]


def test_ten_hosts_and_twenty_addresses_are_enough(names: NameServer) -> None:
    hosts = find_exchangers("hosts.example", frozenset(), names.resolver)
    expected = [(f"h{each}.example", f"203.0.113.{each}") for each in range(1, 11)]
    assert places(hosts) == expected
    addresses = find_exchangers("many.example", frozenset(), names.resolver)
    assert len(places(addresses)) == 20  # type: ignore[arg-type]


def test_without_dnspython_mail_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dns", None)
    assert find_exchangers("far.example", frozenset()) == NO_RESOLVER


def test_equal_exchangers_are_taken_by_lot() -> None:
    rows = [(10, "a."), (10, "b."), (5, "c.")]
    seen = {tuple(order(rows, frozenset())) for _ in range(200)}
    assert seen == {("c", "a", "b"), ("c", "b", "a")}


def test_only_better_exchangers_than_ourselves_count() -> None:
    rows = [(10, "a."), (20, "MDA.test."), (30, "b.")]
    assert order(rows, frozenset({"mda.test"})) == ["a"]
    assert order(rows[1:], frozenset({"mda.test"})) == []
    assert LOOP.code == 554


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("mail.example", "smtp:mail.example:25 may"),
        ("mail.example:587 tls=must", "smtp:mail.example:587 must"),
        ("smtp:[2001:db8::1]:25 tls=never", "smtp:[2001:db8::1]:25 never"),
        ("lmtp:127.0.0.1:24", "lmtp:127.0.0.1:24 may"),
        ("unix:/run/x", "lmtp:/run/x never"),
        ("smtp+unix:/run/x", "smtp:/run/x never"),
    ],
)
def test_a_hop_is_read(text: str, key: str) -> None:
    assert parse_hop(text).key == key


@pytest.mark.parametrize(
    "text",
    [
        *("", "a b", "x:0", "x:99999", "lmtp:x", "unix:x", "x tls=perhaps", "x;y", "smtp:"),
        *("[abc]", "[1.2]", "[]", "a..b", "..", "-x", "x-", "x" * 64, ".".join(["x" * 60] * 5)),
    ],
)
def test_what_is_no_hop_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_hop(text)


@pytest.mark.parametrize(
    ("domain", "host"),
    [
        ("Far.example", "exact"),
        ("far.example.", "exact"),
        ("sub.far.example", "below"),
        ("deep.sub.far.example", "below"),
        ("b\u00fccher.example", "idn"),
        ("other.example", "rest"),
    ],
)
def test_the_nearest_route_counts(domain: str, host: str) -> None:
    routes = {
        "far.example": "exact",
        ".far.example": "below",
        "B\u00dcCHER.example": "idn",
        "*": "rest",
    }
    assert find_hop(domain, routes, "smarthost").host == host


def test_without_a_route_the_smarthost_and_then_the_exchangers() -> None:
    assert find_hop("far.example", {}, "relay:587").key == "smtp:relay:587 may"
    hop = find_hop("far.example", {}, "")
    assert (hop.is_domain, hop.host) == (True, "far.example")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("[203.0.113.9]", "203.0.113.9"),
        ("[IPv6:2001:db8::9]", "2001:db8::9"),
        ("#3405803785", "203.0.113.9"),
    ],
)
def test_a_literal_needs_no_names(host: str, address: str) -> None:
    found = find_addresses(Hop("smtp", host, is_domain=True), frozenset())
    assert isinstance(found, list)
    assert places(found) == [(address, address)]


def test_odd_names_are_asked_of_nobody() -> None:
    odd = ("a b.example", "-x.example", "x\n.example", "a" * 64 + ".example", "x..example")
    for host in (*odd, "x\u017f.example", ".".join(["x" * 60] * 5)):
        assert places(find_addresses(Hop("smtp", host, is_domain=True), frozenset())) == "550 5.1.2"


def test_a_socket_has_its_path() -> None:
    found = find_addresses(parse_hop("unix:/run/x"), frozenset())
    assert found == [("", (socket.AF_UNIX, "/run/x"))]


def test_a_socket_of_this_host_takes_any_line_and_others_where_it_is_said() -> None:
    assert parse_hop("unix:/run/x").takes_any_line
    assert parse_hop("smtp+unix:/run/x tls=must").tls == "never"
    assert not parse_hop("mail.example.org").takes_any_line
    hop = parse_hop("mail.example.org:26 lines=any  name=us.example tls=must")
    assert (hop.takes_any_line, hop.name, hop.tls, hop.port) == (True, "us.example", "must", 26)
    for wrong in ("lines=all", "name=-x", "name=", "tls=", "TLS=may", "lines"):
        with pytest.raises(ValueError, match="is none of"):
            parse_hop(f"mail.example.org {wrong}")
