"""How many messages a minute one sender may send, and one recipient gets, on terminals.

Each has a line in one file of the host's, guarded by `filelock`: a name, and the moment
at which all that was taken is paid back. So nothing is counted one by one, and a line
whose moment has passed says nothing any more.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_MINUTE = 60.0
_WAIT_SECONDS = 2.0
# More names than that in one minute, and what is new is refused.
MOST_NAMES = 4096
_LARGEST = 1 << 20

Limit = tuple[str, int]


def take(path: str, limits: Iterable[Limit], *, is_trial: bool = False) -> bool:
    """Is one more message within all `limits`, and if so, count it unless `is_trial`.

    A limit is a name without spaces and how many a minute; at first, or after a pause, as
    many may come at once. Raises OSError where nothing can be counted.
    """
    import filelock  # here, since it costs 58 ms and only a terminal message needs it

    try:
        with filelock.FileLock(f"{path}.lock", timeout=_WAIT_SECONDS, mode=0o600):
            return _take(path, limits, time.monotonic(), is_trial=is_trial)
    except filelock.Timeout as error:
        raise BlockingIOError(str(error)) from error


def _take(path: str, limits: Iterable[Limit], now: float, *, is_trial: bool) -> bool:
    moments = _read(path, now)
    for name, most in limits:
        moment = moments.get(name, now) + _MINUTE / most
        is_full = name not in moments and len(moments) >= MOST_NAMES
        if is_full or moment > now + _MINUTE:
            return False
        moments[name] = moment
    if not is_trial:
        _write(path, moments)
    return True


def _read(path: str, now: float) -> dict[str, float]:
    """The moments that are still to come; a line that is torn, or of another boot, is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with open(fd, "rb") as file:
        lines = file.read(_LARGEST).decode("ascii", "replace").split("\n")
    moments = {}
    for line in lines:
        name, _, moment = line.partition(" ")
        try:
            until = float(moment)
        except ValueError:
            continue
        if now < until <= now + _MINUTE:
            moments[name] = until
    return moments


def _write(path: str, moments: dict[str, float]) -> None:
    text = "".join(f"{name} {moment:.3f}\n" for name, moment in moments.items())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(text.encode("ascii", "replace"))
        file.truncate()
