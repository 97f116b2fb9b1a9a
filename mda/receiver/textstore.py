"""The text of a message as it waits for its delivery: in memory, or on disk when large."""

from __future__ import annotations

import os

from mda import log
from mda.content.headers import HeaderFilter
from mda.content.quoting import Quoter
from mda.model import Outcome, cannot_keep
from mda.receiver import replies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config
    from mda.receiver.replies import Reply
    from mda.wire import Broker

_HEAD = 128 * 1024  # as much of a text as a terminal's block is made from


class TextStore:
    """The text of one message in the forms that its copies need.

    `forms` are "q", quoted for mbox files, and "p", as it came. `head` are its first
    octets without quoting; `error` is what went wrong, and from then on the text is only
    swallowed.
    """

    def __init__(self, broker: Broker, config: Config, forms: str) -> None:
        self._limits = config.receiver
        self._line_size = 0
        self._filter = HeaderFilter()
        self._stored = [StoredForm(broker, form, config.delivery.memory) for form in forms]
        self.received_size = 0
        self.head = bytearray()
        self.error: Outcome | None = None

    def write(self, octets: bytes) -> None:
        """Add a piece of the text (LF line ends) as it comes."""
        self.received_size += len(octets)
        if self.received_size > self._limits.message_size:
            self.refuse(replies.TOO_LARGE)
        if self._limits.text_line and not self.error:
            self._measure_lines(octets)
        self._keep(self._filter.feed(octets))

    def refuse(self, reply: Reply) -> None:
        """The text is not taken, for the first reason that there was."""
        self.error = self.error or replies.to_outcome(reply)

    def _measure_lines(self, octets: bytes) -> None:
        """Refuse a line that is longer on its way, with its CRLF (RFC 821 4.5.3)."""
        most = self._limits.text_line - len(b"\r\n")
        # Where the line in hand begins. What lies between there and the last LF that is
        # near enough are lines that are shorter still.
        at = -self._line_size
        while (end := octets.rfind(b"\n", max(0, at), max(0, at + most + 1))) >= 0:
            at = end + 1
        self._line_size = len(octets) - at
        if self._line_size > most:
            self.refuse(replies.TEXT_LINE_TOO_LONG)

    def finish(self) -> None:
        """The text is complete; nobody can change it any more."""
        self._keep(self._filter.finish())
        for stored in self._stored:
            self._store(stored, stored.rest())
            stored.seal()
        if self._filter.received_count > self._limits.received_lines:
            self.refuse(replies.MAIL_LOOP)

    @property
    def is_head_whole(self) -> bool:
        """`head` is all of the text."""
        return self.received_size <= _HEAD

    def has_been_at(self, address: bytes) -> bool:
        """Has a message with this text been delivered to `address` (as in Delivered-To)?"""
        return address in self._filter.delivered_to

    def offer(self) -> None:
        """Give the broker every form, for the deliveries that follow; raises WireError."""
        for stored in self._stored:
            stored.offer()

    def _keep(self, octets: bytes) -> None:
        if len(self.head) < _HEAD:
            self.head += octets[: _HEAD - len(self.head)]
        for stored in self._stored:
            self._store(stored, stored.convert(octets))

    def _store(self, stored: StoredForm, octets: bytes) -> None:
        if not self.error and octets:
            self.error = stored.write(octets)

    def close(self) -> None:
        """Let go of the text."""
        for stored in self._stored:
            stored.close()


class StoredForm:
    """The text in one form, on one descriptor."""

    def __init__(self, broker: Broker, form: str, memory: int) -> None:
        self._broker = broker
        self._form = form
        self._memory = memory
        self._quoter = Quoter() if form == "q" else None
        self._is_on_disk = False
        self._fd = -1
        self._size = 0

    def convert(self, octets: bytes) -> bytes:
        """A piece of the text in this form, as far as it can be told."""
        return self._quoter.feed(octets) if self._quoter else octets

    def rest(self) -> bytes:
        """What is left at the end of the text."""
        return self._quoter.finish() if self._quoter else b""

    def write(self, octets: bytes) -> Outcome | None:
        """Keep what was converted; an outcome, always temporary, says why that failed."""
        try:
            if self._fd == -1:
                self._fd = os.memfd_create("mda", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            if self._size + len(octets) > self._memory and not self._is_on_disk:
                refusal = self._move_to_disk()
                if refusal is not None:
                    return refusal
            write_all(self._fd, octets)
            self._size += len(octets)
        except OSError as error:
            return cannot_keep(error, "keeping the message")
        return None

    def _move_to_disk(self) -> Outcome | None:
        outcome, fd = self._broker.open_spool(self._form)
        if not outcome.is_done or fd == -1:
            return outcome
        memory, self._fd, self._is_on_disk = self._fd, fd, True
        try:
            os.lseek(memory, 0, os.SEEK_SET)
            while octets := os.read(memory, 1 << 16):
                write_all(fd, octets)
        finally:
            os.close(memory)
        return None

    def seal(self) -> None:
        """Make memory unchangeable for whoever holds it; an empty text gets some."""
        import fcntl

        if self._fd == -1:
            self._fd = os.memfd_create("mda", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        if not self._is_on_disk:
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)

    def offer(self) -> None:
        """Give it to the broker; raises WireError."""
        self._broker.offer_text(self._form, self._fd, self._size)

    def close(self) -> None:
        """Let go of the descriptor; what has been delivered stays so if that fails."""
        if self._fd != -1:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as error:
                log.write("text", log.WARNING, error=f"closing: {error.strerror}")


def write_all(fd: int, octets: bytes) -> None:
    """Write every octet; raises OSError."""
    view = memoryview(octets)
    while view:
        view = view[os.write(fd, view) :]
