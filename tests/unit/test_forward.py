"""A user's forward file: which one counts, and when it is not to be followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.children import in_child

from mda.model import Account, Outcome
from mda.recipients.destinations import Destination
from mda.recipients.forward import read_forward

ALICE = 4001


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "alice"
    home.mkdir(mode=0o755)
    os.chown(home, ALICE, ALICE)
    return home


def write(path: Path, text: bytes, *, uid: int = ALICE, mode: int = 0o644) -> Path:
    path.write_bytes(text)
    path.chmod(mode)
    os.chown(path, uid, uid)
    return path


def account(home: Path | str, extension: str = "") -> Account:
    return Account("alice", ALICE, ALICE, str(home), "/var/mail/alice", extension)


def follow(home: Path | str, extension: str = "") -> list[bytes]:
    found = read_forward(account(home, extension))
    assert isinstance(found, tuple), found
    return [each.text for each in found[1]]


def refusal(home: Path | str) -> str:
    found = read_forward(account(home))
    assert isinstance(found, Outcome), found
    assert (found.code, found.enhanced) == (451, "4.3.5")
    return found.text


def test_no_file_is_no_forward(home: Path) -> None:
    assert read_forward(account(home)) == ("", [])


def test_an_empty_file_is_no_forward(home: Path) -> None:
    write(home / ".forward", b"# nothing\n")
    assert follow(home) == []


def test_its_destinations_are_told_with_its_path(home: Path) -> None:
    write(home / ".forward", b'\\alice, "|exec cat"\n')
    assert read_forward(account(home)) == (
        f"{home}/.forward",
        [Destination("mailbox", b"alice", is_final=True), Destination("command", b"exec cat")],
    )


def test_an_extension_has_its_own_file_before_the_common_one(home: Path) -> None:
    write(home / ".forward", b"bob\n")
    write(home / ".forward+lists", b"carol\n")
    assert follow(home) == [b"bob"]
    assert follow(home, "lists") == [b"carol"]
    assert follow(home, "other") == [b"bob"]


@pytest.mark.parametrize("extension", ["../bob/.forward", "x/y", "x" * 65])
def test_an_extension_leads_nowhere_else(home: Path, extension: str) -> None:
    write(home / ".forward", b"bob\n")
    (home / ".forward+x").mkdir()
    write(home / ".forward+x/y", b"mallory\n")
    assert follow(home, extension) == [b"bob"]


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664])
def test_a_file_that_others_can_write_is_not_followed(home: Path, mode: int) -> None:
    path = write(home / ".forward", b"mallory\n", mode=mode)
    assert refusal(home) == f"{path} can be written by others (chmod go-w {path})"


def test_a_file_of_somebody_else_is_not_followed(home: Path) -> None:
    path = write(home / ".forward", b"mallory\n", uid=4002)
    assert refusal(home) == f"{path} is owned by uid 4002, not by uid {ALICE}"


def test_root_may_set_a_forward(home: Path) -> None:
    write(home / ".forward", b"bob\n", uid=0)
    assert follow(home) == [b"bob"]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_home_that_others_can_write_is_not_believed(home: Path, mode: int) -> None:
    write(home / ".forward", b"mallory\n")
    home.chmod(mode)
    assert refusal(home) == f"{home} can be written by others (chmod go-w {home})"


def test_a_home_that_others_can_write_matters_only_with_a_file(home: Path) -> None:
    home.chmod(0o777)
    assert follow(home) == []


def test_a_home_that_is_missing_is_temporary(home: Path) -> None:
    assert refusal(home / "gone") == f"{home}/gone/.forward cannot be read: ENOENT"


def test_a_home_without_right_of_way_is_temporary(home: Path) -> None:
    write(home / ".forward", b"bob\n")
    home.chmod(0o000)

    def ask() -> None:
        os.setgroups([])
        os.setresgid(ALICE, ALICE, ALICE)
        os.setresuid(ALICE, ALICE, ALICE)
        assert refusal(home) == f"{home}/.forward cannot be read: EACCES"

    assert in_child(ask) == 0


@pytest.mark.parametrize("nowhere", ["/nonexistent", "/", ""])
def test_an_account_without_a_home_has_no_forward(nowhere: str) -> None:
    assert follow(nowhere) == []


def test_a_link_that_leads_nowhere_is_temporary(home: Path) -> None:
    (home / ".forward").symlink_to(home / "dotfiles/forward")
    assert refusal(home) == f"{home}/.forward is a link that leads nowhere"


def test_a_link_to_the_users_own_file_is_followed(home: Path) -> None:
    write(home / "forward", b"bob\n")
    (home / ".forward").symlink_to(home / "forward")
    assert follow(home) == [b"bob"]


def test_a_pipe_does_not_hold_us(home: Path) -> None:
    os.mkfifo(home / ".forward", 0o600)
    assert refusal(home) == f"{home}/.forward is not a regular file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"x" * 65_537, "is larger than 65536 bytes"),
        (b"bob\n" * 101, ": more than 100 destinations"),
        (b"bob jones\n", ": an entry that is no mailbox"),
        (b":include:/etc/passwd\n", ": :include: is for the aliases of the host"),
        (b"# Exim filter\nif x\n", ": is an Exim filter, which this host does not run"),
    ],
)
def test_what_cannot_be_followed_is_temporary(home: Path, text: bytes, reason: str) -> None:
    write(home / ".forward", text)
    assert refusal(home).replace(" is larger", "is larger").endswith(reason)
