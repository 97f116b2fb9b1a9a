"""Real transport agents, as packaged, in every way in which they hand mail to mda."""

from __future__ import annotations

import re
from concurrent.futures import Future

import pytest

from hosts import speaking
from hosts.agents import CERTIFICATE, COMMAND_WAYS, LMTP_WAYS, WAYS, Handover
from hosts.corpus import BODIES, below_added_lines, make_corpus, number_of, read_mbox
from hosts.host import InstalledHost, free_port, wait_until
from hosts.speaking import LMTP, SMTP

SENDMAIL = """
import os, subprocess, sys
for name in sorted(os.listdir('/var/tmp/corpus'), key=int):
    with open('/var/tmp/corpus/' + name, 'rb') as message:
        words = ['/usr/sbin/sendmail', '-i', '-f', 'bob@example.org', sys.argv[1]]
        subprocess.run(words, stdin=message, check=True)
"""


@pytest.fixture(scope="module")
def handover(request: pytest.FixtureRequest, agents: dict[str, Future[InstalledHost]]) -> Handover:
    """The agent's host, its agent set up to hand mail over in the way that is asked for."""
    way: str = request.param
    name, set_up = WAYS[way]
    host = agents[name].result()
    set_up(host)
    return Handover(host, way)


@pytest.fixture(autouse=True)
def _empty_spool(handover: Handover) -> None:
    handover.host.clear_mail()


def through(*ways: str) -> pytest.MarkDecorator:
    """Run a test in these ways."""
    return pytest.mark.parametrize("handover", ways, indirect=True)


def wait_for_mail(handover: Handover, user: str, count: int) -> list[bytes]:
    """The messages in a mailbox, as soon as there are so many, in the order of sending."""
    host = handover.host
    wait_until(lambda: host.mailbox(user).count(b"\nX-Number: ") >= count, "the mail is there", 180)
    wait_until(lambda: host.mailbox(user).endswith(b"\n\n"), "the last is whole")
    found = sorted(read_mbox(host.mailbox(user)), key=number_of)
    assert len(found) == count
    return found


def wait_for_bounce(handover: Handover) -> bytes:
    """The one message in bob's mailbox, as soon as it is there."""
    host = handover.host
    wait_until(lambda: host.mailbox("bob").endswith(b"\n\n"), "the bounce is there", 60)
    (bounce,) = read_mbox(host.mailbox("bob"))
    assert bounce.startswith(b"Return-Path: <>\n")
    return bounce


# 200 messages by LMTP; where each one starts a program, one of every kind.
@through(*WAYS)
def test_every_message_arrives_byte_for_byte(handover: Handover) -> None:
    host = handover.host
    altered = handover.agent.altered
    count = 200 if handover.way in LMTP_WAYS else len(BODIES) - len(altered)
    corpus = list(make_corpus(count, altered))
    folder = host.path("/var/tmp/corpus")
    host.run("rm -rf /var/tmp/corpus; mkdir /var/tmp/corpus")
    for number, message in enumerate(corpus):
        (folder / str(number)).write_bytes(message)

    host.run(["python3", "-I", "-c", SENDMAIL, handover.address("alice")], user="bob")

    kept = wait_for_mail(handover, "alice", count)
    assert [number_of(message) for message in kept] == list(range(count))
    changed = {
        message: corpus[number_of(message)]
        for message in map(below_added_lines, kept)
        if message != corpus[number_of(message)]
    }
    assert not changed


@through("postfix lmtp")
@pytest.mark.parametrize(("options", "path"), [((), SMTP), (("-L",), LMTP)])
def test_twenty_sessions_of_smtp_source(
    handover: Handover, options: tuple[str, ...], path: str
) -> None:
    """Postfix's load generator: 200 messages by 20 sessions at a time, each one whole."""
    host = handover.host
    words = ["/usr/sbin/smtp-source", "-s", "20", "-m", "200", "-l", "4096"]
    words += ["-f", "bob@example.org", "-t", "alice", "-S", "by smtp-source"]
    host.run([*words, *options, f"unix:{path}"])
    kept = read_mbox(host.mailbox("alice"))
    texts = {message.partition(b"\n\n")[2] for message in kept}
    assert len(kept) == 200
    assert len(texts) == 1, "one is not like the others"
    assert len(texts.pop()) > 3000
    assert not list(host.path("/var/mail").glob("*.lock"))


# -- the words of the command ---------------------------------------------------------

# Sent by `sendmail -bs`, which takes what a client may say, or with -f.
SUBMIT = r"""
import subprocess, sys
sender, recipient, number = sys.argv[1:]
parameter = '' if sender.isascii() else ' SMTPUTF8'
mail = f'MAIL FROM:<{sender}>{parameter}\r\nRCPT TO:<{recipient}>\r\nDATA\r\n'
text = f'X-Number: {number}\r\n\r\ntext\r\n.\r\nQUIT\r\n'
session = subprocess.Popen(['/usr/sbin/sendmail', '-bs'], stdin=-1, stdout=-1)
for line in ('EHLO client.example\r\n' + mail + text).splitlines(keepends=True):
    is_text = line[:1] in 'X\r' or line == 'text\r\n'
    if not is_text:
        reply = b'250-'
        while reply[3:4] == b'-':
            reply = session.stdout.readline()
        assert reply[:1] in (b'2', b'3'), (line, reply)
    session.stdin.write(line.encode())
    session.stdin.flush()
session.stdin.close()
sys.exit(session.wait())
"""
# What was sent, and what the Return-Path says.
AS_SENT = {
    each: each
    for each in (
        "",
        "bob@example.org",
        '"two words"@example.org',
        '"a\\"b"@example.org',
        "-f@example.org",
        '"<>"@example.org',
        "o'b$HOME`id`@example.org",
    )
}
# local(8) leaves no character to the command that a shell could mistake.
TAMED = AS_SENT | {
    '"two words"@example.org': "two_words@example.org",
    '"a\\"b"@example.org': "a_b@example.org",
    '"<>"@example.org': "__@example.org",
    "o'b$HOME`id`@example.org": "o_b_HOME_id_@example.org",
    "jörg@exämple.org": "j__rg@ex__mple.org",
}
SENDERS = {
    "postfix mailbox_command": TAMED,
    "postfix pipe": AS_SENT | {"jörg@exämple.org": "jörg@exämple.org"},
    "exim pipe": AS_SENT,
}
# As its own sendmail takes them.
OPENSMTPD_SENDERS = {
    "": "",
    "<>": "",
    "bob@example.org": "bob@example.org",
    "-f@example.org": "-f@example.org",
    "o'b$HOME@example.org": '"o:b:HOME"@example.org',
}


def senders_kept(handover: Handover, count: int) -> list[str]:
    """The reverse-paths of the messages in alice's mailbox, in the order of sending."""
    kept = wait_for_mail(handover, "alice", count)
    found = [re.match(rb"Return-Path: <(.*)>\n", message) for message in kept]
    return [each[1].decode() for each in found if each]


@through(*SENDERS)
def test_every_sender_arrives(handover: Handover) -> None:
    senders = SENDERS[handover.way]
    for number, sender in enumerate(senders):
        words = ["python3", "-I", "-c", SUBMIT, sender, handover.address("alice"), str(number)]
        handover.host.run(words, user="bob")
    assert senders_kept(handover, len(senders)) == list(senders.values())
    assert "libcap-ng" not in handover.host.run("journalctl -b -q --no-pager").stdout


@through("opensmtpd mda")
def test_every_sender_of_opensmtpd_arrives(handover: Handover) -> None:
    for number, sender in enumerate(OPENSMTPD_SENDERS):
        words = ["/usr/sbin/sendmail", "-i", "-f", sender, handover.address("alice")]
        handover.host.run(words, user="bob", input=f"X-Number: {number}\n\ntext\n")
    kept = senders_kept(handover, len(OPENSMTPD_SENDERS))
    assert kept == list(OPENSMTPD_SENDERS.values())
    assert "libcap-ng" not in handover.host.run("journalctl -b -q --no-pager").stdout


@through("postfix mailbox_command", "postfix pipe", "postfix pipe DRF")
def test_an_extension_is_passed_on(handover: Handover) -> None:
    handover.send("X-Number: 0\n\ntext\n", "alice+lists")
    (kept,) = wait_for_mail(handover, "alice", 1)
    assert re.search(rb"\n\tfor <alice\+lists>; ", kept)


@through("postfix pipe")
def test_one_command_serves_several_recipients(handover: Handover) -> None:
    handover.send("X-Number: 0\n\ntext\n", "alice", "carol")
    copies = [*wait_for_mail(handover, "alice", 1), *wait_for_mail(handover, "carol", 1)]
    names = [re.findall(rb"\n\tby \S+ with LMTP id (\S+);", copy) for copy in copies]
    assert names[0] == names[1]
    assert len(names[0]) == 1


# -- what the agent makes of the exit status --------------------------------------------

FAULTS = {
    "the interpreter is gone": (
        "mv /opt/mda/bin/python3 /opt/mda/bin/gone",
        "mv /opt/mda/bin/gone /opt/mda/bin/python3",
        "mda has failed (exit status 127)",
    ),
    "the program cannot be read": (
        "chmod 700 /opt/mda",
        "chmod 755 /opt/mda",
        "mda has failed (exit status 126)",
    ),
    "the configuration is broken": (
        "cp -p /etc/mda/mda.toml /etc/mda/kept; echo '[reciever]' >> /etc/mda/mda.toml",
        "mv /etc/mda/kept /etc/mda/mda.toml",
        "Configuration error",
    ),
}


@through(*COMMAND_WAYS)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_mail_waits_until_mda_is_mended(handover: Handover, fault: str) -> None:
    break_it, mend_it, reason = FAULTS[fault]
    before = handover.log()
    handover.host.run(break_it)
    try:
        handover.send("X-Number: 0\n\ntext\n", "alice")
        wait_until(lambda: reason in handover.log().removeprefix(before), "the log says why")
        wait_until(lambda: "alice@" in handover.queue(), "the mail waits")
        assert handover.host.mailbox("alice") == b""
    finally:
        handover.host.run(mend_it)
    handover.flush()
    wait_for_mail(handover, "alice", 1)
    assert handover.host.mailbox("bob") == b"", "nothing has bounced"


@through(*COMMAND_WAYS)
def test_mail_for_nobody_comes_back(handover: Handover) -> None:
    # An account that the agent knows, and no person for mda.
    handover.host.run("id robot >/dev/null 2>&1 || useradd --system -m robot")
    handover.send("X-Number: 0\n\ntext\n", "robot")
    assert b"5.1.1" in wait_for_bounce(handover)


# -- loops ----------------------------------------------------------------------------

FORWARD = '"|/usr/local/bin/mda deliver -d alice"\n'
BY_LOCAL = ("postfix mailbox_command", "exim pipe", "opensmtpd mda")


def steer(handover: Handover, forward: str, keys: dict[str, str]) -> None:
    """Write alice's forward file, and settings; no text and no keys undo it all."""
    host = handover.host
    host.run("cat > .forward; test -s .forward || rm .forward", user="alice", input=forward)
    script = "".join(f"s/^#*{key} = .*/{key} = {value}/;" for key, value in keys.items())
    host.run(["sed", "-i", script, "/etc/mda/mda.toml"])


@through(*BY_LOCAL)
def test_a_forward_file_that_names_mda_is_no_loop(handover: Handover) -> None:
    steer(handover, FORWARD, {})
    try:
        handover.send("X-Number: 0\n\ntext\n", "alice")
        (kept,) = wait_for_mail(handover, "alice", 1)
    finally:
        steer(handover, "", {})
    assert b"\n\ntext\n" in kept
    assert handover.host.mailbox("bob") == b"", "nothing has come back"


@through(*BY_LOCAL)
def test_a_forward_file_that_calls_itself_ends_with_546(handover: Handover) -> None:
    # mda follows forward files too, as the agent does already: round and round.
    steer(handover, FORWARD, {"mta_expands": "false", "commands": "true"})
    try:
        handover.send("X-Number: 0\n\ntext\n", "alice")
        assert b"5.4.6" in wait_for_bounce(handover)
        assert handover.host.mailbox("alice") == b""
    finally:
        steer(handover, "", {"mta_expands": "true", "commands": "false"})


@through("postfix pipe", "postfix pipe DRF")
def test_mail_that_is_sent_back_to_us_ends_with_546(handover: Handover) -> None:
    # Every round is another message for Postfix, and only mda can know that it was here.
    handover.host.run("mda install --now --commands")
    forward = r'"|/usr/sbin/sendmail -i -f \"$SENDER\" alice"'
    steer(handover, forward, {"mta_expands": "false", "commands": "true"})
    try:
        handover.send("X-Number: 0\n\ntext\n", "alice")
        assert b"5.4.6" in wait_for_bounce(handover)
        assert handover.host.mailbox("alice") == b""
    finally:
        steer(handover, "", {"mta_expands": "true", "commands": "false"})
        handover.host.run("mda install --now --no-commands")


# -- outbound.via = "sendmail" ---------------------------------------------------------


@through("postfix lmtp", "exim lmtp", "opensmtpd lmtp")
def test_mail_for_other_hosts_goes_out_by_the_hosts_own_sendmail(handover: Handover) -> None:
    # The host's own name is another's for mda, and the agent's: it comes back for carol.
    name = "mda.invalid"
    keys = {"via": '"sendmail"', "hostname": f'"{name}"', "local_domains": f'["{name}"]'}
    steer(handover, handover.address("carol"), keys)
    try:
        lines = speaking.message("MAIL", handover.address("bob"), "alice", "text")
        lines[lines.index("")] = "X-Number: 0\r\n"
        assert speaking.dialogue(handover.host, SMTP, lines)[-2].startswith("250 2.0.0 Queued as ")
        (kept,) = wait_for_mail(handover, "carol", 1)
    finally:
        steer(handover, "", {"via": '"smtp"', "hostname": '""', "local_domains": "[]"})
    assert b"\n\ntext\n" in kept
    assert handover.host.run("mda queue list").stdout == "0 messages\n"
    assert f"Return-Path: <{handover.address('bob')}>".encode() in kept


# -- next hops by SMTP ------------------------------------------------------------------

# How an agent is made to receive on a port of loopback, beside what it does already.
RECEIVING = {
    "postfix": "postconf -M '127.0.0.1:{port}/inet=127.0.0.1:{port} inet n - n - - smtpd';"
    " postfix reload; sleep 2",
    "exim": "sed -i \"s/^dc_local_interfaces=.*/dc_local_interfaces='127.0.0.1.{port}'/\""
    " /etc/exim4/update-exim4.conf.conf; update-exim4.conf; systemctl restart exim4",
    "opensmtpd": "sed -i '1i listen on 127.0.0.1 port {port}' /etc/smtpd.conf;"
    " systemctl stop opensmtpd; while pkill -x smtpd; do sleep 0.1; done;"
    " systemctl start opensmtpd; until smtpctl show stats; do sleep 0.1; done",
}


@through("postfix lmtp", "exim lmtp", "opensmtpd lmtp")
def test_mail_goes_out_by_smtp_to_a_real_agent(handover: Handover) -> None:
    """The host's own name is another's for mda, and the agent's: it comes back for carol."""
    host, port = handover.host, free_port()
    host.run(RECEIVING[host.name].format(port=port))
    altered = (*handover.agent.altered, "lone CR")
    corpus = list(make_corpus(len(BODIES) - len(set(altered)), altered))
    keys = {"hostname": '"mda.invalid"', "local_domains": '["mda.invalid"]'}
    steer(handover, "", keys)
    host.run(
        "sed -i '/^.routes.$/r /dev/stdin' /etc/mda/mda.toml", input=f'"*" = "127.0.0.1:{port}"\n'
    )
    try:
        for message in corpus:
            lines = message.decode("latin-1").replace("\n.", "\n..").split("\n")[:-1]
            opening = [
                f"MAIL FROM:<{handover.address('bob')}>",
                f"RCPT TO:<{handover.address('carol')}>",
            ]
            said = speaking.dialogue(host, SMTP, ["EHLO x", *opening, "DATA", *lines, ".", "QUIT"])
            assert said[-2].startswith("250 2.0.0 Queued as "), said
        kept = wait_for_mail(handover, "carol", len(corpus))
    finally:
        host.run('sed -i \'/^"\\*" = "127.0.0.1/d\' /etc/mda/mda.toml')
        steer(handover, "", {"hostname": '""', "local_domains": "[]"})
    assert [below_added_lines(each) for each in kept] == corpus
    assert host.run("mda queue list").stdout == "0 messages\n"


# What smtp-sink is told to do, and what becomes of the message.
SINK = {
    "-f connect": "deferred 451 4.3.2",
    "-f ehlo": "sent 250",
    "-f helo,ehlo": "deferred 451 4.5.0",
    "-f mail": "bounced 500",
    "-f rcpt": "bounced 500",
    "-f data": "bounced 500",
    "-f .": "bounced 500",
    "-f quit": "sent 250",
    "-r connect": "deferred 4",
    "-r ehlo": "deferred 450",
    "-r mail": "deferred 450",
    "-r rcpt": "deferred 450",
    "-r data": "deferred 450",
    "-r .": "deferred 450",
    "-r quit": "sent 250",
    "-q connect": "deferred 451 4.4.2",
    "-q ehlo": "deferred 451 4.4.2",
    "-q mail": "deferred 451 4.4.2",
    "-q rcpt": "deferred 451 4.4.2",
    "-q data": "deferred 451 4.4.2",
    "-q .": "deferred 451 4.4.2",
    "-q quit": "sent 250",
    "-Q mail": "deferred 421",
    "-Q .": "deferred 421",
    "-w 3": "sent 250",
    "-p": "sent 250",  # without PIPELINING
    "-e": "sent 250",  # without EHLO
    "-8": "sent 250",  # without 8BITMIME
}


@through("postfix lmtp")
def test_a_hop_that_fails_in_every_way(handover: Handover) -> None:
    """Postfix's smtp-sink: what it refuses, what it defers, where it hangs up, and slowly."""
    host = handover.host
    told = {}
    ports = [free_port() for _ in SINK]
    # All routes at once, since a run that is under way keeps to those that it has read.
    routes = [f'"sink{at}.example" = "127.0.0.1:{port}"\n' for at, port in enumerate(ports)]
    host.run("systemctl stop mda-queue.service")
    host.run("sed -i '/^.routes.$/r /dev/stdin' /etc/mda/mda.toml", input="".join(routes))
    for number, (options, port) in enumerate(zip(SINK, ports, strict=True)):
        sink = host.start(f"exec /usr/sbin/smtp-sink {options} 127.0.0.1:{port} 10", user="carol")
        host.run(f"until ss -tln | grep -q 127.0.0.1:{port}; do sleep 0.05; done")
        lines = speaking.message("MAIL", "bob@example.org", f"x@sink{number}.example", "caf\xe9")
        assert speaking.dialogue(host, SMTP, lines)[-2].startswith("250 2.0.0 Queued as ")
        shown = "journalctl -b -q --no-pager -o cat -t mda | grep -m 1 to=x@sink{0}.example.*hop="
        line = host.run(f"for i in $(seq 150); do {shown} && exit; sleep 0.1; done".format(number))
        host.run("pkill -x smtp-sink")
        sink.communicate()
        found = re.search(r'(sent|deferred|bounced) .*reply="([^"]*)"', line.stdout)
        told[options] = f"{found[1]} {found[2]}" if found else line.stdout
    host.run("sed -i '/^\"sink.*example\" =/d' /etc/mda/mda.toml")
    host.run("find /var/spool/mda/queue -type f -delete")
    wrong = {
        each: told[each] for each, outcome in SINK.items() if not told[each].startswith(outcome)
    }
    assert wrong == {}


# -- agents as clients ------------------------------------------------------------------

# How an agent is made to send far.example's mail to a port of loopback.
SENDING = {
    "postfix": "postconf -e 'transport_maps = inline:{{far.example=smtp:[127.0.0.1]:{port}}}'"
    " 'smtp_tls_security_level = may'; postfix reload; sleep 2",
    "exim": "printf '%s\\n' far: '  driver = manualroute' '  domains = far.example'"
    " '  route_list = far.example 127.0.0.1::{port}' '  transport = remote_smtp' '  self = send'"
    " > /etc/exim4/conf.d/router/150_far; update-exim4.conf; systemctl restart exim4",
}
SENT = {
    "postfix": r"to=<alice@far.example>, .*status=sent \(250 2\.0\.0 Delivered to mailbox\)",
    # K is CHUNKING.
    "exim": r"=> alice@far.example .* X=TLS\S+ .*\bK .*C=\"250 2\.0\.0 Delivered to mailbox",
}


@through("postfix lmtp", "exim lmtp")
def test_an_agent_sends_to_us_in_the_way_that_it_knows(handover: Handover) -> None:
    """Both in TLS, Exim in chunks, and Postfix with what its sender wants to be told."""
    host, port = handover.host, free_port()
    name = '["far.example"]'
    keys = {"tls_certificate": r'"\/etc\/mda\/tls.pem"', "local_domains": name}
    host.run(CERTIFICATE)
    steer(handover, "", keys)
    host.run(f"mda install --now --listen 127.0.0.1:{port}")
    host.run(SENDING[host.name].format(port=port))
    words = ["/usr/sbin/sendmail", "-i", "-f", "carol@far.example"]
    words += ["-N", "success,failure", "-V", "env1"] if host.name == "postfix" else []
    try:
        message = "Subject: x\n\n.\nby an agent\n"
        host.run([*words, "alice@far.example"], user="carol", input=message)
        wait_until(lambda: b"by an agent" in host.mailbox("alice"), "it is there", 60)
        if host.name == "postfix":
            wait_until(lambda: b"Mail delivered" in host.mailbox("carol"), "she is told", 60)
            assert b"\nOriginal-Envelope-Id: env1\n" in host.mailbox("carol")
    finally:
        steer(handover, "", {"tls_certificate": '""', "local_domains": "[]"})
    kept = host.mailbox("alice").decode()
    assert "\n.\nby an agent\n" in kept
    assert "with ESMTPS id " in kept
    wait_until(lambda: re.search(SENT[host.name], handover.log()) is not None, "it is logged")
