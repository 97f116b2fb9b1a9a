"""Mail for another host: taken and sent on, per second, beside Postfix on the same host.

    python tests/bench/relay.py [MESSAGES [CONNECTIONS [ROUNDS]]]

Run it as root. A Debian 12 host is booted with Postfix as packaged and mda as the README
installs it, with `mda serve` on a port. Postfix's smtp-source sends messages of 4 KiB for
another host to each in turn, and its smtp-sink is that host. The figures are messages a second
until the last one is taken, and until the last one has come through.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts.agents import start_agent
from hosts.host import InstalledHost, free_port, wait_until

_SECONDS = 300


def set_up_postfix(host: InstalledHost, port: int, sink: int) -> None:
    """It receives on a port of loopback, and sends everything to the sink."""
    settings = ["mynetworks = 127.0.0.0/8", f"relayhost = [127.0.0.1]:{sink}"]
    settings += [
        "smtpd_client_connection_count_limit = 0",
        "smtpd_relay_restrictions = permit_mynetworks,reject",
    ]
    host.run(["postconf", "-e", *settings])
    line = f"127.0.0.1:{port}/inet=127.0.0.1:{port} inet n - n - - smtpd"
    host.run(["postconf", "-M", line])
    host.run("systemctl restart postfix")


def set_up_mda(host: InstalledHost, port: int, sink: int) -> None:
    """The same of mda, with its defaults but for the network that may relay."""
    host.run(
        "sed -i 's/^#relay_networks = .*/relay_networks = [\"127.0.0.0\\/8\"]/' /etc/mda/mda.toml"
    )
    route = f'"*" = "127.0.0.1:{sink}"\n'
    host.run("sed -i '/^.routes.$/r /dev/stdin' /etc/mda/mda.toml", input=route)
    host.run(f"systemd-run -q --unit=mda-bench mda serve --listen 127.0.0.1:{port}")


class Sink:
    """smtp-sink on a port, and how many messages it has had."""

    def __init__(self, host: InstalledHost, port: int) -> None:
        self._host = host
        command = f"exec /usr/sbin/smtp-sink -c 127.0.0.1:{port} 200 > /tmp/sink.log 2>&1"
        self._process = host.start(command, user="carol")
        self._log = host.path("/tmp/sink.log")
        wait_until(
            lambda: host.run(f"ss -tln | grep -c 127.0.0.1:{port}", check=False).stdout, "up"
        )

    def count(self) -> int:
        """Messages since it was started."""
        found = re.findall(r"mesg=(\d+)", self._log.read_bytes()[-400:].decode("ascii", "replace"))
        return int(found[-1]) if found else 0

    def stop(self) -> None:
        self._host.run("pkill -x smtp-sink")
        self._process.communicate()


def measure(
    host: InstalledHost, port: int, sink: Sink, messages: int, connections: int
) -> tuple[float, float]:
    """Messages a second: taken, and sent."""
    before = sink.count()
    words = ["/usr/sbin/smtp-source", "-s", str(connections), "-m", str(messages), "-l", "4096"]
    words += ["-d", "-f", "bob@far.example", "-t", "user@sink.example", f"127.0.0.1:{port}"]
    begin = time.monotonic()
    host.run(words, timeout=_SECONDS)
    taken = time.monotonic() - begin
    while sink.count() - before < messages:
        assert time.monotonic() - begin < _SECONDS, sink.count() - before
        time.sleep(0.02)
    return messages / taken, messages / (time.monotonic() - begin)


def compare(host: InstalledHost, messages: int, connections: int, rounds: int) -> Iterator[str]:
    """The lines to print."""
    sink_port, ports = free_port(), {"mda": free_port(), "Postfix": free_port()}
    sink = Sink(host, sink_port)
    set_up_mda(host, ports["mda"], sink_port)
    set_up_postfix(host, ports["Postfix"], sink_port)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ports}
    for _ in range(rounds):
        for name, port in ports.items():
            figures[name].append(measure(host, port, sink, messages, connections))
            time.sleep(2)
    sink.stop()
    yield f"{messages} messages of 4 KiB, {connections} connections, {rounds} rounds"
    for name, pairs in figures.items():
        taken, sent = (statistics.median(each) for each in zip(*pairs, strict=True))
        yield f"{name:8} taken {taken:6.0f}/s  sent {sent:6.0f}/s"
    for at, what in enumerate(("taken", "sent")):
        ratios = [a[at] / b[at] for a, b in zip(figures["mda"], figures["Postfix"], strict=True)]
        yield f"mda / Postfix, {what}: {statistics.median(ratios):.2f}"


def main(messages: int, connections: int, rounds: int) -> None:
    """Boot, compare, and throw the host away."""
    host = start_agent("postfix")
    try:
        for line in compare(host, messages, connections, rounds):
            print(line)
    finally:
        host.stop()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [500, 10, 3][len(numbers) :]))
