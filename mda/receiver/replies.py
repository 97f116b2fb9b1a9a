"""Every reply of the receiver: the code, the enhanced code and the text stand here only."""

from __future__ import annotations

from mda.model import Outcome

_LONGEST_LINE = 510  # and CRLF: 512 (RFC 821 4.5.3)


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


def greeting(name: str) -> Reply:
    """The first reply of a session (RFC 821 3.5)."""
    return Reply(220, "", f"{name} mda ready")


def closing(name: str) -> Reply:
    """QUIT's answer."""
    return Reply(221, "2.0.0", f"{name} Service closing transmission channel")


def unavailable(name: str, enhanced: str, why: str) -> Reply:
    """421: we close the channel, and the client may come again."""
    return Reply(421, enhanced, f"{name} {why}, closing transmission channel")


def hello(name: str, keywords: tuple[str, ...] = ()) -> Reply:
    """The answer to HELO, and with `keywords` to EHLO and LHLO."""
    return Reply(250, "", name, *keywords)


def opened(verb: str) -> Reply:
    """MAIL, SEND, SOML or SAML accepted."""
    return Reply(250, "2.1.0", "Sender OK" if verb == "MAIL" else f"Sender OK, will {verb}")


START_MAIL_INPUT = Reply(354, "", "Start mail input; end with <CRLF>.<CRLF>")
OK = Reply(250, "2.0.0", "OK")

LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
UNKNOWN_COMMAND = Reply(500, "5.5.2", "Command not recognized")
NOT_IN_SMTP = Reply(500, "5.5.1", "This is SMTP; say HELO or EHLO")
NOT_IN_LMTP = Reply(500, "5.5.1", "This is LMTP; say LHLO (RFC 2033 4.1)")
NOT_OFFERED = Reply(502, "5.5.1", "Command not implemented")
NO_ARGUMENT_ALLOWED = Reply(501, "5.5.4", "No argument allowed")
ARGUMENT_NEEDED = Reply(501, "5.5.4", "Argument needed")
BAD_HOST_NAME = Reply(501, "5.5.4", "Not a host name")
BAD_REVERSE_PATH = Reply(501, "5.1.7", "Bad reverse-path; the form is FROM:<path>")
BAD_FORWARD_PATH = Reply(501, "5.1.3", "Bad forward-path; the form is TO:<path>")
BAD_PARAMETERS = Reply(501, "5.5.4", "Bad parameters")
UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Parameter not recognized or not implemented")
HELLO_FIRST = Reply(503, "5.5.1", "Say hello first")
TRANSACTION_OPEN = Reply(503, "5.5.1", "A transaction is open; RSET ends it")
NO_TRANSACTION = Reply(503, "5.5.1", "No transaction; MAIL, SEND, SOML or SAML opens one")
NO_RECIPIENT = Reply(503, "5.5.1", "No valid recipient")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients")
TOO_LARGE = Reply(552, "5.3.4", "Message too large")
RELAYING_DENIED = Reply(550, "5.7.1", "Mailbox is not on this host, and we do not relay")
MAIL_LOOP = Reply(554, "5.4.6", "Too many Received lines: a mail loop")

# RFC 821 Appendix F, scenario 5: "User not active now, so will do mail".
NOT_ACTIVE = "User not active now"
WILL_MAIL = ", so will do mail"
