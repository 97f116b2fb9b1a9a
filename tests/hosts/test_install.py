"""`mda install`, `mda check` and `mda uninstall` on booted hosts, as README says."""

from __future__ import annotations

import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hosts.host import InstalledHost, free_port, wait_until

UNITS = ("mda-smtp.socket", "mda-lmtp.socket")
# What comes and goes with the README's command beside what mda installs: packages, the
# program itself, caches, logs.
NOT_OURS = re.compile(
    r"/(opt/mda|src|tmp|root/\.cache|usr/(lib|share)/[^/]+"
    r"|var/(cache|log|tmp)|var/lib/(apt|dpkg|systemd))(/|$)"
)


@pytest.fixture
def clean_spool(host: InstalledHost) -> Iterator[None]:
    """A mail spool without mail, before and after."""
    host.clear_mail()
    yield
    host.clear_mail()


def test_readme_command_works(host: InstalledHost) -> None:
    assert host.installation.returncode == 0, host.installation
    assert not host.path("/src").exists()
    for unit in UNITS:
        assert host.run(f"systemctl is-enabled {unit}").stdout == "enabled\n"
        assert host.run(f"systemctl is-active {unit}").stdout == "active\n"
    assert host.run("systemctl --failed --no-legend").stdout == ""


@pytest.mark.parametrize("user", ["root", "alice"])
def test_command_is_on_the_path_and_has_its_manual(host: InstalledHost, user: str) -> None:
    assert host.run("command -v mda", user=user).stdout == "/usr/local/bin/mda\n"
    assert host.run("mda --version", user=user).stdout.startswith("mda, version ")
    for page, words in (
        ("mda", "and the terminal message service of RFC 821"),
        ("mda.toml", "connections_per_user"),
    ):
        shown = host.run(f"MANWIDTH=200 man -P cat {page} | col -b", user=user).stdout
        assert words in " ".join(shown.split())


def test_manual_pages_are_well_formed(host: InstalledHost) -> None:
    for page in ("mda", "mda.toml"):
        warned = host.run(f"man --warnings -P cat {page} >/dev/null")
        assert warned.stderr == ""


@pytest.mark.parametrize("user", ["root", "alice"])
def test_all_is_well_after_the_installation(host: InstalledHost, user: str) -> None:
    assert host.run("mda check", user=user).stdout == "all is well\n"


def test_installing_again_changes_nothing(host: InstalledHost) -> None:
    def stamps() -> str:
        find = "find /etc /usr/local /var/lib/mda /opt/mda ! -name .pwd.lock -printf '%p %C@ %m\\n'"
        return host.run(f"{find} | sort").stdout

    before = stamps()
    assert host.run("mda install --now").stdout == "everything is in place\n"
    assert host.run("/opt/mda/bin/mda install --now").stdout == "everything is in place\n"
    assert stamps() == before


def test_files_can_be_read_by_all_and_written_by_root_alone(host: InstalledHost) -> None:
    names = host.run("cat /var/lib/mda/installed").stdout.split()
    assert "/usr/local/bin/mda" in names
    for name in [*names, "/etc/mda", "/etc/mda/mda.toml", "/run/mda", "/var/lib/mda/installed"]:
        status = host.path(name).stat()
        is_program = stat.S_ISDIR(status.st_mode) or name == "/usr/local/bin/mda"
        assert (name, stat.S_IMODE(status.st_mode)) == (name, 0o755 if is_program else 0o644)
        assert (status.st_uid, status.st_gid) == (0, 0)
    spool = host.run("stat -c '%a %U %G' /var/spool/mda").stdout
    assert spool == "700 mda mda\n"


def test_only_root_installs(host: InstalledHost) -> None:
    for command in ("install", "uninstall"):
        done = host.run(f"mda {command}", user="bob", check=False)
        assert (done.returncode, done.stderr) == (1, "Error: only root can do this\n")


def test_units_have_nothing_that_systemd_does_not_understand(host: InstalledHost) -> None:
    for unit in (*UNITS, "mda-smtp@.service", "mda-lmtp@.service"):
        done = host.run(f"systemd-analyze verify /etc/systemd/system/{unit}", check=False)
        assert "mda" not in done.stderr
    said = host.run("journalctl -b -p warning --no-pager -t systemd -u 'mda-*'").stdout
    assert "Unknown" not in said
    assert "failed" not in said


# -- what check finds -----------------------------------------------------------------

KEEP = "cp -p /etc/mda/mda.toml /etc/mda/kept;"
FAULTS = {
    "broken configuration": (
        "echo '[reciever]' >> /etc/mda/mda.toml",
        "sed -i '$d' /etc/mda/mda.toml",
        r"/etc/mda/mda\.toml:\d+: reciever: ",
    ),
    "configuration that others can write": (
        "chmod o+w /etc/mda/mda.toml",
        "chmod o-w /etc/mda/mda.toml",
        "/etc/mda/mda.toml: others than root",
    ),
    "missing user": (
        "sed -i.kept '/^mda-net:/d' /etc/passwd",
        "cat /etc/passwd.kept > /etc/passwd; rm /etc/passwd.kept",
        "no system user mda-net",
    ),
    "missing socket": (
        "rm /run/mda/smtp.sock",
        "systemctl restart mda-smtp.socket",
        "/run/mda/smtp.sock: No such file",
    ),
    "stopped socket": (
        "systemctl stop mda-lmtp.socket",
        "systemctl start mda-lmtp.socket",
        "/run/mda/lmtp.sock: ",
    ),
    "socket that is not enabled": (
        "systemctl disable -q mda-lmtp.socket",
        "systemctl enable -q mda-lmtp.socket",
        "mda-lmtp.socket is not enabled",
    ),
    "closed mail spool": ("chmod g-w /var/mail", "chmod 2775 /var/mail", "/var/mail: its group"),
    "open mail spool": ("chmod o+w /var/mail", "chmod 2775 /var/mail", "/var/mail: any user"),
    "missing mail spool": (
        "mv /var/mail /var/mail.kept",
        "mv /var/mail.kept /var/mail",
        "/var/mail: no such directory",
    ),
    "no destination for postmaster": (
        f"{KEEP} printf '[recipients]\\npostmaster = \"nobody-here\"\\n' > /etc/mda/mda.toml",
        "mv /etc/mda/kept /etc/mda/mda.toml",
        "mail for postmaster has no destination.*nobody-here",
    ),
    "host name outside the local domains": (
        f"{KEEP} printf '[receiver]\\nlocal_domains = [\"example.net\"]\\n' > /etc/mda/mda.toml",
        "mv /etc/mda/kept /etc/mda/mda.toml",
        r"host name debian1\d\.example\.org is not among",
    ),
    "spool of another user": (
        "chown root /var/spool/mda",
        "chown mda /var/spool/mda",
        "/var/spool/mda: must belong to the user mda",
    ),
    "changed unit": (
        "echo '#' >> /etc/systemd/system/mda-smtp@.service",
        "sed -i '$d' /etc/systemd/system/mda-smtp@.service && systemctl daemon-reload",
        "mda-smtp@.service is not as",
    ),
    "missing command": (
        "mv /usr/local/bin/mda /usr/local/bin/kept",
        "mv /usr/local/bin/kept /usr/local/bin/mda",
        "/usr/local/bin/mda is missing",
    ),
    "program closed to users": (
        "chmod 700 /opt/mda",
        "chmod 755 /opt/mda",
        "/opt/mda: users cannot run",
    ),
    "program that others can change": (
        "chown bob /opt/mda",
        "chown root /opt/mda",
        "/opt/mda: not root's alone",
    ),
    "missing group of terminals": (
        "sed -i.kept 's/^tty:/teletype:/' /etc/group",
        "cat /etc/group.kept > /etc/group; rm /etc/group.kept",
        "no group 'tty'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(host: InstalledHost, fault: str) -> None:
    breaking, mending, expected = FAULTS[fault]
    host.run(breaking)
    try:
        found = host.run("/opt/mda/bin/mda check", check=False)
    finally:
        host.run(mending)

    assert found.returncode == 1, found
    whats = found.stdout.splitlines()[::2]
    assert [what for what in whats if re.search(expected, what)], found
    assert host.run("mda check").stdout == "all is well\n"


def test_mending_as_check_says_works(host: InstalledHost) -> None:
    host.run("systemctl disable -q --now mda-smtp.socket; chmod 755 /var/mail /var/spool/mda")
    host.run("rm /usr/local/bin/mda; chown bob /etc/mda; systemctl stop mda-lmtp.socket")
    found = host.run("/opt/mda/bin/mda check", check=False)
    assert len(found.stdout.splitlines()) > 8
    for _ in range(4):
        found = host.run("/opt/mda/bin/mda check", check=False)
        for remedy in found.stdout.splitlines()[1::2]:
            host.run(f"PATH=$PATH:/opt/mda/bin; {remedy}", check=False)

    assert found.stdout == "all is well\n"


# -- addresses, restarts, connections -------------------------------------------------


def greet(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        return connection.recv(100)


def test_peer_in_another_pid_namespace_is_served(host: InstalledHost) -> None:
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(host.path("/run/mda/smtp.sock")))
            assert connection.recv(100).startswith(b"220 ")


def test_listen_adds_addresses_and_cuts_no_connection(host: InstalledHost) -> None:
    smtp, lmtp = free_port(), free_port()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(host.path("/run/mda/smtp.sock")))
        assert connection.recv(100).startswith(b"220 ")
        listen = f"--listen 127.0.0.1:{smtp} --listen lmtp+127.0.0.1:{lmtp}"
        said = host.run(f"mda install --now {listen}").stdout
        assert "restarted mda-smtp.socket" in said
        connection.sendall(b"NOOP\r\n")
        assert connection.recv(100).startswith(b"250 ")

    assert greet(smtp).startswith(b"220 ")
    assert greet(lmtp).startswith(b"220 ")
    assert host.run("mda check").stdout == "all is well\n"

    assert host.run("mda install --now").stdout == "everything is in place\n"
    host.run(f"mda install --now --listen 127.0.0.1:{smtp}")
    assert greet(smtp).startswith(b"220 ")
    with pytest.raises(ConnectionRefusedError):
        greet(lmtp)
    host.run("rm /etc/systemd/system/mda-smtp.socket.d/listen.conf")
    host.run("systemctl daemon-reload && systemctl restart mda-smtp.socket")


@pytest.mark.parametrize("address", ["localhost:2525", "lmtp+127.0.0.1:25", "the port of sshd"])
def test_bad_address_is_refused_before_anything_is_written(
    host: InstalledHost, address: str
) -> None:
    if address == "the port of sshd":
        address = f"127.0.0.1:{host.ssh_port}"
    before = host.files()

    done = host.run(f"mda install --now --listen {address}", check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert host.files() == before


def test_postfix_gets_a_socket_in_its_queue(host: InstalledHost) -> None:
    host.run("mkdir -p -m 700 /var/spool/postfix/private")
    said = host.run("mda install --now").stdout

    assert "main.cf: mailbox_transport = lmtp:unix:private/mda-lmtp" in said
    assert host.run("test -S /var/spool/postfix/private/mda-lmtp; echo $?").stdout == "0\n"

    host.run("rm -r /var/spool/postfix")
    said = host.run("mda install --now").stdout
    assert "removed /etc/systemd/system/mda-lmtp.socket.d/postfix.conf" in said
    assert host.run("mda check").stdout == "all is well\n"


def test_foreign_file_is_not_overwritten(host: InstalledHost) -> None:
    command = host.path("/usr/local/bin/mda")
    kept = command.read_bytes()
    command.write_bytes(b"#!/bin/sh\necho another program\n")

    done = host.run("/opt/mda/bin/mda install --now", check=False)

    assert done.returncode == 1
    assert command.read_bytes() == b"#!/bin/sh\necho another program\n"
    command.write_bytes(kept)


def test_sockets_come_up_however_often_they_are_restarted(host: InstalledHost) -> None:
    for unit in ("mda-smtp.socket", "mda-lmtp.socket"):
        host.run(f"for i in 1 2 3 4 5 6 7 8 9 10; do systemctl restart {unit} || exit; done")
        assert host.run(f"systemctl is-active {unit}").stdout == "active\n"


def test_sockets_are_there_again_after_a_reboot(host: InstalledHost) -> None:
    # What the boot does: the units from the disk, /run made anew.
    host.run("systemctl stop mda-smtp.socket mda-lmtp.socket; rm -r /run/mda")
    host.run("systemctl daemon-reload; systemd-tmpfiles --create; systemctl start sockets.target")
    host.run("systemctl start $(systemctl list-dependencies --plain sockets.target | grep mda-)")

    assert host.run("mda check").stdout == "all is well\n"


# -- under inetd ----------------------------------------------------------------------


@pytest.fixture
def inetd(host: InstalledHost) -> Iterator[int]:
    """A port where inetd starts `mda receive`."""
    port = free_port()
    line = f"127.0.0.1:{port} stream tcp nowait root /usr/local/bin/mda mda receive\n"
    host.path("/etc/inetd.conf").write_text(line)
    host.run("systemctl restart openbsd-inetd.service || systemctl restart inetd.service")
    yield port
    host.path("/etc/inetd.conf").write_text("")
    host.run("systemctl stop openbsd-inetd.service || systemctl stop inetd.service")


def test_inetd_delivers_and_logs_to_syslog(
    host: InstalledHost, inetd: int, clean_spool: None
) -> None:
    host.run(f"swaks --server 127.0.0.1:{inetd} -f bob@example.org -t alice --body by-inetd")

    assert b"by-inetd" in host.mailbox("alice")
    wait_until(
        lambda: "delivered" in host.run("journalctl -b --no-pager -t mda -o cat -n 5").stdout,
        "a line in the journal",
    )


@contextmanager
def broken_python(host: InstalledHost, target: str) -> Iterator[None]:
    """The program's interpreter replaced by `target`, as an upgrade may leave it."""
    python = host.path("/opt/mda/bin/python")
    kept = python.readlink()
    python.unlink()
    python.symlink_to(target)
    try:
        yield
    finally:
        python.unlink()
        python.symlink_to(kept)


@pytest.mark.parametrize("target", ["/nonexistent", "/bin/false", "/usr/bin/tac"])
def test_inetds_client_sees_no_diagnostics(host: InstalledHost, inetd: int, target: str) -> None:
    with broken_python(host, target):
        assert greet(inetd) == b""
    assert greet(inetd).startswith(b"220 ")


@pytest.mark.parametrize("user", ["root", "alice"])
def test_broken_python_bounces_nothing(host: InstalledHost, user: str) -> None:
    with broken_python(host, "/nonexistent"):
        done = host.run("mda deliver -d alice", user=user, input="x\n", check=False)

    assert done.returncode == 75
    assert "4.3.0" in done.stderr


# -- the way back ---------------------------------------------------------------------


def test_uninstall_leaves_mail_and_configuration(host: InstalledHost, clean_spool: None) -> None:
    host.run("swaks --socket /run/mda/smtp.sock -f bob@example.org -t alice --body kept")
    config = host.path("/etc/mda/mda.toml").read_bytes()
    said = host.run("mda uninstall").stdout
    left = {name for name in host.files() - host.files_before if not NOT_OURS.match(name)}
    units = host.run("systemctl list-units --all --plain --no-legend 'mda*'").stdout
    again = host.run("/opt/mda/bin/mda install --now").stdout

    assert left == {"/etc/mda", "/etc/mda/mda.toml", "/var/mail/alice"}
    assert units == ""
    assert b"kept" in host.mailbox("alice")
    assert "/opt/mda stays" in said
    assert "removed the system user mda-net" in said
    assert "created the system user mda-net" in again
    assert host.path("/etc/mda/mda.toml").read_bytes() == config
    assert host.run("mda check").stdout == "all is well\n"


def test_host_without_systemd_gets_all_but_running_units(host: InstalledHost) -> None:
    host.run("mda uninstall")
    hide = "mount -t tmpfs none /run/systemd; for name in sysusers tmpfiles; do"
    hide += " mount --bind /dev/null /usr/bin/systemd-$name; done"
    without = ["unshare", "-m", "sh", "-ec"]

    said = host.run([*without, f"{hide}; umask 077; /opt/mda/bin/mda install --now"]).stdout
    folders = host.run("stat -c '%a %U %G' /run/mda /var/spool/mda").stdout
    gone = host.run([*without, f"{hide}; mda uninstall"]).stdout
    left = host.run("id mda-net; ls -d /run/mda /var/spool/mda /var/lib/mda", check=False)
    host.run("/opt/mda/bin/mda install --now")

    assert "\nsmtp stream tcp nowait root /usr/local/bin/mda mda receive\n" in said
    assert folders == "755 root root\n700 mda mda\n"
    assert "removed the system user mda-net" in gone
    assert left.stdout == ""
    assert host.run("mda check").stdout == "all is well\n"


def test_uninstall_keeps_a_spool_that_is_not_empty(host: InstalledHost) -> None:
    host.run("touch /var/spool/mda/waiting && chown mda: /var/spool/mda/waiting")
    said = host.run("mda uninstall").stdout
    status = host.run("stat -c '%U' /var/spool/mda/waiting").stdout
    host.run("rm /var/spool/mda/waiting; /opt/mda/bin/mda install --now")

    assert "/var/spool/mda and the user mda stay" in said
    assert status == "mda\n"
    assert host.run("mda check").stdout == "all is well\n"
