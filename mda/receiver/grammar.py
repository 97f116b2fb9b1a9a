"""The arguments of commands: paths, parameters, host names (RFC 821 4.1.2, 5321 4.1.2).

Octets from 0x80 on stand in paths as UTF-8 (RFC 6531 3.3); whether the transaction allows
them is the protocol's to say.
"""

from __future__ import annotations

import _socket

from mda.model import Path

# <c> of RFC 821: any ASCII character but SP, controls and the specials.
_SPECIALS = b'<>()[]\\.,;:@"'
_UTF8 = frozenset(range(128, 256))
_ATOM = frozenset(c for c in range(33, 127) if c not in _SPECIALS) | _UTF8
# The underscore is no letter of RFC 1123, and stands in the names of many a host.
_LABEL = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") | _UTF8
_DIGITS = frozenset(b"0123456789")
_LITERAL = frozenset(range(33, 127)) - frozenset(b"[]\\")
_ESCAPED = frozenset(range(32, 127)) | _UTF8
_QUOTED = _ESCAPED - frozenset(b'"\\')
_PRINTABLE = bytes(range(32, 127))

_LONGEST_LABEL = 63
_LONGEST_ORIGINAL = 500
_HEX = frozenset(b"0123456789ABCDEF")


class PathError(Exception):
    """The text is not a path."""


def parse_path(text: bytes) -> tuple[Path, bytes]:
    """Take the path at the beginning of `text`; the rest (parameters) comes back with it.

    `text` starts at the angle bracket. Raises PathError. `<>` is the null reverse-path.
    """
    if text[:1] != b"<":
        raise PathError("a path stands in angle brackets")
    if text[:2] == b"<>":
        return Path(b"", (), b"", b""), text[2:]
    at, path = _take_path(text, 1)
    if text[at : at + 1] != b">":
        raise PathError("no closing bracket where one is due")
    return path, text[at + 1 :]


def read_path(text: bytes) -> Path | None:
    """The path that `text` is without its brackets, None if it is none."""
    try:
        path, rest = parse_path(b"<%b>" % text)
    except PathError:
        return None
    return None if rest else path


def parse_bare_path(text: bytes) -> tuple[Path, bytes]:
    """Like `parse_path`, for a path whose sender has left the brackets out."""
    at, path = _take_path(text, 0)
    if text[at : at + 1] not in (b"", b" "):
        raise PathError("a path ends in a space")
    return path, text[at:]


def _take_path(text: bytes, start: int) -> tuple[int, Path]:
    at, route = _take_route(text, start)
    at, local_part = _take_local_part(text, at)
    domain = b""
    if text[at : at + 1] == b"@":
        at, domain = _take_domain(text, at + 1)
    if not is_text(text[start:at]):
        raise PathError("octets that are no characters of a name")
    return at, Path(text[start:at], route, local_part, domain)


def _take_route(text: bytes, at: int) -> tuple[int, tuple[bytes, ...]]:
    """The source route `@ONE,@TWO:` if there is one (RFC 821 3.6)."""
    hosts = []
    while text[at : at + 1] == b"@":
        at, host = _take_domain(text, at + 1)
        hosts.append(host)
        if text[at : at + 2] == b",@":
            at += 1
        elif text[at : at + 1] == b":":
            return at + 1, tuple(hosts)
        else:
            raise PathError("a source route ends in a colon")
    return at, ()


def _take_local_part(text: bytes, at: int) -> tuple[int, bytes]:
    if text[at : at + 1] == b'"':
        return _take_quoted_string(text, at + 1)
    local_part = bytearray()
    is_part_begun = False
    while at < len(text):
        char = text[at]
        if char == ord("\\") and text[at + 1 : at + 2] and text[at + 1] in _ESCAPED:
            at += 1
            char = text[at]
            is_part_begun = True
        elif char == ord(".") and is_part_begun:
            is_part_begun = False
        elif char in _ATOM:
            is_part_begun = True
        else:
            break
        local_part.append(char)
        at += 1
    if not is_part_begun:
        raise PathError("an empty part in the local part")
    return at, bytes(local_part)


def _take_quoted_string(text: bytes, at: int) -> tuple[int, bytes]:
    local_part = bytearray()
    while at < len(text) and text[at] != ord('"'):
        if text[at] == ord("\\") and text[at + 1 : at + 2] and text[at + 1] in _ESCAPED:
            at += 1
        elif text[at] not in _QUOTED:
            raise PathError("a character that cannot stand in a quoted string")
        local_part.append(text[at])
        at += 1
    if at == len(text):
        raise PathError("a quoted string does not end")
    return at + 1, bytes(local_part)


def _take_domain(text: bytes, at: int) -> tuple[int, bytes]:
    """Elements with dots between them (RFC 821 4.1.2 <domain>)."""
    start = at
    at = _take_element(text, at)
    while text[at : at + 1] == b".":
        at = _take_element(text, at + 1)
    return at, text[start:at]


def _take_element(text: bytes, at: int) -> int:
    """A label (RFC 1123 2.1, no longer 821's <name>), an address literal, or `#number`."""
    start = at
    if text[at : at + 1] == b"[":
        at = _skip(text, at + 1, _LITERAL)
        if text[at : at + 1] != b"]" or pack_address(text[start + 1 : at]) is None:
            raise PathError("a bad address literal")
        return at + 1
    if text[at : at + 1] == b"#":
        at = _skip(text, at + 1, _DIGITS)
        if at == start + 1:
            raise PathError("a number sign without a number")
        return at
    at = _skip(text, at, _LABEL)
    label = text[start:at]
    if not 1 <= len(label) <= _LONGEST_LABEL or b"-" in (label[:1], label[-1:]):
        raise PathError("a bad domain")
    return at


def pack_address(literal: bytes) -> bytes | None:
    """The 4 or 16 octets of an address literal without its brackets, None if it is none.

    Numbers from 0 to 255 may have leading zeros (RFC 821 <snum>); IPv6 has its tag in
    front (RFC 5321 4.1.3).
    """
    family, address = _socket.AF_INET6, literal[5:]
    if literal[:5].upper() != b"IPV6:":
        numbers = literal.split(b".")
        if max(map(len, numbers)) > len(b"255"):
            return None
        family, address = _socket.AF_INET, b".".join(n.lstrip(b"0") or n[:1] for n in numbers)
    try:
        return _socket.inet_pton(family, address.decode("ascii"))
    except (OSError, ValueError):
        return None


def _skip(text: bytes, at: int, allowed: frozenset[int]) -> int:
    while at < len(text) and text[at] in allowed:
        at += 1
    return at


def clean_path(address: str, longest: int) -> str:
    """At most `longest` octets of `address`, "?" standing for what no path may hold."""
    octets = address.encode("utf-8", "surrogateescape")[:longest]
    text = octets.decode("utf-8", "replace")
    return "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in text)


def spell_path(address: str) -> str:
    """`address` as it stands between the brackets of a path (RFC 821 4.1.2).

    What is a path stays as it is. Else the local part is put in quotes, or the whole where
    even that makes no path. A backslash outside of quotes belongs to the name, as in
    `DOMAIN\\user`. What not even quotes can hold comes back as it is, for the receiver to refuse.
    """
    local_part, at, domain = address.rpartition("@") if "@" in address else (address, "", "")
    candidates = [f"{_quote(local_part)}{at}{domain}", _quote(address)]
    if "\\" not in address or address.startswith('"'):
        candidates.insert(0, address)
    return next((each for each in candidates if _is_path(each)), address)


def _quote(local_part: str) -> str:
    escaped = local_part.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _is_path(text: str) -> bool:
    octets = text.encode("utf-8", "replace")
    try:
        path, rest = parse_path(b"<%b>" % octets)
    except PathError:
        return False
    return path.text == octets and not rest


def parse_parameters(text: bytes) -> dict[bytes, bytes] | None:
    """`SIZE=1000 BODY=8BITMIME` as a dictionary with upper-case names, or None if bad.

    RFC 5321 4.1.2: each parameter follows a space; a value is printable ASCII but "=".
    """
    parameters: dict[bytes, bytes] = {}
    if text and (not text.startswith(b" ") or not is_printable(text)):
        return None
    for word in text.split():
        name, equals, value = word.partition(b"=")
        name = name.upper()
        name_is_good = name[:1].isalnum() and name.replace(b"-", b"0").isalnum()
        value_is_good = bool(value) == bool(equals) and b"=" not in value
        if not name_is_good or not value_is_good or not is_printable(value) or name in parameters:
            return None
        parameters[name] = value
    return parameters


def read_notify(value: bytes) -> str | None:
    """NOTIFY's value in upper case; None for a bad one (RFC 3461 4.1)."""
    words = value.decode("ascii", "replace").upper().split(",")
    if words == ["NEVER"]:
        return "NEVER"
    is_good = all(word in ("SUCCESS", "FAILURE", "DELAY") for word in words)
    return ",".join(words) if is_good and len(set(words)) == len(words) else None


def is_xtext(value: bytes) -> bool:
    """Printable, with +XX for what else there may be (RFC 3461 4)."""
    at = 0
    while at < len(value):
        if value[at] == ord("+"):
            if len(value) < at + 3 or not set(value[at + 1 : at + 3]) <= _HEX:
                return False
            at += 2
        elif not 33 <= value[at] <= 126 or value[at] == ord("="):
            return False
        at += 1
    return bool(value)


def is_original(value: bytes) -> bool:
    """ORCPT's value: the kind of address, and the address as xtext (RFC 3461 4.2)."""
    kind, mark, address = value.partition(b";")
    is_kind = bool(kind) and kind.replace(b"-", b"").isalnum()
    return is_kind and bool(mark) and len(value) <= _LONGEST_ORIGINAL and is_xtext(address)


def is_printable(text: bytes) -> bool:
    """Only the printable characters of ASCII, the space among them."""
    return not text.translate(None, _PRINTABLE)


def is_text(text: bytes) -> bool:
    """Printable ASCII, and UTF-8 that has something to print."""
    if text.isascii():
        return is_printable(text)
    try:
        return text.decode("utf-8").isprintable()
    except UnicodeDecodeError:
        return False


def take_utf8_flag(argument: bytes) -> tuple[bytes, bool]:
    """VRFY's or EXPN's string, and whether SMTPUTF8 stood behind it (RFC 6531 3.7.4.2)."""
    string, _, last = argument.rpartition(b" ")
    if last.upper() != b"SMTPUTF8":
        return argument, False
    return string.rstrip(b" "), True


def is_host_name(text: bytes) -> bool:
    """Good enough for HELO: verification is no reason to refuse (RFC 5321 4.1.4).

    Underscores and bare names pass; an empty, spaced or unprintable argument does not.
    """
    return bool(text) and len(text) <= 255 and is_printable(text) and b" " not in text
