"""What a killed delivery leaves is undone by `mda serve` and `mda check`, and nothing else is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox, start_command
from support.serving import Line, connect, served

from mda.config import SMTP_SOCKET
from mda.delivery import lock
from mda.recipients import listing

SPEC = find_spec("mda")
assert SPEC is not None
assert SPEC.origin is not None
OLD = b"From old@example.org Tue Jan  6 09:00:00 2026\nSubject: old\n\nold\n\n"
FROM_LINE = b"From bob@example.org Tue Jan  6 10:00:00 2026\n"
HALF = FROM_LINE + b"Subject: half\n\nhalf of"
CHECK = """
import sys, time
sys.path.append(sys.argv[1])
from mda import broker, log
from mda.cli import check
from mda.config import load
from mda.recipients import listing
log.open_log(may_use_stderr=True)
broker._REPAIR_SECONDS_EACH = float(sys.argv[3])
broker._REPAIR_SECONDS = float(sys.argv[4])
if sys.argv[5] == "hangs":
    broker._REPAIR_HANGS_AFTER = 1
    listing.list_locked = lambda *_, **__: time.sleep(600)
for finding in check.check_mailboxes(load(sys.argv[2])):
    print(finding.what)
"""


def check_mailboxes(
    sandbox: Sandbox, config: str = "", *, patience: float = 5, limit: float = 60, disk: str = ""
) -> list[str]:
    """What the part of `mda check` that is about mailboxes says, as root inside."""
    assert SPEC is not None
    assert SPEC.origin is not None
    package = str(Path(SPEC.origin).parent.parent)
    arguments = [package, sandbox.configure(config), str(patience), str(limit), disk]
    done = sandbox.run([*start_command()[:-1], "-c", CHECK, *arguments])
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def tear(box: Path, user: str, gid: int = 8, *, torn: bytes = HALF, length: int = 1000) -> None:
    """Leave `box` as a killed delivery to `user` would, after one whole message."""
    box.write_bytes(OLD)
    status = box.stat()
    # No process has this PID, since the kernel gives none so high.
    pid, file = (1 << 30), (status.st_dev, status.st_ino)
    record = lock.Record(pid, b"1", b"-", file, len(OLD), length, 0, FROM_LINE)
    dotlock = box.with_name(box.name + ".lock")
    dotlock.write_bytes(record.format())
    box.write_bytes(OLD + torn)
    for path in (box, dotlock):
        os.chown(path, UIDS[user], gid)
    box.chmod(0o660)


def said_of(box: str) -> list[str]:
    """What is said of a mailbox that `tear` has torn, when it is whole again."""
    name = os.path.basename(box)
    return [
        f"{box}: removed a half message of {len(HALF)} bytes",
        f"{box}: removed the dead lock {name}.lock, PID {1 << 30}",
    ]


@pytest.fixture
def box(sandbox: Sandbox) -> Path:
    """The path of Alice's mailbox."""
    return sandbox.root / "mail/alice"


@pytest.fixture
def spool(sandbox: Sandbox) -> Path:
    return sandbox.root / "mail"


def kill_in_the_middle(sandbox: Sandbox, box: Path) -> None:
    """Deliver 50 MiB, and kill the process that writes before it is through."""
    box.write_bytes(OLD)
    os.chown(box, UIDS["alice"], 8)
    size = 50 * 1024 * 1024
    text = b"Subject: large\n\n" + b"a line of text\n" * (size // 15)
    config = sandbox.configure(f"[receiver]\nmessage_size = {2 * size}\n")
    command = [*start_command(), "deliver", "-f", "bob@example.org", "-d", "alice"]
    for _ in range(10):
        with subprocess.Popen(
            sandbox.inside([*command, "--config", config]), stdin=subprocess.PIPE
        ) as writer:
            assert writer.stdin is not None
            writer.stdin.write(text)
            writer.stdin.close()
            while writer.poll() is None and box.stat().st_size < len(OLD) + (1 << 20):
                pass
            # The process that was started is the broker; the session is its child.
            writer.kill()
        if len(OLD) < box.stat().st_size < size:
            return
        box.write_bytes(OLD)
    raise AssertionError("every message was through before the kill")


def repair_by_check(sandbox: Sandbox, box: Path) -> None:
    said = check_mailboxes(sandbox)
    assert said[0].startswith("/var/mail/alice: removed a half message of "), said


def repair_by_serve(sandbox: Sandbox, box: Path) -> None:
    with served(sandbox) as daemon:
        daemon.expect_in_log("removed the dead lock alice.lock")
        assert 'user=alice note="removed a half message of ' in daemon.log()


@pytest.mark.parametrize("repair", [repair_by_check, repair_by_serve])
def test_kill_in_the_middle_of_50_mib_is_undone(
    sandbox: Sandbox, box: Path, repair: Callable[[Sandbox, Path], None]
) -> None:
    kill_in_the_middle(sandbox, box)
    repair(sandbox, box)
    assert box.read_bytes() == OLD
    assert os.listdir(box.parent) == ["alice"]


def test_next_delivery_after_a_kill_finds_no_half_message(sandbox: Sandbox, box: Path) -> None:
    kill_in_the_middle(sandbox, box)
    command = [*start_command(), "deliver", "-f", "carol@example.org", "-d", "alice"]
    assert sandbox.run(command, input=b"Subject: next\n\nnext\n").returncode == 0
    stored = box.read_bytes()
    assert stored.startswith(OLD + b"From carol@example.org ")
    assert stored.endswith(b"Subject: next\n\nnext\n\n")
    assert stored.count(b"From ") == 2
    assert os.listdir(box.parent) == ["alice"]


def test_everybodys_mailbox_is_repaired_postmasters_too(sandbox: Sandbox, spool: Path) -> None:
    for user in ("alice", "carol"):
        tear(spool / user, user)
    tear(spool / "root", "alice")
    for path in (spool / "root", spool / "root.lock"):
        os.chown(path, 0, 8)
    said = check_mailboxes(sandbox)
    assert sorted(said) == sorted(
        said_of("/var/mail/alice") + said_of("/var/mail/carol") + said_of("/var/mail/root")
    )
    assert [path.read_bytes() for path in spool.iterdir()] == [OLD] * 3
    assert check_mailboxes(sandbox) == []


def test_mailbox_in_a_private_home_is_repaired(sandbox: Sandbox) -> None:
    home = Path(f"/proc/{sandbox.pid}/root/home/alice")
    home.chmod(0o700)
    tear(home / "mbox", "alice", UIDS["alice"])
    try:
        said = check_mailboxes(sandbox, '[delivery]\nmailbox = "{home}/mbox"\n')
        assert said == said_of("/home/alice/mbox")
        assert (home / "mbox").read_bytes() == OLD
        assert not (home / "mbox.lock").exists()
    finally:
        (home / "mbox").unlink()
        home.chmod(0o755)


def test_receiver_of_ones_own_repairs_ones_own_mailbox(sandbox: Sandbox) -> None:
    home = Path(f"/proc/{sandbox.pid}/root/home/alice")
    state = home / ".local/state/mda"
    sandbox.run(["mkdir", "-p", "/home/alice/.local/state/mda"], user="alice")
    tear(state / "mbox", "alice", UIDS["alice"])
    with served(sandbox, user="alice") as daemon:
        daemon.expect_in_log("removed the dead lock mbox.lock")
    assert (state / "mbox").read_bytes() == OLD
    sandbox.run(["rm", "-r", "/home/alice/.local"])


def test_flock_is_respected_by_a_repair_that_is_to_take_it(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    with box.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (said,) = check_mailboxes(sandbox, "[delivery]\nflock = true\n", patience=0)
    assert "Mailbox is locked (alice (flock), PID " in said
    assert box.read_bytes() == OLD + HALF


def test_mailbox_that_is_locked_is_left_and_found(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    with box.open("r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        said = check_mailboxes(sandbox, patience=0)
    reason = f"Mailbox is locked (alice, PID {os.getpid()})"
    start = "a delivery was killed, and cannot be undone now: /var/mail/alice: "
    assert said == [start + reason]
    assert box.read_bytes() == OLD + HALF
    assert check_mailboxes(sandbox) == said_of("/var/mail/alice")


def test_clients_do_not_wait_for_a_repair(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(box.open("r+b"))
        fcntl.lockf(held, fcntl.LOCK_EX)
        daemon = stack.enter_context(served(sandbox))
        line = Line(connect(sandbox, SMTP_SOCKET, "bob"))
        line.say(b"EHLO x\r\nMAIL FROM:<bob@x>\r\nRCPT TO:<carol>\r\nDATA\r\n")
        line.expect(b"354")
        line.say(b"Subject: x\r\n\r\n.\r\nQUIT\r\n")
        line.expect(b"250 2.0.0")
        line.finish()
        assert "half message" not in daemon.log()
        held.close()
        daemon.expect_in_log("removed the dead lock alice.lock")
    assert box.read_bytes() == OLD


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The PID of a live process that is not ours."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, object]:
    """What is in a folder: names, kinds, owners, and the bytes of files."""
    return {
        path.name: (
            path.lstat().st_mode,
            path.lstat().st_uid,
            path.lstat().st_ino,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.iterdir()
    }


def test_what_others_have_left_is_not_touched(sandbox: Sandbox, spool: Path, sleeper: int) -> None:
    tear(spool / "alice", "alice")
    (spool / "alice.lock").write_bytes(b"%d\n" % sleeper)
    tear(spool / "bob", "bob")
    (spool / "bob.lock").write_bytes(b"%d\n" % (1 << 30))
    tear(spool / "carol", "carol")
    alive = b"%d\nmda1 %b " % (sleeper, lock._read_stat(b"%d" % sleeper)[1])
    text = (spool / "carol.lock").read_bytes()
    (spool / "carol.lock").write_bytes(text.replace(b"%d\nmda1 1 " % (1 << 30), alive))
    before = contents(spool)
    assert check_mailboxes(sandbox) == []
    assert contents(spool) == before


def test_records_that_are_false_cut_nothing_off(sandbox: Sandbox, spool: Path) -> None:
    whole = HALF + b"\n\nFrom carol@example.org Tue Jan  6 10:00:01 2026\n\nhers\n\n"
    tear(spool / "alice", "alice", torn=whole)
    tear(spool / "bob", "bob")
    os.chown(spool / "bob.lock", UIDS["alice"], 8)
    tear(spool / "carol", "carol", torn=HALF + b"\n", length=len(HALF) + 1)
    assert not [line for line in check_mailboxes(sandbox) if "bob" in line or "half" in line]
    assert (spool / "alice").read_bytes() == OLD + whole
    assert (spool / "bob").read_bytes() == OLD + HALF
    assert (spool / "carol").read_bytes() == OLD + HALF + b"\n"


def test_mailbox_of_another_behind_a_link_is_not_cut(sandbox: Sandbox, spool: Path) -> None:
    tear(spool / "bob", "bob")
    (spool / "bob.lock").rename(spool / "alice.lock")
    os.chown(spool / "alice.lock", UIDS["alice"], 8)
    for link in (Path.hardlink_to, Path.symlink_to):
        link(spool / "alice", spool / "bob")
        (said,) = check_mailboxes(sandbox)
        assert "Mailbox /var/mail/alice " in said
        assert (spool / "bob").read_bytes() == OLD + HALF
        (spool / "alice").unlink()


def test_what_only_looks_like_a_dotlock_is_passed_over(sandbox: Sandbox, spool: Path) -> None:
    tear(spool / "carol", "carol")
    os.mkfifo(spool / "alice.lock")
    (spool / "bob.lock").symlink_to(spool / "carol.lock")
    (spool / "postfix.lock").mkdir()
    (spool / "nobody-here.lock").touch()
    (spool / os.fsdecode(b"\xff.lock")).touch()
    (spool / "-\x1b[2J.lock").touch()
    assert check_mailboxes(sandbox) == said_of("/var/mail/carol")
    assert (spool / "alice.lock").is_fifo()
    (spool / "postfix.lock").rmdir()


def test_repairs_end_when_their_time_is_over(sandbox: Sandbox, spool: Path) -> None:
    for user in ("alice", "bob", "carol"):
        tear(spool / user, user)
    assert len(check_mailboxes(sandbox, limit=0)) == 2
    assert sum((spool / user).read_bytes() == OLD for user in UIDS) == 1


def test_dead_lock_without_its_mailbox_says_that_there_is_none(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    box.unlink()
    (said,) = check_mailboxes(sandbox)
    assert said.endswith("Local error (opening the mailbox: ENOENT)")
    assert not box.exists()


def test_maildirs_are_not_looked_at(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    assert check_mailboxes(sandbox, '[delivery]\nmailbox = "/var/mail/{user}/"\n') == []
    assert box.read_bytes() == OLD + HALF


def test_spool_that_is_missing_is_a_finding(sandbox: Sandbox) -> None:
    said = check_mailboxes(sandbox, '[delivery]\nmailbox = "/nonexistent/{user}"\n')
    assert said == ["not every mailbox could be looked at"]


def test_file_system_that_hangs_does_not_hold_up_the_check(sandbox: Sandbox, box: Path) -> None:
    tear(box, "alice")
    assert check_mailboxes(sandbox, disk="hangs") == ["not every mailbox could be looked at"]
    assert check_mailboxes(sandbox) == said_of("/var/mail/alice")


def list_locked(mailbox: str, only_uid: int | None = None) -> list[str]:
    found = listing.list_locked(mailbox, uid_range=(1, 2), postmaster="root", only_uid=only_uid)
    return sorted(account.mailbox for account in found)


def test_owners_of_a_spool_are_those_whose_dotlock_is_there(tmp_path: Path) -> None:
    names = "daemon DAEMON bin+lists root nobody-here sys postmaster ../bin"
    for name in names.replace("/", "").split():
        (tmp_path / f"{name}.mbox.lock").touch()
    for name in ("bin.mbox", ".lock", ".mbox.lock", "bin.lock", "bin.mbox.lock.1"):
        (tmp_path / name).touch()
    found = list_locked(f"{tmp_path}/{{user}}.mbox")
    assert found == [f"{tmp_path}/daemon.mbox", f"{tmp_path}/root.mbox"]


def test_owners_elsewhere_are_the_accounts_as_far_as_they_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list_locked("/srv/{user}/mbox") == [f"/srv/{u}/mbox" for u in ("bin", "daemon", "root")]
    assert list_locked("/srv/mbox", only_uid=1) == ["/srv/mbox"]
    monkeypatch.setattr(listing, "_MOST_ACCOUNTS", 2)
    assert len(list_locked("/srv/{user}/mbox")) == 2
