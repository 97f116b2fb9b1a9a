from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import syslog
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda import log


@given(st.one_of(st.text(), st.binary()))
def test_what_anybody_sends_stays_inside_its_value(value: str | bytes) -> None:
    line = log.format_line("event", {"key": value})
    assert line.isascii()
    assert line.isprintable()
    assert line.startswith("event key=")
    quoted = line.removeprefix("event key=")
    if quoted.startswith('"'):
        inner = quoted[1:-1].replace("\\\\", "").replace('\\"', "")
        assert '"' not in inner
    else:
        assert quoted
        assert " " not in quoted
        assert "=" not in quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"alice@example.org", "alice@example.org"),
        ("", '""'),
        ('a "b" \\', '"a \\"b\\" \\\\"'),
        (b"\x1b[2J\r\nfake", '"\\x1b[2J\\x0d\\x0afake"'),
        ("\u202e", '"\\u{202e}"'),
        (17, "17"),
    ],
)
def test_harmless_values_are_plain_and_others_are_escaped(value: object, shown: str) -> None:
    assert log.quote(value) == shown


def test_a_long_value_is_cut() -> None:
    assert len(log.quote("x" * 10_000)) < 600


def test_lines_reach_the_journal_with_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    kept = os.dup(2)
    os.dup2(write_fd, 2)
    try:
        status = os.fstat(2)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.open_log(may_use_stderr=False)
        log.write("delivered", log.WARNING, to=b"alice")
    finally:
        os.dup2(kept, 2)
        monkeypatch.delenv("JOURNAL_STREAM")
        log.open_log(may_use_stderr=False)
    assert os.read(read_fd, 1000) == b"<4>delivered to=alice\n"
    for fd in (read_fd, write_fd, kept):
        os.close(fd)


NAMESPACE = """set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /dev
mknod -m 666 /dev/null c 1 3
ln -s "$1" /dev/log
shift
exec "$@"
"""


def log_inside(
    tmp_path: Path, code: str, *, stderr: int = subprocess.DEVNULL, **environment: str
) -> list[bytes]:
    """Run `code` where /dev/log is a socket of ours; what came there, a datagram each."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(str(tmp_path / "log"))
        script = f"from mda import log\n{code}"
        kept = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
        subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", NAMESPACE, "sh", str(tmp_path / "log")),
                *(sys.executable, "-c", script),
            ],
            check=True,
            stderr=stderr,
            env={**kept, **environment},
            timeout=60,
        )
        syslogd.setblocking(False)
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines.append(syslogd.recv(10_000).rstrip(b"\0"))
    return lines


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    try:
        yield read_fd, write_fd
    finally:
        os.close(read_fd)
        os.close(write_fd)


def read_all(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 100_000)
    return b""


WRITE = "log.write('delivered', log.WARNING, to=b'alice', text='a b')"


def test_syslog_gets_the_line_as_mail_with_our_name_and_its_priority(tmp_path: Path) -> None:
    with pipe() as (read_fd, write_fd):
        code = f"log.open_log(may_use_stderr=False)\n{WRITE}\nlog.write('end')"
        lines = log_inside(tmp_path, code, stderr=write_fd)
        assert read_all(read_fd) == b""
    assert len(lines) == 2
    assert lines[0].startswith(b"<%d>" % (syslog.LOG_MAIL | syslog.LOG_WARNING))
    assert lines[1].startswith(b"<%d>" % (syslog.LOG_MAIL | syslog.LOG_INFO))
    assert b" mda[" in lines[0]
    assert lines[0].endswith(b']: delivered to=alice text="a b"')


def test_before_a_place_is_chosen_it_is_syslog(tmp_path: Path) -> None:
    with pipe() as (read_fd, write_fd):
        lines = log_inside(tmp_path, WRITE, stderr=write_fd)
        assert read_all(read_fd) == b""
    assert [line.startswith(b"<%d>" % (syslog.LOG_MAIL | 4)) for line in lines] == [True]


def test_a_person_at_a_terminal_reads_it_there(tmp_path: Path) -> None:
    with pipe() as (read_fd, write_fd):
        code = f"log.open_log(may_use_stderr=True)\n{WRITE}"
        assert log_inside(tmp_path, code, stderr=write_fd) == []
        assert read_all(read_fd) == b'mda: delivered to=alice text="a b"\n'


@pytest.mark.parametrize("lost", ["null", "closed"])
def test_a_standard_error_that_leads_nowhere_is_no_place(tmp_path: Path, lost: str) -> None:
    close = "import os; os.close(2)\n" if lost == "closed" else ""
    lines = log_inside(tmp_path, f"{close}log.open_log(may_use_stderr=True)\n{WRITE}")
    assert [line.partition(b"]: ")[2] for line in lines] == [b'delivered to=alice text="a b"']


@pytest.mark.parametrize("stream", ["1:1", "", "x", "0:"])
def test_a_journal_stream_that_is_not_standard_error_is_no_place(
    tmp_path: Path, stream: str
) -> None:
    """A program that the unit's service starts inherits the variable and not the stream."""
    with pipe() as (read_fd, write_fd):
        code = f"log.open_log(may_use_stderr=False)\n{WRITE}"
        lines = log_inside(tmp_path, code, stderr=write_fd, JOURNAL_STREAM=stream)
        assert read_all(read_fd) == b""
    assert len(lines) == 1


def test_a_journal_stream_with_standard_error_closed_is_no_place(tmp_path: Path) -> None:
    code = f"import os; os.close(2)\nlog.open_log(may_use_stderr=False)\n{WRITE}"
    assert len(log_inside(tmp_path, code, JOURNAL_STREAM="8:1")) == 1


def test_a_line_that_standard_error_does_not_take_goes_to_syslog(tmp_path: Path) -> None:
    gone = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2)\n"
    lines = log_inside(tmp_path, f"{gone}log.open_log(may_use_stderr=True)\n{WRITE}")
    assert len(lines) == 1
    assert lines[0].startswith(b"<%d>" % (syslog.LOG_MAIL | syslog.LOG_WARNING))
    assert lines[0].endswith(b']: delivered to=alice text="a b"')


def test_a_traceback_is_one_entry_a_line_and_keeps_its_quotes(tmp_path: Path) -> None:
    code = """log.open_log(may_use_stderr=False)
try:
    raise ValueError('fake\\nRCPT %s')
except ValueError:
    log.write_traceback('session')
"""
    lines = [line.partition(b"]: ")[2] for line in log_inside(tmp_path, code)]
    assert lines[0] == b'session error="fake\\x0aRCPT %s"'
    assert lines[1] == b'traceback line="Traceback (most recent call last):"'
    assert lines[-2:] == [b'traceback line="ValueError: fake"', b'traceback line="RCPT %s"']
    assert all(line.startswith(b"traceback line=") for line in lines[1:])


def test_the_clients_own_stream_is_known_whichever_descriptor_it_is() -> None:
    code = "from mda import log; import sys; sys.exit(log.is_clients_stderr())"
    with pipe() as (read_fd, write_fd), socket.socket(socket.AF_UNIX) as client:
        for stdin, stdout, stderr, expected in (
            (client.fileno(), client.fileno(), client.fileno(), 1),
            (read_fd, write_fd, write_fd, 1),
            (client.fileno(), read_fd, client.fileno(), 1),
            (client.fileno(), client.fileno(), write_fd, 0),
        ):
            done = subprocess.run(
                [sys.executable, "-c", code], stdin=stdin, stdout=stdout, stderr=stderr, check=False
            )
            assert done.returncode == expected
    closed = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    assert subprocess.run(closed, check=False).returncode == 1
