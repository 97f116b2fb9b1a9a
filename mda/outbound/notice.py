"""The undeliverable-mail notice (RFC 821 3.6, 4.1.1 DATA), as a report of RFC 3464."""

from __future__ import annotations

import re
from email.message import Message
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.utils import make_msgid

from mda.content.headers import format_date
from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    Action = Literal["failed", "delayed", "relayed", "delivered", "expanded"]

_LAST = "X-Double-Bounce"
_SUBJECTS = {
    "failed": "Undeliverable mail",
    "delayed": "Delayed mail",
    "relayed": "Mail sent on",
    "delivered": "Mail delivered",
    "expanded": "Mail sent to a list",
}
_FATES = {
    "failed": "lost",
    "delayed": "has not come through yet",
    "relayed": "was sent on to a host that will tell you no more",
    "delivered": "was delivered",
    "expanded": "was sent to all whom that name stands for",
}
_MOST_HEADERS = 16 * 1024  # bytes of the message's own header that are given back
_MOST_WHOLE = 48 * 1024  # bytes of a message that is given back as a whole
_LONGEST_LINE = 998  # octets without line end (RFC 5322 2.1.1)
_MOST_FAILURES = 100
_LONGEST = 320  # characters of an address


class Row:
    """One recipient in a notice: the address, what became of it, and who has said so.

    `host` is empty for us; `original` is ORCPT as it came (RFC 3461 4.2), or empty.
    """

    __slots__ = ("address", "host", "original", "outcome")

    def __init__(
        self, address: bytes, outcome: Outcome, *, host: str = "", original: bytes = b""
    ) -> None:
        self.address = address
        self.outcome = outcome
        self.host = host
        self.original = original


def compose(
    name: str,
    to: bytes,
    rows: list[Row],
    head: bytes,
    when: float,
    *,
    action: Action = "failed",
    is_whole: bool = False,
    is_last: bool = False,
    envid: bytes = b"",
) -> bytes:
    """The notice to `to` of what became of mail, with LF line ends, all ASCII.

    `name` is our official one; the first hundred `rows` are named. `head` is the beginning of
    the message, or all of it, as `is_whole` says; `when` is in seconds since the epoch.
    `is_last` marks a notice about a notice, of which there is no other; `envid` is the
    envelope's name as MAIL had it (RFC 3461 4.4).
    """
    rows = rows[:_MOST_FAILURES]
    report = MIMEMultipart("report", report_type="delivery-status")
    report["From"] = f"Mail Delivery System <MAILER-DAEMON@{name}>"
    report["To"] = f"<{spell(to)}>"
    report["Subject"] = _SUBJECTS[action]
    report["Date"] = format_date(when)
    report["Message-ID"] = make_msgid(domain=name)
    report["Auto-Submitted"] = "auto-replied"
    if is_last:
        report[_LAST] = name
    text = "\n".join(_explain(name, to, rows, action))
    report.attach(MIMEText(text, "plain", "us-ascii"))
    status = MIMEBase("message", "delivery-status")
    status.set_payload(list(_list_status(name, rows, when, action, envid)))
    report.attach(status)
    # Only what is lost goes back (RFC 3461 4.3).
    report.attach(_give_back(head, is_whole=is_whole and action == "failed"))
    return report.as_bytes()


def is_last_word(head: bytes, name: str) -> bool:
    """Is this a notice of ours about a notice? Wherever it was forwarded, no other follows."""
    header = b"\n" + head.split(b"\n\n", 1)[0] + b"\n"
    return f"\n{_LAST}: {name}\n".encode() in header


def _explain(name: str, to: bytes, rows: list[Row], action: Action) -> Iterator[str]:
    """The lines for people, as in RFC 821's example 7."""
    mailbox = to.rpartition(b"@")[0] or to
    reader = spell(mailbox.rpartition(b":")[2])
    sorry = "Sorry " if action in ("failed", "delayed") else ""
    for row in rows:
        yield f"{sorry}{reader}, your message to {spell(row.address)} {_FATES[action]}."
        yield f"{row.host or name} said this:"
        yield f'   "{row.outcome.code} {row.outcome.enhanced} {row.outcome.text}"'
        yield ""
    if action == "delayed":
        yield "It is tried further, and you need not send it again."
        yield ""
    yield f"This is the mail system of {name}."


def _list_status(
    name: str, rows: list[Row], when: float, action: Action, envid: bytes
) -> Iterator[Message]:
    """The blocks of fields: of the message first, then of each recipient (RFC 3464 2.1)."""
    block = Message()
    if envid:
        block["Original-Envelope-Id"] = spell(read_xtext(envid))
    block["Reporting-MTA"] = f"dns; {name}"
    block["Arrival-Date"] = format_date(when)
    yield block
    for row in rows:
        block = Message()
        if row.original:
            kind, _, original = row.original.partition(b";")
            block["Original-Recipient"] = f"{spell(kind)}; {spell(read_xtext(original))}"
        kind_of_ours = "rfc822" if row.address.isascii() else "utf-8"
        block["Final-Recipient"] = f"{kind_of_ours}; {spell(row.address)}"
        block["Action"] = action
        block["Status"] = row.outcome.enhanced
        if row.host:
            block["Remote-MTA"] = f"dns; {row.host}"
        text = f"{row.outcome.code} {row.outcome.enhanced} {row.outcome.text}"
        block["Diagnostic-Code"] = f"smtp; {text}"
        yield block


def read_xtext(text: bytes) -> bytes:
    """What xtext stands for: +XX is the octet of that number (RFC 3461 4)."""
    return re.sub(rb"\+([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), text)


def _give_back(head: bytes, *, is_whole: bool) -> MIMEBase:
    """The message itself, if it is small and plain, else its header."""
    is_small = is_whole and len(head) <= _MOST_WHOLE
    is_plain = head.isascii() and not set(head) & {0, 13}
    if is_small and is_plain and max(map(len, head.split(b"\n"))) <= _LONGEST_LINE:
        message = MIMEBase("message", "rfc822")
        message.set_payload(head.decode("ascii"))
        return message
    header = MIMEBase("text", "rfc822-headers")
    header.set_payload(_header_of(head))
    return header


def _header_of(head: bytes) -> str:
    """The message's own header, as far as it is ASCII and not too long, nor any line of it."""
    header = head[:_MOST_HEADERS].split(b"\n\n", 1)[0]
    plain = "".join(
        char if " " <= char <= "~" or char in "\t\n" else "?"
        for char in header.decode("ascii", "replace")
    )
    return "\n".join(line[:_LONGEST_LINE] for line in plain.split("\n"))


def spell(address: bytes) -> str:
    """An address in printable ASCII; other characters as RFC 6533 3 has them: `\\x{EB}`."""
    text = address.decode("utf-8", "replace")
    spelt = "".join(
        char if "!" <= char <= "~" and char not in "<>" else f"\\x{{{ord(char):02X}}}"
        for char in text[:_LONGEST]
    )
    return spelt[:_LONGEST]
