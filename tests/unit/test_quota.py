"""What a mailbox may hold: the limits, where they are asked, and what they answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox

from mda.delivery import quota
from mda.model import Outcome

FULL = Outcome(552, "5.2.2", "Mailbox full")
MESSAGE = b"From a Thu Jan  1 00:00:00 1970\nSubject: x\n\nhello\n\n"


def mbox(directory: Path, text: bytes) -> str:
    path = directory / "mbox"
    path.write_bytes(text)
    return str(path)


def maildir(directory: Path, *names: str) -> str:
    for name in names:
        path = directory / "Maildir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    return f"{directory}/Maildir/"


@pytest.mark.parametrize(("adding", "expected"), [(50, None), (51, FULL)])
def test_the_size_of_an_mbox_is_the_files(
    tmp_path: Path, adding: int, expected: Outcome | None
) -> None:
    assert quota.judge(mbox(tmp_path, b"x" * 950), adding, 1000, 0) == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b"", 0),
        (MESSAGE, 1),
        (MESSAGE * 3, 3),
        (MESSAGE + b">From x\n\n", 1),
        (MESSAGE.replace(b"hello", b"From me"), 2),
        (b"\n" + MESSAGE, 1),
        (MESSAGE * 30_000, 30_000),
    ],
)
def test_messages_of_an_mbox_are_its_from_lines(tmp_path: Path, text: bytes, count: int) -> None:
    path = mbox(tmp_path, text)
    assert quota.judge(path, 1, 0, count + 1) is None
    assert quota.judge(path, 1, 0, max(1, count)) == (FULL if count else None)


def test_a_maildir_counts_with_its_folders(tmp_path: Path) -> None:
    path = maildir(
        tmp_path, "new/1.a,S=100", "cur/2.b,S=200:2,S", "cur/3.c", ".lists/new/4.d,S=400,W=1"
    )
    assert quota.judge(path, 90, 800, 0) is None
    assert quota.judge(path, 91, 800, 0) == FULL
    assert quota.judge(path, 1, 0, 5) is None
    assert quota.judge(path, 1, 0, 4) == FULL


def test_a_name_with_another_alphabets_digits_is_no_size(tmp_path: Path) -> None:
    assert (
        quota.judge(maildir(tmp_path, "new/1.x,S=\u00b2", "new/2.x,S=" + "9" * 100), 1, 30, 0)
        is None
    )


def test_a_folder_that_is_a_link_does_not_count(tmp_path: Path) -> None:
    path = maildir(tmp_path, "new/1.a,S=10", "elsewhere/new/2.b,S=1000")
    (tmp_path / "Maildir/.link").symlink_to(tmp_path / "Maildir/elsewhere")
    assert quota.judge(path, 1, 100, 0) is None


def test_holes_are_not_counted_through(tmp_path: Path) -> None:
    path = mbox(tmp_path, MESSAGE)
    with open(path, "r+b") as file:
        file.seek(40 << 30)
        file.write(b"\n\n" + MESSAGE)
    assert quota.judge(path, 1, 0, 3) is None
    assert quota.judge(path, 1, 0, 2) == FULL


def test_what_is_not_there_is_empty(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/none", f"{tmp_path}/none/"):
        assert quota.judge(path, 10, 10, 1) is None
        assert quota.judge(path, 11, 10, 1) == FULL


def test_what_is_no_mailbox_is_left_to_the_delivery(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        assert quota.judge(f"{tmp_path}/{name}", 1, 1, 1) is None


def dialogue(size: int, text: bytes = b"hello\r\n") -> bytes:
    envelope = b"EHLO x\r\nMAIL FROM:<b@x> SIZE=%d\r\nRCPT TO:<alice>\r\n" % size
    return envelope + b"DATA\r\n" + text + b".\r\nQUIT\r\n"


def fill(sandbox: Sandbox, text: bytes) -> None:
    path = sandbox.root / "mail/alice"
    path.write_bytes(text)
    os.chown(path, UIDS["alice"], 8)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("quota_size = 2000", b"552 5.2.2"),
        ("quota_size = 2000\nquota_defers = true", b"452 4.2.2"),
    ],
)
def test_a_size_that_is_too_much_is_refused_before_it_comes(
    sandbox: Sandbox, config: str, code: bytes
) -> None:
    fill(sandbox, b"x" * 1500)
    said = sandbox.converse(dialogue(501), config=f"[delivery]\n{config}\n")
    assert any(line.startswith(code + b" <alice> Mailbox full") for line in said)
    assert not any(line.startswith(b"354") for line in said)
    said = sandbox.converse(dialogue(400), config=f"[delivery]\n{config}\n")
    assert said[-2].startswith(b"250 2.0.0")


def test_a_text_that_is_too_much_is_refused_when_it_has_come(sandbox: Sandbox) -> None:
    fill(sandbox, b"x" * 1500)
    said = sandbox.converse(
        dialogue(0, b"y" * 600 + b"\r\n"), config="[delivery]\nquota_size = 2000\n"
    )
    assert said[-2] == b"552 5.2.2 Mailbox full"
    assert sandbox.mailbox("alice") == b"x" * 1500


def test_messages_that_are_too_many_are_refused(sandbox: Sandbox) -> None:
    config = "[delivery]\nquota_messages = 2\n"
    for _ in range(2):
        assert sandbox.converse(dialogue(0), config=config)[-2].startswith(b"250 2.0.0")
    said = sandbox.converse(dialogue(0), config=config)
    assert any(line.startswith(b"552 5.2.2 <alice> Mailbox full") for line in said)


def test_a_terminal_has_no_quota(sandbox: Sandbox) -> None:
    fill(sandbox, b"x" * 3000)
    send = dialogue(0).replace(b"MAIL FROM", b"SEND FROM")
    said = sandbox.converse(send, config="[delivery]\nquota_size = 2000\n")
    assert any(line.startswith(b"450 4.2.1") for line in said)


def test_the_file_systems_own_quota_may_defer_too() -> None:
    full = Outcome(552, "5.2.2", "Mailbox full (writing the mailbox: EDQUOT)")
    assert quota.defer(full, is_wanted=False) is full
    deferred = quota.defer(full, is_wanted=True)
    assert (deferred.code, deferred.enhanced, deferred.text) == (452, "4.2.2", full.text)
    other = Outcome(552, "5.3.4", "Message too large")
    assert quota.defer(other, is_wanted=True) is other
