"""The host's own sendmail as the next hop (`outbound.via`)."""

from __future__ import annotations

import os
import subprocess

from mda.model import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.outbound.queue import Waiting

SENDMAIL = "/usr/sbin/sendmail"
_SECONDS = 600
# What its exit status says is final (sysexits.h): bad data, no user, no host, no permission.
_FINAL = (65, 67, 68, 77)
_LONGEST = 300  # octets of what it says
_LARGEST_SCRIPT = 4096


def hand_over(message: Waiting, paths: list[bytes]) -> Outcome:
    """Run sendmail with the message, its text straight from the file, for all the paths."""
    if is_our_own(SENDMAIL):
        return Outcome(451, "4.3.5", f"{SENDMAIL} is mda itself (outbound.via)")
    command = [SENDMAIL.encode(), b"-i", b"-f", message.envelope.sender or b"<>", b"--", *paths]
    text_fd = os.open(message.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.lseek(text_fd, message.begin, os.SEEK_SET)
        done = subprocess.run(  # noqa: S603 (a fixed program, and paths behind --)
            command, stdin=text_fd, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(451, "4.3.0", f"{SENDMAIL} has not ended in {_SECONDS} seconds")
    except OSError as error:
        return Outcome(451, "4.3.5", f"{SENDMAIL}: {error.strerror}")
    finally:
        os.close(text_fd)
    return judge(done.returncode, done.stderr[:_LONGEST])


def is_our_own(path: str) -> bool:
    """Is the program `mda sendmail` (`mda install --sendmail`), which would come back to us?"""
    try:
        with open(path, "rb") as file:
            return b"/mda sendmail " in file.read(_LARGEST_SCRIPT)
    except OSError:
        return False


def judge(status: int, said: bytes) -> Outcome:
    """The outcome of its exit status; unknown means temporary."""
    if status == 0:
        return Outcome(250, "2.0.0", "Handed to sendmail")
    text = "".join(c if " " <= c <= "~" else " " for c in said.decode("ascii", "replace"))
    why = f"sendmail ended with {status}: {text.strip()}"
    return Outcome(554, "5.0.0", why) if status in _FINAL else Outcome(451, "4.3.0", why)
