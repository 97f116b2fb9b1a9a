"""The one loop between the client's octets and the protocol's events."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import os
import select
import stat
import time

from mda import log
from mda.config import official_name
from mda.receiver import replies
from mda.receiver.protocol import (
    Addressing,
    AskingWho,
    Closing,
    Dropped,
    EndOfData,
    Hello,
    NeedOctets,
    Opening,
    Protocol,
    Say,
    Text,
)
from mda.receiver.transaction import Transaction, combine, subject
from mda.wire import Broker, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config
    from mda.model import Peer
    from mda.receiver.protocol import Event
    from mda.receiver.replies import Reply

_READ = 64 * 1024


class Gone(Exception):
    """The client has closed the channel or lost it; nothing more can be said to it."""


class Overdue(Exception):
    """The client has said nothing for too long."""


class Stopped(Exception):
    """The host is shutting us down."""


class Channel:
    """Octets to and from the client: a socket, a pair of pipes, a terminal in raw mode."""

    def __init__(self, read_fd: int, write_fd: int, idle_seconds: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._idle_seconds = idle_seconds
        self._due = bytearray()
        self._readable = select.poll()
        self._readable.register(read_fd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(write_fd, select.POLLOUT)
        self._is_waiting = False
        self._is_stopping = False
        if stat.S_ISSOCK(os.fstat(write_fd).st_mode):
            # A terminal's or pipe's flags would outlive us in the shell that shares it.
            os.set_blocking(write_fd, False)
        _signal.signal(_signal.SIGTERM, self._stop)

    def _stop(self, _signal_number: int, _frame: object) -> None:
        self._is_stopping = True
        if self._is_waiting:
            raise Stopped

    def say(self, reply: Reply) -> None:
        """Put a reply behind those that are due already."""
        self._due += reply.render()

    def flush(self) -> None:
        """Send what is due; raises Gone, or Overdue if the client does not take it."""
        while self._due:
            if not self._writable.poll(self._idle_seconds * 1000):
                raise Overdue
            try:
                del self._due[: os.write(self._write_fd, self._due)]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Gone from error

    def read(self) -> bytes:
        """What the client says next, at least one octet.

        Raises Gone at its end, Overdue after the idle time, Stopped on SIGTERM.
        """
        self._is_waiting = True
        try:
            if self._is_stopping:
                raise Stopped
            if not self._readable.poll(self._idle_seconds * 1000):
                raise Overdue
            octets = os.read(self._read_fd, _READ)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise Gone from error
        finally:
            self._is_waiting = False
        if not octets:
            raise Gone
        return octets


class Session:
    """One client from greeting to close."""

    def __init__(
        self, channel: Channel, broker: Broker, config: Config, peer: Peer, *, is_lmtp: bool
    ) -> None:
        self._channel = channel
        self._broker = broker
        self._name = official_name(config)
        self._peer = peer
        self._is_lmtp = is_lmtp
        self._errors_left = config.receiver.errors
        self._protocol = Protocol(
            self._name,
            is_lmtp=is_lmtp,
            offers_terminals=peer.may_use_terminals,
            offers_who=peer.kind == "unix",
            command_line=config.receiver.command_line,
            message_size=config.receiver.message_size,
        )
        self._transaction = Transaction(broker, config, peer, is_lmtp=is_lmtp)

    def converse(self) -> None:
        """Greet, then obey until the client quits, vanishes, or has to be sent away."""
        self._channel.say(replies.greeting(self._name))
        try:
            self._obey_all()
        except Gone:
            log.write("lost", peer=self._peer.address)
        except Overdue:
            self._send_away("4.4.2", "Idle for too long")
        except Stopped:
            self._send_away("4.3.2", "Shutting down")
        except WireError as error:
            log.write("broker", log.ERROR, error=str(error))
            self._send_away("4.3.0", "Local error")
        finally:
            self._transaction.drop()

    def _obey_all(self) -> None:
        while True:
            event = self._protocol.next_event()
            if isinstance(event, NeedOctets):
                self._channel.flush()
                self._protocol.feed(self._channel.read())
                continue
            self._obey(event)
            if isinstance(event, Closing):
                self._channel.flush()
                return
            if self._errors_left <= 0:
                self._send_away("4.7.0", "Too many errors")
                return

    def _obey(self, event: Event) -> None:
        match event:
            case Text():
                self._transaction.write(event.octets)
            case EndOfData():
                self._finish()
            case Opening():
                self._settle(self._transaction.open(event.verb, event.path, event.size))
            case Addressing():
                self._settle(self._transaction.address(event.path))
            case AskingWho():
                self._settle(self._list_logins())
            case Say():
                self._say(event)

    def _say(self, event: Say) -> None:
        if isinstance(event, Dropped):
            self._transaction.drop()
        if isinstance(event, Hello):
            self._transaction.helo = event.name.decode("ascii")
            if not self._is_lmtp:
                self._transaction.protocol = "ESMTP" if event.is_extended else "SMTP"
        self._answer(event.reply)

    def _settle(self, reply: Reply) -> None:
        self._answer(reply)
        self._protocol.settle(reply.is_accepted)

    def _answer(self, reply: Reply) -> None:
        if reply.code >= 500:
            self._errors_left -= 1
        self._channel.say(reply)

    def _finish(self) -> None:
        """Answer the end of data: once, or in LMTP once for each recipient (RFC 2033 4.2).

        An LMTP reply that is due goes out before the next recipient's lock is waited for.
        """
        results = []
        self._channel.flush()
        for recipient, outcome in self._transaction.finish():
            results.append((recipient, outcome))
            if self._is_lmtp:
                self._answer(replies.of_outcome(outcome, subject(recipient.path)))
                self._channel.flush()
        if not self._is_lmtp:
            self._answer(combine(results))
        self._protocol.settle(True)
        self._transaction.drop()

    def _list_logins(self) -> Reply:
        outcome, rows = self._broker.who()
        lines = [row.decode("ascii", "replace") for row in rows]
        return replies.Reply(outcome.code, outcome.enhanced, *lines, outcome.text)

    def _send_away(self, enhanced: str, why: str) -> None:
        """421, as far as the client still listens."""
        log.write("sent-away", peer=self._peer.address, why=why)
        self._channel.say(replies.unavailable(self._name, enhanced, why))
        try:
            self._channel.flush()
        except (Gone, Overdue):
            log.write("lost", peer=self._peer.address)


def converse(
    fds: tuple[int, int], broker: Broker, config: Config, peer: Peer, *, is_lmtp: bool
) -> None:
    """Speak with the client on descriptors `fds` (to read, to write) until the end."""
    time.tzset()
    channel = Channel(*fds, config.receiver.idle_seconds)
    Session(channel, broker, config, peer, is_lmtp=is_lmtp).converse()
