"""A sandbox with aliases and forward files, and a way to send mail to it."""

from __future__ import annotations

import os
import re

from support.sandbox import Sandbox

NOBODY = 65_534
TEXT = b"Subject: x\r\n\r\nFrom me\r\n.\r\n"


class Host:
    """A sandbox whose files steer mail, each written by one method."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.aliases = sandbox.root / "etc/test-aliases"
        self.lists = sandbox.root / "lists"
        self.lists.mkdir(exist_ok=True)
        self.lists.chmod(0o755)
        self.config = f"[recipients]\naliases = {str(self.aliases)!r}\n"
        self.alias("")

    def alias(self, text: str) -> None:
        self.aliases.write_text(text)
        self.aliases.chmod(0o644)

    def include(self, name: str, text: str, *, uid: int = 0, mode: int = 0o644) -> str:
        """An included file; its path inside, which is the same outside."""
        path = self.lists / name
        path.write_text(text)
        os.chown(path, uid, uid)
        path.chmod(mode)
        return str(path)

    def forward(self, user: str, text: str, *, name: str = ".forward", mode: str = "644") -> None:
        script = f'cat > "$1"; chown {user}: "$1"; chmod {mode} "$1"'
        path = f"/home/{user}/{name}"
        done = self.sandbox.run(["sh", "-c", script, "sh", path], input=text.encode())
        assert done.returncode == 0, done.stderr

    def send(
        self,
        *recipients: str,
        verb: str = "MAIL",
        config: str = "",
        protocol: str = "smtp",
        peer: str = "bob",
        sender: str = "bob@mda.test",
    ) -> list[bytes]:
        """One transaction; the replies to its RCPTs, then those to the end of data."""
        hello = b"LHLO x\r\n" if protocol == "lmtp" else b"HELO x\r\n"
        lines = f"{verb} FROM:<{sender}>\r\n".encode()
        lines += b"".join(f"RCPT TO:<{each}>\r\n".encode() for each in recipients)
        said = self.sandbox.converse(
            hello + lines + b"DATA\r\n" + TEXT + b"QUIT\r\n",
            config=self.config + config,
            protocol=protocol,
            peer=peer,
        )
        told = [line for line in said if not re.match(rb"220|221|354|250[- ](mda|[A-Z8])", line)]
        return [line for line in told[1:] if not line.startswith(b"503 ")]

    def has(self, user: str) -> int:
        """How many messages are in the mailbox of a user."""
        return (self.sandbox.mailbox(user) or b"").count(b"\nSubject: x\n")

    def header(self, user: str, name: str) -> list[str]:
        kept = (self.sandbox.mailbox(user) or b"").decode()
        return re.findall(rf"(?m)^{name}: (.*)$", kept)

    def read(self, path: str) -> bytes:
        return self.sandbox.run(["cat", path]).stdout

    def make(self, path: str, *, uid: int, mode: str = "700") -> None:
        """A directory inside."""
        script = f'mkdir -p "$1"; chown {uid}:{uid} "$1"; chmod {mode} "$1"'
        assert self.sandbox.run(["sh", "-c", script, "sh", path]).returncode == 0
