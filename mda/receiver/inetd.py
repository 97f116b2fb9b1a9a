"""`mda receive`: one connection on standard input and output.

inetd and systemd start one of these for each client, so what stands between exec and
the greeting is counted in milliseconds: this file imports nothing that a greeting can
do without, and reads its own arguments (design, decision 10).
"""

from __future__ import annotations

import os
import stat

from mda import broker, log
from mda.config import CONFIG_FILE, Config, ConfigError, load, official_name
from mda.receiver import admission, replies
from mda.receiver.peer import identify, is_on_smtp_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.model import Peer
    from mda.receiver.replies import Reason
    from mda.wire import Broker

USAGE = "usage: mda receive [--protocol smtp|lmtp] [--config FILE]\n"
BAD_USAGE = 2


def main(arguments: list[str]) -> int:
    """Serve one client; the exit status is 0 however the client behaves."""
    log.open_log(may_use_stderr=not log.is_clients_stderr())
    protect_client()
    options = parse_arguments(arguments)
    if options is None:
        os.write(2, USAGE.encode())
        return BAD_USAGE
    protocol, config_file = options
    try:
        return receive(config_file, is_lmtp=protocol == "lmtp")
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("receive")
        return broker.TEMPORARY_FAILURE


def parse_arguments(arguments: list[str]) -> tuple[str, str] | None:
    """(protocol, configuration file), or None for arguments that are not ours."""
    options = {"--protocol": "smtp", "--config": CONFIG_FILE}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in options:
            return None
        options[name] = value if equals else next(words, "")
    if options["--protocol"] not in ("smtp", "lmtp") or not options["--config"]:
        return None
    return options["--protocol"], options["--config"]


def protect_client() -> None:
    """Under inetd standard error is the client's socket: nothing may be written to it."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(2).st_mode)
    except OSError:
        is_socket = True
    if is_socket and log.is_clients_stderr():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        if null != 2:
            os.close(null)


def receive(config_file: str, *, is_lmtp: bool) -> int:
    """Admit the client, split, and let the two processes serve it."""
    try:
        config = load(config_file)
    except ConfigError as error:
        log.write("configuration", log.ERROR, error=str(error))
        return send_away(Config(), replies.NOT_CONFIGURED)
    if is_lmtp and is_on_smtp_port(0):
        log.write("configuration", log.ERROR, error="LMTP is not for TCP port 25 (RFC 2033 5)")
        return send_away(config, replies.NOT_CONFIGURED)
    peer = identify(0, config)
    slot = admission.take_slot(peer, config)
    if slot is None:
        log.write("too-many-connections", log.WARNING, peer=peer.address)
        return send_away(config, replies.TOO_MANY_CONNECTIONS)
    if not (peer.turn_hosts and os.isatty(0)):
        return serve_client(config, peer, is_lmtp=is_lmtp)
    from mda.line import RawMode  # only for a serial line that the configuration names

    with RawMode(0):
        return serve_client(config, peer, is_lmtp=is_lmtp)


def serve_client(config: Config, peer: Peer, *, is_lmtp: bool) -> int:
    """Split, serve the client on standard input and output, and send where it turns that."""
    # Of who may say TURN the broker keeps the descriptors; it reads nothing from them.
    kept = (os.dup(0), os.dup(1)) if peer.turn_hosts else None
    try:
        _, host = broker.split(config, peer, lambda: load_session(config, peer, is_lmtp))
        if host and kept:
            be_sender(config, host, kept)
    except broker.SetupError as error:
        log.write("setup", log.ERROR, error=str(error))
        return send_away(config, replies.NOT_CONFIGURED)
    return 0


def be_sender(config: Config, host: str, fds: tuple[int, int]) -> None:
    """The broker becomes the owner of the queue for good, and the sender (RFC 821 3.8).

    Raises SetupError.
    """
    broker.become_spool_user()
    from mda.outbound import turned

    turned.serve(config, host, fds)


def load_session(config: Config, peer: Peer, is_lmtp: bool) -> Callable[[Broker], int]:
    """In the session process alone: load the code that parses what a client says."""
    from mda.receiver.session import converse

    def run(link: Broker) -> int:
        converse((0, 1), link, config, peer, is_lmtp=is_lmtp)
        return 0

    return run


def send_away(config: Config, reason: Reason) -> int:
    """421 in place of the greeting."""
    try:
        os.write(1, replies.unavailable(official_name(config), reason).render())
    except OSError:
        log.write("lost")
    return 0
