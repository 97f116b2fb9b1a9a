"""Calls that fail in the shipped command: what it promises all the same.

The whole sweep, over every call that it makes, is tests/soak/fault_sweep.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.faults import Faults, Setting
from support.kills import Kills
from support.sandbox import Sandbox

MBOX = Setting()
SPOOLED = Setting(size=300_000, memory=0)
MAILDIR = Setting(is_maildir=True)
SESSION = Setting(is_session=True)


@pytest.fixture(autouse=True)
def homes(sandbox: Sandbox) -> Iterator[None]:
    yield
    sandbox.run(["rm", "-rf", "/home/alice/Maildir"])


@pytest.mark.parametrize(
    ("setting", "call", "error"),
    [
        (MBOX, "writev", "ENOSPC"),
        (MBOX, "writev", "EDQUOT"),
        (MBOX, "fsync", "EIO"),
        (MBOX, "linkat", "EIO"),
        (MBOX, "memfd_create", "EMFILE"),
        (MBOX, "sendmsg", "ENOBUFS"),
        (MBOX, "fcntl", "ENOLCK"),
        (MBOX, "clone", "EAGAIN"),
        (SPOOLED, "writev", "EFBIG"),
        (SPOOLED, "ftruncate", "EIO"),
        (MAILDIR, "fsync", "EIO"),
        (MAILDIR, "linkat", "ENOSPC"),
        (MAILDIR, "mkdirat", "ENOSPC"),
        (MAILDIR, "unlinkat", "EROFS"),
        (SESSION, "fsync", "ENOSPC"),
        (SESSION, "setresuid", "EPERM"),
    ],
    ids=str,
)
def test_a_call_that_fails_tears_and_loses_nothing(
    sandbox: Sandbox, setting: Setting, call: str, error: str
) -> None:
    assert len(list(Faults(sandbox, setting).sweep(call, error, most=8))) > 0, "no such call"


@pytest.mark.parametrize("setting", [MBOX, MAILDIR], ids=str)
@pytest.mark.parametrize("size", [4096, 2_000_000])
def test_a_kill_at_any_moment_tears_and_loses_nothing(
    sandbox: Sandbox, setting: Setting, size: int
) -> None:
    kills = Kills(sandbox, setting, seed=size)
    ends = {kills.kill_one(size).is_taken for _ in range(8)}
    assert False in ends, "no kill came in time"
