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
from mda.cli.deliver import report
from mda.config import Config, ConfigError, load, official_name
from mda.receiver.grammar import spell_path


@click.command("send")
@click.option("--send", "verb", flag_value="SEND", help="To the terminal or not at all.")
@click.option("--soml", "verb", flag_value="SOML", help="Terminal, else mailbox.")
@click.option("--saml", "verb", flag_value="SAML", help="Terminal and mailbox.")
@click.option("--mail", "verb", flag_value="MAIL", help="To the mailbox only.")
@click.option("-s", "subject", default="", metavar="SUBJECT")
@click.argument("words", nargs=-1, required=True, metavar="USER[@HOST]... [TEXT]...")
def command(verb: str | None, subject: str, words: tuple[str, ...]) -> None:
    """Send a message to USER: on the terminal if they are logged in and take messages.

    The first argument names the recipients, with commas between them if there are
    several. The other arguments are the text; but if each of them is a user of this
    host or has an @, they are recipients too, and the text is read from standard input.
    """
    recipients, text = divide(list(words))
    if not recipients:
        raise click.UsageError("nobody to send to")
    for recipient in recipients:
        if not recipient.isprintable():
            raise click.UsageError(f"{recipient!r} is no user")
    if text is None:
        text = read_text(recipients)
    raise SystemExit(send(verb or "SOML", subject, recipients, text))


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
    try:
        name = official_name(load())
    except ConfigError:
        name = official_name(Config())
    sender = spell_path(f"{own_name()}@{name}")
    paths = [spell_path(recipient) for recipient in recipients]
    message = compose(sender, subject, [qualify(path, name) for path in paths], text)
    try:
        with handover.Client() as client:
            outcomes = client.deliver(verb, sender, paths, [message])
    except handover.Refused as refused:
        outcomes = [refused.outcome] * len(recipients)
    for recipient, outcome in zip(recipients, outcomes, strict=True):
        if outcome.is_done:
            click.echo(f"{recipient}: {outcome.text.removeprefix(f'<{recipient}> ')}")
    return report(recipients, outcomes)


def own_name() -> str:
    """The login name of whoever runs this."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise click.ClickException("you have no account on this host") from None


def qualify(path: str, name: str) -> str:
    """`path` as an address for a header, which has a domain (RFC 5322 3.4.1)."""
    return f"{path}@{name}" if path.endswith('"') or "@" not in path else path


def compose(sender: str, subject: str, recipients: list[str], text: str) -> bytes:
    """The message as octets with CRLF line ends.

    `sender` and `recipients` are addresses. What the command line holds in another
    character set than UTF-8 becomes replacement characters.
    """
    # An address cannot be an encoded word (RFC 2047 5): beyond ASCII it needs a UTF-8 header.
    is_utf8 = not "".join((sender, *recipients)).isascii()
    message = EmailMessage(policy=SMTP.clone(cte_type="8bit", utf8=is_utf8))
    message["Date"] = format_datetime(localtime())
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    if subject:
        message["Subject"] = " ".join(make_readable(subject).split())
    message["Message-ID"] = make_msgid(domain=sender.partition("@")[2])
    message.set_content(make_readable(text))
    return message.as_bytes()


def make_readable(argument: str) -> str:
    """An argument of the command line without the escapes of what could not be decoded."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
