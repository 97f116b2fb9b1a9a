"""mboxrd quoting: the one way to put "From " into an mbox that can be undone."""

from __future__ import annotations

_FROM = b"From "


class Quoter:
    """Puts one ">" before every line's beginning that matches ^>*From , in a stream.

    Only LF ends a line. The result does not depend on how the text is cut into chunks;
    at most four bytes are kept between two of them. A run of ">" can pass at once, since
    one more of them before "From " is the same bytes as one before the run.
    """

    __slots__ = ("_begun", "_is_quotable")

    def __init__(self) -> None:
        # The beginning of a "From " that the next chunk may complete.
        self._begun = b""
        # Since the last LF nothing has passed but ">".
        self._is_quotable = True

    def feed(self, chunk: bytes) -> bytes:
        """The quoted bytes of `chunk`, as far as they can be told."""
        data = self._begun + chunk
        out = self._quote(data) if _FROM in data else data
        last = data.rfind(b"\n") + 1
        if last:
            self._is_quotable = True
        self._begun = b""
        if self._is_quotable:
            start = data[last:].lstrip(b">")
            if len(start) < len(_FROM) and _FROM.startswith(start):
                self._begun = start
            else:
                self._is_quotable = False
        return out[: len(out) - len(self._begun)]

    def finish(self) -> bytes:
        """What is left at the end of the text."""
        begun, self._begun = self._begun, b""
        return begun

    def _quote(self, data: bytes) -> bytes:
        start = b"\n" if self._is_quotable else b""
        *befores, last = (start + data).split(_FROM)
        quoted = [each + b">" if each.rstrip(b">")[-1:] == b"\n" else each for each in befores]
        return _FROM.join([*quoted, last])[len(start) :]
