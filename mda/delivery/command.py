"""One message piped to a command of an alias or of a user's forward file.

`supervise` runs in a process of its own that has become the user for good: it starts the
command, feeds it, keeps the beginning of what it says, and ends what it leaves running. The
broker only reads its report. The message goes through a pipe, since whoever has the memory
that it lies in could read on or, on disk, write (design, decision 1).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # `signal` loads enum, for 6 ms
import errno
import os
import resource
import select
import time

from mda.model import Account, Outcome

SHELL = "/bin/sh"
NO_REPORT = b""

_BLOCK = 64 * 1024  # what a pipe takes
_MOST_OUTPUT = 4096
_MOST_FILES = 1024
_MOST_PROCESSES = 500
_CLEANING_SECONDS = 5
_PATH = "/usr/local/bin:/usr/bin:/bin"
# What is harmless in a shell's variable even where a script forgets the quotes.
_HARMLESS = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!@%-_=+:,./")
_TIMED_OUT = 256  # no exit status, and no signal's number
# sysexits(3) that are about the message or the recipient; all others may pass.
_PERMANENT = {
    65: Outcome(554, "5.6.0", "The recipient's command refuses the message"),
    67: Outcome(550, "5.1.1", "The recipient's command knows no such user"),
    69: Outcome(550, "5.3.0", "The recipient's command takes no mail"),
    77: Outcome(550, "5.7.0", "The recipient's command does not permit this message"),
    100: Outcome(550, "5.0.0", "The recipient's command refuses the message"),
}


def environment(
    account: Account, address: bytes, separator: bytes, domain: str, paths: tuple[bytes, bytes]
) -> dict[bytes, bytes]:
    """The variables that a command gets, by the names that Postfix gives them (local(8)).

    `paths` are the envelope's reverse-path and forward-path without brackets, `address` the
    local part that the mail is for, with its extension behind `separator`; characters that
    could surprise a shell become "_".
    """
    sender, recipient = paths
    user, _, extension = address.partition(separator) if separator else (address, b"", b"")
    given = {
        b"PATH": _PATH.encode(),
        b"SHELL": SHELL.encode(),
        b"HOME": os.fsencode(account.home or "/"),
        b"USER": os.fsencode(account.user),
        b"LOGNAME": os.fsencode(account.user),
        b"DOMAIN": domain.encode("idna") if not domain.isascii() else domain.encode(),
    }
    told = {
        b"SENDER": sender,
        b"RECIPIENT": b"%b@%b" % (address, given[b"DOMAIN"]),
        b"ORIGINAL_RECIPIENT": recipient,
        b"LOCAL": user,
        b"EXTENSION": extension,
    }
    return given | {name: _tame(value) for name, value in told.items()}


def _tame(value: bytes) -> bytes:
    return bytes(byte if byte in _HARMLESS else ord("_") for byte in value[:1000])


def supervise(
    command: str,
    variables: dict[bytes, bytes],
    message: tuple[bytes, int, int],
    seconds: float,
    report_fd: int,
) -> None:
    """Run `command` as whom we are, with the message on its standard input; report once.

    `message` is the lines that stand before the text, the text's descriptor and its size
    in bytes. The caller is a process without other children that adopts orphans. Raises
    OSError where the command cannot even be tried.
    """
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(command, variables, in_read, out_write)
    os.close(in_read)
    os.close(out_write)
    os.set_blocking(in_write, False)
    os.set_blocking(out_read, False)
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    feed = _Feed(in_write, *message)
    status, output = _attend(pid, feed, out_read, time.monotonic() + seconds)
    feed.close()
    left = _end_leftovers(pid)
    os.write(report_fd, b"%d %d\n%b" % (status, left, output))


def _become(command: str, variables: dict[bytes, bytes], in_fd: int, out_fd: int) -> None:
    """In the last child: the command itself, with its three descriptors and no other."""
    try:
        os.setsid()
        os.dup2(in_fd, 0)
        os.dup2(out_fd, 1)
        os.dup2(out_fd, 2)
        # Python ignores these two, and ignored is what a command would inherit.
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGTERM, _signal.SIGINT,
                       _signal.SIGHUP, _signal.SIGQUIT):  # fmt: skip
            _signal.signal(number, _signal.SIG_DFL)
        for limit, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, _MOST_FILES),
            (resource.RLIMIT_NPROC, _MOST_PROCESSES),
        ):
            _lower(limit, most)
        os.umask(0o077)
        try:
            os.chdir(variables[b"HOME"])
        except OSError:
            os.chdir("/")
        # A shell, as every mailer gives it: the command line is the user's own.
        os.execve(SHELL, ["sh", "-c", command], variables)  # noqa: S606
    finally:
        os._exit(75)


def _lower(limit: int, most: int) -> None:
    _, hard = resource.getrlimit(limit)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))


class _Feed:
    """The message on its way into the pipe, as fast as the command reads."""

    def __init__(self, fd: int, head: bytes, text_fd: int, size: int) -> None:
        self.fd = fd
        self._waiting = memoryview(head)
        self._text_fd = text_fd
        self._size = size
        self._at = 0

    def go_on(self) -> None:
        """Write what fits now; closes the pipe at the end, or when nobody reads any more."""
        try:
            if not self._waiting:
                block = os.pread(self._text_fd, min(_BLOCK, self._size - self._at), self._at)
                self._at += len(block)
                self._waiting = memoryview(block)
            if not self._waiting:
                self.close()
                return
            self._waiting = self._waiting[os.write(self.fd, self._waiting) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        """The command sees the end of its input."""
        if self.fd != -1:
            os.close(self.fd)
            self.fd = -1


def _attend(pid: int, feed: _Feed, out_fd: int, until: float) -> tuple[int, bytes]:
    """Feed and listen until the command has ended, or its time; the status, the output.

    The end is its exit, not its last descriptor: what it left in the background may hold
    those for ever.
    """
    end_fd = os.pidfd_open(pid)
    output = b""
    waits_for_output = True
    while (left := until - time.monotonic()) > 0:
        events = select.poll()
        events.register(end_fd, select.POLLIN)
        if waits_for_output:
            events.register(out_fd, select.POLLIN)
        if feed.fd != -1:
            events.register(feed.fd, select.POLLOUT)
        ready = dict(events.poll(left * 1000))
        if feed.fd in ready:
            feed.go_on()
        if out_fd in ready:
            said = _read_output(out_fd)
            waits_for_output = said != b""
            output = (output + said)[:_MOST_OUTPUT]
        if end_fd in ready:
            output = (output + _read_output(out_fd))[:_MOST_OUTPUT]
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output
    return _TIMED_OUT, output


def _read_output(fd: int) -> bytes:
    try:
        return os.read(fd, _BLOCK)
    except BlockingIOError:
        return b""


def _end_leftovers(group: int) -> int:
    """Kill what the command has left running; how many processes could not be ended.

    Its orphans are our children by now, whatever session they have made for themselves.
    """
    until = time.monotonic() + _CLEANING_SECONDS
    try:
        os.killpg(group, _signal.SIGKILL)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EPERM):
            raise
    children = _reap()
    while children and time.monotonic() < until:
        for child in children:
            try:
                os.kill(child, _signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.01)
        children = _reap()
    return len(children)


def _reap() -> list[int]:
    """Collect the children that have ended; the others' ids."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
        return [int(pid) for pid in file.read().split()]


def read_report(fd: int, seconds: float) -> bytes:
    """The report of a supervisor, NO_REPORT if there is none in time."""
    until = time.monotonic() + seconds + 2 * _CLEANING_SECONDS
    report = b""
    events = select.poll()
    events.register(fd, select.POLLIN)
    while (left := until - time.monotonic()) > 0 and events.poll(left * 1000):
        block = os.read(fd, _MOST_OUTPUT + 100)
        if not block:
            return report
        report += block
    return NO_REPORT


def judge(report: bytes) -> tuple[Outcome, str]:
    """What a report means for the message, and a line about it for the log.

    A first line of output "5.2.2 Text" decides with its own code, as with Postfix; for
    the rest the exit status does, and what is not known to be permanent may pass.
    """
    head, _, output = report.partition(b"\n")
    numbers = head.split()
    if len(numbers) != 2:
        return Outcome(451, "4.3.0", "The recipient's command was not seen to end"), "no report"
    status, left = int(numbers[0]), int(numbers[1])
    line = _first_line(output)
    note = f"exit status {status}"
    if left:
        note += f", {left} processes could not be ended"
    if line:
        note += f": {line}"
    if status == 0:
        return Outcome(250, "2.0.0", "Delivered to command"), note
    if status == _TIMED_OUT:
        return Outcome(451, "4.3.0", "The recipient's command takes too long"), note
    told = _read_enhanced(line)
    failed = Outcome(451, "4.3.0", "The recipient's command has failed")
    return told or _PERMANENT.get(status, failed), note


def _first_line(output: bytes) -> str:
    line = output.lstrip().split(b"\n", 1)[0][:200].decode("ascii", "replace")
    return "".join(c if " " <= c <= "~" else "?" for c in line).strip()


def _read_enhanced(line: str) -> Outcome | None:
    """The outcome in "5.7.1 Not from you", or None."""
    enhanced, _, text = line.partition(" ")
    parts = enhanced.split(".")
    is_code = len(parts) == 3 and all(part.isdigit() and len(part) <= 3 for part in parts)
    if not is_code or parts[0] not in ("4", "5"):
        return None
    code = 451 if parts[0] == "4" else 550
    return Outcome(code, enhanced, text.strip() or "The recipient's command has failed")
