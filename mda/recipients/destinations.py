"""What stands in an alias or a forward file: the destinations, taken apart.

The form is sendmail's as Postfix and Exim read it (aliases(5)): separated by commas, or in a
file of their own by line ends too; a mailbox, `\\user`, `/file`, `|command`, `:include:/file`,
each maybe in double quotes, and comments in parentheses beside a mailbox.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    Kind = Literal["mailbox", "file", "command", "include"]

INCLUDE = b":include:"
_LONGEST = 1000  # bytes of one destination
_SPECIALS = b'"\\<>(),;:@[]'


class DestinationError(ValueError):
    """A destination that cannot be understood; its text says why, in printable ASCII."""


class Destination:
    """One destination: for a mailbox `text` is the local part without quoting.

    `domain` is as written, empty for a bare local part; `is_final` says that a backslash
    stood in front, so that no alias and no forward file counts any more.
    """

    __slots__ = ("domain", "is_final", "kind", "text")

    def __init__(
        self, kind: Kind, text: bytes, domain: bytes = b"", *, is_final: bool = False
    ) -> None:
        self.kind: Kind = kind
        self.text = text
        self.domain = domain
        self.is_final = is_final

    def __repr__(self) -> str:
        final = ", is_final=True" if self.is_final else ""
        return f"Destination({self.kind!r}, {self.text!r}, {self.domain!r}{final})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Destination) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


def parse_file(text: bytes) -> list[Destination]:
    """The destinations of a forward file or an included list; raises DestinationError.

    A line that begins with "#" is a comment, and a line that begins with a blank goes on
    with the one before.
    """
    lines: list[list[bytes]] = []
    for line in text.split(b"\n"):
        if line.startswith(b"#"):
            continue
        if line[:1] in (b" ", b"\t") and lines:
            lines[-1].append(line)
        else:
            lines.append([line])
    return [each for parts in lines for each in parse_list(b"".join(parts))]


def parse_list(text: bytes) -> list[Destination]:
    """The destinations in `text`, which has no line end; raises DestinationError."""
    if b"\0" in text:
        raise DestinationError("a NUL byte")
    return [_read(item) for item in _split(text) if item]


def _split(text: bytes) -> Iterator[bytes]:
    """The parts between the commas that are outside of quotes, without blanks around."""
    begin = 0
    for at, mark in _outside_quotes(text):
        if mark == b",":
            yield text[begin:at].strip()
            begin = at + 1
    yield text[begin:].strip()


def _outside_quotes(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Each byte of `text` that is neither quoted nor in a comment, with its place.

    A backslash takes the byte behind it along; a comment is shown as its parentheses.
    """
    is_quoted = False
    depth = 0
    at = 0
    while at < len(text):
        mark = text[at : at + 1]
        if mark == b"\\":
            at += 1
        elif mark == b'"' and not depth:
            is_quoted = not is_quoted
        elif not is_quoted:
            depth -= mark == b")" and depth > 0
            if not depth:
                yield at, mark
            depth += mark == b"("
        at += 1
    if is_quoted:
        raise DestinationError("a quotation mark that is not closed")


def _read(item: bytes) -> Destination:
    if len(item) > _LONGEST:
        raise DestinationError(f"a destination of more than {_LONGEST} bytes")
    bare = _unquote(item) if _is_one_quoted_word(item) else item
    if bare.startswith(b"|"):
        command = bare[1:].strip()
        command = _unquote(command) if _is_one_quoted_word(command) else command
        if not command:
            raise DestinationError("an empty command")
        return Destination("command", command)
    if bare.startswith(b"/"):
        return Destination("file", bare)
    if bare.lower().startswith(INCLUDE):
        path = bare[len(INCLUDE) :].strip()
        path = _unquote(path) if _is_one_quoted_word(path) else path
        if not path.startswith(b"/"):
            raise DestinationError("an :include: of no absolute path")
        return Destination("include", path)
    return _read_mailbox(item)


def _is_one_quoted_word(text: bytes) -> bool:
    """Does the quotation mark at the beginning close at the end, and not before?"""
    if len(text) < 2 or not text.startswith(b'"') or not text.endswith(b'"'):
        return False
    return not any(True for _ in _outside_quotes(text))


def _unquote(text: bytes) -> bytes:
    """The text inside of double quotes, where a backslash stands before any character."""
    inner = text[1:-1]
    out = bytearray()
    at = 0
    while at < len(inner):
        at += inner[at : at + 1] == b"\\"
        out += inner[at : at + 1]
        at += 1
    return bytes(out)


def _read_mailbox(item: bytes) -> Destination:
    address = _take_address(item)
    is_final = address.startswith(b"\\")
    address = address.removeprefix(b"\\")
    local_part, domain = address, b""
    for at, mark in _outside_quotes(address):
        if mark == b"@":
            local_part, domain = address[:at], address[at + 1 :]
    if _is_one_quoted_word(local_part):
        local_part = _unquote(local_part)
    elif any(byte in _SPECIALS or byte <= 32 for byte in local_part):
        raise DestinationError("an entry that is no mailbox")
    is_domain = bool(domain) or not address.endswith(b"@")
    if not local_part or not is_domain or any(byte <= 32 or byte in b'"<>(),' for byte in domain):
        raise DestinationError("an entry that is no mailbox")
    return Destination("mailbox", local_part, domain, is_final=is_final)


def _take_address(item: bytes) -> bytes:
    """The address of `Full Name <address>` or of `address (Full Name)`."""
    marks = {mark: at for at, mark in reversed(list(_outside_quotes(item)))}
    if b"<" in marks and item.endswith(b">"):
        return item[marks[b"<"] + 1 : -1].strip()
    if b"(" in marks and item.endswith(b")"):
        return item[: marks[b"("]].strip()
    return item
