"""Delivering into a Maildir: names, bytes, durability, and what a failure leaves: nothing."""

from __future__ import annotations

import errno
import mailbox
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.children import in_child
from support.sandbox import UIDS, Sandbox, start_command

from mda.delivery import maildir
from mda.model import Outcome

HEAD = b"Return-Path: <bob@example.org>\n"
TEXT = b"Subject: lunch\n\nFrom noon on\n>From one\nat two?\n"
DELIVERED = Outcome(250, "2.0.0", "Delivered to mailbox")
NOBODY = 65_534


def deliver(
    top: Path, text: bytes = TEXT, *, uid: int = 0, size: int = -1, notes: list[str] | None = None
) -> Outcome:
    fd = os.memfd_create("text")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(text)
        size = len(text) if size < 0 else size
        return maildir.deliver(f"{top}/", uid, HEAD, fd, size, [] if notes is None else notes)
    finally:
        os.close(fd)


def files(top: Path) -> dict[str, list[Path]]:
    return {name: sorted((top / name).iterdir()) for name in ("tmp", "new", "cur")}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The path of a Maildir that is not there yet."""
    return tmp_path / "Maildir"


def test_a_message_is_one_file_in_new_byte_for_byte(top: Path) -> None:
    assert deliver(top) == DELIVERED
    found = files(top)
    assert (found["tmp"], found["cur"], len(found["new"])) == ([], [], 1)
    (message,) = found["new"]
    assert message.read_bytes() == HEAD + TEXT
    size = len(HEAD + TEXT)
    pattern = rf"\d{{10}}\.M\d{{1,6}}P{os.getpid()}R[0-9a-f]{{16}}\.[^/:,]+,S={size}"
    assert re.fullmatch(pattern, message.name)
    assert abs(int(message.name.split(".")[0]) - time.time()) < 60
    assert message.stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o7777 for path in (top, *top.iterdir())} == {0o700}
    assert len(mailbox.Maildir(top, create=False)) == 1


def test_a_folder_that_is_missing_is_made_and_what_is_there_stays(top: Path) -> None:
    (top / "cur").mkdir(parents=True)
    (top / "cur/old").write_bytes(b"old")
    assert deliver(top) == DELIVERED
    assert deliver(top) == DELIVERED
    assert (top / "cur/old").read_bytes() == b"old"
    assert len(files(top)["new"]) == 2


@pytest.mark.parametrize("text", [b"", b"\n", b"no end", b"\0\r\xff" * 100_000])
def test_any_bytes_come_out_as_they_went_in(top: Path, text: bytes) -> None:
    assert deliver(top, text) == DELIVERED
    assert files(top)["new"][0].read_bytes() == HEAD + text


def test_names_differ_within_one_clock_tick(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_123_456_789)
    for _ in range(50):
        assert deliver(top) == DELIVERED
    names = [path.name for path in files(top)["new"]]
    assert len(names) == 50
    assert all(name.startswith(f"1700000000.M123456P{os.getpid()}R") for name in names)


def test_a_host_name_spoils_no_file_name(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname_result(("Linux", "a/b:c", "6", "1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)
    assert deliver(top) == DELIVERED
    assert ".a\\057b\\072c,S=" in files(top)["new"][0].name


def test_a_maildir_of_somebody_else_is_left_alone_and_the_owner_named(top: Path) -> None:
    top.mkdir()
    os.chown(top, NOBODY, NOBODY)
    outcome = deliver(top)
    assert (outcome.code, outcome.enhanced) == (451, "4.2.0")
    assert "is owned by nobody, not by root (as root: chown -R root " in outcome.text
    assert list(top.iterdir()) == []


@pytest.mark.parametrize("name", ["tmp", "new", "cur"])
@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_a_folder_that_is_none_defers(top: Path, tmp_path: Path, name: str, kind: str) -> None:
    top.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        (top / name).symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(top / name)
    else:
        (top / name).write_bytes(b"")
    assert deliver(top).code == 451
    assert list(elsewhere.iterdir()) == []


def test_a_maildir_that_is_a_file_or_has_no_parent_defers(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert deliver(tmp_path / "file").code == 451
    assert deliver(tmp_path / "no/Maildir").code == 451
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("call", "nth"),
    [("fsync", 1), ("fsync", 2), ("link", 1), ("write", 1), ("pread", 1), ("close", 1)],
)
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EIO, 451), (errno.ENOSPC, 452), (errno.EDQUOT, 552), (errno.EROFS, 451)],
)
def test_a_call_that_fails_leaves_no_message(
    top: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, number: int, code: int
) -> None:
    assert deliver(top) == DELIVERED
    before = files(top)
    real, calls = getattr(os, call), []

    def fail(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == nth:
            raise OSError(number, "injected")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, fail)
    assert deliver(top).code == code
    monkeypatch.undo()
    assert len(calls) >= nth
    assert files(top) == before
    assert deliver(top) == DELIVERED


def test_a_text_cut_short_defers(top: Path) -> None:
    assert deliver(top, size=len(TEXT) + 1).code == 451
    assert files(top)["new"] == files(top)["tmp"] == []


def test_what_cannot_be_removed_is_noted(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "unlink", refuse)
    notes: list[str] = []
    assert deliver(top, notes=notes) == DELIVERED, "the message is on disk and shown"
    assert [note.partition(":")[2] for note in notes] == [" cannot be removed: Input/output error"]


def test_a_write_beyond_the_limit_of_the_process_leaves_nothing(top: Path) -> None:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        os.umask(0o777)  # no umask of the caller's makes a file unreadable for its owner
        assert maildir.deliver(f"{top}/", 0, HEAD, text_fd, 5000, []).code == 452

    assert deliver(top) == DELIVERED
    text_fd = os.memfd_create("text")
    os.write(text_fd, b"x" * 5000)
    before = files(top)
    assert in_child(run) == 0
    os.close(text_fd)
    assert files(top) == before


def test_no_descriptor_is_left(top: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    deliver(top)
    deliver(top, size=len(TEXT) + 1)
    (top / "new").rename(top / "old")
    (top / "new").write_bytes(b"")
    deliver(top)
    assert len(os.listdir("/proc/self/fd")) == before


# -- the folders of an extension ------------------------------------------------------------


def test_an_extension_leads_to_the_folder_of_its_name_where_there_is_one(top: Path) -> None:
    (top / ".lists.debian").mkdir(parents=True)
    (top / ".file").write_bytes(b"")
    (top / ".link").symlink_to(top / ".lists.debian")
    assert maildir.find_folder(f"{top}/", "lists.debian") == f"{top}/.lists.debian/"
    for extension in ("", "none", "file", "link", ".lists.debian", "../x", "a/b", ".", "x" * 300):
        assert maildir.find_folder(f"{top}/", extension) == "", extension
    assert maildir.find_folder(f"{top}/none/", "lists") == ""


# -- through the whole of mda ---------------------------------------------------------------

CONFIG = "[delivery]\nmailbox = '{home}/Maildir/'\n"


@pytest.fixture
def homes(sandbox: Sandbox) -> Iterator[Callable[[str], Path]]:
    """The home of a user inside, emptied at the end."""
    holder = sandbox.pid

    def home(user: str) -> Path:
        return Path(f"/proc/{holder}/root/home/{user}")

    yield home
    for user in UIDS:
        subprocess.run(["rm", "-rf", home(user) / "Maildir"], check=True)


def letter(*recipients: bytes) -> bytes:
    addressed = b"".join(b"RCPT TO:<%b>\r\n" % each for each in recipients)
    return b"HELO x\r\nMAIL FROM:<b@x>\r\n" + addressed + b"DATA\r\nFrom a\r\n.\r\nQUIT\r\n"


def test_the_receiver_delivers_into_the_users_own_maildir(
    sandbox: Sandbox, homes: Callable[[str], Path]
) -> None:
    said = sandbox.converse(letter(b"alice", b"carol", b"ALICE"), config=CONFIG)
    assert said[-2] == b"250 2.0.0 OK"
    for user in ("alice", "carol"):
        top = homes(user) / "Maildir"
        (message,) = files(top)["new"]
        assert message.stat().st_uid == UIDS[user]
        assert message.stat().st_gid == UIDS[user]
        kept = message.read_bytes()
        address = b"Delivered-To: %b@mda.test\n" % user.encode()
        assert kept.startswith(b"Return-Path: <b@x>\n" + address + b"Received: from x (")
        assert kept.endswith(b"\nFrom a\n"), "no quoting, and no blank line behind"
    assert sandbox.mailbox("alice") is None


def test_an_extension_reaches_its_folder_and_each_mailbox_gets_one_copy(
    sandbox: Sandbox, homes: Callable[[str], Path]
) -> None:
    sandbox.converse(letter(b"alice"), config=CONFIG)
    top = homes("alice") / "Maildir"
    made = sandbox.run(["mkdir", "/home/alice/Maildir/.lists"], user="alice")
    assert made.returncode == 0
    recipients = (b"alice+lists", b"Alice+lists", b"alice+none", b"alice", b'"alice+../x"')
    said = sandbox.converse(letter(*recipients), config=CONFIG)
    assert [line[:3] for line in said] == [b"220", *[b"250"] * 7, b"354", b"250", b"221"]
    assert len(files(top / ".lists")["new"]) == 1
    assert len(files(top)["new"]) == 2
    done = sandbox.run(
        [*start_command(), "deliver", "-d", "alice@mda.test", "-a", "lists", "--config",
         sandbox.configure(CONFIG)],
        input=b"hi\n",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(files(top / ".lists")["new"]) == 2


def test_a_home_that_is_not_there_defers(sandbox: Sandbox, homes: Callable[[str], Path]) -> None:
    holder = homes("alice").parent
    (holder / "alice").rename(holder / "away")
    try:
        said = sandbox.converse(letter(b"alice"), config=CONFIG)
        assert b"451 4.3.5 <alice> /home/alice/.forward cannot be read: ENOENT" in said
        said = sandbox.converse(letter(b"alice"), config=CONFIG + "[recipients]\nforward = false\n")
        assert said[-2].startswith(b"451 4.3.0 ")
    finally:
        (holder / "away").rename(holder / "alice")


def test_without_a_separator_an_extension_is_part_of_the_name(sandbox: Sandbox) -> None:
    asked = b"HELO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice+box>\r\nRCPT TO:<alice-box>\r\nQUIT\r\n"
    assert [line[:3] for line in sandbox.converse(asked)[3:5]] == [b"250", b"550"]
    off = "[recipients]\nextension_separator = ''\n"
    assert [line[:3] for line in sandbox.converse(asked, config=off)[3:5]] == [b"550", b"550"]
    other = "[recipients]\nextension_separator = '-'\n"
    assert [line[:3] for line in sandbox.converse(asked, config=other)[3:5]] == [b"550", b"250"]
