from __future__ import annotations

import os
from pathlib import Path

import pytest

from mda import config
from mda.config import Config, ConfigError, load


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mda.toml"
    path.write_text(text)
    return str(path)


def test_every_key_has_its_default_without_a_file() -> None:
    assert Config().receiver.recipients == 1000
    assert Config().delivery.mailbox == "/var/mail/{user}"


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.toml"))


def test_values_are_read_and_frozen(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[receiver]\nhostname = "h.example"\nlocal_domains = ["A.example", "b"]\n'
        "[delivery]\nmailbox_mode = 0o600\n[terminal]\nenabled = false\n",
    )
    loaded = load(path, str(tmp_path / "snapshot"))
    assert loaded.receiver.hostname == "h.example"
    assert loaded.delivery.mailbox_mode == 0o600
    assert loaded.terminal.enabled is False
    assert config.local_domains(loaded) == {"a.example", "b"}
    assert config.official_name(loaded) == "h.example"
    with pytest.raises(AttributeError):
        loaded.receiver.hostname = "other"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "[receiver]\n\nhostnam = 'x'\n",
            "3: receiver.hostnam: unknown key; did you mean 'hostname'",
        ),
        ("[recever]\nhostname = 'x'\n", "1: recever: unknown section; did you mean 'receiver'"),
        ("x = 1\n", "1: x: unknown section"),
        ("[receiver]\nhostname = 3\n", "2: receiver.hostname: must be a text, not 3"),
        ("[receiver]\nrecipients = 5\n", "2: receiver.recipients: must be between 100 and"),
        ("[receiver]\nrecipients = true\n", "2: receiver.recipients: must be a whole number"),
        ("[terminal]\nenabled = 1\n", "2: terminal.enabled: must be true or false"),
        ("[terminal]\npeers = ['mars']\n", "2: terminal.peers: 'mars' is not one of local"),
        ("[receiver]\nlocal_domains = [1]\n", "2: receiver.local_domains: 1 is not a text"),
        ("[delivery]\nmailbox = 'mail'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '/var/{x}'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '/var/../{user}'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '/var/mail/all'\n", "would be one mailbox for everybody"),
        ("[receiver\n", "1: "),
        ("a = '\xe9'\n".encode("latin-1").decode("latin-1"), "a: unknown section"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, str(tmp_path / "snapshot"))
    assert str(caught.value).startswith(path)
    assert complaint in str(caught.value)
    assert not (tmp_path / "snapshot").exists()


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mda.toml"
    path.write_bytes(b"[receiver]\nhostname = '\xff'\n")
    with pytest.raises(ConfigError):
        load(str(path), str(tmp_path / "snapshot"))


def test_the_snapshot_serves_only_the_very_same_file(tmp_path: Path) -> None:
    snapshot = str(tmp_path / "snapshot")
    path = write(tmp_path, "[receiver]\nrecipients = 200\n")
    assert load(path, snapshot).receiver.recipients == 200
    assert load(path, snapshot).receiver.recipients == 200
    write(tmp_path, "[receiver]\nrecipients = 300\n")
    assert load(path, snapshot).receiver.recipients == 300


def test_the_snapshot_spares_the_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = str(tmp_path / "snapshot")
    path = write(tmp_path, "[receiver]\nrecipients = 200\n")
    load(path, snapshot)
    monkeypatch.setattr(config, "_parse", None)
    assert load(path, snapshot).receiver.recipients == 200


@pytest.mark.parametrize("spoil", ["writable", "owner", "link", "garbage", "fifo"])
def test_a_snapshot_that_another_could_have_written_is_not_believed(
    tmp_path: Path, spoil: str
) -> None:
    path = write(tmp_path, "[receiver]\nrecipients = 200\n")
    kept = tmp_path / "kept"
    load(path, str(kept))
    snapshot = tmp_path / "snapshot"
    write(tmp_path, "[receiver]\nrecipients = 999\n")
    # Make the old snapshot look current, so that only its owner and mode speak against it.
    stamp = config._stamp(path, os.stat(path))
    config._write_snapshot(str(kept), stamp, {"receiver": {"recipients": 666}})
    assert load(path, str(kept)).receiver.recipients == 666
    kept.rename(snapshot)
    if spoil == "writable":
        snapshot.chmod(0o666)
    elif spoil == "owner":
        os.chown(snapshot, 1234, 1234)
    elif spoil == "garbage":
        snapshot.write_bytes(b"\x00garbage")
    elif spoil == "fifo":
        snapshot.unlink()
        os.mkfifo(snapshot)
    else:
        snapshot.rename(tmp_path / "elsewhere")
        snapshot.symlink_to(tmp_path / "elsewhere")
    assert load(path, str(snapshot)).receiver.recipients == 999


def test_a_place_where_no_snapshot_can_be_kept_costs_nothing_but_time(tmp_path: Path) -> None:
    path = write(tmp_path, "[receiver]\nrecipients = 200\n")
    assert load(path, str(tmp_path / "none" / "snapshot")).receiver.recipients == 200
