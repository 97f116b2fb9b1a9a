"""A run of the queue: each message that is due is tried once more.

One run is at work at a time; another waits for it. Messages are tried side by side, so many
in all and so many at each hop. What a busy hop has to wait for stands in a line of its own,
by name only, and holds up nobody else.
"""

from __future__ import annotations

import collections
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from filelock import FileLock

from mda import log
from mda.config import queue_directory
from mda.outbound import queue
from mda.outbound.attempt import Attempts
from mda.outbound.queue import Unreadable, Waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from mda.config import Config
    from mda.outbound.attempt import Way

_PUT_OFF_SECONDS = 900
# How long until the folders are looked at again, and where the lines are full.
_LOOK_SECONDS = 5
_LOOK_SECONDS_FULL = 60
_LONGEST_LINES = 20_000  # names, in all lines


def run(config: Config, *, is_now: bool = False) -> None:
    """Try what is due, or with `is_now` all that waits, until nothing is left to try.

    Raises OSError where the queue cannot be read, or nothing can be kept in it.
    """
    directory = queue_directory(config)
    queue.make_folders(directory)
    with FileLock(os.path.join(directory, "run.lock"), mode=0o600):
        queue.sweep(directory)
        with ThreadPoolExecutor(config.outbound.connections) as pool:
            Run(config, directory, pool, is_now=is_now).work()


class Run:
    """What is under way in one run, and what waits for a free connection to its hop."""

    def __init__(
        self, config: Config, directory: str, pool: ThreadPoolExecutor, *, is_now: bool
    ) -> None:
        self._settings = config.outbound
        self._attempts = Attempts(config)
        self._directory = directory
        self._pool = pool
        self._is_now = is_now
        self._under_way: dict[Future[None], tuple[str, tuple[str, ...]]] = {}
        self._busy: collections.Counter[str] = collections.Counter()
        self._lines: dict[str, collections.deque[tuple[str, str]]] = {}
        self._in_line: set[str] = set()
        self._done_with: set[str] = set()
        self._has_left_out = False

    def work(self) -> None:
        """Look for what is due and try it, again and again until nothing is."""
        while self._look() or self._under_way:
            seconds = _LOOK_SECONDS_FULL if self._has_left_out else _LOOK_SECONDS
            until = time.monotonic() + seconds
            while self._under_way and time.monotonic() < until:
                self._collect(until - time.monotonic())

    def _look(self) -> bool:
        """Take up all that is due; whether there was more than the lines can hold."""
        self._has_left_out = False
        for folder, name in self._list_due():
            self._take(folder, name)
            while len(self._under_way) >= self._settings.connections:
                self._collect(None)
        return self._has_left_out

    def _list_due(self) -> Iterator[tuple[str, str]]:
        busy = {name for name, _ in self._under_way.values()} | self._in_line
        for folder in ("new", "wait"):
            for name, due in queue.list_names(self._directory, folder):
                is_due = folder == "new" or self._is_now or due <= time.time()
                if is_due and name not in busy and name not in self._done_with:
                    yield folder, name

    def _take(self, folder: str, name: str) -> None:
        """Begin a try, or put the message in the line of a hop that is busy."""
        message = self._read(folder, name)
        if message is None:
            return
        ways = self._attempts.find_ways(message)
        most = self._settings.connections_per_hop
        full = next((key for key in ways if self._busy[key] >= most), None)
        if full is None:
            self._begin(message, ways)
            return
        message.release()
        if len(self._in_line) < _LONGEST_LINES:
            self._lines.setdefault(full, collections.deque()).append((folder, name))
            self._in_line.add(name)
        else:
            self._has_left_out = True

    def _read(self, folder: str, name: str) -> Waiting | None:
        try:
            return Waiting(self._directory, folder, name, is_claimed=True)
        except (FileNotFoundError, BlockingIOError):
            return None  # held or removed in the meantime, or another's to send
        except Unreadable as error:
            log.write("queue", log.ERROR, queue=name, error=f"held, since unreadable: {error}")
            held = os.path.join(self._directory, "held", name)
            os.rename(os.path.join(self._directory, folder, name), held)
            return None

    def _begin(self, message: Waiting, ways: dict[str, Way]) -> None:
        if self._is_now:
            self._done_with.add(message.name)
        job = self._pool.submit(self._try, message, ways)
        self._under_way[job] = (message.name, tuple(ways))
        self._busy.update(ways.keys())

    def _collect(self, seconds: float | None) -> None:
        """Wait for a try to end, and let the next in the lines of its hops begin."""
        ended, _ = wait(self._under_way, timeout=seconds, return_when=FIRST_COMPLETED)
        for job in ended:
            _, keys = self._under_way.pop(job)
            self._busy.subtract(keys)
            job.result()
            for key in keys:
                self._take_next(key)

    def _take_next(self, key: str) -> None:
        """As many from the line of a hop as it has connections free."""
        line = self._lines.get(key)
        while line and self._busy[key] < self._settings.connections_per_hop:
            folder, name = line.popleft()
            self._in_line.discard(name)
            self._take(folder, name)

    def _try(self, message: Waiting, ways: dict[str, Way]) -> None:
        """One try; the outermost function of its thread."""
        try:
            self._attempts.make(message, ways)
        except FileNotFoundError:
            log.write("queue", queue=message.name, note="held or removed while it was tried")
            self._done_with.add(message.name)
        except Exception:  # noqa: BLE001 (the outermost of this thread)
            log.write_traceback("queue")
            # What went wrong unforeseen is not to go wrong again at once. Where not even
            # this can be kept the whole run ends, with OSError.
            self._done_with.add(message.name)
            self._attempts.put_off(message, _PUT_OFF_SECONDS)
        finally:
            message.release()
