"""The session: how long it listens to whom, and what it says to those it sends away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from support.children import in_child
from support.sandbox import UIDS, Sandbox
from support.serving import LMTP, SMTP, Line, connect, dialogue, read_to_end, served, wait_until

from mda import wire
from mda.config import Config
from mda.model import Outcome, Peer
from mda.receiver import replies, session

LISTEN = ("--listen", f"unix:{SMTP}", "--listen", f"lmtp+unix:{LMTP}")
SHUT_DOWN = b"421 4.3.2 mda.test Shutting down, closing transmission channel\r\n"


class Talk:
    """A session in a process of its own; the test is its client and its broker."""

    def __init__(
        self, idle_seconds: float, config: Config, peer: Peer, *, is_lmtp: bool, last_words: float
    ) -> None:
        self.client, theirs = socket.socketpair()
        self.link, session_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.client, self.link):
            each.settimeout(20)
        self.line = Line(self.client)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.client.close()
                self.link.close()
                session._LAST_WORDS = last_words
                broker = wire.Broker(session_link)
                fd = theirs.fileno()
                limits = config.with_values("receiver", idle_seconds=idle_seconds).receiver
                channel = session.Channel(fd, fd, broker.fileno(), limits)
                session.Session(channel, broker, config, peer, is_lmtp=is_lmtp).converse()
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        session_link.close()

    def asked(self) -> list[bytes]:
        """The session's next request."""
        frame, fd = wire.receive_frame(self.link)
        if fd != -1:
            os.close(fd)
        return wire.unpack(frame)

    def answer(self, outcome: Outcome, *more: bytes) -> None:
        wire.send_frame(self.link, wire.pack_outcome(outcome, *more))

    def accept(self, user: bytes = b"alice", *, number: int = 0) -> None:
        """Answer the question of a RCPT: a person with a mailbox."""
        request = self.asked()
        assert (request[0], request[2]) == (wire.RESOLVE, user)
        row = wire.pack(b"%d" % number, b"q", user, b"", b"here")
        wire.send_frame(self.link, wire.pack_rows(Outcome(250, "2.1.5", "ok"), [row]))

    def take_text(self) -> None:
        assert self.asked()[0] == wire.TEXT
        self.answer(Outcome(250, "2.0.0", "ok"))

    def is_gone(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        """The session must have ended, or end now; and without an exception."""
        self.client.close()
        self.link.close()
        try:
            wait_until(self.is_gone)
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            status = os.waitpid(self.pid, 0)[1]
        assert status == 0


@pytest.fixture
def talk() -> Iterator[Callable[..., Talk]]:
    talks: list[Talk] = []

    def start(
        idle_seconds: float = 20,
        *,
        config: Config | None = None,
        peer: Peer | None = None,
        is_lmtp: bool = False,
        last_words: float = 0.2,
    ) -> Talk:
        config = (config or Config()).with_values("receiver", hostname="mda.test")
        peer = peer or Peer("unix", "uid 1002", 1002, "bob", may_use_terminals=True)
        talks.append(Talk(idle_seconds, config, peer, is_lmtp=is_lmtp, last_words=last_words))
        return talks[-1]

    yield start
    with contextlib.ExitStack() as stack:
        for each in talks:
            stack.callback(each.close)


def limited(**receiver: object) -> Config:
    return Config().with_values("receiver", **receiver)


def test_a_client_that_says_nothing_is_sent_away(talk: Callable[..., Talk]) -> None:
    silent = talk(0.3)
    said = silent.line.finish().split(b"\r\n")
    assert said == [
        b"220 mda.test ESMTP mda ready",
        b"421 4.4.2 mda.test Idle for too long, closing transmission channel",
        b"",
    ]


@pytest.mark.parametrize("before", [b"", b"EHLO x\r\nNOOP\r\nNOOP", b"HELO x\r\nMAIL FROM:<b>\r\n"])
def test_an_unfinished_command_does_not_wait_for_ever(
    talk: Callable[..., Talk], before: bytes
) -> None:
    slow = talk(0.4)
    slow.line.say(before)
    assert drip(slow, 0.05).endswith(b"421 4.4.2 mda.test Idle for too long, closing "
                                     b"transmission channel\r\n")  # fmt: skip


def test_a_text_that_drips_does_not_wait_for_ever(talk: Callable[..., Talk]) -> None:
    slow = talk(0.5)
    slow.line.say(b"HELO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\n")
    slow.accept()
    slow.line.say(b"DATA\r\n")
    slow.line.expect(b"354")
    assert b"421 4.4.2" in drip(slow, 0.05)
    assert wire.receive_frame(slow.link) == (b"", -1), "something was asked of the broker"


def test_a_line_without_an_end_does_not_wait_for_ever_either(talk: Callable[..., Talk]) -> None:
    endless = talk(0.4)
    assert b"421 4.4.2" in drip(endless, 0.05, b"x" * 5000)


def drip(slow: Talk, pause: float, octets: bytes = b"x") -> bytes:
    """Say so much every `pause` seconds until the session hangs up; what it said."""
    said = b""
    for _ in range(200):
        if select.select([slow.client], [], [], pause)[0]:
            try:
                more = slow.client.recv(65_536)
            except ConnectionResetError:  # an octet that came too late was not read
                more = b""
            if not more:
                return said
            said += more
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                slow.client.send(octets)
    raise AssertionError("it would listen for ever")


def test_each_whole_command_gives_the_whole_idle_time_again(talk: Callable[..., Talk]) -> None:
    busy = talk(1.0)
    busy.line.expect(b"220")
    for _ in range(6):
        assert not select.select([busy.client], [], [], 0.25)[0]
        busy.line.say(b"NOOP\r\n")
        busy.line.expect(b"250")
    busy.line.say(b"QUIT\r\n")
    assert busy.line.finish().startswith(b"221")


def test_a_slow_line_may_take_longer_for_a_text_than_the_idle_time(
    talk: Callable[..., Talk],
) -> None:
    slow = talk(1.0)
    slow.line.say(b"HELO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\n")
    slow.accept()
    slow.line.say(b"DATA\r\n")
    slow.line.expect(b"354")
    for _ in range(6):
        assert not select.select([slow.client], [], [], 0.25)[0]
        slow.line.say(b"y" * 4094 + b"\r\n")
    slow.line.say(b".\r\n")
    slow.take_text()
    assert slow.asked()[0] == wire.DELIVER
    slow.answer(Outcome(250, "2.0.0", "Delivered"))
    slow.line.expect(b"250 2.0.0 Delivered")


def flood(connection: socket.socket) -> None:
    """Say NOOP until neither side takes anything more, reading nothing."""
    connection.setblocking(False)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while select.select([], [connection], [], 0.2)[1]:
            with contextlib.suppress(BlockingIOError):
                connection.send(b"NOOP\r\n" * 1000)


def test_a_client_that_does_not_read_is_given_up(talk: Callable[..., Talk]) -> None:
    began = time.monotonic()
    deaf = talk(0.5, config=limited(junk_commands=1_000_000))
    flood(deaf.client)
    wait_until(deaf.is_gone)
    assert time.monotonic() - began >= 0.5, "it had its idle time"


def test_a_stop_does_not_wait_for_a_client_that_does_not_read(talk: Callable[..., Talk]) -> None:
    deaf = talk(600, config=limited(junk_commands=1_000_000), last_words=0.2)
    flood(deaf.client)
    assert not deaf.is_gone()
    os.kill(deaf.pid, signal.SIGTERM)
    wait_until(deaf.is_gone)


def test_the_end_of_the_broker_is_said_while_the_client_is_idle(talk: Callable[..., Talk]) -> None:
    idle = talk()
    idle.line.expect(b"220")
    wire.send_frame(idle.link, wire.pack(wire.STOP))
    assert idle.line.finish() == SHUT_DOWN
    lost = talk()
    lost.line.expect(b"220")
    lost.link.close()
    assert lost.line.finish().startswith(b"421 4.3.0 mda.test Local error")


@pytest.mark.parametrize("answer", [b"x", wire.pack(b"250")])
def test_an_answer_that_is_none_ends_the_session_and_not_with_a_traceback(
    talk: Callable[..., Talk], answer: bytes
) -> None:
    confused = talk()
    confused.line.say(b"HELO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\n")
    confused.asked()
    wire.send_frame(confused.link, answer)
    assert b"421 4.3.0 mda.test Local error" in confused.line.finish()


def test_refusals_for_now_are_limited_like_errors(talk: Callable[..., Talk]) -> None:
    guessing = talk(config=limited(errors=5))
    guessing.line.say(b"HELO x\r\nSEND FROM:<b>\r\n" + b"RCPT TO:<alice>\r\n" * 20)
    for _ in range(5):
        guessing.accept()
        assert guessing.asked() == [wire.PROBE, b"0", b"b"]
        guessing.answer(Outcome(450, "4.2.1", "User is not logged in"), b"0")
    said = guessing.line.finish()
    assert said.count(b"\r\n450 4.2.1 ") == 5
    assert said.endswith(b"421 4.7.0 mda.test Too many errors, closing transmission channel\r\n")


def test_recipients_beyond_the_limit_are_no_errors(talk: Callable[..., Talk]) -> None:
    large = talk(config=limited(errors=5, recipients=1))
    large.line.say(b"HELO x\r\nMAIL FROM:<b>\r\n" + b"RCPT TO:<alice>\r\n" * 20)
    large.accept()
    large.line.say(b"DATA\r\n")
    large.line.expect(b"354")


def test_asking_who_is_limited(talk: Callable[..., Talk]) -> None:
    curious = talk(config=limited(errors=5))
    curious.line.say(b"XWHO\r\n" * 20)
    for _ in range(5):
        assert curious.asked() == [wire.WHO]
        curious.answer(Outcome(250, "2.0.0", "1 terminals"), b"1", b"alice /dev/pts/1 0 y")
    said = curious.line.finish()
    assert said.count(b"250-2.0.0 alice /dev/pts/1 0 y\r\n250 2.0.0 1 terminals\r\n") == 5
    assert said.endswith(b"421 4.7.0 mda.test Too many errors, closing transmission channel\r\n")


@pytest.mark.parametrize("kind", ["tcp", "stream"])
def test_who_is_logged_in_is_not_the_networks_to_know(talk: Callable[..., Talk], kind: str) -> None:
    remote = talk(peer=Peer("tcp" if kind == "tcp" else "stream", may_use_terminals=True))
    remote.line.say(b"EHLO x\r\nXWHO\r\nQUIT\r\n")
    said = remote.line.finish()
    assert b"XWHO" not in said
    assert b"500 5.5.2" in said


def test_the_waits_for_all_locks_share_one_deadline(talk: Callable[..., Talk]) -> None:
    lmtp = talk(is_lmtp=True)
    users = [b"alice", b"bob", b"carol"]
    lmtp.line.say(b"LHLO x\r\nMAIL FROM:<b>\r\n")
    for number, user in enumerate(users):
        lmtp.line.say(b"RCPT TO:<%b>\r\n" % user)
        lmtp.accept(user, number=number)
    lmtp.line.say(b"DATA\r\n.\r\n")
    lmtp.take_text()
    deadlines = []
    for number, user in enumerate(users):
        request = lmtp.asked()
        assert request[:3] == [wire.DELIVER, b"MAIL", b"%d" % number]
        deadlines.append(request[-1])
        # So much later that a deadline of its own would be another one.
        assert not select.select([lmtp.link], [], [], 0.05)[0]
        lmtp.answer(Outcome(451, "4.2.0", "Mailbox is locked"))
        lmtp.line.expect(b"451 4.2.0 <%b> Mailbox is locked" % user)
    assert len(set(deadlines)) == 1
    assert int(deadlines[0]) > 0


def hold_lock(sandbox: Sandbox, stack: contextlib.ExitStack, user: str) -> None:
    mailbox = sandbox.root / "mail" / user
    mailbox.touch()
    os.chown(mailbox, UIDS[user], 8)
    fcntl.lockf(stack.enter_context(mailbox.open("r+b")), fcntl.LOCK_EX)


def test_an_lmtp_reply_does_not_wait_for_the_next_lock(sandbox: Sandbox) -> None:
    with served(sandbox, *LISTEN), contextlib.ExitStack() as held:
        hold_lock(sandbox, held, "carol")
        line = Line(connect(sandbox, LMTP, "bob"))
        line.say(b"LHLO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\nRCPT TO:<carol>\r\nDATA\r\n")
        line.say(b"Subject: x\r\n\r\nhello\r\n.\r\n")
        line.expect(b"250 2.0.0 <alice> Delivered")
        assert sandbox.mailbox("carol") == b""
        held.close()
        line.expect(b"250 2.0.0 <carol> Delivered")
        line.say(b"QUIT\r\n")
        line.finish()
    assert (sandbox.mailbox("carol") or b"").endswith(b"\n\nhello\n\n")


def test_locked_mailboxes_are_waited_for_together(sandbox: Sandbox) -> None:
    config = sandbox.configure("[delivery]\nlock_seconds = 1\n")
    text = b"LHLO x\r\nMAIL FROM:<b>\r\n"
    text += b"".join(b"RCPT TO:<%b>\r\n" % user.encode() for user in UIDS)
    text += b"DATA\r\nSubject: x\r\n\r\nhello\r\n.\r\nQUIT\r\n"
    with served(sandbox, "--config", config, *LISTEN), contextlib.ExitStack() as held:
        for user in UIDS:
            hold_lock(sandbox, held, user)
        connection = connect(sandbox, LMTP, "root")
        connection.sendall(text)
        said = read_to_end(connection)
        assert said.count(b"451 4.2.0") == 3
    assert [sandbox.mailbox(user) for user in UIDS] == [b"", b"", b""]


def test_a_verb_for_terminals_over_the_network_is_not_known_where_it_is_not_offered(
    talk: Callable[..., Talk],
) -> None:
    remote = talk(peer=Peer("tcp", "192.0.2.1"))
    remote.line.say(b"EHLO x\r\nSEND FROM:<b>\r\nSOML FROM:<b>\r\nSAML FROM:<b>\r\nQUIT\r\n")
    assert remote.line.finish().count(b"\r\n502 5.5.1") == 3


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000,
        "".join(map(chr, range(256))),
        "a\r\n250 2.0.0 forged",
        "\x1b[2J\x9b1m\u202eevil\udcff",
        "",
    ],
)
def test_a_reply_is_always_lines_of_512_printable_octets(text: str) -> None:
    reply = replies.Reply(451, "4.3.0", text, "between", text)
    rendered = reply.render()
    assert rendered.endswith(b"\r\n")
    lines = rendered[:-2].split(b"\r\n")
    assert [line[:4] for line in lines] == [b"451-", b"451-", b"451 "]
    for line in lines:
        assert len(line) <= 510
        assert all(32 <= octet < 127 for octet in line)
        assert line[4:].startswith(b"4.3.0 ")


def test_an_address_as_long_as_it_may_be_fits_its_reply(sandbox: Sandbox) -> None:
    path = b"RCPT TO:<" + b"x" * 1000 + b">\r\n"
    with served(sandbox, *LISTEN):
        said = dialogue(connect(sandbox, SMTP, "bob"), b"HELO x\r\nMAIL FROM:<b>\r\n" + path)
    assert max(len(line) for line in said.split(b"\r\n")) <= 510
    assert said.split(b"\r\n")[3][:1] == b"5"


def test_a_session_may_not_last_for_ever_however_busy(talk: Callable[..., Talk]) -> None:
    busy = talk(
        config=Config().with_values("receiver", session_seconds=0.4, junk_commands=1_000_000)
    )
    said = b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while b"421" not in said:
            busy.client.sendall(b"NOOP\r\n")
            said += busy.client.recv(65_536)
    assert said.startswith(b"220 mda.test ESMTP mda ready\r\n250 2.0.0 OK\r\n")
    assert b"421 4.4.2 mda.test Session has lasted too long, closing transmission" in said


def test_junk_is_counted_anew_after_each_message_and_not_after_each_sender(
    talk: Callable[..., Talk],
) -> None:
    idle = talk(config=limited(junk_commands=20, errors=1000))
    idle.line.say(b"HELO x\r\n" + b"MAIL FROM:<b>\r\nRSET\r\n" * 30)
    said = idle.line.finish()
    assert said.count(b"\r\n250 2.0.0 OK\r\n") == 19, "HELO is the first of twenty"
    assert said.endswith(
        b"421 4.7.0 mda.test Too many commands without a message, closing transmission channel\r\n"
    )


def test_questions_about_names_are_junk(talk: Callable[..., Talk]) -> None:
    curious = talk(
        config=limited(junk_commands=20),
        peer=Peer("unix", "uid 1002", 1002, "bob", may_ask_names=True),
    )
    curious.line.say(b"VRFY alice\r\n" * 30)
    for _ in range(20):
        assert curious.asked() == [wire.VERIFY, b"alice", b"anything"]
        curious.answer(Outcome(250, "2.1.5", "User"), b"alice", b"")
    said = curious.line.finish()
    assert said.count(b"250 2.1.5 <alice@mda.test>\r\n") == 20
    assert b"421 4.7.0 mda.test Too many commands without a message" in said


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (b"NOOP " + b"x" * 3000 + b"\r\n", 'refused peer="uid 1002" reply="Line too long"'),
        (b"GET / HTTP/1.1\r\n", "This is no HTTP server"),
        (b"WHAT\r\n" * 60, "sent-away"),
        (b"NOOP\r\n" * 110, "sent-away"),
    ],
)
def test_who_is_refused_or_sent_away_is_in_the_log(
    sandbox: Sandbox, said: bytes, line: str
) -> None:
    with served(sandbox, "--listen", f"unix:{SMTP}") as daemon:
        dialogue(connect(sandbox, SMTP, "bob"), said)
        daemon.expect_in_log(line)


def test_a_client_that_always_has_more_to_say_is_sent_away_all_the_same(
    talk: Callable[..., Talk],
) -> None:
    config = Config().with_values("receiver", session_seconds=0.5, errors=10**6, recipients=10**6)
    busy = talk(config=config.with_values("receiver", junk_commands=10**9))
    until = time.monotonic() + 15
    busy.client.settimeout(0.02)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                busy.client.sendall(b"NOOP\r\n" * 2000)
            with contextlib.suppress(TimeoutError):
                if not busy.client.recv(1 << 20):
                    break
    assert time.monotonic() < until
    wait_until(busy.is_gone)


def test_recipients_far_beyond_the_limit_are_errors(
    talk: Callable[..., Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_MOST_EXCESS", 3)
    flood = talk(config=limited(errors=5, recipients=1))
    flood.line.say(b"HELO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\n")
    flood.accept()
    flood.line.say(b"RCPT TO:<alice>\r\n" * 30)
    said = flood.line.finish()
    assert said.count(b"\r\n452 4.5.3 ") == 3 + 5
    assert b"421 4.7.0 mda.test Too many errors" in said


def test_a_message_delivered_forgives_the_errors_before_it(talk: Callable[..., Talk]) -> None:
    busy = talk(config=limited(errors=5), is_lmtp=True)
    busy.line.say(b"LHLO x\r\n")
    for _ in range(4):
        busy.line.say(b"WHAT\r\n" * 3 + b"MAIL FROM:<b>\r\nRCPT TO:<alice>\r\nDATA\r\n.\r\n")
        busy.accept()
        busy.take_text()
        assert busy.asked()[0] == wire.DELIVER
        busy.answer(Outcome(250, "2.0.0", "Delivered"))
        busy.line.expect(b"250 2.0.0 <alice> Delivered")
    busy.line.say(b"QUIT\r\n")
    busy.line.expect(b"221 2.0.0")


def test_the_time_that_a_lock_takes_is_not_the_clients(talk: Callable[..., Talk]) -> None:
    slow = talk(0.6)
    slow.line.say(b"HELO x\r\nMAIL FROM:<b>\r\nRCPT TO:<alice>\r\nDATA\r\n.\r\n")
    slow.accept()
    slow.take_text()
    assert slow.asked()[0] == wire.DELIVER
    time.sleep(1.0)
    slow.answer(Outcome(250, "2.0.0", "Delivered"))
    slow.line.expect(b"250 2.0.0 Delivered")
    slow.line.say(b"QUIT\r\n")
    slow.line.expect(b"221 2.0.0")


def test_a_pipe_that_nobody_reads_does_not_hold_the_session() -> None:
    def run() -> None:
        signal.alarm(20)
        ours, theirs = os.pipe()
        link, _ = socket.socketpair()
        limits = Config().with_values("receiver", idle_seconds=0.3).receiver
        channel = session.Channel(ours, theirs, link.fileno(), limits)
        for _ in range(20_000):
            channel.say(replies.OK)
        with pytest.raises(session.Overdue):
            channel.flush()

    assert in_child(run) == 0


def test_the_hosts_own_mta_may_ask_for_any_number_of_unknown_users(
    talk: Callable[..., Talk],
) -> None:
    mta = talk(
        config=limited(errors=5),
        peer=Peer("unix", "uid 990", 990, is_trusted=True),
    )
    mta.line.say(b"HELO x\r\nMAIL FROM:<b>\r\n" + b"RCPT TO:<nobody-here>\r\n" * 99)
    for _ in range(99):
        mta.asked()
        mta.answer(Outcome(550, "5.1.1", "No such user here"))
    mta.line.say(b"QUIT\r\n")
    said = mta.line.finish()
    assert said.count(b"\r\n550 5.1.1 ") == 99
    assert b"\r\n221 2.0.0 " in said
