"""A file that is written whole, or not at all."""

from __future__ import annotations

import os


def write_whole(path: str, content: bytes, mode: int) -> None:
    """Write the file under another name and put it in place when it is on the disk.

    Raises OSError, and then everything is as before.
    """
    fresh = f"{path}.mda-{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as target:
            target.write(content)
            target.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(fresh, path)
    except OSError:
        os.unlink(fresh)
        raise
