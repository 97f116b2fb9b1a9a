"""Commands of aliases and forward files: who runs them, with what, and what becomes of it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.addressing import NOBODY, Host
from support.children import in_child
from support.sandbox import UIDS, Sandbox

from mda.delivery import command
from mda.model import Account, Outcome

COMMANDS = "[delivery]\ncommands = true\n"
OUT = "/run/commands/out"
LONG = str(100_000 + os.getpid())  # seconds, and the mark of the processes of this run


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    shells = sandbox.root / "etc/shells"
    shells.write_text("/bin/sh\n/bin/bash\n")
    host = Host(sandbox)
    host.make("/run/commands", uid=0, mode="1777")
    assert sandbox.run(["mount", "--bind", str(shells), "/etc/shells"]).returncode == 0
    yield host
    sandbox.run(["umount", "/etc/shells"])
    sandbox.run(["sh", "-c", "rm -rf /run/commands; find /home -mindepth 2 -delete"])


def run(host: Host, script: str, *, config: str = "", recipient: str = "alice") -> bytes:
    """Have alice's forward file run `script`; the reply to the end of data."""
    host.forward("alice", f'"|{script}"\n', mode="600")
    return host.send(recipient, config=COMMANDS + config)[-1]


def test_the_command_gets_the_message_as_it_is(host: Host) -> None:
    assert run(host, f"cat > {OUT}").startswith(b"250 2.0.0 Delivered to command")
    kept = host.read(OUT)
    assert re.match(rb"From bob@mda\.test .*\nReturn-Path: <bob@mda\.test>\n", kept)
    assert b"\nDelivered-To: alice@mda.test\nReceived: from x " in kept
    assert kept.endswith(b"\nSubject: x\n\nFrom me\n"), "no quoting, and no blank line behind"
    assert host.sandbox.mailbox("alice") is None


def test_a_message_of_some_size_goes_through_the_pipe(host: Host) -> None:
    large = b"".join(b"%07d\r\n" % number for number in range(400_000))
    host.forward("alice", f'"|sleep 0.2; wc -c > {OUT}"\n')
    lines = (
        b"HELO x\r\nMAIL FROM:<b@x>\r\nRCPT TO:<alice>\r\nDATA\r\n\r\n" + large + b".\r\nQUIT\r\n"
    )
    said = host.sandbox.converse(lines, config=host.config + COMMANDS)
    assert said[-2].startswith(b"250 2.0.0 Delivered to command")
    assert int(host.read(OUT)) > 400_000 * 8


def test_the_command_is_the_users_own_for_good(host: Host) -> None:
    assert run(host, f"cat /proc/self/status > {OUT}; pwd >> {OUT}; umask >> {OUT}").startswith(
        b"250"
    )
    told = host.read(OUT).decode()
    alice = str(UIDS["alice"])
    assert re.search(rf"(?m)^Uid:\t{alice}\t{alice}\t{alice}\t{alice}$", told)
    assert re.search(rf"(?m)^Gid:\t{alice}\t{alice}\t{alice}\t{alice}$", told)
    assert re.search(rf"(?m)^Groups:\t{alice} $", told)
    assert re.search(r"(?m)^CapPrm:\t0+$", told)
    assert told.endswith("/home/alice\n0077\n")


def test_a_command_of_the_aliases_is_nobodys(host: Host) -> None:
    host.alias(f'ticket: "|id -u > {OUT}; pwd >> {OUT}"\n')
    assert host.send("ticket", config=COMMANDS)[-1].startswith(b"250")
    assert host.read(OUT) == b"%d\n/\n" % NOBODY


def test_the_environment_is_ours_and_harmless(host: Host) -> None:
    sender = '"o\'rourke $(id)"@mda.test'
    host.forward("alice", f'"|env | sort > {OUT}"\n', name=".forward+lists")
    assert host.send("alice+lists", config=COMMANDS, sender=sender)[-1].startswith(b"250")
    told = dict(line.split("=", 1) for line in host.read(OUT).decode().splitlines())
    assert {name: told[name] for name in told if name not in ("PWD", "SHLVL", "_", "OLDPWD")} == {
        "DOMAIN": "mda.test",
        "EXTENSION": "lists",
        "HOME": "/home/alice",
        "LOCAL": "alice",
        "LOGNAME": "alice",
        "ORIGINAL_RECIPIENT": "alice+lists",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "RECIPIENT": "alice+lists@mda.test",
        "SENDER": "_o_rourke___id__@mda.test",
        "SHELL": "/bin/sh",
        "USER": "alice",
    }


def test_no_descriptor_but_three_and_no_signal_ignored(host: Host) -> None:
    script = f"ls -l /proc/self/fd > {OUT}; grep Sig /proc/self/status >> {OUT}"
    assert run(host, script).startswith(b"250")
    told = host.read(OUT).decode()
    fds = re.findall(r" (\d+) -> (\S+)", told)
    assert {fd for fd, to in fds if not to.startswith("/proc/")} == {"0", "1", "2"}, told
    assert "memfd" not in told
    assert re.search(r"(?m)^SigIgn:\t0+$", told)
    assert re.search(r"(?m)^SigBlk:\t0+$", told)


def test_one_users_command_cannot_change_what_the_next_one_gets(host: Host) -> None:
    host.forward("alice", '"|for fd in /proc/*/fd/*; do echo evil > $fd; done 2>/dev/null; true"\n')
    said = host.send("alice", "carol", config=COMMANDS)
    assert said[-1].startswith(b"250")
    assert host.has("carol") == 1
    assert b"evil" not in (host.sandbox.mailbox("carol") or b"")


@pytest.mark.parametrize(
    ("script", "reply"),
    [
        ("exit 0", b"250 2.0.0"),
        ("exit 65", b"554 5.6.0"),
        ("exit 67", b"554 5.1.1"),
        ("exit 69", b"554 5.3.0"),
        ("exit 77", b"554 5.7.0"),
        ("exit 100", b"554 5.0.0"),
        ("exit 1", b"451 4.3.0"),
        ("exit 75", b"451 4.3.0"),
        ("exit 111", b"451 4.3.0"),
        ("exit 255", b"451 4.3.0"),
        ("kill -KILL $$", b"451 4.3.0"),
        ("/no/such/program", b"451 4.3.0"),
        ("echo 5.2.2 The box is full; exit 1", b"554 5.2.2 The box is full"),
        ("echo 4.2.2 Not now >&2; exit 67", b"451 4.2.2 Not now"),
        ("echo 2.0.0 Fine; exit 1", b"451 4.3.0"),
        ("echo 5.2.2 Ignored; exit 0", b"250 2.0.0"),
        ("head -c 3 > /dev/null; exit 0", b"250 2.0.0"),
        ("exec < /dev/null; exit 0", b"250 2.0.0"),
    ],
)  # fmt: skip
def test_the_exit_status_decides_and_the_unknown_may_pass(
    host: Host, script: str, reply: bytes
) -> None:
    assert run(host, script).startswith(reply)
    assert host.sandbox.mailbox("alice") is None


def test_each_address_runs_the_command_for_itself(host: Host) -> None:
    host.forward("alice", f'"|echo $EXTENSION >> {OUT}"\n')
    host.alias(f'one: "|echo $LOCAL >> {OUT}"\ntwo: "|echo $LOCAL >> {OUT}"\n')
    host.sandbox.run(["sh", "-c", f"touch {OUT}; chmod 666 {OUT}"])
    said = host.send("alice+x", "alice+y", "one", "two", "alice+x", config=COMMANDS)
    assert said[-1].startswith(b"250")
    assert host.read(OUT).split() == [b"x", b"y", b"one", b"two"]


def test_the_commands_of_one_message_share_their_time(host: Host) -> None:
    host.forward("alice", f'"|sleep {LONG}", "|echo ran >> {OUT}"\n')
    begun = time.monotonic()
    said = host.send("alice", config=COMMANDS + "command_seconds = 1\n")
    assert said[-1].startswith(b"451 4.3.0")
    assert host.read(OUT) == b"", "a command was begun when the time was used up"
    assert time.monotonic() - begun < 60


def test_a_commands_time_is_not_the_time_that_others_wait_for_locks(host: Host) -> None:
    host.forward("alice", '"|sleep 2"\n')
    lock = host.sandbox.root / "mail/bob.lock"
    lock.write_text("1\n")
    threading.Timer(2.6, lock.unlink).start()
    said = host.send("alice", "bob", config=COMMANDS + "lock_seconds = 2\n")
    assert said[-1].startswith(b"250")
    assert host.has("bob") == 1


def test_a_command_that_takes_too_long_is_ended(host: Host) -> None:
    script = f"echo begun > {OUT}; sleep {LONG}"
    assert run(host, script, config="command_seconds = 1\n").startswith(b"451 4.3.0")
    assert host.read(OUT) == b"begun\n"
    assert processes_with(LONG) == []


@pytest.mark.parametrize(
    "left",
    [
        f"sleep {LONG} &",
        f"setsid sleep {LONG} &",
        f"(setsid sh -c 'sleep {LONG} & sleep {LONG}') > /dev/null 2>&1 &",
        f"trap '' TERM HUP INT; sleep {LONG} &",
        f"nohup setsid sh -c 'trap : TERM; while :; do sleep 1 {LONG}; done' &",
    ],
)
def test_what_a_command_leaves_running_is_ended(host: Host, left: str) -> None:
    assert run(host, f"{left} sleep 0.2; exit 0").startswith(b"250")
    assert processes_with(LONG) == []


def test_a_command_that_says_much_neither_blocks_nor_fills_us(host: Host) -> None:
    assert run(host, "head -c 50000000 /dev/zero; exit 67").startswith(b"554 5.1.1")


def test_a_command_has_limits(host: Host) -> None:
    assert run(host, f"cat /proc/self/limits > {OUT}").startswith(b"250")
    told = host.read(OUT).decode()
    assert re.search(r"(?m)^Max open files +1024 +1024 ", told)
    assert re.search(r"(?m)^Max core file size +0 +0 ", told)
    assert re.search(r"(?m)^Max processes +500 +500 ", told)


def test_a_user_who_ends_our_process_only_defers_the_mail(host: Host) -> None:
    assert run(host, "kill -KILL $PPID; sleep 5").startswith(b"451 4.3.0")
    assert host.send("carol", config=COMMANDS)[-1].startswith(b"250")


def test_the_users_command_cannot_look_into_our_process(host: Host) -> None:
    look = "cat /proc/$PPID/environ; cat /proc/$PPID/maps; ls /proc/$PPID/fd"
    assert run(host, f"({look}) > {OUT} 2>&1; true").startswith(b"250")
    assert host.read(OUT).count(b"Permission denied") >= 2


def test_without_a_shell_of_this_host_no_command_is_run(host: Host) -> None:
    passwd = host.sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(whole.replace("/home/alice:/bin/bash", "/home/alice:/usr/sbin/nologin"))
    try:
        host.forward("alice", f'"|touch {OUT}"\n')
        (rcpt,) = host.send("alice", config=COMMANDS)[:1]
    finally:
        passwd.write_text(whole)
    assert rcpt == b"451 4.3.5 <alice> The shell of alice is not in /etc/shells"
    assert host.read(OUT) == b""


def test_commands_are_off_by_default(host: Host) -> None:
    host.forward("alice", f'"|touch {OUT}"\n')
    assert host.send("alice")[0].startswith(b"451 4.3.5 <alice> Commands are not run")
    assert host.read(OUT) == b""


def test_what_is_sent_to_a_terminal_first_falls_back_to_the_forward_file(host: Host) -> None:
    host.forward("alice", f'"|cat > {OUT}", /home/alice/mail\n')
    for verb in ("SOML", "SAML"):
        reply = host.send("alice", verb=verb, config=COMMANDS)[-1]
        assert reply.startswith(b"250 2.0.0"), reply
        assert b"\nFrom me\n" in host.read(OUT)
    assert host.read("/home/alice/mail").count(b"\n>From me\n") == 2
    assert host.sandbox.mailbox("alice") is None


def processes_with(word: str) -> list[str]:
    """The commands that have a word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            found += [line] if word in line else []
    return found


@pytest.mark.parametrize(
    ("report", "code", "note"),
    [
        (b"", 451, "no report"),
        (b"0 0\n", 250, "exit status 0"),
        (b"0 2\n", 250, "exit status 0, 2 processes could not be ended"),
        (b"-9 0\nx\x1b[2J\nmore", 451, "exit status -9: x?[2J"),
        (b"256 0\n", 451, "exit status 256"),
        (b"1 0\n5.7.1", 550, "exit status 1: 5.7.1"),
        (b"1 0\n5.7.1.1 x", 451, "exit status 1: 5.7.1.1 x"),
        (b"1 0\n9.7.1 x", 451, "exit status 1: 9.7.1 x"),
    ],
)
def test_a_report_is_judged(report: bytes, code: int, note: str) -> None:
    outcome, told = command.judge(report)
    assert (outcome.code, told) == (code, note)


def test_a_domain_that_is_no_ascii_is_spelt_for_a_shell() -> None:
    account = Account("zo\u00eb", 1, 1, "", "")
    told = command.environment(
        account, "zo\u00eb".encode(), b"+", "m\u00fcll.example", (b"", b"x\ny")
    )
    assert told[b"DOMAIN"] == b"xn--mll-hoa.example"
    assert told[b"RECIPIENT"] == b"zo__@xn--mll-hoa.example"
    assert told[b"ORIGINAL_RECIPIENT"] == b"x_y"
    assert (told[b"SENDER"], told[b"HOME"]) == (b"", b"/")


def test_no_report_in_time_is_none() -> None:
    def wait() -> None:
        read_fd, _write_fd = os.pipe()
        command._CLEANING_SECONDS = 0
        assert command.read_report(read_fd, 0.1) == command.NO_REPORT

    assert in_child(wait) == 0
    assert command.judge(command.NO_REPORT)[0] == Outcome(
        451, "4.3.0", "The recipient's command was not seen to end"
    )
