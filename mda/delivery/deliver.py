"""The verb table of RFC 821 section 3.4: terminal or mailbox, which first, and what counts."""

from __future__ import annotations

from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.model import Verb

    Step = Callable[[], Outcome]

# What happens to the whole text, in order: after "else" only what could not be done
# before, after "then" only what may be added to a success that is already certain.
_WHOLE: dict[Verb, tuple[str, ...]] = {
    "MAIL": ("mailbox",),
    "SEND": ("terminal",),
    "SOML": ("terminal", "else", "mailbox"),
    "SAML": ("mailbox", "then", "terminal"),
}
# And where a terminal would show only its beginning: the whole must be in the mailbox.
_CLIPPED: dict[Verb, tuple[str, ...]] = {
    "MAIL": ("mailbox",),
    "SEND": ("nothing",),
    "SOML": ("mailbox", "then", "terminal"),
    "SAML": ("mailbox", "then", "terminal"),
}


def run(verb: Verb, is_clipped: bool, to_mailbox: Step, to_terminal: Step) -> Outcome:
    """Deliver one copy by `verb`; each step is called at most once and not at all in vain.

    `to_mailbox` is also the seam for a filter of the recipient's: whatever decides on the
    folder, or on refusing, stands in its place and answers with the same kind of outcome.

    The outcome is one that RFC 821 4.3 allows after the data: 250, 451, 452, 552, 554.
    A failed mailbox is never followed by a terminal, which the next try would write again.
    """
    plan = (_CLIPPED if is_clipped else _WHOLE)[verb]
    steps = {"mailbox": to_mailbox, "terminal": to_terminal, "nothing": _refuse_clipped}
    first = steps[plan[0]]()
    if len(plan) == 1:
        return _after_data(first)
    joint, second = plan[1], steps[plan[2]]
    if joint == "else":
        return first if first.is_done else _after_data(_mailed_instead(second(), first))
    return _mailed_first(first, second()) if first.is_done else _after_data(first)


def _refuse_clipped() -> Outcome:
    return Outcome(552, "5.3.4", "Message too long for a terminal; use SOML or SAML")


def _mailed_instead(mailed: Outcome, shown: Outcome) -> Outcome:
    if mailed.is_done:
        return Outcome(mailed.code, mailed.enhanced, f"{shown.text}, so did mail")
    return mailed


def _mailed_first(mailed: Outcome, shown: Outcome) -> Outcome:
    text = "Sent and mailed" if shown.is_done else f"{shown.text}, so did mail"
    return Outcome(mailed.code, mailed.enhanced, text)


def _after_data(outcome: Outcome) -> Outcome:
    """RFC 821 4.3 has none of these after the data; the enhanced code keeps the reason."""
    code = {450: 451, 550: 554, 551: 554}.get(outcome.code, outcome.code)
    return Outcome(code, outcome.enhanced, outcome.text)
