"""The client's side of our own LMTP and SMTP sockets, for deliver, send and who.

`smtplib` speaks; what it gets wrong about LMTP (one reply for many recipients) is left
out by asking for the replies one by one.
"""

from __future__ import annotations

import os
import re
import smtplib
import socket

from mda.config import LMTP_SOCKET, SMTP_SOCKET
from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TIMEOUT = 600.0  # seconds: end of data may wait for locks (RFC 5321 4.5.3.2.6)

UNREACHABLE = Outcome(451, "4.4.1", "No mda listens here: see `mda check`")


class Refused(Exception):
    """The receiver did not take the whole transaction; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


def state_directory() -> str:
    """Where `mda serve` run by a user keeps its mailbox and sockets."""
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
    return os.path.join(base, "mda")


def find_socket(protocol: str) -> str | None:
    """The host's socket of `protocol` ("smtp", "lmtp"), else the user's own, else None."""
    host_wide = {"smtp": SMTP_SOCKET, "lmtp": LMTP_SOCKET}[protocol]
    for path in (host_wide, os.path.join(state_directory(), f"{protocol}.sock")):
        if os.path.exists(path):
            return path
    return None


class Client:
    """One LMTP session with the receiver of this host; raises Refused."""

    def __init__(self) -> None:
        path = find_socket("lmtp")
        if path is None:
            raise Refused(UNREACHABLE)
        self._lmtp = smtplib.LMTP(local_hostname=os.uname().nodename)
        try:
            self._lmtp.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._lmtp.sock.settimeout(_TIMEOUT)
            self._lmtp.sock.connect(path)
            self._lmtp.file = None
            greeting = outcome_of(*self._lmtp.getreply())
            if greeting.code != 220:
                raise Refused(greeting)
            self._lmtp.ehlo()
        except ConnectionRefusedError as error:
            raise Refused(UNREACHABLE) from error
        except (OSError, smtplib.SMTPException) as error:
            raise Refused(Outcome(451, "4.4.2", f"The receiver is gone: {error}")) from error

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
            # In the middle of a text there is no saying QUIT, and half a text is none.
            self._lmtp.close()
            raise Refused(Outcome(451, "4.4.2", f"Not handed over: {error}")) from error

    def _deliver(
        self, verb: str, sender: str, recipients: list[str], message: Iterable[bytes]
    ) -> list[Outcome]:
        opened = self._ask(f"{verb} FROM:<{sender}>")
        if not opened.is_done:
            raise Refused(opened)
        outcomes = [self._ask(f"RCPT TO:<{recipient}>") for recipient in recipients]
        accepted = [number for number, outcome in enumerate(outcomes) if outcome.is_done]
        if not accepted:
            self._ask("RSET")
            return outcomes
        started = self._ask("DATA")
        if started.code != 354:
            raise Refused(started)
        for piece in stuff(message):
            self._lmtp.send(piece)
        for number in accepted:
            outcomes[number] = outcome_of(*self._lmtp.getreply())
        return outcomes

    def _ask(self, command: str) -> Outcome:
        if not command.isprintable():
            return Outcome(501, "5.1.3", "An address holds a control character")
        if not command.isascii():
            return Outcome(501, "5.6.7", "An address holds a character outside ASCII")
        self._lmtp.putcmd(command)
        return outcome_of(*self._lmtp.getreply())

    def close(self) -> None:
        """Quit, if the receiver is still there."""
        try:
            self._lmtp.quit()
        except (OSError, smtplib.SMTPException):
            self._lmtp.close()


def outcome_of(code: int, text: bytes) -> Outcome:
    """A reply as an outcome: the enhanced code is taken off the text."""
    words = text.decode("ascii", "replace").split("\n")[-1]
    enhanced, _, rest = words.partition(" ")
    if re.fullmatch(r"[245]\.\d{1,3}\.\d{1,3}", enhanced):
        return Outcome(code, enhanced, rest)
    return Outcome(code, f"{code // 100}.0.0", words)


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
            connection.sendall(b"XWHO\r\nQUIT\r\n")
            with connection.makefile("rb") as replies:
                replies.readline(1024)
                return _read_logins(iter(lambda: replies.readline(1024), b""))
        except ConnectionRefusedError as error:
            raise Refused(UNREACHABLE) from error
        except OSError as error:
            raise Refused(Outcome(451, "4.4.2", f"The receiver is gone: {error}")) from error


def _read_logins(lines: Iterable[bytes]) -> list[tuple[str, str, int, str]]:
    rows: list[tuple[str, str, int, str]] = []
    for line in lines:
        text = line.decode("ascii", "replace").rstrip("\r\n")
        if not text.startswith("250-2.0.0 "):
            if text.startswith("250 "):
                return rows
            raise Refused(outcome_of(int(text[:3] or 451), text[4:].encode()))
        user, device, idle, takes = text.removeprefix("250-2.0.0 ").rsplit(" ", 3)
        rows.append((user, device, int(idle), takes))
    raise Refused(Outcome(451, "4.4.2", "The receiver hung up"))
