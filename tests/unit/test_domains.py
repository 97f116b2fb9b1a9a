from __future__ import annotations

import psutil
import pytest

from mda.config import Config
from mda.receiver.domains import Domains, is_own_address

CONFIG = Config().with_values(
    "receiver", hostname="Mda.test", local_domains=("Example.org", "xn--bcher-kva.example")
)


@pytest.mark.parametrize(
    "domain",
    ["", "mda.TEST", "eXample.org", "b\u00fccher.example", "B\u00dcCHER.example", "[127.0.0.1]"],
)
def test_ours_are_the_named_domains_our_own_name_and_our_addresses(domain: str) -> None:
    assert Domains(CONFIG, takes_any=False).is_ours(domain.encode())


@pytest.mark.parametrize(
    "domain",
    [
        "sub.example.org",
        "example.or",
        "localhost",
        "b\u00fccher.example.org",
        "a" * 70 + "\u00fc.example",
        "[192.0.2.77]",
        "[127.0.0.1].example",
        "[127.0.0.1].\u05d0",
        "#1.\u05d0",
        "#3221225985",
        "#" + "9" * 5000,
    ],
)
def test_others_are_not(domain: str) -> None:
    assert not Domains(CONFIG, takes_any=False).is_ours(domain.encode())
    assert Domains(CONFIG, takes_any=True).is_ours(domain.encode())


def test_the_addresses_of_our_interfaces_are_ours() -> None:
    tags = {2: "", 10: "ipv6:"}
    found = [
        tags[one.family] + one.address.split("%")[0].lower()
        for addresses in psutil.net_if_addrs().values()
        for one in addresses
        if one.family in tags
    ]
    assert found, "this host has no address at all"
    for literal in found:
        assert is_own_address(f"[{literal}]"), literal


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("[127.9.9.9]", True),
        ("[127.000.000.001]", True),
        ("[ipv6:::1]", True),
        ("[ipv6:0:0:0:0:0:0:0:1]", True),
        ("#2130706433", True),
        ("[192.0.2.77]", False),
        ("[ipv6:2001:db8::7]", False),
        ("[127.x]", False),
        ("[127.0.0.1.example]", False),
        ("[]", False),
        ("#", False),
        ("#6425673729", False),
    ],
)
def test_an_address_is_ours_however_it_is_written(name: str, is_ours: bool) -> None:
    assert is_own_address(name) is is_ours
