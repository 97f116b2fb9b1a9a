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

    `name` is our official one. For EXPN it may be a list, and a user is a list of one;
    its row has no 553 (RFC 821 4.3). Raises WireError.
    """
    local_part, domain, is_path = read_string(string)
    if not domains.is_ours(domain):
        return replies.NOT_OUR_DOMAIN
    if is_list:
        outcome, members = broker.expand(local_part)
        if members:
            return list_mailboxes(members, name)
        if outcome.enhanced != "5.1.1":
            return replies.CANNOT_VERIFY if outcome.is_temporary else replies.of_outcome(outcome)
    outcome, user, full_name = broker.verify(local_part, may_be_full_name=not is_path)
    if outcome.is_temporary:
        return replies.CANNOT_VERIFY  # the rows have no 4yz (RFC 821 4.3)
    if not outcome.is_done:
        code = 550 if is_list and outcome.code in (551, 553) else outcome.code
        return replies.Reply(code, outcome.enhanced, outcome.text)
    if outcome.code == 251:
        return replies.Reply(250, "2.1.5", f"<{user}>") if is_list else replies.of_outcome(outcome)
    return list_mailboxes([(user, "", full_name)], name)


def list_mailboxes(members: list[tuple[str, str, str]], name: str) -> Reply:
    """250 with one fully specified mailbox a line, as far as ASCII can show them."""
    lines = []
    for local_part, domain, full_name in members:
        mailbox = grammar.spell_path(f"{local_part}@{domain or name}")
        if mailbox.isascii():
            lines.append(replies.vouching(full_name, mailbox))
    return replies.Reply(250, "2.1.5", *lines) if lines else replies.ONLY_IN_UTF8


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
