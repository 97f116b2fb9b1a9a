"""The proof that a device is the recipient's terminal and takes messages, and the write.

Runs in the broker as uid mda-net with gid tty, so that the kernel refuses a terminal with
messages off; but also as root or as the owner, whom the kernel refuses nothing. So consent
is always the mode bit, and the owner always the one of the opened descriptor: a record of
a login says nothing about who has the terminal now (design, decision 6).
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import time

from mda.model import BLANK_FILLERS, Outcome
from mda.wire import MAX_BLOCK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.terminal.sessions import Terminal

_PAUSE = 0.005
_PTS_MAJORS = range(136, 144)
_CONSOLE_MAJOR = 4
_DEFAULT_WIDTH = 80
_WIDTHS = (20, 500)
_KDGETMODE = 0x4B3B

_NOT_LOGGED_IN = "User is not logged in"
_NOT_ACCEPTING = "User is not accepting messages"
_STUCK = "User's terminal is stuck or gone"


def probe(
    terminals: list[Terminal], uid: int, tty_gid: int, *, is_for_all: bool = False
) -> tuple[Outcome, int]:
    """Would one of `terminals` take a message for `uid` now, and how many columns has it.

    `tty_gid` is the group that a terminal with messages on belongs to. The answer is 250
    and a width, of the narrowest if it `is_for_all`; or 450 (RFC 821 3.4) with "not logged
    in" told from "not accepting".
    """
    devices, reason = _choose(terminals, uid, tty_gid)
    widths = []
    for device in devices:
        fd = _open(device, uid, tty_gid)
        if fd == -1:
            continue
        try:
            widths.append(_measure(fd))
        finally:
            os.close(fd)
        if not is_for_all:
            break
    if widths:
        return Outcome(250, "2.1.5", "User is accepting messages"), min(widths)
    return Outcome(450, "4.2.1", reason), 0


def show(
    terminals: list[Terminal],
    uid: int,
    tty_gid: int,
    block: bytes,
    *,
    patience: float,
    is_for_all: bool = False,
) -> Outcome:
    """Write `block` to the first of `terminals` that takes it whole, or to all that do.

    250 when one took it; 554 for a block that `is_safe_block` refuses; else 451 with the
    reason. Full or stopped terminals are waited for, `patience` seconds in all.
    """
    if not is_safe_block(block):
        return Outcome(554, "5.6.0", "Message is not fit for a terminal")
    devices, reason = _choose(terminals, uid, tty_gid)
    deadline = time.monotonic() + patience
    count = 0
    for device in devices:
        fd = _open(device, uid, tty_gid)
        if fd == -1:
            continue
        reason = _STUCK
        try:
            count += _write_whole(fd, block, deadline)
        finally:
            os.close(fd)
        if count and not is_for_all:
            break
    if count:
        return Outcome(250, "2.1.5", f"Sent to {count} terminal{'s' if count > 1 else ''}")
    return Outcome(451, "4.2.1", reason)


def describe(terminal: Terminal, uid: int, tty_gid: int) -> tuple[int, str] | None:
    """Idle seconds and "y" or "n" (takes messages), None if it is not `uid`'s terminal."""
    status = _look_at(terminal.device)
    if status is None or not _belongs_to(status, uid):
        return None
    idle = max(0, int(time.time() - status.st_atime))
    return idle, "y" if _takes_messages(status, tty_gid) else "n"


def is_safe_block(block: bytes) -> bool:
    """Nothing in `block` can do more to a terminal than show text and ring once.

    UTF-8 of at most MAX_BLOCK bytes; of controls only CR LF pairs and one BEL. No other
    C0, no DEL, no C1, no format character (bidi, zero width, tags), no private use, no
    line separator, no space but U+0020 and no blank filler.
    """
    if not 0 < len(block) <= MAX_BLOCK:
        return False
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    rest = text.replace("\r\n", "").replace("\a", "", 1)
    return rest.isprintable() and not any(filler in rest for filler in BLANK_FILLERS)


def _choose(terminals: list[Terminal], uid: int, tty_gid: int) -> tuple[list[str], str]:
    """The devices to try, the one last typed at first; and why, if there is none.

    An outer terminal (of tmux or screen) is tried only if the user has no other, neither
    one that is stuck nor one with messages off: nobody sees the text there, and it would
    count as delivered.
    """
    reason = _NOT_LOGGED_IN
    own = []
    seen = set()
    for terminal in terminals:
        status = _look_at(terminal.device)
        if status is not None and _belongs_to(status, uid) and status.st_rdev not in seen:
            reason = _NOT_ACCEPTING
            own.append((terminal, status))
            seen.add(status.st_rdev)
    inner = [each for each in own if not each[0].is_outer]
    accepting = [
        (-status.st_atime_ns, terminal.device)
        for terminal, status in inner or own
        if _takes_messages(status, tty_gid)
    ]
    return [device for _, device in sorted(accepting)], reason


def _look_at(device: str) -> os.stat_result | None:
    """The state of a device that need not be ours to open; opening may have effects."""
    try:
        fd = os.open(device, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _belongs_to(status: os.stat_result, uid: int) -> bool:
    major = os.major(status.st_rdev)
    is_terminal = stat.S_ISCHR(status.st_mode) and (major in _PTS_MAJORS or major == _CONSOLE_MAJOR)
    return is_terminal and status.st_uid == uid


def _takes_messages(status: os.stat_result, tty_gid: int) -> bool:
    # Writable by others is no consent (CVE-2015-6565).
    return status.st_gid == tty_gid and bool(status.st_mode & stat.S_IWGRP)


def _open(device: str, uid: int, tty_gid: int) -> int:
    """A descriptor for writing that is proven to be `uid`'s accepting terminal, else -1."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(device, flags)
    except OSError:
        return -1
    if _is_proven(fd, uid, tty_gid):
        return fd
    os.close(fd)
    return -1


def _is_proven(fd: int, uid: int, tty_gid: int) -> bool:
    status = os.fstat(fd)
    return (
        _belongs_to(status, uid)
        and _takes_messages(status, tty_gid)
        and os.isatty(fd)
        and not (os.major(status.st_rdev) == _CONSOLE_MAJOR and _shows_graphics(fd))
    )


def _shows_graphics(fd: int) -> bool:
    """A virtual console is in graphics mode (an X server, a compositor: ioctl_console(2))."""
    try:
        return any(fcntl.ioctl(fd, _KDGETMODE, bytes(8)))
    except OSError:
        return False


def _measure(fd: int) -> int:
    try:
        columns = os.get_terminal_size(fd).columns or _DEFAULT_WIDTH
    except OSError:
        return _DEFAULT_WIDTH
    return min(max(columns, _WIDTHS[0]), _WIDTHS[1])


def _write_whole(fd: int, block: bytes, deadline: float) -> bool:
    """Write `block` by one write, which the kernel keeps together; False if it did not.

    A block that went out in part is not delivered, and its rest is never written.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                return _write(fd, block) == len(block)
            except BlockingIOError:
                # Nothing was written: another writer holds the terminal for a moment.
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_PAUSE)
    except OSError:
        return False
    return False


def _write(fd: int, block: bytes) -> int:
    if not _is_controlling(fd):
        return os.write(fd, block)
    import signal  # here, since it costs ms and only `mda serve` in a shell comes this way

    # With `stty tostop` a write from the background would stop us, unless we block SIGTTOU.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        return os.write(fd, block)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _is_controlling(fd: int) -> bool:
    """`fd` is the controlling terminal of this process (only there has it a group)."""
    try:
        os.tcgetpgrp(fd)
    except OSError:
        return False
    return True
