"""The sender's side of SMTP and LMTP as a dialogue that does no input or output.

`converse` is a generator that reads from top to bottom as the transaction goes. It yields
what is to be done next; whoever drives it says, hears, and sends the reply back in, or
throws `Lost` when the channel is gone or the next host takes too long. Its parts are there
for a channel that carries several transactions, and for TURN.
"""

from __future__ import annotations

import re

from mda.model import TERMINAL_VERBS, Outcome
from mda.receiver.grammar import read_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Literal, TypeAlias

    from mda.model import Verb

    Tls = Literal["never", "may", "must"]
    Step: TypeAlias = "Say | SayText | Hear | StartTls"
    Dialogue = Generator[Step, "Reply | None", None]

_DATA = b"DATA\r\n"
MOST_RECIPIENTS = 100  # of one transaction (RFC 821 4.5.3)
_LONGEST_COMMAND = 512  # octets with CRLF (RFC 821 4.5.3)
_LONGEST_TEXT = 400  # characters of a reply that are kept
_MOST_LINES = 200  # of one reply
_LONGEST_LINE = 8192  # octets of a reply
# How long each reply may take, in seconds (RFC 5321 4.5.3.2).
SECONDS = {"greeting": 300, "command": 300, "data": 120, "block": 180, "end": 600, "quit": 30}

NO_SEND = Outcome(554, "5.3.3", "The next host takes no messages for terminals (SEND)")
NO_UTF8 = Outcome(550, "5.6.7", "The next host takes no addresses in UTF-8")
NO_TLS = Outcome(451, "4.7.5", "The next host offers no TLS, which its route demands")
TOO_LARGE = Outcome(552, "5.3.4", "Larger than the next host takes")
BAD_PATH = Outcome(553, "5.1.3", "An address that no command can hold")
NO_8BIT = Outcome(554, "5.6.3", "The next host takes no octets above 127, which the text has")
# What we say of a host, and it has not said itself.
OWN_WORDS = (NO_SEND, NO_UTF8, NO_TLS, TOO_LARGE, BAD_PATH, NO_8BIT)


class Lost(Exception):
    """The channel is gone, or what came through it was no reply in its place."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class Say:
    """Octets for the next host."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = octets


class SayText:
    """Send the text of the message, stuffed, with the end of data; in seven bits if so said."""

    __slots__ = ("is_7bit",)

    def __init__(self, *, is_7bit: bool) -> None:
        self.is_7bit = is_7bit


class Hear:
    """Read one reply, within `seconds`, and send it back in."""

    __slots__ = ("seconds",)

    def __init__(self, kind: str) -> None:
        self.seconds = SECONDS[kind]


class StartTls:
    """Begin TLS on the channel; throw Lost if that fails."""


class Reply:
    """A reply: its code, and its lines without code and line end, printable ASCII."""

    __slots__ = ("code", "lines")

    def __init__(self, code: int, lines: list[str]) -> None:
        self.code = code
        self.lines = lines


class Request:
    """One transaction: a message for up to MOST_RECIPIENTS at one next hop.

    `reverse_path` and the paths are without brackets; with each path come parameters for
    RCPT, or none. `size` is in octets with CRLF. `helo` is our name. `dsn` are the parameters
    for MAIL, and then those for each path, that a host with DSN understands (RFC 3461).
    """

    __slots__ = (
        "dsn", "has_8bit", "helo", "is_lmtp", "is_utf8", "parameters", "paths", "reverse_path",
        "size", "tls", "verb",
    )  # fmt: skip

    def __init__(
        self,
        verb: Verb,
        reverse_path: bytes,
        paths: list[bytes],
        *,
        helo: str,
        parameters: list[bytes] | None = None,
        dsn: list[bytes] | None = None,
        size: int = 0,
        has_8bit: bool = False,
        is_utf8: bool = False,
        is_lmtp: bool = False,
        tls: Tls = "never",
    ) -> None:
        self.verb: Verb = verb
        self.reverse_path = reverse_path
        self.paths = paths
        self.parameters = parameters or [b""] * len(paths)
        self.dsn = dsn or [b""] * (1 + len(paths))
        self.size = size
        self.has_8bit = has_8bit
        self.is_utf8 = is_utf8
        self.helo = helo
        self.is_lmtp = is_lmtp
        self.tls: Tls = tls


class Result:
    """What came of a request: an outcome for each path, in their order, None where unsettled.

    `failure` is why the channel was lost before the text, so that nobody can have it from
    there and another host may be tried. `leftover` are the numbers of the paths that want a
    transaction of their own. `host` is who has said so, or empty; `has_dsn` that it knows what
    the sender wants to be told.
    """

    def __init__(self, count: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * count
        self.host = ""
        self.has_dsn = False
        self.leftover: list[int] = []
        self.failure: Outcome | None = None
        self.is_greeted = False
        self.is_text_begun = False

    def settle(self, outcome: Outcome) -> None:
        """The outcome of all that have none yet."""
        self.outcomes = [each or outcome for each in self.outcomes]


class ReplyReader:
    """Octets into replies; raises Lost for what is none."""

    def __init__(self) -> None:
        self._buffer = b""
        self._lines: list[str] = []

    def forget(self) -> None:
        """What came before TLS began counts for nothing (RFC 3207 4.2, and injections)."""
        self._buffer = b""
        self._lines.clear()

    @property
    def has_more(self) -> bool:
        """There is something that no reply has been made of."""
        return bool(self._buffer or self._lines)

    def feed(self, octets: bytes) -> None:
        """Take what the next host has said."""
        self._buffer += octets

    def next_reply(self) -> Reply | None:
        """The next whole reply, or None."""
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            found = re.fullmatch(
                rb"([1-5][0-9][0-9])(?:([ -])(.*))?", line.rstrip(b"\r"), re.DOTALL
            )
            if found is None or len(line) > _LONGEST_LINE or len(self._lines) >= _MOST_LINES:
                raise Lost(not_understood(_clean(line)))
            self._lines.append(_clean(found[3] or b""))
            if found[2] != b"-":
                lines, self._lines = self._lines, []
                return Reply(int(found[1]), lines)
        if len(self._buffer) > _LONGEST_LINE:
            raise Lost(not_understood("an endless line"))
        return None


def _clean(line: bytes) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in line[:1000].decode("ascii", "replace"))


def not_understood(text: str) -> Outcome:
    """What has no place where it stands is a failure for now (RFC 821 4.4)."""
    return Outcome(451, "4.5.0", f"Not understood: {text[:_LONGEST_TEXT]}")


def outcome_of(reply: Reply) -> Outcome:
    """A reply that ends a step as an outcome; by its first digit only 2yz is success."""
    if reply.code // 100 not in (2, 4, 5):
        return not_understood(f"{reply.code} {' '.join(reply.lines)}")
    found = re.match(rf"({reply.code // 100}\.\d{{1,3}}\.\d{{1,3}})(?: |$)", reply.lines[0])
    enhanced = found[1] if found else f"{reply.code // 100}.0.0"
    # It stands on every line (RFC 2034 4).
    text = " ".join(line.removeprefix(enhanced).strip() for line in reply.lines)
    return Outcome(reply.code, enhanced, text[:_LONGEST_TEXT])


def converse(request: Request, result: Result) -> Dialogue:
    """The whole dialogue from greeting to QUIT's reply; fills in the result."""
    try:
        extensions = yield from introduce(request)
    except Lost as lost:
        result.failure = lost.outcome
        return
    if (yield from transact(request, result, extensions)):
        yield from part()


def introduce(request: Request) -> Generator[Step, Reply | None, dict[str, str]]:
    """The greeting, and hello in our name: the extensions; raises Lost."""
    yield from _expect_greeting()
    return (yield from _greet(request))


def transact(
    request: Request, result: Result, extensions: dict[str, str], *, is_first: bool = True
) -> Generator[Step, Reply | None, bool]:
    """One transaction behind hello; is the channel still good? Fills in the result."""
    result.is_greeted = True
    result.has_dsn = "DSN" in extensions
    try:
        if not is_first:
            yield Say(b"RSET\r\n")
            reset = outcome_of((yield from _hear("command")))
            if not reset.is_done:
                raise Lost(not_understood(f"{reset.code} to RSET"))
        yield from _transact(request, result, extensions)
    except Lost as lost:
        result.leftover.clear()
        if result.is_text_begun:
            result.settle(lost.outcome)
        else:
            result.failure = lost.outcome
        return False
    return True


def part() -> Dialogue:
    """QUIT; everything is settled already."""
    try:
        yield Say(b"QUIT\r\n")
        yield Hear("quit")
    except Lost:
        return


def turn() -> Generator[Step, Reply | None, Outcome]:
    """Ask for the receiver's role (RFC 821 3.8); raises Lost."""
    yield Say(b"TURN\r\n")
    return outcome_of((yield from _hear("command")))


def _hear(kind: str) -> Generator[Hear, Reply | None, Reply]:
    reply = yield Hear(kind)
    if reply is None:
        raise RuntimeError("a reply was asked for")
    if reply.code == 421:
        raise Lost(outcome_of(reply))
    return reply


def _expect_greeting() -> Generator[Hear, Reply | None, None]:
    reply = yield from _hear("greeting")
    if reply.code != 220:
        outcome = outcome_of(reply)
        raise Lost(outcome if outcome.is_temporary else Outcome(451, "4.3.2", outcome.text))


def _greet(request: Request) -> Generator[Say | Hear | StartTls, Reply | None, dict[str, str]]:
    """EHLO, with TLS where it is offered or demanded; the extensions that count then."""
    extensions = yield from _say_hello(request)
    if request.tls == "never":
        return extensions
    if "STARTTLS" in extensions:
        yield Say(b"STARTTLS\r\n")
        reply = yield from _hear("command")
        if reply.code == 220:
            yield StartTls()
            # Nothing that was said in the clear counts any more (RFC 3207 4.2).
            return (yield from _say_hello(request))
    if request.tls == "must":
        raise Lost(NO_TLS)
    return extensions


def _say_hello(request: Request) -> Generator[Say | Hear, Reply | None, dict[str, str]]:
    """What the next host lists after EHLO or LHLO; HELO is for who does not know EHLO."""
    name = request.helo.encode("ascii", "replace")
    yield Say(b"%b %b\r\n" % (b"LHLO" if request.is_lmtp else b"EHLO", name))
    reply = yield from _hear("command")
    if reply.code // 100 == 2:
        rows = [line.upper().partition(" ") for line in reply.lines[1:]]
        return {keyword: rest for keyword, _, rest in rows}
    if reply.code // 100 == 5 and not request.is_lmtp:
        yield Say(b"HELO %b\r\n" % name)
        reply = yield from _hear("command")
        if reply.code // 100 == 2:
            return {}
    outcome = outcome_of(reply)
    raise Lost(outcome if outcome.is_temporary else Outcome(451, "4.5.0", outcome.text))


def _transact(request: Request, result: Result, extensions: dict[str, str]) -> Dialogue:
    """MAIL, the recipients, the text (RFC 821 3.1)."""
    verb = choose_verb(request.verb, extensions)
    refusal = _judge(request, verb, extensions)
    opening = _open(request, verb or "MAIL", extensions)
    commands = []
    for number, (path, more) in enumerate(zip(request.paths, request.parameters, strict=True)):
        command = b"RCPT TO:<%b>%b\r\n" % (path, b" " + more if more else b"")
        if refusal or not path or not _can_be_said(command, path):
            result.outcomes[number] = refusal or BAD_PATH
        else:
            wish = request.dsn[1 + number] if result.has_dsn else b""
            commands.append((number, b" ".join(filter(None, [command[:-2], wish])) + b"\r\n"))
    if not _can_be_said(opening, request.reverse_path):
        result.settle(BAD_PATH)
        return
    if result.has_dsn and request.dsn[0]:
        opening = b"%b %b\r\n" % (opening[:-2], request.dsn[0])
    if commands:
        pipelined = "PIPELINING" in extensions
        is_opened, accepted = yield from _address(opening, commands, result, is_pipelined=pipelined)
        text = SayText(is_7bit=needs_7bit(request, extensions))
        yield from _say_text(
            request, result, accepted, text, is_pipelined=pipelined, is_opened=is_opened
        )


def choose_verb(verb: Verb, extensions: dict[str, str]) -> Verb | None:
    """How the verb is said there: SOML and SAML also as mail, SEND never (RFC 821 3.4)."""
    if verb not in TERMINAL_VERBS or verb in extensions:
        return verb
    return None if verb == "SEND" else "MAIL"


def needs_7bit(request: Request, extensions: dict[str, str]) -> bool:
    """Has the text octets that this host does not take (RFC 6152 3)?"""
    return request.has_8bit and "8BITMIME" not in extensions


def _judge(request: Request, verb: Verb | None, extensions: dict[str, str]) -> Outcome | None:
    """Why nothing needs to be said to this host, if so."""
    limit = extensions.get("SIZE", "").strip()
    if limit.isdigit() and 0 < int(limit) < request.size:
        return TOO_LARGE
    if request.is_utf8 and "SMTPUTF8" not in extensions:
        return NO_UTF8
    return NO_SEND if verb is None else None


def _open(request: Request, verb: Verb, extensions: dict[str, str]) -> bytes:
    words = [b"%b FROM:<%b>" % (verb.encode(), request.reverse_path)]
    # How large it gets in seven bits is not known yet.
    if "SIZE" in extensions and request.size and not needs_7bit(request, extensions):
        words.append(b"SIZE=%d" % request.size)
    if "8BITMIME" in extensions and request.has_8bit:
        words.append(b"BODY=8BITMIME")
    if request.is_utf8:
        words.append(b"SMTPUTF8")
    return b" ".join(words) + b"\r\n"


def _can_be_said(command: bytes, path: bytes) -> bool:
    """Is it a path from end to end, so that nothing in it is taken for something behind it?"""
    return read_path(path) is not None and len(command) <= _LONGEST_COMMAND


def _address(
    opening: bytes, commands: list[tuple[int, bytes]], result: Result, *, is_pipelined: bool
) -> Generator[Say | Hear, Reply | None, tuple[bool, list[int]]]:
    """The reverse-path and the recipients: is it accepted, and the numbers of those that are."""
    more = [*(command for _, command in commands), _DATA] if is_pipelined else []
    yield Say(b"".join([opening, *more]))
    opened = outcome_of((yield from _hear("command")))
    accepted: list[int] = []
    for number, command in commands:
        if not opened.is_done and not is_pipelined:
            result.outcomes[number] = opened
            continue
        if not is_pipelined:
            yield Say(command)
        outcome = outcome_of((yield from _hear("command")))
        if not opened.is_done:
            result.outcomes[number] = opened
        elif outcome.is_done:
            accepted.append(number)
        else:
            _refuse(number, outcome, accepted, result)
    return opened.is_done, accepted


def _refuse(number: int, outcome: Outcome, accepted: list[int], result: Result) -> None:
    """One recipient is refused; too many for one transaction get another (RFC 5321 4.5.3.1.10)."""
    if accepted and outcome.code in (452, 552):
        outcome = Outcome(452, "4.5.3", outcome.text)
        result.leftover.append(number)
    result.outcomes[number] = outcome


def _say_text(
    request: Request,
    result: Result,
    accepted: list[int],
    text: SayText,
    *,
    is_pipelined: bool,
    is_opened: bool,
) -> Dialogue:
    if not accepted and not is_pipelined:
        return
    if not is_pipelined:
        yield Say(_DATA)
    reply = yield from _hear("data")
    if reply.code // 100 == 3 and not accepted:
        yield from _say_no_text(may_be_said=is_opened and not request.is_lmtp)
        return
    if reply.code // 100 != 3:
        outcome = outcome_of(reply)
        refused = not_understood(f"{reply.code} to DATA") if outcome.is_done else outcome
        for number in accepted:
            result.outcomes[number] = refused
        return
    result.is_text_begun = True
    yield text
    for number in accepted if request.is_lmtp else accepted[:1]:
        result.outcomes[number] = outcome_of((yield from _hear("end")))
    for number in accepted:
        result.outcomes[number] = result.outcomes[number] or result.outcomes[accepted[0]]


def _say_no_text(*, may_be_said: bool) -> Generator[Say | Hear, Reply | None, None]:
    """A text is waited for that nobody is to get: an empty one goes (RFC 2920 3.1).

    Not where it could be delivered to somebody all the same, or be answered by nothing.
    """
    if not may_be_said:
        raise Lost(not_understood("354 although nobody is to get a text"))
    yield Say(b".\r\n")
    yield from _hear("end")
