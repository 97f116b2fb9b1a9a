"""Where a message for a domain goes next: a route, the smarthost, or the domain's exchangers."""

from __future__ import annotations

import random
import re
import socket
import time

from mda.model import Outcome
from mda.receiver.domains import is_own_address, pack_number, to_ascii
from mda.receiver.grammar import pack_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dns.resolver import Answer, Resolver

    from mda.outbound.dialogue import Tls
    from mda.outbound.sender import Address

_SMTP_PORT = 25
_LOOKUP_SECONDS = 20
_MOST_HOSTS = 10
_MOST_ADDRESSES = 20
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_LONGEST_NAME = 253  # characters (RFC 1035 2.3.4, as text)
_OPTIONS = ("tls=never", "tls=may", "tls=must", "lines=any", "name=our.name.there")
_HOP = re.compile(r"(?:(smtp|lmtp):)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_TLS: dict[str, Tls] = {"never": "never", "may": "may", "must": "must"}

NO_RESOLVER = Outcome(451, "4.3.5", "Looking up exchangers needs dnspython, a route or a smarthost")
NO_SUCH_DOMAIN = Outcome(550, "5.1.2", "The domain does not exist")
NO_MAIL = Outcome(556, "5.1.10", "The domain takes no mail")
NO_ANSWER = Outcome(451, "4.4.3", "The name servers do not answer")
NO_EXCHANGER = Outcome(550, "5.4.4", "No exchanger of the domain has an address")
WAITS_FOR_TURN = Outcome(451, "4.4.1", "The next host has not come yet to take its mail (TURN)")
LOOP = Outcome(554, "5.4.6", "The exchanger of the domain is this host, which knows no such domain")


class Hop:
    """The next host: `protocol` "smtp" or "lmtp", and a `path` or a `host` and `port`.

    With "turn" the `host` comes to us and takes its mail (RFC 821 3.8).
    With `is_domain` the host is a domain, whose exchangers are to be looked up. `name` is our
    name there, if it is another, and `takes_any_line` says that it takes lines of any length.
    """

    __slots__ = (
        "host", "is_domain", "name", "path", "port", "protocol", "takes_any_line", "tls",
    )  # fmt: skip

    def __init__(
        self,
        protocol: str,
        host: str = "",
        port: int = _SMTP_PORT,
        *,
        path: str = "",
        tls: Tls = "may",
        is_domain: bool = False,
        name: str = "",
        takes_any_line: bool = False,
    ) -> None:
        self.protocol = protocol
        self.host = host
        self.port = port
        self.path = path
        self.tls: Tls = tls
        self.is_domain = is_domain
        self.name = name
        self.takes_any_line = takes_any_line

    @property
    def key(self) -> str:
        """The same for recipients whose mail can go in one transaction."""
        if self.protocol == "turn":
            return f"turn:{self.host}"
        kind = "domain" if self.is_domain else self.protocol
        lines = " lines=any" if self.takes_any_line and not self.path else ""
        name = f" name={self.name}" if self.name else ""
        return f"{kind}:{self.path or f'{self.host}:{self.port}'} {self.tls}{lines}{name}"


def parse_hop(text: str) -> Hop:
    """A next hop as the configuration has it; raises ValueError.

    `host`, `host:port`, `[address]:port`, with `smtp:` or `lmtp:` before it; `unix:/path`
    (LMTP) and `smtp+unix:/path`; `turn:host`; behind it ` tls=never`, ` tls=may` or ` tls=must`,
    ` lines=any`, ` name=our.name.there`.
    """
    place, *words = text.split(" ")
    hop = _parse_turn(place) if place.startswith("turn:") else _parse_place(place)
    for word in filter(None, words):
        key, _, value = word.partition("=")
        if key == "tls" and value in _TLS:
            hop.tls = "never" if hop.path or hop.protocol == "turn" else _TLS[value]
        elif key == "name" and is_name(value):
            hop.name = value
        elif word == "lines=any":
            hop.takes_any_line = True
        else:
            raise ValueError(f"{word!r} is none of {', '.join(_OPTIONS)}")
    return hop


def _parse_place(place: str) -> Hop:
    for prefix, protocol in (("unix:", "lmtp"), ("lmtp+unix:", "lmtp"), ("smtp+unix:", "smtp")):
        if place.startswith(prefix):
            path = place.removeprefix(prefix)
            if not path.startswith("/"):
                raise ValueError("the path of a socket begins with /")
            return Hop(protocol, path=path, tls="never", takes_any_line=True)
    found = _HOP.fullmatch(place)
    if found is None:
        raise ValueError(f"{place!r} is no host, such as mail.example.org:25 or unix:/path")
    protocol, port = found[1] or "smtp", int(found[3] or _SMTP_PORT)
    if not 0 < port < 65_536 or (protocol == "lmtp" and not found[3]):
        raise ValueError("LMTP needs a port, and a port is below 65536")
    if pack_literal(found[2]) is None and not is_name(found[2]):
        raise ValueError(f"{found[2]!r} is neither the name of a host nor an [address]")
    return Hop(protocol, found[2], port)


def _parse_turn(place: str) -> Hop:
    host = place.removeprefix("turn:")
    if not is_name(host):
        raise ValueError(f"{host!r} is not the name of a host")
    return Hop("turn", plain_name(host), tls="never")


def is_name(host: str) -> bool:
    """Can the DNS have this as a host (RFC 1123 2.1, and the underscore of many)?"""
    return len(host.removesuffix(".")) <= _LONGEST_NAME and _NAME.fullmatch(host) is not None


def plain_name(domain: str) -> str:
    """A domain as two of them are compared: in ASCII, in lower case, without the last dot."""
    return to_ascii(domain.lower()).rstrip(".")


def find_hop(domain: str, routes: dict[str, str], smarthost: str) -> Hop:
    """The hop for a domain: its route, one for all below a domain, "*", the smarthost, MX.

    Raises ValueError for a route that is none.
    """
    name = plain_name(domain)
    known = {plain_name(each): hop for each, hop in routes.items()}
    labels = name.split(".")
    keys = [name, *(f".{'.'.join(labels[at:])}" for at in range(1, len(labels))), "*"]
    for key in keys:
        if key in known:
            return parse_hop(known[key])
    if smarthost:
        return parse_hop(smarthost)
    return Hop("smtp", name, is_domain=True)


def find_addresses(
    hop: Hop, own_names: frozenset[str], resolver: Resolver | None = None
) -> list[tuple[str, Address]] | Outcome:
    """What to connect to, in order: each with the host's name, or address, for TLS."""
    if hop.path:
        return [("", (socket.AF_UNIX, hop.path))]
    literal = pack_literal(hop.host)
    if literal is not None and hop.is_domain and is_own_address(hop.host):
        return LOOP
    if literal is not None:
        address = socket.inet_ntop(*literal)
        return [(address, _address(address, hop.port))]
    if not is_name(hop.host):
        return NO_SUCH_DOMAIN
    if hop.is_domain:
        return find_exchangers(hop.host, own_names, resolver)
    try:
        found = socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
    except OSError:
        return Outcome(451, "4.4.3", f"The name of the next hop {hop.host} is not known now")
    return [(hop.host, (each[0], each[4])) for each in found[:_MOST_ADDRESSES]]


def pack_literal(host: str) -> tuple[int, bytes] | None:
    """Family and octets of `[address]` or `#number` (RFC 821 4.1.2); None for a name."""
    packed = None
    if host.startswith("["):
        inner = host[1:-1].encode("ascii", "replace")
        packed = pack_address(inner) or pack_address(b"IPv6:" + inner)
    elif host.startswith("#"):
        packed = pack_number(host[1:])
    if packed is None:
        return None
    return (socket.AF_INET if len(packed) == 4 else socket.AF_INET6), packed


def _address(address: str, port: int = _SMTP_PORT) -> Address:
    if ":" in address:
        return socket.AF_INET6, (address, port, 0, 0)
    return socket.AF_INET, (address, port)


def find_exchangers(
    domain: str,
    own_names: frozenset[str],
    resolver: Resolver | None = None,
    *,
    seconds: float = _LOOKUP_SECONDS,
) -> list[tuple[str, Address]] | Outcome:
    """The exchangers of a domain by preference, else its own addresses (RFC 5321 5.1).

    All lookups together take at most `seconds`; one alone takes half of what is left, so
    that an exchanger whose name servers are silent leaves time for the next.
    """
    until = time.monotonic() + seconds
    try:
        from dns import exception
        from dns import resolver as resolving
    except ImportError:
        return NO_RESOLVER
    try:
        asked = resolver or resolving.Resolver()

        def ask(name: str, kind: str) -> Answer:
            left = max(0.0, until - time.monotonic())
            return asked.resolve(name, kind, lifetime=left / 2, search=False)

        try:
            rows = [(each.preference, str(each.exchange)) for each in ask(domain, "MX")]
        except resolving.NoAnswer:
            rows = [(0, domain)]
        if [name for _, name in rows] == ["."]:
            return NO_MAIL
        rows = [(preference, name) for preference, name in rows if is_name(name)]
        hosts = order(rows, own_names)
        return leave_out_own(_resolve_all(hosts, ask)) if hosts or not rows else LOOP
    except resolving.NXDOMAIN:
        return NO_SUCH_DOMAIN
    except exception.DNSException:
        return NO_ANSWER


def order(rows: list[tuple[int, str]], own_names: frozenset[str]) -> list[str]:
    """The hosts by preference, equal ones by lot; from ourselves on none (RFC 5321 5.1)."""
    named = [(preference, name.rstrip(".").lower()) for preference, name in rows]
    own = min((each for each, name in named if name in own_names), default=1 << 16)
    better = [(each, random.random(), name) for each, name in named if each < own]  # noqa: S311
    return [name for _, _, name in sorted(better)][:_MOST_HOSTS]


def leave_out_own(
    found: list[tuple[str, Address]] | Outcome,
) -> list[tuple[str, Address]] | Outcome:
    """What comes before our own addresses, whatever their names are there."""
    if isinstance(found, Outcome):
        return found
    named = [f"[IPv6:{at[0]}]" if family == socket.AF_INET6 else f"[{at[0]}]"  # type: ignore[index]
             for _, (family, at) in found]  # fmt: skip
    own = next((number for number, name in enumerate(named) if is_own_address(name)), len(found))
    return found[:own] or LOOP


def _resolve_all(
    hosts: list[str], ask: Callable[[str, str], Answer]
) -> list[tuple[str, Address]] | Outcome:
    from dns import exception
    from dns import resolver as resolving

    found: list[tuple[str, Address]] = []
    is_sure = True
    for host in hosts:
        for kind in ("A", "AAAA"):
            try:
                found += [(host, _address(str(each))) for each in ask(host, kind)]
            except (resolving.NXDOMAIN, resolving.NoAnswer):
                continue
            except exception.DNSException:
                is_sure = False
    if found:
        return found[:_MOST_ADDRESSES]
    return NO_EXCHANGER if is_sure else NO_ANSWER
