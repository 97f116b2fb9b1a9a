from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from mda import wire
from mda.model import Copy, Outcome, Wish


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_fields_come_back_as_they_were_packed() -> None:
    fields = [b"", b"deliver", b"\x00\xff" * 100, b"x"]
    assert wire.unpack(wire.pack(*fields)) == fields
    assert wire.unpack(b"") == []


@pytest.mark.parametrize("frame", [b"\0", b"\0\0\0", b"\0\0\0\5abc", b"\0\0\0\1a\0"])
def test_a_frame_cut_short_is_refused(frame: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.unpack(frame)


def test_a_frame_beyond_the_bound_is_not_sent() -> None:
    with pytest.raises(wire.WireError):
        wire.pack(b"x" * wire.MAX_FRAME)


def test_a_descriptor_rides_along(pair: tuple[socket.socket, socket.socket]) -> None:
    read_fd, write_fd = os.pipe()
    wire.send_frame(pair[0], b"frame", write_fd)
    os.close(write_fd)
    frame, fd = wire.receive_frame(pair[1])
    os.write(fd, b"through")
    os.close(fd)
    assert (frame, os.read(read_fd, 100)) == (b"frame", b"through")
    os.close(read_fd)


def test_an_oversized_frame_is_refused_and_its_descriptor_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    read_fd, write_fd = os.pipe()
    socket.send_fds(pair[0], [b"x" * (wire.MAX_FRAME + 1)], [write_fd])
    os.close(write_fd)
    with pytest.raises(wire.WireError):
        wire.receive_frame(pair[1])
    assert os.read(read_fd, 1) == b"", "the other end of the pipe is still open"
    os.close(read_fd)


def test_two_descriptors_are_refused_and_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    read_fd, write_fd = os.pipe()
    socket.send_fds(pair[0], [b"x"], [write_fd, write_fd])
    os.close(write_fd)
    with pytest.raises(wire.WireError):
        wire.receive_frame(pair[1])
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)


def test_the_end_is_an_empty_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert wire.receive_frame(pair[1]) == (b"", -1)


def answered(
    pair: tuple[socket.socket, socket.socket],
    ask: Callable[[wire.Broker], object],
    answer: bytes,
) -> tuple[object, list[bytes]]:
    requests: list[list[bytes]] = []

    def serve() -> None:
        frame, fd = wire.receive_frame(pair[1])
        requests.append(wire.unpack(frame))
        if fd != -1:
            os.close(fd)
        wire.send_frame(pair[1], answer)

    server = threading.Thread(target=serve)
    server.start()
    result = ask(wire.Broker(pair[0]))
    server.join()
    return result, requests[0]


def test_each_request_reaches_the_broker_whole(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    done = Outcome(250, "2.1.5", "ok")
    row = wire.pack(b"3", b"q", b"alice+lists", b"owner-staff", b"away")
    result, asked = answered(pair, resolve_alice, wire.pack_rows(done, [row]))
    assert isinstance(result, tuple)
    (copy,) = result[1]
    assert (result[0], asked) == (
        done,
        [wire.RESOLVE, b"SAML", b"Alice", b"70000", b"first", b"own", b"", b"", b""],
    )
    assert (copy.number, copy.forms, copy.is_remote) == (3, "q", True)
    assert (copy.address, copy.owner, copy.width) == (b"alice+lists", b"owner-staff", 0)
    person = wire.pack_outcome(done, b"alice", "Alicë".encode())
    assert answered(pair, lambda b: b.verify(b"Alice", may_be_full_name=True), person) == (
        (done, "alice", "Alicë"),
        [wire.VERIFY, b"Alice", b"anything"],
    )
    _, asked = answered(pair, lambda b: b.verify(b"Alice", may_be_full_name=False), person)
    assert asked == [wire.VERIFY, b"Alice", b"mailbox"]
    none = wire.pack_outcome(Outcome(550, "5.1.1", "no"))
    found, _ = answered(pair, lambda b: b.verify(b"x", may_be_full_name=True), none)
    assert found == (Outcome(550, "5.1.1", "no"), "", "")
    width = wire.pack_outcome(done, b"132")
    assert answered(pair, lambda b: b.probe(copy, b"bob@x"), width) == (
        (done, 132),
        [wire.PROBE, b"3", b"bob@x"],
    )
    member = wire.pack(b"zo\xc3\xab", b"example.org", b"Zo")
    assert answered(pair, lambda b: b.expand(b"staff"), wire.pack_rows(done, [member])) == (
        (done, [("zo\u00eb", "example.org", "Zo")]),
        [wire.EXPAND, b"staff"],
    )
    _, asked = answered(pair, lambda b: b.offer_text("p", 0, 7), wire.pack_outcome(done))
    assert asked == [wire.TEXT, b"p", b"7"]

    def deliver(broker: wire.Broker) -> Outcome:
        return broker.deliver(
            "SAML", copy, sender=b"s", recipient=b"r", prefix=b"From x\n", block=b"hi", deadline=1.5
        )

    assert answered(pair, deliver, wire.pack_outcome(done)) == (
        done,
        [wire.DELIVER, b"SAML", b"3", b"s", b"r", b"From x\n", b"hi", b"whole", b"1500"],
    )

    def queue(broker: wire.Broker) -> Outcome:
        return broker.queue(
            "SOML",
            [copy, copy],
            sender=b"s",
            head=b"A: b\n",
            is_utf8=True,
            ret="FULL",
            envid=b"id",
        )

    copy.wish = Wish("NEVER", b"rfc822;x")
    named = [b"3", b"NEVER", b"rfc822;x"]

    assert answered(pair, queue, wire.pack_outcome(done)) == (
        done,
        [wire.QUEUE, b"SOML", b"s", b"A: b\n", b"utf8", b"FULL", b"id", *named, *named],
    )


def resolve_alice(broker: wire.Broker) -> tuple[Outcome, list[Copy]]:
    return broker.resolve("SAML", b"Alice", 70_000, is_first=True, is_handed_over=False)


def test_rows_that_do_not_fit_in_one_frame_come_in_several(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    done = Outcome(250, "2.0.0", "rows")
    rows = [wire.pack(b"%d" % n, b"q", b"x" * 300, b"", b"here") for n in range(1000)]
    asked: list[bytes] = []

    def serve() -> None:
        begin = 0
        while begin < len(rows):
            request = wire.unpack(wire.receive_frame(pair[1])[0])
            asked.append(request[0])
            begin = int(request[1]) if request[0] == wire.ROWS else 0
            frame = wire.pack_rows(done, rows, begin)
            assert len(frame) <= wire.MAX_FRAME
            wire.send_frame(pair[1], frame)
            begin += len(wire.unpack(frame)) - 4

    server = threading.Thread(target=serve)
    server.start()
    outcome, copies = resolve_alice(wire.Broker(pair[0]))
    server.join()
    assert outcome == done
    assert [copy.number for copy in copies] == list(range(1000))
    assert asked[0] == wire.RESOLVE
    assert set(asked[1:]) == {wire.ROWS}


def test_rows_that_never_come_are_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    wire.send_frame(pair[1], wire.pack_outcome(Outcome(250, "2.0.0", "x"), b"2"))
    wire.send_frame(pair[1], wire.pack_outcome(Outcome(250, "2.0.0", "x"), b"2"))
    with pytest.raises(wire.WireError):
        resolve_alice(wire.Broker(pair[0]))


def test_a_broker_that_is_gone_is_an_error_of_its_own(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    pair[1].close()
    with pytest.raises(wire.WireError):
        resolve_alice(wire.Broker(pair[0]))
