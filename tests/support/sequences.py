"""RFC 821 4.3, "COMMAND-REPLY SEQUENCES", as data, and a reader that holds a session to it.

The reader knows nothing of mda: it walks along what the client has said and takes the
replies one by one, as a client would.
"""

from __future__ import annotations

import re

# The rows as they stand in RFC 821: success, failure and error together. DATA's second
# half, the answer to the end of data, is the row ".".
RFC821: dict[str, set[int]] = {
    "CONNECTION": {220, 421},
    "HELO": {250, 500, 501, 504, 421},
    "MAIL": {250, 552, 451, 452, 500, 501, 421},
    "RCPT": {250, 251, 550, 551, 552, 553, 450, 451, 452, 500, 501, 503, 421},
    "DATA": {354, 451, 554, 500, 501, 503, 421},
    ".": {250, 552, 554, 451, 452},
    "RSET": {250, 500, 501, 504, 421},
    "SEND": {250, 552, 451, 452, 500, 501, 502, 421},
    "SOML": {250, 552, 451, 452, 500, 501, 502, 421},
    "SAML": {250, 552, 451, 452, 500, 501, 502, 421},
    "VRFY": {250, 251, 550, 551, 553, 500, 501, 502, 504, 421},
    "EXPN": {250, 550, 500, 501, 502, 504, 421},
    "HELP": {211, 214, 500, 501, 502, 504, 421},
    "NOOP": {250, 500, 421},
    "QUIT": {221, 500},
    "TURN": {250, 502, 500, 503},
}
_OPENING = {503, 550, 553, 455, 555}
# What RFC 5321 and the documents of the extensions add, and nothing else.
ADDED: dict[str, set[int]] = {
    "CONNECTION": {554},
    "MAIL": _OPENING,
    "SEND": _OPENING,
    "SOML": _OPENING,
    "SAML": _OPENING,
    "RCPT": {455, 555},
    ".": {450, 550},
    "VRFY": {252},
    "EXPN": {252},
    "EHLO": {250, 504, 550},
    "LHLO": {250, 504, 550},
    # Verbs of extensions that are not offered (RFC 5321 4.2.4).
    "BDAT": {250, 503, 552},
    "STARTTLS": {220, 454, 502, 503},
    "AUTH": {502},
    "ETRN": {502},
    "ATRN": {502},
    "XCLIENT": {220, 501, 502, 503},
    "XFORWARD": {502},
    "PROXY": {502},
    "XWHO": {250, 451},
}
_EMPTIES = {"MAIL", "SEND", "SOML", "SAML", "RSET", "HELO", "EHLO", "LHLO"}
ANY_VERB = {421, 500, 501}
_CHUNK = re.compile(rb"(\d{1,19})(?: +(LAST) *)?", re.IGNORECASE)


def row(verb: str) -> set[int]:
    """The codes that are allowed as the answer to `verb`."""
    allowed = RFC821.get(verb, set()) | ADDED.get(verb, set())
    return allowed if verb in ("CONNECTION", ".") else allowed | ANY_VERB


def read_replies(said: bytes) -> list[tuple[int, list[bytes]]]:
    """Code and lines of each reply; fails unless every line is one of a reply's."""
    replies: list[tuple[int, list[bytes]]] = []
    lines: list[bytes] = []
    rows = said.split(b"\r\n")
    assert rows.pop() == b"", f"the last reply has no end: {said!r}"
    for line in rows:
        assert len(line) <= 510, line
        assert all(32 <= char < 127 for char in line), line
        assert line[:3].isdigit(), line
        assert line[3:4] in (b" ", b"-"), line
        lines.append(line)
        if line[3:4] == b" ":
            assert len({each[:3] for each in lines}) == 1, lines
            replies.append((int(line[:3]), lines))
            lines = []
    assert not lines, f"a reply without a last line: {lines}"
    return replies


def attribute(
    client: bytes, said: bytes, *, is_lmtp: bool = False, texts: list[bytes] | None = None
) -> list[tuple[str, int]]:
    """Each verb that `client` says with the code of its one reply, in order.

    The messages between them are added to `texts`, as they are to be stored. Fails where a
    command has no reply, a reply no command, or a code not its row.
    """
    walk = _Walk(client, [code for code, _ in read_replies(said)], is_lmtp=is_lmtp)
    while walk.replies:
        walk.step()
    walk.leave_out_half_a_chunk()
    if texts is not None:
        texts += walk.texts
    assert b"\r\n" not in walk.client, f"no reply to {walk.client!r}, after {walk.pairs}"
    for verb, code in walk.pairs:
        assert code in row(verb), (verb, code)
    return walk.pairs


class _Walk:
    """What is left of the client's words and of the replies to them."""

    def __init__(self, client: bytes, replies: list[int], *, is_lmtp: bool) -> None:
        self.client = client
        self.replies = replies
        self.texts: list[bytes] = []
        self.pairs = [("CONNECTION", replies.pop(0))]
        self._is_lmtp = is_lmtp
        self._accepted = 0
        self._chunks = b""

    def step(self) -> None:
        """One command, and what belongs to it."""
        line, end, self.client = self.client.partition(b"\r\n")
        assert end or self.replies == [421], f"replies {self.replies} to nothing: {self.pairs}"
        verb = line.split(b" ")[0].decode("ascii", "replace").upper() if end else "NOOP"
        code = self.replies.pop(0)
        self.pairs.append((verb if verb != "." else "", code))
        if verb == "RCPT" and code in (250, 251):
            self._accepted += 1
        elif code == 250 and verb in _EMPTIES:
            self._accepted = 0
            self._chunks = b""
        elif (verb, code) == ("DATA", 354):
            self._take_text()
        elif verb == "BDAT":
            self._take_chunk(line[4:].strip(b" \t"))
        is_over = (verb, code) in (("XCLIENT", 220), ("TURN", 250))
        if code == 221 or self.pairs[-1][1] == 421 or is_over:
            assert not self.replies, f"replies {self.replies} after {self.pairs}"
            self.client = b""

    def _take_text(self) -> None:
        text, end, self.client = (b"\r\n" + self.client).partition(b"\r\n.\r\n")
        if end:
            self.texts.append(_unstuff(text))
            self._end(self._accepted if self._is_lmtp else 1)

    def _take_chunk(self, argument: bytes) -> None:
        """So many octets, whatever was said of them; the last ends the text (RFC 3030)."""
        found = _CHUNK.fullmatch(argument)
        if found is None:
            return
        self._chunks += self.client[: int(found[1])]
        self.client = self.client[int(found[1]) :]
        if found[2] and self._accepted:
            self.texts.append(_end_line(self._chunks.replace(b"\r\n", b"\n")))
            self.replies.insert(0, self.pairs.pop()[1])
            self._end(self._accepted if self._is_lmtp else 1)

    def leave_out_half_a_chunk(self) -> None:
        """A chunk that has not come whole has no reply yet."""
        line, end, rest = self.client.partition(b"\r\n")
        found = _CHUNK.fullmatch(line[4:].strip(b" \t")) if line[:5].upper() == b"BDAT " else None
        if end and found and len(rest) < int(found[1]):
            self.client = b""

    def _end(self, due: int) -> None:
        assert len(self.replies) >= due, f"no reply to the end of data: {self.pairs}"
        self.pairs += [(".", code) for code in self.replies[:due]]
        del self.replies[:due]
        self._accepted = 0
        self._chunks = b""


def _end_line(text: bytes) -> bytes:
    return text if text.endswith(b"\n") or not text else text + b"\n"


def _unstuff(text: bytes) -> bytes:
    """The stored form of a text with a CRLF before each line (RFC 821 4.5.2)."""
    _, *lines = text.split(b"\r\n")
    return b"".join(line.removeprefix(b".") + b"\n" for line in lines)
