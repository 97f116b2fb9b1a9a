"""What `mda check` finds, by real files, users and sockets."""

from __future__ import annotations

import os
import pwd
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mda.cli import check
from mda.config import Config


def whats(findings: object) -> list[str]:
    """The first lines of the findings."""
    return [finding.what for finding in findings]  # type: ignore[attr-defined]


def with_values(section: str, **values: object) -> Config:
    return Config().with_values(section, **values)


def test_broken_configuration_is_named_by_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "mda.toml"
    file.write_text("[receiver]\n\nmesage_size = 1\n")

    findings = whats(check.check_host(str(file)))

    assert [what for what in findings if what.startswith(f"{file}:3: receiver.mesage_size: ")]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_configuration_that_only_root_can_write_is_well(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "mda.toml"
    file.touch()
    file.chmod(mode)

    assert whats(check.check_config_file(str(file))) == []


@pytest.mark.parametrize(("mode", "owner"), [(0o664, 0), (0o646, 0), (0o644, 1000)])
def test_configuration_that_others_can_write_is_found(
    tmp_path: Path, mode: int, owner: int
) -> None:
    file = tmp_path / "mda.toml"
    file.touch()
    file.chmod(mode)
    os.chown(file, owner, 0)

    assert whats(check.check_config_file(str(file))) == [f"{file}: others than root can write it"]


def test_directory_of_the_configuration_counts_too(tmp_path: Path) -> None:
    (tmp_path / "mda.toml").touch()
    tmp_path.chmod(0o777)

    findings = whats(check.check_config_file(str(tmp_path / "mda.toml")))

    assert findings == [f"{tmp_path}: others than root can write it"]


def test_host_name_outside_the_local_domains_is_found() -> None:
    config = with_values("receiver", hostname="Mail.example.org", local_domains=("example.org",))
    assert whats(check.check_names(config)) == [
        "the host name Mail.example.org is not among the local domains"
    ]

    config = with_values(
        "receiver", hostname="Mail.example.org", local_domains=("mail.EXAMPLE.org",)
    )
    assert whats(check.check_names(config)) == []


def test_default_names_are_well() -> None:
    assert whats(check.check_names(Config())) == []


def test_postmaster_without_an_account_is_found() -> None:
    found = whats(check.check_accounts(with_values("recipients", postmaster="no-such-user")))
    well = whats(check.check_accounts(Config()))

    assert [what for what in found if "postmaster" in what and "no-such-user" in what]
    assert not [what for what in well if "postmaster" in what]


def test_missing_group_of_terminals_is_found_unless_there_are_none() -> None:
    found = whats(check.check_accounts(with_values("terminal", group="no-such-group")))
    off = with_values("terminal", group="no-such-group", enabled=False)

    assert [what for what in found if "no-such-group" in what]
    assert not [what for what in whats(check.check_accounts(off)) if "no-such-group" in what]


def test_missing_system_user_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SYSTEM_USERS", ("root", "daemon", "no-such-user"))

    findings = whats(check.check_accounts(Config()))

    assert findings == ["the system user root is root", "there is no system user no-such-user"]


def spool_at(path: Path) -> Config:
    return with_values("delivery", mailbox=f"{path}/{{user}}")


@pytest.mark.parametrize(
    ("mode", "owner", "complaint"),
    [
        (0o2775, 0, ""),
        (0o775, 0, ""),
        (0o1777, 0, ""),
        (0o3777, 0, ""),
        (0o755, 0, "its group cannot write"),
        (0o2755, 0, "its group cannot write"),
        (0o700, 0, "its group cannot write"),
        (0o777, 0, "any user can remove"),
        (0o2777, 0, "any user can remove"),
        (0o2775, 1000, "belongs to 1000"),
    ],
)
def test_permissions_of_the_mail_spool(
    tmp_path: Path, mode: int, owner: int, complaint: str
) -> None:
    os.chown(tmp_path, owner, 8)
    tmp_path.chmod(mode)

    findings = whats(check.check_mail_spool(spool_at(tmp_path)))

    assert [what.removeprefix(f"{tmp_path}: ")[: len(complaint)] for what in findings] == (
        [complaint] if complaint else []
    )
    assert len(findings) == bool(complaint)


def test_missing_mail_spool_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        [what] = whats(check.check_mail_spool(spool_at(tmp_path / name)))
        assert "no such directory" in what


def test_mailboxes_in_homes_have_no_spool() -> None:
    assert whats(check.check_mail_spool(with_values("delivery", mailbox="{home}/mbox"))) == []


@pytest.mark.parametrize(
    ("mode", "owner", "is_well"), [(0o700, 1, True), (0o750, 1, False), (0o700, 0, False)]
)
def test_own_spool_is_its_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, is_well: bool
) -> None:
    daemon = pwd.getpwuid(1)
    monkeypatch.setattr(check, "has_user", lambda name: True)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: daemon)
    os.chown(tmp_path, owner, 0)
    tmp_path.chmod(mode)

    found = whats(check.check_own_spool(with_values("delivery", spool=str(tmp_path))))
    missing = whats(check.check_own_spool(with_values("delivery", spool=f"{tmp_path}/none")))

    assert (found == []) is is_well
    assert len(missing) == 1
    tmp_path.chmod(stat.S_IRWXU)


def greet(listening: socket.socket, greeting: bytes, heard: list[bytes]) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.sendall(greeting)
        if greeting.startswith(b"220"):
            heard.append(connection.recv(100))


@pytest.fixture
def serve(tmp_path: Path) -> Callable[[bytes], tuple[str, list[bytes], threading.Thread]]:
    def start(greeting: bytes) -> tuple[str, list[bytes], threading.Thread]:
        listening = socket.socket(socket.AF_UNIX)
        path = str(tmp_path / "smtp.sock")
        listening.bind(path)
        listening.listen()
        heard: list[bytes] = []

        def run() -> None:
            with listening:
                greet(listening, greeting, heard)

        thread = threading.Thread(target=run)
        thread.start()
        return path, heard, thread

    return start


Serve = Callable[[bytes], tuple[str, list[bytes], threading.Thread]]


def test_socket_that_greets_is_well_and_is_left_politely(serve: Serve) -> None:
    path, heard, thread = serve(b"220 host.example.org ready\r\n")

    assert whats(check.check_socket(path)) == []

    thread.join()
    assert heard == [b"QUIT\r\n"]


@pytest.mark.parametrize(
    ("greeting", "shown"),
    [(b"421 4.3.5 host\x1b[2J error\r\n", "421 4.3.5 host"), (b"", "nothing")],
)
def test_socket_that_greets_otherwise_is_found(serve: Serve, greeting: bytes, shown: str) -> None:
    path, _, thread = serve(greeting)

    [what] = whats(check.check_socket(path))

    thread.join()
    assert shown in what
    assert what.isprintable()


def test_missing_socket_and_one_without_a_listener_are_found(tmp_path: Path) -> None:
    path = str(tmp_path / "smtp.sock")
    assert whats(check.check_socket(path)) == [f"{path}: No such file or directory"]

    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    assert whats(check.check_socket(path)) == [f"{path}: Connection refused"]


def test_silent_socket_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PATIENCE", 0.05)
    path = str(tmp_path / "smtp.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        assert whats(check.check_socket(path)) == [f"{path}: no greeting in time"]


def test_every_finding_says_how_to_mend_it(tmp_path: Path) -> None:
    file = tmp_path / "mda.toml"
    file.write_text("[delivery\n")

    for finding in check.check_host(str(file)):
        assert finding.what
        assert finding.remedy
        assert "\n" not in finding.what + finding.remedy
