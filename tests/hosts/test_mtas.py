"""Real transport agents, as packaged, each handing 200 messages to mda byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hosts.corpus import below_added_lines, make_corpus, number_of, read_mbox
from hosts.host import InstalledHost, wait_until
from hosts.speaking import LMTP, SMTP

MESSAGES = 200
SENDMAIL = """
import os, subprocess, sys
for name in sorted(os.listdir('/var/tmp/corpus'), key=int):
    with open('/var/tmp/corpus/' + name, 'rb') as message:
        words = ['/usr/sbin/sendmail', '-i', '-f', 'bob@example.org', sys.argv[1]]
        subprocess.run(words, stdin=message, check=True)
"""


def install_package(host: InstalledHost, packages: str) -> None:
    """As an administrator does who takes every default, with no daemon started too early."""
    command = "apt-get install -y -q --no-install-recommends " + packages
    host.run(f"apt-get update -q; DEBIAN_FRONTEND=noninteractive {command}", timeout=600)


def set_up_postfix(host: InstalledHost) -> None:
    """The packaged configuration, with its chrooted client, and the line that we print."""
    install_package(host, "postfix")
    host.install()
    (setting,) = re.findall(r"in main\.cf: (.+)", host.installation.stdout)
    host.run(["postconf", "-e", setting, "inet_interfaces = 127.0.0.1", "myorigin = $myhostname"])
    # The host shares this machine's port 25.
    host.run("sed -i 's/^smtp      inet/#&/' /etc/postfix/master.cf; systemctl restart postfix")
    chrooted = host.run("postconf -M lmtp/unix").stdout.split()
    assert chrooted[4] in ("y", "-"), "the client of Debian's package is chrooted"


EXIM_TRANSPORT = """mda_lmtp:
  driver = lmtp
  socket = /run/mda/lmtp.sock
  batch_max = 20
"""


def set_up_exim(host: InstalledHost) -> None:
    """Local delivery by LMTP, in the split configuration of the package."""
    install_package(host, "exim4-daemon-light")
    host.install()
    host.path("/etc/exim4/conf.d/transport/40_mda_lmtp").write_text(EXIM_TRANSPORT)
    settings = host.path("/etc/exim4/update-exim4.conf.conf")
    text = re.sub(
        r"(?m)^dc_(use_split_config|localdelivery|eximconfig_configtype)=.*\n",
        "",
        settings.read_text(),
    )
    text += "dc_use_split_config='true'\ndc_localdelivery='mda_lmtp'\n"
    settings.write_text(text + "dc_eximconfig_configtype='local'\n")
    host.run("update-exim4.conf; systemctl restart exim4")


SMTPD_CONF = """listen on socket
action "local" lmtp "/run/mda/lmtp.sock"
match from local for any action "local"
"""


def set_up_opensmtpd(host: InstalledHost) -> None:
    """Local delivery by LMTP; the package's client runs as the recipient."""
    install_package(host, "opensmtpd")
    host.install()
    host.path("/etc/smtpd.conf").write_text(SMTPD_CONF)
    host.run("systemctl restart opensmtpd")


# What runs where, and the kinds of text that the agent's own sendmail changes: Postfix makes
# a lone CR a space, Exim a line's end; OpenSMTPD puts long lines into quoted-printable and
# takes no message with NUL.
AGENTS: dict[str, tuple[str, Callable[[InstalledHost], None], tuple[str, ...]]] = {
    "postfix": ("debian12", set_up_postfix, ("lone CR",)),
    "exim": ("debian13", set_up_exim, ("lone CR",)),
    "opensmtpd": ("debian12", set_up_opensmtpd, ("line of 998", "NUL")),
}


def start(name: str) -> InstalledHost:
    """A booted host with the agent and mda; it is stopped if that fails."""
    tree, set_up, _ = AGENTS[name]
    host = InstalledHost(name, tree=tree)
    try:
        host.boot()
        set_up(host)
    except BaseException:
        host.stop()
        raise
    return host


@pytest.fixture(scope="module")
def agents() -> Iterator[dict[str, Future[InstalledHost]]]:
    """The hosts of all agents, getting up side by side."""
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(start, name) for name in AGENTS}
        yield futures
        for future in futures.values():
            if not future.exception():
                future.result().stop()


@pytest.mark.parametrize("name", list(AGENTS))
def test_every_message_arrives_byte_for_byte(
    agents: dict[str, Future[InstalledHost]], name: str
) -> None:
    host = agents[name].result()
    corpus = list(make_corpus(MESSAGES, AGENTS[name][2]))
    folder = host.path("/var/tmp/corpus")
    folder.mkdir()
    for number, message in enumerate(corpus):
        (folder / str(number)).write_bytes(message)

    host.run(["python3", "-I", "-c", SENDMAIL, f"alice@{name}.example.org"], user="bob")

    wait_until(
        lambda: host.mailbox("alice").count(b"\nX-Number: ") == MESSAGES, "all have arrived", 180
    )
    wait_until(lambda: host.mailbox("alice").endswith(b"\n\n"), "the last is whole")
    kept = read_mbox(host.mailbox("alice"))
    assert sorted(map(number_of, kept)) == list(range(MESSAGES))
    changed = {
        message: corpus[number_of(message)]
        for message in map(below_added_lines, kept)
        if message != corpus[number_of(message)]
    }
    assert not changed


@pytest.mark.parametrize(("options", "path"), [((), SMTP), (("-L",), LMTP)])
def test_twenty_sessions_of_smtp_source(
    agents: dict[str, Future[InstalledHost]], options: tuple[str, ...], path: str
) -> None:
    """Postfix's load generator: 200 messages by 20 sessions at a time, each one whole."""
    host = agents["postfix"].result()
    host.clear_mail()
    words = [
        "/usr/sbin/smtp-source",
        "-s",
        "20",
        "-m",
        "200",
        "-l",
        "4096",
        "-f",
        "bob@example.org",
    ]
    words += ["-t", "alice", "-S", "by smtp-source"]
    host.run([*words, *options, f"unix:{path}"])
    kept = read_mbox(host.mailbox("alice"))
    texts = {message.partition(b"\n\n")[2] for message in kept}
    assert len(kept) == 200
    assert len(texts) == 1, "one is not like the others"
    assert len(texts.pop()) > 3000
    assert not list(host.path("/var/mail").glob("*.lock"))
