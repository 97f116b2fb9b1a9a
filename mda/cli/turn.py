"""`mda queue turn`: bring a host its mail on a line, and take ours from it (RFC 821 3.8).

This process owns the channel and reads nothing of it: one child is the sender, as the owner of
the queue for good, and then another is `mda receive`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import click

import mda
from mda import broker, log
from mda.cli.install import require_root
from mda.config import Config
from mda.line import RawMode
from mda.outbound.route import find_hop, is_name, plain_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

_TURNED = 0
_FAILED = 1
_CONNECT_SECONDS = 30
_END_SECONDS = 10  # for a program whose input has ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@click.command("turn")
@click.argument("host")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.option("--line", metavar="DEVICE", help="A serial line; - for standard input and output.")
@click.pass_context
def command(context: click.Context, host: str, line: str | None, program: tuple[str, ...]) -> None:
    """Send HOST what waits for it, then TURN: be the receiver of what it has for us.

    On a serial line, by the input and output of a PROGRAM (after --), or by the socket that is
    HOST's route.
    """
    # Anybody else would find nothing to send, and be the receiver for himself alone.
    require_root()
    log.open_log(may_use_stderr=True)
    config = context.obj
    if line and program:
        raise click.UsageError("a line or a program, and not both")
    if not is_name(host):
        raise click.UsageError(f"{host!r} is not the name of a host")
    for number in _SIGNALS:
        signal.signal(number, _leave)
    with contextlib.ExitStack() as stack:
        if program:
            fds = stack.enter_context(run_program(program))
        elif line:
            fds = open_line(line, stack)
        else:
            fds = stack.enter_context(connect(config, plain_name(host)))
        if wait_for(start_sender(config, plain_name(host), fds)) != _TURNED:
            raise SystemExit(_FAILED)
        assert context.parent is not None  # noqa: S101 (narrows for the reader)
        status = wait_for(start_receiver(context.parent.params["config_file"], fds))
    raise SystemExit(status)


def _leave(_number: int, _frame: object) -> NoReturn:
    """Between the children: what has been opened is put back by who has opened it."""
    raise SystemExit(_FAILED)


def open_line(device: str, stack: contextlib.ExitStack) -> tuple[int, int]:
    """A serial line in raw mode, or for "-" what our standard input and output are."""
    try:
        if device == "-":
            fds = os.dup(0), os.dup(1)
        else:
            # A line may have no carrier yet; with raw mode it needs none.
            fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            fds = fd, fd
        if device != "-" or os.isatty(fds[0]):
            stack.enter_context(RawMode(fds[0]))
            os.set_blocking(fds[0], True)
    except OSError as error:
        raise click.ClickException(f"{device}: {error.strerror}") from error
    return fds


@contextlib.contextmanager
def run_program(program: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """What a program says, and what it hears, by pipes; it is ended if it does not end."""
    try:
        running = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        raise click.ClickException(f"{program[0]}: {error.strerror}") from error
    assert running.stdin is not None  # noqa: S101 (narrows for the reader)
    assert running.stdout is not None  # noqa: S101 (narrows for the reader)
    try:
        yield running.stdout.fileno(), running.stdin.fileno()
    finally:
        running.stdin.close()
        running.stdout.close()
        end_program(running)


def end_program(running: subprocess.Popen[bytes]) -> None:
    """Wait a while, then ask it to end, then make it; one of another user's is left alone,
    since we have no right to signal it any more.
    """
    for end in (running.terminate, running.kill):
        try:
            running.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):
                end()
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(_END_SECONDS)


@contextlib.contextmanager
def connect(config: Config, host: str) -> Iterator[tuple[int, int]]:
    """A connection to the Unix socket that is the host's route.

    Anything else would have to be looked up, which is not for root to do.
    """
    try:
        hop = find_hop(host, vars(config.routes), config.outbound.smarthost)
    except ValueError as error:
        raise click.ClickException(f"its route: {error}") from error
    if hop.protocol != "smtp" or not hop.path:
        raise click.ClickException(f"{host}: its route is no socket; say --line or a program")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.settimeout(_CONNECT_SECONDS)
            channel.connect(hop.path)
            channel.settimeout(None)
        except OSError as error:
            raise click.ClickException(f"{hop.path}: {error.strerror or 'no answer'}") from error
        yield channel.fileno(), channel.fileno()


def wait_for(child: tuple[int, Callable[[int], None]]) -> int:
    """The exit status of a child, who is sent each signal that we get meanwhile.

    So nobody is left to speak on a line that is no longer raw.
    """
    pid, pass_on = child
    before = [signal.signal(number, lambda number, _: pass_on(number)) for number in _SIGNALS]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for number, handler in zip(_SIGNALS, before, strict=True):
        signal.signal(number, handler)
    return status


def start_sender(
    config: Config, host: str, fds: tuple[int, int]
) -> tuple[int, Callable[[int], None]]:
    """A process that is the queue's owner for good: it sends, then says TURN.

    Its exit status says whether the roles are changed.
    """
    identities = find_identities(config)
    pid = os.fork()
    if pid == 0:
        be_sender(config, host, fds)

    def pass_on(number: int) -> None:
        with identities.as_spool_user(), contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    return pid, pass_on


def find_identities(config: Config) -> broker.Identities:
    """The system users; raises ClickException where the host has none."""
    try:
        return broker.Identities(config)
    except broker.SetupError as error:
        raise click.ClickException(str(error)) from error


def be_sender(config: Config, host: str, fds: tuple[int, int]) -> NoReturn:
    """The sender's process from its beginning to its end."""
    status = broker.TEMPORARY_FAILURE
    try:
        broker.become_spool_user()
        from mda.outbound import turned  # what parses is for this process alone

        sent, outcome = turned.send_and_turn(config, host, fds)
        click.echo(f"{host}: {sent} message{'' if sent == 1 else 's'} sent", err=True)
        status = _TURNED if outcome.is_done else _FAILED
        if not outcome.is_done:
            click.echo(f"{host}: {outcome.code} {outcome.enhanced} {outcome.text}", err=True)
    except OSError as error:
        click.echo(f"{error.filename or 'the queue'}: {error.strerror}", err=True)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("turn")
    finally:
        os._exit(status)


def start_receiver(config_file: str, fds: tuple[int, int]) -> tuple[int, Callable[[int], None]]:
    """`mda receive` on the channel: it greets, and the host has the rights of anybody there."""
    main = os.path.join(os.path.dirname(os.path.abspath(mda.__file__)), "__main__.py")
    flags = ["-I", "-B", *(["-S"] if sys.flags.no_site else [])]
    words = [sys.executable, *flags, main, "receive", "--config", config_file]
    ends = [(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in enumerate(fds)]
    pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=ends)
    return pid, lambda number: os.kill(pid, number)
