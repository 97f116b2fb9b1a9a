"""The one loop between the client's octets and the protocol's events."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import _socket
import os
import select
import stat
import time

from mda import log
from mda.config import official_name
from mda.receiver import replies
from mda.receiver.domains import Domains
from mda.receiver.protocol import (
    Addressing,
    AskingWho,
    ChunkTaken,
    Closing,
    Dropped,
    EndOfData,
    Hello,
    NamingClient,
    NeedOctets,
    Opening,
    Protocol,
    Say,
    StartingTls,
    Text,
    Turning,
    Verifying,
)
from mda.receiver.transaction import Transaction, subject
from mda.receiver.verify import verify
from mda.rights import remote_peer
from mda.wire import STOP, Broker, WireError, pack, receive_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config, Receiver
    from mda.model import Peer
    from mda.receiver.protocol import Event
    from mda.receiver.replies import Reason, Reply
    from mda.receiver.tls import Tls

_READ = 64 * 1024
_MOST_EXCESS = 10_000  # recipients beyond the limit that are no errors yet
_MANY_REPLIES = 32 * 1024  # octets that are due before more is obeyed
_TEXT_AT_LEAST = 4096  # octets of text within the idle time: a slow line has more
_AT_A_TIME = 512  # octets for a pipe or terminal, on which a larger write could block
_PROXY_SECONDS = 5.0  # for the header of a proxy
_LAST_WORDS = 2.0  # seconds for a client that is being sent away


class Gone(Exception):
    """The client has closed the channel or lost it; nothing more can be said to it."""


class Overdue(Exception):
    """The client has taken too long; `reason` says over what."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopped(Exception):
    """The host is shutting us down."""


class Channel:
    """Octets to and from the client: a socket, a pair of pipes, a terminal in raw mode.

    `link_fd` leads to the broker: what comes from there while we wait for the client is
    its end. Every wait may raise Stopped, on SIGTERM or when the broker is stopped, and
    WireError when it is gone.
    """

    def __init__(self, read_fd: int, write_fd: int, link_fd: int, limits: Receiver) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._link_fd = link_fd
        self._idle_seconds = limits.idle_seconds
        self._end = time.monotonic() + limits.session_seconds
        self._due = bytearray()
        self._readable = select.poll()
        self._readable.register(read_fd, select.POLLIN)
        self._readable.register(link_fd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(write_fd, select.POLLOUT)
        self._tls: Tls | None = None
        self._is_waiting = False
        self._is_stopping = False
        self._most = _AT_A_TIME
        if stat.S_ISSOCK(os.fstat(write_fd).st_mode):
            self._most = 2 * _MANY_REPLIES
            # A terminal's or pipe's flags would outlive us in the shell that shares it.
            os.set_blocking(write_fd, False)
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, self._stop)
        self._until = 0.0
        self._octets_since = 0
        self.expect_progress()

    def _stop(self, _signal_number: int, _frame: object) -> None:
        if self._is_waiting and not self._is_stopping:
            self._is_stopping = True
            raise Stopped
        self._is_stopping = True

    def expect_progress(self) -> None:
        """The client has done something whole: its idle time begins anew."""
        self._until = time.monotonic() + self._idle_seconds
        self._octets_since = 0

    @property
    def is_encrypted(self) -> bool:
        """TLS is spoken already, also where XCLIENT begins the session anew."""
        return self._tls is not None

    @property
    def has_more(self) -> bool:
        """The client has said something, or hung up, that has not been read yet."""
        return any(fd == self._read_fd for fd, _ in self._readable.poll(0))

    def expect_within(self, seconds: float) -> None:
        """Something whole has to come in that time."""
        self._until = time.monotonic() + seconds

    def say(self, reply: Reply) -> None:
        """Put a reply behind those that are due already; raises Gone."""
        octets = reply.render()
        try:
            self._due += self._tls.encrypt(octets) if self._tls else octets
        except OSError as error:
            raise Gone from error

    @property
    def is_behind(self) -> bool:
        """So much is due that the client should take it before it is heard further."""
        return len(self._due) > _MANY_REPLIES

    def flush(self, seconds: float | None = None) -> None:
        """Send what is due; raises Gone, or Overdue if the client does not take it in time.

        `seconds` stand in for the idle time.
        """
        self._is_waiting = True
        try:
            if seconds is None:
                # A signal that came while nothing was waited for has not been acted on yet.
                seconds = _LAST_WORDS if self._is_stopping else self._idle_seconds
            now = time.monotonic()
            until = min(now + seconds, max(self._end, now + _LAST_WORDS))
            while self._due:
                left = until - time.monotonic()
                if left <= 0 or not self._writable.poll(left * 1000):
                    raise Overdue(replies.IDLE)
                try:
                    del self._due[: os.write(self._write_fd, self._due[: self._most])]
                except BlockingIOError:
                    continue
        except OSError as error:
            raise Gone from error
        finally:
            self._is_waiting = False

    def read(self, *, is_text: bool) -> bytes:
        """What the client says next, at least one octet.

        Raises Gone at its end, and Overdue when a command, or enough of a text, is not
        there within the idle time, however the octets drip.
        """
        octets = self._decrypt() if self._tls else self._read()
        self._octets_since += len(octets)
        if is_text and self._octets_since >= _TEXT_AT_LEAST:
            self.expect_progress()
        return octets

    def _read(self) -> bytes:
        """At least one octet from the channel."""
        self._is_waiting = True
        try:
            if self._is_stopping:
                raise Stopped
            self._wait_for_client()
            octets = os.read(self._read_fd, _READ)
        except OSError as error:
            raise Gone from error
        finally:
            self._is_waiting = False
        if not octets:
            raise Gone
        return octets

    def _decrypt(self) -> bytes:
        """At least one octet of what the client has said in TLS."""
        tls = self._tls
        while tls is not None:
            try:
                text, is_end = tls.decrypt()
            except OSError as error:
                raise Gone from error
            self._due += tls.take_output()
            if text:
                return text
            if is_end:
                break
            self.flush()
            tls.feed(self._read())
        raise Gone

    def start_tls(self, tls: Tls) -> None:
        """Shake hands, and speak TLS from then on; raises Gone where that fails."""
        self.flush()
        try:
            while not tls.shake_hands():
                self._due += tls.take_output()
                self.flush()
                tls.feed(self._read())
        except OSError as error:
            self._due += tls.take_output()  # an alert says why
            self.flush()
            raise Gone from error
        self._due += tls.take_output()
        self._tls = tls

    def _wait_for_client(self) -> None:
        left = min(self._until, self._end) - time.monotonic()
        # A client that always has something to say must not go on for ever by that.
        ready = dict(self._readable.poll(left * 1000)) if left > 0 else {}
        if self._link_fd in ready:
            if ready[self._link_fd] & select.POLLIN and is_told_to_stop(self._link_fd):
                raise Stopped
            raise WireError("broker gone")
        if not ready:
            raise Overdue(replies.IDLE if self._until < self._end else replies.SESSION_TOO_LONG)


def is_told_to_stop(link_fd: int) -> bool:
    """Is what waits on the link the broker's last word; raises OSError."""
    link = _socket.socket(fileno=os.dup(link_fd))
    try:
        frame, fd = receive_frame(link)
    finally:
        link.close()
    if fd != -1:
        os.close(fd)
    return frame == pack(STOP)


class Session:
    """One client from greeting to close."""

    def __init__(
        self,
        channel: Channel,
        broker: Broker,
        config: Config,
        peer: Peer,
        *,
        is_lmtp: bool,
        early: bytes = b"",
    ) -> None:
        self._channel = channel
        self._broker = broker
        self._name = official_name(config)
        self._peer = peer
        self._is_lmtp = is_lmtp
        # For whom the session begins anew after XCLIENT: an address, or None.
        self.successor: str | None = None
        self._has_turned = False
        self._limits = config.receiver
        self._errors_left = config.receiver.errors
        self._junk_left = config.receiver.junk_commands
        self._excess_left = _MOST_EXCESS
        self._protocol = Protocol(
            self._name,
            config.receiver,
            is_lmtp=is_lmtp,
            offers_terminals=peer.is_offered_terminals,
            offers_names=peer.may_ask_names,
            offers_who=peer.kind == "unix",
            offers_places=peer.is_queue,
            offers_xclient=peer.may_xclient,
            offers_dsn=peer.is_queue or not (is_lmtp or peer.is_trusted),
            offers_tls=bool(config.receiver.tls_certificate),
            demands_tls=peer.is_tls_demanded,
            offers_turn=bool(peer.turn_hosts),
        )
        self._protocol.feed(early)
        self._protocol.is_encrypted = channel.is_encrypted
        self._domains = Domains(config, takes_any=is_lmtp or peer.is_trusted)
        self._transaction = Transaction(broker, config, peer, self._domains, is_lmtp=is_lmtp)

    def converse(self) -> None:
        """Greet, then obey until the client quits, vanishes, or has to be sent away."""
        self._channel.say(replies.greeting(self._name, is_lmtp=self._is_lmtp))
        is_foreseen = False
        try:
            self._obey_all()
            is_foreseen = True
        except Gone:
            is_foreseen = True
            log.write("lost", peer=self._peer.address)
        except Overdue as overdue:
            is_foreseen = True
            self._send_away(overdue.reason)
        except Stopped:
            is_foreseen = True
            self._send_away(replies.SHUTTING_DOWN)
        except WireError as error:
            log.write("broker", log.ERROR, error=str(error))
        finally:
            # Of anything unforeseen the client hears here, and the log further out.
            if not is_foreseen:
                self._send_away(replies.LOCAL_ERROR)
            self._transaction.drop()

    def _obey_all(self) -> None:
        while True:
            event = self._protocol.next_event()
            if isinstance(event, NeedOctets):
                self._channel.flush()
                self._protocol.feed(self._channel.read(is_text=self._protocol.is_in_text))
                continue
            self._obey(event)
            if self._channel.is_behind:
                self._channel.flush()
            if isinstance(event, Closing):
                self._channel.flush()
                return
            if self._has_turned:
                self._channel.flush()
                return
            if self.successor is not None:
                return
            if self._errors_left <= 0 or self._junk_left <= 0:
                is_error = self._errors_left <= 0
                self._send_away(replies.TOO_MANY_ERRORS if is_error else replies.TOO_MUCH_JUNK)
                return

    def _obey(self, event: Event) -> None:
        match event:
            case Text():
                self._transaction.write(event.octets)
            case EndOfData():
                self._finish(event.fault)
            case Say():
                self._say(event)
            case Opening() | Addressing() | Verifying() | AskingWho():
                self._settle(self._reply_to(event))
            case StartingTls() | NamingClient() | Turning():
                self._change_channel(event)
        if not isinstance(event, Text):
            # Now, since the time that we took ourselves is not the client's.
            self._channel.expect_progress()

    def _change_channel(self, event: StartingTls | NamingClient | Turning) -> None:
        match event:
            case StartingTls():
                self._start_tls()
            case NamingClient():
                self.successor = event.address
            case Turning():
                self._turn()

    def _reply_to(self, asked: Opening | Addressing | Verifying | AskingWho) -> Reply:
        match asked:
            case Opening():
                return self._transaction.open(
                    asked.verb,
                    asked.path,
                    asked.size,
                    is_utf8=asked.is_utf8,
                    ret=asked.ret,
                    envid=asked.envid,
                )
            case Addressing():
                return self._transaction.address(asked.path, asked.place, asked.wish)
            case Verifying():
                self._junk_left -= 1
                is_list = asked.is_list
                return verify(
                    self._broker, self._domains, self._name, asked.string, is_list=is_list
                )
            case AskingWho():
                # As costly as an error, and limited like one.
                self._errors_left -= 1
                return self._list_logins()

    def _say(self, event: Say) -> None:
        if isinstance(event, Dropped):
            self._transaction.drop()
        if isinstance(event, Hello):
            self._transaction.helo = event.name.decode("ascii")
            if not self._is_lmtp:
                self._transaction.protocol = "ESMTP" if event.is_extended else "SMTP"
            if self._protocol.is_encrypted and event.is_extended:
                self._transaction.protocol = "LMTPS" if self._is_lmtp else "ESMTPS"  # RFC 3848
        is_of_text = event.reply is replies.START_MAIL_INPUT or isinstance(event, ChunkTaken)
        if not is_of_text:
            self._junk_left -= 1
        if event.reply is replies.LINE_TOO_LONG or event.reply.code == 421:
            log.write("refused", peer=self._peer.address, reply=event.reply.lines[0])
        self._answer(event.reply)

    def _settle(self, reply: Reply) -> None:
        self._answer(reply)
        self._protocol.settle(reply.is_accepted)

    def _answer(self, reply: Reply) -> None:
        # A refusal for now costs as much as one for good, but for the recipients beyond
        # the limit, after whom the transaction is to go on (RFC 5321 4.5.3.1.10).
        if reply is replies.TOO_MANY_RECIPIENTS:
            self._excess_left -= 1
        is_excess = reply is replies.TOO_MANY_RECIPIENTS and self._excess_left >= 0
        # The host's own MTA passes on what its clients have asked for.
        if reply.code >= 400 and not is_excess and not self._peer.is_trusted:
            self._errors_left -= 1
        self._channel.say(reply)

    def _start_tls(self) -> None:
        """220 and the handshake, or 454 where our certificate cannot be had (RFC 3207)."""
        from mda.receiver.tls import Tls

        try:
            tls = Tls(self._limits.tls_certificate, self._limits.tls_key)
        except OSError as error:
            log.write("tls", log.ERROR, error=f"{self._limits.tls_certificate}: {error}")
            return self._settle(replies.NO_TLS_NOW)
        self._transaction.drop()
        self._settle(replies.READY_FOR_TLS)
        self._channel.start_tls(tls)
        return None

    def _turn(self) -> None:
        """250, after which we say no more: the broker's process is the sender (RFC 821 3.8)."""
        if self._channel.has_more:
            return self._settle(replies.NOTHING_BEHIND)
        outcome = self._broker.turn(self._transaction.helo)
        if outcome.is_done:
            log.write("turned", peer=self._peer.address, host=self._transaction.helo)
        self._has_turned = outcome.is_done
        self._settle(replies.TURNED if outcome.is_done else replies.NOT_OFFERED)
        return None

    def _finish(self, fault: Reply | None) -> None:
        """Answer the end of data: once, or in LMTP once for each recipient (RFC 2033 4.2).

        An LMTP reply that is due goes out before the next recipient's lock is waited for.
        """
        results = []
        self._channel.flush()
        for recipient, outcome in self._transaction.finish(fault):
            results.append((recipient, outcome))
            if self._is_lmtp:
                self._channel.say(replies.of_outcome(outcome, subject(recipient.path)))
                self._channel.flush()
        if not self._is_lmtp:
            self._channel.say(self._transaction.conclude(results))
        self._protocol.settle(True)
        self._transaction.drop()
        self._junk_left = self._limits.junk_commands
        self._excess_left = _MOST_EXCESS
        if any(outcome.is_done for _, outcome in results):
            self._errors_left = self._limits.errors
        else:
            self._errors_left -= 1

    def _list_logins(self) -> Reply:
        outcome, rows = self._broker.who()
        lines = [row.decode("ascii", "replace") for row in rows]
        return replies.Reply(outcome.code, outcome.enhanced, *lines, outcome.text)

    def _send_away(self, reason: Reason) -> None:
        """421, as far as the client still listens."""
        log.write("sent-away", peer=self._peer.address, why=reason[1])
        self._channel.say(replies.unavailable(self._name, reason))
        try:
            self._channel.flush(_LAST_WORDS)
        except (Gone, Overdue, Stopped):
            log.write("lost", peer=self._peer.address)


def converse(
    fds: tuple[int, int], broker: Broker, config: Config, peer: Peer, *, is_lmtp: bool
) -> None:
    """Speak with the client on descriptors `fds` (to read, to write) until the end."""
    time.tzset()
    channel = Channel(*fds, broker.fileno(), config.receiver)
    early = b""
    if peer.is_proxy:
        found = take_proxy_header(channel)
        if found is None:
            # Who does not begin with a header has nothing to be told.
            log.write("refused", peer=peer.address, reply="no PROXY header")
            return
        peer, early = stand_for(broker, config, peer, found[0]), found[1]
    while True:
        session = Session(channel, broker, config, peer, is_lmtp=is_lmtp, early=early)
        session.converse()
        if session.successor is None:
            return
        # What stood behind XCLIENT was said by nobody in particular.
        peer, early = stand_for(broker, config, peer, session.successor), b""


def take_proxy_header(channel: Channel) -> tuple[str, bytes] | None:
    """The address that a proxy names, and what came behind; None where there is no header."""
    from mda.receiver.proxy import ProxyError, take_header  # few hosts stand behind one

    octets = b""
    channel.expect_within(_PROXY_SECONDS)
    try:
        while (found := take_header(octets)) is None:
            octets += channel.read(is_text=False)
    except (Gone, Overdue, Stopped, ProxyError):
        return None
    channel.expect_progress()
    return found


def stand_for(broker: Broker, config: Config, peer: Peer, address: str) -> Peer:
    """The peer that ours stands for, as the broker will see it too; raises WireError."""
    if not address:
        return peer
    broker.name_peer(address)
    client = remote_peer(address, config)
    client.may_xclient, client.is_proxy = peer.may_xclient, False
    client.is_tls_demanded = peer.is_tls_demanded
    return client
