from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from support.sandbox import UIDS, Sandbox

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


def test_limits_at_their_bounds_are_good(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[receiver]\npath = 256\ntext_line = 1000\nreceived_lines = 10\nsession_seconds = 60\n"
        "junk_commands = 20\nvrfy = 'networks'\nbare_newlines = 'reject'\n"
        "vrfy_networks = ['192.0.2.1', '10.0.0.0/8', '2001:db8::/32', '::1']\n",
    )
    receiver = load(path, str(tmp_path / "snapshot")).receiver
    assert (receiver.path, receiver.text_line, receiver.vrfy) == (256, 1000, "networks")
    assert receiver.vrfy_networks == ("192.0.2.1", "10.0.0.0/8", "2001:db8::/32", "::1")


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
        ("[delivery]\nmailbox = '{home}/../{user}'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '/var/mail/{user}/..'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '/var/mail/{user}//'\n", "2: delivery.mailbox: must be a path"),
        ("[delivery]\nmailbox = '{user}/mbox'\n", "2: delivery.mailbox: must be a path"),
        ('[delivery]\nmailbox = "/var/\\u0000{user}"\n', "2: delivery.mailbox: must be a path"),
        ('[delivery]\nmailbox = "/var/\\n{user}"\n', "2: delivery.mailbox: must be a path"),
        ("[delivery]\nspool = 'spool'\n", "2: delivery.spool: must be an absolute path"),
        ("[delivery]\nspool = ''\n", "2: delivery.spool: must be an absolute path"),
        ('[delivery]\nspool = "/x\\u0000"\n', "2: delivery.spool: must be an absolute path"),
        ("[delivery]\nlock_seconds = 61\n", "2: delivery.lock_seconds: must be between 1 and 60"),
        ("[receiver]\ncommand_line = 8193\n", "must be between 512 and 8192, not 8193"),
        ("[recipients]\nextension_separator = '++'\n", "extension_separator: must be one mark"),
        ("[recipients]\nextension_separator = 'x'\n", "must be one mark, or empty for none"),
        ("[recipients]\nextension_separator = '@'\n", "must be one mark, or empty for none"),
        ("[receiver]\npath = 255\n", "2: receiver.path: must be between 256 and 8192, not 255"),
        ("[receiver]\ntext_line = 999\n", "2: receiver.text_line: must be 0, for no limit, or at"),
        ("[receiver]\ntext_line = -1\n", "2: receiver.text_line: must be between 0 and"),
        ("[receiver]\nreceived_lines = 9\n", "2: receiver.received_lines: must be between 10 and"),
        ("[receiver]\nbare_newlines = 'keep'\n", "'keep' is not one of accept, reject"),
        ("[receiver]\nstrict_syntax = 'no'\n", "2: receiver.strict_syntax: must be true or false"),
        (
            "[receiver]\nvrfy = 'all'\n",
            "2: receiver.vrfy: 'all' is not one of local, networks, nob",
        ),
        ("[receiver]\nvrfy_networks = ['10.0.0.1/8']\n", "'10.0.0.1/8' is not a network, such as"),
        ("[receiver]\nvrfy_networks = ['home.example']\n", "'home.example' is not a network"),
        ("[receiver]\nvrfy_networks = ['']\n", "2: receiver.vrfy_networks: '' is not a network"),
        ("[receiver]\nsession_seconds = 59\n", "receiver.session_seconds: must be between 60 and"),
        ("[receiver]\njunk_commands = 19\n", "2: receiver.junk_commands: must be between 20 and"),
        (
            "[receiver]\nlocal_domains = ['a', '']\n",
            "2: receiver.local_domains: '' is not a domain",
        ),
        ("[receiver]\nlocal_domains = ['a b']\n", "'a b' is not a domain"),
        ("[receiver]\nlocal_domains = ['[192.0.2.1']\n", "'[192.0.2.1' is not a domain"),
        ("[receiver]\nlocal_domains = ['[]']\n", "'[]' is not a domain"),
        ("[recipients]\npostmaster = ''\n", "2: recipients.postmaster: '' is no name"),
        (
            '[recipients]\npostmaster = "r\\u0000"\n',
            "2: recipients.postmaster: 'r\\x00' is no name",
        ),
        ("[terminal]\ngroup = 'a:b'\n", "2: terminal.group: 'a:b' is no name"),
        ("[recipients]\nuid_min = 60001\n", "2: recipients.uid_min: uid_min must not be above"),
        ("[recipients]\n\nuid_max = 999\n", "3: recipients.uid_max: uid_min must not be above"),
        ("[recipients]\nuid_min = 0\n", "2: recipients.uid_min: must be between 1 and"),
        ("receiver = 1\n", "1: receiver: unknown section"),
        ("[routes]\n'x.y' = 1\n", "must be a text, not 1"),
        ("[outbound]\nvia = 'uucp'\n", "2: outbound.via: 'uucp' is not one of smtp, sendmail"),
        ("[outbound]\nconnections = 0\n", "2: outbound.connections: must be between 1 and"),
        ("[receiver] # us\nhostnam = 'x'\n", "2: receiver.hostnam: unknown key"),
        ("receiver.errors = 1\n", "1: receiver.errors: must be between 5 and"),
        ("[receiver]\nzzz = 1\n", "unknown key; known are hostname, local_domains,"),
        ("[receiver]\nhostname = {a = 1}\n", "must be a text, not a table"),
        ("[receiver]\nhostname = [1]\n", "must be a text, not a list"),
        ("[receiver]\nhostname = 0x1" + "0" * 9000 + "\n", "must be a text, not so large a number"),
        ("[receiver]\nerrors = 0x1" + "0" * 9000 + "\n", "1000000, not so large a number"),
        ("[receiver]\nerrors = 1" + "0" * 9000 + "\n", ""),
        ("[receiver]\nerrors = '" + "x" * 9000 + "'\n", "x..."),
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("# " + "x" * (1 << 20), "larger than 1048576 bytes"),
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


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "host.",
        ".host",
        "a..b",
        "m\\u00fcll.example",
        "a\\r\\nb",
        "x" * 64,
        "x." * 150 + "x",
        "<a>",
        "[1]",
    ],
)
def test_a_host_name_is_one_that_a_reply_can_carry(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f'[receiver]\nhostname = "{name}"\n')
    with pytest.raises(ConfigError, match="is not a host name"):
        load(path, str(tmp_path / "snapshot"))


@pytest.mark.parametrize("name", ["", "mda", "Login-1.my_lab.example.org", "127", "x" * 63])
def test_usual_host_names_are_taken(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f'[receiver]\nhostname = "{name}"\n')
    assert load(path, str(tmp_path / "snapshot")).receiver.hostname == name


def test_domains_and_address_literals_are_local_domains(tmp_path: Path) -> None:
    wanted = ("example.org", "[192.0.2.1]", "[IPv6:2001:db8::1]")
    path = write(tmp_path, f"[receiver]\nlocal_domains = {list(wanted)}\n")
    assert load(path, str(tmp_path / "snapshot")).receiver.local_domains == wanted


def test_a_mailbox_is_never_for_others_and_never_to_be_run() -> None:
    for mode in range(0o10000):
        text = b"[delivery]\nmailbox_mode = 0o%o\n" % mode
        if mode in (0o600, 0o620, 0o640, 0o660):
            assert config._parse("x", text) == {"delivery": {"mailbox_mode": mode}}
        else:
            with pytest.raises(ConfigError, match="must be one of 0o600, 0o620, 0o640, 0o660"):
                config._parse("x", text)


@pytest.mark.parametrize(
    ("mailbox", "mode", "expected"),
    [
        ("/var/mail/{user}", 0o660, 0o660),
        ("/var/mail/{user}", 0o640, 0o640),
        ("/var/mail/{user}.mbox", 0o660, 0o660),
        ("{home}/mbox", 0o660, 0o600),
        ("{home}/Mail/{user}", 0o640, 0o600),
        ("/srv/{user}/mbox", 0o660, 0o600),
    ],
)
def test_only_a_mailbox_in_a_spool_is_for_a_group(mailbox: str, mode: int, expected: int) -> None:
    chosen = Config().with_values("delivery", mailbox=mailbox, mailbox_mode=mode)
    assert config.mailbox_mode_for(chosen) == expected


@pytest.mark.parametrize(("name", "bounds"), sorted(config.RANGES.items()))
def test_a_number_is_taken_within_its_bounds_and_not_beyond(
    tmp_path: Path, name: str, bounds: tuple[int, int]
) -> None:
    section, key = name.split(".")
    # A uid at the bound of one key must suit the other key too.
    other = {"uid_min": f"uid_max = {1 << 31}\n", "uid_max": "uid_min = 1\n"}.get(key, "")
    for value in bounds:
        path = write(tmp_path, f"[{section}]\n{key} = {value}\n{other}")
        loaded = load(path, str(tmp_path / "snapshot"))
        assert getattr(getattr(loaded, section), key) == value
    for value in (bounds[0] - 1, bounds[1] + 1):
        path = write(tmp_path, f"[{section}]\n{key} = {value}\n{other}")
        with pytest.raises(ConfigError, match="must be between"):
            load(path, str(tmp_path / "snapshot"))


def test_every_default_is_a_value_that_the_file_may_have(tmp_path: Path) -> None:
    lines = []
    for section, keys in config.SECTIONS.items():
        lines.append(f"[{section}]")
        for key, value in keys.items():
            shown = list(value) if isinstance(value, tuple) else value
            lines.append(f"{key} = {str(shown).lower() if shown in (True, False) else repr(shown)}")
    loaded = load(write(tmp_path, "\n".join(lines)), str(tmp_path / "snapshot"))
    for section, keys in config.SECTIONS.items():
        for key, value in keys.items():
            assert getattr(getattr(loaded, section), key) == value


@pytest.mark.parametrize("kind", ["directory", "fifo", "null", "loop", "below-a-file", "too-long"])
def test_what_cannot_be_read_is_an_error_and_not_a_traceback(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mda.toml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "null":
        path = Path("/dev/null")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "below-a-file":
        path.touch()
        path = path / "mda.toml"
    else:
        path = tmp_path / ("x" * 300)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        load(str(path), str(tmp_path / "snapshot"))
    assert caught.value.message
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_default_file_may_be_missing_but_not_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mda.toml"
    monkeypatch.setattr(config, "CONFIG_FILE", str(path))
    assert load(str(path)).receiver.recipients == 1000
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no such file"):
        load(str(path))
    path.unlink()
    path.write_text("")
    path.chmod(0)
    os.chmod(tmp_path, 0o755)
    os.seteuid(65_534)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            load(str(path))
    finally:
        os.seteuid(0)


def keep_snapshot(tmp_path: Path) -> tuple[str, str]:
    """A file and a snapshot of it that says something else, so that one tells who was read."""
    path, snapshot = write(tmp_path, "[receiver]\nrecipients = 200\n"), str(tmp_path / "snapshot")
    stamp = config._stamp(path, os.stat(path))
    config._write_snapshot(snapshot, stamp, {"receiver": {"recipients": 666}})
    assert load(path, snapshot).receiver.recipients == 666
    return path, snapshot


def test_a_snapshot_is_stale_when_only_the_change_time_differs(tmp_path: Path) -> None:
    path, snapshot = keep_snapshot(tmp_path)
    before = os.stat(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ctime_ns != before.st_ctime_ns
    assert load(path, snapshot).receiver.recipients == 200


def test_a_snapshot_is_stale_when_only_the_name_of_the_file_differs(tmp_path: Path) -> None:
    path, snapshot = keep_snapshot(tmp_path)
    assert load(path.replace("/mda.toml", "/./mda.toml"), snapshot).receiver.recipients == 200


@pytest.mark.parametrize("which", ["mda", "python"])
def test_a_snapshot_is_stale_when_only_the_version_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    path, snapshot = keep_snapshot(tmp_path)
    if which == "mda":
        monkeypatch.setattr(config, "__version__", "0.0")
    else:
        monkeypatch.setattr(sys, "version", "2.7")
    assert load(path, snapshot).receiver.recipients == 200


@pytest.mark.parametrize("attribute", ["st_dev", "st_ino", "st_size", "st_mtime_ns"])
def test_the_stamp_has_all_that_tells_one_file_from_another(attribute: str) -> None:
    status = os.stat("/")
    assert getattr(status, attribute) in config._stamp("/", status)


def test_only_its_owner_may_even_read_the_snapshot(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        _, snapshot = keep_snapshot(tmp_path)
    finally:
        os.umask(old)
    assert os.stat(snapshot).st_mode & 0o7777 == 0o600


def test_a_directory_where_the_snapshot_should_be_costs_nothing_but_time(tmp_path: Path) -> None:
    path = write(tmp_path, "[receiver]\nrecipients = 200\n")
    (tmp_path / "snapshot").mkdir()
    assert load(path, str(tmp_path / "snapshot")).receiver.recipients == 200
    assert sorted(os.listdir(tmp_path)) == ["mda.toml", "snapshot"]


def test_starts_at_the_same_time_all_read_the_same(tmp_path: Path) -> None:
    path, snapshot = write(tmp_path, "[receiver]\nrecipients = 200\n"), str(tmp_path / "snapshot")
    read: list[int] = []
    threads = [
        threading.Thread(target=lambda: read.append(load(path, snapshot).receiver.recipients))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [200] * 8
    assert sorted(os.listdir(tmp_path)) == ["mda.toml", "snapshot"]


def test_the_names_of_this_host_come_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = os.uname().nodename
    hosts = tmp_path / "hosts"
    hosts.write_text(
        f"#127.0.0.1 {node}.wrong.example {node}\n"
        f"127.0.0.1 localhost # {node} {node}.wrong.example\n"
        f"127.0.1.1 other.example {node}x.wrong.example {node}.Right.example {node} # {node}.w\n"
    )
    (tmp_path / "mailname").write_text("Mail.example \nsecond.example\n")
    monkeypatch.setattr(config, "HOSTS_FILE", str(hosts))
    monkeypatch.setattr(config, "MAILNAME_FILE", str(tmp_path / "mailname"))
    assert config.official_name(Config()) == f"{node}.Right.example"
    full = f"{node}.right.example".lower()
    assert config.local_domains(Config()) == {node.lower(), full, "localhost", "mail.example"}
    monkeypatch.setattr(config, "HOSTS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(config, "MAILNAME_FILE", str(tmp_path / "none"))
    assert config.official_name(Config()) == node
    assert config.local_domains(Config()) == {node.lower(), "localhost"}


def test_the_files_of_names_are_the_ones_that_debian_has() -> None:
    assert (config.HOSTS_FILE, config.MAILNAME_FILE) == ("/etc/hosts", "/etc/mailname")


def test_a_copy_has_other_values_in_one_section_only() -> None:
    before = Config({"receiver": {"errors": 7}, "terminal": {"bell": False}})
    after = before.with_values("receiver", hostname="h")
    assert (after.receiver.errors, after.receiver.hostname) == (7, "h")
    assert after.terminal.bell is False
    assert before.receiver.hostname == ""


# -- what each key does, through the receiver ------------------------------------------


def deliver(sandbox: Sandbox, text: str, *recipients: str, peer: str = "bob") -> list[bytes]:
    """The replies from the first RCPT on."""
    addressed = "".join(f"RCPT TO:<{recipient}>\r\n" for recipient in recipients)
    message = "Subject: x\r\n\r\nhello\r\n.\r\n"
    lines = f"HELO x\r\nMAIL FROM:<b>\r\n{addressed}DATA\r\n{message}QUIT\r\n"
    return sandbox.converse(lines.encode(), peer=peer, config=text)[3:]


def test_hostname_stands_in_greeting_hello_stamp_and_farewell(sandbox: Sandbox) -> None:
    text = '[receiver]\nhostname = "other.example"\n'
    replies = sandbox.converse(b"HELO x\r\nQUIT\r\n", config=text)
    assert [reply.split()[1] for reply in replies[:2]] == [b"other.example"] * 2
    assert replies[2].startswith(b"221 2.0.0 other.example ")
    assert deliver(sandbox, text, "alice@other.example")[0].startswith(b"250")
    assert b"\tby other.example with SMTP id " in (sandbox.mailbox("alice") or b"")


def test_local_domains_take_the_place_of_the_names_that_were_found(sandbox: Sandbox) -> None:
    none = '[outbound]\nvia = "nothing"\n'
    domains = f'{none}[receiver]\nlocal_domains = ["Example.org", "[192.0.2.1]"]\n'
    for domain, before, after in (
        ("example.ORG", b"550 5.7.1", b"250 2.1.5"),
        ("[192.0.2.1]", b"550 5.7.1", b"250 2.1.5"),
        ("localhost", b"250 2.1.5", b"550 5.7.1"),
        ("mda.test", b"250 2.1.5", b"250 2.1.5"),
    ):
        assert deliver(sandbox, none, f"alice@{domain}")[0].startswith(before), domain
        assert deliver(sandbox, domains, f"alice@{domain}")[0].startswith(after), domain


def test_trusted_users_may_name_any_domain(sandbox: Sandbox) -> None:
    far = "alice@far.example"
    assert deliver(sandbox, "", far, peer="postfix")[0].startswith(b"250 2.1.5")
    text = '[receiver]\ntrusted_users = ["bob"]\n'
    assert deliver(sandbox, text, far, peer="postfix")[0].startswith(b"550 5.7.1")
    assert deliver(sandbox, text, far, peer="bob")[0].startswith(b"250 2.1.5")


@pytest.mark.parametrize("longest", [512, 8192])
def test_command_line_is_the_longest_with_its_end(sandbox: Sandbox, longest: int) -> None:
    text = f"[receiver]\ncommand_line = {longest}\n"
    fits = b"NOOP " + b"x" * (longest - 7) + b"\r\n"
    replies = sandbox.converse(fits + fits.replace(b" ", b" x") + b"QUIT\r\n", config=text)
    assert [reply[:9] for reply in replies[1:3]] == [b"250 2.0.0", b"500 5.5.2"]


def test_the_longest_path_of_the_longest_command_line_is_delivered(sandbox: Sandbox) -> None:
    route = b",".join([b"@" + b"h" * 60 + b".example"] * 115)
    envelope = b"MAIL FROM:<%b:b@c>\r\nRCPT TO:<%b:alice>\r\n"
    lines = b"HELO x\r\n" + envelope + b"DATA\r\n\r\nhello\r\n.\r\nQUIT\r\n"
    assert 8000 < len(route) < 8150
    replies = sandbox.converse(
        lines % (route, route), config="[receiver]\ncommand_line = 8192\npath = 8192\n"
    )
    assert replies[-2].startswith(b"250 2.0.0 Delivered"), replies
    assert (sandbox.mailbox("alice") or b"").startswith(b"From ")


def test_uid_min_and_uid_max_say_who_has_mail(sandbox: Sandbox) -> None:
    text = "[recipients]\nuid_min = 1002\nuid_max = 1002\n"
    replies = deliver(sandbox, text, "alice", "bob", "carol")
    assert [reply[:3] for reply in replies[:3]] == [b"550", b"250", b"550"]
    assert deliver(sandbox, "", "mda")[0].startswith(b"550 5.1.1")
    text = "[recipients]\nuid_min = 1\nuid_max = 999\n"
    assert deliver(sandbox, text, "mda")[0].startswith(b"250 2.1.5")


def test_postmaster_is_who_the_configuration_says(sandbox: Sandbox) -> None:
    text = '[recipients]\npostmaster = "carol"\n'
    assert deliver(sandbox, text, "PostMaster@mda.test")[2].startswith(b"250 2.0.0")
    assert sandbox.mailbox("root") is None
    assert sandbox.mailbox("carol") is not None
    text = '[recipients]\npostmaster = "missing"\n'
    assert deliver(sandbox, text, "postmaster")[0].startswith(b"451 4.3.5")


def mailbox_state(sandbox: Sandbox, path: str) -> list[str]:
    """Mode, owner and group of a file inside, and how often it has our text."""
    state = sandbox.run(["stat", "-c", "%a %u %g", path]).stdout.decode().split()
    return [*state, sandbox.run(["grep", "-c", "^hello$", path]).stdout.decode().strip()]


def test_a_mailbox_in_a_home_is_the_users_and_nobody_elses(sandbox: Sandbox) -> None:
    alice = str(UIDS["alice"])
    try:
        text = '[delivery]\nmailbox = "{home}/in-{user}"\n'
        assert deliver(sandbox, text, "alice")[2].startswith(b"250 2.0.0")
        assert mailbox_state(sandbox, "/home/alice/in-alice") == ["600", alice, alice, "1"]
        assert sandbox.mailbox("alice") is None
        text += "mailbox_mode = 0o640\n"
        sandbox.run(["rm", "/home/alice/in-alice"])
        assert deliver(sandbox, text, "alice")[2].startswith(b"250 2.0.0")
        assert mailbox_state(sandbox, "/home/alice/in-alice") == ["600", alice, alice, "1"]
    finally:
        sandbox.run(["rm", "-f", "/home/alice/in-alice"])


@pytest.mark.parametrize("mode", ["600", "620", "640", "660"])
def test_a_mailbox_in_the_spool_has_the_mode_that_was_asked_for(
    sandbox: Sandbox, mode: str
) -> None:
    text = f"[delivery]\nmailbox_mode = 0o{mode}\n"
    assert deliver(sandbox, text, "alice")[2].startswith(b"250 2.0.0")
    state = [mode, str(UIDS["alice"]), "8", "1"]
    assert mailbox_state(sandbox, "/var/mail/alice") == state


def test_a_mailbox_that_exists_keeps_its_mode(sandbox: Sandbox) -> None:
    mailbox = sandbox.root / "mail/alice"
    mailbox.touch()
    os.chown(mailbox, UIDS["alice"], 8)
    mailbox.chmod(0o600)
    assert deliver(sandbox, "", "alice")[2].startswith(b"250 2.0.0")
    assert mailbox.stat().st_mode & 0o7777 == 0o600


def test_lock_seconds_are_for_all_recipients_together(sandbox: Sandbox) -> None:
    with contextlib.ExitStack() as held:
        for user in ("alice", "carol"):
            mailbox = sandbox.root / "mail" / user
            mailbox.touch()
            os.chown(mailbox, UIDS[user], 8)
            fcntl.lockf(held.enter_context(mailbox.open("r+b")), fcntl.LOCK_EX)
        begin = time.monotonic()
        replies = deliver(sandbox, "[delivery]\nlock_seconds = 1\n", "alice", "carol")
        took = time.monotonic() - begin
    assert replies[3].startswith(b"451 4."), replies
    assert 1.0 <= took < 1.9
    assert (sandbox.mailbox("alice"), sandbox.mailbox("carol")) == (b"", b"")
    assert sorted(os.listdir(sandbox.root / "mail")) == ["alice", "carol"]


def test_flock_of_another_program_is_in_the_way_only_where_it_is_asked_for(
    sandbox: Sandbox,
) -> None:
    mailbox = sandbox.root / "mail/alice"
    mailbox.touch()
    os.chown(mailbox, UIDS["alice"], 8)
    with mailbox.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        replies = deliver(sandbox, "[delivery]\nlock_seconds = 1\nflock = true\n", "alice")
        assert replies[2].startswith(b"451 4.2.0 Mailbox is locked (alice (flock), PID "), replies
        assert deliver(sandbox, "[delivery]\nlock_seconds = 1\n", "alice")[2].startswith(b"250 ")
