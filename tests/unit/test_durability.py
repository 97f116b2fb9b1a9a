"""No success is told before the power cut can do no harm, as the kernel sees it."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from support.mailboxes import Mailbox
from support.sandbox import UIDS, Sandbox, start_command
from support.tracing import TRACED, Call, Disk, read_trace

USERS = ("alice", "carol")
LETTER = b"".join(
    line + b"\r\n"
    for line in (
        b"MAIL FROM:<b@x>",
        *(b"RCPT TO:<%b>" % user.encode() for user in USERS),
        b"DATA",
        b"Subject: x",
        b"",
        *[b"text" * 200] * 500,
        b".",
        b"QUIT",
    )
)

HELLO = {"smtp": b"HELO x\r\n", "lmtp": b"LHLO x\r\n", "deliver": b""}
# The first call that tells of success: a reply, or the end of the session process.
ANSWERS = {
    "smtp": r'write\(1<.*"250 2\.0\.0 OK',
    "lmtp": r'write\(1<.*"250 2\.0\.0 <\w+> Delivered',
    "deliver": r"exit_group\(0\)",
}


def mailboxes(sandbox: Sandbox, *, is_maildir: bool) -> list[Mailbox]:
    holder = sandbox.pid
    homes = Path(f"/proc/{holder}/root/home")
    return [
        Mailbox(
            homes / user / "Maildir" if is_maildir else sandbox.root / "mail" / user,
            UIDS[user],
            is_maildir=is_maildir,
        )
        for user in USERS
    ]


def trace(sandbox: Sandbox, command: str, config: str) -> list[Call]:
    """The calls of one `mda` that takes a message for all users."""
    words, said = ["receive", "--protocol", command], HELLO[command] + LETTER
    if command == "deliver":
        words, said = ["deliver", *(f"-d{user}" for user in USERS)], b"Subject: x\n\ntext\n"
    record = sandbox.root / "trace"
    file = sandbox.configure(config)
    tracer = ["strace", "-f", "-y", "-s", "64", "-e", f"trace={TRACED}", "-o", str(record)]
    ours, theirs = sandbox.connect_as("bob")
    process = subprocess.Popen(
        sandbox.inside([*tracer, *start_command(), *words, "--config", file]),
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        stderr=subprocess.PIPE,
    )
    theirs.close()
    with ours:
        ours.sendall(said)
        if words[0] == "deliver":
            ours.shutdown(socket.SHUT_WR)
        while ours.recv(65_536):
            pass
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return read_trace(record.read_text("latin-1"))


def paths_of(user: str, *, is_maildir: bool, is_new: bool) -> set[str]:
    """What a delivery to this user must have changed, but for its file in tmp."""
    if not is_maildir:
        return {f"/var/mail/{user}"} | ({"/var/mail"} if is_new else set())
    made = {f"/home/{user}", f"/home/{user}/Maildir"} if is_new else set()
    return {f"/home/{user}/Maildir/new"} | made


@pytest.mark.parametrize("is_new", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("is_maildir", [False, True], ids=["mbox", "Maildir"])
@pytest.mark.parametrize("command", ["smtp", "lmtp", "deliver"])
def test_success_is_told_after_files_and_their_names_are_on_disk(
    sandbox: Sandbox, command: str, is_maildir: bool, is_new: bool
) -> None:
    boxes = mailboxes(sandbox, is_maildir=is_maildir)
    for box in boxes:
        box.remove() if is_new else box.put_old()
    config = "[delivery]\nmailbox = '{home}/Maildir/'\n" if is_maildir else ""
    calls = trace(sandbox, command, config)
    answers = [call for call in calls if re.match(ANSWERS[command], call.text)]
    for box in boxes:
        box.remove()

    # Each of LMTP's answers is for one recipient; the others have one for all.
    groups = [(user,) for user in USERS] if command == "lmtp" else [USERS]
    assert len(answers) >= len(groups), "\n".join(call.text for call in calls[-40:])
    for users, answer in zip(groups, answers, strict=False):
        disk = Disk(calls, answer)
        for user in users:
            assert paths_of(user, is_maildir=is_maildir, is_new=is_new) <= disk.changed
            in_tmp = [path for path in disk.changed if path.startswith(f"/home/{user}/Maildir/tmp")]
            assert len(in_tmp) == is_maildir
        assert disk.dirty == set()
