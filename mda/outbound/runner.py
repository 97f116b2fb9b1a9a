"""A run of the queue: each message that is due is tried once more.

One run is at work at a time; another waits for it. Messages are tried side by side, bounded
in all and for each hop; a hop that does not answer is left alone for a while, so that it
holds up nobody else.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial

from filelock import FileLock

from mda import log
from mda.config import LMTP_SOCKET, local_domains, official_name, queue_directory
from mda.model import VERBS, Outcome
from mda.outbound import notice, queue, sender
from mda.outbound.dialogue import MOST_RECIPIENTS, NO_TLS, Request, Result
from mda.outbound.queue import Addressee, Envelope, Waiting
from mda.outbound.route import Hop, find_addresses, find_hop
from mda.outbound.text import Measures, unquote
from mda.receiver.domains import Domains
from mda.receiver.grammar import read_path, spell_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mda.config import Config

SENDMAIL = "/usr/sbin/sendmail"
_SENDMAIL_SECONDS = 600
# What sendmail's exit status says is final: bad data, no user, no host, no permission.
_FINAL_STATUS = (65, 67, 68, 77)
_MOST_WAITING_FOR_HOP = 50
_DOWN_SECONDS = 60
_PUT_OFF_SECONDS = 900
_LOOK_SECONDS = 5
_LONGEST_LINE = 1000  # octets with CRLF (RFC 821 4.5.3)
_HEAD = 65_536
_LINE_TOO_LONG = Outcome(554, "5.6.0", "A line longer than 1,000 octets, which no hop need take")
_HOP_DOWN = Outcome(451, "4.4.1", "The next host did not answer a moment ago")
_NULL = b""


def run(config: Config, *, is_now: bool = False) -> int:
    """Try what is due, or with `is_now` all that waits; the number of tries.

    Raises OSError where the queue cannot be read.
    """
    directory = queue_directory(config)
    queue.make_folders(directory)
    with FileLock(os.path.join(directory, "run.lock"), mode=0o600):
        queue.sweep(directory)
        return Run(config, directory, is_now=is_now).work()


class Run:
    """What one run knows: what is under way, and which hops are down."""

    def __init__(self, config: Config, directory: str, *, is_now: bool) -> None:
        self._config = config
        self._directory = directory
        self._began = time.time()
        self._is_now = is_now
        self._under_way: dict[Future[None], tuple[str, set[str]]] = {}
        self._tried: set[str] = set()
        self._lock = threading.Lock()
        self._down: dict[str, float] = {}
        self._slots: dict[str, threading.Semaphore] = {}

    def work(self) -> int:
        """Go on until nothing is due."""
        count = 0
        with ThreadPoolExecutor(self._config.outbound.connections) as pool:
            while True:
                is_held_back = False
                for name, folder in self._list_due():
                    is_begun = self._begin(pool, folder, name)
                    count += is_begun
                    is_held_back = is_held_back or not is_begun
                    self._collect(most=4 * self._config.outbound.connections)
                if not self._under_way and not is_held_back:
                    return count
                self._collect(most=0, seconds=_LOOK_SECONDS)

    def _list_due(self) -> Iterator[tuple[str, str]]:
        busy = {name for name, _ in self._under_way.values()}
        for folder in ("new", "wait"):
            for name, due in queue.list_names(self._directory, folder):
                is_due = folder == "new" or self._is_now or due <= time.time()
                if is_due and name not in busy and name not in self._tried:
                    yield name, folder

    def _begin(self, pool: ThreadPoolExecutor, folder: str, name: str) -> bool:
        """Start a try; False where too many wait for one of its hops already."""
        try:
            waiting = Waiting(self._directory, folder, name)
        except FileNotFoundError:
            return True
        except queue.Unreadable as error:
            log.write("queue", log.ERROR, queue=name, error=f"held, since unreadable: {error}")
            places = (os.path.join(self._directory, each, name) for each in (folder, "held"))
            os.rename(*places)
            return True
        hops = self._group(waiting)
        for key in hops:
            asking = sum(key in keys for _, keys in self._under_way.values())
            if asking >= _MOST_WAITING_FOR_HOP:
                return False
        if self._is_now:
            self._tried.add(name)
        job = pool.submit(self._try, waiting, hops)
        self._under_way[job] = (name, set(hops))
        return True

    def _collect(self, most: int, seconds: float | None = None) -> None:
        """Wait until at most so many are under way, or for `seconds` until one is done."""
        while len(self._under_way) > most:
            done, _ = wait(self._under_way, timeout=seconds, return_when=FIRST_COMPLETED)
            for job in done:
                del self._under_way[job]
                job.result()
            if seconds is not None:
                return

    def _group(self, waiting: Waiting) -> dict[str, tuple[Hop | None, list[int]]]:
        """The open addressees of each hop, by its key; None for sendmail."""
        groups: dict[str, tuple[Hop | None, list[int]]] = {}
        for number, each in enumerate(waiting.envelope.addressees):
            if each.is_open:
                hop = self._find_hop(each)
                groups.setdefault(hop.key if hop else SENDMAIL, (hop, []))[1].append(number)
        return groups

    def _find_hop(self, addressee: Addressee) -> Hop | None:
        if not addressee.domain:
            return Hop("lmtp", path=LMTP_SOCKET, tls="never")
        if self._config.outbound.via == "sendmail":
            return None
        domain = addressee.domain.decode("utf-8", "replace")
        try:
            return find_hop(domain, vars(self._config.routes), self._config.outbound.smarthost)
        except ValueError as error:
            log.write("queue", log.ERROR, domain=domain, error=f"its route: {error}")
            return Hop("smtp", path="/nonexistent", tls="never")

    def _try(self, waiting: Waiting, hops: dict[str, tuple[Hop | None, list[int]]]) -> None:
        """One try for all that is open; the outermost function of its thread."""
        try:
            # First, so that nothing is sent of which no trace can be kept.
            waiting.note_try()
            for key, (hop, numbers) in hops.items():
                self._try_hop(waiting, key, hop, numbers)
            self._conclude(waiting)
        except FileNotFoundError:
            log.write("queue", queue=waiting.name, note="removed while it was tried")
        except Exception:  # noqa: BLE001 (the outermost of this thread)
            log.write_traceback("queue")
            self._put_off(waiting)

    def _put_off(self, waiting: Waiting) -> None:
        """What went wrong unforeseen is not to go wrong again at once.

        Raises OSError, with which the whole run ends: nothing can be kept in such a queue.
        """
        self._tried.add(waiting.name)
        waiting.wait_until(time.time() + _PUT_OFF_SECONDS)

    def _try_hop(self, waiting: Waiting, key: str, hop: Hop | None, numbers: list[int]) -> None:
        with self._lock:
            slot = self._slots.setdefault(
                key, threading.Semaphore(self._config.outbound.connections_per_hop)
            )
        with slot:
            if self._down.get(key, 0.0) > time.monotonic():
                waiting.note(dict.fromkeys(numbers, _HOP_DOWN))
                return
            while numbers:
                part, numbers = numbers[:MOST_RECIPIENTS], numbers[MOST_RECIPIENTS:]
                result = self._send(waiting, hop, part)
                if result.failure is not None:
                    self._down[key] = time.monotonic() + _DOWN_SECONDS
                    result.settle(result.failure)
                left = [part[at] for at in result.leftover]
                outcomes = {
                    number: outcome
                    for number, outcome in zip(part, result.outcomes, strict=True)
                    if outcome is not None and number not in left
                }
                waiting.note(outcomes)
                self._log(waiting, key, outcomes)
                numbers = left + numbers

    def _send(self, waiting: Waiting, hop: Hop | None, numbers: list[int]) -> Result:
        paths = [spell(waiting.envelope.addressees[number]) for number in numbers]
        read = partial(read_text, waiting)
        if hop is None:
            return send_by_program(waiting.envelope.sender, paths, read())
        measures = Measures(read())
        if measures.longest_line > _LONGEST_LINE and not hop.path:
            result = Result(len(paths))
            result.settle(_LINE_TOO_LONG)
            return result
        request = self._request(waiting, hop, numbers, paths, measures)
        own = local_domains(self._config) | {official_name(self._config).lower()}
        found = find_addresses(hop, own)
        if isinstance(found, Outcome):
            result = Result(len(paths))
            result.settle(found)
            return result
        result = Result(len(paths))
        for host, address in found:
            request.tls = hop.tls
            result = sender.send(address, request, read, host=host)
            is_tls = result.failure is not None and result.failure.enhanced == NO_TLS.enhanced
            if is_tls and hop.tls == "may":
                request.tls = "never"
                result = sender.send(address, request, read, host=host)
            if result.failure is None:
                break
        return result

    def _request(
        self, waiting: Waiting, hop: Hop, numbers: list[int], paths: list[bytes], measures: Measures
    ) -> Request:
        envelope = waiting.envelope
        is_local = hop.path == LMTP_SOCKET
        places = [envelope.addressees[number].place.encode("ascii") for number in numbers]
        return Request(
            VERBS[b"MAIL" if is_local else envelope.verb.encode()],
            envelope.sender,
            paths,
            helo=official_name(self._config),
            parameters=[b"XPLACE=" + each if each else b"" for each in places],
            size=measures.size,
            has_8bit=measures.has_8bit,
            is_utf8=envelope.is_utf8 or not b"".join([envelope.sender, *paths]).isascii(),
            is_lmtp=hop.protocol == "lmtp",
            tls=hop.tls,
        )

    def _log(self, waiting: Waiting, key: str, outcomes: dict[int, Outcome]) -> None:
        for number, outcome in outcomes.items():
            log.write(
                "sent" if outcome.is_done else "deferred" if outcome.is_temporary else "bounced",
                log.INFO if outcome.is_done else log.WARNING,
                queue=waiting.name,
                to=spell(waiting.envelope.addressees[number]),
                sender=waiting.envelope.sender,
                hop=key,
                reply=f"{outcome.code} {outcome.enhanced} {outcome.text}",
            )

    def _conclude(self, waiting: Waiting) -> None:
        """What follows from the try: a notice, another try, or the end."""
        settings = self._config.outbound
        addressees = waiting.envelope.addressees
        age = time.time() - waiting.envelope.came
        if age > settings.give_up_hours * 3600:
            waiting.note({n: give_up(each) for n, each in enumerate(addressees) if each.is_open})
        failed = [n for n, each in enumerate(addressees) if not each.is_open and _is_untold(each)]
        if failed:
            self._tell(waiting, failed)
            waiting.note_told(failed)
        still = [n for n, each in enumerate(addressees) if each.is_open]
        if not still:
            waiting.remove()
            return
        delay = settings.delay_notice_hours * 3600
        if delay and age > delay and not waiting.is_delay_told:
            self._tell(waiting, still, is_delay=True)
            waiting.note_delay_told()
        waiting.wait_until(
            time.time() + pause(waiting.tries, settings.retry_minutes, settings.retry_most_minutes)
        )

    def _tell(self, waiting: Waiting, numbers: list[int], *, is_delay: bool = False) -> None:
        """Queue a notice to the sender; what nobody can be told about goes to postmaster."""
        envelope = waiting.envelope
        to = read_path(envelope.sender)
        is_notice = envelope.verb == "MAIL" and not envelope.sender
        if to is None or not to.text:
            if is_delay or not is_notice or is_to_postmaster(envelope):
                log.write("dropped", log.WARNING, queue=waiting.name, why="nobody to tell")
                return
            target = Addressee(b"postmaster", _NULL)
        elif Domains(self._config, takes_any=False).is_ours(to.domain):
            target = Addressee(to.local_part, _NULL)
        else:
            target = Addressee(to.local_part, to.domain)
        failures = [
            (spell(envelope.addressees[n]), envelope.addressees[n].outcome or _HOP_DOWN)
            for n in numbers
        ]
        head = b"".join(read_text(waiting, most=_HEAD))
        name = official_name(self._config)
        reader = envelope.sender or b"postmaster"
        text = notice.compose(name, reader, failures, head, time.time(), is_delay=is_delay)
        queue.put(self._directory, Envelope("MAIL", _NULL, [target]), [text])


def _is_untold(addressee: Addressee) -> bool:
    outcome = addressee.outcome
    return outcome is not None and not outcome.is_done and not addressee.is_told


def is_to_postmaster(envelope: Envelope) -> bool:
    """Is this the last that can be said about a message: the notice to postmaster?"""
    return [each.local_part for each in envelope.addressees] == [b"postmaster"]


def give_up(addressee: Addressee) -> Outcome:
    """The outcome of what has been tried for too long."""
    last = addressee.outcome.text if addressee.outcome else "never tried"
    return Outcome(554, "5.4.7", f"Given up after many tries: {last}")


def pause(tries: int, first_minutes: int, most_minutes: int) -> float:
    """Seconds until the next try: doubled each time, a tenth more or less by lot."""
    seconds = 60.0 * min(most_minutes, first_minutes * 2.0 ** min(tries - 1, 30))
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311


def spell(addressee: Addressee) -> bytes:
    """The forward-path of an addressee, without brackets."""
    local_part = os.fsdecode(addressee.local_part)
    domain = os.fsdecode(addressee.domain)
    return os.fsencode(spell_path(f"{local_part}@{domain}" if domain else local_part))


def read_text(waiting: Waiting, most: int = 0) -> Iterable[bytes]:
    """The text as it was before it was kept, in pieces; about `most` bytes, 0 for all."""
    pieces = waiting.read_text()
    if waiting.envelope.form == "q":
        pieces = unquote(waiting.read_lines())
    size = 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if 0 < most <= size:
            return


def send_by_program(sender_path: bytes, paths: list[bytes], pieces: Iterable[bytes]) -> Result:
    """Hand the message to the host's own sendmail; its exit status counts for all."""
    result = Result(len(paths))
    command = [SENDMAIL.encode(), b"-i", b"-f", sender_path or b"<>", b"--", *paths]
    try:
        process = subprocess.Popen(  # noqa: S603 (a fixed program, and paths behind --)
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except OSError as error:
        result.settle(Outcome(451, "4.3.5", f"{SENDMAIL}: {error.strerror}"))
        return result
    with process:
        try:
            assert process.stdin is not None  # noqa: S101 (a pipe was asked for)
            for piece in pieces:
                process.stdin.write(piece)
            _, said = process.communicate(timeout=_SENDMAIL_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            said = b""
    text = "".join(c if " " <= c <= "~" else " " for c in said[:300].decode("ascii", "replace"))
    result.settle(judge_status(process.returncode, text.strip()))
    return result


def judge_status(status: int, text: str) -> Outcome:
    """The outcome of sendmail's exit status (sysexits.h); unknown means temporary."""
    if status == 0:
        return Outcome(250, "2.0.0", "Handed to sendmail")
    is_final = status in _FINAL_STATUS
    why = f"sendmail ended with {status}: {text}"
    return Outcome(554, "5.0.0", why) if is_final else Outcome(451, "4.3.0", why)
