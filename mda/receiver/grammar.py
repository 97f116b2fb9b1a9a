"""The arguments of commands: paths, parameters, host names (RFC 821 4.1.2, 5321 4.1.2)."""

from __future__ import annotations

from mda.model import Path

# <c> of RFC 821: any ASCII character but SP, controls and the specials.
_SPECIALS = b'<>()[]\\.,;:@"'
_ATOM = frozenset(c for c in range(33, 127) if c not in _SPECIALS)
_LABEL = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_DIGITS = frozenset(b"0123456789")
_LITERAL = _LABEL | frozenset(b".:")
_QUOTED = frozenset(range(32, 127)) - frozenset(b'"\\')
_ESCAPED = frozenset(range(32, 127))

_LONGEST_LABEL = 63


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
    at, route = _take_route(text, 1)
    at, local_part = _take_local_part(text, at)
    domain = b""
    if text[at : at + 1] == b"@":
        at, domain = _take_domain(text, at + 1)
    if text[at : at + 1] != b">":
        raise PathError("no closing bracket where one is due")
    return Path(text[1:at], route, local_part, domain), text[at + 1 :]


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
    start = at
    local_part = bytearray()
    while at < len(text):
        char = text[at]
        if char == ord("\\") and text[at + 1 : at + 2] and text[at + 1] in _ESCAPED:
            at += 1
            char = text[at]
        elif char == ord(".") and at > start and text[at - 1] != ord("."):
            pass
        elif char not in _ATOM:
            break
        local_part.append(char)
        at += 1
    if at == start or (text[at - 1 : at] == b"." and text[at - 2 : at - 1] != b"\\"):
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
    if at == len(text) or not local_part:
        raise PathError("a quoted string is empty or does not end")
    return at + 1, bytes(local_part)


def _take_domain(text: bytes, at: int) -> tuple[int, bytes]:
    """A name of labels (RFC 1123 2.1), an address literal, or `#number`."""
    start = at
    if text[at : at + 1] == b"[":
        at = _skip(text, at + 1, _LITERAL)
        if text[at : at + 1] != b"]" or at == start + 1:
            raise PathError("a bad address literal")
        return at + 1, text[start : at + 1]
    if text[at : at + 1] == b"#":
        at = _skip(text, at + 1, _DIGITS)
        if at == start + 1:
            raise PathError("a number sign without a number")
        return at, text[start:at]
    at = _skip(text, at, _LABEL | {ord(".")})
    if any(not 1 <= len(label) <= _LONGEST_LABEL for label in text[start:at].split(b".")):
        raise PathError("a bad domain")
    return at, text[start:at]


def _skip(text: bytes, at: int, allowed: frozenset[int]) -> int:
    while at < len(text) and text[at] in allowed:
        at += 1
    return at


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
    if text and not text.startswith(b" "):
        return None
    for word in text.split():
        name, equals, value = word.partition(b"=")
        name_is_good = name[:1].isalnum() and name.replace(b"-", b"0").isalnum()
        value_is_good = bool(value) == bool(equals) and b"=" not in value
        if not name_is_good or not value_is_good or not is_printable(value):
            return None
        parameters[name.upper()] = value
    return parameters


def is_printable(text: bytes) -> bool:
    """Only the printable characters of ASCII, the space among them."""
    return all(32 <= char < 127 for char in text)


def is_host_name(text: bytes) -> bool:
    """Good enough for HELO: verification is no reason to refuse (RFC 5321 4.1.4).

    Underscores and bare names pass; an empty, spaced or unprintable argument does not.
    """
    return bool(text) and len(text) <= 255 and is_printable(text) and b" " not in text
