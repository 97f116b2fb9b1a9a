"""Who is logged in, from fake /proc and cgroup trees; utmp and logind faked at their seams."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from pathlib import Path

import pytest

from mda.terminal import sessions
from mda.terminal.sessions import Session, Terminal

ALICE = 4000


class Host:
    """A host whose /proc, cgroups, utmp and logind say what a test wants."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup"
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(sessions, "PROC", str(self.proc))
        monkeypatch.setattr(sessions, "CGROUPS", (str(self.cgroup), str(root / "none")))
        self.records(None)
        self.sessions(None)
        self.run(1, b"systemd", uid=0)
        (self.cgroup / "user.slice").mkdir(parents=True)

    def records(self, records: list[tuple[str, str]] | None) -> None:
        self._monkeypatch.setattr(sessions, "read_utmp", lambda: records)

    def sessions(self, known: list[Session] | None) -> None:
        self._monkeypatch.setattr(sessions, "read_logind", lambda uid=-1: known)

    def scan(self, processes: dict[int, list[int]]) -> None:
        self._monkeypatch.setattr(sessions, "scan_processes", lambda: processes)

    def run(
        self,
        pid: int,
        comm: bytes,
        tty: int = 0,
        foreground: int = -1,
        parent: int = 1,
        group: int = 0,
        uid: int = ALICE,
        scope: str = "session-1.scope",
    ) -> None:
        """A process; all but root's stand in their user's slice."""
        directory = self.proc / str(pid)
        directory.mkdir(parents=True)
        stat = b"%d (%s) S %d %d %d %d %d 4194304 1 0 0\n"
        numbers = (parent, group or pid, pid, tty, foreground)
        (directory / "stat").write_bytes(stat % (pid, comm, *numbers))
        if uid:
            cgroup = self.cgroup / "user.slice" / f"user-{uid}.slice" / scope
            cgroup.mkdir(parents=True, exist_ok=True)
            with open(cgroup / "cgroup.procs", "a") as file:
                file.write(f"{pid}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def pts(number: int) -> int:
    return os.makedev(136, number)


def names(uid: int) -> list[str]:
    return [terminal.device for terminal in sessions.find_terminals(uid).terminals]


@pytest.fixture
def people(monkeypatch: pytest.MonkeyPatch) -> None:
    uids = {"alice": ALICE, "alicia": 4001, "alice2": ALICE}

    def look_up(name: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", uids[name], 100, "", "/", "/bin/sh"))

    def name(uid: int) -> pwd.struct_passwd:
        return look_up({ALICE: "alice", 4001: "alicia"}[uid])

    def owns(uid: int, device: str) -> bool:
        return (uid, device) == (ALICE, "/dev/pts/3")

    monkeypatch.setattr(pwd, "getpwnam", look_up)
    monkeypatch.setattr(pwd, "getpwuid", name)
    monkeypatch.setattr(sessions, "owns", owns)


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("pts/3", "/dev/pts/3"),
        ("tty1", "/dev/tty1"),
        ("/dev/pts/0", "/dev/pts/0"),
        *[
            (line, "")
            for line in (
                "",
                "tty",
                "tty0",
                "tty64",
                "ttyS0",
                "console",
                ":0",
                "seat0",
                "sshd pts/0",
                "pts/",
                "pts/07",
                "pts/1/",
                "pts/ptmx",
                "pts/-1",
                "pts/\u0663",
                "pts/1\0x",
                "pts/99999999",
                "../etc/passwd",
                "/etc/passwd",
                "pts/../../tmp/x",
                "/dev//dev/pts/0",
                "p" * 32,
            )
        ],
    ],
    ids=ascii,
)
def test_only_plain_terminal_names_in_records_count(line: str, device: str) -> None:
    assert sessions.name_line(line) == device


@pytest.mark.parametrize(
    ("major", "minor", "device"),
    [
        (136, 0, "/dev/pts/0"),
        (136, 300, "/dev/pts/300"),
        (137, 1, "/dev/pts/257"),
        (4, 2, "/dev/tty2"),
        (4, 0, ""),
        (4, 64, ""),
        (5, 0, ""),
        (5, 1, ""),
        (0, 0, ""),
    ],
)
def test_device_numbers_name_terminals(major: int, minor: int, device: str) -> None:
    assert sessions.name_device(os.makedev(major, minor)) == device


@pytest.mark.usefixtures("people")
def test_utmp_is_matched_by_uid_and_not_by_the_beginning_of_a_name(host: Host) -> None:
    host.records(
        [
            ("alice", "pts/1"),
            ("alicia", "pts/2"),
            ("alice2", "pts/3"),
            ("alic", "pts/4"),
            ("alice" + "a" * 27 + "example.org", "pts/5"),
            ("", "pts/6"),
            ("alice", "../etc/passwd"),
            ("alice", ""),
        ]
    )
    assert names(ALICE) == ["/dev/pts/1", "/dev/pts/3"]


def test_a_record_with_an_impossible_name_is_ignored() -> None:
    assert sessions.look_up_uid("a\0b") == -1
    assert sessions.look_up_uid("\udcff" * 32) == -1


def test_logind_counts_for_users_classes_only(host: Host) -> None:
    host.sessions(
        [
            Session(ALICE, "pts/1", "user", "tty"),
            Session(ALICE, "pts/2", "greeter", "tty"),
            Session(ALICE, "pts/3", "manager", "unspecified"),
            Session(ALICE, "pts/4", "user-light", "tty"),
            Session(4001, "pts/5", "user", "tty"),
            Session(ALICE, "", "user", "tty"),
        ]
    )
    assert names(ALICE) == ["/dev/pts/1", "/dev/pts/4"]


@pytest.mark.usefixtures("people")
def test_a_graphical_sessions_console_never_counts(host: Host) -> None:
    host.sessions([Session(ALICE, "tty2", "user", "wayland"), Session(ALICE, "", "user", "x11")])
    host.records([("alice", "tty2"), ("alice", ":0")])
    host.run(100, b"gnome-session", os.makedev(4, 2))
    host.run(101, b"bash", pts(4), 101)
    assert names(ALICE) == ["/dev/pts/4"]


def test_the_slice_finds_a_terminal_that_no_record_knows(host: Host) -> None:
    host.run(200, b"sshd")
    host.run(201, b"bash", pts(7), 201, parent=200)
    assert names(ALICE) == ["/dev/pts/7"]
    assert names(4001) == []
    assert sessions.find_terminals(4001).is_available


def test_the_slice_is_walked_to_its_leaves_and_survives_ended_processes(host: Host) -> None:
    host.run(210, b"bash", pts(8), 210, scope="user@4000.service/app.slice/vte.scope")
    scope = host.cgroup / f"user.slice/user-{ALICE}.slice/session-1.scope"
    scope.mkdir()
    (scope / "cgroup.procs").write_text("0\n999999\n")
    (host.cgroup / "user.slice" / f"user-{ALICE}.slice" / "loop").symlink_to(host.cgroup)
    assert names(ALICE) == ["/dev/pts/8"]


@pytest.mark.parametrize("tree", ["unified", "systemd"])
def test_the_slice_is_found_in_old_hierarchies(
    host: Host, monkeypatch: pytest.MonkeyPatch, tree: str
) -> None:
    host.run(220, b"bash", pts(9), 220)
    host.cgroup.rename(host.cgroup.with_name("moved"))
    host.cgroup.mkdir()
    host.cgroup.with_name("moved").rename(host.cgroup / tree)
    roots = tuple(str(host.cgroup) + root.removeprefix("/sys/fs/cgroup") for root in REAL_CGROUPS)
    monkeypatch.setattr(sessions, "CGROUPS", roots)
    assert names(ALICE) == ["/dev/pts/9"]


REAL_CGROUPS = sessions.CGROUPS


@pytest.mark.parametrize("comm", [b"a) S 1 1 1 34816 (", b"tmux: client) (x", b")", b"", b"x\ny"])
def test_a_processs_own_name_cannot_confuse_the_parser(host: Host, comm: bytes) -> None:
    host.run(230, comm, pts(2), 230, parent=17)
    process = sessions.read_process(230)
    assert process is not None
    assert (process.comm, process.tty, process.parent) == (comm, "/dev/pts/2", 17)


@pytest.mark.usefixtures("people")
def test_one_terminal_reported_in_three_ways_is_one(host: Host) -> None:
    host.records([("alice", "pts/3")])
    host.sessions([Session(ALICE, "/dev/pts/3", "user", "tty")])
    host.run(240, b"bash", pts(3), 240)
    assert sessions.find_terminals(ALICE).terminals == [Terminal("/dev/pts/3")]


@pytest.mark.parametrize(
    ("client", "server"), [(b"tmux: client", b"tmux: server"), (b"screen", b"screen")]
)
def test_a_pane_comes_before_the_terminal_that_shows_it(
    host: Host, client: bytes, server: bytes
) -> None:
    host.run(300, b"bash", pts(1), 301)
    host.run(301, client, pts(1), 301, parent=300)
    host.run(310, server)
    host.run(311, b"bash", pts(2), 312, parent=310)
    host.run(312, b"vi", pts(2), 312, parent=311)
    assert sessions.find_terminals(ALICE).terminals == [
        Terminal("/dev/pts/2"),
        Terminal("/dev/pts/1", is_outer=True),
    ]


def test_a_client_that_does_not_lead_its_process_group_is_found(host: Host) -> None:
    host.run(320, b"bash", pts(1), 320)
    host.run(321, b"tmux: client", pts(1), 320, parent=320, group=320)
    assert sessions.find_terminals(ALICE).terminals == [Terminal("/dev/pts/1", is_outer=True)]


def test_a_client_outside_of_the_users_slice_is_found(host: Host) -> None:
    host.run(330, b"bash", pts(1), 331)
    host.run(331, b"tmux: client", pts(1), 331, parent=330, uid=0)
    assert sessions.find_terminals(ALICE).terminals == [Terminal("/dev/pts/1", is_outer=True)]


@pytest.mark.usefixtures("people")
def test_a_detached_servers_panes_are_left_out_however_they_are_found(host: Host) -> None:
    host.run(340, b"tmux: server")
    host.run(341, b"bash", pts(2), 341, parent=340)
    host.records([("alice", "pts/2")])
    assert names(ALICE) == []
    host.run(350, b"bash", pts(3), 350)
    host.run(351, b"tmux: client", pts(3), 350, parent=350)  # stopped, in the background
    assert names(ALICE) == ["/dev/pts/3"]


def test_a_terminal_opened_inside_a_detached_pane_is_left_out(host: Host) -> None:
    host.run(355, b"tmux: server")
    host.run(356, b"bash", pts(2), 357, parent=355)
    host.run(357, b"script", pts(2), 357, parent=356)
    host.run(358, b"bash", pts(3), 358, parent=357)
    assert names(ALICE) == []


def test_a_screen_client_does_not_make_tmux_panes_seen(host: Host) -> None:
    host.run(360, b"tmux: server")
    host.run(361, b"bash", pts(2), 361, parent=360)
    host.run(370, b"screen", pts(3), 370)
    assert sessions.find_terminals(ALICE).terminals == [Terminal("/dev/pts/3", is_outer=True)]


def test_without_slices_all_processes_of_the_real_uid_are_asked(host: Host) -> None:
    host.run(400, b"bash", pts(6), 400, uid=0)
    host.run(401, b"agetty", os.makedev(4, 1), 401, uid=0)
    host.scan({ALICE: [400], 0: [401]})
    (host.cgroup / "user.slice").rmdir()
    assert names(ALICE) == ["/dev/pts/6"]
    assert names(0) == []


def test_a_login_on_a_terminal_that_nobody_tells_of_is_no_answer_either(host: Host) -> None:
    """Where processes are hidden, of an SSH login logind knows only that it is there."""
    (host.proc / "1" / "stat").unlink()
    host.sessions([Session(ALICE, "", "user", "tty")])
    assert not sessions.find_terminals(ALICE).is_available
    assert sessions.find_terminals(ALICE + 1).is_available
    host.sessions([Session(ALICE, "", "manager", "unspecified")])
    assert sessions.find_terminals(ALICE).is_available
    host.sessions([Session(ALICE, "", "user", "tty"), Session(ALICE, "tty2", "user", "tty")])
    found = sessions.find_terminals(ALICE)
    assert (found.is_available, len(found.terminals)) == (True, 1)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pseudo-terminals: what the scan asks of them is an owner and a time."""
    folder = tmp_path / "pts"
    folder.mkdir()
    now = time.time()
    for name, uid, idle in (
        ("0", ALICE, 10),
        ("1", ALICE, 3000),
        ("2", 4001, 10),
        ("ptmx", ALICE, 0),
        ("07", ALICE, 0),
        ("12", ALICE, 500),
    ):
        path = folder / name
        path.touch()
        os.chown(path, uid, 5)
        os.utime(path, (now - idle, 0))
    monkeypatch.setattr(sessions, "PTS", str(folder))
    return folder


@pytest.mark.usefixtures("devices")
def test_with_no_way_at_all_the_devices_are_asked_where_that_is_wanted(host: Host) -> None:
    (host.proc / "1" / "stat").unlink()
    assert not sessions.find_terminals(ALICE).is_available
    found = sessions.find_terminals(ALICE, idle_at_most=600)
    assert found.is_available
    assert [terminal.device for terminal in found.terminals] == ["/dev/pts/0", "/dev/pts/12"]
    host.records([])
    assert sessions.find_terminals(ALICE, idle_at_most=600).terminals == []


def test_devices_that_cannot_be_listed_are_no_answer(host: Host, devices: Path) -> None:
    (host.proc / "1" / "stat").unlink()
    shutil.rmtree(devices)
    assert not sessions.find_terminals(ALICE, idle_at_most=600).is_available


def test_hidden_processes_are_no_answer(host: Host) -> None:
    host.run(410, b"bash", pts(6), 410)
    (host.proc / "1" / "stat").unlink()
    assert not sessions.find_terminals(ALICE).is_available
    host.records([])
    assert sessions.find_terminals(ALICE).is_available
    assert sessions.list_logins() == ([], True)


def test_ones_own_processes_are_an_answer_also_where_others_are_hidden(host: Host) -> None:
    (host.proc / "1" / "stat").unlink()
    host.run(420, b"bash", pts(6), 420, uid=os.getuid() or 4000)
    assert sessions.find_terminals(os.getuid()).is_available


@pytest.mark.usefixtures("people")
def test_everybodys_logins_are_listed(host: Host) -> None:
    host.run(500, b"bash", pts(6), 500)
    host.run(501, b"bash", pts(2), 501, uid=4002)
    host.records([("alicia", "pts/9"), ("nobody here", "pts/8")])
    host.sessions([Session(4003, "tty3", "user", "tty")])
    logins, is_available = sessions.list_logins()
    assert is_available
    assert logins == [
        (ALICE, Terminal("/dev/pts/6")),
        (4001, Terminal("/dev/pts/9")),
        (4002, Terminal("/dev/pts/2")),
        (4003, Terminal("/dev/tty3")),
    ]


def test_a_missing_utmp_file_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "UTMP", ("/nonexistent",))
    assert sessions.read_utmp() is None
    monkeypatch.setattr(sessions, "UTMP", ("/nonexistent", "/dev/null"))
    assert isinstance(sessions.read_utmp(), list)


def test_a_missing_logind_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LOGIND", "/nonexistent")
    assert sessions.read_logind(ALICE) is None


def test_a_missing_libsystemd_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libsystemd.so.0: cannot open shared object file")

    monkeypatch.setattr(sessions, "LOGIND", "/")
    monkeypatch.setattr(sessions, "_Libsystemd", fail)
    assert sessions.read_logind(ALICE) is None


def test_the_scan_knows_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CGROUPS", ())
    processes = sessions.list_processes()
    assert processes is not None
    assert os.getpid() in processes[os.getuid()]
    process = sessions.read_process(os.getpid())
    assert process is not None
    assert process.parent == os.getppid()
