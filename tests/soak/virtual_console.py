"""SEND to somebody who has logged in at a real console, in a virtual machine.

    python tests/soak/virtual_console.py

Run it as root; it needs qemu-system-x86, linux-image-cloud-amd64, initramfs-tools, what the
host tests need, and 3 GiB under /var/tmp. Alice logs in on tty1, and types there on the
machine's keyboard; what she sees is read from the console's own memory. The units are those
that `mda install` writes, so what they allow with devices is what is tried here.
"""

from __future__ import annotations

import os
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts.host import free_port, wait_until
from soak.machine import build_disk, greets, qemu_command

DIRECTORY = Path("/var/tmp/mda-console")
UP_SECONDS = 300
COLUMNS = 80
SMTP, SHELL = 2525, 2323
# The client is at the far end of the machine's wire: unverified, and in a network that may.
PREPARATION = f"""
mda install --listen 0.0.0.0:{SMTP}
printf '[terminal]\\npeers = ["networks"]\\nnetworks = ["10.0.2.0/24"]\\n' > /etc/mda/mda.toml
serve shell {SHELL} '/bin/sh -'
sed -i 's/^StandardInput=socket/&\\nStandardOutput=socket/' '/etc/systemd/system/shell@.service'
mkdir -p /etc/systemd/system/getty@tty1.service.d
cat > /etc/systemd/system/getty@tty1.service.d/login.conf <<END
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin alice --noclear tty1 linux
END
"""
KEYS = {" ": "spc", "\n": "ret", "-": "minus", ".": "dot", "/": "slash", ";": "semicolon"}


class Console:
    """The machine, its keyboard and its screen."""

    def __init__(self) -> None:
        self.ports = {inside: free_port() for inside in (SMTP, SHELL)}
        self._monitor = DIRECTORY / "monitor"
        self._qemu = subprocess.Popen(
            [
                *qemu_command(DIRECTORY, self.ports),
                *("-drive", f"file={DIRECTORY}/disk,format=raw,if=virtio,snapshot=on"),
                *("-display", "none", "-vga", "std", "-serial", "file:/dev/null"),
                *("-monitor", f"unix:{self._monitor},server=on,wait=off"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def wait_until_up(self) -> None:
        """Wait for the receiver and for Alice's prompt."""
        wait_until(lambda: greets(self.ports[SMTP]), "the machine is up", UP_SECONDS)
        wait_until(lambda: "alice@" in self.screen(), "Alice is logged in", UP_SECONDS)

    def run(self, script: str) -> str:
        """What a shell of root's inside answers."""
        address = ("127.0.0.1", self.ports[SHELL])
        with socket.create_connection(address, 60) as connection:
            connection.sendall(f"{script}\nexit\n".encode())
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode("utf-8", "replace")

    def screen(self) -> str:
        """The rows of tty1 as they stand, without the spaces at their ends."""
        text = self.run("cat /dev/vcs1")
        rows = (text[at : at + COLUMNS].rstrip() for at in range(0, len(text), COLUMNS))
        return "\n".join(rows)

    def type(self, text: str) -> None:
        """Press keys."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._monitor))
            for character in text:
                monitor.sendall(f"sendkey {KEYS.get(character, character)}\n".encode())
                time.sleep(0.15)

    def send(self, text: str) -> tuple[int, str]:
        """SEND to Alice; the code and the text of the reply to RCPT, or to the end of the data."""
        with smtplib.SMTP("127.0.0.1", self.ports[SMTP], timeout=60) as client:
            client.ehlo()
            client.docmd("SEND FROM:<bob@example.org>")
            code, reply = client.docmd("RCPT TO:<alice>")
            if code == 250:
                code, reply = client.data(f"Subject: lunch\r\n\r\n{text}\r\n".encode())
            return code, reply.decode()

    def stop(self) -> None:
        """Throw the machine away."""
        self._qemu.send_signal(signal.SIGKILL)
        self._qemu.wait()


def expect(is_so: object, what: str, console: Console) -> None:
    """Print what holds; fail with the screen if it does not."""
    if not is_so:
        raise SystemExit(f"NOT: {what}\n{console.screen()}")
    print(f"ok: {what}")


def try_all(console: Console) -> None:
    """From a console as Debian leaves it to one in graphics mode."""
    expect("tty1" in console.run("ls -l /dev/tty1; tty </dev/tty1"), "there is a tty1", console)
    code, text = console.send("not yet")
    expect(code == 450 and "not accepting" in text, f"off after login: {code} {text}", console)
    console.type("mda mesg y\n")
    wait_until(lambda: console.send("at noon")[0] == 250, "she has switched it on", 60)
    wait_until(lambda: "| at noon" in console.screen(), "it is on the screen", 60)
    rows = console.screen().split("\n")
    at = next(number for number, row in enumerate(rows) if "| at noon" in row)
    print("\n".join(rows[at - 2 : at + 2]))
    expect("<bob@example.org> (unverified" in rows[at - 2], "the sender is unverified", console)
    expect(rows[at + 1] == "-- end of message --", "the block is whole", console)
    code, text = console.send("\x1b[2Jwiped")
    wait_until(lambda: "| ^[[2Jwiped" in console.screen(), "what acts is shown", 60)
    expect("| at noon" in console.screen(), "nothing was wiped", console)
    set_mode = "import fcntl; fcntl.ioctl(open('/dev/tty1'), 0x4B3A, {})"
    console.run(f'python3 -c "{set_mode.format(1)}"')
    code, text = console.send("over the picture")
    expect(code == 450, f"not in graphics mode: {code} {text}", console)
    console.run(f'python3 -c "{set_mode.format(0)}"')
    console.type("exit\n")
    console.run("systemctl stop getty@tty1")
    code, text = console.send("too late")
    expect(code == 450 and "not logged in" in text, f"after logout: {code} {text}", console)


def main() -> None:
    """Build the disk if it is not there, boot, and try all of it."""
    if not (DIRECTORY / "disk").exists():
        build_disk(DIRECTORY, PREPARATION)
    console = Console()
    try:
        console.wait_until_up()
        try_all(console)
    finally:
        console.stop()
    shutil.rmtree(DIRECTORY)


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("run it as root")
    main()
