"""Any message as one block of bytes that is safe on any terminal (design, decision 7).

Session process only. Everything is decoded first (MIME, RFC 2047) and made harmless
afterwards, since control characters hide inside of encodings; and whatever reaches the
block goes through `_make_cells`, the subject and the sender like the text.
"""

from __future__ import annotations

from mda.model import BLANK_FILLERS
from mda.wire import MAX_BLOCK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from email.message import Message

# What `mda send` says of a message that is one line of many: "begin", "line" or "end".
CONVERSATION = "mda-conversation"

MAX_PARTS = 50
MAX_FIELD = 2000
MAX_MARKS = 3

_MIN_WIDTH = 20
_MAX_WIDTH = 500
_TAB = 8
_MARGIN = [("|", 1), (" ", 1)]
_END = "-- end of message --"
_SUBJECT_COLUMNS = 200
# The normal form of a long run of combining marks takes time by its square.
_NORMALIZED_AT_ONCE = 256
_SIGNATURES = (
    "application/pgp-signature",
    "application/pkcs7-signature",
    "application/x-pkcs7-signature",
)
# "ascii" is read as what contains it; the other is no charset, and warns on standard error.
_READ_AS_UTF8 = ("ascii", "unicode-escape")
_BREAKING_TAGS = (
    *("address", "article", "blockquote", "br", "dd", "div", "dl", "dt", "hr", "li", "ol", "p"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "table", "td", "th", "tr", "ul"),
)
_TAG = (
    r"(?is)<!--.*?(?:-->|\Z)"
    r"|<(script|style|title)\b.*?(?=</\1|\Z)"
    r"|</?(?P<name>[a-z][a-z0-9]*)[^>]*(?:>|\Z)"
    r"|<[!?][^>]*(?:>|\Z)"
)


def render(
    head: bytes,
    is_whole: bool,
    *,
    sender: str,
    is_verified: bool,
    via: str,
    when: str,
    width: int,
    lines: int,
    limit: int,
    bell: bool,
    has_mailbox_copy: bool,
) -> tuple[bytes, bool]:
    """The block that shows a message, and whether it shows less than the whole message.

    `head` is the stored message (header and text, LF line ends) or, unless `is_whole`,
    its beginning. `sender` is a verified login name or what MAIL FROM said, in its
    angle brackets or without; `via` the host it came from ("" if none), `when` a time of
    day. The block has rows of at most `width` columns, `lines` rows of text and `limit`
    bytes, 256 at least. Never raises.
    """
    content = _read_message(head)
    width = min(max(width, _MIN_WIDTH), _MAX_WIDTH)
    limit = min(limit, MAX_BLOCK)
    whole = content.text.rstrip(" \t\r\n").lstrip("\n")
    text = whole.split("\n") if whole else []
    # Only a name that nobody else can have may stand in place of the banner.
    part = content.conversation if is_verified else ""
    is_cut = bool(content.attachments or content.is_cut or not is_whole)
    # Beside the text nothing of a conversation is shown, and so would be lost by SOML.
    is_more = is_cut or bool(content.subject)
    is_ringing = bell and part in ("", "begin")
    # A terminal may go to the next row after its last column: leave that one free.
    page = _Page(max(_MIN_WIDTH, width - 1), limit, "\r\n\a" if is_ringing else "\r\n")
    if part in ("line", "end"):
        is_more |= _add_to_conversation(page, part, sender, text, lines)
        return page.block_without_end if part == "line" else page.block, is_more
    page.add(_compose_banner(sender, is_verified, via, when, limit))
    if part == "begin":
        return page.block_without_end, is_more or bool(text)
    hidden = _add_message(page, content, text, lines, has_mailbox_copy=has_mailbox_copy)
    is_clipped = is_cut or hidden > 0
    page.reserve = 0
    page.add(_compose_end(hidden, is_clipped, has_mailbox_copy))
    return page.block, is_clipped


def _add_message(
    page: _Page, content: _Content, text: list[str], lines: int, *, has_mailbox_copy: bool
) -> int:
    """Subject, text and the names of attachments; the number of lines left out.

    Room is left for the end, whichever it will be.
    """
    text = text + [f"[attachment: {name}]" for name in content.attachments]
    page.reserve = page.measure(_compose_end(len(text), True, has_mailbox_copy))
    if content.subject:
        subject = _shorten(content.subject, _SUBJECT_COLUMNS, page.limit // 4)
        page.add([*_plain("Subject: "), *subject])
    return _add_text(page, text, lines, _MARGIN)


def _add_to_conversation(page: _Page, part: str, sender: str, text: list[str], lines: int) -> bool:
    """Lines that a banner has announced, behind the name of who types them, or their end.

    Is there any text that is not shown?
    """
    name = _shorten(sender, page.width // 2, page.limit // 8)
    if part == "end":
        page.add([*_plain("-- end of messages from "), *name, *_plain(" --")])
        return bool(text)
    return _add_text(page, text or [""], lines, [*name, *_MARGIN]) > 0


def _add_text(page: _Page, text: list[str], lines: int, margin: list[Cell]) -> int:
    """Put `text` behind `margin`, at most `lines` rows; the number of lines left out."""
    for number, line in enumerate(text):
        # Each character takes a byte or is one of too many marks on the same letter.
        shown = line[: 2 * page.limit]
        rows = page.wrap(_make_cells(shown), margin, margin)
        for row in rows:
            if lines == 0 or not page.add_row(row):
                return len(text) - number
            lines -= 1
        if shown != line:
            return len(text) - number
    return 0


def _compose_banner(sender: str, is_verified: bool, via: str, when: str, limit: int) -> list[Cell]:
    sender = sender.removeprefix("<").removesuffix(">")
    name = _shorten(sender, 64, limit // 5, escaped="<>()")
    time = [*_plain(" at "), *_shorten(when, 16, 16)]
    if is_verified:
        return [*_plain("Message from "), *name, *_plain(" (verified)"), *time]
    host = _shorten(via, 64, limit // 8, escaped="<>()")
    origin = [*_plain("> (unverified"), *(_plain(", via ") if host else []), *host, *_plain(")")]
    return [*_plain("Message from <"), *name, *origin, *time]


def _compose_end(hidden: int, is_clipped: bool, has_mailbox_copy: bool) -> list[Cell]:
    more = f"{hidden} more line{'s' if hidden != 1 else ''}"
    if is_clipped and has_mailbox_copy:
        more = f"{more}: " if hidden else ""
        return _plain(f"[{more}the whole message is in your mailbox]")
    return _plain(f"[{more} not shown]" if hidden else _END)


class _Page:
    """The block while it is made: rows, each behind its margin, and the room that is left."""

    __slots__ = ("block", "limit", "reserve", "width")

    def __init__(self, width: int, limit: int, start: str) -> None:
        self.width = width
        self.limit = limit
        self.reserve = 0
        self.block = start.encode("ascii")

    def add(self, cells: list[Cell]) -> None:
        """Add `cells` from the first column, what does not fit in a row behind the margin.

        So nobody's name can put a line of his own where a banner would begin.
        """
        for row in self.wrap(cells, []):
            if not self.add_row(row):
                return

    def add_row(self, row: str) -> bool:
        """Add a row if there is room for it."""
        line = row.encode("utf-8") + b"\r\n"
        if len(self.block) + len(line) + self.reserve > self.limit:
            return False
        self.block += line
        return True

    def measure(self, cells: list[Cell]) -> int:
        """The bytes that `cells` will need."""
        return sum(len(row.encode("utf-8")) + 2 for row in self.wrap(cells, []))

    @property
    def block_without_end(self) -> bytes:
        """The block with its last row still open, for the next one to begin with its end."""
        return self.block.removesuffix(b"\r\n") or self.block

    def wrap(
        self, cells: list[Cell], margin: list[Cell], next_margin: list[Cell] = _MARGIN
    ) -> list[str]:
        """Rows of `cells` by display width, broken at the last space if there is one.

        The first begins with `margin`, the others with `next_margin`.
        """
        rows = []
        row: list[Cell] = []
        room = self.width - _columns(margin)
        for cell in cells:
            if cell[1] > room:
                at = _find_break(row)
                rows.append(_join(margin, row[:at]))
                row, margin = row[at:], next_margin
                room = self.width - _columns(margin) - _columns(row)
            row.append(cell)
            room -= cell[1]
        return [*rows, _join(margin, row)]


def _find_break(row: list[Cell]) -> int:
    """After how many cells to break a full row."""
    for at in range(len(row), len(row) // 2, -1):
        if row[at - 1][0] == " ":
            return at
    return len(row)


def _join(margin: list[Cell], row: list[Cell]) -> str:
    start = "".join(text for text, _ in margin)
    return start + "".join(text for text, _ in row).rstrip(" ")


def _columns(cells: list[Cell]) -> int:
    return sum(width for _, width in cells)


# A piece of text that is never taken apart, and the columns that it takes.
Cell = tuple[str, int]


def _plain(text: str) -> list[Cell]:
    """The cells of a text of our own, printable ASCII."""
    return [(character, 1) for character in text]


def _shorten(text: str, columns: int, size: int, escaped: str = "") -> list[Cell]:
    """The cells of `text` on one line, within `columns` and `size` bytes.

    The characters in `escaped` are shown as their numbers.
    """
    cells: list[Cell] = []
    for cell in _make_cells(" ".join(text[:MAX_FIELD].split())):
        if cell[1] == 1 and cell[0][0] in escaped:
            cell = (f"\\x{ord(cell[0][0]):02x}", 4)
        columns -= cell[1]
        size -= len(cell[0].encode("utf-8"))
        # Room for the ellipsis, which is one column and three bytes.
        if columns < 1 or size < 3:
            return [*cells, ("\u2026", 1)]
        cells.append(cell)
    return cells


def _make_cells(line: str) -> list[Cell]:
    """`line`, without its end, as cells that are harmless on a terminal: the sanitiser.

    What is not printable is shown visibly: `^[`, `\\x9b`, `<U+202E>`.
    """
    from unicodedata import category  # here, since it costs 3 ms before the greeting

    cells: list[Cell] = []
    column = marks = 0
    for character in _normalize(line):
        if " " <= character <= "~":
            cell = (character, 1)
        elif character == "\t":
            cells += [(" ", 1)] * (_TAB - 1 - column % _TAB)
            column += _TAB - 1 - column % _TAB
            cell = (" ", 1)
        elif cells and category(character) in ("Mn", "Me") and character not in BLANK_FILLERS:
            marks += 1
            if marks <= MAX_MARKS:
                cells[-1] = (cells[-1][0] + character, cells[-1][1])
            continue
        else:
            cell = _show(character)
        marks = 0
        column += cell[1]
        cells.append(cell)
    return cells


def _normalize(line: str) -> str:
    from unicodedata import normalize  # here, as above

    if line.isascii():
        return line
    starts = range(0, len(line), _NORMALIZED_AT_ONCE)
    return "".join(normalize("NFC", line[at : at + _NORMALIZED_AT_ONCE]) for at in starts)


def _show(character: str) -> Cell:
    """One character that is no plain ASCII and no mark on another."""
    from unicodedata import category, east_asian_width  # here, as above

    from wcwidth import wcwidth  # here, since plain ASCII is all that most messages have

    kind = category(character)
    number = ord(character)
    if kind == "Zs":
        text = "  " if character == "\u3000" else " "
    elif number < 0x20 or number == 0x7F:
        text = f"^{chr(number ^ 0x40)}"
    elif number < 0xA0:
        text = f"\\x{number:02x}"
    elif kind in ("Mn", "Me") or character in BLANK_FILLERS or not character.isprintable():
        text = f"<U+{number:04X}>"
    else:
        # Terminals disagree: the widest view keeps the row within all of them.
        return character, max(1, wcwidth(character), 2 * (east_asian_width(character) in "WF"))
    return text, len(text)


class _Content:
    """What a message, or a part of one, has to show.

    `is_plain` says that `text` was text/plain; `attachments` names what cannot be shown;
    `is_cut` says that something was left out for its size.
    """

    __slots__ = ("attachments", "conversation", "is_cut", "is_plain", "subject", "text")

    def __init__(self, text: str = "", *, is_plain: bool = False, is_cut: bool = False) -> None:
        self.subject = ""
        self.conversation = ""
        self.text = text
        self.is_plain = is_plain
        self.is_cut = is_cut
        self.attachments: list[str] = []


def _read_message(head: bytes) -> _Content:
    entity = _parse_header(head)
    content = _read_entity(entity, [MAX_PARTS])
    content.subject = _decode_words(_find_field(entity, "subject"))
    content.conversation = _find_field(entity, CONVERSATION).strip().lower()
    return content


def _parse_header(data: bytes) -> Message:
    """The header of an entity, whose body stays one text.

    Not the parser for whole messages, which calls itself for each level of nesting and
    has no limit; and its old policy, since the new one raises on many a broken field.
    """
    from email.parser import BytesHeaderParser  # here, since it costs 15 ms
    from email.policy import compat32

    entity = BytesHeaderParser(policy=compat32).parsebytes(data)
    for name in ("content-type", "content-disposition", "content-transfer-encoding"):
        if len(_find_field(entity, name)) > MAX_FIELD:
            del entity[name]
    return entity


def _find_field(entity: Message, name: str) -> str:
    """The first field of that name, not yet decoded, "" if there is none."""
    values = (str(value) for key, value in entity.raw_items() if key.lower() == name)
    return next(values, "").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_entity(entity: Message, parts_left: list[int]) -> _Content:
    kind = entity.get_content_type()
    parts_left[0] -= 1
    if parts_left[0] < 0:
        return _Content(is_cut=True)
    boundary = _read_parameter(entity, "boundary", "content-type")
    if kind.startswith("multipart/") and boundary:
        bodies = _split_parts(_read_body(entity), boundary)
        if kind == "multipart/alternative":
            return _read_alternative(bodies, parts_left)
        return _read_mixed(bodies, parts_left)
    return _read_leaf(entity, kind)


def _read_alternative(bodies: list[bytes], parts_left: list[int]) -> _Content:
    """The first alternative in text/plain, or else the first that has any text."""
    best = _Content()
    for body in bodies:
        content = _read_entity(_parse_header(body), parts_left)
        if content.is_plain:
            return content
        if not best.text:
            best = content
    return best


def _read_mixed(bodies: list[bytes], parts_left: list[int]) -> _Content:
    """All parts, one after the other."""
    whole = _Content()
    texts = []
    for body in bodies:
        content = _read_entity(_parse_header(body), parts_left)
        texts.append(content.text)
        whole.is_plain |= content.is_plain
        whole.is_cut |= content.is_cut
        whole.attachments += content.attachments
        if parts_left[0] <= 0:
            whole.is_cut = True
            break
    whole.text = "\n".join(text for text in texts if text)
    return whole


def _read_leaf(entity: Message, kind: str) -> _Content:
    name = _read_parameter(entity, "filename", "content-disposition")
    name = name or _read_parameter(entity, "name", "content-type")
    disposition = _find_field(entity, "content-disposition").strip().lower()
    # A multipart without a boundary has no parts to tell apart, but it has a text.
    is_text = kind in ("text/plain", "text/html") or kind.startswith("multipart/")
    if not is_text or disposition.startswith("attachment"):
        content = _Content()
        if kind not in _SIGNATURES:
            content.attachments.append(f"{_decode_words(name)} {kind}".strip())
        return content
    charset = _read_parameter(entity, "charset", "content-type")
    text = _decode_text(_read_body(entity), charset).replace("\r\n", "\n")
    if kind == "text/html":
        return _Content(_read_html(text))
    return _Content(text, is_plain=True)


def _read_body(entity: Message) -> bytes:
    """The body without its transfer encoding; as it stands if that is broken."""
    body = entity.get_payload(decode=True)
    return body if isinstance(body, bytes) else b""


def _read_parameter(entity: Message, name: str, field: str) -> str:
    """A parameter of a field (RFC 2045 5.1, RFC 2231), "" if it is missing or broken."""
    from email.utils import collapse_rfc2231_value  # here, as above

    try:
        value = entity.get_param(name, "", field)
        return collapse_rfc2231_value(value or "").strip()
    except (LookupError, TypeError, ValueError):
        return ""


def _split_parts(body: bytes, boundary: str) -> list[bytes]:
    """The parts between the delimiter lines (RFC 2046 5.1.1); the last may lack its end."""
    delimiter = b"--" + boundary.encode("utf-8", "replace")
    parts: list[list[bytes]] = []
    for line in body.split(b"\n"):
        mark = line.rstrip(b" \t\r")
        if mark == delimiter + b"--":
            break
        if mark == delimiter:
            parts.append([])
        elif parts:
            parts[-1].append(line)
    return [b"\n".join(lines) for lines in parts[: MAX_PARTS + 1]]


def _decode_text(data: bytes, charset: str) -> str:
    """`data` as text; bytes that are none in its charset are shown as their numbers."""
    import codecs  # loaded with the interpreter; named here only

    try:
        name = codecs.lookup(charset[:40]).name
        if name not in _READ_AS_UTF8:
            return data.decode(name, "backslashreplace")
    except (LookupError, ValueError):
        pass
    return data.decode("utf-8", "backslashreplace")


def _decode_words(field: str) -> str:
    """A field with its encoded words decoded (RFC 2047), all on one line."""
    from email.errors import HeaderParseError  # here, as above
    from email.header import decode_header

    text = " ".join(field[:MAX_FIELD].split())
    try:
        words = decode_header(text)
    except (HeaderParseError, LookupError, ValueError):
        return text
    return "".join(
        word if isinstance(word, str) else _decode_word(word, charset) for word, charset in words
    )


def _decode_word(word: bytes, charset: str | None) -> str:
    if charset is None:
        # That is how decode_header packs what stands between encoded words.
        return word.decode("raw-unicode-escape", "backslashreplace")
    return _decode_text(word, charset.partition("*")[0])


def _read_html(page: str) -> str:
    """The text of a page, a line for each block of it.

    Not by html.parser: 32 KiB of `<a ` keep it busy for ten seconds. Each alternative of
    _TAG matches to the end if it finds none of its own, so this reads a page once.
    """
    import re  # here, since only HTML needs it

    text = re.sub(_TAG, lambda tag: _replace_tag(tag["name"]), " ".join(page.split()))
    lines = (" ".join(line.split()) for line in _replace_references(text).split("\n"))
    return "\n".join(line for line in lines if line)


def _replace_tag(name: str | None) -> str:
    return "\n" if name and name.lower() in _BREAKING_TAGS else ""


def _replace_references(text: str) -> str:
    from html import unescape  # here, as above

    try:
        return unescape(text)
    except ValueError:  # a character's number of thousands of digits
        return text
