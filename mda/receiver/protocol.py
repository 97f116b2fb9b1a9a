"""The receiver's side of SMTP and LMTP as a state machine that does no input or output.

Feed it octets and take events; answer the events that ask. All that a command may
change in the state of the session stands in this file, and `VERBS` is the protocol:
a verb, the function that obeys it, what argument it takes, and how it is written.
"""

from __future__ import annotations

from mda import model
from mda.model import NO_WISH, TERMINAL_VERBS, Wish
from mda.receiver import grammar, replies
from mda.receiver.chunks import Chunk, ChunkStream, read_chunk
from mda.receiver.dotstream import DotStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from mda.config import Receiver
    from mda.model import Path, Verb
    from mda.receiver.replies import Reply

# The stages of a session, in the order in which they are reached.
CONNECTED = "connected"  # no hello yet
GREETED = "greeted"  # ready for MAIL, SEND, SOML, SAML
OPEN = "open"  # a transaction without an accepted recipient
ADDRESSED = "addressed"  # with one or more
TEXT = "text"  # between 354 and the end of data
CHUNKED = "chunked"  # between the first chunk of a text and the last


_LONGEST_ENVID = 100  # (RFC 3461 4.4)
_LONGEST_METHOD = 16  # octets of an over-long line that tell whether HTTP is spoken


class NeedOctets:
    """Nothing more to be had: send what is due and feed what the client says."""


class Say:
    """A reply that the protocol itself has decided."""

    __slots__ = ("reply",)

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


class ChunkTaken(Say):
    """A chunk of the text is there, and more will follow."""


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
    """MAIL, SEND, SOML or SAML: asks for an answer.

    `size` is what the client has announced in octets, or 0; `is_utf8` is SMTPUTF8; `ret` and
    `envid` are for notices (RFC 3461).
    """

    __slots__ = ("envid", "is_utf8", "path", "ret", "size", "verb")

    def __init__(
        self,
        verb: Verb,
        path: Path,
        size: int,
        is_utf8: bool,
        ret: str = "",
        envid: bytes = b"",
    ) -> None:
        self.verb: Verb = verb
        self.path = path
        self.size = size
        self.is_utf8 = is_utf8
        self.ret = ret
        self.envid = envid


class Addressing:
    """RCPT: asks for an answer; `place` is the one that our own queue asks for, or empty."""

    __slots__ = ("path", "place", "wish")

    def __init__(self, path: Path, place: bytes = b"", wish: Wish = NO_WISH) -> None:
        self.path = path
        self.place = place
        self.wish = wish


class Text:
    """A piece of the message in its stored form: LF line ends, dots unstuffed."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = octets


class EndOfData:
    """The message is complete: asks for an answer (LMTP: one for each recipient).

    `fault` is the reply to a text that our policy refuses, for each recipient.
    """

    __slots__ = ("fault",)

    def __init__(self, fault: Reply | None) -> None:
        self.fault = fault


class Verifying:
    """VRFY, or EXPN if `is_list`: asks for an answer about `string`, which is printable."""

    __slots__ = ("is_list", "string")

    def __init__(self, string: bytes, is_list: bool) -> None:
        self.string = string
        self.is_list = is_list


class StartingTls:
    """STARTTLS: asks for an answer, after which either side speaks TLS."""


class NamingClient:
    """XCLIENT: asks for the session to begin anew, for the client at `address` ("": the peer)."""

    __slots__ = ("address",)

    def __init__(self, address: str) -> None:
        self.address = address


class Turning:
    """TURN: asks for an answer, after which the client is the receiver (RFC 821 3.8)."""


class AskingWho:
    """XWHO, the private verb behind `mda who`: asks for an answer."""


Asking = (
    Opening | Addressing | EndOfData | Verifying | StartingTls | NamingClient | Turning | AskingWho
)
Event = NeedOctets | Say | Text | Asking


_ASKED_BY_COMMANDS = (
    Opening, Addressing, Verifying, StartingTls, NamingClient, Turning, AskingWho,
)  # fmt: skip


class Protocol:
    """One session. `settle` answers every event that asks.

    `name` is our official one, `limits` the `[receiver]` table; the others say what this
    peer is served: LMTP in place of SMTP, SEND and its like, EXPN, XWHO, and RCPT's private
    parameter XPLACE, by which the queue names what has failed here before; DSN; STARTTLS, which
    with `demands_tls` comes before all else; TURN.
    """

    def __init__(
        self,
        name: str,
        limits: Receiver,
        *,
        is_lmtp: bool,
        offers_terminals: bool,
        offers_names: bool,
        offers_who: bool,
        offers_places: bool = False,
        offers_dsn: bool = False,
        offers_xclient: bool = False,
        offers_tls: bool = False,
        demands_tls: bool = False,
        offers_turn: bool = False,
    ) -> None:
        self._name = name
        self._limits = limits
        self._is_lmtp = is_lmtp
        self._offers_names = offers_names
        self._offers_who = offers_who
        self._offers_places = offers_places
        self._offers_dsn = offers_dsn
        self._demands_tls = demands_tls
        self.is_encrypted = False
        hidden = {b"HELO", b"EHLO"} if is_lmtp else {b"LHLO"}
        if not offers_terminals:
            hidden |= {verb.encode() for verb in TERMINAL_VERBS}
        offered = {
            b"EXPN": offers_names,
            b"XCLIENT": offers_xclient,
            b"STARTTLS": offers_tls,
            b"TURN": offers_turn and not is_lmtp,
        }
        hidden |= {verb for verb, is_offered in offered.items() if not is_offered}
        self._served = tuple(verb for verb in VERBS if verb not in hidden | {b"XWHO"})
        self._buffer = bytearray()
        self._searched = 0
        self._is_overlong = False
        self._long_head = b""
        self._dots = DotStream()
        self._chunks = ChunkStream()
        self._chunk: Chunk | None = None
        self._asking: Asking | None = None
        self._is_utf8 = False
        self.stage = CONNECTED

    def feed(self, octets: bytes) -> None:
        """Take what the client has sent."""
        self._buffer += octets

    def next_event(self) -> Event:
        """The next thing to do; NeedOctets when there is none."""
        if self._asking is not None:
            raise RuntimeError(f"{type(self._asking).__name__} was not answered")
        if self._chunk is not None:
            return self._next_of_chunk(self._chunk)
        if self.stage == TEXT:
            return self._next_text()
        line = self._take_line()
        if line is None:
            return NeedOctets()
        if self._is_overlong:
            self._is_overlong = False
            verb = (self._long_head or line).split(b" ", 1)[0].upper()
            self._long_head = b""
            return self._refuse(verb) if verb in HTTP_METHODS else Say(replies.LINE_TOO_LONG)
        event = self._obey(line)
        if isinstance(event, _ASKED_BY_COMMANDS):
            self._asking = event
        return event

    @property
    def is_in_text(self) -> bool:
        """What the client says next is text, and no command."""
        return self.stage == TEXT or self._chunk is not None

    def settle(self, is_accepted: bool) -> None:
        """The event that asked has been answered, with 2xx or not."""
        asked, self._asking = self._asking, None
        if isinstance(asked, EndOfData):
            self.stage = GREETED
        elif is_accepted and isinstance(asked, Opening):
            self.stage = OPEN
            self._is_utf8 = asked.is_utf8
        elif is_accepted and isinstance(asked, Addressing):
            self.stage = ADDRESSED
        elif is_accepted and isinstance(asked, StartingTls):
            # Nothing that was said in the clear counts, and least of all what has been put
            # behind the command (RFC 3207 4.2, 6).
            self._buffer.clear()
            self._searched = 0
            self.is_encrypted = True
            self.stage = CONNECTED

    def _take_line(self) -> bytes | None:
        """The next command without its CRLF; only CRLF ends it (RFC 821 4.1.2)."""
        end = self._buffer.find(b"\r\n", self._searched)
        if end < 0:
            self._searched = max(0, len(self._buffer) - 1)
            if len(self._buffer) > self._limits.command_line:
                # The rest of an over-long line is dropped as it comes, so that it costs
                # no memory; a CR at its end may be half of what ends it.
                self._is_overlong = True
                self._long_head = self._long_head or bytes(self._buffer[:_LONGEST_METHOD])
                del self._buffer[: self._searched]
                self._searched = 0
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._searched = 0
        self._is_overlong = self._is_overlong or end + 2 > self._limits.command_line
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
        return self._end_text(self._dots.has_bare_newline, None)

    def _end_text(self, has_bare_newline: bool, fault: Reply | None) -> Event:
        if has_bare_newline and self._limits.bare_newlines == "reject":
            fault = fault or replies.BARE_NEWLINE
        self._asking = EndOfData(fault)
        return self._asking

    def _next_of_chunk(self, chunk: Chunk) -> Event:
        """The text of a chunk as it comes, then the reply to it."""
        while chunk.left and self._buffer:
            octets = bytes(self._buffer[: chunk.left])
            del self._buffer[: chunk.left]
            chunk.left -= len(octets)
            if chunk.refusal is None and (text := self._chunks.feed(octets)):
                return Text(text)
        if chunk.left:
            return NeedOctets()
        if chunk.is_last and self.stage == CHUNKED and (text := self._chunks.finish()):
            return Text(text)
        self._chunk = None
        if self.stage == CHUNKED and chunk.is_last:
            return self._end_text(self._chunks.has_bare_newline, self._chunks.fault)
        if chunk.refusal is not None:
            return Say(chunk.refusal)
        return ChunkTaken(replies.chunk_taken(chunk.size))

    def _take_chunk(self, _verb: bytes, argument: bytes) -> Event:
        """BDAT: its octets follow at once, whatever is said of them (RFC 3030 2)."""
        found = read_chunk(argument)
        if found is None:
            return Say(replies.BAD_PARAMETERS)
        size, is_last = found
        refusal: Reply | None = None
        if self.stage == ADDRESSED:
            self.stage = CHUNKED
            self._chunks = ChunkStream()
        elif self.stage != CHUNKED:
            refusal = replies.NO_RECIPIENT if self.stage == OPEN else replies.NO_TRANSACTION
        if self.stage == CHUNKED:
            self._chunks.size += size
            if self._chunks.size > self._limits.message_size:
                self._chunks.fault = refusal = replies.TOO_LARGE
        self._chunk = Chunk(size, is_last=is_last, refusal=refusal)
        return self._next_of_chunk(self._chunk)

    def _obey(self, line: bytes) -> Event:
        verb, _, argument = line.partition(b" ")
        verb = verb.upper()
        row = VERBS.get(verb)
        if row is None:
            return self._refuse(verb)
        argument = argument.strip(b" \t")
        if self._demands_tls and not self.is_encrypted and verb not in BEFORE_TLS:
            return Say(replies.TLS_FIRST)
        if argument and row.takes == "nothing":
            return Say(replies.NO_ARGUMENT_ALLOWED)
        if row.takes == "text" and not grammar.is_printable(argument):
            return Say(replies.BAD_CHARACTER)
        return row.obey(self, verb, argument)

    def _refuse(self, verb: bytes) -> Event:
        if verb in HTTP_METHODS:
            self._buffer.clear()
            return Closing(replies.unavailable(self._name, replies.NOT_HTTP))
        return Say(replies.NOT_OFFERED if verb in NOT_SERVED else replies.UNKNOWN_COMMAND)

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
        optional = tuple(verb.decode() for verb in self._served if verb in OPTIONAL_VERBS)
        if b"XCLIENT" in self._served:
            optional += ("XCLIENT NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT",)
        size = f"SIZE {self._limits.message_size}"
        if self.is_encrypted:
            optional = tuple(word for word in optional if word not in ("STARTTLS", "TURN"))
        private = ("XWHO",) if self._offers_who else ()
        always = ("PIPELINING", size, "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "CHUNKING")
        return always + (("DSN",) if self._offers_dsn else ()) + optional + private

    def _open(self, verb: bytes, argument: bytes) -> Event:
        if verb not in self._served:
            return Say(replies.NOT_OFFERED)
        if self.stage == CONNECTED:
            return Say(replies.HELLO_FIRST)
        if self.stage != GREETED:
            return Say(replies.TRANSACTION_OPEN)
        parsed = self._parse(b"FROM:", argument, replies.BAD_REVERSE_PATH)
        if not isinstance(parsed, tuple):
            return Say(parsed)
        return self._open_with(model.VERBS[verb], *parsed)

    def _open_with(self, verb: Verb, path: Path, parameters: dict[bytes, bytes]) -> Event:
        size = parameters.pop(b"SIZE", b"0")
        body = parameters.pop(b"BODY", b"7BIT")
        is_utf8 = b"SMTPUTF8" in parameters
        has_value = bool(parameters.pop(b"SMTPUTF8", b""))
        ret, envid = b"", b""
        if self._offers_dsn:
            has_value = has_value or b"" in (parameters.get(b"RET"), parameters.get(b"ENVID"))
            ret = parameters.pop(b"RET", b"").upper()
            envid = parameters.pop(b"ENVID", b"")
        if parameters:
            return Say(replies.UNKNOWN_PARAMETER)
        is_good_body = body.upper() in (b"7BIT", b"8BITMIME")
        is_good_dsn = ret in (b"", b"FULL", b"HDRS") and len(envid) <= _LONGEST_ENVID
        is_good_dsn = is_good_dsn and (not envid or grammar.is_xtext(envid))
        is_good = size.isdigit() and len(size) <= 20 and is_good_body and is_good_dsn
        if not is_good or has_value:
            return Say(replies.BAD_PARAMETERS)
        if not is_utf8 and not path.text.isascii():
            return Say(replies.NEEDS_SMTPUTF8)
        return Opening(verb, path, int(size), is_utf8, ret.decode("ascii"), envid)

    def _parse(
        self, symbol: bytes, argument: bytes, bad_path: Reply
    ) -> tuple[Path, dict[bytes, bytes]] | Reply:
        """The path behind FROM: or TO: and the parameters, or the reply that refuses them.

        Unless the syntax is strict, a space after the colon and a path without its
        brackets pass, as nearly everywhere.
        """
        text = argument[len(symbol) :]
        parse = grammar.parse_path
        if not self._limits.strict_syntax:
            text = text.lstrip(b" ")
            if not text.startswith(b"<"):
                parse = grammar.parse_bare_path
        if argument[: len(symbol)].upper() != symbol:
            return bad_path
        try:
            path, rest = parse(text)
        except grammar.PathError:
            return bad_path
        if len(path.text) + len("<>") > self._limits.path:
            return replies.PATH_TOO_LONG
        parameters = grammar.parse_parameters(rest)
        return replies.BAD_PARAMETERS if parameters is None else (path, parameters)

    def _address(self, _verb: bytes, argument: bytes) -> Event:
        if self.stage not in (OPEN, ADDRESSED):
            is_begun = self.stage == CHUNKED
            return Say(replies.CHUNKS_BEGUN if is_begun else replies.NO_TRANSACTION)
        parsed = self._parse(b"TO:", argument, replies.BAD_FORWARD_PATH)
        if not isinstance(parsed, tuple):
            return Say(parsed)
        path, parameters = parsed
        place = parameters.pop(b"XPLACE", b"") if self._offers_places else b""
        wish = self._read_wish(parameters) if self._offers_dsn else NO_WISH
        if not path.text:
            return Say(replies.BAD_FORWARD_PATH)
        if wish is None:
            return Say(replies.BAD_PARAMETERS)
        if parameters:
            return Say(replies.UNKNOWN_PARAMETER)
        if not self._is_utf8 and not path.text.isascii():
            return Say(replies.NEEDS_SMTPUTF8)
        return Addressing(path, place, wish)

    def _read_wish(self, parameters: dict[bytes, bytes]) -> Wish | None:
        """What RCPT says about notices, taken out of its parameters; None for what is wrong."""
        notify = parameters.pop(b"NOTIFY", None)
        original = parameters.pop(b"ORCPT", None)
        read = "" if notify is None else grammar.read_notify(notify)
        if read is None or (original is not None and not grammar.is_original(original)):
            return None
        return Wish(read, original or b"")

    def _start_text(self, _verb: bytes, _argument: bytes) -> Event:
        if self.stage == CHUNKED:
            return Say(replies.CHUNKS_BEGUN)
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

    def _start_tls(self, _verb: bytes, _argument: bytes) -> Event:
        if b"STARTTLS" not in self._served:
            return Say(replies.NOT_OFFERED)
        if self.is_encrypted or self.stage != GREETED:
            is_early = self.stage == CONNECTED
            return Say(replies.HELLO_FIRST if is_early else replies.NOT_IN_TRANSACTION)
        return StartingTls()

    def _turn(self, _verb: bytes, argument: bytes) -> Event:
        # What speaks TLS here is the session, which is not to be the sender.
        if b"TURN" not in self._served or self.is_encrypted:
            return Say(replies.NOT_OFFERED)
        if argument:
            return Say(replies.NO_ARGUMENT_ALLOWED)
        if self.stage != GREETED:
            is_early = self.stage == CONNECTED
            return Say(replies.HELLO_FIRST if is_early else replies.NOT_IN_TRANSACTION)
        # Whatever stands behind was meant for a receiver, and would be read by a sender.
        return Say(replies.NOTHING_BEHIND) if self._buffer else Turning()

    def _name_client(self, _verb: bytes, argument: bytes) -> Event:
        if b"XCLIENT" not in self._served:
            return Say(replies.NOT_OFFERED)
        if self.stage not in (CONNECTED, GREETED):
            return Say(replies.NOT_IN_TRANSACTION)
        from mda.receiver.proxy import read_xclient  # few hosts stand behind one

        address = read_xclient(argument)
        if address is None:
            return Say(replies.BAD_XCLIENT)
        return NamingClient(address)

    def _idle(self, _verb: bytes, _argument: bytes) -> Event:
        return Say(replies.OK)

    def _verify(self, verb: bytes, argument: bytes) -> Event:
        """Who may not ask learns nothing, not even how long an answer would take."""
        string, is_utf8 = grammar.take_utf8_flag(argument)
        if not string:
            return Say(replies.ARGUMENT_NEEDED)
        if not grammar.is_text(string) or not (is_utf8 or string.isascii()):
            return Say(replies.BAD_CHARACTER)
        is_list = verb == b"EXPN"
        if self._offers_names:
            return Verifying(string, is_list)
        is_for_some = self._limits.vrfy != "nobody"
        return Say(replies.ACCESS_DENIED if is_list and is_for_some else replies.CANNOT_VERIFY)

    def _help(self, _verb: bytes, argument: bytes) -> Event:
        if not argument:
            return Say(replies.helping(self._name, tuple(verb.decode() for verb in self._served)))
        verb = argument.upper()
        if verb not in self._served:
            return Say(replies.NO_SUCH_HELP)
        return Say(replies.explaining(VERBS[verb].usage))

    def _quit(self, _verb: bytes, _argument: bytes) -> Event:
        self._buffer.clear()
        return Closing(replies.closing(self._name))

    def _who(self, _verb: bytes, _argument: bytes) -> Event:
        if not self._offers_who:
            return Say(replies.UNKNOWN_COMMAND)
        return AskingWho()


class Row:
    """One verb of the table: what obeys it, what argument it takes, and how it is written.

    An argument is "nothing", "text" (printable ASCII), or what the function itself reads.
    """

    __slots__ = ("obey", "takes", "usage")

    def __init__(
        self,
        obey: Callable[[Protocol, bytes, bytes], Event],
        takes: Literal["nothing", "text", "own"],
        usage: str,
    ) -> None:
        self.obey = obey
        self.takes = takes
        self.usage = usage


_PARAMETERS = "[SIZE=octets] [BODY=7BIT|8BITMIME] [SMTPUTF8]"

VERBS: dict[bytes, Row] = {
    b"HELO": Row(Protocol._hello, "own", "HELO domain"),
    b"EHLO": Row(Protocol._hello, "own", "EHLO domain"),
    b"LHLO": Row(Protocol._hello, "own", "LHLO domain"),
    b"MAIL": Row(Protocol._open, "own", f"MAIL FROM:<reverse-path> {_PARAMETERS}"),
    b"RCPT": Row(Protocol._address, "own", "RCPT TO:<forward-path>"),
    b"DATA": Row(Protocol._start_text, "nothing", "DATA, then the message, then a lone dot"),
    b"BDAT": Row(Protocol._take_chunk, "own", "BDAT octets [LAST], then so many octets of text"),
    b"RSET": Row(Protocol._reset, "nothing", "RSET drops the open transaction"),
    b"NOOP": Row(Protocol._idle, "text", "NOOP [string] does nothing"),
    b"QUIT": Row(Protocol._quit, "nothing", "QUIT ends the session"),
    b"VRFY": Row(Protocol._verify, "own", "VRFY user: a login name, a mailbox, a full name"),
    b"EXPN": Row(Protocol._verify, "own", "EXPN list: who gets its messages"),
    b"HELP": Row(Protocol._help, "text", "HELP [command]"),
    b"STARTTLS": Row(Protocol._start_tls, "nothing", "STARTTLS begins TLS"),
    b"SEND": Row(Protocol._open, "own", f"SEND FROM:<reverse-path> {_PARAMETERS}: to terminals"),
    b"SOML": Row(
        Protocol._open, "own", f"SOML FROM:<reverse-path> {_PARAMETERS}: terminal, else mailbox"
    ),
    b"SAML": Row(
        Protocol._open, "own", f"SAML FROM:<reverse-path> {_PARAMETERS}: terminal and mailbox"
    ),
    b"TURN": Row(Protocol._turn, "own", "TURN: you are the receiver, and we the sender"),
    b"XCLIENT": Row(Protocol._name_client, "own", "XCLIENT ADDR=address [NAME=...]"),
    b"XWHO": Row(Protocol._who, "nothing", "XWHO lists who is logged in"),
}

# What RFC 5321 does not demand of everybody, and so stands in EHLO's list (4.1.1.1).
OPTIONAL_VERBS = (b"STARTTLS", b"EXPN", b"HELP", b"SEND", b"SOML", b"SAML", b"TURN")

# What may be said where TLS has to begin first (RFC 3207 4).
BEFORE_TLS = (
    b"EHLO", b"HELO", b"LHLO", b"NOOP", b"QUIT", b"STARTTLS", b"RSET", b"HELP", b"XCLIENT",
)  # fmt: skip

# Verbs that exist elsewhere: 502, not 500 (RFC 5321 4.2.4).
NOT_SERVED = frozenset((b"AUTH", b"ETRN", b"ATRN", b"XFORWARD", b"PROXY"))

# A web page can make a browser on this host speak to loopback; its words are no commands.
HTTP_METHODS = frozenset(
    (b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"CONNECT", b"TRACE")
)
