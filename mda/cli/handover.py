"""The client's side of our own LMTP and SMTP sockets, for deliver, send and who.

`smtplib` speaks; what it gets wrong about LMTP (one reply for many recipients) is left
out by asking for the replies one by one. A reply that has no place where it stands is
not understood, and so a temporary failure (design, decision 3).
"""

from __future__ import annotations

import contextlib
import os
import re
import smtplib
import socket

from mda.config import LMTP_SOCKET, SMTP_SOCKET
from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import BinaryIO, Self

_TIMEOUT = 600.0  # seconds: end of data may wait for locks (RFC 5321 4.5.3.2.6)

UNREACHABLE = Outcome(451, "4.4.1", "No mda listens here: see `mda check`")


class Refused(Exception):
    """The receiver did not take the whole transaction; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


def state_directory() -> str:
    """Where `mda serve` run by a user keeps its mailbox and sockets.

    A relative $XDG_STATE_HOME counts for nothing, as the XDG specification has it.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "mda")


def find_socket(protocol: str) -> str | None:
    """The host's socket of `protocol` ("smtp", "lmtp"), else the user's own, else None."""
    host_wide = {"smtp": SMTP_SOCKET, "lmtp": LMTP_SOCKET}[protocol]
    for path in (host_wide, os.path.join(state_directory(), f"{protocol}.sock")):
        if os.path.exists(path):
            return path
    return None


class Client:
    """One session with the receiver of this host, for one transaction.

    By LMTP for its own users, who each get a reply; by SMTP for other hosts' mailboxes, since
    in LMTP every domain is ours. Raises Refused. As a `with` block it says QUIT at its end,
    and after an exception hangs up: in the middle of a text there is no saying QUIT, and half a
    text is none.
    """

    def __init__(self, protocol: str = "lmtp") -> None:
        path = find_socket(protocol)
        if path is None:
            raise Refused(UNREACHABLE)
        self._is_lmtp = protocol == "lmtp"
        speak = smtplib.LMTP if self._is_lmtp else smtplib.SMTP
        self._speaker = speak(local_hostname=os.uname().nodename)
        try:
            self._speaker.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._speaker.sock.settimeout(_TIMEOUT)
            self._speaker.sock.connect(path)
            self._speaker.file = None
            self._greet()
        except ConnectionRefusedError as error:
            self._speaker.close()
            raise Refused(UNREACHABLE) from error
        except (OSError, smtplib.SMTPException) as error:
            self._speaker.close()
            raise Refused(gone(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._speaker.quit()
        except (OSError, smtplib.SMTPException):
            pass  # it has taken what it has taken
        finally:
            self._speaker.close()

    def _greet(self) -> None:
        code, text = self._speaker.getreply()
        if code == 220:
            code, text = self._speaker.ehlo()
        if code != 250:
            raise Refused(refusal_of(code, text))

    def deliver(
        self, verb: str, sender: str, recipients: list[str], message: Iterable[bytes]
    ) -> list[Outcome]:
        """One transaction: an outcome for each recipient, in their order.

        `sender` and `recipients` are paths without brackets, `message` pieces of the text
        with LF or CRLF line ends.
        """
        try:
            return self._deliver(verb, sender, recipients, message)
        except (OSError, smtplib.SMTPException) as error:
            raise Refused(gone(error)) from error

    def ask(self, verb: str, sender: str, recipients: list[str]) -> list[Outcome]:
        """What each recipient's RCPT would be told, and nothing is sent; raises Refused."""
        try:
            outcomes = self._address(verb, sender, recipients)
            self._speaker.docmd("RSET")
        except (OSError, smtplib.SMTPException) as error:
            raise Refused(gone(error)) from error
        return outcomes

    def _address(self, verb: str, sender: str, recipients: list[str]) -> list[Outcome]:
        parameter = self._allow_utf8("".join((sender, *recipients)))
        opened = self._ask(f"{self._choose(verb)} FROM:<{sender}>{parameter}")
        if not opened.is_done:
            raise Refused(opened)
        return [self._ask(f"RCPT TO:<{recipient}>") for recipient in recipients]

    def _deliver(
        self, verb: str, sender: str, recipients: list[str], message: Iterable[bytes]
    ) -> list[Outcome]:
        outcomes = self._address(verb, sender, recipients)
        accepted = [number for number, outcome in enumerate(outcomes) if outcome.is_done]
        if not accepted:
            return outcomes
        code, text = self._speaker.docmd("DATA")
        if code != 354:
            raise Refused(refusal_of(code, text))
        for piece in stuff(message):
            self._speaker.send(piece)
        for number in accepted if self._is_lmtp else accepted[:1]:
            outcomes[number] = outcome_of(*self._speaker.getreply())
        for number in accepted[1:] if not self._is_lmtp else []:
            outcomes[number] = outcomes[accepted[0]]
        return outcomes

    def _choose(self, verb: str) -> str:
        """The verb to say: one that is not offered is for no terminal of this host.

        SOML and SAML are then what they are for somebody who is not logged in.
        """
        if verb == "MAIL" or self._speaker.has_extn(verb):
            return verb
        if verb == "SEND":
            raise Refused(Outcome(550, "5.7.1", "Terminals are not for you here"))
        return "MAIL"

    def _allow_utf8(self, addresses: str) -> str:
        """The parameter for addresses that ASCII cannot hold, where that is offered."""
        if addresses.isascii() or not self._speaker.has_extn("smtputf8"):
            return ""
        self._speaker.command_encoding = "utf-8"
        return " SMTPUTF8"

    def _ask(self, command: str) -> Outcome:
        if not command.isprintable():
            return Outcome(501, "5.1.3", "An address holds a control character")
        if not command.isascii() and self._speaker.command_encoding == "ascii":
            return Outcome(501, "5.6.7", "An address holds a character outside ASCII")
        return outcome_of(*self._speaker.docmd(command))


def gone(error: Exception) -> Outcome:
    """The receiver has hung up, or does not answer."""
    return Outcome(451, "4.4.2", f"The receiver is gone: {error}")


def outcome_of(code: int, text: bytes) -> Outcome:
    """A reply as an outcome: the enhanced code is taken off the text."""
    words = text.decode("ascii", "replace").split("\n")[-1]
    if code // 100 not in (2, 4, 5):
        return Outcome(451, "4.5.0", f"Not understood: {code} {words}")
    enhanced, _, rest = words.partition(" ")
    if re.fullmatch(rf"{code // 100}\.\d{{1,3}}\.\d{{1,3}}", enhanced):
        return Outcome(code, enhanced, rest)
    return Outcome(code, f"{code // 100}.0.0", words)


def refusal_of(code: int, text: bytes) -> Outcome:
    """A reply that does not let a session go on: no fault of any message's."""
    outcome = outcome_of(code, text)
    if outcome.is_temporary:
        return outcome
    return Outcome(451, "4.5.0", f"Not understood: {code} {outcome.text}")


def stuff(message: Iterable[bytes]) -> Iterable[bytes]:
    """The octets of DATA: CRLF line ends, leading dots doubled, the end of data.

    An LF that follows no CR becomes CRLF; everything else stays (RFC 821 4.5.2).
    """
    last = b"\n"  # what stood before the piece in hand
    for piece in message:
        if not piece:
            continue
        lines = re.sub(rb"(?<!\r)\n", b"\r\n", last + piece)[len(_as_sent(last)) :]
        if last.endswith(b"\n") and lines.startswith(b"."):
            lines = b"." + lines
        yield lines.replace(b"\n.", b"\n..")
        last = piece[-1:]
    yield b".\r\n" if last == b"\n" else b"\r\n.\r\n"


def _as_sent(last: bytes) -> bytes:
    return b"\r\n" if last == b"\n" else last


def list_logins() -> list[tuple[str, str, int, str]]:
    """Ask the daemon who is logged in: (user, terminal, idle seconds, "y" or "n").

    Raises Refused.
    """
    path = find_socket("smtp")
    if path is None:
        raise Refused(UNREACHABLE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        try:
            connection.connect(path)
            with connection.makefile("rb") as replies:
                _read_reply(replies, 220)
                connection.sendall(b"XWHO\r\n")
                rows = [_read_row(line) for line in _read_reply(replies, 250)[:-1]]
                with contextlib.suppress(OSError):  # it has told all that was asked
                    connection.sendall(b"QUIT\r\n")
                    replies.readline(1024)
                return rows
        except ConnectionRefusedError as error:
            raise Refused(UNREACHABLE) from error
        except OSError as error:
            raise Refused(gone(error)) from error


def _read_reply(replies: BinaryIO, expected: int) -> list[str]:
    """The lines of the next reply, without its code; raises Refused for another one."""
    lines: list[str] = []
    while found := re.fullmatch(rb"(\d{3})([ -])(.*)\r\n", replies.readline(1024)):
        lines.append(found[3].decode("utf-8", "replace"))
        if found[2] == b" ":
            if int(found[1]) != expected:
                raise Refused(outcome_of(int(found[1]), found[3]))
            return lines
    raise Refused(Outcome(451, "4.4.2", "The receiver hung up"))


def _read_row(line: str) -> tuple[str, str, int, str]:
    row = line.removeprefix("2.0.0 ")
    found = re.fullmatch(r"(.+) (\S+) (\d{1,12}) ([yn])", row)
    if found is None:
        raise Refused(Outcome(451, "4.5.0", f"Not understood: {row}"))
    return found[1], found[2], int(found[3]), found[4]
