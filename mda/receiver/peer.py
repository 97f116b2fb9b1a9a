"""Who is at the other end of a connection, as the kernel says it (design, decision 8)."""

from __future__ import annotations

import _socket
import os
import pwd
import sys

from mda.model import Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config

_NOBODY = 65534
_UCRED = 12  # struct ucred: pid, uid, gid


def identify(fd: int, config: Config) -> Peer:
    """Read the peer of descriptor `fd` before the processes split.

    A pipe, a pseudo-terminal or a serial line is a "stream": nobody is verified there.
    """
    try:
        connection = _socket.socket(fileno=os.dup(fd))
    except OSError:
        return Peer("stream")
    try:
        if connection.family == _socket.AF_UNIX:
            return _identify_local(connection, config)
        if connection.family in (_socket.AF_INET, _socket.AF_INET6):
            return _identify_remote(connection, config)
        return Peer("stream")
    except OSError:
        return Peer("stream")  # it has gone away already
    finally:
        connection.close()


def _identify_local(connection: _socket.socket, config: Config) -> Peer:
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED)
    uid = int.from_bytes(credentials[4:8], sys.byteorder)
    return local_peer(uid, config)


def local_peer(uid: int, config: Config) -> Peer:
    """The peer that is the local user `uid`: a verified person, an MTA, or a program.

    Persons and root may use terminals, where the host's configuration lets local peers.
    """
    user = _name_of(uid)
    is_trusted = bool(user) and user in config.receiver.trusted_users
    is_person = (
        config.recipients.uid_min <= uid <= config.recipients.uid_max
        and uid != _NOBODY
        and not is_trusted
    )
    # Run by a user for that user alone, whoever owns the process is a person.
    is_person = is_person or (uid != 0 and uid == os.geteuid())
    return Peer(
        "unix",
        f"uid {uid}",
        uid,
        user if is_person else "",
        is_trusted,
        _may_use_terminals("local", config) and (is_person or uid == 0),
    )


def _identify_remote(connection: _socket.socket, config: Config) -> Peer:
    address = str(connection.getpeername()[0]).split("%")[0].removeprefix("::ffff:")
    where = "loopback" if address.startswith("127.") or address == "::1" else "all"
    return Peer("tcp", address, may_use_terminals=_may_use_terminals(where, config))


def _may_use_terminals(where: str, config: Config) -> bool:
    peers = config.terminal.peers
    return config.terminal.enabled and (where in peers or "all" in peers)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
