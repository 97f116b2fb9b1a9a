"""Two hosts of which one is always there, and the other fetches its mail with TURN, as README
has it: over ssh, to the socket of the unit, as a user who may do nothing else.

It installs a package, and so comes behind test_install.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from hosts.host import InstalledHost, wait_until

INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends socat"
HUB = """[receiver]
hostname = "hub.example.org"
local_domains = ["hub.example.org"]
turn_peers = ["user:vax vax.example.org"]
[routes]
"vax.example.org" = "turn:vax.example.org"
"""
VAX = """[receiver]
hostname = "vax.example.org"
local_domains = ["vax.example.org"]
[routes]
"*" = "turn:hub.example.org"
"""
ADD_USER = """useradd -m -s /bin/sh vax && install -d -m 700 -o vax ~vax/.ssh &&
cat >~vax/.ssh/authorized_keys && chown vax ~vax/.ssh/authorized_keys &&
chmod 600 ~vax/.ssh/authorized_keys"""


class Pair:
    """The hub and the host that comes and goes."""

    def __init__(self, hub: InstalledHost, vax: InstalledHost) -> None:
        self.hub = hub
        self.vax = vax
        hub.run(INSTALL, timeout=600)
        hub.run(ADD_USER, input=vax.run("cat .ssh/id_ed25519.pub").stdout)
        for host, config in ((hub, HUB), (vax, VAX)):
            host.run("mv /etc/mda/mda.toml /etc/mda/kept")
            host.run("umask 022; cat >/etc/mda/mda.toml", input=config)
            host.clear_mail()
            assert "all is well" in host.run("mda check").stdout

    def turn(self, user: str = "vax", *, check: bool = True) -> str:
        way = f"ssh -q -o StrictHostKeyChecking=no -p {self.hub.ssh_port} {user}@127.0.0.1"
        way += " socat - UNIX:/run/mda/smtp.sock"
        return self.vax.run(f"mda queue turn hub.example.org -- {way}", check=check).stderr

    def put_back(self) -> None:
        self.hub.run("loginctl terminate-user vax; userdel -f -r vax 2>/dev/null")
        for host in (self.hub, self.vax):
            host.run("mv /etc/mda/kept /etc/mda/mda.toml")
            host.run("rm -rf /var/spool/mda/queue")
            host.clear_mail()


@pytest.fixture(params=["debian12", "debian13"])
def hub(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(hub: str, starting: dict[str, Future[InstalledHost]]) -> Iterator[Pair]:
    (other,) = set(starting) - {hub}
    pair = Pair(starting[hub].result(), starting[other].result())
    yield pair
    pair.put_back()


def write(host: InstalledHost, to: str) -> None:
    host.run(f"printf 'Subject: to {to}\\n\\nhello\\n' | mda sendmail {to}", user="alice")


def count_waiting(host: InstalledHost) -> str:
    return host.run("mda queue list").stdout.splitlines()[-1]


def test_a_host_fetches_its_mail_and_brings_its_own(pair: Pair) -> None:
    write(pair.hub, "bob@vax.example.org")
    write(pair.hub, "carol@vax.example.org")
    write(pair.vax, "carol@hub.example.org")
    wait_until(lambda: "TURN" in pair.hub.run("mda queue list").stdout, "a run leaves it")
    assert (count_waiting(pair.hub), count_waiting(pair.vax)) == ("2 messages", "1 message")
    pair.turn()
    assert b"\nSubject: to bob@vax.example.org\n" in pair.vax.mailbox("bob")
    assert b"\nSubject: to carol@vax.example.org\n" in pair.vax.mailbox("carol")
    assert b"\nSubject: to carol@hub.example.org\n" in pair.hub.mailbox("carol")
    assert b"Received: from vax.example.org (local user vax" in pair.hub.mailbox("carol")
    assert (count_waiting(pair.hub), count_waiting(pair.vax)) == ("0 messages", "0 messages")


def test_root_gives_away_what_it_does_not_need(pair: Pair) -> None:
    """Also where the configuration is named, and in the program."""
    program = "sh -c 'grep CapBnd /proc/self/status >/root/kept'"
    words = f"mda queue --config /etc/mda/mda.toml turn hub.example.org -- {program}"
    pair.vax.run(words, check=False)
    assert pair.vax.run("cat kept; rm kept").stdout.split() == ["CapBnd:", "00000000000000c0"]


def test_another_user_of_the_hub_cannot_fetch_it(pair: Pair) -> None:
    write(pair.hub, "bob@vax.example.org")
    pair.hub.run("cat >>~carol/.ssh/authorized_keys", input=pair.vax.run("cat .ssh/*.pub").stdout)
    said = pair.turn("carol", check=False)
    assert "hub.example.org: 502 5.5.1 Command not implemented" in said
    assert count_waiting(pair.hub) == "1 message"
    assert not pair.vax.path("/var/mail/bob").exists()
