"""Who is at the other end of a connection, as the kernel says it (design, decision 8)."""

from __future__ import annotations

import _socket
import os
import pwd
import stat
import sys

from mda.config import SPOOL_USER
from mda.model import Peer
from mda.rights import (
    find_turn_hosts,
    find_turn_hosts_on,
    may_ask_names,
    may_use_terminals,
    remote_peer,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config

_ROOT = 0
_NOBODY = 65_534
_NO_UID = 0xFFFFFFFF  # a socket that nobody has ever been connected to
_SMTP_PORT = 25
_UCRED = 12  # struct ucred: pid, uid, gid


def identify(fd: int, config: Config) -> Peer:
    """Read the peer of descriptor `fd`, as this process must before it splits.

    A pipe, a pseudo-terminal or a serial line is a "stream": nobody is verified there. A
    client that has gone away again leaves a socket of its kind with no address.
    """
    connection = _open_socket(fd)
    if connection is None:
        return _identify_stream(fd, config)
    try:
        if connection.family == _socket.AF_UNIX:
            return _identify_local(connection, config)
        if connection.family in (_socket.AF_INET, _socket.AF_INET6):
            return _identify_remote(connection, config)
        return Peer("stream")
    finally:
        connection.close()


def _open_socket(fd: int) -> _socket.socket | None:
    """The socket that `fd` leads to, by a descriptor of its own; None for anything else."""
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        return _socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None


def _identify_stream(fd: int, config: Config) -> Peer:
    try:
        status = os.fstat(fd)
    except OSError:
        return Peer("stream")
    hosts: tuple[str, ...] = ()
    if stat.S_ISFIFO(status.st_mode):
        hosts = find_turn_hosts("pipe", config)
    elif stat.S_ISCHR(status.st_mode) and os.isatty(fd):
        hosts = find_turn_hosts_on(status.st_rdev, config)
    return Peer("stream", turn_hosts=hosts)


def _identify_local(connection: _socket.socket, config: Config) -> Peer:
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED)
    uid = int.from_bytes(credentials[4:8], sys.byteorder)
    if uid == _NO_UID:
        return Peer("unix", may_ask_names=may_ask_names("", config))
    return local_peer(uid, config)


def local_peer(uid: int, config: Config) -> Peer:
    """The peer that is the local user `uid`: a verified person, an MTA, or a program.

    To be asked before the split, like `identify`: whoever runs a receiver without
    privilege runs it for himself and is a person there, whatever his uid; a receiver that
    was root and is the session user now has no such owner. Persons and root may use
    terminals, where the configuration lets local peers.
    """
    user = _name_of(uid)
    is_queue = user == SPOOL_USER
    is_trusted = is_queue or (bool(user) and user in config.receiver.trusted_users)
    is_in_range = config.recipients.uid_min <= uid <= config.recipients.uid_max
    is_person = is_in_range or uid == os.geteuid()
    is_person = is_person and uid not in (_ROOT, _NOBODY) and not is_trusted
    return Peer(
        "unix",
        f"uid {uid}",
        uid,
        user if is_person else "",
        is_trusted,
        may_use_terminals("local", config) and (is_person or uid == _ROOT),
        may_ask_names("", config),
        is_queue=is_queue,
        may_relay=(is_person or uid == _ROOT or user in config.receiver.relay_users)
        and not is_trusted
        and config.outbound.via != "nothing",
        turn_hosts=find_turn_hosts(f"user:{user}", config),
    )


def _identify_remote(connection: _socket.socket, config: Config) -> Peer:
    try:
        name = str(connection.getpeername()[0])
        port = str(connection.getsockname()[1])
    except OSError:
        return Peer("tcp")
    return remote_peer(name.split("%")[0], config, port)


def is_on_smtp_port(fd: int) -> bool:
    """Is this a connection to TCP port 25, where LMTP is never spoken (RFC 2033 5)?"""
    connection = _open_socket(fd)
    if connection is None:
        return False
    try:
        is_tcp = connection.family in (_socket.AF_INET, _socket.AF_INET6)
        return is_tcp and connection.getsockname()[1] == _SMTP_PORT
    except OSError:
        return False
    finally:
        connection.close()


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
