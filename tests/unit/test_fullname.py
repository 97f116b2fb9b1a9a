"""Who is called so: full names and surnames of an account database of our own."""

from __future__ import annotations

import pwd

import pytest

from mda.recipients.fullname import find_person, full_name

ACCOUNTS = {
    "alice": (1001, "Alice Liddell,Room 12,555-1234"),
    "lewis": (1002, "& Carroll"),
    "root": (0, "Charlie Root"),
    "smith.f": (1003, "Fred Smith"),
    "smith.q": (1004, "Quincy  Smith"),
    "zoe": (1005, "Zo\u00eb Wa\u00dfburne"),
    "nameless": (1006, ""),
    "nobody": (65_534, "Ulysses"),
    "twice": (1007, "Cher"),
}


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounts of our own, one of them listed twice, as with two name services."""
    entries = [
        pwd.struct_passwd((name, "x", uid, uid, gecos, "/", "/bin/sh"))
        for name, (uid, gecos) in ACCOUNTS.items()
    ]
    monkeypatch.setattr(pwd, "getpwall", lambda: [*entries, entries[-1]])
    monkeypatch.setattr(pwd, "getpwnam", {entry.pw_name: entry for entry in entries}.__getitem__)


def find(name: str, only_uid: int | None = None) -> tuple[int, str]:
    outcome, user = find_person(name.encode("utf-8", "surrogateescape"), (1000, 70_000), only_uid)
    return outcome.code, user


@pytest.mark.parametrize(
    ("name", "user"),
    [
        ("Alice Liddell", "alice"),
        ("alice   LIDDELL ", "alice"),
        ("liddell", "alice"),
        ("Lewis Carroll", "lewis"),
        ("Fred Smith", "smith.f"),
        ("quincy smith", "smith.q"),
        ("zo\u00cb wassburne", "zoe"),
        ("WASSBURNE", "zoe"),
        ("cher", "twice"),
    ],
)
def test_a_person_is_found_by_full_name_and_surname_in_any_case(name: str, user: str) -> None:
    assert find(name) == (250, user)


def test_two_of_one_name_are_ambiguous() -> None:
    assert find("smith") == (553, "")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "alice",
        "Alice",
        "lice Liddell",
        "Liddell,Room 12",
        "Root",
        "Ulysses",
        "\udcff",
        "&",
    ],
)
def test_a_part_of_a_name_or_a_program_is_nobody(name: str) -> None:
    assert find(name) == (550, "")


def test_without_privilege_there_is_one_person() -> None:
    assert find("Liddell", only_uid=1001) == (250, "alice")
    assert find("Fred Smith", only_uid=1001) == (550, "")


def test_the_full_name_is_the_first_field() -> None:
    assert full_name("alice") == "Alice Liddell"
    assert full_name("lewis") == "Lewis Carroll"
    assert full_name("nameless") == ""
