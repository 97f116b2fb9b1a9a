"""VRFY and EXPN: who has a mailbox here, for peers that may ask (RFC 821 3.3, 5321 3.5)."""

from __future__ import annotations

from mda.receiver import grammar, replies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.receiver.domains import Domains
    from mda.receiver.replies import Reply
    from mda.wire import Broker


def verify(broker: Broker, domains: Domains, name: str, string: bytes, *, is_list: bool) -> Reply:
    """The answer to `string`: a login name, a mailbox, or a user's full name or surname.

    `name` is our official one. A user is a list of one for EXPN, whose row has no 553
    (RFC 821 4.3). Raises WireError.
    """
    local_part, domain, is_path = read_string(string)
    if not domains.is_ours(domain):
        return replies.NOT_OUR_DOMAIN
    outcome, user, full_name = broker.verify(local_part, may_be_full_name=not is_path)
    if outcome.is_temporary:
        return replies.CANNOT_VERIFY  # the rows have no 4yz (RFC 821 4.3)
    if not outcome.is_done:
        code = 550 if is_list and outcome.code == 553 else outcome.code
        return replies.Reply(code, outcome.enhanced, outcome.text)
    mailbox = grammar.spell_path(f"{user}@{name}")
    if not mailbox.isascii():
        return replies.ONLY_IN_UTF8
    return replies.vouching(outcome.code, full_name, mailbox)


def read_string(string: bytes) -> tuple[bytes, bytes, bool]:
    """Local part, domain, and whether it was a path; what is none may be a full name."""
    for parse in (grammar.parse_path, grammar.parse_bare_path):
        try:
            path, rest = parse(string)
        except grammar.PathError:
            continue
        if path.text and not rest:
            return path.local_part, path.domain, bool(path.domain) or string.startswith(b"<")
    return string, b"", False
