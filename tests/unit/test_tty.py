"""The proof on the device and the one write, on real pseudo-terminals; as root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mda.model import Outcome
from mda.terminal import tty
from mda.terminal.sessions import Terminal
from mda.wire import MAX_BLOCK

ALICE = 4000
BOB = 4001
TTY = 5
NET = 4999
BLOCK = b"\r\n\aMessage from bob (verified) at 14:03\r\n| lunch?\r\n-- end of message --\r\n"
SENT = Outcome(250, "2.1.5", "Sent to 1 terminal")


class Pty:
    """A pseudo-terminal that is a user's, with messages on unless told otherwise."""

    def __init__(self, uid: int = ALICE, mode: int = 0o620, gid: int = TTY) -> None:
        self.master, self.slave = os.openpty()
        self.device = os.ttyname(self.slave)
        self.terminal = Terminal(self.device)
        os.fchown(self.slave, uid, gid)
        os.fchmod(self.slave, mode)
        os.set_blocking(self.master, False)

    def read(self) -> bytes:
        """What the screen has got so far."""
        try:
            return os.read(self.master, 65_536)
        except BlockingIOError:
            return b""

    def typed_at(self, seconds: float) -> None:
        os.utime(self.device, (seconds, seconds))

    def fill(self) -> None:
        """Write until the terminal takes nothing more, as when its reader is wedged.

        The kernel moves what was written on to the reader's side in the background, so a
        terminal is full only when it takes nothing for a while.
        """
        os.set_blocking(self.slave, False)
        poll = select.poll()
        poll.register(self.slave, select.POLLOUT)
        while poll.poll(500):
            with contextlib.suppress(BlockingIOError):
                os.write(self.slave, b"x" * 1024)

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        for fd in (self.master, self.slave):
            if fd != -1:
                os.close(fd)


class Ptys:
    def __init__(self) -> None:
        self._open: list[Pty] = []

    def __call__(self, uid: int = ALICE, mode: int = 0o620, gid: int = TTY) -> Pty:
        self._open.append(Pty(uid, mode, gid))
        return self._open[-1]

    def close(self) -> None:
        for pty in self._open:
            pty.close()


@pytest.fixture
def ptys() -> Iterator[Ptys]:
    made = Ptys()
    yield made
    made.close()


def show(*ptys: Pty, block: bytes = BLOCK) -> Outcome:
    return tty.show([pty.terminal for pty in ptys], ALICE, TTY, block, patience=0.2)


def probe(*ptys: Pty) -> tuple[int, str, int]:
    outcome, width = tty.probe([pty.terminal for pty in ptys], ALICE, TTY)
    assert outcome.enhanced == ("2.1.5" if outcome.is_done else "4.2.1")
    return outcome.code, outcome.text, width


def run_child(work: object, *arguments: object) -> int:
    """Run `work` in a forked child; the status it returns, or minus what stopped it."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work(*arguments)  # type: ignore[operator]
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -os.WSTOPSIG(status)
    return os.waitstatus_to_exitcode(status)


def test_the_block_arrives_whole(ptys: Ptys) -> None:
    pty = ptys()
    assert show(pty) == SENT
    assert pty.read().replace(b"\r\r\n", b"\r\n") == BLOCK


def test_a_stale_record_reaches_nobody(ptys: Ptys) -> None:
    pty = ptys(uid=BOB)
    assert probe(pty) == (450, "User is not logged in", 0)
    assert show(pty) == Outcome(451, "4.2.1", "User is not logged in")
    assert pty.read() == b""


@pytest.mark.parametrize("mode", [0o600, 0o602, 0o666 & ~0o020])
def test_messages_off_is_respected_by_root_and_others_bit_is_no_consent(
    ptys: Ptys, mode: int
) -> None:
    pty = ptys(mode=mode)
    assert probe(pty) == (450, "User is not accepting messages", 0)
    assert show(pty) == Outcome(451, "4.2.1", "User is not accepting messages")
    assert pty.read() == b""


def test_the_group_must_be_tty(ptys: Ptys) -> None:
    pty = ptys(gid=100)
    assert probe(pty)[1] == "User is not accepting messages"
    assert not show(pty).is_done


@pytest.mark.parametrize(("mode", "code"), [(0o600, 450), (0o620, 250)])
def test_messages_off_is_respected_by_the_terminals_owner(ptys: Ptys, mode: int, code: int) -> None:
    pty = ptys(mode=mode)

    def work() -> int:
        os.setgid(ALICE)
        os.setuid(ALICE)
        return 0 if probe(pty)[0] == code else 1

    assert run_child(work) == 0


def test_the_brokers_identity_for_terminals_is_enough(ptys: Ptys) -> None:
    off, on = ptys(mode=0o600), ptys()

    def work() -> int:
        os.setgroups([])
        os.setegid(TTY)
        os.seteuid(NET)
        if probe(off)[:2] != (450, "User is not accepting messages"):
            return 1
        if tty.describe(off.terminal, ALICE, TTY) is None:
            return 2
        return 0 if show(off, on) == SENT else 3

    assert run_child(work) == 0
    assert b"lunch?" in on.read()
    assert off.read() == b""


def test_symlinks_fifos_and_files_are_never_terminals(ptys: Ptys, tmp_path: Path) -> None:
    pty = ptys()
    link, fifo, file = tmp_path / "link", tmp_path / "fifo", tmp_path / "file"
    link.symlink_to(pty.device)
    os.mkfifo(fifo)
    file.write_bytes(b"kept")
    for path in (fifo, file):
        os.chown(path, ALICE, TTY)
        path.chmod(0o620)
    fakes = [Terminal(str(path)) for path in (link, fifo, file, tmp_path / "missing")]
    assert tty.probe(fakes, ALICE, TTY)[0].text == "User is not logged in"
    assert tty.show(fakes, ALICE, TTY, BLOCK, patience=0.2).text == "User is not logged in"
    assert [tty.describe(fake, ALICE, TTY) for fake in fakes] == [None] * 4
    assert file.read_bytes() == b"kept"
    assert not (tmp_path / "missing").exists()
    assert pty.read() == b""


@pytest.mark.parametrize("device", ["/dev/null", "/dev/tty", "/dev/console", "/dev/ptmx"])
def test_other_devices_are_not_terminals_of_anybody(device: str) -> None:
    owner, group = os.stat(device).st_uid, os.stat(device).st_gid
    assert tty.probe([Terminal(device)], owner, group)[0].text == "User is not logged in"


def test_what_was_looked_at_is_proven_again_on_the_descriptor(
    ptys: Ptys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = ptys()
    before = os.stat(pty.device)
    os.fchown(pty.slave, BOB, TTY)
    monkeypatch.setattr(tty, "_look_at", lambda device: before)
    descriptors = os.listdir("/proc/self/fd")
    assert not show(pty).is_done
    assert probe(pty)[0] == 450
    assert os.listdir("/proc/self/fd") == descriptors
    assert pty.read() == b""


def test_the_terminal_last_typed_at_is_chosen_among_those_that_accept(ptys: Ptys) -> None:
    five = [ptys(mode=mode) for mode in (0o620, 0o620, 0o600, 0o620, 0o620)]
    for pty, seconds in zip(five, (100, 400, 500, 300, 200), strict=True):
        pty.typed_at(seconds)
    assert show(*five) == SENT
    assert [bool(pty.read()) for pty in five] == [False, True, False, False, False]


def test_an_outer_terminal_is_used_only_by_who_has_no_other(ptys: Ptys) -> None:
    outer, pane = ptys(), ptys()
    outer.terminal.is_outer = True
    outer.typed_at(2_000_000_000)
    pane.typed_at(100)
    assert show(outer, pane) == SENT
    assert pane.read()
    assert not outer.read()
    os.write(pane.master, b"\x13")
    assert show(outer, pane).text == "User's terminal is stuck or gone"
    os.fchmod(pane.slave, 0o600)
    assert show(outer, pane).text == "User is not accepting messages"
    assert probe(outer, pane)[0] == 450
    assert not outer.read()
    assert show(outer) == SENT
    assert outer.read()


def test_a_stopped_terminal_is_given_up_in_time_and_the_next_one_gets_it(ptys: Ptys) -> None:
    stopped, also, free = ptys(), ptys(), ptys()
    for pty, seconds in ((stopped, 300), (also, 200), (free, 100)):
        pty.typed_at(seconds)
    for pty in (stopped, also):
        os.write(pty.master, b"\x13")
    start = time.monotonic()
    assert show(stopped, also) == Outcome(451, "4.2.1", "User's terminal is stuck or gone")
    assert 0.15 < time.monotonic() - start < 0.5
    assert show(stopped, also, free) == SENT
    assert b"lunch?" in free.read()
    os.write(stopped.master, b"\x11")
    assert b"lunch?" not in stopped.read()


def test_a_terminal_that_comes_free_while_we_wait_gets_it(ptys: Ptys) -> None:
    pty = ptys()
    os.write(pty.master, b"\x13")

    def work() -> int:
        time.sleep(0.05)
        os.write(pty.master, b"\x11")
        return 0

    pid = os.fork()
    if pid == 0:
        os._exit(work())
    assert show(pty) == SENT
    os.waitpid(pid, 0)


def test_a_full_terminal_is_given_up_in_time(ptys: Ptys) -> None:
    pty = ptys()
    pty.fill()
    start = time.monotonic()
    assert show(pty).text == "User's terminal is stuck or gone"
    assert time.monotonic() - start < 0.5


def test_a_torn_block_is_not_delivered_and_its_rest_goes_nowhere(
    ptys: Ptys, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn, next_one = ptys(), ptys()
    torn.typed_at(300)
    next_one.typed_at(100)
    written: list[int] = []
    real_write = os.write

    def write_less(fd: int, data: bytes) -> int:
        torn_device = os.fstat(torn.slave).st_rdev
        written.append(real_write(fd, data[:9] if os.fstat(fd).st_rdev == torn_device else data))
        return written[-1]

    monkeypatch.setattr(os, "write", write_less)
    assert show(torn, next_one) == SENT
    assert written == [9, len(BLOCK)]
    assert show(torn).text == "User's terminal is stuck or gone"
    monkeypatch.undo()
    assert next_one.read().replace(b"\r\r\n", b"\r\n") == BLOCK


def test_a_wedged_reader_gets_a_large_block_whole_or_not_counted(ptys: Ptys) -> None:
    pty = ptys()
    large = b"x" * (MAX_BLOCK - 2) + b"\r\n"
    outcomes = [show(pty, block=large).is_done for _ in range(3)]
    assert outcomes[0]
    assert not outcomes[-1]
    got = b""
    while piece := pty.read():
        got += piece
    assert got.count(b"\n") == outcomes.count(True)


def test_a_terminal_that_hung_up_is_passed_over(
    ptys: Ptys, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, next_one = ptys(), ptys()
    gone.typed_at(300)
    next_one.typed_at(100)
    real = tty._is_proven

    def hang_up_after(fd: int, uid: int, tty_gid: int) -> bool:
        is_proven = real(fd, uid, tty_gid)
        if gone.master != -1:
            gone.hang_up()
        return is_proven

    monkeypatch.setattr(tty, "_is_proven", hang_up_after)
    assert show(gone, next_one) == SENT
    assert b"lunch?" in next_one.read()
    assert show(gone).text == "User is not logged in"


def test_a_terminal_that_hung_up_between_proof_and_write_is_gone(
    ptys: Ptys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = ptys()
    real = tty._is_proven

    def hang_up_after(fd: int, uid: int, tty_gid: int) -> bool:
        is_proven = real(fd, uid, tty_gid)
        pty.hang_up()
        return is_proven

    monkeypatch.setattr(tty, "_is_proven", hang_up_after)
    assert show(pty) == Outcome(451, "4.2.1", "User's terminal is stuck or gone")


def test_writers_at_once_do_not_mix(ptys: Ptys) -> None:
    pty = ptys()
    # Less in all than an unread terminal takes: a full one would tear blocks.
    blocks = [bytes([letter]) * 400 + b"\r\n" for letter in b"abcd"]

    def work(block: bytes) -> int:
        return sum(not show(pty, block=block).is_done for _ in range(4))

    children = []
    for block in blocks:
        pid = os.fork()
        if pid == 0:
            os._exit(work(block))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    got = b""
    while piece := pty.read():
        got += piece
    lines = got.replace(b"\r", b"").split(b"\n")
    assert sorted(lines) == sorted([b"", *(block[:-2] for block in blocks for _ in range(4))])


def test_a_session_leader_without_a_terminal_gets_none(ptys: Ptys) -> None:
    pty = ptys()

    def work() -> int:
        os.setsid()
        if probe(pty)[0] != 250 or show(pty) != SENT:
            return 1
        with open("/proc/self/stat", "rb") as file:
            return 0 if file.read().rpartition(b")")[2].split()[4] == b"0" else 2

    assert run_child(work) == 0


def test_writing_to_ones_own_terminal_from_the_background_stops_nobody(ptys: Ptys) -> None:
    pty = ptys()
    attributes = termios.tcgetattr(pty.slave)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(pty.slave, termios.TCSANOW, attributes)

    def work() -> int:
        os.setsid()
        fcntl.ioctl(pty.slave, termios.TIOCSCTTY, 0)
        return run_child(in_background)

    def in_background() -> int:
        os.setpgid(0, 0)
        return 0 if show(pty) == SENT else 1

    assert run_child(work) == 0
    assert b"lunch?" in pty.read()


@pytest.mark.parametrize(
    ("columns", "width"), [(0, 80), (132, 132), (5, 20), (1000, 500), (65_535, 500)]
)
def test_the_width_is_the_terminals_within_reason(ptys: Ptys, columns: int, width: int) -> None:
    pty = ptys()
    fcntl.ioctl(pty.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    assert probe(pty) == (250, "User is accepting messages", width)


def test_probing_writes_nothing(ptys: Ptys) -> None:
    pty = ptys()
    probe(pty)
    tty.describe(pty.terminal, ALICE, TTY)
    assert pty.read() == b""


def test_a_console_in_graphics_mode_does_not_count(
    ptys: Ptys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = ptys()
    assert not tty._shows_graphics(pty.slave)
    monkeypatch.setattr(tty, "_CONSOLE_MAJOR", 136)
    for mode, code in ((0, 250), (1, 450)):
        answer = struct.pack("ii", mode, 0)
        monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, data, a=answer: a)
        assert probe(pty)[0] == code


def test_who_is_told_idle_time_and_consent(ptys: Ptys) -> None:
    on, off, bobs = ptys(), ptys(mode=0o600), ptys(uid=BOB)
    on.typed_at(time.time() - 90)
    off.typed_at(time.time() + 90)
    described = tty.describe(on.terminal, ALICE, TTY)
    assert described in ((90, "y"), (91, "y"))
    assert tty.describe(off.terminal, ALICE, TTY) == (0, "n")
    assert tty.describe(bobs.terminal, ALICE, TTY) is None


def test_no_descriptor_is_left_open(ptys: Ptys) -> None:
    off, on, stopped = ptys(mode=0o600), ptys(), ptys()
    os.write(stopped.master, b"\x13")
    before = os.listdir("/proc/self/fd")
    probe(off, on)
    show(off, stopped)
    show(off, on)
    tty.describe(on.terminal, ALICE, TTY)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J",
        "\x1b]52;c;x\x07",
        "\x05",
        "\x7f",
        "\b",
        "\x0e",
        "\t",
        "\0",
        "\n",
        "\r",
        "\r\r\n",
        "\n\r",
        "\x0b",
        "\x0c",
        "\a\a",
        "\x85",
        "\x9b2J",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\U000e0041",
        "\u00ad",
        "\u2028",
        "\u2029",
        "\u3164",
        "\u115f",
        "\u1160",
        "\u2800",
        "\uffa0",
        "\u00a0",
        "\ue000",
        "\U0010fffe",
        "\u0378",
    ],
    ids=ascii,
)
def test_a_block_with_anything_that_acts_or_hides_is_refused(ptys: Ptys, text: str) -> None:
    block = f"\r\n| {text} |\r\n".encode()
    assert not tty.is_safe_block(block)
    pty = ptys()
    assert show(pty, block=block) == Outcome(554, "5.6.0", "Message is not fit for a terminal")
    assert pty.read() == b""


@pytest.mark.parametrize(
    "block",
    [b"", b"\x9b2J", b"\xc0\x9b", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"x\xc5", b"x" * 8193],
    ids=lambda block: ascii(block[:8]),
)
def test_a_block_that_is_no_utf8_or_too_large_is_refused(block: bytes) -> None:
    assert not tty.is_safe_block(block)


def test_text_in_any_language_is_a_safe_block() -> None:
    text = "\r\n\a| żółć 日本 🙂 e\u0301 שלום กำ -- \\x1b^[\r\n"
    assert tty.is_safe_block(text.encode())
    assert tty.is_safe_block(b"x" * MAX_BLOCK)
