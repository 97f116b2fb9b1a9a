"""The receiver's side of SMTP and LMTP as a state machine that does no input or output.

Feed it octets and take events; answer the events that ask. All that a command may
change in the state of the session stands in this file, and `VERBS` is the protocol:
a verb, the function that obeys it, and whether it takes an argument.
"""

from __future__ import annotations

from mda import model
from mda.model import TERMINAL_VERBS
from mda.receiver import grammar, replies
from mda.receiver.dotstream import DotStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.model import Path, Verb
    from mda.receiver.replies import Reply

# The stages of a session, in the order in which they are reached.
CONNECTED = "connected"  # no hello yet
GREETED = "greeted"  # ready for MAIL, SEND, SOML, SAML
OPEN = "open"  # a transaction without an accepted recipient
ADDRESSED = "addressed"  # with one or more
TEXT = "text"  # between 354 and the end of data


class NeedOctets:
    """Nothing more to be had: send what is due and feed what the client says."""


class Say:
    """A reply that the protocol itself has decided."""

    __slots__ = ("reply",)

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


class Dropped(Say):
    """An open transaction, if there was one, is gone; say the reply."""


class Hello(Dropped):
    """The client has named itself: `name`, in an `extended` session or a plain one."""

    __slots__ = ("is_extended", "name")

    def __init__(self, reply: Reply, name: bytes, is_extended: bool) -> None:
        super().__init__(reply)
        self.name = name
        self.is_extended = is_extended


class Closing(Dropped):
    """Say the reply and close; nothing behind QUIT is executed or answered."""


class Opening:
    """MAIL, SEND, SOML or SAML: asks for an answer."""

    __slots__ = ("path", "size", "verb")

    def __init__(self, verb: Verb, path: Path, size: int) -> None:
        self.verb: Verb = verb
        self.path = path
        self.size = size


class Addressing:
    """RCPT: asks for an answer."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path


class Text:
    """A piece of the message in its stored form: LF line ends, dots unstuffed."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = octets


class EndOfData:
    """The message is complete: asks for an answer (LMTP: one for each recipient)."""


class AskingWho:
    """XWHO, the private verb behind `mda who`: asks for an answer."""


Event = NeedOctets | Say | Opening | Addressing | Text | EndOfData | AskingWho


class Protocol:
    """One session. `settle` answers Opening, Addressing and EndOfData."""

    def __init__(
        self,
        name: str,
        *,
        is_lmtp: bool,
        offers_terminals: bool,
        offers_who: bool,
        command_line: int,
        message_size: int,
    ) -> None:
        self._name = name
        self._is_lmtp = is_lmtp
        self._offers_terminals = offers_terminals
        self._offers_who = offers_who
        self._command_line = command_line
        self._message_size = message_size
        self._buffer = bytearray()
        self._searched = 0
        self._is_overlong = False
        self._dots = DotStream()
        self._asking: Opening | Addressing | EndOfData | AskingWho | None = None
        self.stage = CONNECTED

    def feed(self, octets: bytes) -> None:
        """Take what the client has sent."""
        self._buffer += octets

    def next_event(self) -> Event:
        """The next thing to do; NeedOctets when there is none."""
        if self._asking is not None:
            raise RuntimeError(f"{type(self._asking).__name__} was not answered")
        if self.stage == TEXT:
            return self._next_text()
        line = self._take_line()
        if line is None:
            return NeedOctets()
        if self._is_overlong:
            self._is_overlong = False
            return Say(replies.LINE_TOO_LONG)
        event = self._obey(line)
        if isinstance(event, (Opening, Addressing, AskingWho)):
            self._asking = event
        return event

    def settle(self, is_accepted: bool) -> None:
        """The event that asked has been answered, with 2xx or not."""
        asked, self._asking = self._asking, None
        if isinstance(asked, EndOfData):
            self.stage = GREETED
        elif is_accepted and isinstance(asked, Opening):
            self.stage = OPEN
        elif is_accepted and isinstance(asked, Addressing):
            self.stage = ADDRESSED

    def _take_line(self) -> bytes | None:
        """The next command without its CRLF; only CRLF ends it (RFC 821 4.1.2)."""
        end = self._buffer.find(b"\r\n", self._searched)
        if end < 0:
            self._searched = max(0, len(self._buffer) - 1)
            if len(self._buffer) > self._command_line:
                # The rest of an over-long line is dropped as it comes, so that it costs
                # no memory; a CR at its end may be half of what ends it.
                self._is_overlong = True
                del self._buffer[: self._searched]
                self._searched = 0
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._searched = 0
        self._is_overlong = self._is_overlong or end + 2 > self._command_line
        return line

    def _next_text(self) -> Event:
        if self._buffer and not self._dots.is_ended:
            octets = self._dots.feed(bytes(self._buffer))
            self._buffer.clear()
            self._buffer += self._dots.rest
            if octets:
                return Text(octets)
        if not self._dots.is_ended:
            return NeedOctets()
        self._asking = EndOfData()
        return self._asking

    def _obey(self, line: bytes) -> Event:
        verb, _, argument = line.partition(b" ")
        row = VERBS.get(verb.upper())
        if row is None:
            return Say(replies.UNKNOWN_COMMAND)
        argument = argument.strip(b" \t")
        if argument and not row.takes_argument:
            return Say(replies.NO_ARGUMENT_ALLOWED)
        return row.obey(self, verb.upper(), argument)

    def _hello(self, verb: bytes, argument: bytes) -> Event:
        if (verb == b"LHLO") != self._is_lmtp:
            return Say(replies.NOT_IN_LMTP if self._is_lmtp else replies.NOT_IN_SMTP)
        if not argument:
            return Say(replies.ARGUMENT_NEEDED)
        if not grammar.is_host_name(argument):
            return Say(replies.BAD_HOST_NAME)
        self.stage = GREETED
        is_extended = verb != b"HELO"
        keywords = self._keywords() if is_extended else ()
        return Hello(replies.hello(self._name, keywords), argument, is_extended)

    def _keywords(self) -> tuple[str, ...]:
        """The list after EHLO and LHLO: what this peer would be served, and no more."""
        keywords = ["PIPELINING", f"SIZE {self._message_size}", "8BITMIME", "ENHANCEDSTATUSCODES"]
        if self._offers_terminals:
            keywords += TERMINAL_VERBS
        if self._offers_who:
            keywords.append("XWHO")
        return tuple(keywords)

    def _open(self, verb: bytes, argument: bytes) -> Event:
        name = model.VERBS[verb]
        if name in TERMINAL_VERBS and not self._offers_terminals:
            return Say(replies.NOT_OFFERED)
        if self.stage == CONNECTED:
            return Say(replies.HELLO_FIRST)
        if self.stage != GREETED:
            return Say(replies.TRANSACTION_OPEN)
        if argument[:5].upper() != b"FROM:":
            return Say(replies.BAD_REVERSE_PATH)
        try:
            path, rest = grammar.parse_path(argument[5:].lstrip(b" "))
        except grammar.PathError:
            return Say(replies.BAD_REVERSE_PATH)
        return self._open_with(name, path, grammar.parse_parameters(rest))

    def _open_with(self, verb: Verb, path: Path, parameters: dict[bytes, bytes] | None) -> Event:
        if parameters is None:
            return Say(replies.BAD_PARAMETERS)
        size = parameters.pop(b"SIZE", b"0")
        body = parameters.pop(b"BODY", b"7BIT")
        if parameters:
            return Say(replies.UNKNOWN_PARAMETER)
        if not size.isdigit() or len(size) > 20 or body.upper() not in (b"7BIT", b"8BITMIME"):
            return Say(replies.BAD_PARAMETERS)
        return Opening(verb, path, int(size))

    def _address(self, _verb: bytes, argument: bytes) -> Event:
        if self.stage not in (OPEN, ADDRESSED):
            return Say(replies.NO_TRANSACTION)
        if argument[:3].upper() != b"TO:":
            return Say(replies.BAD_FORWARD_PATH)
        try:
            path, rest = grammar.parse_path(argument[3:].lstrip(b" "))
        except grammar.PathError:
            return Say(replies.BAD_FORWARD_PATH)
        if not path.text:
            return Say(replies.BAD_FORWARD_PATH)
        parameters = grammar.parse_parameters(rest)
        if parameters is None:
            return Say(replies.BAD_PARAMETERS)
        return Say(replies.UNKNOWN_PARAMETER) if parameters else Addressing(path)

    def _start_text(self, _verb: bytes, _argument: bytes) -> Event:
        if self.stage != ADDRESSED:
            is_open = self.stage == OPEN
            return Say(replies.NO_RECIPIENT if is_open else replies.NO_TRANSACTION)
        self.stage = TEXT
        self._dots = DotStream()
        return Say(replies.START_MAIL_INPUT)

    def _reset(self, _verb: bytes, _argument: bytes) -> Event:
        if self.stage != CONNECTED:
            self.stage = GREETED
        return Dropped(replies.OK)

    def _idle(self, _verb: bytes, _argument: bytes) -> Event:
        return Say(replies.OK)

    def _quit(self, _verb: bytes, _argument: bytes) -> Event:
        self._buffer.clear()
        return Closing(replies.closing(self._name))

    def _who(self, _verb: bytes, _argument: bytes) -> Event:
        if not self._offers_who:
            return Say(replies.UNKNOWN_COMMAND)
        return AskingWho()


class Row:
    """One verb of the table: the function that obeys it, and whether it takes an argument."""

    __slots__ = ("obey", "takes_argument")

    def __init__(
        self, obey: Callable[[Protocol, bytes, bytes], Event], takes_argument: bool
    ) -> None:
        self.obey = obey
        self.takes_argument = takes_argument


VERBS: dict[bytes, Row] = {
    b"HELO": Row(Protocol._hello, takes_argument=True),
    b"EHLO": Row(Protocol._hello, takes_argument=True),
    b"LHLO": Row(Protocol._hello, takes_argument=True),
    b"MAIL": Row(Protocol._open, takes_argument=True),
    b"SEND": Row(Protocol._open, takes_argument=True),
    b"SOML": Row(Protocol._open, takes_argument=True),
    b"SAML": Row(Protocol._open, takes_argument=True),
    b"RCPT": Row(Protocol._address, takes_argument=True),
    b"DATA": Row(Protocol._start_text, takes_argument=False),
    b"RSET": Row(Protocol._reset, takes_argument=False),
    b"NOOP": Row(Protocol._idle, takes_argument=True),
    b"QUIT": Row(Protocol._quit, takes_argument=False),
    b"XWHO": Row(Protocol._who, takes_argument=False),
}
