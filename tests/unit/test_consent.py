"""A user's own rules about who may write: what they mean, and whose file is believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mda.terminal import consent
from mda.terminal.consent import Rules, RulesError, Sender, format_rules, parse_rules, read_rules

BOB = Sender("bob")
STRANGER = Sender("", "eve@Example.ORG")
CLAIMS_BOB = Sender("", "bob@mda.test", "bob")


def rules(text: str) -> Rules:
    return parse_rules(text.encode())


@pytest.mark.parametrize(
    ("text", "bob", "stranger", "claims_bob"),
    [
        ("", True, True, True),
        ("messages n", False, False, False),
        ("messages n\nallow bob", True, False, False),
        ("deny bob", False, True, False),
        ("allow bob\ndeny *", True, False, False),
        ("deny *\nallow eve@example.org", False, True, False),
        ("deny *@example.org", True, False, True),
        ("deny *@*", True, False, False),
        ("deny *@*\nallow bob@mda.test", True, False, True),
        ("messages n\nallow *@EXAMPLE.org", False, True, False),
        ("messages n\nallow *", True, True, True),
        ("allow *\ndeny eve@example.org", True, False, True),
        ("deny bob\nallow bob@mda.test", False, True, False),
        ("deny bob\nallow bob", True, True, True),
        ("deny mallory@elsewhere.example", True, True, True),
    ],
)
def test_the_rule_that_names_a_sender_most_exactly_decides(
    text: str, *, bob: bool, stranger: bool, claims_bob: bool
) -> None:
    found = rules(text)
    assert found.let(BOB) is bob
    assert found.let(STRANGER) is stranger
    assert found.let(CLAIMS_BOB) is claims_bob


def test_a_claim_does_not_open_what_a_verified_sender_may() -> None:
    found = rules("messages n\nallow bob\nallow bob@mda.test")
    assert not found.let(Sender("", "bob", "bob")), "a bare name is the name of a login"
    assert found.let(CLAIMS_BOB), "an address is what anybody may claim"
    assert found.let(Sender("bob", "root@mda.test"))
    assert not found.let(Sender("eve", "bob@mda.test")), "whoever is verified claims nothing"


def test_rules_come_back_as_they_were_written() -> None:
    text = "messages n\nbell n\nallow bob\ndeny *@example.org\ndeny zoë@x"
    once = rules(text)
    again = parse_rules(format_rules(once))
    assert (again.switches, again.senders) == (once.switches, once.senders)
    assert again.switches == {
        "messages": False,
        "reason": True,
        "bell": False,
        "utf8": True,
        "keep": True,
    }


@pytest.mark.parametrize(
    "line",
    ["maybe", "messages", "messages x", "allow", "allow a b", "deny " + "x" * 400, "\0", "bell"],
)
def test_a_line_that_is_none_of_ours_is_named(line: str) -> None:
    with pytest.raises(RulesError, match="line 3"):
        rules(f"# a comment\n\n{line}\nmessages y")


def test_senders_are_bounded() -> None:
    with pytest.raises(RulesError, match="more than 1000 senders"):
        rules("".join(f"deny u{number}\n" for number in range(1001)))


# -- the file ---------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the rules of the user whose home `tmp_path` is belong."""
    path = tmp_path / consent.FILE
    path.parent.mkdir(parents=True)
    return path


def read(file: Path) -> Rules:
    return read_rules(str(file.parents[2]), os.getuid())


def test_without_a_file_the_terminal_alone_decides(tmp_path: Path, file: Path) -> None:
    assert read(file).let(STRANGER)
    assert read_rules(str(tmp_path / "nowhere"), 0).let(STRANGER)
    assert read_rules("/dev/null", 0).let(STRANGER)


def test_a_file_of_the_users_own_counts(file: Path) -> None:
    file.write_text("messages n\n")
    found = read(file)
    assert (found.fault, found.let(BOB)) == ("", False)


def make_link(file: Path) -> None:
    (file.parent / "other").write_text("messages y\n")
    file.symlink_to("other")


def make_foreign(file: Path) -> None:
    file.write_text("messages y\n")
    os.chown(file, 1001, 1001)


def make_writable(file: Path) -> None:
    file.write_text("messages y\n")
    file.chmod(0o620)


def make_large(file: Path) -> None:
    file.write_text("messages y\n" + "#" * consent.LARGEST)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (make_link, "cannot be read: ELOOP"),
        (Path.mkdir, "is no regular file"),
        (lambda file: os.mkfifo(file), "is no regular file"),
        (lambda file: os.mknod(file, 0o20666, os.makedev(1, 3)), "is no regular file"),
        (make_foreign, "is owned by uid 1001"),
        (make_writable, "can be written by others (chmod go-w)"),
        (make_large, "is larger than 65536 bytes"),
        (lambda file: file.write_text("messages\n"), "line 1 is none that `mda mesg` writes"),
        (lambda file: file.write_bytes(b"\xff\n"), "line 1 is none that `mda mesg` writes"),
    ],
    ids=["link", "folder", "fifo", "device", "foreign", "writable", "large", "line", "octets"],
)
def test_a_bad_file_means_no_messages_and_nobody_waits(
    file: Path, make: object, fault: str
) -> None:
    make(file)  # type: ignore[operator]
    begun = time.monotonic()
    found = read(file)
    assert time.monotonic() - begun < 1
    assert found.fault == fault
    assert not any(found.let(sender) for sender in (BOB, STRANGER))


def test_a_file_that_may_not_be_read_means_no_messages(file: Path) -> None:
    file.write_text("messages y\n")
    file.chmod(0)
    top = file.parents[2]
    os.chown(file, 1001, 1001)
    for folder in (top, file.parents[1], file.parent):
        folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setresuid(1002, 1002, 1002)
        found = read_rules(str(top), 1001)
        os._exit(0 if found.fault == "cannot be read: EACCES" and not found.let(BOB) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
