"""Mail on a booted host: every way in, into a real spool, read by the programs of old."""

from __future__ import annotations

import re

import pytest

from hosts.host import InstalledHost, free_port
from hosts.speaking import LMTP, SMTP, dialogue, net_smtp

BODY = "Subject: t\nX-Caf: é\n\nFrom the top\n>From quoted\n.\n..dots\nlast\n"
KEPT = "Subject: t\nX-Caf: é\n\n>From the top\n>>From quoted\n.\n..dots\nlast\n\n"


@pytest.fixture(autouse=True)
def _empty_spool(host: InstalledHost) -> None:
    host.clear_mail()


def count_messages(host: InstalledHost, user: str) -> dict[str, int]:
    """How many messages three readers see in the mailbox of `user`."""
    python = "import mailbox, sys; print(len(mailbox.mbox(sys.argv[1])))"
    mailbox = f"/var/mail/{user}"
    formail = f"formail -s sh -c 'cat >/dev/null; echo one' < {mailbox}"
    return {
        "s-nail": len(host.run(f"s-nail -R -H -f {mailbox}", user=user).stdout.splitlines()),
        "formail": host.run(formail, user=user).stdout.count("one"),
        "python": int(host.run(["python3", "-I", "-c", python, mailbox], user=user).stdout),
    }


def test_swaks_delivers_over_the_unix_socket(host: InstalledHost) -> None:
    host.run(
        ["swaks", "--socket", SMTP, "-f", "bob@example.org", "-t", "alice", "--data", "-"],
        user="bob",
        input=BODY.removesuffix("\n"),  # swaks ends the last line itself
    )
    kept = host.mailbox("alice").decode()
    top, _, rest = kept.partition("Subject:")
    lines = top.split("\n")
    assert re.fullmatch(r"From bob@example\.org \w{3} \w{3} [ \d]\d [\d:]{8} \d{4}", lines[0])
    assert lines[1] == "Return-Path: <bob@example.org>"
    assert lines[2] == f"Delivered-To: alice@{host.name}.example.org"
    assert re.fullmatch(r"Received: from \S+ \(local user bob, uid \d+\)", lines[3])
    assert f"\tby {host.name}.example.org with ESMTP id " in top
    assert "Subject:" + rest == KEPT
    state = host.run("stat -c '%U:%G %a' /var/mail/alice").stdout.strip()
    assert state == "alice:mail 660"
    assert count_messages(host, "alice") == {"s-nail": 1, "formail": 1, "python": 1}


def test_a_mailbox_grows_message_by_message(host: InstalledHost) -> None:
    for _ in range(3):
        host.run(["swaks", "--socket", SMTP, "-f", "b@x", "-t", "carol"], user="bob")
    assert count_messages(host, "carol") == {"s-nail": 3, "formail": 3, "python": 3}
    assert not list(host.path("/var/mail").glob("*.lock"))


def test_smtplib_and_net_smtp_deliver_over_tcp(host: InstalledHost, port: int) -> None:
    program = (
        "import smtplib, sys; smtp = smtplib.SMTP('127.0.0.1', int(sys.argv[1]));"
        "smtp.sendmail('bob@example.org', ['alice', 'nobody-here'], sys.stdin.read()); smtp.quit()"
    )
    text = BODY.replace("é", "e")
    host.run(["python3", "-I", "-c", program, str(port)], user="bob", input=text)
    assert net_smtp(host, port, "mail") == {
        "supports": "SEND,SOML,SAML",
        "from": "1 250",
        "to": "1 250",
        "data": "1 250",
    }
    kept = host.mailbox("alice").decode()
    assert KEPT.replace("é", "e") in kept
    assert "Subject: by mail\n\ntext by mail\n\n" in kept
    assert "Received: from perl.example ([127.0.0.1])" in kept
    assert count_messages(host, "alice") == {"s-nail": 2, "formail": 2, "python": 2}


def test_lmtp_answers_each_recipient(host: InstalledHost) -> None:
    words = ["swaks", "--protocol", "LMTP", "--socket", LMTP, "-f", "b@x", "--data", "-"]
    words += ["-t", "alice@far.example,nobody-here,carol"]
    said = host.run(words, user="bob", input=BODY.removesuffix("\n")).stdout
    assert said.count(" 250 2.0.0 <") == 2
    assert "550 5.1.1 <nobody-here>" in said
    for user in ("alice", "carol"):
        assert host.mailbox(user).decode().endswith(KEPT)


@pytest.mark.parametrize("user", ["root", "alice"])
def test_the_delivery_command(host: InstalledHost, user: str) -> None:
    words = ["mda", "deliver", "-f", "bob@example.org", "-d", "alice"]
    done = host.run(words, user=user, input=BODY)
    assert (done.stdout, done.stderr) == ("", "")
    kept = host.mailbox("alice").decode()
    assert kept.startswith("From bob@example.org ")
    assert kept.endswith(KEPT)
    assert (
        host.run(["mda", "deliver", "-d", "nobody-here"], user=user, check=False).returncode == 67
    )


def test_a_broken_configuration_bounces_nothing(host: InstalledHost) -> None:
    config = host.path("/etc/mda/mda.toml")
    whole = config.read_text()
    config.write_text("[receiver]\nhostnam = 'x'\n")
    try:
        said = dialogue(host, SMTP, [])
        assert said[0].startswith(f"421 4.3.5 {host.name}.example.org Configuration error")
        done = host.run(["mda", "deliver", "-d", "alice"], input=BODY, check=False)
        assert done.returncode == 75
        assert done.stderr.startswith("4.3.5 ")
        assert "mda.toml:2: receiver.hostnam: unknown key; did you mean 'hostname'?" in done.stderr
    finally:
        config.write_text(whole)
    assert host.run(["mda", "deliver", "-d", "alice"], input=BODY).returncode == 0


@pytest.mark.parametrize("damage", ["mv /opt/mda/bin /opt/mda/off", "chmod 0 /opt/mda"])
@pytest.mark.parametrize("user", ["root", "alice"])
def test_a_broken_venv_bounces_nothing(host: InstalledHost, damage: str, user: str) -> None:
    mend = "chmod 755 /opt/mda; test ! -d /opt/mda/off || mv /opt/mda/off /opt/mda/bin"
    if damage.startswith("chmod") and user == "root":
        damage = "mv /opt/mda/lib /opt/mda/off-lib"
        mend = "mv /opt/mda/off-lib /opt/mda/lib"
    host.run(damage)
    try:
        done = host.run(["mda", "deliver", "-d", "alice"], user=user, input=BODY, check=False)
    finally:
        host.run(mend)
    assert done.returncode == 75, done
    assert "4.3.0 mda has failed" in done.stderr
    assert host.mailbox("alice") == b""
    assert host.run(["mda", "deliver", "-d", "alice"], user=user, input=BODY).returncode == 0


INETD_PROBE = """
import socket, sys
connection = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 30)
lines = 'HELO x', 'MAIL FROM:<b@x>', 'RCPT TO:<alice>', 'DATA', 'hi', '.', 'QUIT'
connection.sendall(''.join(line + '\\r\\n' for line in lines).encode())
try:
    while more := connection.recv(65536):
        sys.stdout.write(more.decode())
except ConnectionResetError:
    pass
"""


@pytest.mark.parametrize("state", ["well", "configuration", "venv"])
def test_under_inetd_the_client_reads_no_diagnostics(host: InstalledHost, state: str) -> None:
    port = free_port()
    line = f"127.0.0.1:{port} stream tcp nowait root /usr/local/bin/mda mda receive\n"
    host.path("/root/inetd.conf").write_text(line)
    config = host.path("/etc/mda/mda.toml")
    whole = config.read_text()
    inetd = host.start(["/usr/sbin/inetd", "-i", "/root/inetd.conf"])
    try:
        if state == "configuration":
            config.write_text("nonsense")
        if state == "venv":
            host.run("mv /opt/mda/lib /opt/mda/off-lib")
        host.run(f"for i in 1 2 3 4 5; do ss -ltn | grep -q :{port} && break; sleep .2; done")
        said = host.run(["python3", "-I", "-c", INETD_PROBE, str(port)]).stdout
    finally:
        config.write_text(whole)
        host.run("test ! -d /opt/mda/off-lib || mv /opt/mda/off-lib /opt/mda/lib")
        host.run(["pkill", "-x", "inetd"])
        inetd.communicate(timeout=30)
    assert all(re.match(r"\d{3}[ -]", line) for line in said.splitlines()), said
    expected = {"well": "250 2.0.0 Delivered", "configuration": "421 4.3.5", "venv": ""}[state]
    assert expected in said
    assert bool(host.mailbox("alice")) == (state == "well")


KILL_IN_THE_MIDDLE = r"""
mda deliver -f carol@example.org -d alice </root/large & writer=$!
until [ "$(stat -c %s /var/mail/alice)" -gt 1000000 ]; do :; done
read -r pid </var/mail/alice.lock && kill -9 "$pid"
wait $writer
"""


def test_delivery_that_is_killed_in_the_middle_is_undone_by_check(host: InstalledHost) -> None:
    host.run("mda deliver -f bob@example.org -d alice", input=BODY)
    before = host.mailbox("alice")
    host.path("/root/large").write_bytes(b"Subject: large\n\n" + b"a line of text\n" * 3_400_000)
    try:
        # Now and then it is through before it can be killed.
        for _ in range(10):
            if host.run(KILL_IN_THE_MIDDLE, check=False).returncode == 75:
                break
            host.path("/var/mail/alice").write_bytes(before)
        torn = len(host.mailbox("alice")) - len(before)
        assert 0 < torn < 51_000_000
        first, second, last = host.run("mda check").stdout.splitlines()
        assert first == f"/var/mail/alice: removed a half message of {torn} bytes"
        assert second.startswith("/var/mail/alice: removed the dead lock alice.lock, PID ")
        assert last == "all is well"
        assert host.mailbox("alice") == before
    finally:
        host.path("/root/large").unlink()
