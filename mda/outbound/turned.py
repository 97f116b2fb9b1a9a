"""The sender on a channel that a host has turned, or that is about to be (RFC 821 3.8).

Everything that waits for that host goes, due or not, one message after the other, however
long a run of the queue is under way: each message is claimed by who sends it.
"""

from __future__ import annotations

import os
import signal
import time

from mda import log
from mda.config import official_name, queue_directory
from mda.line import Line
from mda.model import Outcome
from mda.outbound import queue
from mda.outbound.attempt import Attempts
from mda.outbound.dialogue import Lost
from mda.outbound.queue import Unreadable, Waiting
from mda.outbound.route import find_hop
from mda.outbound.sender import Conversation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config

_STOPPED = Outcome(451, "4.3.2", "Stopped before everything was sent")


class Patience:
    """SIGTERM and its like end us, but not while a text and its reply are under way."""

    def __init__(self, conversation: Conversation) -> None:
        self.is_over = False
        self._conversation = conversation
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.is_over = True
        self._conversation.stop()


def serve(config: Config, host: str, fds: tuple[int, int]) -> None:
    """Be the sender on descriptors `fds` (to read, to write), behind the 250 for TURN.

    First the peer's 220 is waited for: both sides are as at the beginning.
    """
    conversation = open_conversation(config, host, fds)
    patience = Patience(conversation)
    try:
        conversation.begin()
        try:
            send_waiting(config, conversation, patience)
        finally:
            conversation.end()
    except Lost as lost:
        log.write("lost", host=host, why=lost.outcome.text)
    except OSError as error:
        log.write("queue", log.ERROR, error=str(error))
    finally:
        log.write("sent-by-turn", host=host, messages=conversation.sent)
        conversation.close()


def send_and_turn(config: Config, host: str, fds: tuple[int, int]) -> tuple[int, Outcome]:
    """Be the sender, then ask for the receiver's role: how many messages went, and what the
    peer says to TURN.

    Unless that is 2xx the channel is at its end, and so it is where we are stopped, or our
    parent is, who is to be the receiver. Raises OSError where the queue cannot be read, or what
    became of a message not be kept.
    """
    parent = os.getppid()
    conversation = open_conversation(config, host, fds)
    patience = Patience(conversation)
    outcome = _STOPPED
    try:
        conversation.begin()
        try:
            send_waiting(config, conversation, patience)
            if not patience.is_over and os.getppid() == parent:
                outcome = conversation.turn()
        finally:
            if not outcome.is_done:
                conversation.end()
    except Lost as lost:
        outcome = lost.outcome
    return conversation.sent, outcome


def open_conversation(config: Config, host: str, fds: tuple[int, int]) -> Conversation:
    """The channel, for no longer than a session may last."""
    line = Line(*fds, time.monotonic() + config.receiver.session_seconds)
    return Conversation(line, our_name(config, host), host)


def our_name(config: Config, host: str) -> str:
    """The name by which the host knows us: its route's, or our official one."""
    try:
        hop = find_hop(host, vars(config.routes), config.outbound.smarthost)
    except ValueError:
        return official_name(config)
    return hop.name or official_name(config)


def send_waiting(config: Config, conversation: Conversation, patience: Patience) -> None:
    """All that waits for the host at the other end, the oldest first.

    Raises OSError where the queue cannot be read, and Lost.
    """
    directory = queue_directory(config)
    attempts = Attempts(config, conversation)
    busy: list[tuple[str, str]] = []
    # What a run of the queue has in hand just now may be free when the others are through.
    for places in (list_waiting(directory), busy):
        for place in places:
            if patience.is_over:
                return
            if not send_one(attempts, directory, place, conversation.host) and places is not busy:
                busy.append(place)
            if conversation.loss is not None:
                raise Lost(conversation.loss)


def list_waiting(directory: str) -> list[tuple[str, str]]:
    """Name and folder of each message that is not held, the oldest first; raises OSError."""
    folders = [folder for folder in queue.FOLDERS if folder != "held"]
    return sorted((name, each) for each in folders for name, _ in queue.list_names(directory, each))


def send_one(attempts: Attempts, directory: str, place: tuple[str, str], host: str) -> bool:
    """Send a message as far as it is for `host`; False where somebody else has it in hand.

    Raises OSError where what became of it cannot be kept.
    """
    name, folder = place
    try:
        # What is for others is not claimed, which would hide it from a run of the queue.
        if not attempts.find_way_to(Waiting(directory, folder, name), host):
            return True
        message = Waiting(directory, folder, name, is_claimed=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True  # sent, held or removed in the meantime
    except (Unreadable, OSError) as error:
        log.write("queue", log.ERROR, queue=name, error=f"unreadable: {error}")
        return True
    try:
        # In `new` it would start one run of the queue after the other as long as this takes.
        message.move("wait")
        if way := attempts.find_way_to(message, host):
            attempts.make(message, way)
    except FileNotFoundError:
        log.write("queue", queue=name, note="held or removed while it was tried")
    finally:
        message.release()
    return True
