"""How many connections one local user may hold: real locks, held by real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mda.config import RANGES, Config
from mda.model import Peer
from mda.receiver import admission
from mda.receiver.admission import NO_SLOT_NEEDED, take_slot

MOST = RANGES["receiver.connections_per_user"][1]


def of(uid: int, *, is_trusted: bool = False) -> Peer:
    return Peer("unix", f"uid {uid}", uid, is_trusted=is_trusted)


def limit(connections: int) -> Config:
    return Config().with_values("receiver", connections_per_user=connections)


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., tuple[int, bool]]]:
    """Take a slot in a process of its own, as brokers do: its id, and whether it has one."""
    holders: list[int] = []

    def start(uid: int, connections: int) -> tuple[int, bool]:
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            slot = take_slot(of(uid), limit(connections), str(tmp_path / "connections"))
            os.write(write_fd, b"n" if slot is None else b"y")
            signal.pause()
        holders.append(pid)
        has_one = os.read(read_fd, 1) == b"y"
        os.close(read_fd)
        os.close(write_fd)
        return pid, has_one

    yield start
    for pid in holders:
        end(pid)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def test_a_user_has_his_share_and_no_more(hold: Callable[..., tuple[int, bool]]) -> None:
    assert [hold(1001, 2)[1] for _ in range(4)] == [True, True, False, False]
    assert [hold(1002, 2)[1] for _ in range(3)] == [True, True, False]


def test_a_slot_is_free_again_when_its_holder_is_killed(
    hold: Callable[..., tuple[int, bool]],
) -> None:
    pid, has_one = hold(1001, 1)
    assert has_one
    assert not hold(1001, 1)[1]
    end(pid)
    assert hold(1001, 1)[1]


def test_neighbours_at_their_limits_do_not_take_each_others_slots(
    hold: Callable[..., tuple[int, bool]], tmp_path: Path
) -> None:
    hold(1001, MOST)
    whose = _locks_of(tmp_path / "connections")
    hold(1002, MOST)
    both = _locks_of(tmp_path / "connections")
    assert len(whose) == 1
    assert len(both) == 2
    assert both[1] - both[0] >= MOST, "the last slot of one is the first of the next"


def _locks_of(path: Path) -> list[int]:
    inode = f":{path.stat().st_ino} "
    locks = Path("/proc/locks").read_text().splitlines()
    return sorted(int(line.split()[-2]) for line in locks if inode in line)


def test_the_largest_share_fits_between_two_uids() -> None:
    assert MOST <= admission._MOST_PER_USER


@pytest.mark.parametrize(
    "peer",
    [
        of(0),
        of(106, is_trusted=True),
        Peer("unix"),
        Peer("tcp", "127.0.0.1"),
        Peer("stream"),
    ],
)
def test_root_transport_agents_and_the_network_are_not_counted(tmp_path: Path, peer: Peer) -> None:
    file = tmp_path / "connections"
    for _ in range(3):
        assert take_slot(peer, limit(1), str(file)) == NO_SLOT_NEEDED
    assert not file.exists()


@pytest.mark.parametrize("uid", [1, 1000, 65_534, 0xFFFFFFFE])
def test_every_other_uid_is_counted(hold: Callable[..., tuple[int, bool]], uid: int) -> None:
    assert [hold(uid, 1)[1] for _ in range(2)] == [True, False]


def test_nobody_else_may_touch_the_file(tmp_path: Path) -> None:
    file = tmp_path / "connections"
    old = os.umask(0)
    try:
        slot = take_slot(of(1001), limit(1), str(file))
    finally:
        os.umask(old)
    assert slot is not None
    assert file.stat().st_mode & 0o7777 == 0o600
    assert not os.get_inheritable(slot)
    os.close(slot)


def test_a_refused_connection_keeps_no_descriptor(
    hold: Callable[..., tuple[int, bool]], tmp_path: Path
) -> None:
    hold(1001, 1)
    before = os.listdir("/proc/self/fd")
    assert take_slot(of(1001), limit(1), str(tmp_path / "connections")) is None
    assert os.listdir("/proc/self/fd") == before


def test_no_link_is_followed_and_ones_own_receiver_counts_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    assert take_slot(of(1001), limit(1), str(link)) == NO_SLOT_NEEDED
    assert not (tmp_path / "elsewhere").exists()
    missing = str(tmp_path / "none" / "connections")
    assert take_slot(of(1001), limit(1), missing) == NO_SLOT_NEEDED
