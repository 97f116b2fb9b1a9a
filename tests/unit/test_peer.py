"""Who the other end is: real sockets, made under the identities that they are to show."""

from __future__ import annotations

import os
import pwd
import socket
import sys
from collections.abc import Callable, Iterator

import pytest
from support.sandbox import effective_uid

from mda.config import Config
from mda.model import Peer
from mda.receiver import peer
from mda.receiver.peer import identify, is_on_smtp_port, local_peer

PERSON = 1001
PROGRAM = 105
NOBODY = 65_534


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names for uids, on whatever host this runs."""
    names = {0: "root", PROGRAM: "daemon", 106: "postfix", PERSON: "alice", NOBODY: "nobody"}

    def look_up(uid: int) -> pwd.struct_passwd:
        return pwd.struct_passwd((names[uid], "x", uid, uid, "", "/", "/bin/sh"))

    monkeypatch.setattr(peer.pwd, "getpwuid", look_up)  # type: ignore[attr-defined]


def identify_local(uid: int, config: Config) -> Peer:
    with effective_uid(uid):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        return identify(theirs.fileno(), config)


def test_a_person_on_the_unix_socket_is_verified_by_the_kernel() -> None:
    found = identify_local(PERSON, Config())
    assert (found.kind, found.uid, found.address) == ("unix", PERSON, "uid 1001")
    assert (found.user, found.is_trusted, found.may_use_terminals) == ("alice", False, True)


@pytest.mark.parametrize(
    ("uid", "is_trusted", "may_use_terminals"),
    [(0, False, True), (PROGRAM, False, False), (106, True, False), (NOBODY, False, False)],
)
def test_root_programs_transport_agents_and_nobody_are_no_persons(
    uid: int, is_trusted: bool, may_use_terminals: bool
) -> None:
    found = identify_local(uid, Config())
    assert (found.uid, found.user) == (uid, "")
    assert (found.is_trusted, found.may_use_terminals) == (is_trusted, may_use_terminals)


def test_nobody_is_no_person_even_where_the_range_has_his_number() -> None:
    config = Config().with_values("recipients", uid_max=70_000)
    assert identify_local(NOBODY, config).user == ""
    assert identify_local(NOBODY, config).may_use_terminals is False


def test_who_is_a_person_and_whom_we_trust_is_the_configurations_to_say() -> None:
    config = Config().with_values("recipients", uid_min=PROGRAM, uid_max=PROGRAM)
    assert identify_local(PROGRAM, config).user == "daemon"
    assert identify_local(PERSON, config).user == ""
    config = Config().with_values("receiver", trusted_users=("alice",))
    found = identify_local(PERSON, config)
    assert (found.user, found.is_trusted, found.may_use_terminals) == ("", True, False)
    assert identify_local(106, config).is_trusted is False


@pytest.mark.parametrize(("uid", "user"), [(999, ""), (1000, "u"), (60_000, "u"), (60_001, "")])
def test_both_ends_of_the_range_are_persons(
    monkeypatch: pytest.MonkeyPatch, uid: int, user: str
) -> None:
    monkeypatch.setattr(peer, "_name_of", lambda uid: "u")
    assert local_peer(uid, Config()).user == user


def test_a_uid_without_an_account_is_verified_as_nobody() -> None:
    found = identify_local(1234, Config())
    assert (found.uid, found.user, found.is_trusted) == (1234, "", False)
    nameless = Config().with_values("receiver", trusted_users=("",))
    assert identify_local(1234, nameless).is_trusted is False


@pytest.mark.parametrize("uid", [PROGRAM, NOBODY, 106])
def test_a_receiver_that_began_as_root_never_takes_its_own_uid_for_a_person(uid: int) -> None:
    assert os.geteuid() == 0
    assert identify_local(0, Config()).user == ""
    assert local_peer(0, Config()).user == ""
    assert local_peer(uid, Config()).user == ""


def test_ones_own_receiver_knows_its_owner_whatever_his_uid() -> None:
    with effective_uid(PROGRAM):
        assert local_peer(PROGRAM, Config()).user == "daemon"
        assert local_peer(PROGRAM, Config()).may_use_terminals is True
    for uid in (NOBODY, 106):
        with effective_uid(uid):
            assert local_peer(uid, Config()).user == ""


@pytest.mark.parametrize(
    ("peers", "allowed"),
    [
        ((), set()),
        (("local",), {"local"}),
        (("loopback",), {"loopback"}),
        (("local", "loopback"), {"local", "loopback"}),
        (("all",), {"local", "loopback", "network"}),
    ],
)
def test_terminals_are_for_the_peers_that_the_configuration_names(
    peers: tuple[str, ...], allowed: set[str]
) -> None:
    config = Config().with_values("terminal", peers=peers)
    found = {
        "local": local_peer(PERSON, config),
        "loopback": identify_remote("127.0.0.1", config),
        "network": identify_remote("192.0.2.7", config),
    }
    assert {name for name, one in found.items() if one.may_use_terminals} == allowed
    # A program of this host is no person, however many may.
    assert local_peer(PROGRAM, config).may_use_terminals is False
    disabled = config.with_values("terminal", enabled=False)
    assert not local_peer(PERSON, disabled).may_use_terminals
    assert not identify_remote("127.0.0.1", disabled).may_use_terminals


@pytest.mark.parametrize(
    ("peers", "networks", "address", "may", "is_offered"),
    [
        (("networks",), ("192.0.2.0/24", "2001:db8::/32"), "192.0.2.7", True, True),
        (("networks",), ("192.0.2.0/24", "2001:db8::/32"), "2001:db8::1", True, True),
        (("networks",), ("192.0.2.0/24",), "::ffff:192.0.2.7", True, True),
        (("networks",), ("192.0.2.0/24",), "198.51.100.1", False, True),
        (("networks",), ("192.0.2.0/24",), "127.0.0.1", False, True),
        (("networks", "loopback"), (), "127.0.0.1", True, True),
        (("local",), ("192.0.2.0/24",), "192.0.2.7", False, False),
    ],
)
def test_terminals_are_for_the_networks_that_are_named(
    peers: tuple[str, ...], networks: tuple[str, ...], address: str, *, may: bool, is_offered: bool
) -> None:
    config = Config().with_values("terminal", peers=peers, networks=networks)
    found = identify_remote(address, config)
    assert (found.may_use_terminals, found.is_offered_terminals) == (may, is_offered)
    disabled = identify_remote(address, config.with_values("terminal", enabled=False))
    assert (disabled.may_use_terminals, disabled.is_offered_terminals) == (False, False)


class Remote:
    """The part of a socket that says who is there, for addresses that no test can have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def getpeername(self) -> tuple[str, int]:
        return self._name, 25

    def getsockname(self) -> tuple[str, int]:
        return "192.0.2.1", 25


def identify_remote(name: str, config: Config) -> Peer:
    return peer._identify_remote(Remote(name), config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "address", "is_loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.255.0.9", "127.255.0.9", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:0:102:304", "::ffff:0:102:304", False),
        ("::ffff:192.0.2.1", "192.0.2.1", False),
        ("192.0.2.1", "192.0.2.1", False),
        ("12.7.0.1", "12.7.0.1", False),
        ("128.0.0.1", "128.0.0.1", False),
        ("::2", "::2", False),
        ("::1:1", "::1:1", False),
        ("fe80::1%eth0", "fe80::1", False),
    ],
)
def test_only_the_hosts_own_addresses_are_loopback(
    name: str, address: str, is_loopback: bool
) -> None:
    found = identify_remote(name, Config())
    assert (found.kind, found.address, found.uid, found.user) == ("tcp", address, -1, "")
    assert (found.is_trusted, found.may_use_terminals) == (False, is_loopback)


@pytest.fixture
def connect() -> Iterator[Callable[[str], tuple[socket.socket, socket.socket]]]:
    """Real connections: the client's end, and the one that was accepted."""
    opened: list[socket.socket] = []

    def make(address: str) -> tuple[socket.socket, socket.socket]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, dualstack_ipv6=False) as listening:
            ours = socket.create_connection(listening.getsockname()[:2])
            opened.append(ours)
            theirs, _ = listening.accept()
        opened.append(theirs)
        return ours, theirs

    yield make
    for one in opened:
        one.close()


def test_a_client_on_loopback_is_verified_as_nobody(
    connect: Callable[[str], tuple[socket.socket, socket.socket]],
) -> None:
    _, theirs = connect("127.0.0.1")
    found = identify(theirs.fileno(), Config())
    assert (found.kind, found.address, found.user) == ("tcp", "127.0.0.1", "")
    assert found.may_use_terminals is True


def test_a_client_on_a_socket_for_both_families_is_on_loopback_too() -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening,
        socket.create_connection(("127.0.0.1", listening.getsockname()[1])),
    ):
        theirs, address = listening.accept()
        assert address[0] == "::ffff:127.0.0.1"
        with theirs:
            found = identify(theirs.fileno(), Config())
    assert (found.address, found.may_use_terminals) == ("127.0.0.1", True)


def test_a_client_that_has_gone_leaves_a_socket_of_its_kind(
    connect: Callable[[str], tuple[socket.socket, socket.socket]],
) -> None:
    ours, theirs = connect("127.0.0.1")
    linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    ours.close()  # by a reset
    with pytest.raises(OSError, match="not connected"):
        theirs.getpeername()
    found = identify(theirs.fileno(), Config())
    assert (found.kind, found.address, found.uid) == ("tcp", "", -1)
    assert (found.user, found.is_trusted, found.may_use_terminals) == ("", False, False)


def test_a_unix_socket_with_nobody_at_the_other_end_verifies_nobody() -> None:
    with socket.socket(socket.AF_UNIX) as alone:
        found = identify(alone.fileno(), Config())
    assert (found.kind, found.address, found.uid) == ("unix", "", -1)
    assert (found.user, found.is_trusted, found.may_use_terminals) == ("", False, False)


def test_a_local_client_that_has_gone_is_still_known() -> None:
    with effective_uid(PERSON):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.close()
    with theirs:
        assert identify(theirs.fileno(), Config()).user == "alice"


def test_pipes_files_and_closed_descriptors_verify_nobody() -> None:
    read_fd, write_fd = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    _, slave = os.openpty()
    before = len(os.listdir("/proc/self/fd"))
    for fd in (read_fd, write_fd, null, slave, 999):
        found = identify(fd, Config())
        assert (found.kind, found.address, found.uid, found.user) == ("stream", "", -1, "")
        assert (found.is_trusted, found.may_use_terminals) == (False, False)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in (read_fd, write_fd, null, slave, _):
        os.close(fd)


def test_a_socket_of_another_family_is_a_stream() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as other:
        assert identify(other.fileno(), Config()).kind == "stream"


@pytest.mark.parametrize(
    ("vrfy", "networks", "allowed"),
    [
        ("local", (), {"person", "program", "transport agent", "loopback", "loopback6"}),
        ("nobody", ("192.0.2.0/24",), set()),
        ("networks", (), {"person", "program", "transport agent", "loopback", "loopback6"}),
        (
            "networks",
            ("192.0.2.0/25", "2001:db8::/32"),
            {"person", "program", "transport agent", "loopback", "loopback6", "near", "near6"},
        ),
    ],
)
def test_names_are_for_the_peers_that_the_configuration_names(
    vrfy: str, networks: tuple[str, ...], allowed: set[str]
) -> None:
    config = Config().with_values("receiver", vrfy=vrfy, vrfy_networks=networks)
    found = {
        "person": identify_local(PERSON, config),
        "program": identify_local(PROGRAM, config),
        "transport agent": identify_local(106, config),
        "loopback": identify_remote("127.0.0.1", config),
        "loopback6": identify_remote("::1", config),
        "near": identify_remote("::ffff:192.0.2.127", config),
        "far": identify_remote("192.0.2.128", config),
        "near6": identify_remote("2001:db8::1", config),
        "far6": identify_remote("fe80::1%eth0", config),
        "stream": Peer("stream"),
    }
    assert {name for name, one in found.items() if one.may_ask_names} == allowed


def test_only_a_connection_to_tcp_port_25_is_one(
    connect: Callable[[str], tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs = connect("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(peer, "_SMTP_PORT", port)
        assert is_on_smtp_port(listening.fileno())
        with socket.create_connection(("127.0.0.1", port)) as ours:
            accepted, _ = listening.accept()
            with accepted:
                assert is_on_smtp_port(accepted.fileno())
                assert not is_on_smtp_port(ours.fileno()), "the port of the other end"
    local = socket.socketpair(socket.AF_UNIX)
    for fd in (theirs.fileno(), local[0].fileno(), 0, 999):
        assert not is_on_smtp_port(fd)
    for each in local:
        each.close()
