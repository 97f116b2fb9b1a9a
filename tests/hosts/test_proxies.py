"""STARTTLS, XCLIENT and PROXY headers, as real clients and a real proxy use them.

Like test_sendmail.py it installs packages, and so comes behind test_install.py, which compares
the files of a host with those before.
"""

from __future__ import annotations

import smtplib
from collections.abc import Iterator

import pytest

from hosts.agents import CERTIFICATE
from hosts.host import InstalledHost, free_port

INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends"
KEYS = {
    "tls_certificate": r'"\/etc\/mda\/tls.pem"',
    "proxy_peers": r'["127.0.0.8\/32"]',
    "xclient_peers": r'["127.0.0.1\/32"]',
}
HAPROXY = """
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen v1
  bind 127.0.0.1:{0}
  server mda 127.0.0.1:{2} send-proxy source 127.0.0.8
listen v2
  bind 127.0.0.1:{1}
  server mda 127.0.0.1:{2} send-proxy-v2 source 127.0.0.8
"""


def set_keys(host: InstalledHost, keys: dict[str, str]) -> None:
    script = "".join(f"s/^#*{key} = .*/{key} = {value}/;" for key, value in keys.items())
    host.run(["sed", "-i", script, "/etc/mda/mda.toml"])


@pytest.fixture(scope="module")
def prepared(host: InstalledHost, port: int) -> Iterator[int]:
    """The port of a host with a certificate, and peers that may say for whom they stand."""
    host.run(f"{INSTALL} libnet-ssleay-perl haproxy", timeout=600)
    host.run("cp -p /etc/mda/mda.toml /etc/mda/kept")
    host.run(CERTIFICATE)
    set_keys(host, KEYS)
    assert "all is well" in host.run("mda check").stdout
    yield port
    host.run("mv /etc/mda/kept /etc/mda/mda.toml; rm /etc/mda/tls.*; systemctl stop haproxy")


@pytest.fixture(autouse=True)
def _empty_spool(host: InstalledHost) -> None:
    host.clear_mail()


def test_swaks_sends_in_tls(host: InstalledHost, prepared: int) -> None:
    words = ["swaks", "--tls", "--server", f"127.0.0.1:{prepared}", "-f", "bob@x", "-t", "alice"]
    said = host.run(words).stdout
    assert "=== TLS started with cipher TLSv1.3" in said
    assert b" with ESMTPS id " in host.mailbox("alice")


def test_swaks_names_another_client(host: InstalledHost, prepared: int) -> None:
    words = ["swaks", "--server", f"127.0.0.1:{prepared}", "-f", "bob@x", "-t", "alice"]
    host.run([*words, "--xclient-addr", "192.0.2.7", "--xclient-name", "client.example"])
    assert b"([192.0.2.7])" in host.mailbox("alice")


@pytest.mark.parametrize("version", ["1", "2"])
def test_swaks_stands_in_as_a_proxy(host: InstalledHost, prepared: int, version: str) -> None:
    words = ["swaks", "--server", f"127.0.0.1:{prepared}", "-f", "bob@x", "-t", "alice"]
    words += ["--local-interface", "127.0.0.8", "--proxy-version", version]
    words += ["--proxy-family", "TCP4" if version == "1" else "AF_INET"]
    words += ["--proxy-source", "192.0.2.7", "--proxy-source-port", "4711"]
    words += ["--proxy-dest", "192.0.2.1", "--proxy-dest-port", "25"]
    words += ["--proxy-protocol", "STREAM", "--proxy-command", "PROXY"] if version == "2" else []
    host.run(words)
    assert b"([192.0.2.7])" in host.mailbox("alice")


def test_haproxy_stands_in_front(host: InstalledHost, prepared: int) -> None:
    ports = [free_port(), free_port()]
    host.path("/etc/haproxy/haproxy.cfg").write_text(HAPROXY.format(*ports, prepared))
    host.run("systemctl restart haproxy")
    for number, port in enumerate(ports, 9):
        source = (f"127.0.0.{number}", 0)
        with smtplib.SMTP("127.0.0.1", port, "x", 20, source_address=source) as client:
            client.sendmail("bob@example.org", ["alice"], f"Subject: {number}\n\nhi\n")
        assert f"([127.0.0.{number}])".encode() in host.mailbox("alice")
