"""What `mda install` writes, and what the files it writes say and do."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import click
import pytest
from support.sandbox import start_command

from mda import config
from mda.cli import install, uninstall
from mda.cli.whole import write_whole
from mda.receiver.listener import AddressError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ["/opt/mda/bin/python", "-I", "-S", "-B", "/opt/mda/mda/__main__.py"]


def shipped(name: str) -> str:
    return install.package_data().joinpath(name).read_text()


# -- every key is documented ----------------------------------------------------------

KEYS = [(section, key) for section, keys in config.SECTIONS.items() for key in keys]


def in_toml(section: str, key: str) -> str:
    """A key's default as the configuration file writes it."""
    value = config.SECTIONS[section][key]
    if key == "mailbox_mode":
        return f"0o{value:o}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_stands_commented_with_its_default_in_the_shipped_file(
    section: str, key: str
) -> None:
    table = shipped("etc/mda.toml").split(f"[{section}]\n")[1].split("\n[")[0]

    assert f"#{key} = {in_toml(section, key)}\n" in table + "\n"


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_stands_with_its_default_in_the_manual(section: str, key: str) -> None:
    page = shipped("man/mda.toml.5").replace("\\(dq", '"').replace("\\-", "-")
    text = page.split(f".SH [{section}]\n")[1].split("\n.SH ")[0]

    assert f".B {key} = {in_toml(section, key)}\n" in text


def test_shipped_file_has_no_key_that_is_not_ours(tmp_path: Path) -> None:
    lines = shipped("etc/mda.toml").split("\n")
    live = "\n".join(line.removeprefix("#") for line in lines if not line.startswith("# "))
    file = tmp_path / "mda.toml"
    file.write_text(live)

    config.load(str(file), str(tmp_path / "none"))

    tables = tomllib.loads(live)
    assert tables.pop("routes"), "an example of each"
    assert tables.pop("forward")
    assert {(section, key) for section, keys in tables.items() for key in keys} == set(KEYS)


def test_manual_names_every_command() -> None:
    from mda.cli import COMMANDS

    people = ("send", "reply", "messages", "who", "mesg")
    for name in COMMANDS:
        page = shipped("man/mda-send.1" if name in people else "man/mda.1")
        assert f".B mda {name}\n" in page
        assert f".SS mda {name}\n" in page


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_understands_its_completion(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_bytes(install.complete_in(shell))
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


def test_bash_completes_a_command(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_bytes(install.complete_in("bash"))
    mda = tmp_path / "mda"
    mda.write_text(f'#!/bin/sh\nexec {shlex.join(start_command())} "$@"\n')
    mda.chmod(0o755)
    ask = "COMP_WORDS=(mda se); COMP_CWORD=1; _mda_completion mda; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", f"source {script}; {ask}"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        check=True,
    )
    assert set(done.stdout.split()) == {b"serve", b"send", b"sendmail"}


# -- the units ------------------------------------------------------------------------


def read_unit(name: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(shipped(f"systemd/{name}"))
    return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_sockets_are_as_decision_9_says(protocol: str) -> None:
    sections = read_unit(f"mda-{protocol}.socket")
    unit = sections["Socket"]

    assert sections["Unit"]["StartLimitIntervalSec"] == "0"
    expected = {
        "ListenStream": f"/run/mda/{protocol}.sock",
        "SocketMode": "0666",
        "Accept": "yes",
        "MaxConnections": "256",
        "TriggerLimitIntervalSec": "0",
        "PollLimitIntervalSec": "0",
        "RemoveOnStop": "yes",
    }
    assert expected.items() <= unit.items()
    assert "MaxConnectionsPerSource" not in unit


MUST = {
    "StandardInput": "socket",
    "StandardOutput": "socket",
    "StandardError": "journal",
    "SyslogFacility": "mail",
    "SyslogIdentifier": "mda",
    "LogRateLimitIntervalSec": "0",
    "OOMPolicy": "continue",
    "CapabilityBoundingSet": "CAP_SETUID CAP_SETGID",
    "ProtectSystem": "full",
    "SystemCallFilter": "@system-service",
}
MUST_BE_ON = [
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "NoNewPrivileges",
    "PrivateTmp",
    "ProtectClock",
    "ProtectControlGroups",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
]
MUST_NOT = {"PrivateDevices", "PrivateUsers", "ProtectHome", "ProtectProc", "DynamicUser"}


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_services_are_as_decision_9_says(protocol: str) -> None:
    unit = read_unit(f"mda-{protocol}@.service")
    service = unit["Service"]

    assert unit["Unit"]["CollectMode"] == "inactive-or-failed"
    assert MUST.items() <= service.items()
    assert {key: service.get(key) for key in MUST_BE_ON} == dict.fromkeys(MUST_BE_ON, "yes")
    assert not MUST_NOT & set(service)
    assert int(service["TimeoutStopSec"]) > config.Delivery.lock_seconds
    assert service["ExecStart"] == f"@PROGRAM@ receive --protocol {protocol}"


def test_program_is_filled_in_everywhere_and_does_not_depend_on_the_environment() -> None:
    files = {file.path: file for file in install.plan_files(PROGRAM, None, install.Wishes())}

    assert not [path for path, file in files.items() if b"@PROGRAM@" in file.content]
    unit = files["/etc/systemd/system/mda-lmtp@.service"].content.decode()
    assert f"ExecStart={' '.join(PROGRAM)} receive --protocol lmtp\n" in unit
    assert files["/usr/local/bin/mda"].mode == 0o755
    assert {file.mode for path, file in files.items() if path != "/usr/local/bin/mda"} == {0o644}


@pytest.mark.parametrize(("version", "count"), [(0, 0), (252, 0), (254, 0), (255, 1), (257, 1)])
def test_units_have_no_key_that_the_hosts_systemd_does_not_know(version: int, count: int) -> None:
    unit = install.fill_in(shipped("systemd/mda-smtp.socket").encode(), PROGRAM, version)

    assert unit.count(b"\nPollLimitIntervalSec=0\n") == count
    assert b"\nTriggerLimitIntervalSec=0\n" in unit


# -- addresses ------------------------------------------------------------------------


def test_addresses_go_to_the_socket_of_their_protocol() -> None:
    addresses = ["127.0.0.1:25", "lmtp+[::1]:2424", "unix:/run/x.sock", "127.0.0.1:25"]

    assert install.sort_addresses(addresses) == {
        "smtp": ["127.0.0.1:25", "/run/x.sock"],
        "lmtp": ["[::1]:2424"],
    }


def test_no_address_means_to_keep_what_is_there() -> None:
    assert install.sort_addresses([]) is None


@pytest.mark.parametrize(
    "address",
    [
        "",
        "25",
        "localhost:25",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:25\nExecStartPre=/bin/true",
        "unix:relative",
        "unix:/run/a b",
        "unix:/run/../etc/x",
        "unix:/run/%h",
        "lmtp+127.0.0.1:25",
        "lmtp+[::]:25",
        "smtp+127.0.0.1:25",
    ],
)
def test_bad_address_is_refused(address: str) -> None:
    with pytest.raises(AddressError):
        install.sort_addresses([address])


def test_port_of_another_program_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = f"127.0.0.1:{other.getsockname()[1]}"

        with pytest.raises(AddressError, match="another program"):
            install.refuse_used_addresses({"smtp": [place], "lmtp": []})

    install.refuse_used_addresses({"smtp": [place], "lmtp": []})


def test_drop_in_adds_addresses() -> None:
    files = install.plan_files(
        PROGRAM, {"smtp": ["127.0.0.1:25", "[::1]:25"], "lmtp": []}, install.Wishes()
    )
    [drop_in] = [file for file in files if file.path.endswith("listen.conf")]

    assert drop_in.path == "/etc/systemd/system/mda-smtp.socket.d/listen.conf"
    parts = drop_in.content.decode().split("[Socket]\n")
    assert parts[1] == "FreeBind=yes\nListenStream=127.0.0.1:25\nListenStream=[::1]:25\n"


# -- writing and removing -------------------------------------------------------------


def test_file_is_written_whole_with_its_permissions_whatever_the_umask(tmp_path: Path) -> None:
    file = install.File(str(tmp_path / "x"), 0o644, b"new\n")
    Path(file.path).write_bytes(b"old, and longer\n")
    umask = os.umask(0o077)
    try:
        write_whole(file.path, file.content, file.mode)
    finally:
        os.umask(umask)

    assert Path(file.path).read_bytes() == b"new\n"
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o644
    assert os.listdir(tmp_path) == ["x"]


def test_file_in_place_is_not_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        install.File(str(tmp_path / "a"), 0o644, b"a"),
        install.File(str(tmp_path / "b"), 0o755, b"b"),
    ]

    assert install.write_files(files) == [file.path for file in files]
    assert install.write_files(files) == []
    (tmp_path / "b").chmod(0o700)
    assert install.write_files(files) == [str(tmp_path / "b")]
    assert capsys.readouterr().out.count("wrote") == 3


@pytest.mark.parametrize("kind", ["link", "dangling", "folder"])
def test_what_is_no_plain_file_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mda-smtp.socket"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if kind == "link" else tmp_path / "nothing")

    with pytest.raises(install.InstallError, match="in the way"):
        install.refuse_foreign_files([install.File(str(path), 0o644, b"")])


def test_command_of_another_program_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mda"
    monkeypatch.setattr(install, "COMMAND", str(path))
    path.write_bytes(b"#!/bin/sh\necho a mail delivery agent of another kind\n")
    with pytest.raises(install.InstallError, match="another program"):
        install.refuse_foreign_files([install.File(str(path), 0o755, b"")])

    path.write_text(shipped("systemd/mda.sh"))
    install.refuse_foreign_files([install.File(str(path), 0o755, b"")])


def test_removing_takes_files_and_empty_folders_only(tmp_path: Path) -> None:
    for name in ("ours/a", "shared/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "shared/somebody's").write_bytes(b"")
    listed = ["shared/", "ours/", "ours/a", "shared/b", "gone"]

    removed = install.remove_files(f"{tmp_path}/{name}" for name in listed)

    assert [path.removeprefix(f"{tmp_path}/") for path in removed] == [
        "shared/b",
        "ours/a",
        "ours/",
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["shared", "somebody's"]


def test_only_root_installs() -> None:
    pid = os.fork()
    if pid == 0:
        os.seteuid(65_534)
        try:
            install.require_root()
        except click.ClickException:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    install.require_root()


def test_program_tree_written_under_umask_077_becomes_readable(tmp_path: Path) -> None:
    secret_mode = {"d": 0o700, "f": 0o600, "x": 0o700}
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"")
    (tmp_path / "d/x").write_bytes(b"")
    (tmp_path / "d/link").symlink_to("/nowhere")
    for name, mode in (("d/f", "f"), ("d/x", "x"), ("d", "d")):
        (tmp_path / name).chmod(secret_mode[mode])

    changed = [install.let_all_read(path) for path in install.walk_tree(str(tmp_path / "d"))]

    assert changed == [True, True, True]
    modes = {p.name: stat.S_IMODE(p.lstat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"d": 0o755, "f": 0o644, "x": 0o755, "link": 0o777}


@pytest.mark.parametrize(
    ("mode", "owner", "complaint"),
    [
        (0o755, 0, ""),
        (0o1777, 0, ""),
        (0o777, 0, "not root's alone"),
        (0o755, 1000, "not root's alone"),
        (0o700, 0, "cannot get there"),
    ],
)
def test_program_must_be_reached_by_all_and_changed_by_root_only(
    mode: int, owner: int, complaint: str
) -> None:
    # Not in pytest's own folder, which is closed to others already.
    folder = Path(f"/var/tmp/mda-test-{os.getpid()}")
    tree = folder / "venv"
    tree.mkdir(parents=True)
    try:
        os.chown(folder, owner, 0)
        folder.chmod(mode)
        if complaint:
            with pytest.raises(install.InstallError, match=complaint):
                install.check_way_to(str(tree))
        else:
            install.check_way_to(str(tree))
    finally:
        tree.rmdir()
        folder.rmdir()


# -- the command on the PATH ----------------------------------------------------------


def write_command(folder: Path, program: str) -> str:
    """The shell script of /usr/local/bin/mda, with `program` for Python."""
    script = folder / "program"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    command = folder / "mda"
    command.write_text(shipped("systemd/mda.sh").replace("@PROGRAM@", str(script)))
    command.chmod(0o755)
    return str(command)


def run_command(folder: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = write_command(folder, program)
    return subprocess.run([command, *words], capture_output=True, text=True, check=False, input="x")


@pytest.mark.parametrize("status", [0, 65, 67, 75, 77])
def test_known_exit_status_of_deliver_is_passed_on(tmp_path: Path, status: int) -> None:
    done = run_command(tmp_path, f"cat; echo $*; exit {status}", "deliver", "-d", "a b")

    assert (done.returncode, done.stdout, done.stderr) == (status, "xdeliver -d a b\n", "")


@pytest.mark.parametrize("status", [1, 2, 64, 69, 70, 73, 74, 76, 78, 126, 127, 255])
def test_unknown_exit_status_of_deliver_becomes_75(tmp_path: Path, status: int) -> None:
    done = run_command(tmp_path, f"exit {status}", "deliver")

    assert done.returncode == 75
    assert done.stderr == f"4.3.0 mda has failed (exit status {status})\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_deliver_killed_by_a_signal_becomes_75(tmp_path: Path, number: int) -> None:
    done = run_command(tmp_path, f"kill -{number:d} $$", "deliver")

    assert done.returncode == 75
    assert "4.3.0 mda has failed" in done.stderr


@pytest.mark.parametrize("fault", ["missing", "not executable", "broken interpreter"])
def test_deliver_becomes_75_where_python_is_broken(tmp_path: Path, fault: str) -> None:
    command = write_command(tmp_path, "true")
    program = tmp_path / "program"
    if fault == "missing":
        program.unlink()
    elif fault == "not executable":
        program.write_bytes(b"\x7fELF nonsense")
        program.chmod(0o644)
    else:
        program.write_text("#!/nonexistent/python3\n")

    done = subprocess.run([command, "deliver"], capture_output=True, check=False)

    assert done.returncode == 75
    assert done.stderr.startswith(b"4.3.0 mda has failed (exit status 12")
    assert done.stderr.count(b"\n") == 1
    assert b"program" in done.stderr, "what the shell says of it"


def test_the_last_complaint_of_python_is_on_the_one_line_that_mtas_show(tmp_path: Path) -> None:
    program = "cat >/dev/null; echo Traceback >&2; echo out; echo 'Error: 50%' >&2; exit 1"
    done = run_command(tmp_path, program, "deliver")

    assert (done.returncode, done.stdout) == (75, "out\n")
    assert done.stderr == "4.3.0 mda has failed (exit status 1): Error: 50%\n"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_deliver_with_nowhere_to_complain_keeps_its_status(
    tmp_path: Path, redirection: str
) -> None:
    command = write_command(tmp_path, "echo '5.1.1 <a> No' >&2; exit 67")
    line = f'"$0" deliver {redirection}'

    assert subprocess.run(["sh", "-c", line, command], check=False).returncode == 67


def test_what_deliver_itself_says_is_passed_on(tmp_path: Path) -> None:
    said = "echo '5.1.1 <a> No'; echo '5.1.1 <b> No'"
    done = run_command(tmp_path, f"{{ {said}; }} >&2; exit 67", "deliver")

    assert (done.returncode, done.stdout) == (67, "")
    assert done.stderr == "5.1.1 <a> No\n5.1.1 <b> No\n"


def test_deliver_answers_though_it_is_told_to_end(tmp_path: Path) -> None:
    ready, done = tmp_path / "ready", tmp_path / "done"
    program = f"trap '' TERM; : >{ready}; while [ ! -e {done} ]; do sleep 0.05; done; exit 67"
    with subprocess.Popen([write_command(tmp_path, program), "deliver"]) as process:
        while not ready.exists():
            time.sleep(0.01)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        done.touch()
        assert process.wait(10) == 67


@pytest.mark.parametrize("word", ["receive", "deliver", "serve"])
def test_root_gives_all_capabilities_but_two_away(tmp_path: Path, word: str) -> None:
    done = run_command(tmp_path, "grep Cap /proc/self/status", word)

    caps = {line.split(":")[0]: int(line.split()[1], 16) for line in done.stdout.splitlines()}
    setgid_and_setuid = 1 << 6 | 1 << 7
    assert caps["CapBnd"] == caps["CapPrm"] == caps["CapEff"] == setgid_and_setuid
    assert caps["CapInh"] == caps["CapAmb"] == 0


def test_user_who_can_give_nothing_away_gets_the_program_all_the_same(tmp_path: Path) -> None:
    command = write_command(tmp_path, "id -u; exit 65")
    # The real one would write a line to the system's log.
    (tmp_path / "setpriv").write_text("#!/bin/sh\necho setpriv was tried\nexit 1\n")
    (tmp_path / "setpriv").chmod(0o755)
    folder = tmp_path
    while folder != Path("/"):
        if folder.owner() == "root" and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o711)
        folder = folder.parent

    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [command, "deliver"], capture_output=True, check=False, user=65_534, env=path
    )

    assert (done.returncode, done.stdout) == (65, b"65534\n")
    assert done.stderr == b""


def test_other_commands_are_simply_run(tmp_path: Path) -> None:
    done = run_command(tmp_path, 'echo "$1,$2"; echo diagnostics >&2; exit 3', "who", "a b")

    assert (done.returncode, done.stdout, done.stderr) == (3, "who,a b\n", "diagnostics\n")


def receive(command: str, client: socket.socket, errors: socket.socket) -> None:
    """Run `mda receive` as inetd does, but for where its standard error goes."""
    ends = [client.fileno(), client.fileno(), errors.fileno()]
    subprocess.call([command, "receive"], stdin=ends[0], stdout=ends[1], stderr=ends[2])


def test_nothing_is_said_to_the_client_of_inetd_where_python_is_broken(tmp_path: Path) -> None:
    command = write_command(tmp_path, "echo traceback >&2; exit 1")
    for program in ("present", "missing"):
        if program == "missing":
            (tmp_path / "program").unlink()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            receive(command, theirs, theirs)
            theirs.shutdown(socket.SHUT_RDWR)
            assert ours.recv(1000) == b""


def test_diagnostics_of_receive_are_kept_where_they_do_not_reach_the_client(tmp_path: Path) -> None:
    command = write_command(tmp_path, "echo traceback >&2; exit 1")
    ours, theirs = socket.socketpair()
    journal, journals_end = socket.socketpair()
    with ours, theirs, journal, journals_end:
        receive(command, theirs, journals_end)
        assert journal.recv(1000) == b"traceback\n"


def test_command_is_recognised_as_ours() -> None:
    assert install.COMMAND_MARK in shipped("systemd/mda.sh").encode()


@pytest.mark.parametrize("module", [install, uninstall])
def test_two_at_once_do_not_undo_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    monkeypatch.setattr(module, "LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    # Not even a failing test may install anything on the machine that it runs on.
    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], pytest.fail)
    holder = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    command = [sys.executable, "-I", "-c", f"{holder}; print(1, flush=True); sys.stdin.read()"]
    command.append(str(tmp_path / "lock"))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        options = {"now": False, "addresses": (), "has_commands": None, "has_sendmail": None}
        with pytest.raises(click.ClickException, match="is running"):
            module.command.callback(**(options if module is install else {}))


@pytest.mark.parametrize(("asked", "before", "expected"), [
    (True, False, True), (None, True, True), (None, False, False), (False, True, False),
])  # fmt: skip
def test_units_for_commands_stay_until_they_are_taken_away(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: bool | None,
    before: bool,
    expected: bool,
) -> None:
    dropins = (str(tmp_path / "smtp.conf"), str(tmp_path / "lmtp.conf"))
    monkeypatch.setattr(install, "COMMAND_DROPINS", dropins)
    if before:
        (tmp_path / "smtp.conf").touch()
    planned = {
        file.path: file.content for file in install.plan_files(PROGRAM, None, install.Wishes(asked))
    }
    assert (set(dropins) <= set(planned)) is expected
    assert not set(dropins) & set(planned) or b"NoNewPrivileges=no\n" in planned[dropins[0]]
