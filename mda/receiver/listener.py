"""`mda serve`: the preloaded listener.

Three kinds of process: this master accepts, and forks a broker for each connection; a
nursery, with everything loaded that parses, forks the sessions, and each of them drops to
the session user before it reads an octet. So a broker has never loaded what a session
needs (design, decision 1), and no connection pays for an import. The nursery itself keeps
root's uid and reads nothing but what the master says, so that no session can stop it.
For a moment after the start there is one more, which undoes what killed deliveries left.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import stat
import time

from mda import broker, log, wire
from mda.config import official_name
from mda.model import Peer
from mda.receiver import replies
from mda.receiver.inetd import be_sender
from mda.receiver.peer import identify, is_on_smtp_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from mda.config import Config
    from mda.model import Account, Outcome
    from mda.receiver.replies import Reason

_BACKLOG = 512
_NOT_ON_PORT_25 = "LMTP must not be spoken on TCP port 25 (RFC 2033 5)"
_PATIENCE = 90  # seconds for running sessions at the end: above any delivery's deadline


class AddressError(Exception):
    """What stands after --listen is no address of ours."""


class Listening:
    """A listening socket and the protocol spoken there.

    `made` is (path, device, inode) of a socket in the file system that is ours to remove.
    """

    __slots__ = ("_made", "is_lmtp", "name", "socket")

    def __init__(
        self,
        name: str,
        listening: socket.socket,
        is_lmtp: bool,
        made: tuple[str, int, int] | None = None,
    ) -> None:
        self.name = name
        self.socket = listening
        self.is_lmtp = is_lmtp
        self._made = made

    def close(self) -> None:
        """Listen no more; a socket in the file system that we have made goes too."""
        self.socket.close()
        if self._made is None:
            return
        path, device, inode = self._made
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if (status.st_dev, status.st_ino) == (device, inode):
                os.unlink(path)


def open_listening(address: str, mode: int) -> Listening:
    """Listen on `HOST:PORT`, `unix:/path`, or one of them after `lmtp+`.

    `mode` is for a Unix socket. Raises AddressError or OSError.
    """
    is_lmtp = address.startswith("lmtp+")
    place = address.removeprefix("lmtp+")
    if place.startswith("unix:"):
        path = place.removeprefix("unix:")
        listening = _listen_on_path(path, mode)
        status = os.lstat(path)
        return Listening(address, listening, is_lmtp, (path, status.st_dev, status.st_ino))
    host, port = split_host_port(place)
    if is_lmtp and port == 25:
        raise AddressError(f"{address}: {_NOT_ON_PORT_25}")
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
    """A socket where nobody listens; connecting to any other file is refused too."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def inherited_sockets() -> list[Listening]:
    """The sockets that systemd hands over; their names say which protocol is spoken.

    Raises AddressError.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    names += ["smtp"] * (count - len(names))
    found = []
    for number in range(count):
        is_lmtp = names[number] == "lmtp"
        if is_lmtp and is_on_smtp_port(3 + number):
            raise AddressError(_NOT_ON_PORT_25)
        listening = socket.socket(fileno=3 + number)
        found.append(Listening(names[number], listening, is_lmtp))
    return found


class Nursery:
    """The process that forks sessions; the master's end of it."""

    def __init__(self, config: Config, identities: broker.Identities) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One that does not take what it is given is replaced, never waited for.
        self._control.setblocking(False)
        self.pid = os.fork()
        if self.pid == 0:
            status = broker.TEMPORARY_FAILURE
            try:
                status = run_nursery(theirs, config, identities)
            except Exception:  # noqa: BLE001 (the outermost of this process)
                log.write_traceback("nursery")
            finally:
                os._exit(status)
        theirs.close()

    def hand_over(self, client: socket.socket, link: socket.socket, row: bytes) -> None:
        """Give one client and the way to its broker to a new session; raises OSError."""
        socket.send_fds(self._control, [row], [client.fileno(), link.fileno()])

    def close(self) -> None:
        """No new sessions from it; those that it has go on, and it ends."""
        self._control.close()


def run_nursery(control: socket.socket, config: Config, identities: broker.Identities) -> int:
    """The nursery's whole life: fork a session for each client until the master hangs up."""
    # The master's wake-up descriptor would soon be some client's here.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A Control-C at the master's terminal is the master's to act on.
    os.setsid()
    broker.keep_only(control.fileno())
    broker.leave_client()
    from mda.receiver import session  # in this process alone

    gc.collect()
    gc.freeze()
    while True:
        row, fds, _flags, _ = socket.recv_fds(control, 4096, 2)
        if len(fds) != 2:
            return 0
        try:
            if os.fork() == 0:
                control.close()
                _be_session(session.converse, row, fds, config, identities)
        except OSError as error:
            log.write("fork", log.ERROR, error=str(error))
        for fd in fds:
            os.close(fd)


def _be_session(
    converse: Callable[..., None],
    row: bytes,
    fds: list[int],
    config: Config,
    identities: broker.Identities,
) -> NoReturn:
    client, link = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def load() -> Callable[[wire.Broker], int]:
        peer, is_lmtp = unpack_peer(row)

        def run(channel: wire.Broker) -> int:
            converse((client, client), channel, config, peer, is_lmtp=is_lmtp)
            return 0

        return run

    broker.be_session(identities, config, wire.Broker(socket.socket(fileno=link)), load)


# What a peer has or has not, each a character of the row.
_RIGHTS = tuple(name for name in Peer.__slots__ if name.startswith(("is_", "may_")))


def pack_peer(peer: Peer, is_lmtp: bool) -> bytes:
    """The peer as the master has read it, for the nursery."""
    return wire.pack(
        peer.kind.encode(),
        peer.address.encode(),
        b"%d" % peer.uid,
        os.fsencode(peer.user),
        bytes(b"01"[getattr(peer, right)] for right in _RIGHTS),
        " ".join(peer.turn_hosts).encode(),
        b"lmtp" if is_lmtp else b"smtp",
    )


def unpack_peer(row: bytes) -> tuple[Peer, bool]:
    """The reverse of `pack_peer`; raises WireError."""
    kind, address, uid, user, flags, turn_hosts, protocol = wire.unpack(row)
    peer = Peer(
        "unix" if kind == b"unix" else "tcp",
        address.decode(),
        int(uid),
        os.fsdecode(user),
        turn_hosts=tuple(turn_hosts.decode().split()),
    )
    for right, flag in zip(_RIGHTS, flags, strict=True):
        setattr(peer, right, flag == ord("1"))
    return peer, protocol == b"lmtp"


def _leave_everything() -> None:
    """In a child of the master's: hold none of its sockets, write to none of its pipes."""
    signal.set_wakeup_fd(-1)
    broker.keep_only(2)
    broker.leave_client()


def _log_repair(account: Account, notes: list[str], failure: Outcome | None) -> None:
    for note in [*notes, *([failure.text] if failure else [])]:
        log.write("mailbox", log.WARNING, user=account.user, note=note)


class Master:
    """Accepts, counts, forks brokers, and hands clients to the nursery."""

    def __init__(
        self, listening: list[Listening], reload: Callable[[], Config | None], config: Config
    ) -> None:
        self._listening = {each.socket.fileno(): each for each in listening}
        self._reload = reload
        self._config = config
        self._identities = broker.Identities(config)
        self._peer_of: dict[int, Peer] = {}  # by the pid of the peer's broker
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
        self._start_repair()
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
        if not self._must_reload:
            return
        self._must_reload = False
        config = self._reload()
        if config is None:
            return
        try:
            identities = broker.Identities(config)
            nursery = Nursery(config, identities)
        except (broker.SetupError, OSError) as error:
            log.write("configuration", log.ERROR, error=str(error), kept="old")
            return
        self._nursery.close()
        self._config, self._identities, self._nursery = config, identities, nursery
        log.write("configuration", kept="new")

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._peer_of.pop(pid, None)

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
                self._send_away(client, replies.TOO_MANY_CONNECTIONS)
                return
            try:
                self._start(client, peer, listening.is_lmtp)
            except OSError as error:
                log.write("fork", log.ERROR, error=str(error))
                self._send_away(client, replies.NO_ROOM)

    def _may_enter(self, peer: Peer) -> bool:
        """Bounded in all and per user, and nobody shuts the host's own MTA out.

        The network's clients together leave a quarter of the places to local users.
        """
        self._reap()
        receiver = self._config.receiver
        if peer.is_trusted or peer.uid in (0, os.geteuid()):
            return True
        if peer.kind != "unix":
            remote = sum(1 for each in self._peer_of.values() if each.kind != "unix")
            return remote < max(1, receiver.connections * 3 // 4)
        held = sum(1 for each in self._peer_of.values() if each.uid == peer.uid)
        return held < receiver.connections_per_user and len(self._peer_of) < receiver.connections

    def _send_away(self, client: socket.socket, reason: Reason) -> None:
        reply = replies.unavailable(official_name(self._config), reason).render()
        client.setblocking(False)
        try:
            client.send(reply)
        except OSError:
            log.write("lost")

    def _start(self, client: socket.socket, peer: Peer, is_lmtp: bool) -> None:
        """A broker of our own, then a session of the nursery's; raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                self._be_broker(ours, client, peer)
            self._peer_of[pid] = peer
            self._hand_over(client, theirs, pack_peer(peer, is_lmtp))

    def _hand_over(self, client: socket.socket, link: socket.socket, row: bytes) -> None:
        try:
            self._nursery.hand_over(client, link, row)
        except OSError as error:
            log.write("nursery-gone", log.ERROR, error=str(error))
            self._nursery.close()
            self._nursery = Nursery(self._config, self._identities)
            self._nursery.hand_over(client, link, row)

    def _be_broker(self, link: socket.socket, client: socket.socket, peer: Peer) -> NoReturn:
        status = broker.TEMPORARY_FAILURE
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Of who may say TURN the broker keeps the descriptor; it reads nothing from it.
            kept = [client.fileno()] if peer.turn_hosts else []
            broker.keep_only(link.fileno(), *kept)
            broker.leave_client()
            host = broker.answer_requests(link, self._config, peer, self._identities)
            if host:
                be_sender(self._config, host, (client.fileno(), client.fileno()))
            status = 0
        except Exception:  # noqa: BLE001 (the outermost of this process)
            log.write_traceback("broker")
        finally:
            os._exit(status)

    def _start_repair(self) -> None:
        """Mend what killed deliveries have left, while the first clients are served."""
        try:
            broker.start_repair(self._config, self._identities, _leave_everything, _log_repair)
        except OSError as error:
            log.write("fork", log.ERROR, error=str(error))

    def _stop(self) -> None:
        """No new connections; each delivery in hand is finished and answered."""
        for each in self._listening.values():
            each.close()
        self._nursery.close()
        signal.set_wakeup_fd(-1)
        until = time.monotonic() + _PATIENCE
        # A broker that is told tells its session, which says 421 between two commands. One
        # that has only just been forked may not hear it yet, so all are told again.
        while self._peer_of and time.monotonic() < until:
            for pid in self._peer_of:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            self._reap()
            time.sleep(0.02)
