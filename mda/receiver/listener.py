"""`mda serve`: the preloaded listener.

Three kinds of process: this master keeps root's uid and accepts; a nursery, dropped to
the session user and with everything loaded that parses, forks a session for each
connection; and the master forks a broker for it. So a broker has never loaded what a
session needs (design, decision 1), and no connection pays for an import.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time

from mda import broker, log, wire
from mda.config import official_name
from mda.model import Peer
from mda.receiver import replies
from mda.receiver.peer import identify

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.config import Config

RETIRE = b"retire"  # a nursery with an old configuration: sessions go on, no new ones
_BACKLOG = 512
_PATIENCE = 90  # seconds for running sessions at the end: above any delivery's deadline


class AddressError(Exception):
    """What stands after --listen is no address of ours."""


class Listening:
    """A listening socket and the protocol spoken there."""

    __slots__ = ("_path", "is_lmtp", "name", "socket")

    def __init__(self, name: str, listening: socket.socket, is_lmtp: bool, path: str = "") -> None:
        self.name = name
        self.socket = listening
        self.is_lmtp = is_lmtp
        self._path = path

    def close(self) -> None:
        """Listen no more; a socket in the file system that we have made goes too."""
        self.socket.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def open_listening(address: str, mode: int) -> Listening:
    """Listen on `HOST:PORT`, `unix:/path`, or one of them after `lmtp+`.

    `mode` is for a Unix socket. Raises AddressError or OSError.
    """
    is_lmtp = address.startswith("lmtp+")
    place = address.removeprefix("lmtp+")
    if place.startswith("unix:"):
        path = place.removeprefix("unix:")
        return Listening(address, _listen_on_path(path, mode), is_lmtp, path)
    host, port = split_host_port(place)
    if is_lmtp and port == 25:
        raise AddressError(f"{address}: LMTP must not be spoken on port 25 (RFC 2033 5)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(_BACKLOG)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Listening(f"lmtp+{shown}" if is_lmtp else shown, listening, is_lmtp)


def split_host_port(place: str) -> tuple[str, int]:
    """`127.0.0.1:2525` or `[::1]:2525` in two; raises AddressError."""
    host, colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise AddressError(f"{place}: not ADDRESS:PORT or unix:/path") from None
    if not colon or not port.isdigit() or int(port) > 65_535:
        raise AddressError(f"{place}: not a port")
    return host, int(port)


def _listen_on_path(path: str, mode: int) -> socket.socket:
    if not path.startswith("/"):
        raise AddressError(f"{path}: a socket's path begins with /")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
    except OSError:
        # A socket of a listener that is gone is in the way; a live one answers.
        if not _is_dead_socket(path):
            raise
        os.unlink(path)
        listening.bind(path)
    os.chmod(path, mode)
    listening.listen(_BACKLOG)
    return listening


def _is_dead_socket(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def inherited_sockets() -> list[Listening]:
    """The sockets that systemd hands over; their names say which protocol is spoken."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    names += ["smtp"] * (count - len(names))
    found = []
    for number in range(count):
        listening = socket.socket(fileno=3 + number)
        found.append(Listening(names[number], listening, names[number] == "lmtp"))
    return found


class Nursery:
    """The process that forks sessions; the master's end of it."""

    def __init__(self, config: Config, identities: broker.Identities) -> None:
        self._config = config
        self._identities = identities
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            os._exit(run_nursery(theirs, config, identities))
        theirs.close()

    def hand_over(self, client: socket.socket, link: socket.socket, row: bytes) -> None:
        """Give one client and the way to its broker to a new session; raises OSError."""
        socket.send_fds(self._control, [row], [client.fileno(), link.fileno()])

    def retire(self) -> None:
        """No new sessions from it; those that it has go on."""
        try:
            self._control.send(RETIRE)
        except OSError:
            log.write("nursery-gone", log.WARNING)
        self._control.close()

    def close(self) -> None:
        """It ends, and asks its sessions to: between commands they say 421."""
        self._control.close()


def run_nursery(control: socket.socket, config: Config, identities: broker.Identities) -> int:
    """The nursery's whole life, as the session user."""
    # The master's wake-up descriptor would soon be some client's here.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # In a group of its own its sessions can be signalled together, and a Control-C at
    # the master's terminal reaches none of them.
    os.setsid()
    broker.keep_only(control.fileno())
    from mda.receiver import session  # in this process alone, and before the drop

    broker.drop_for_good(identities)
    gc.collect()
    gc.freeze()
    while True:
        row, fds, _flags, _ = socket.recv_fds(control, 4096, 2)
        if row == RETIRE:
            return 0
        if len(fds) != 2:
            os.killpg(0, signal.SIGTERM)
            return 0
        if os.fork() == 0:
            control.close()
            os._exit(_run_session(session.converse, row, fds, config))
        for fd in fds:
            os.close(fd)


def _run_session(converse: Callable[..., None], row: bytes, fds: list[int], config: Config) -> int:
    client, link = fds
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        peer, is_lmtp = unpack_peer(row)
        channel = wire.Broker(socket.socket(fileno=link))
        converse((client, client), channel, config, peer, is_lmtp=is_lmtp)
    except Exception:  # noqa: BLE001 (the outermost of this process)
        log.write_traceback("session")
        return broker.TEMPORARY_FAILURE
    return 0


def pack_peer(peer: Peer, is_lmtp: bool) -> bytes:
    """The peer as the master has read it, for the nursery."""
    return wire.pack(
        peer.kind.encode(),
        peer.address.encode(),
        b"%d" % peer.uid,
        os.fsencode(peer.user),
        b"%d%d" % (peer.is_trusted, peer.may_use_terminals),
        b"lmtp" if is_lmtp else b"smtp",
    )


def unpack_peer(row: bytes) -> tuple[Peer, bool]:
    """The reverse of `pack_peer`; raises WireError."""
    kind, address, uid, user, flags, protocol = wire.unpack(row)
    peer = Peer(
        "unix" if kind == b"unix" else "tcp",
        address.decode(),
        int(uid),
        os.fsdecode(user),
        flags[:1] == b"1",
        flags[1:] == b"1",
    )
    return peer, protocol == b"lmtp"


class Master:
    """Accepts, counts, forks brokers, and hands clients to the nursery."""

    def __init__(
        self, listening: list[Listening], reload: Callable[[], Config | None], config: Config
    ) -> None:
        self._listening = {each.socket.fileno(): each for each in listening}
        self._reload = reload
        self._config = config
        self._identities = broker.Identities(config)
        self._uid_of: dict[int, int] = {}  # a broker's pid, its client's uid
        self._nursery = Nursery(config, self._identities)
        self._is_stopping = False
        self._must_reload = False
        broker.preload()
        gc.collect()
        gc.freeze()
        self._wake_fd, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then wait for the sessions that run."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        for fd, each in self._listening.items():
            each.socket.setblocking(False)
            poll.register(fd, select.POLLIN)
        while not self._is_stopping:
            for fd, _ in poll.poll():
                if fd == self._wake_fd:
                    os.read(self._wake_fd, 4096)
                    self._mind_children()
                else:
                    self._accept(self._listening[fd])
        self._stop()

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._must_reload = True
        elif number != signal.SIGCHLD:
            self._is_stopping = True

    def _mind_children(self) -> None:
        self._reap()
        if self._must_reload:
            self._must_reload = False
            config = self._reload()
            if config is not None:
                self._config = config
                self._nursery.retire()
                self._nursery = Nursery(config, self._identities)

    def _reap(self) -> None:
        try:
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._uid_of.pop(pid, None)
        except ChildProcessError:
            return

    def _accept(self, listening: Listening) -> None:
        try:
            client, _ = listening.socket.accept()
        except OSError as error:
            log.write("accept", log.WARNING, error=str(error))
            return
        with client:
            peer = identify(client.fileno(), self._config)
            if not self._may_enter(peer):
                log.write("too-many-connections", log.WARNING, peer=peer.address)
                self._send_away(client)
                return
            self._start(client, peer, listening.is_lmtp)

    def _may_enter(self, peer: Peer) -> bool:
        self._reap()
        receiver = self._config.receiver
        if len(self._uid_of) >= receiver.connections:
            return False
        if peer.kind != "unix" or peer.is_trusted or peer.uid in (0, os.geteuid()):
            return True
        held = sum(1 for uid in self._uid_of.values() if uid == peer.uid)
        return held < receiver.connections_per_user

    def _send_away(self, client: socket.socket) -> None:
        reply = replies.unavailable(
            official_name(self._config), "4.7.0", "Too many connections"
        ).render()
        client.setblocking(False)
        try:
            client.send(reply)
        except OSError:
            log.write("lost")

    def _start(self, client: socket.socket, peer: Peer, is_lmtp: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            self._hand_over(client, theirs, pack_peer(peer, is_lmtp))
            theirs.close()
            pid = os.fork()
            if pid == 0:
                os._exit(self._be_broker(ours, peer))
            self._uid_of[pid] = peer.uid

    def _hand_over(self, client: socket.socket, link: socket.socket, row: bytes) -> None:
        try:
            self._nursery.hand_over(client, link, row)
        except OSError as error:
            log.write("nursery-gone", log.ERROR, error=str(error))
            self._nursery.close()
            self._nursery = Nursery(self._config, self._identities)
            self._nursery.hand_over(client, link, row)

    def _be_broker(self, link: socket.socket, peer: Peer) -> int:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            broker.keep_only(link.fileno())
            broker.leave_client()
            broker.answer_requests(link, self._config, peer, self._identities)
        except Exception:  # noqa: BLE001 (the outermost of this process)
            log.write_traceback("broker")
            return broker.TEMPORARY_FAILURE
        return 0

    def _stop(self) -> None:
        """No new connections; each delivery in hand is finished and answered."""
        for each in self._listening.values():
            each.close()
        self._nursery.close()
        signal.set_wakeup_fd(-1)
        until = time.monotonic() + _PATIENCE
        while self._uid_of and time.monotonic() < until:
            self._reap()
            time.sleep(0.02)
