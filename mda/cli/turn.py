"""`mda queue turn`: bring a host its mail on a line, and take ours from it (RFC 821 3.8)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

import click

from mda import broker, log
from mda.config import Config, own_domains
from mda.line import RawMode
from mda.model import Outcome, Peer
from mda.outbound import turned
from mda.outbound.route import find_addresses, find_hop, is_name
from mda.receiver import inetd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_TURNED = 0
_REFUSED = 1
_CONNECT_SECONDS = 30
_END_SECONDS = 10  # for a program whose input has ended


@click.command("turn")
@click.argument("host")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.option("--line", metavar="DEVICE", help="A serial line; - for standard input and output.")
@click.pass_obj
def command(config: Config, host: str, line: str | None, program: tuple[str, ...]) -> None:
    """Send HOST what waits for it, then TURN: be the receiver of what it has for us.

    On a serial line, by the input and output of a PROGRAM (after --), or by HOST's own route.
    """
    log.open_log(may_use_stderr=True)
    if line and program:
        raise click.UsageError("a line or a program, and not both")
    if not is_name(host):
        raise click.UsageError(f"{host!r} is not the name of a host")
    with contextlib.ExitStack() as stack:
        if program:
            fds = stack.enter_context(run_program(program))
        elif line:
            fds = stack.enter_context(open_line(line))
        else:
            fds = stack.enter_context(connect(config, host))
        if not be_sender(config, host.lower(), fds):
            raise SystemExit(_REFUSED)
        be_receiver(config, host, fds)


@contextlib.contextmanager
def open_line(device: str) -> Iterator[tuple[int, int]]:
    """A serial line in raw mode, or for "-" what our standard input and output are."""
    if device == "-":
        yield os.dup(0), os.dup(1)
        return
    try:
        fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        with RawMode(fd):
            yield fd, fd
    except OSError as error:
        raise click.ClickException(f"{device}: {error.strerror}") from error


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
        try:
            running.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            running.terminate()
            running.wait()
        running.stdout.close()


@contextlib.contextmanager
def connect(config: Config, host: str) -> Iterator[tuple[int, int]]:
    """A connection to the host by its route."""
    try:
        hop = find_hop(host, vars(config.routes), config.outbound.smarthost)
    except ValueError as error:
        raise click.ClickException(f"its route: {error}") from error
    if hop.protocol != "smtp" or hop.tls == "must":
        raise click.ClickException(f"{host}: no channel for TURN by its route; --line or a program")
    found = find_addresses(hop, own_domains(config))
    if isinstance(found, Outcome):
        raise click.ClickException(f"{host}: {found.text}")
    why = "no address"
    for _, (family, address) in found:
        with socket.socket(family, socket.SOCK_STREAM) as channel:
            channel.settimeout(_CONNECT_SECONDS)
            try:
                channel.connect(address)  # type: ignore[arg-type]
            except OSError as error:
                why = error.strerror or "no answer"
                continue
            yield channel.fileno(), channel.fileno()
            return
    raise click.ClickException(f"{host}: {why}")


def be_sender(config: Config, host: str, fds: tuple[int, int]) -> bool:
    """In a process that is the queue's owner for good: send, then TURN; are the roles changed?"""
    pid = os.fork()
    if pid != 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == _TURNED
    status = broker.TEMPORARY_FAILURE
    try:
        broker.become_spool_user()
        outcome = turned.send_and_turn(config, host, fds)
        status = _TURNED if outcome.is_done else _REFUSED
        if not outcome.is_done:
            click.echo(f"{host}: {outcome.code} {outcome.enhanced} {outcome.text}", err=True)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("turn")
    finally:
        os._exit(status)


def be_receiver(config: Config, host: str, fds: tuple[int, int]) -> None:
    """Greet, and take what the host has for us: with the rights of anybody, as by `receive`."""
    for place, fd in enumerate(fds):
        os.dup2(fd, place)
    log.write("turned", host=host)
    inetd.serve_client(config, Peer("stream"), is_lmtp=False)
