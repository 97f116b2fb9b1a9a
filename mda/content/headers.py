"""The header lines of a stored message: the ones we add, and the one we replace."""

from __future__ import annotations

import time

# A field name longer than this is none, so no more is kept while looking for its colon.
_LONGEST_NAME = 256
_LONGEST_LINE = 512  # of which anything is looked at
_MOST_DELIVERIES = 100  # more of them are a loop that Received lines count as well
_LONGEST_SENDER = 320
_LONGEST_WORD = 255
_UNWANTED = '()<>;\\"'
_NAME_BYTES = bytes(range(33, 127))
_NO_BLANKS = bytes(byte if 32 < byte != 127 else ord("-") for byte in range(256))
_NO_CONTROLS = bytes(byte if 32 <= byte != 127 else ord("?") for byte in range(256))


class HeaderFilter:
    """Takes every Return-Path out of a message's header, in a stream; all else passes.

    Lines end in LF. The header ends at the first empty line, or at the first line that is
    no header line; from there on nothing is looked at. At most the beginning of a line is
    kept between chunks.
    `received_count` is the number of Received fields so far (RFC 5321 6.3),
    `delivered_to` the addresses in the Delivered-To fields below the first of them: what
    stands above was put there by who hands us the message, and not by a delivery before.
    """

    __slots__ = (
        "_begun",
        "_can_continue",
        "_is_dropping",
        "_is_line_start",
        "delivered_to",
        "is_in_header",
        "received_count",
    )

    def __init__(self) -> None:
        self.is_in_header = True
        self.received_count = 0
        self.delivered_to: set[bytes] = set()
        self._is_line_start = True
        # A line of which too little has come to know what it is.
        self._begun = b""
        # Of the line in hand, and of the lines that continue its field.
        self._is_dropping = False
        self._can_continue = False

    def feed(self, chunk: bytes) -> bytes:
        """The bytes of `chunk` that stay, as far as they can be told."""
        if not self.is_in_header:
            return chunk
        data = self._begun + chunk
        self._begun = b""
        out: list[bytes] = []
        at = 0
        while at < len(data) and self.is_in_header:
            end = data.find(b"\n", at) + 1 or len(data)
            if self._is_line_start and not self._judge(data[at : min(end, at + _LONGEST_LINE)]):
                self._begun = data[at:]
                return b"".join(out)
            if not self._is_dropping:
                out.append(data[at:end])
            self._is_line_start = data[end - 1 : end] == b"\n"
            at = end
        out.append(data[at:])
        return b"".join(out)

    def finish(self) -> bytes:
        """What is left at the end of the text."""
        begun, self._begun = self._begun, b""
        if begun:
            self._judge_other(begun)
        return b"" if self._is_dropping else begun

    def _judge(self, line: bytes) -> bool:
        """Decide over the line that begins with `line`; False if more of it is needed."""
        name, colon, value = line.partition(b":")
        name = name.rstrip(b" \t")
        if line[:1] in (b" ", b"\t"):
            self._is_dropping = self._is_dropping and self._can_continue
            self.is_in_header = self._can_continue
        elif colon and 0 < len(name) < _LONGEST_NAME and not name.translate(None, _NAME_BYTES):
            is_whole = value.endswith(b"\n") or len(line) == _LONGEST_LINE
            if name.lower() == b"delivered-to" and not is_whole:
                return False
            self._judge_field(name.lower(), value)
        elif colon or line.endswith(b"\n") or len(line) >= _LONGEST_NAME:
            self._judge_other(line)
        else:
            return False
        return True

    def _judge_field(self, name: bytes, value: bytes) -> None:
        self._is_dropping = name == b"return-path"
        self._can_continue = True
        if name == b"received":
            self.received_count += 1
        elif name == b"delivered-to" and self._is_judged_by_deliveries:
            self.delivered_to.add(value.strip())

    @property
    def _is_judged_by_deliveries(self) -> bool:
        return self.received_count > 0 and len(self.delivered_to) < _MOST_DELIVERIES

    def _judge_other(self, line: bytes) -> None:
        """A From_ line, quoted or not, is one that MTAs leave in headers; others end it."""
        self._is_dropping = False
        self._can_continue = False
        self.is_in_header = line.startswith((b"From ", b">From "))


def from_line(sender: bytes, when: float) -> bytes:
    """The From_ line: `From sender Www Mmm dd hh:mm:ss yyyy`, local time, with its LF.

    `sender` is the reverse-path's text as it came, empty for the null one.
    """
    shown = sender[:_LONGEST_SENDER].translate(_NO_BLANKS) or b"MAILER-DAEMON"
    return b"From %b %b\n" % (shown, time.asctime(time.localtime(when)).encode("ascii"))


def return_path(text: bytes) -> bytes:
    """The Return-Path line for the reverse-path `text` (RFC 5321 4.4), with its LF."""
    return b"Return-Path: <%b>\n" % text.translate(_NO_CONTROLS)


def delivered_to(address: bytes) -> bytes:
    """The Delivered-To line of one copy, by which a loop is known, with its LF."""
    return b"Delivered-To: %b\n" % address.translate(_NO_CONTROLS)


def original_to(path: bytes) -> bytes:
    """The X-Original-To line: the forward-path as the client gave it, with its LF."""
    return b"X-Original-To: %b\n" % path.translate(_NO_CONTROLS)


def received(
    helo: str,
    peer_text: str,
    by: str,
    protocol: str,
    identity: str,
    recipient: str | None,
    when: float,
) -> bytes:
    """The time stamp line (RFC 5321 4.4), folded with tabs, in LF line ends.

    `peer_text` is what the kernel said about the peer, `protocol` as registered ("ESMTP",
    "LMTP", "UTF8SMTP"), `identity` our name for the transaction, `recipient` the
    forward-path's text, or None where it must not be told to other recipients.
    """
    comment = _clean(peer_text, " ", _UNWANTED)
    words = (helo or "unknown", by, protocol, identity)
    origin, host, by_protocol, name = (_clean(word, "", _UNWANTED) for word in words)
    if recipient is not None and len(recipient) > _LONGEST_WORD:
        recipient = None  # half a quoted string would swallow the date behind it
    lines = [
        f"Received: from {origin}" + (f" ({comment})" if comment else ""),
        f"by {host} with {by_protocol} id {name}" + (";" if recipient is None else ""),
        format_date(when),
    ]
    if recipient is not None:
        shown = _clean(recipient, " ", "<>", protocol.startswith("UTF8"))
        lines[2] = f"for <{shown}>; {lines[2]}"
    return "\n\t".join(lines).encode("utf-8") + b"\n"


def format_date(when: float) -> str:
    """Local time with its zone in the form of RFC 5322 3.3, in English everywhere."""
    local = time.localtime(when)
    weekday, month, day, clock, year = time.asctime(local).split()
    offset = local.tm_gmtoff // 60
    hours, minutes = divmod(abs(offset), 60)
    sign = "-" if offset < 0 else "+"
    return f"{weekday}, {day} {month} {year} {clock} {sign}{hours:02}{minutes:02}"


def _clean(text: str, blanks: str, unwanted: str, allows_utf8: bool = False) -> str:
    """`text` cut and with "?" for whatever could end or confuse its place in a line."""
    return "".join(
        c
        if c in blanks
        or ("!" <= c <= "~" and c not in unwanted)
        or (allows_utf8 and c > "~" and c.isprintable())
        else "?"
        for c in text[:_LONGEST_WORD]
    )
