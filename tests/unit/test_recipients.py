"""Whose mail a local part is, by the host's real account database."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mda.model import Outcome
from mda.recipients import passwd
from mda.recipients.resolve import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from mda.model import Account

FOUND = Outcome(250, "2.1.5", "Recipient OK")
UNKNOWN = Outcome(550, "5.1.1", "No such user here")
ACCOUNTS = {
    "alice": (1001, "/home/alice"),
    "Bob": (1002, "/home/Bob"),
    "bob": (1003, "/home/bob"),
    "daemon": (1, "/usr/sbin"),
    "nobody": (65_534, "/nonexistent"),
    "root": (0, "/root"),
    "homeless": (1004, ""),
    "a b": (1005, "/home/ab"),
    "x" * 64: (1006, "/home/x"),
    "x" * 65: (1007, "/home/x"),
    "jörg": (1008, "/home/joerg"),
    "strange": (1009, "/home/strange"),
}


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounts of our own, since a test must not add any to the host."""

    def getpwnam(name: str) -> pwd.struct_passwd:
        uid, home = ACCOUNTS[name]
        shown = "../root" if name == "strange" else name
        return pwd.struct_passwd((shown, "x", uid, uid, "", home, "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)


def ask(
    local_part: bytes,
    *,
    mailbox: str = "/var/mail/{user}",
    uid_range: tuple[int, int] = (1000, 70_000),
    postmaster: str = "root",
    only_uid: int | None = None,
) -> tuple[Outcome, Account | None]:
    return resolve(
        local_part,
        mailbox=mailbox,
        uid_range=uid_range,
        postmaster=postmaster,
        only_uid=only_uid,
    )


def user_of(local_part: bytes, **options: str | int) -> str:
    outcome, account = ask(local_part, **options)  # type: ignore[arg-type]
    assert outcome == FOUND
    assert account is not None
    return account.user


def test_account_comes_with_its_mailbox() -> None:
    outcome, account = ask(b"alice")
    assert outcome == FOUND
    assert account is not None
    assert (account.user, account.uid, account.gid) == ("alice", 1001, 1001)
    assert (account.home, account.mailbox) == ("/home/alice", "/var/mail/alice")
    _, at_home = ask(b"alice", mailbox="{home}/mail/{user}")
    assert at_home is not None
    assert at_home.mailbox == "/home/alice/mail/alice"


@pytest.mark.parametrize(
    ("local_part", "user"),
    [
        (b"alice", "alice"),
        (b"ALICE", "alice"),
        (b"Bob", "Bob"),
        (b"bob", "bob"),
        (b"BOB", "bob"),
        (b"a b", "a b"),
        (b"x" * 64, "x" * 64),
        ("jörg".encode(), "jörg"),
    ],
)
def test_name_is_found_as_written_and_else_in_lower_case(local_part: bytes, user: str) -> None:
    assert user_of(local_part) == user


@pytest.mark.parametrize(
    "local_part",
    [
        b"",
        b"nosuch",
        b"root",
        b"daemon",
        b"nobody",
        b"NOBODY",
        b"x" * 65,
        b"strange",
        b"../alice",
        b"a/b",
        b".alice",
        b"alice\0",
        b"alice\n",
        b"alice\x7f",
        b"\xff\xfe",
        b"alice+x",
    ],
)
def test_what_is_no_person_here_is_unknown(local_part: bytes) -> None:
    assert ask(local_part) == (UNKNOWN, None)


def test_only_uids_of_persons_count() -> None:
    assert ask(b"alice", uid_range=(1002, 2000)) == (UNKNOWN, None)
    assert ask(b"alice", uid_range=(500, 1000)) == (UNKNOWN, None)
    assert user_of(b"alice", uid_range=(1001, 1001)) == "alice"  # type: ignore[arg-type]


@pytest.mark.parametrize("local_part", [b"postmaster", b"Postmaster", b"POSTMASTER"])
def test_postmaster_is_always_somebody(local_part: bytes) -> None:
    assert user_of(local_part) == "root"
    assert user_of(local_part, postmaster="alice") == "alice"
    outcome, account = ask(local_part, postmaster="nosuch")
    assert (outcome.code, outcome.enhanced, account) == (451, "4.3.5", None)


def test_without_privilege_there_is_only_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.getpwnam("daemon"))
    assert user_of(b"daemon", only_uid=1) == "daemon"
    assert user_of(b"PostMaster", only_uid=1) == "daemon"
    assert ask(b"alice", only_uid=1) == (UNKNOWN, None)


def test_home_that_is_no_path_is_a_temporary_failure() -> None:
    outcome, account = ask(b"homeless", mailbox="{home}/mbox")
    assert (outcome.code, outcome.enhanced, account) == (451, "4.3.5", None)


def test_failed_lookup_is_a_temporary_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(errno.ECONNREFUSED, "connection refused")

    monkeypatch.setattr(passwd, "find", fail)
    text = "Local error (looking up the user: ECONNREFUSED)"
    for local_part in (b"nosuch", b"postmaster"):
        assert ask(local_part) == (Outcome(451, "4.3.0", text), None)


def test_account_that_came_meanwhile_is_a_temporary_failure() -> None:
    # `pwd` is replaced here and does not know the host's real account.
    with pytest.raises(OSError, match="unavailable"):
        passwd.find("mail")


def test_own_uid_without_account_is_a_temporary_failure() -> None:
    assert ask(b"postmaster", only_uid=123_456)[0].code == 451


def look_up(tmp_path: Path, mode: int) -> str:
    """What `find` says in a namespace whose account file has that mode, as nobody."""
    (tmp_path / "passwd").write_text("alice:x:1001:1001::/home/alice:/bin/sh\n")
    (tmp_path / "passwd").chmod(mode)
    (tmp_path / "nsswitch").write_text("passwd: files\n")
    code = """if True:
        import ctypes, os
        from mda.recipients.resolve import resolve
        os.setegid(65534)
        os.seteuid(65534)
        for name in (b"alice", b"nosuch"):
            print(resolve(name, mailbox="/{user}", uid_range=(1000, 2000), postmaster="")[0])
    """
    script = (
        'mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/nsswitch.conf && shift 2 '
        '&& exec "$@"'
    )
    files = [str(tmp_path / "passwd"), str(tmp_path / "nsswitch")]
    run = ["unshare", "-m", "sh", "-c", script, "sh", *files, sys.executable, "-c", code]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def test_unreadable_account_file_does_not_make_users_unknown(tmp_path: Path) -> None:
    error = Outcome(451, "4.3.0", "Local error (looking up the user: EACCES)")
    assert look_up(tmp_path, 0o600) == f"{error}\n{error}\n"
    assert look_up(tmp_path, 0o644) == f"{FOUND}\n{UNKNOWN}\n"


def test_accounts_of_this_host_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = passwd.find("root")
    assert found is not None
    assert found.pw_uid == 0
    assert passwd.find("no-such-user-here") is None
    assert passwd.find_by_uid(os.geteuid()).pw_uid == os.geteuid()
