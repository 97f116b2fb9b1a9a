"""The rates of terminal messages, and the file that they are counted in."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import filelock
import pytest

from mda.terminal import rates


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "rates")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the counters see, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_as_many_as_a_minute_has_may_come_at_once_and_no_more(
    file: str, clock: list[float]
) -> None:
    assert [rates.take(file, [("from-1", 5)]) for _ in range(7)] == [True] * 5 + [False] * 2
    clock[0] += 11.9
    assert not rates.take(file, [("from-1", 5)])
    clock[0] += 0.2
    assert rates.take(file, [("from-1", 5)])
    assert not rates.take(file, [("from-1", 5)])
    clock[0] += 61
    assert [rates.take(file, [("from-1", 5)]) for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.usefixtures("clock")
def test_each_name_has_its_own_limit_and_a_message_needs_all(file: str) -> None:
    assert rates.take(file, [("to-1", 2), ("from-1", 1)])
    assert not rates.take(file, [("to-1", 2), ("from-1", 1)])
    assert rates.take(file, [("to-1", 2), ("from-2", 1)]), "a refused one takes nothing"
    assert not rates.take(file, [("to-1", 2), ("from-3", 1)])
    assert rates.take(file, [("to-2", 2), ("from-3", 1)])


@pytest.mark.usefixtures("clock")
def test_a_trial_counts_nothing(file: str) -> None:
    assert all(rates.take(file, [("to-1", 1)], is_trial=True) for _ in range(5))
    assert rates.take(file, [("to-1", 1)])
    assert not rates.take(file, [("to-1", 1)], is_trial=True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"from-1",
        b"from-1 \n",
        b"from-1 x\nfrom-1 nan\n\xff\0\n",
        b"from-1 99999999999\nfrom-1 inf\n",  # of a clock before the last boot
        b"from-1 1.0\n",
    ],
)
def test_what_is_no_count_any_more_is_none(file: str, clock: list[float], text: bytes) -> None:
    Path(file).write_bytes(text)
    assert rates.take(file, [("from-1", 1)])
    assert not rates.take(file, [("from-1", 1)])
    clock[0] += 61
    assert rates.take(file, [("from-1", 1)])


@pytest.mark.usefixtures("clock")
def test_names_are_bounded_and_who_is_counted_already_may_go_on(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "MOST_NAMES", 3)
    assert [rates.take(file, [(f"from-{n}", 2)]) for n in range(5)] == [True] * 3 + [False] * 2
    assert rates.take(file, [("from-0", 2)])


def test_the_file_forgets_who_has_not_sent_for_a_minute(file: str, clock: list[float]) -> None:
    for number in range(100):
        rates.take(file, [(f"from-{number}", 2)])
    clock[0] += 61
    rates.take(file, [("from-0", 2)])
    assert Path(file).read_text().count("\n") == 1
    assert Path(file).stat().st_mode & 0o777 == 0o600


def take_often(file: str) -> int:
    return sum(rates.take(file, [("to-1", 50)]) for _ in range(30))


def test_processes_at_once_count_each_other(file: str) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = pool.map(take_often, [file] * 4)
    assert 50 <= sum(taken) <= 55, "50 at once, and what the seconds of this test paid back"


def test_a_lock_that_is_held_too_long_is_an_error(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_WAIT_SECONDS", 0.1)
    held = filelock.FileLock(f"{file}.lock")
    with held, multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(BlockingIOError):
        pool.apply(rates.take, (file, [("to-1", 1)]))


def test_where_nothing_can_be_counted_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        rates.take(str(tmp_path / "file/rates"), [("to-1", 1)])
