"""The sender on a channel that a host has turned, or that is about to be (RFC 821 3.8).

Everything that waits for that host goes, due or not, one message after the other, however
long a run of the queue is under way: each message is claimed by who sends it.
"""

from __future__ import annotations

import signal
import time

from mda import log
from mda.config import official_name, queue_directory
from mda.line import Line
from mda.outbound import queue
from mda.outbound.attempt import Attempts
from mda.outbound.dialogue import Lost
from mda.outbound.queue import Unreadable, Waiting
from mda.outbound.route import find_hop
from mda.outbound.sender import Conversation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config
    from mda.model import Outcome


class Patience:
    """SIGTERM and its like end us between two messages, and never within one."""

    def __init__(self) -> None:
        self.is_over = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.is_over = True


def serve(config: Config, host: str, fds: tuple[int, int]) -> None:
    """Be the sender on descriptors `fds` (to read, to write), behind the 250 for TURN.

    First the peer's 220 is waited for: both sides are as at the beginning.
    """
    conversation = Conversation(Line(*fds), our_name(config, host), host)
    try:
        conversation.begin()
    except Lost as lost:
        log.write("lost", host=host, why=lost.outcome.text)
        return
    send_waiting(config, conversation)
    if not conversation.is_lost:
        conversation.end()


def send_and_turn(config: Config, host: str, fds: tuple[int, int]) -> Outcome:
    """Be the sender, then ask for the receiver's role; what the peer says to that.

    Where it refuses, the channel is at its end.
    """
    conversation = Conversation(Line(*fds), our_name(config, host), host)
    try:
        conversation.begin()
        send_waiting(config, conversation)
        outcome = conversation.turn()
    except Lost as lost:
        return lost.outcome
    if not outcome.is_done:
        conversation.end()
    return outcome


def our_name(config: Config, host: str) -> str:
    """The name by which the host knows us: its route's, or our official one."""
    try:
        hop = find_hop(host, vars(config.routes), config.outbound.smarthost)
    except ValueError:
        return official_name(config)
    return hop.name or official_name(config)


def send_waiting(config: Config, conversation: Conversation) -> None:
    """All that waits for the host at the other end, the oldest first."""
    directory = queue_directory(config)
    attempts = Attempts(config, conversation)
    patience = Patience()
    until = time.monotonic() + config.receiver.session_seconds
    busy: list[tuple[str, str]] = []
    # What a run of the queue has in hand just now may be free when the others are through.
    for places in (list_waiting(directory), busy):
        for place in places:
            if conversation.is_lost or patience.is_over or time.monotonic() > until:
                return
            if not send_one(attempts, directory, place, conversation.host) and places is not busy:
                busy.append(place)


def list_waiting(directory: str) -> list[tuple[str, str]]:
    """Name and folder of each message that is not held, the oldest first."""
    folders = [folder for folder in queue.FOLDERS if folder != "held"]
    try:
        names = [(name, each) for each in folders for name, _ in queue.list_names(directory, each)]
    except OSError as error:
        log.write("queue", log.ERROR, error=f"{directory}: {error.strerror}")
        return []
    return sorted(names)


def send_one(attempts: Attempts, directory: str, place: tuple[str, str], host: str) -> bool:
    """Send a message as far as it is for `host`; False where somebody else has it in hand.

    Raises OSError where what became of it cannot be kept.
    """
    name, folder = place
    try:
        message = Waiting(directory, folder, name, is_claimed=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True  # sent, held or removed in the meantime
    except Unreadable as error:
        log.write("queue", log.ERROR, queue=name, error=f"unreadable: {error}")
        return True
    try:
        way = attempts.find_way_to(message, host)
        if way:
            attempts.make(message, way)
    except FileNotFoundError:
        log.write("queue", queue=name, note="held or removed while it was tried")
    finally:
        message.release()
    return True
