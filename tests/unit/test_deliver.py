"""The verb table of RFC 821 3.4, every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mda.delivery import deliver
from mda.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.model import Verb

MAILED = Outcome(250, "2.0.0", "Delivered to mailbox")
SENT = Outcome(250, "2.0.0", "Sent to 1 terminal")
AWAY = Outcome(450, "4.2.1", "User not active now")
LOCKED = Outcome(451, "4.2.0", "Mailbox is locked (alice.lock, PID 7)")
FULL = Outcome(552, "5.2.2", "Mailbox full")
SO_MAILED = Outcome(250, "2.0.0", "User not active now, so did mail")
BOTH = Outcome(250, "2.0.0", "Sent and mailed")
M, T = "mailbox", "terminal"


@pytest.mark.parametrize(
    ("verb", "is_clipped", "mailbox", "terminal", "steps", "outcome"),
    [
        ("MAIL", False, MAILED, SENT, [M], MAILED),
        ("MAIL", True, MAILED, SENT, [M], MAILED),
        ("MAIL", False, LOCKED, SENT, [M], LOCKED),
        ("SEND", False, MAILED, SENT, [T], SENT),
        ("SEND", False, MAILED, AWAY, [T], Outcome(451, "4.2.1", "User not active now")),
        ("SEND", True, MAILED, SENT, [], None),
        ("SOML", False, MAILED, SENT, [T], SENT),
        ("SOML", False, MAILED, AWAY, [T, M], SO_MAILED),
        ("SOML", False, LOCKED, AWAY, [T, M], LOCKED),
        ("SOML", False, FULL, AWAY, [T, M], FULL),
        ("SOML", True, MAILED, SENT, [M, T], BOTH),
        ("SOML", True, MAILED, AWAY, [M, T], SO_MAILED),
        ("SOML", True, LOCKED, SENT, [M], LOCKED),
        ("SAML", False, MAILED, SENT, [M, T], BOTH),
        ("SAML", False, MAILED, AWAY, [M, T], SO_MAILED),
        ("SAML", False, LOCKED, SENT, [M], LOCKED),
        ("SAML", True, MAILED, SENT, [M, T], BOTH),
        ("SAML", True, FULL, SENT, [M], FULL),
    ],
)
def test_verb_takes_its_steps_in_order(
    verb: Verb,
    is_clipped: bool,
    mailbox: Outcome,
    terminal: Outcome,
    steps: list[str],
    outcome: Outcome | None,
) -> None:
    taken: list[str] = []

    def step(name: str, result: Outcome) -> Callable[[], Outcome]:
        def take() -> Outcome:
            taken.append(name)
            return result

        return take

    result = deliver.run(verb, is_clipped, step(M, mailbox), step(T, terminal))
    assert taken == steps
    if outcome is None:
        assert (result.code, result.enhanced) == (552, "5.3.4")
    else:
        assert result == outcome


@pytest.mark.parametrize("code", [250, 450, 451, 452, 550, 552, 554])
@pytest.mark.parametrize("verb", ["MAIL", "SEND", "SOML", "SAML"])
def test_only_codes_that_may_follow_the_data_come_out(verb: Verb, code: int) -> None:
    result = Outcome(code, f"{code // 100}.0.0", "text")
    outcome = deliver.run(verb, False, lambda: result, lambda: result)
    assert outcome.code in (250, 451, 452, 552, 554)
    assert outcome.code // 100 == code // 100
