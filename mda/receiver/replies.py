"""Every reply of the receiver: the code, the enhanced code and the text stand here only."""

from __future__ import annotations

from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    Reason = tuple[str, str]

_LONGEST_LINE = 510  # and CRLF: 512 (RFC 821 4.5.3)
_LONGEST_NAME = 100
_NOT_IN_NAMES = frozenset("<>") | frozenset(map(chr, range(32))) | {chr(127)}


class Reply:
    """One reply: three digits, an RFC 3463 code or "", and one or more lines of text.

    The enhanced code stands on every line (RFC 2034 4); the greeting, the answers to
    HELO, EHLO and LHLO, and 354 have none.
    """

    __slots__ = ("code", "enhanced", "lines")

    def __init__(self, code: int, enhanced: str, *lines: str) -> None:
        self.code = code
        self.enhanced = enhanced
        self.lines = lines

    def render(self) -> bytes:
        """The octets to send: printable ASCII, CRLF ends, at most 512 octets a line."""
        lead = f"{self.enhanced} " if self.enhanced else ""
        rendered = []
        for number, line in enumerate(self.lines, 1):
            mark = " " if number == len(self.lines) else "-"
            text = f"{self.code}{mark}{lead}{line}".encode("ascii", "replace")
            clean = bytes(char if 32 <= char < 127 else 63 for char in text)
            rendered.append(clean[:_LONGEST_LINE] + b"\r\n")
        return b"".join(rendered)

    @property
    def is_accepted(self) -> bool:
        """2xx, as far as the state of the session is concerned."""
        return 200 <= self.code < 300


def of_outcome(outcome: Outcome, subject: str = "") -> Reply:
    """The reply that passes an outcome on; `subject` ("<alice>") stands before its text."""
    text = f"{subject} {outcome.text}" if subject else outcome.text
    return Reply(outcome.code, outcome.enhanced, text)


def to_outcome(reply: Reply) -> Outcome:
    """A one-line reply as the value that it would have been at a seam below."""
    return Outcome(reply.code, reply.enhanced, reply.lines[0])


def greeting(name: str, *, is_lmtp: bool = False) -> Reply:
    """The first reply of a session (RFC 821 3.5)."""
    return Reply(220, "", f"{name} {'LMTP' if is_lmtp else 'ESMTP'} mda ready")


def closing(name: str) -> Reply:
    """QUIT's answer."""
    return Reply(221, "2.0.0", f"{name} Service closing transmission channel")


def unavailable(name: str, reason: Reason) -> Reply:
    """421: we close the channel, and the client may come again."""
    enhanced, why = reason
    return Reply(421, enhanced, f"{name} {why}, closing transmission channel")


def hello(name: str, keywords: tuple[str, ...] = ()) -> Reply:
    """The answer to HELO, and with `keywords` to EHLO and LHLO."""
    return Reply(250, "", name, *keywords)


def opened(verb: str) -> Reply:
    """MAIL, SEND, SOML or SAML accepted."""
    return Reply(250, "2.1.0", "Sender OK" if verb == "MAIL" else f"Sender OK, will {verb}")


def chunk_taken(size: int) -> Reply:
    """BDAT's answer before the last chunk (RFC 3030 2)."""
    return Reply(250, "2.0.0", f"{size} octets taken")


def helping(name: str, verbs: tuple[str, ...]) -> Reply:
    """HELP's answer: every verb that this peer is served, on one screen."""
    rows = [" ".join(verbs[at : at + 8]) for at in range(0, len(verbs), 8)]
    return Reply(214, "2.0.0", f"{name} takes these commands:", *rows, "HELP COMMAND says more")


def explaining(usage: str) -> Reply:
    """HELP's answer to a verb: how it is written."""
    return Reply(214, "2.0.0", usage)


def vouching(full_name: str, mailbox: str) -> str:
    """The line of VRFY and EXPN for one fully specified mailbox (RFC 5321 3.5.2).

    A full name that is not printable ASCII is left out (RFC 821 2: replies are ASCII), and
    so are the brackets that would make it look like a mailbox.
    """
    shown = "" if set(full_name) & _NOT_IN_NAMES or not full_name.isascii() else full_name
    return f"{shown[:_LONGEST_NAME]} <{mailbox}>".lstrip()


# Why a channel is closed with 421: the enhanced code, and the reason.
IDLE = ("4.4.2", "Idle for too long")
SESSION_TOO_LONG = ("4.4.2", "Session has lasted too long")
SHUTTING_DOWN = ("4.3.2", "Shutting down")
LOCAL_ERROR = ("4.3.0", "Local error")
TOO_MANY_ERRORS = ("4.7.0", "Too many errors")
TOO_MUCH_JUNK = ("4.7.0", "Too many commands without a message")
TOO_MANY_CONNECTIONS = ("4.7.0", "Too many connections")
NO_ROOM = ("4.3.2", "No room for another session")
NOT_CONFIGURED = ("4.3.5", "Configuration error")
NOT_HTTP = ("4.7.0", "This is no HTTP server")

START_MAIL_INPUT = Reply(354, "", "Start mail input; end with <CRLF>.<CRLF>")
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
OK = Reply(250, "2.0.0", "OK")

TURNED = Reply(250, "2.0.0", "OK, you are the receiver now")
NOTHING_BEHIND = Reply(503, "5.5.1", "Nothing may stand behind TURN")

LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
UNKNOWN_COMMAND = Reply(500, "5.5.2", "Command not recognized")
NOT_IN_SMTP = Reply(500, "5.5.1", "This is SMTP; say HELO or EHLO")
NOT_IN_LMTP = Reply(500, "5.5.1", "This is LMTP; say LHLO (RFC 2033 4.1)")
NO_TLS_NOW = Reply(454, "4.7.0", "TLS not available due to temporary reason")
TLS_FIRST = Reply(530, "5.7.0", "Must issue a STARTTLS command first")
BAD_XCLIENT = Reply(501, "5.5.4", "Bad XCLIENT attribute")
NOT_OFFERED = Reply(502, "5.5.1", "Command not implemented")
NO_SUCH_HELP = Reply(504, "5.5.4", "No help for that; HELP alone lists the commands")
NO_ARGUMENT_ALLOWED = Reply(501, "5.5.4", "No argument allowed")
BAD_CHARACTER = Reply(501, "5.5.2", "A character that no command may have")
ARGUMENT_NEEDED = Reply(501, "5.5.4", "Argument needed")
BAD_HOST_NAME = Reply(501, "5.5.4", "Not a host name")
BAD_REVERSE_PATH = Reply(501, "5.1.7", "Bad reverse-path; the form is FROM:<path>")
BAD_FORWARD_PATH = Reply(501, "5.1.3", "Bad forward-path; the form is TO:<path>")
PATH_TOO_LONG = Reply(501, "5.1.3", "Path too long")
NEEDS_SMTPUTF8 = Reply(553, "5.6.7", "Such an address needs SMTPUTF8")
BAD_PARAMETERS = Reply(501, "5.5.4", "Bad parameters")
UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Parameter not recognized or not implemented")
HELLO_FIRST = Reply(503, "5.5.1", "Say hello first")
NOT_IN_TRANSACTION = Reply(503, "5.5.1", "Not in a transaction, and not twice")
TRANSACTION_OPEN = Reply(503, "5.5.1", "A transaction is open; RSET ends it")
NO_TRANSACTION = Reply(503, "5.5.1", "No transaction; MAIL, SEND, SOML or SAML opens one")
CHUNKS_BEGUN = Reply(503, "5.5.1", "The text comes by BDAT; RSET ends it")
NO_RECIPIENT = Reply(503, "5.5.1", "No valid recipient")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients")
TOO_LARGE = Reply(552, "5.3.4", "Message too large")
RELAYING_DENIED = Reply(550, "5.7.1", "Mailbox is not on this host, and we do not relay")
BARE_NEWLINE = Reply(554, "5.6.0", "A CR or LF that stands alone; lines end in CRLF")
TEXT_LINE_TOO_LONG = Reply(554, "5.6.0", "Text line too long")
SERVED_IN_PART = Reply(250, "2.0.0", "OK for some; the sender gets a notice about the others")
SERVED_IN_SILENCE = Reply(250, "2.0.0", "OK for some; of the others nothing was to be told")
WAITS_FOR_A_MEND = Reply(451, "4.3.5", "Mail for this address waits until the host is mended")
DELIVERED_BEFORE = Reply(554, "5.4.6", "Delivered here before: a mail loop")
MAIL_LOOP = Reply(554, "5.4.6", "Too many Received lines: a mail loop")

# RFC 5321 7.3: who must not know is told nothing, in words that are always the same.
CANNOT_VERIFY = Reply(252, "2.5.0", "Cannot verify here; will take messages for a user")
ACCESS_DENIED = Reply(550, "5.7.1", "Access Denied to You")
NOT_OUR_DOMAIN = Reply(550, "5.1.2", "Not a mailbox of this host")
ONLY_IN_UTF8 = Reply(252, "2.6.8", "The mailbox has a name that ASCII cannot show")

# RFC 821 Appendix F, scenario 5: "User not active now, so will do mail".
NOT_ACTIVE = "User not active now"
WILL_MAIL = ", so will do mail"
