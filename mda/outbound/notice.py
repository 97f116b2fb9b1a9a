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

    # An address, what became of it, and the host that has said so, or "" for us.
    Failure = tuple[bytes, Outcome, str]

_LAST = "X-Double-Bounce"
_MOST_HEADERS = 16 * 1024  # bytes of the message's own header that are given back
_MOST_WHOLE = 48 * 1024  # bytes of a message that is given back as a whole
_LONGEST_LINE = 998  # octets without line end (RFC 5322 2.1.1)
_MOST_FAILURES = 100
_LONGEST = 320  # characters of an address


def compose(
    name: str,
    to: bytes,
    failures: list[Failure],
    head: bytes,
    when: float,
    *,
    is_whole: bool = False,
    is_delay: bool = False,
    is_last: bool = False,
) -> bytes:
    """The notice to `to` that mail could not be delivered, with LF line ends, all ASCII.

    `name` is our official one, `failures` the addresses, what each was told, and by which
    host ("" for us); the first hundred are named. `head` is the beginning of the message, or
    all of it, as `is_whole` says; `when` is in seconds since the epoch. With `is_delay` nothing
    is lost yet, and it is tried further. `is_last` marks a notice about a notice, of which there
    is no other.
    """
    failures = failures[:_MOST_FAILURES]
    report = MIMEMultipart("report", report_type="delivery-status")
    report["From"] = f"Mail Delivery System <MAILER-DAEMON@{name}>"
    report["To"] = f"<{spell(to)}>"
    report["Subject"] = "Delayed mail" if is_delay else "Undeliverable mail"
    report["Date"] = format_date(when)
    report["Message-ID"] = make_msgid(domain=name)
    report["Auto-Submitted"] = "auto-replied"
    if is_last:
        report[_LAST] = name
    text = "\n".join(_explain(name, to, failures, is_delay=is_delay))
    report.attach(MIMEText(text, "plain", "us-ascii"))
    status = MIMEBase("message", "delivery-status")
    status.set_payload(list(_list_status(name, failures, when, is_delay=is_delay)))
    report.attach(status)
    report.attach(_give_back(head, is_whole=is_whole))
    return report.as_bytes()


def is_last_word(head: bytes, name: str) -> bool:
    """Is this a notice of ours about a notice? Wherever it was forwarded, no other follows."""
    header = b"\n" + head.split(b"\n\n", 1)[0] + b"\n"
    return f"\n{_LAST}: {name}\n".encode() in header


def _explain(name: str, to: bytes, failures: list[Failure], *, is_delay: bool) -> Iterator[str]:
    """The lines for people, as in RFC 821's example 7."""
    mailbox = to.rpartition(b"@")[0] or to
    reader = spell(mailbox.rpartition(b":")[2])
    for address, outcome, host in failures:
        fate = "has not come through yet" if is_delay else "lost"
        yield f"Sorry {reader}, your message to {spell(address)} {fate}."
        yield f"{host or name} said this:"
        yield f'   "{outcome.code} {outcome.enhanced} {outcome.text}"'
        yield ""
    if is_delay:
        yield "It is tried further, and you need not send it again."
        yield ""
    yield f"This is the mail system of {name}."


def _list_status(
    name: str, failures: list[Failure], when: float, *, is_delay: bool
) -> Iterator[Message]:
    """The blocks of fields: of the message first, then of each recipient (RFC 3464 2.1)."""
    block = Message()
    block["Reporting-MTA"] = f"dns; {name}"
    block["Arrival-Date"] = format_date(when)
    yield block
    for address, outcome, host in failures:
        block = Message()
        kind = "rfc822" if address.isascii() else "utf-8"
        block["Final-Recipient"] = f"{kind}; {spell(address)}"
        block["Action"] = "delayed" if is_delay else "failed"
        block["Status"] = outcome.enhanced
        if host:
            block["Remote-MTA"] = f"dns; {host}"
        block["Diagnostic-Code"] = f"smtp; {outcome.code} {outcome.enhanced} {outcome.text}"
        yield block


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
