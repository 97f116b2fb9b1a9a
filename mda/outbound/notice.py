"""The undeliverable-mail notice (RFC 821 3.6, 4.1.1 DATA), as a report of RFC 3464."""

from __future__ import annotations

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

_MOST_HEADERS = 16 * 1024  # bytes of the message's own header that are given back
_MOST_FAILURES = 100
_LONGEST = 320  # characters of an address
_LOST = ("Your message could not be delivered to these recipients.",)
_DELAYED = (
    "Your message has not been delivered yet to these recipients. It is tried further, and",
    "you need not send it again.",
)


def compose(
    name: str,
    to: bytes,
    failures: list[tuple[bytes, Outcome]],
    head: bytes,
    when: float,
    *,
    is_delay: bool = False,
) -> bytes:
    """The notice to `to` that mail could not be delivered, with LF line ends, all ASCII.

    `name` is our official one, `failures` the addresses and what each was told (the first
    hundred are named), `head` the beginning of the message, `when` seconds since the epoch.
    With `is_delay` nothing is lost yet, and it is tried further.
    """
    failures = failures[:_MOST_FAILURES]
    report = MIMEMultipart("report", report_type="delivery-status")
    report["From"] = f"Mail Delivery System <MAILER-DAEMON@{name}>"
    report["To"] = f"<{spell(to)}>"
    report["Subject"] = "Delayed mail" if is_delay else "Undeliverable mail"
    report["Date"] = format_date(when)
    report["Message-ID"] = make_msgid(domain=name)
    report["Auto-Submitted"] = "auto-replied"
    report.attach(MIMEText(_explain(name, failures, is_delay=is_delay), "plain", "us-ascii"))
    status = MIMEBase("message", "delivery-status")
    status.set_payload(list(_list_status(name, failures, when, is_delay=is_delay)))
    report.attach(status)
    header = MIMEBase("text", "rfc822-headers")
    header.set_payload(_header_of(head))
    report.attach(header)
    return report.as_bytes()


def _explain(name: str, failures: list[tuple[bytes, Outcome]], *, is_delay: bool) -> str:
    lines = [
        f"This is the mail system of {name}.",
        "",
        *(_DELAYED if is_delay else _LOST),
        "",
    ]
    for address, outcome in failures:
        lines += [f"<{spell(address)}>", f"    {outcome.enhanced} {outcome.text}", ""]
    return "\n".join(lines)


def _list_status(
    name: str, failures: list[tuple[bytes, Outcome]], when: float, *, is_delay: bool
) -> Iterator[Message]:
    """The blocks of fields: of the message first, then of each recipient (RFC 3464 2.1)."""
    block = Message()
    block["Reporting-MTA"] = f"dns; {name}"
    block["Arrival-Date"] = format_date(when)
    yield block
    for address, outcome in failures:
        block = Message()
        kind = "rfc822" if address.isascii() else "utf-8"
        block["Final-Recipient"] = f"{kind}; {spell(address)}"
        block["Action"] = "delayed" if is_delay else "failed"
        block["Status"] = outcome.enhanced
        block["Diagnostic-Code"] = f"smtp; {outcome.code} {outcome.enhanced} {outcome.text}"
        yield block


def _header_of(head: bytes) -> str:
    """The message's own header, as far as it is ASCII and not too long."""
    header = head[:_MOST_HEADERS].split(b"\n\n", 1)[0]
    return "".join(
        char if " " <= char <= "~" or char in "\t\n" else "?"
        for char in header.decode("ascii", "replace")
    )


def spell(address: bytes) -> str:
    """An address in printable ASCII; other characters as RFC 6533 3 has them: `\\x{EB}`."""
    text = address.decode("utf-8", "replace")[:_LONGEST]
    return "".join(
        char if "!" <= char <= "~" and char not in "<>" else f"\\x{{{ord(char):02X}}}"
        for char in text
    )
