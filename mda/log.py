"""One line per outcome, `key=value`, untrusted text quoted (design, decision 13).

The line goes to the journal through standard error where that is the journal's, to
syslog where standard error might be the client's socket, and to a terminal plain.
"""

from __future__ import annotations

import os
import sys
import syslog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INFO = syslog.LOG_INFO
WARNING = syslog.LOG_WARNING
ERROR = syslog.LOG_ERR

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_@/:+<>,[]")
_LONGEST = 500
_NULL_DEVICE = os.makedev(1, 3)


def quote(value: object) -> str:
    """`value` for a log line: plain where it is harmless, else quoted and escaped.

    Nothing but printable ASCII comes out, no quote or backslash unescaped, and at most
    a few hundred characters.
    """
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    if text and _PLAIN.issuperset(text) and len(text) <= _LONGEST:
        return text
    escaped = []
    for character in text[:_LONGEST]:
        code = ord(character)
        if character in '"\\':
            escaped.append("\\" + character)
        elif 32 <= code < 127:
            escaped.append(character)
        else:
            escaped.append(f"\\x{code:02x}" if code < 256 else f"\\u{{{code:x}}}")
    more = "..." if len(text) > _LONGEST else ""
    return f'"{"".join(escaped)}{more}"'


def format_line(event: str, fields: dict[str, object]) -> str:
    """One log line without its end: the event's name, then the fields in their order."""
    return " ".join([event, *(f"{key}={quote(value)}" for key, value in fields.items())])


def _write_to_stderr(prefix: bool) -> Callable[[int, str], None]:
    def write(priority: int, line: str) -> None:
        lead = f"<{priority}>" if prefix else "mda: "
        try:
            os.write(2, f"{lead}{line}\n".encode("ascii", "replace"))
        except OSError:
            syslog.syslog(syslog.LOG_MAIL | priority, line)

    return write


def _write_to_syslog(priority: int, line: str) -> None:
    syslog.syslog(syslog.LOG_MAIL | priority, line)


_write: Callable[[int, str], None] = _write_to_syslog


def open_log(*, may_use_stderr: bool) -> None:
    """Choose where lines go, once, before the processes split.

    `may_use_stderr` is False where somebody else reads standard error: the client whose
    socket it is under inetd, the MTA that runs `mda deliver`. Where it leads nowhere, as
    the wrapper sees to under inetd, syslog is the place too.
    """
    global _write
    syslog.openlog("mda", syslog.LOG_PID, syslog.LOG_MAIL)
    if os.environ.get("JOURNAL_STREAM") and _is_journal(2):
        _write = _write_to_stderr(prefix=True)
    elif may_use_stderr and not _is_null(2):
        _write = _write_to_stderr(prefix=False)
    else:
        _write = _write_to_syslog


def _is_journal(fd: int) -> bool:
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ["JOURNAL_STREAM"] == f"{status.st_dev}:{status.st_ino}"


def _is_null(fd: int) -> bool:
    # By its number: the name may stand for another node in a namespace or a chroot.
    try:
        return os.fstat(fd).st_rdev == _NULL_DEVICE
    except OSError:
        return True


def is_clients_stderr() -> bool:
    """Standard error is what the client reads: the file behind descriptor 0 or 1."""
    try:
        error = os.fstat(2)
        return any(os.path.samestat(error, os.fstat(fd)) for fd in (0, 1))
    except OSError:
        return True


def write(event: str, priority: int = INFO, **fields: object) -> None:
    """Write one line; the fields' values may be bytes or text from anybody."""
    _write(priority, format_line(event, fields))


def write_traceback(event: str) -> None:
    """Log the exception in hand with its traceback, one line each."""
    import traceback  # only where something unforeseen has happened

    _write(ERROR, format_line(event, {"error": str(sys.exc_info()[1])}))
    for line in traceback.format_exc().split("\n"):
        if line.strip():
            _write(ERROR, format_line("traceback", {"line": line}))
