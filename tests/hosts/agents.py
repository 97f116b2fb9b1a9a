"""Hosts with a transport agent as it is packaged, and the ways in which it calls mda.

A way is set up as an administrator would, anew for each module that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hosts.host import InstalledHost


@dataclass(frozen=True)
class Agent:
    """A transport agent: the host it is tried on, and the commands that its users type.

    `altered` are the kinds of text (see corpus.py) that its own sendmail changes.
    """

    tree: str
    packages: str
    prepare: str
    altered: tuple[str, ...]
    queue: str
    flush: str
    log: str


AGENTS = {
    # The host shares this machine's port 25. A lone CR becomes a space.
    "postfix": Agent(
        "debian12",
        "postfix",
        "postconf -e 'inet_interfaces = 127.0.0.1' 'myorigin = $myhostname';"
        "sed -i 's/^smtp      inet/#&/' /etc/postfix/master.cf; systemctl restart postfix",
        ("lone CR",),
        "postqueue -p",
        "postqueue -f",
        "journalctl -q --no-pager -u 'postfix@*'",
    ),
    # A lone CR becomes a line's end.
    "exim": Agent(
        "debian13",
        "exim4-daemon-light",
        "sed -i -e \"s/^dc_use_split_config=.*/dc_use_split_config='true'/\""
        " -e \"s/^dc_eximconfig_configtype=.*/dc_eximconfig_configtype='local'/\""
        " /etc/exim4/update-exim4.conf.conf",
        ("lone CR",),
        "mailq",
        "exim4 -qff",
        "cat /var/log/exim4/mainlog",
    ),
    # Long lines become quoted-printable, and NUL is refused.
    "opensmtpd": Agent(
        "debian12",
        "opensmtpd",
        "true",
        ("line of 998", "NUL"),
        "smtpctl show queue",
        "smtpctl schedule all",
        "journalctl -q --no-pager -u opensmtpd",
    ),
}


# A certificate that nobody has signed, with its key beside it for the receiver's sessions.
CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext "
    "subjectAltName=DNS:localhost -keyout /etc/mda/tls.pem -out /etc/mda/tls.crt 2>/dev/null;"
    " cat /etc/mda/tls.crt >> /etc/mda/tls.pem;"
    " chgrp mda-net /etc/mda/tls.pem; chmod 640 /etc/mda/tls.pem; chmod 644 /etc/mda/tls.crt"
)


def start_agent(name: str) -> InstalledHost:
    """A booted host with the agent and mda; it is stopped if that fails."""
    agent = AGENTS[name]
    host = InstalledHost(name, tree=agent.tree)
    try:
        host.boot()
        # As an administrator does who takes every default, with no daemon started too early.
        install = "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends"
        host.run(f"apt-get update -q; {install} {agent.packages}", timeout=600)
        host.install()
        host.run(agent.prepare)
    except BaseException:
        host.stop()
        raise
    return host


# -- the ways -------------------------------------------------------------------------


def set_up_postfix_lmtp(host: InstalledHost) -> None:
    """The line that we print, and the packaged configuration with its chrooted client."""
    (setting,) = re.findall(r"in main\.cf: (.+)", host.installation.stdout)
    host.run(["postconf", "-e", setting])
    host.run("postconf -X local_transport; postfix reload")
    chrooted = host.run("postconf -M lmtp/unix").stdout.split()
    assert chrooted[4] in ("y", "-"), "the client of Debian's package is chrooted"


MAILBOX_COMMAND = (
    'mailbox_command = /usr/local/bin/mda deliver -f "$SENDER" -d "$USER" -a "$EXTENSION"'
)


def set_up_mailbox_command(host: InstalledHost) -> None:
    """By Postfix's local(8), which runs the command as the recipient."""
    host.run(["postconf", "-e", "mailbox_transport =", MAILBOX_COMMAND])
    host.run("postconf -X local_transport; postfix reload")


def set_up_pipe(flags: str, words: str, limit: int) -> Callable[[InstalledHost], None]:
    """By Postfix's pipe(8), for so many recipients at a time; mda alone knows the users."""
    line = (
        f"mda/unix=mda unix - n n - - pipe {flags} user=nobody "
        f"argv=/usr/local/bin/mda deliver -f ${{sender}} {words}"
    )

    def set_up(host: InstalledHost) -> None:
        host.run(["postconf", "-M", line])
        settings = ["local_transport = mda", "local_recipient_maps ="]
        host.run(["postconf", "-e", *settings, f"mda_destination_recipient_limit = {limit}"])
        host.run("postfix reload")

    return set_up


EXIM_LMTP = """mda:
  driver = lmtp
  socket = /run/mda/lmtp.sock
  batch_max = 20
"""
# Exim takes nothing that a client has said into the words of a command.
EXIM_PIPE = r"""mda:
  driver = pipe
  use_shell
  command = /usr/local/bin/mda deliver -f "\$SENDER" -d "\$LOCAL_PART\$LOCAL_PART_SUFFIX"
  message_prefix =
  message_suffix =
  return_fail_output
  log_defer_output
"""


def set_up_exim(transport: str) -> Callable[[InstalledHost], None]:
    """Local delivery by a transport, in the split configuration of the package."""

    def set_up(host: InstalledHost) -> None:
        host.path("/etc/exim4/conf.d/transport/40_mda").write_text(transport)
        settings = host.path("/etc/exim4/update-exim4.conf.conf")
        text = re.sub(r"(?m)^dc_localdelivery=.*\n", "", settings.read_text())
        settings.write_text(f"{text}dc_localdelivery='mda'\n")
        host.run("update-exim4.conf; systemctl restart exim4")

    return set_up


def set_up_opensmtpd(delivery: str) -> Callable[[InstalledHost], None]:
    """Local delivery by an action; what it calls runs as the recipient."""

    def set_up(host: InstalledHost) -> None:
        host.path("/etc/smtpd.conf").write_text(
            f'listen on socket\naction "mda" {delivery}\nmatch from local for any action "mda"\n'
        )
        # In a container on the old cgroup hierarchy its processes outlive the unit.
        host.run("systemctl stop opensmtpd; while pkill -x smtpd; do sleep 0.1; done")
        host.run("systemctl start opensmtpd; until smtpctl show stats; do sleep 0.1; done")

    return set_up


OPENSMTPD_COMMAND = "/usr/local/bin/mda deliver -f %{mbox.from} -d %{rcpt.user}"

LMTP_WAYS: dict[str, tuple[str, Callable[[InstalledHost], None]]] = {
    "postfix lmtp": ("postfix", set_up_postfix_lmtp),
    "exim lmtp": ("exim", set_up_exim(EXIM_LMTP)),
    "opensmtpd lmtp": ("opensmtpd", set_up_opensmtpd('lmtp "/run/mda/lmtp.sock"')),
}
COMMAND_WAYS: dict[str, tuple[str, Callable[[InstalledHost], None]]] = {
    "postfix mailbox_command": ("postfix", set_up_mailbox_command),
    "postfix pipe": ("postfix", set_up_pipe("", "-d${mailbox}", 50)),
    "postfix pipe DRF": ("postfix", set_up_pipe("flags=DRF", "-a ${extension} -d ${user}", 1)),
    "exim pipe": ("exim", set_up_exim(EXIM_PIPE)),
    "opensmtpd mda": ("opensmtpd", set_up_opensmtpd(f'mda "{OPENSMTPD_COMMAND}"')),
}
WAYS = LMTP_WAYS | COMMAND_WAYS


class Handover:
    """A host on which mail is handed to mda in one of the ways."""

    def __init__(self, host: InstalledHost, way: str) -> None:
        self.host = host
        self.way = way
        self.agent = AGENTS[WAYS[way][0]]

    def send(self, message: str | bytes, *recipients: str, sender: str = "bob") -> None:
        """Hand a message with LF line ends to the agent's sendmail, as bob."""
        words = ["/usr/sbin/sendmail", "-i", "-f", self.address(sender)]
        self.host.run([*words, *map(self.address, recipients)], user="bob", input=message)

    def address(self, user: str) -> str:
        """A user of the host by the host's full name; a whole address as it is."""
        return user if "@" in user else f"{user}@{self.host.name}.example.org"

    def queue(self) -> str:
        """What the agent says of the mail that it holds."""
        return self.host.run(self.agent.queue).stdout

    def flush(self) -> None:
        """Make the agent try again now."""
        self.host.run(self.agent.flush)

    def log(self) -> str:
        """What the agent has written about its deliveries."""
        return self.host.run(self.agent.log).stdout
