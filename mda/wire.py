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

from mda.model import Copy, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.model import Verb

RESOLVE = b"resolve"
VERIFY = b"verify"
EXPAND = b"expand"
ROWS = b"rows"
PROBE = b"probe"
SPOOL = b"spool"
TEXT = b"text"
DELIVER = b"deliver"
QUEUE = b"queue"
WHO = b"who"
PEER = b"peer"
TURN = b"turn"
# The only frame that nobody has asked for: the broker ends, and the session should.
STOP = b"stop"

# A text's: quoted for an mbox, plain for a Maildir or a command.
FORMS = (b"q", b"p")

MAX_FRAME = 64 * 1024
MAX_BLOCK = 8 * 1024
# Of the rows of an answer that go into one frame; the others are asked for by ROWS.
MAX_ROWS = 32 * 1024

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


def pack_rows(outcome: Outcome, rows: list[bytes], begin: int = 0) -> bytes:
    """The frame of an answer with rows: their number, and those from `begin` that fit."""
    fitting: list[bytes] = []
    room = MAX_ROWS
    for row in rows[begin:]:
        room -= len(row) + _INT_SIZE
        if room < 0 and fitting:
            break
        fitting.append(row)
    return pack_outcome(outcome, b"%d" % len(rows), *fitting)


def _read_copy(row: bytes) -> Copy:
    number, forms, address, owner, way = unpack(row)
    is_remote = way == b"away"
    return Copy(int(number), forms.decode("ascii"), address, owner, is_remote=is_remote)


def _read_member(row: bytes) -> tuple[str, str, str]:
    local_part, domain, full_name = (
        field.decode("utf-8", "surrogateescape") for field in unpack(row)
    )
    return local_part, domain, full_name


def _name_copy(copy: Copy) -> tuple[bytes, bytes, bytes]:
    wish = copy.wish
    return b"%d" % copy.number, wish.notify.encode("ascii"), wish.original


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

    def _ask_rows(self, *fields: bytes) -> tuple[Outcome, list[bytes]]:
        """A request whose answer is rows: their number, and as many as fit in a frame."""
        outcome, more, _ = self._ask(*fields)
        if not more:
            return outcome, []
        rows = more[1:]
        while len(rows) < int(more[0]):
            again, next_rows, _ = self._ask(ROWS, b"%d" % len(rows))
            if not again.is_done or len(next_rows) < 2:
                raise WireError("rows are missing")
            rows += next_rows[1:]
        return outcome, rows

    def resolve(
        self,
        verb: Verb,
        local_part: bytes,
        size: int,
        *,
        is_first: bool,
        is_handed_over: bool = False,
        only: bytes = b"",
        domain: bytes = b"",
        route: bytes = b"",
        is_notice: bool = False,
    ) -> tuple[Outcome, list[Copy]]:
        """The copies that mail for `local_part` means; none unless the outcome is 2xx.

        `size` is what the client has declared, in bytes, or 0. `is_first` begins a new
        table of targets, to which their numbers belong; `is_handed_over` says that an MTA
        has followed aliases and forward files already. `only` is the digest of the one place
        that the queue asks for, or empty. `domain` is for a mailbox that is not ours, with
        what is left of its source `route` (b"@ONE,@TWO"); `is_notice` says that the message is
        one of ours about another.
        """
        outcome, rows = self._ask_rows(
            RESOLVE,
            verb.encode("ascii"),
            local_part,
            b"%d" % size,
            b"first" if is_first else b"next",
            b"notice" if is_notice else b"handed-over" if is_handed_over else b"own",
            only,
            domain,
            route,
        )
        return outcome, [_read_copy(row) for row in rows]

    def verify(self, string: bytes, *, may_be_full_name: bool) -> tuple[Outcome, str, str]:
        """Whom `string` names: the outcome, the local part of the mailbox, the full name.

        `may_be_full_name` lets it be more than a mailbox. 553 for several persons.
        """
        kind = b"anything" if may_be_full_name else b"mailbox"
        outcome, more, _ = self._ask(VERIFY, string, kind)
        names = [each.decode("utf-8", "surrogateescape") for each in more] or ["", ""]
        return outcome, names[0], names[1]

    def expand(self, string: bytes) -> tuple[Outcome, list[tuple[str, str, str]]]:
        """The members of a list: local part, domain ("" for ours) and full name of each."""
        outcome, rows = self._ask_rows(EXPAND, string)
        return outcome, [_read_member(row) for row in rows]

    def probe(self, copy: Copy, sender: bytes) -> tuple[Outcome, int]:
        """Would a terminal of this user take the peer's message now, and how wide is it.

        `sender` is the reverse-path without brackets.
        """
        outcome, more, _ = self._ask(PROBE, b"%d" % copy.number, sender)
        return outcome, int(more[0]) if more else 0

    def open_spool(self, form: str) -> tuple[Outcome, int]:
        """A descriptor of an unnamed file on disk, for a text too large for memory."""
        outcome, _, fd = self._ask(SPOOL, form.encode("ascii"))
        return outcome, fd

    def offer_text(self, form: str, fd: int, size: int) -> None:
        """The text that is delivered from now on to who needs this form: "q" or "p"."""
        self._ask(TEXT, form.encode("ascii"), b"%d" % size, fd=fd)

    def deliver(
        self,
        verb: Verb,
        copy: Copy,
        *,
        sender: bytes = b"",
        recipient: bytes = b"",
        prefix: bytes = b"",
        block: bytes = b"",
        is_clipped: bool = False,
        deadline: float = 0.0,
    ) -> Outcome:
        """Deliver one copy by the verb table of RFC 821 3.4.

        `sender` and `recipient` are the paths without brackets, for a command's
        environment; `prefix` are the lines that stand before the text in this copy, the
        From_ line first; `block` what a terminal is shown, `is_clipped` that the block is
        not the whole text, `deadline` when waiting for locks must end (seconds,
        CLOCK_MONOTONIC).
        """
        outcome, _, _ = self._ask(
            DELIVER,
            verb.encode("ascii"),
            b"%d" % copy.number,
            sender,
            recipient,
            prefix,
            block,
            b"clipped" if is_clipped else b"whole",
            b"%d" % int(deadline * 1000),
        )
        return outcome

    def queue(
        self,
        verb: Verb,
        copies: list[Copy],
        *,
        sender: bytes = b"",
        head: bytes = b"",
        is_utf8: bool = False,
        ret: str = "",
        envid: bytes = b"",
    ) -> Outcome:
        """Queue the message for copies that leave this host, or have failed for now.

        `sender` is as for `deliver`, `head` the header lines that go before the text; `ret` and
        `envid` are the envelope's, and with each copy goes its wish.
        """
        outcome, _, _ = self._ask(
            QUEUE,
            verb.encode("ascii"),
            sender,
            head,
            b"utf8" if is_utf8 else b"ascii",
            ret.encode("ascii"),
            envid,
            *(field for copy in copies for field in _name_copy(copy)),
        )
        return outcome

    def name_peer(self, address: str) -> Outcome:
        """The client at `address` is whom our peer stands for from now on."""
        return self._ask(PEER, address.encode("ascii"))[0]

    def turn(self, host: str) -> Outcome:
        """May the peer, which calls itself `host`, be the receiver: then the session is over."""
        return self._ask(TURN, host.encode("ascii"))[0]

    def who(self) -> tuple[Outcome, list[bytes]]:
        """Who is logged in: one row per terminal, the fields separated by spaces."""
        return self._ask_rows(WHO)
