"""How many connections one local user may hold at a time.

Under Accept=yes every connection is a process of its own, so the count is kept by the
kernel: a connection holds a byte-range lock in one file for as long as its broker
lives, and nothing is left to clean up when that is killed.
"""

from __future__ import annotations

import errno
import fcntl
import os

from mda.config import RUN_DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config
    from mda.model import Peer

CONNECTIONS_FILE = RUN_DIRECTORY + "/connections"
_MOST_PER_USER = 256  # the largest value of receiver.connections_per_user
NO_SLOT_NEEDED = -1


def take_slot(peer: Peer, config: Config, file: str = CONNECTIONS_FILE) -> int | None:
    """A descriptor to hold while the connection lasts, or None if there are too many.

    Only local users are counted: an MTA and root are trusted, and the networks' clients
    are systemd's to count. NO_SLOT_NEEDED where nothing is to be held.
    """
    if peer.kind != "unix" or peer.is_trusted or peer.uid <= 0:
        return NO_SLOT_NEEDED
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return NO_SLOT_NEEDED  # not root, or no /run/mda: one user's own receiver
    for number in range(config.receiver.connections_per_user):
        try:
            offset = peer.uid * _MOST_PER_USER + number
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            return fd
    os.close(fd)
    return None
