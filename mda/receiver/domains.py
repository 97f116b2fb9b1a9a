"""Which domains are ours (design, decision 8)."""

from __future__ import annotations

import _socket

from mda.config import own_domains
from mda.receiver.grammar import pack_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config
    from mda.model import Path


_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address in IPv6 (RFC 4291 2.5.5.2)
_NOBODY = bytes(16)
_LOOPBACK = bytes(15) + b"\1"


class Domains:
    """The domains of this host, which are read when the first name is asked for.

    `takes_any` is for what an MTA hands over: it has judged the domain, and every one is ours.
    """

    def __init__(self, config: Config, *, takes_any: bool) -> None:
        self._config = config
        self.takes_any = takes_any
        self._names: frozenset[str] | None = None

    def is_ours(self, domain: bytes) -> bool:
        """A domain as a path has it: none at all always, over LMTP and from an MTA every one."""
        if not domain or self.takes_any:
            return True
        if self._names is None:
            self._names = frozenset(map(to_ascii, own_domains(self._config)))
        name = to_ascii(domain.decode("utf-8").lower())
        return name in self._names or is_own_address(name)

    def lead_away(self, path: Path, *, is_honoured: bool) -> tuple[bytes, bytes]:
        """Domain and source route (b"@ONE,@TWO") of mail that leaves us; both empty for ours.

        Our own names at the beginning of a route are left out (RFC 821 3.6); where routes are
        not honoured the last mailbox is all that counts (RFC 5321 4.1.1.3).
        """
        route = path.route if is_honoured else ()
        at = next((at for at, host in enumerate(route) if not self.is_ours(host)), len(route))
        route = route[at:]
        if not path.domain or (not route and self.is_ours(path.domain)):
            return b"", b""
        return path.domain, b",".join(b"@" + host for host in route)


def to_ascii(name: str) -> str:
    """A domain as the DNS has it (RFC 5890 2.3.2.1), or as it is where that cannot be."""
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:
        return name


def pack_number(digits: str) -> bytes | None:
    """The four octets of `#number` (RFC 821 4.1.2), without its sign; None if it is none."""
    if not digits.isdigit() or len(digits) > 10 or int(digits) >= 1 << 32:
        return None
    return int(digits).to_bytes(4, "big")


def is_own_address(name: str) -> bool:
    """Is this the address of one of our interfaces: a literal (RFC 1123 5.2.17), `#number`?"""
    packed = None
    if not name.isascii():
        return False
    if name.startswith("["):
        packed = pack_address(name[1:-1].encode("ascii"))
    elif name.startswith("#"):
        packed = pack_number(name[1:])
    if packed is None:
        return False
    if packed[:12] == _MAPPED:
        packed = packed[12:]
    # "This host" too (RFC 1122 3.2.1.3), since a connection to it comes to ourselves.
    if (len(packed) == 4 and packed[0] in (0, 127)) or packed in (_NOBODY, _LOOPBACK):
        return True
    import psutil  # lists the interfaces; literals are rare and it costs 35 ms

    return any(
        packed == _socket.inet_pton(each.family, each.address.split("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in (_socket.AF_INET, _socket.AF_INET6)
    )
