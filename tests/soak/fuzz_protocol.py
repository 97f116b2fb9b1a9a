"""Octets that nobody would think of, for the protocol: a million inputs led by coverage.

    python tests/soak/fuzz_protocol.py [FLAGS OF LIBFUZZER] [CORPUS]

Needs the optional dependencies `soak`. An input is a head of HEAD octets, which chooses
the limits, the answers and the pieces, and behind it what the client says. What fails is
left in a file, whose name is printed and which can be given in place of a corpus.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["mda.receiver"]):
    from mda.receiver import replies
    from mda.receiver.protocol import HTTP_METHODS, NOT_SERVED, VERBS, Protocol

from support.children import in_child
from support.dialogue import Record, answer_from, converse, cut, make_protocol
from support.sequences import attribute

HEAD = 14
RUNS = 1_000_000
LONGEST = 512  # octets of an input

TRICKY = [
    b"\r\n",
    b"\r\n.\r\n",
    b"\r\n..\r\n",
    b"\n.\n",
    b"\n.\r\n",
    b"\r.\r",
    b"\r\n.\n",
    b"\r\r\n",
    b"FROM:<",
    b"TO:<",
    b"<>",
    b" SIZE=",
    b" BODY=8BITMIME",
    b" SMTPUTF8",
    b"<@a,@b:c@d>",
    b'"\\"a b"@x',
    b"[127.0.0.1]",
    b"[IPv6:::1]",
    b"#1",
    b"\xc3\xb6",
    b"\xff",
    b"\x00",
    b"\x1b[",
    b"\t",
    b"x" * 60,
]
# Sessions to begin from, line by line.
SEEDS = [
    b"HELO x|MAIL FROM:<bob@x>|RCPT TO:<alice>|DATA|S: x||..hi|.|QUIT|",
    b"LHLO x|SAML FROM:<> BODY=7BIT|RCPT TO:<a>|RCPT TO:<b>|DATA|a\n.\nb|.|RSET|",
    b"EHLO x|MAIL FROM:<j\xc3\xb6@x> SMTPUTF8 SIZE=9|RCPT TO:<@a,@b:c@[1.2.3.4]>|DATA|.|",
    b"EHLO x|VRFY alice SMTPUTF8|EXPN all|HELP SEND|NOOP x|XWHO|TURN|GET / HTTP|",
    b'HELO x|SEND FROM:bob|RCPT TO: "a \\" b"@#12|DATA|x\r.\rx|.|MAIL FROM:<>|',
    b"HELO x|NOOP " + b"x" * 123 + b"|SOML FROM:<" + b"y" * 33 + b">|HELP|",
]


class Case:
    """One input, taken apart."""

    def __init__(self, data: bytes) -> None:
        head = data[:HEAD].ljust(HEAD, b"\0")
        self.flags = head[0]
        self.answers = head[1:5]
        self.places = [int.from_bytes(head[at : at + 2], "big") for at in range(5, 13, 2)]
        # Reply texts come from a recipient's name or the host: any characters at all.
        self.text = head[1:].decode("latin-1") * head[13]
        self.said = data[HEAD:]
        self.is_lmtp = bool(self.flags & 1)

    def make_protocol(self) -> Protocol:
        """The protocol with the limits that the flags choose, one bit each."""
        return make_protocol(
            is_lmtp=self.is_lmtp,
            strict_syntax=bool(self.flags & 2),
            bare_newlines="reject" if self.flags & 4 else "accept",
            offers_names=bool(self.flags & 8),
            offers_terminals=bool(self.flags & 16),
            vrfy="nobody" if self.flags & 32 else "local",
            # Lower than a file may have them, or no input of this size would reach them.
            command_line=128 if self.flags & 64 else 64,
            path=64 if self.flags & 128 else 32,
        )

    def converse(self, pieces: list[bytes]) -> Record:
        """What becomes of `pieces`, with the same answers every time."""
        answer = answer_from(itertools.cycle(self.answers), self.text)
        return converse(pieces, self.make_protocol(), answer, is_lmtp=self.is_lmtp)


def check(data: bytes) -> None:
    """Fails unless the protocol does with this input what it should."""
    case = Case(data)
    whole = case.converse([case.said])
    pieces = case.converse(cut(case.said, case.places))
    assert whole.said == pieces.said, "the pieces matter to the replies"
    assert whole.texts == pieces.texts, "the pieces matter to the texts"
    greeting = replies.greeting("mda.test", is_lmtp=case.is_lmtp).render()
    texts: list[bytes] = []
    attribute(case.said, greeting + whole.said, is_lmtp=case.is_lmtp, texts=texts)
    assert whole.texts == texts, "the texts are not what was sent"


def write_dictionary(path: Path) -> None:
    """The words that libFuzzer puts into inputs, in its own notation."""
    words = [*VERBS, *NOT_SERVED, *HTTP_METHODS, *TRICKY]
    lines = ("".join(f"\\x{octet:02x}" for octet in word) for word in words)
    path.write_text("".join(f'"{line}"\n' for line in lines))


def write_seeds(directory: Path) -> str:
    """Sessions to begin from, each with several heads; their paths as libFuzzer takes them."""
    heads = [bytes(HEAD), bytes([31, *[0] * 12, 1]), bytes([190, *range(13)])]
    paths = []
    for number, (head, seed) in enumerate(itertools.product(heads, SEEDS)):
        path = directory / f"seed-{number}"
        path.write_bytes(head + seed.replace(b"|", b"\r\n"))
        paths.append(str(path))
    return ",".join(paths)


def fuzz(directory: Path) -> None:
    """Run libFuzzer, which ends the process; what it needs is put into `directory`."""
    write_dictionary(directory / "words")
    flags = [
        f"-runs={RUNS}",
        f"-max_len={LONGEST}",
        f"-dict={directory / 'words'}",
        f"-seed_inputs={write_seeds(directory)}",
        f"-artifact_prefix={tempfile.gettempdir()}/mda-fuzz-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, *sys.argv[1:]], check)
    atheris.Fuzz()


def main() -> None:
    """Fuzz in a child, since nothing of ours runs after libFuzzer in the same process."""
    with tempfile.TemporaryDirectory(prefix="mda-fuzz-") as directory:
        status = in_child(lambda: fuzz(Path(directory)))
    raise SystemExit(abs(status))


if __name__ == "__main__":
    main()
