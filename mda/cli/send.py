"""`mda send`: a person's message to other persons' terminals or mailboxes.

RFC 5321 F.6 says that clients should not offer SEND, SOML and SAML; a person who asks
for them by name is the exception that they were made for.
"""

from __future__ import annotations

import os
import pwd
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, localtime, make_msgid

import click

from mda.cli import handover
from mda.cli.conversation import Conversation
from mda.cli.deliver import report
from mda.cli.person import host_config, own_host, own_path
from mda.content.screen import CONVERSATION
from mda.receiver.domains import Domains
from mda.receiver.grammar import spell_path
from mda.receiver.submission import forward_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mda.model import Outcome

    Command = Callable[..., None]
    Exchange = Callable[[handover.Client, list[str]], list[Outcome]]


def verb_options(command: Command) -> Command:
    """The options of `mda send` and `mda reply`: by which verb, and the subject."""
    for option in (
        click.option("-s", "subject", default="", metavar="SUBJECT"),
        click.option("--mail", "verb", flag_value="MAIL", help="To the mailbox only."),
        click.option("--saml", "verb", flag_value="SAML", help="Terminal and mailbox."),
        click.option("--soml", "verb", flag_value="SOML", help="Terminal, else mailbox."),
        click.option("--send", "verb", flag_value="SEND", help="To the terminal or not at all."),
    ):
        command = option(command)
    return command


def complete_user(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """For the shell: the people of this host whose names begin so."""
    begin, comma, last = begun.rpartition(",")
    people = host_config().recipients
    names = (
        each.pw_name for each in pwd.getpwall() if people.uid_min <= each.pw_uid <= people.uid_max
    )
    return [f"{begin}{comma}{name}" for name in names if name.startswith(last)]


@click.command("send")
@verb_options
@click.argument(
    "words",
    nargs=-1,
    required=True,
    metavar="USER[@HOST]... [TEXT]...",
    shell_complete=complete_user,
)
def command(verb: str | None, subject: str, words: tuple[str, ...]) -> None:
    """Send a message to USER: on the terminal if they are logged in and take messages.

    The first argument names the recipients, with commas between them if there are
    several. The other arguments are the text; but if each of them is a user of this
    host or has an @, they are recipients too, and the text is read from standard input.
    Typed on a terminal it is shown line by line, if all of them take messages. To a user of
    another host it goes by the queue.
    """
    recipients, text = divide(list(words))
    if not recipients:
        raise click.UsageError("nobody to send to")
    for recipient in recipients:
        if not recipient.isprintable():
            raise click.UsageError(f"{recipient!r} is no user")
    raise SystemExit(deliver_text(verb, subject, recipients, text))


def deliver_text(verb: str | None, subject: str, recipients: list[str], text: str | None) -> int:
    """Send the text, or what is typed if it is None; the exit status."""
    if text is not None:
        return send(verb or "SOML", subject, recipients, text)
    is_talk = verb in (None, "SEND") and not subject and os.isatty(0)
    if is_talk and all(map(is_here, recipients)):
        outcomes = ask_all(recipients)
        if all(outcome.is_done for outcome in outcomes):
            return talk(recipients)
        if verb == "SEND":
            return report(recipients, outcomes)
        for recipient, outcome in zip(recipients, outcomes, strict=True):
            if not outcome.is_done:
                click.echo(f"{recipient}: {without_path(outcome, recipient)}.", err=True)
        click.echo("So it will be one message, by mail to whom it cannot be shown.", err=True)
    return send(verb or "SOML", subject, recipients, read_text(recipients))


def ask_all(recipients: list[str]) -> list[Outcome]:
    """Would each take a message on a terminal now?"""
    return exchange(recipients, lambda client, paths: client.ask("SEND", own_path(), paths))


def talk(recipients: list[str]) -> int:
    """Show each line as it is typed; the exit status."""
    paths = [spell_path(recipient) for recipient in recipients]
    addresses = [qualify(path, own_host()) for path in paths]
    click.echo(f"To {', '.join(recipients)}, line by line; end with Control-D.", err=True)

    def compose_part(part: str, text: str) -> bytes:
        return compose(own_path(), "", addresses, text, conversation=part)

    return Conversation(own_path(), paths, recipients, compose_part).hold(typed_lines())


def typed_lines() -> Iterator[str]:
    """The lines of standard input, as they come."""
    with open(0, "rb", closefd=False, buffering=0) as file:
        while line := file.readline():
            yield line.decode("utf-8", "replace").rstrip("\n")


def divide(words: list[str]) -> tuple[list[str], str | None]:
    """Recipients and text; None for a text that is still to be read."""
    recipients = list(dict.fromkeys(name for name in words[0].split(",") if name))
    rest = words[1:]
    if all(("@" in word and " " not in word) or is_user(word) for word in rest):
        return list(dict.fromkeys(recipients + rest)), None
    return recipients, " ".join(rest) + "\n"


def is_user(name: str) -> bool:
    """Is there an account of this name?"""
    try:
        pwd.getpwnam(name)
    except (KeyError, ValueError):
        return False
    return True


def read_text(recipients: list[str]) -> str:
    """The text from standard input, to its end."""
    if os.isatty(0):
        click.echo(f"To {', '.join(recipients)}; end with Control-D.", err=True)
    try:
        with open(0, "rb", closefd=False) as file:
            return file.read().decode("utf-8", "replace")
    except OSError as error:
        raise click.ClickException(f"no text on standard input: {error.strerror}") from error


def send(verb: str, subject: str, recipients: list[str], text: str) -> int:
    """One transaction; says per recipient what happened, and gives the exit status."""
    addresses = [qualify(spell_path(each), own_host()) for each in recipients]
    message = compose(own_path(), subject, addresses, text)
    outcomes = exchange(
        recipients, lambda client, paths: client.deliver(verb, own_path(), paths, [message])
    )
    for recipient, outcome in zip(recipients, outcomes, strict=True):
        if outcome.is_done:
            click.echo(f"{recipient}: {without_path(outcome, recipient)}")
    return report(recipients, outcomes)


def exchange(recipients: list[str], ask: Exchange) -> list[Outcome]:
    """What `ask` is told of each recipient: by LMTP those here, by SMTP those elsewhere."""
    outcomes: dict[str, Outcome] = {}
    here = [recipient for recipient in recipients if is_here(recipient)]
    elsewhere = [recipient for recipient in recipients if recipient not in here]
    for protocol, group in (("lmtp", here), ("smtp", elsewhere)):
        if not group:
            continue
        try:
            with handover.Client(protocol) as client:
                told = ask(client, [spell_path(recipient) for recipient in group])
        except handover.Refused as refused:
            told = [refused.outcome] * len(group)
        outcomes.update(zip(group, told, strict=True))
    return [outcomes[recipient] for recipient in recipients]


def is_here(recipient: str) -> bool:
    """Is this a mailbox of this host?"""
    return Domains(host_config(), takes_any=False).is_ours(forward_path(recipient).domain)


def without_path(outcome: Outcome, recipient: str) -> str:
    """The text of a reply without the recipient, who is named before it."""
    return outcome.text.removeprefix(f"<{spell_path(recipient)}> ")


def qualify(path: str, name: str) -> str:
    """`path` as an address for a header, which has a domain (RFC 5322 3.4.1)."""
    return f"{path}@{name}" if path.endswith('"') or "@" not in path else path


def compose(
    sender: str, subject: str, recipients: list[str], text: str, conversation: str = ""
) -> bytes:
    """The message as octets with CRLF line ends.

    `sender` and `recipients` are addresses; `conversation` says which part of one this is,
    as the receiver's screen.py reads it. What the command line holds in another character
    set than UTF-8 becomes replacement characters.
    """
    # An address cannot be an encoded word (RFC 2047 5): beyond ASCII it needs a UTF-8 header.
    is_utf8 = not "".join((sender, *recipients)).isascii()
    message = EmailMessage(policy=SMTP.clone(cte_type="8bit", utf8=is_utf8))
    message["Date"] = format_datetime(localtime())
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    if subject:
        message["Subject"] = " ".join(make_readable(subject).split())
    if conversation:
        message[CONVERSATION] = conversation
    message["Message-ID"] = make_msgid(domain=sender.partition("@")[2])
    message.set_content(make_readable(text))
    return message.as_bytes()


def make_readable(argument: str) -> str:
    """An argument of the command line without the escapes of what could not be decoded."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
