"""Hosts with addresses of their own, on one wire, with a name server among them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from support.sandbox import Sandbox
from support.serving import wait_until

NET = "10.77.0"
NET6 = "fd00:77:"
NAMESERVER = f"{NET}.53"

_SWITCH = f"""set -e
ip link set lo up
ip link add br0 type bridge
ip addr add {NAMESERVER}/24 dev br0
ip link set br0 up
echo ready
exec cat
"""
_SERVER = f"""server:
  ip-address: {NAMESERVER}
  username: root
  chroot: ""
  pidfile: ""
  zonesdir: "{{root}}"
  zonelistfile: "{{root}}/zonelist"
  xfrdfile: "{{root}}/xfrd"
remote-control:
  control-enable: no
zone:
  name: example
  zonefile: example.zone
zone:
  name: broken.test
  zonefile: not-there.zone
"""


class Network:
    """A bridge in a namespace of its own; a real name server (nsd) answers there for
    `example`, whose records are `zone`, and with SERVFAIL for `broken.test`.
    """

    def __init__(self, zone: str) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="mda-network-"))
        self._root.chmod(0o755)
        self._hosts: list[Sandbox] = []
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _SWITCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._switch.stdout is not None
        assert self._switch.stdout.readline() == "ready\n"
        head = "$ORIGIN example.\n$TTL 60\n@ SOA ns ns 1 3600 600 86400 60\n@ NS ns\n"
        (self._root / "example.zone").write_text(f"{head}ns A {NAMESERVER}\n{zone}")
        settings = self._root / "nsd.conf"
        settings.write_text(_SERVER.format(root=self._root))
        log = self._root / "nsd.log"
        with log.open("wb") as said:
            command = [*self._enter(), "nsd", "-d", "-c", str(settings)]
            self._server = subprocess.Popen(command, stdout=said, stderr=said)
        wait_until(lambda: "nsd started" in log.read_text())

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._switch.pid), "-n", "--"]

    def add(self, name: str, number: int) -> Sandbox:
        """One more host, with that number at the end of its addresses."""
        root = self._root / name
        root.mkdir()
        host = Sandbox(root, name, nameserver=NAMESERVER)
        self._hosts.append(host)
        link = f"v{number}"
        for line in (
            f"ip link add {link} type veth peer name eth0 netns {host.pid}",
            f"ip link set {link} master br0 up",
        ):
            subprocess.run([*self._enter(), *line.split()], check=True)
        for line in (
            "ip link set lo up",
            f"ip addr add {NET}.{number}/24 dev eth0",
            f"ip -6 addr add {NET6}:{number}/64 dev eth0 nodad",
            "ip link set eth0 up",
        ):
            subprocess.run([*host.inside([]), *line.split()], check=True)
        return host

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.close()
        self._server.terminate()
        self._server.wait(20)
        self._switch.communicate()
        shutil.rmtree(self._root)
