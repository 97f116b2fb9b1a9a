"""What a client from the network may do here, by its address (design, decision 8)."""

from __future__ import annotations

import os

from mda.model import Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mda.config import Config


def remote_peer(address: str, config: Config, port: str = "") -> Peer:
    """The peer at an address, which has come to our TCP `port`."""
    if "." in address:  # an IPv4 address on an IPv6 socket
        address = address.removeprefix("::ffff:")
    is_loopback = address.startswith("127.") or address == "::1"
    place = "loopback" if is_loopback else "all"
    limits = config.receiver
    return Peer(
        "tcp",
        address,
        may_use_terminals=may_use_terminals(place, config) or _is_in_network(address, config),
        may_ask_names=may_ask_names("" if is_loopback else address, config),
        is_offered_terminals=config.terminal.enabled and "networks" in config.terminal.peers,
        may_relay=config.outbound.via != "nothing" and _is_in(address, limits.relay_networks),
        is_tls_demanded=port in limits.starttls_required,
        is_proxy=_is_in(address, limits.proxy_peers),
        may_xclient=_is_in(address, limits.xclient_peers),
    )


def may_use_terminals(where: str, config: Config) -> bool:
    """May peers from there ("local", "loopback", "all") write on terminals?"""
    peers = config.terminal.peers
    return config.terminal.enabled and (where in peers or "all" in peers)


def _is_in_network(address: str, config: Config) -> bool:
    section = config.terminal
    if not section.enabled or "networks" not in section.peers:
        return False
    return _is_in(address, section.networks)


def may_ask_names(address: str, config: Config) -> bool:
    """May this peer ask who has a mailbox here; `address` is "" for one on this host."""
    if config.receiver.vrfy == "nobody":
        return False
    if not address:
        return True
    return config.receiver.vrfy == "networks" and _is_in(address, config.receiver.vrfy_networks)


def find_turn_hosts(channel: str, config: Config) -> tuple[str, ...]:
    """The hosts that whoever is on a channel ("pipe", "user:NAME") may be when it says TURN."""
    return tuple(host for each, host in _read_turn_peers(config) if each == channel)


def find_turn_hosts_on(device: int, config: Config) -> tuple[str, ...]:
    """The hosts behind a serial line, which is told by its number (`st_rdev`)."""
    return tuple(host for each, host in _read_turn_peers(config) if _is_device(each, device))


def _read_turn_peers(config: Config) -> list[tuple[str, str]]:
    """Each channel, and the host there."""
    rows = [item.split(" ") for item in config.receiver.turn_peers]
    return [(channel, host.lower()) for channel, host in rows]


def _is_device(path: str, device: int) -> bool:
    try:
        return path.startswith("/") and os.stat(path).st_rdev == device
    except OSError:
        return False


def _is_in(address: str, networks: tuple[str, ...]) -> bool:
    if not networks:
        return False
    import ipaddress  # only on hosts that have named networks

    try:
        peer = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(peer in ipaddress.ip_network(each) for each in networks)
