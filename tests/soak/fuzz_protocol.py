"""A million inputs for the protocol, chosen by what they reach in it.

    pip install '.[soak]'; python tests/soak/fuzz_protocol.py [-runs=N]

Atheris mutates the octets of a client, the places where they are cut, the limits, and the
answers to the events that ask. After each run the reader of RFC 821 4.3 must find one
reply for each command, in order, with a code of its row, and the same session in one piece
must have said the same. Options are libFuzzer's.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["mda"]):
    from support.dialogue import Record, answer_from, converse, cut, make_protocol
    from support.sequences import attribute

    from mda.model import Path as MailPath
    from mda.receiver import grammar, replies

RUNS = 1_000_000
WORDS = (
    "HELO x|EHLO x|LHLO x|MAIL FROM:<bob@x>|SEND FROM:<>|SOML FROM:<@a,@b:c@d>|SAML FROM:bob|"
    "RCPT TO:<alice>|RCPT TO:<>|DATA|RSET|NOOP|HELP|VRFY alice|EXPN alice|QUIT|TURN|BDAT 1 LAST|"
    'GET / HTTP/1.1|SIZE=1000|BODY=8BITMIME|SMTPUTF8|[127.0.0.1]|[IPv6:::1]|#12|\\\\|\\"|'
    "\\x0d\\x0a|\\x0d\\x0a.\\x0d\\x0a|\\x0a.\\x0a|\\x0d.\\x0d|\\x0d\\x0a.\\x0a|\\x0a.\\x0d\\x0a|"
    "\\x0d\\x0a..|\\x00|\\xc3\\xab|\\xff|<|>|:|@|,"
)
SESSION = (
    b"EHLO x\r\nMAIL FROM:<bob@x>\r\nRCPT TO:<alice>\r\nDATA\r\n.x\r\n..\r\n.\r\nVRFY a\r\nQUIT\r\n"
)


def speak(octets: bytes, places: list[int], options: dict[str, bool], choices: bytes) -> Record:
    """One session of the protocol in memory."""
    protocol = make_protocol(
        is_lmtp=options["is_lmtp"],
        offers_terminals=options["offers_terminals"],
        offers_names=options["offers_names"],
        strict_syntax=options["strict_syntax"],
        bare_newlines="reject" if options["minds_newlines"] else "accept",
        vrfy="nobody" if options["asks_nobody"] else "local",
    )
    answer = answer_from(itertools.cycle(choices or b"\0"))
    return converse(cut(octets, places), protocol, answer)


OPTIONS = (
    "is_lmtp",
    "offers_terminals",
    "offers_names",
    "strict_syntax",
    "minds_newlines",
    "asks_nobody",
)


def check_session(data: bytes) -> None:
    """Octets for the options, the answers and the cuts stand in front of the client's."""
    provider = atheris.FuzzedDataProvider(data)
    options = {name: provider.ConsumeBool() for name in OPTIONS}
    choices = provider.ConsumeBytes(8)
    places = provider.ConsumeIntList(6, 2)
    octets = provider.ConsumeBytes(sys.maxsize)
    record = speak(octets, places, options, choices)
    said = replies.greeting("mda.test").render() + record.said
    attribute(octets, said, is_lmtp=False)
    whole = speak(octets, [], options, choices)
    assert (whole.said, whole.texts) == (record.said, record.texts), octets


def check_path(data: bytes) -> None:
    """What is a path stays one when it is written down, and spells itself."""
    try:
        path, rest = grammar.parse_path(data)
    except grammar.PathError:
        return
    again, nothing = grammar.parse_path(b"<%b>" % path.text)
    assert (again, nothing) == (path, b""), data
    assert isinstance(again, MailPath)
    assert data.endswith(rest)
    text = path.text.decode("utf-8")
    assert grammar.spell_path(text) == text or "\\" in text, data


def check(data: bytes) -> None:
    check_path(data)
    check_session(data)


def main() -> None:
    """Fuzz until the runs are over; a failure is shown with its input."""
    work = Path(tempfile.mkdtemp(prefix="mda-fuzz-"))
    corpus = work / "corpus"
    corpus.mkdir()
    # Behind the answers, and before the numbers, which are taken from the end.
    (corpus / "session").write_bytes(bytes(8) + SESSION + bytes(40))
    (corpus / "path").write_bytes(b'<@one,@two:"a b"@[192.0.2.1]> x')
    dictionary = work / "words"
    dictionary.write_text("".join(f'"{word}"\n' for word in WORDS.split("|")))
    defaults = [f"-runs={RUNS}", f"-dict={dictionary}", "-max_len=600", "-len_control=0"]
    arguments = [sys.argv[0], *defaults, *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
