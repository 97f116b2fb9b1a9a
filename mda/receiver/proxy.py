"""What stands in for a client: the PROXY protocol's header (versions 1 and 2), and XCLIENT.

Only from peers that the configuration names; the header comes before our greeting.
"""

from __future__ import annotations

import _socket

from mda.receiver.grammar import is_printable, pack_address

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2, which no command begins with
_FIXED = 16
_LONGEST_V1 = 107
_LONGEST_V2 = _FIXED + 2048
_NAMES = (b"NAME", b"ADDR", b"PORT", b"PROTO", b"HELO", b"LOGIN", b"DESTADDR", b"DESTPORT")
_UNKNOWN = (b"[UNAVAILABLE]", b"[TEMPUNAVAIL]")


class ProxyError(Exception):
    """What has come is no header of the PROXY protocol."""


def take_header(octets: bytes) -> tuple[str, bytes] | None:
    """The client's address, or "" for the proxy's own connection, and what stands behind the
    header; None while the header is not whole. Raises ProxyError.
    """
    if octets.startswith(_SIGNATURE[: len(octets)]):
        return _take_binary(octets) if len(octets) >= _FIXED else None
    if not octets.startswith(b"PROXY "[: len(octets)]):
        raise ProxyError("no header")
    line, end, rest = octets.partition(b"\r\n")
    if len(line) + 2 > _LONGEST_V1:
        raise ProxyError("too long")
    return (_read_line(line), rest) if end else None


def _read_line(line: bytes) -> str:
    words = line.split(b" ")
    if words[1:2] == [b"UNKNOWN"]:
        return ""
    if len(words) != 6 or words[1] not in (b"TCP4", b"TCP6"):
        raise ProxyError("not a header of version 1")
    family = _socket.AF_INET if words[1] == b"TCP4" else _socket.AF_INET6
    ports = [int(word) if word.isdigit() and len(word) <= 5 else 65_536 for word in words[4:]]
    try:
        packed = [_socket.inet_pton(family, word.decode("ascii")) for word in words[2:4]]
    except (OSError, ValueError) as error:
        raise ProxyError("no address") from error
    if max(ports) > 65_535:
        raise ProxyError("no port")
    return _socket.inet_ntop(family, packed[0])


def _take_binary(octets: bytes) -> tuple[str, bytes] | None:
    version, family = octets[12], octets[13]
    end = _FIXED + int.from_bytes(octets[14:16], "big")
    if version not in (0x20, 0x21) or end > _LONGEST_V2:
        raise ProxyError("not a header of version 2")
    if len(octets) < end:
        return None
    body, rest = octets[_FIXED:end], octets[end:]
    if version == 0x20 or family == 0:  # the proxy itself, or nothing that it can name
        return "", rest
    sizes = {0x11: (_socket.AF_INET, 4), 0x21: (_socket.AF_INET6, 16)}
    if family not in sizes or len(body) < 2 * sizes[family][1] + 4:
        raise ProxyError("no TCP")
    kind, size = sizes[family]
    return _socket.inet_ntop(kind, body[:size]), rest


def read_xclient(argument: bytes) -> str | None:
    """The address that XCLIENT names, "" where it names none; None for what is wrong.

    Attributes are NAME=value with xtext; those that we have no use for are read and left.
    """
    address = ""
    words = argument.split()
    if not words or not is_printable(argument):
        return None
    for word in words:
        name, equals, value = word.partition(b"=")
        if name.upper() not in _NAMES or not equals or not value:
            return None
        if name.upper() == b"ADDR" and value.upper() not in _UNKNOWN:
            packed = pack_address(value) or pack_address(b"IPv6:" + value)
            if packed is None:
                return None
            family = _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6
            address = _socket.inet_ntop(family, packed)
    return address
