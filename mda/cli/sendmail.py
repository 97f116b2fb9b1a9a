"""`mda sendmail`: what programs expect of /usr/sbin/sendmail, on a host without an MTA.

The message is handed to the receiver's Unix socket, so that the kernel says who sends it
(design, decision 8); what of it is for other hosts waits in the queue.
"""

from __future__ import annotations

import getopt
import os
import select
import socket
from email.utils import format_datetime, formataddr, getaddresses, localtime, make_msgid

import click

from mda import log
from mda.cli import TEMPORARY_FAILURE, complain, handover, keep_from_bouncing
from mda.cli.deliver import NoMessage, read_message, report
from mda.cli.handover import Refused
from mda.cli.person import own_account, own_host, own_path
from mda.receiver.grammar import spell_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mda.model import Outcome

_USAGE = 64
_OPTIONS = "A:B:b:C:F:f:GhiL:mN:nO:o:p:R:r:tUV:vX:"
# Taken with a value that stands in the same word, or none: `-q30m`, `-d`.
_VALUE_IN_WORD = ("-q", "-d", "-h")
_LARGEST_HEADER = 1 << 20
_READ = 65_536
_RECIPIENTS = ("to", "cc", "bcc", "resent-to", "resent-cc", "resent-bcc")
_HIDDEN = ("bcc", "resent-bcc")


class Invocation:
    """What the words after `sendmail` ask for.

    `mode` is the letter of -b, "m" to send a message and "q" to run the queue. `sender` is a
    reverse-path without brackets, None where the words name none.
    """

    def __init__(self) -> None:
        self.mode = "m"
        self.sender: str | None = None
        self.full_name = ""
        self.takes_recipients = False
        self.ends_at_dot = True
        self.recipients: list[str] = []


class Words(click.Command):
    """A command whose words are left as they are: they are sendmail's, and no click's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Only --help is ours."""
        if args == ["--help"]:
            return super().parse_args(ctx, args)
        ctx.params["words"] = tuple(args)
        return []


@click.command(
    "sendmail",
    cls=Words,
    options_metavar="[-t] [-i] [-f SENDER] [-F NAME] [-bp|-bs|-bi|-bv]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPIENT]...")
def command(words: tuple[str, ...]) -> None:
    """Send the message on standard input, as programs expect of sendmail."""
    log.open_log(may_use_stderr=False)
    try:
        asked = read_words(list(words))
    except getopt.GetoptError as error:
        complain(f"sendmail: {error}")
        raise SystemExit(_USAGE) from error
    raise SystemExit(keep_from_bouncing(lambda: obey(asked)))


def read_words(words: list[str]) -> Invocation:
    """Take the words of the command line apart; raises GetoptError."""
    asked = Invocation()
    end = words.index("--") if "--" in words else len(words)
    plain = [word for word in words[:end] if not word.startswith(_VALUE_IN_WORD)]
    options, asked.recipients = getopt.getopt(plain + words[end:], _OPTIONS)
    last = dict(options)
    asked.mode = "q" if any(word.startswith("-q") for word in words[:end]) else last.get("-b", "m")
    asked.full_name = last.get("-F", "")
    asked.takes_recipients = "-t" in last
    asked.ends_at_dot = "-i" not in last and ("-o", "i") not in options
    sender = last.get("-f", last.get("-r"))
    if sender is not None:
        asked.sender = sender.strip().removeprefix("<").removesuffix(">")
    return asked


def obey(asked: Invocation) -> int:
    """Do it; the exit status."""
    match asked.mode:
        case "m":
            return send(asked)
        case "s":
            return speak()
        case "v":
            return verify(asked)
        case "p":
            return start_mda("queue", "list")
        case "q":
            return start_mda("queue", "run")
        case "i" | "I":
            return start_mda("aliases")
    complain(f"sendmail: -b{asked.mode} is not for mda: its units receive mail and run the queue")
    return _USAGE


def start_mda(*words: str) -> int:
    """Another command of ours, in the place of this one."""
    from mda.cli import group

    status: object = group.main(list(words), prog_name="mda", standalone_mode=False)
    return status if isinstance(status, int) else 0


def send(asked: Invocation) -> int:
    """Read the message, complete its header, and hand it over."""
    pieces = read_message()
    if asked.ends_at_dot:
        pieces = read_to_dot(pieces)
    fields, rest = split_header(pieces)
    recipients = list(asked.recipients)
    if asked.takes_recipients:
        recipients += name_recipients(fields)
        fields = [field for field in fields if name_of(field) not in _HIDDEN]
    recipients = list(dict.fromkeys(recipients))
    if not recipients:
        complain("sendmail: no recipients")
        return _USAGE
    sender = own_path() if asked.sender is None else spell_path(asked.sender)
    message = [b"".join([*fields, *missing_fields(fields, sender, asked.full_name)])]
    return report(recipients, hand_over(sender, recipients, message, rest))


def hand_over(
    sender: str, recipients: list[str], header: list[bytes], rest: Iterator[bytes]
) -> list[Outcome]:
    """One transaction by SMTP, which takes mailboxes of other hosts too."""

    def chain() -> Iterator[bytes]:
        yield from header
        yield from rest

    try:
        with handover.Client("smtp") as client:
            paths = [spell_path(recipient) for recipient in recipients]
            return client.deliver("MAIL", sender, paths, chain())
    except Refused as refused:
        return [refused.outcome] * len(recipients)


def read_to_dot(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text up to a line that is a dot and nothing else (without -i)."""
    waiting = b""
    is_at_start = True
    for piece in pieces:
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            if is_at_start and line.rstrip(b"\r") == b".":
                return
            yield line + b"\n"
            is_at_start = True
        if len(waiting) > _READ:  # no dot by itself any more
            yield waiting
            waiting, is_at_start = b"", False
    if waiting and not (is_at_start and waiting == b"."):
        yield waiting


def split_header(pieces: Iterator[bytes]) -> tuple[list[bytes], Iterator[bytes]]:
    """The fields with their line ends, each with what is folded below it, and the rest.

    The rest begins with the empty line, which is made where a text has none. Raises NoMessage
    for a header without an end.
    """
    fields: list[bytes] = []
    waiting = b""
    for piece in pieces:
        waiting += piece
        while b"\n" in waiting:
            line, _, behind = waiting.partition(b"\n")
            if not is_of_header(line, fields):
                empty = b"" if not line.strip() else b"\n"
                return fields, _put_before(empty + waiting, pieces)
            if line[:1] in (b" ", b"\t"):
                fields[-1] += line + b"\n"
            else:
                fields.append(line + b"\n")
            waiting = behind
        if len(waiting) + sum(map(len, fields)) > _LARGEST_HEADER:
            raise NoMessage(f"a header of more than {_LARGEST_HEADER} bytes")
    if waiting and is_of_header(waiting, fields):
        fields.append(waiting + b"\n")
        waiting = b""
    return fields, iter([b"\n" + waiting])


def is_of_header(line: bytes, fields: list[bytes]) -> bool:
    """A field, or what is folded below one."""
    if line[:1] in (b" ", b"\t"):
        return bool(fields) and bool(line.strip())
    name, colon, _ = line.partition(b":")
    return bool(colon) and bool(name) and not set(name.rstrip()) & set(b" \t\r")


def _put_before(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from pieces


def name_of(field: bytes) -> str:
    """The name of a field, in lower case."""
    return field.partition(b":")[0].strip().lower().decode("ascii", "replace")


def name_recipients(fields: list[bytes]) -> list[str]:
    """The addresses in To, Cc and Bcc, or where the message is resent in those of that."""
    names = {name_of(field) for field in fields}
    is_resent = any(name.startswith("resent-") for name in names & set(_RECIPIENTS))
    wanted = [name for name in _RECIPIENTS if name.startswith("resent-") == is_resent]
    values = [
        field.partition(b":")[2].decode("utf-8", "surrogateescape").replace("\n", " ")
        for field in fields
        if name_of(field) in wanted
    ]
    return [address for _, address in getaddresses(values) if address]


def missing_fields(fields: list[bytes], sender: str, full_name: str) -> list[bytes]:
    """The lines that a message must have and this one has not (RFC 5322 3.6)."""
    names = {name_of(field) for field in fields}
    lines: list[str] = []
    if "from" not in names:
        name = full_name or own_account().pw_gecos.split(",")[0]
        lines.append(f"From: {formataddr((name, sender or own_path()))}")
    if "date" not in names:
        lines.append(f"Date: {format_datetime(localtime())}")
    if "message-id" not in names:
        lines.append(f"Message-ID: {make_msgid(domain=own_host())}")
    return [f"{' '.join(line.split())}\n".encode("utf-8", "replace") for line in lines]


def verify(asked: Invocation) -> int:
    """-bv: say what would become of each address, and send nothing."""
    paths = [spell_path(recipient) for recipient in asked.recipients]
    try:
        with handover.Client("smtp") as client:
            outcomes = client.ask("MAIL", own_path(), paths)
    except Refused as refused:
        outcomes = [refused.outcome] * len(paths)
    for recipient, outcome in zip(asked.recipients, outcomes, strict=True):
        if outcome.is_done:
            click.echo(f"{recipient}... deliverable: {outcome.text}")
    return report(asked.recipients, outcomes)


def speak() -> int:
    """-bs: SMTP on standard input and output, spoken by the receiver of this host."""
    path = handover.find_socket("smtp")
    if path is None:
        complain(f"421 4.4.1 {handover.UNREACHABLE.text}")
        return TEMPORARY_FAILURE
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            carry(connection)
        except OSError as error:
            complain(f"421 4.4.1 {error.strerror}")
            return TEMPORARY_FAILURE
    return 0


def carry(connection: socket.socket) -> None:
    """Octets both ways until the receiver closes; raises OSError."""
    sources = [0, connection.fileno()]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if connection.fileno() in ready:
            octets = connection.recv(_READ)
            if not octets:
                return
            while octets:
                octets = octets[os.write(1, octets) :]
        if 0 in ready:
            octets = os.read(0, _READ)
            if octets:
                connection.sendall(octets)
            else:
                connection.shutdown(socket.SHUT_WR)
                sources.remove(0)
