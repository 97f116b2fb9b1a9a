"""Mailboxes as a reader finds them: an mbox in the spool, or a Maildir in a home."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

OLD = b"X-Number: 0\nSubject: an old one\n\nold\n"
_OLD_TIMES = (1_000_000_000_000_000_000, 1_000_000_001_000_000_000)  # read, then written


def read_mbox(text: bytes) -> list[bytes]:
    """The messages of an mboxrd mailbox, without From_ line and quoting."""
    found = re.split(rb"(?m)^From [^\n]*\n", text)
    assert found.pop(0) == b"", "the mailbox does not begin with a From_ line"
    assert all(message.endswith(b"\n\n") for message in found), "no blank line behind a message"
    return [re.sub(rb"(?m)^>(>*From )", rb"\1", message[:-1]) for message in found]


def number_of(message: bytes) -> int:
    """The number that a test has given to this message."""
    found = re.search(rb"(?m)^X-Number: (\d+)$", message)
    assert found is not None, message[:2000]
    return int(found[1])


def below_added_lines(message: bytes) -> bytes:
    """The message from its first own line on: what agents add stands above."""
    return message[message.index(b"X-Number: ") :]


class Mailbox:
    """A user's mailbox, looked at from outside of the sandbox."""

    def __init__(self, path: Path, owner: int, *, is_maildir: bool) -> None:
        self.path = path
        self.is_maildir = is_maildir
        self._owner = owner

    def files(self) -> list[Path]:
        """The files that hold messages; in tmp of a Maildir, halves of some."""
        if self.is_maildir:
            return sorted(self.path.glob("*/*"))
        return [self.path] if self.path.exists() else []

    def state(self) -> dict[Path, tuple[bytes, int]]:
        """Every octet and every time of change in it."""
        return {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in self.files()}

    def messages(self) -> list[bytes]:
        """What a reader sees, the lines that mda adds taken off; fails if it is no mailbox."""
        if self.is_maildir:
            shown = [each for each in self.files() if each.parent.name != "tmp"]
            found = [each.read_bytes() for each in shown]
        else:
            found = [each for file in self.files() for each in read_mbox(file.read_bytes())]
        return [below_added_lines(each) for each in found]

    def remove(self) -> None:
        """As for a user who has never had mail."""
        if self.is_maildir:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)

    def put_old(self) -> None:
        """Make it one of a single message that was written and read long ago."""
        self.remove()
        if self.is_maildir:
            for name in ("", "tmp", "new", "cur"):
                self._own(self.path / name, is_folder=True)
            message = self.path / "cur/1.old.host:2,S"
            message.write_bytes(OLD)
        else:
            message = self.path
            message.write_bytes(b"From bob@x Sun Sep  9 01:46:40 2001\n" + OLD + b"\n")
        self._own(message, is_folder=False)
        os.utime(message, ns=_OLD_TIMES)

    def _own(self, path: Path, *, is_folder: bool) -> None:
        if is_folder:
            path.mkdir(exist_ok=True)
        os.chown(path, self._owner, self._owner)
        path.chmod(0o700 if is_folder else 0o600)
