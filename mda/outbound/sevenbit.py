"""A text in seven bits, for a next hop that takes no others (RFC 6152 3; RFC 2045 6)."""

from __future__ import annotations

import binascii
import io
from email import message_from_bytes
from email.generator import BytesGenerator
from email.policy import compat32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from email.message import Message

_ENCODING = "Content-Transfer-Encoding"
_READABLE = ("", "7bit", "8bit", "binary", "quoted-printable")
# Fields that are words and nothing else, and so may become encoded ones (RFC 2047 5).
_UNSTRUCTURED = ("subject", "comments", "content-description", "organization")
# Lines stay as long as they are, but for those that have to be written anew.
_POLICY = compat32.clone(cte_type="7bit", max_line_length=None)


class Inconvertible(ValueError):
    """The text says of itself what is not so."""


def convert(text: bytes) -> bytes:
    """`text` (LF line ends) with quoted-printable in the place of octets above 127.

    Whatever has none of them is as it was. Raises Inconvertible.
    """
    try:
        return _convert(text)
    except Inconvertible:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Inconvertible(f"a text that is no message: {error}"[:200]) from error


def _convert(text: bytes) -> bytes:
    message = message_from_bytes(text)
    if "MIME-Version" not in message:
        message["MIME-Version"] = "1.0"
        if "Content-Type" not in message:
            message["Content-Type"] = "text/plain; charset=unknown-8bit"
    _convert_part(message)
    out = io.BytesIO()
    BytesGenerator(out, mangle_from_=False, policy=_POLICY).flatten(message)
    if not out.getvalue().isascii():
        raise Inconvertible("octets above 127 where none can be written otherwise")
    return out.getvalue()


def _refuse_fields(part: Message) -> None:
    """Raise Inconvertible where an encoded word would take a field's meaning away."""
    for name, value in part.items():
        is_plain = name.lower() in _UNSTRUCTURED or name.lower().startswith("x-")
        if not str(value).isascii() and not is_plain:
            raise Inconvertible(f"octets above 127 in {name}")


def _convert_part(part: Message) -> None:
    _refuse_fields(part)
    payload: object = part.get_payload()
    if isinstance(payload, list):
        for each in payload:
            _convert_part(each)
        if _encoding_of(part) in ("8bit", "binary"):
            part.replace_header(_ENCODING, "7bit")
        return
    if str(payload).isascii():
        return
    encoding = _encoding_of(part)
    if part.get_content_maintype() == "multipart" or encoding not in _READABLE:
        raise Inconvertible("octets above 127 where it says that there are none")
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        raise Inconvertible("a part that is no text")
    part.set_payload(binascii.b2a_qp(content, istext=True).decode("ascii"))
    del part[_ENCODING]
    part[_ENCODING] = "quoted-printable"


def _encoding_of(part: Message) -> str:
    return str(part.get(_ENCODING, "")).strip().lower()
