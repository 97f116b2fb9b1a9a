"""Clients that the host tests run inside a host."""

from __future__ import annotations

import json
import re

from hosts.host import Host

_DIALOGUE = """
import json, re, socket, sys
address, lines = json.load(sys.stdin)
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect(address)
replies = connection.makefile('rb')
def reply():
    said = []
    while True:
        line = replies.readline().decode().rstrip('\\r\\n')
        said.append(line)
        if line[3:4] != '-':
            return '\\n'.join(said)
answers = [reply()]
for line in lines:
    connection.sendall(line.encode('latin-1') + b'\\r\\n')
    if answers[-1].startswith('354') and line != '.':
        continue
    answers.append(reply())
print(json.dumps(answers))
"""

_NET_SMTP = """
use strict; use Net::SMTP;
my ($port, $verb, $from, $to) = @ARGV;
my $smtp = Net::SMTP->new('127.0.0.1', Port => $port, Hello => 'perl.example') or die 'no';
print 'supports ', join(',', grep { defined $smtp->supports($_) } qw(SEND SOML SAML)), "\\n";
print 'from ', ($smtp->$verb($from) ? 1 : 0), ' ', $smtp->code, "\\n";
print 'to ', ($smtp->to($to) ? 1 : 0), ' ', $smtp->code, "\\n";
my $text = "Subject: by $verb\\n\\ntext by $verb\\n";
print 'data ', ($smtp->data($text) ? 1 : 0), ' ', $smtp->code, "\\n";
$smtp->quit;
"""

SMTP = "/run/mda/smtp.sock"
LMTP = "/run/mda/lmtp.sock"


def dialogue(host: Host, address: str, lines: list[str], user: str = "bob") -> list[str]:
    """Say `lines` on a Unix socket as `user`; the replies, the greeting first.

    Lines that stand between 354 and the dot are text and have no reply.
    """
    words = ["python3", "-I", "-c", _DIALOGUE]
    said = host.run(words, user=user, input=json.dumps([address, lines])).stdout
    answers: list[str] = json.loads(said)
    return answers


def message(verb: str, sender: str, recipient: str, text: str) -> list[str]:
    """The lines of one transaction, from EHLO to QUIT."""
    return [
        "EHLO client.example",
        f"{verb} FROM:<{sender}>",
        f"RCPT TO:<{recipient}>",
        "DATA",
        f"Subject: {verb}",
        "",
        text,
        ".",
        "QUIT",
    ]


def net_smtp(host: Host, port: int, verb: str, recipient: str = "alice") -> dict[str, str]:
    """What Perl's Net::SMTP does with one of its methods, step by step."""
    words = ["perl", "-e", _NET_SMTP, str(port), verb, "bob@example.org", recipient]
    lines = host.run(words, user="bob").stdout.splitlines()
    return dict(re.findall(r"(?m)^(\w+) (.*)$", "\n".join(lines)))
