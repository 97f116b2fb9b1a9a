"""What one user can do to the others by connecting (design, decision 9), and the sandbox."""

from __future__ import annotations

import pytest

from hosts.host import InstalledHost, wait_until
from hosts.speaking import LMTP, SMTP, dialogue

LOOP = """
import socket
for _ in range(5000):
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect('/run/mda/smtp.sock')
    except OSError:
        pass
    connection.close()
print('done')
"""
IDLE = """
import socket, sys
held = []
for _ in range(200):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect('/run/mda/smtp.sock')
    held.append(connection)
greetings = [connection.recv(100)[:3] for connection in held]
print(greetings.count(b'220'), greetings.count(b'421'), flush=True)
sys.stdin.read()
"""


def is_quiet(host: InstalledHost) -> bool:
    """No connection is served any more."""
    units = host.run("systemctl list-units --plain --no-legend --all 'mda-*@*'").stdout
    return not units.strip()


@pytest.fixture(autouse=True)
def _end_quiet(host: InstalledHost) -> None:
    wait_until(lambda: is_quiet(host), "no session is left", 60)


def check_carol_is_served(host: InstalledHost) -> None:
    assert host.run("systemctl is-active mda-smtp.socket").stdout == "active\n"
    assert dialogue(host, SMTP, ["QUIT"], user="carol")[0].startswith("220 ")


def test_a_loop_of_connections_leaves_the_socket_up(host: InstalledHost) -> None:
    host.run(["python3", "-I", "-c", LOOP], user="bob", timeout=300)
    wait_until(lambda: is_quiet(host), "the loop is over", 120)
    check_carol_is_served(host)
    assert host.run("systemctl list-units --failed --plain --no-legend 'mda*'").stdout == ""


def test_idle_connections_of_one_user_leave_room_for_the_others(host: InstalledHost) -> None:
    idle = host.start(["python3", "-I", "-c", IDLE], user="bob")
    assert idle.stdout is not None
    greeted, sent_away = map(int, idle.stdout.readline().split())
    assert greeted == 20, "receiver.connections_per_user"
    assert sent_away == 180
    check_carol_is_served(host)
    idle.communicate(timeout=30)
    wait_until(lambda: is_quiet(host), "the idle ones are gone", 60)
    check_carol_is_served(host)


def test_clients_that_vanish_leave_no_failed_unit(host: InstalledHost) -> None:
    text = "EHLO x\\r\\nMAIL FROM:<b@x>\\r\\nRCPT TO:<alice>\\r\\nDATA\\r\\nhalf"
    program = (
        "import socket\n"
        f"text = b'{text}'\n"
        "for end in range(0, len(text), 5):\n"
        "    connection = socket.socket(socket.AF_UNIX)\n"
        "    connection.connect('/run/mda/smtp.sock')\n"
        "    connection.sendall(text[:end])\n"
        "    connection.close()\n"
    )
    host.clear_mail()
    host.run(["python3", "-I", "-c", program], user="bob")
    wait_until(lambda: is_quiet(host), "the sessions have ended", 60)
    assert host.run("systemctl list-units --failed --plain --no-legend 'mda*'").stdout == ""
    assert list(host.path("/var/mail").iterdir()) == []


@pytest.mark.parametrize("address", [SMTP, LMTP])
def test_under_the_unit_the_broker_has_two_capabilities_and_no_way_to_more(
    host: InstalledHost, address: str
) -> None:
    program = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1]);"
        "c.recv(100); print('up', flush=True); sys.stdin.read()"
    )
    client = host.start(["python3", "-I", "-c", program, address], user="bob")
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    # The character class keeps grep's own words from matching.
    found = host.run("grep -lz 'mda/__main__[.]py' /proc/[0-9]*/cmdline").stdout.split()
    states = []
    for name in found:
        text = host.run(["cat", name.replace("cmdline", "status")]).stdout
        states.append(dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line))
    client.communicate(timeout=30)
    broker, session = sorted(states, key=lambda state: state["Uid"].split()[0] != "0")
    two = f"{(1 << 6) | (1 << 7):016x}"  # CAP_SETGID, CAP_SETUID
    assert (broker["CapPrm"], broker["CapEff"], broker["CapBnd"]) == (two, two, two)
    assert broker["NoNewPrivs"] == session["NoNewPrivs"] == "1"
    assert int(session["CapPrm"], 16) == int(session["CapEff"], 16) == 0
    session_uid = host.run("id -u mda-net").stdout.strip()
    assert session["Uid"].split() == [session_uid] * 4


def test_the_log_has_a_line_per_outcome_in_facility_mail(host: InstalledHost) -> None:
    host.run(["swaks", "--socket", SMTP, "-f", "log@x", "-t", "alice"], user="bob")
    shown = host.run("journalctl -q -o json SYSLOG_FACILITY=2 | grep log@x").stdout
    assert '"SYSLOG_IDENTIFIER":"mda"' in shown
    assert "delivered id=" in shown
    host.clear_mail()
