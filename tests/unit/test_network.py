"""Hosts that send mail to one another, each with its own address, and a real name server."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from support.network import NET, NET6, Network
from support.sandbox import Sandbox, start_command
from support.serving import served

from mda.outbound import queue

ZONE = f"""
hostx A {NET}.1
hosty A {NET}.2
hostz A {NET}.3
hostx MX 10 hostx
hosty MX 10 hosty
down A {NET}.99
prefs MX 30 hostz
prefs MX 10 down
prefs MX 20 hosty
plain A {NET}.2
null MX 0 .
alias CNAME hosty
chief MX 10 chiefs
chiefs CNAME hosty
six AAAA {NET6}:2
sixes MX 10 six
empty TXT "nothing"
loop MX 10 hosty
loop MX 5 hostx
later MX 10 hosty
later MX 20 hostx
dangling MX 10 nowhere
lost NS ns.nowhere
"""
NAMES = {1: "hostx.example", 2: "hosty.example", 3: "hostz.example"}
CONFIG = """[receiver]
relay_networks = ["10.77.0.0/24"]
local_domains = [{domains}]
[relay]
source_routes = "{routes}"
"""
DOMAINS = ["hosty.example", "prefs.example", "plain.example", "alias.example", "chief.example",
           "six.example", "sixes.example", "later.example"]  # fmt: skip


class Hosts:
    """Three hosts, x, y and z, and what is done on them."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.x, self.y, self.z = (network.add(name, number) for number, name in NAMES.items())

    def configure(self, host: Sandbox, routes: str = "honour") -> str:
        number = {self.x: 1, self.y: 2, self.z: 3}[host]
        domains = DOMAINS if number == 2 else [NAMES[number]]
        quoted = ", ".join(f'"{each}"' for each in domains)
        return host.configure(CONFIG.format(domains=quoted, routes=routes))

    def send(self, host: Sandbox, to: str, sender: str, peer: str = "alice") -> None:
        """A message from a user at `host`, who is told that it is queued."""
        lines = f"HELO me\r\nMAIL FROM:<{sender}>\r\nRCPT TO:<{to}>\r\nDATA\r\n"
        lines += "Subject: over the wire\r\n\r\nhello\r\n.\r\nQUIT\r\n"
        config = (host.root / "etc/mda.toml").read_text()
        replies = host.converse(lines.encode(), config=config, peer=peer)
        assert replies[-2].startswith(b"250 2.0.0 Queued as "), replies

    def run(self, host: Sandbox) -> str:
        """One run of the queue at `host`; what it has logged."""
        file = str(host.root / "etc/mda.toml")
        done = host.run([*start_command(), "queue", "--config", file, "run", "--now"])
        assert done.returncode == 0, done.stderr
        return done.stderr.decode()


@pytest.fixture(scope="module")
def network() -> Iterator[Hosts]:
    with Network(ZONE) as wire:
        yield Hosts(wire)


@contextlib.contextmanager
def listening(hosts: Hosts, routes: str = "honour") -> Iterator[None]:
    """All three receive mail."""
    with contextlib.ExitStack() as stack:
        for number, host in enumerate((hosts.x, hosts.y, hosts.z), 1):
            host.clear_mail()
            file = hosts.configure(host, routes)
            places = ["--listen", f"{NET}.{number}:25", "--listen", f"[{NET6}:{number}]:25"]
            places += ["--listen", "lmtp+unix:/run/mda/lmtp.sock"]
            stack.enter_context(served(host, "--config", file, *places))
        yield


def waiting(host: Sandbox) -> int:
    directory = host.root / "spool/mda/queue"
    return sum(len(list((directory / folder).glob("*"))) for folder in queue.FOLDERS)


def return_path(host: Sandbox, user: str) -> str:
    kept = (host.mailbox(user) or b"").decode()
    (found,) = re.findall(r"(?m)^Return-Path: (.*)$", kept)
    return str(found)


def test_a_route_over_two_hosts(network: Hosts) -> None:
    with listening(network):
        network.send(network.x, "@hosty.example:carol@hosty.example", "alice@hostx.example")
        network.run(network.x)
        assert return_path(network.y, "carol") == "<@hostx.example:alice@hostx.example>"
    assert waiting(network.x) == 0


@pytest.mark.parametrize(
    ("routes", "path"),
    [
        ("honour", "<@hosty.example,@hostx.example:alice@hostx.example>"),
        ("ignore", "<alice@hostx.example>"),
    ],
)
def test_a_route_over_three_hosts(network: Hosts, routes: str, path: str) -> None:
    with listening(network, routes):
        to = "@hostx.example,@hosty.example:carol@hostz.example"
        network.send(network.x, to, "alice@hostx.example")
        network.run(network.x)
        network.run(network.y)
        assert return_path(network.z, "carol") == path
        kept = (network.z.mailbox("carol") or b"").decode()
    hops = re.findall(r"(?m)^\tby (\S+) ", kept)
    by_y = ["hosty.example"] if routes == "honour" else []
    assert hops == ["hostz.example", *by_y, "hostx.example"], "it went that way"


def test_a_notice_comes_back_the_way_that_the_message_went(network: Hosts) -> None:
    with listening(network):
        network.send(network.x, "@hosty.example:nobody-here@hostz.example", "alice@hostx.example")
        network.run(network.x)
        assert network.x.mailbox("alice") is None
        # Host z has refused it, and y has to say so; it is x that brings the notice home.
        log = network.run(network.y)
        assert "to=@hostx.example:alice@hostx.example" in log
        notice = (network.x.mailbox("alice") or b"").decode()
    assert return_path(network.x, "alice") == "<>"
    assert "Sorry alice, your message to nobody-here@hostz.example lost.\n" in notice
    assert 'hostz.example said this:\n   "550 5.1.1 ' in notice
    assert "\nRemote-MTA: dns; hostz.example\n" in notice
    assert "\n\nhello\n" in notice
    assert [waiting(host) for host in (network.x, network.y, network.z)] == [0, 0, 0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_exchangers_are_found_as_the_name_server_has_them(network: Hosts, domain: str) -> None:
    """Preferences with the best one down, an alias, one behind an alias, IPv6 alone."""
    with listening(network):
        network.send(network.x, f"carol@{domain}", "alice@hostx.example")
        network.run(network.x)
        assert b"\nhello\n" in (network.y.mailbox("carol") or b"")
    assert waiting(network.x) == 0
    assert network.z.mailbox("carol") is None


@pytest.mark.parametrize(
    ("domain", "outcome"),
    [
        ("null.example", "556 5.1.10 "),
        ("none.example", "550 5.1.2 "),
        ("empty.example", "550 5.4.4 "),
        ("dangling.example", "550 5.4.4 "),
        ("loop.example", "554 5.4.6 "),
        ("x.broken.test", "451 4.4.3 "),
        ("unserved.test", "451 4.4.3 "),
        (f"[{NET}.99]", "451 4.4.1 "),
    ],
)
def test_what_the_name_server_says_of_other_domains(
    network: Hosts, domain: str, outcome: str
) -> None:
    with listening(network):
        network.send(network.x, f"carol@{domain}", "alice@hostx.example")
        log = network.run(network.x)
        assert f'reply="{outcome}' in log, log
        is_final = outcome.startswith("5")
        assert waiting(network.x) == (0 if is_final else 1)
        assert (network.x.mailbox("alice") is not None) == is_final


def test_an_address_and_a_number_are_hosts_too(network: Hosts) -> None:
    """RFC 821 4.1.2: `[dotnum]` and `#number`."""
    number = int.from_bytes(bytes(map(int, f"{NET}.2".split("."))), "big")
    with listening(network):
        for host in (f"[{NET}.2]", f"#{number}", f"[IPv6:{NET6}:2]"):
            network.send(network.x, f"carol@{host}", "alice@hostx.example")
        network.run(network.x)
        assert (network.y.mailbox("carol") or b"").count(b"\nhello\n") == 3
