"""The frames between session and broker: hand-packed, bounded, and nothing more.

A frame is one datagram of a SOCK_SEQPACKET pair: fields, each a four-byte big-endian
length and that many bytes. The first field of a request is its kind; the first three
fields of an answer are an `Outcome`. A descriptor may ride along. Both ends treat a
frame that does not fit as the end of the conversation, never as something to guess at.
"""

from __future__ import annotations

import _socket
import os
import sys

from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.model import Verb

RESOLVE = b"resolve"
PROBE = b"probe"
SPOOL = b"spool"
DELIVER = b"deliver"
VERIFY = b"verify"
WHO = b"who"
# The only frame that nobody has asked for: the broker ends, and the session should.
STOP = b"stop"

MAX_FRAME = 64 * 1024
MAX_BLOCK = 8 * 1024

_INT_SIZE = 4


class WireError(Exception):
    """A frame is malformed, too large, or the other process is gone."""


def pack(*fields: bytes) -> bytes:
    """Join `fields` into one frame; raises WireError above MAX_FRAME bytes."""
    frame = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    if len(frame) > MAX_FRAME:
        raise WireError(f"frame of {len(frame)} bytes")
    return frame


def unpack(frame: bytes) -> list[bytes]:
    """Take a frame apart; raises WireError unless it is fields from end to end."""
    fields = []
    at = 0
    while at < len(frame):
        size = int.from_bytes(frame[at : at + 4], "big")
        field = frame[at + 4 : at + 4 + size]
        if len(field) != size or at + 4 > len(frame):
            raise WireError("frame cut short")
        fields.append(field)
        at += 4 + size
    return fields


def read_number(field: bytes, most: int) -> int:
    """A field that is a number from 0 to `most`; raises WireError for anything else."""
    if not field.isdigit() or len(field) > 20 or int(field) > most:
        raise WireError("not a number in its bounds")
    return int(field)


def pack_outcome(outcome: Outcome, *more: bytes) -> bytes:
    """The frame of an answer: the outcome's three fields, then `more`."""
    return pack(
        b"%d" % outcome.code,
        outcome.enhanced.encode("ascii"),
        outcome.text.encode("ascii", "replace")[:400],
        *more,
    )


def send_frame(channel: _socket.socket, frame: bytes, fd: int = -1) -> None:
    """Send one frame, with a descriptor if `fd` is not -1; raises WireError."""
    ancillary = []
    if fd != -1:
        rights = fd.to_bytes(_INT_SIZE, sys.byteorder)
        ancillary.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights))
    try:
        channel.sendmsg([frame], ancillary)
    except OSError as error:
        raise WireError(f"other process gone: {error.strerror}") from error


def receive_frame(channel: _socket.socket) -> tuple[bytes, int]:
    """One frame and the descriptor that came with it, or -1; (b"", -1) at the end.

    Raises WireError for a frame that did not fit, or with more than one descriptor.
    """
    frame, ancillary, flags, _ = channel.recvmsg(
        MAX_FRAME, _socket.CMSG_SPACE(_INT_SIZE), _socket.MSG_CMSG_CLOEXEC
    )
    fds = [
        int.from_bytes(data[at : at + _INT_SIZE], sys.byteorder)
        for _level, kind, data in ancillary
        if kind == _socket.SCM_RIGHTS
        for at in range(0, len(data) - _INT_SIZE + 1, _INT_SIZE)
    ]
    if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC) or len(fds) > 1:
        for fd in fds:
            os.close(fd)
        raise WireError("frame too large")
    return frame, fds[0] if fds else -1


class Broker:
    """The session's end: each method is one request and waits for its answer."""

    def __init__(self, channel: _socket.socket) -> None:
        self._channel = channel

    def fileno(self) -> int:
        """The descriptor of the channel, for the process that closes all others."""
        return self._channel.fileno()

    def _ask(self, *fields: bytes, fd: int = -1) -> tuple[Outcome, list[bytes], int]:
        send_frame(self._channel, pack(*fields), fd)
        frame, answer_fd = receive_frame(self._channel)
        answer = unpack(frame)
        if len(answer) < 3:
            raise WireError("broker gone")
        outcome = Outcome(int(answer[0]), answer[1].decode("ascii"), answer[2].decode("ascii"))
        return outcome, answer[3:], answer_fd

    def resolve(self, local_part: bytes) -> tuple[Outcome, str, str]:
        """Whose mail `local_part` is: the outcome, the account's name, the folder of it.

        Both names are empty unless the outcome is 2xx; an inbox has no folder's name.
        """
        outcome, more, _ = self._ask(RESOLVE, local_part)
        user, folder = (each.decode("utf-8", "surrogateescape") for each in more or (b"", b""))
        return outcome, user, folder

    def verify(self, string: bytes, *, may_be_full_name: bool) -> tuple[Outcome, str, str]:
        """Whom `string` names: the outcome, the local part of the mailbox, the full name.

        `may_be_full_name` lets it be more than a mailbox. 553 for several persons.
        """
        kind = b"anything" if may_be_full_name else b"mailbox"
        outcome, more, _ = self._ask(VERIFY, string, kind)
        names = [each.decode("utf-8", "surrogateescape") for each in more] or ["", ""]
        return outcome, names[0], names[1]

    def probe(self, local_part: bytes) -> tuple[Outcome, int]:
        """Would a terminal of this user take the peer's message now, and how wide is it."""
        outcome, more, _ = self._ask(PROBE, local_part)
        return outcome, int(more[0]) if more else 0

    def open_spool(self) -> tuple[Outcome, int]:
        """A descriptor of an unnamed file on disk, for a text too large for memory."""
        outcome, _, fd = self._ask(SPOOL)
        return outcome, fd

    def deliver(
        self,
        verb: Verb,
        local_part: bytes,
        *,
        prefix: bytes = b"",
        text: tuple[int, int] = (-1, 0),
        block: bytes = b"",
        is_clipped: bool = False,
        deadline: float = 0.0,
    ) -> Outcome:
        """Deliver one copy by the verb table of RFC 821 3.4.

        `prefix` are the lines that stand before the text in this recipient's copy,
        `text` the descriptor and the bytes in it, `block` what a terminal is shown,
        `is_clipped` that the block is not the whole text, `deadline` when waiting for
        locks must end (seconds, CLOCK_MONOTONIC).
        """
        fd, size = text
        outcome, _, _ = self._ask(
            DELIVER,
            verb.encode("ascii"),
            local_part,
            prefix,
            b"%d" % size,
            block,
            b"clipped" if is_clipped else b"whole",
            b"%d" % int(deadline * 1000),
            fd=fd,
        )
        return outcome

    def who(self) -> tuple[Outcome, list[bytes]]:
        """Who is logged in: one row per terminal, the fields separated by spaces."""
        outcome, rows, _ = self._ask(WHO)
        return outcome, rows
