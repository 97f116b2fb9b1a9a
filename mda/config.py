"""The configuration: TOML, read once, frozen; every key has a default that is safe.

`tomllib` costs more than the rest of the start together, so what was parsed is kept as a
snapshot in /run/mda and used as long as the file is the same (design, decisions 10, 11).
"""

from __future__ import annotations

import marshal
import os
import stat
import sys

from mda import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

CONFIG_FILE = "/etc/mda/mda.toml"
RUN_DIRECTORY = "/run/mda"
SNAPSHOT = RUN_DIRECTORY + "/config"
# Who owns what waits on disk, and hands us again what has failed here before.
SPOOL_USER = "mda"
SMTP_SOCKET = RUN_DIRECTORY + "/smtp.sock"
LMTP_SOCKET = RUN_DIRECTORY + "/lmtp.sock"
HOSTS_FILE = "/etc/hosts"
MAILNAME_FILE = "/etc/mailname"

_LARGEST_FILE = 1 << 20
_LONGEST_VALUE = 100  # characters of a wrong value in a message


class ConfigError(Exception):
    """The configuration is wrong; names the file, the line (0 if none) and the key."""

    def __init__(self, file: str, line: int, key: str, message: str) -> None:
        super().__init__(file, line, key, message)
        self.file = file
        self.line = line
        self.key = key
        self.message = message

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class Section:
    """One table of the file: a class attribute is a key and its default."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: the configuration is frozen")


class Receiver(Section):
    """`[receiver]`: who we are and what one connection may use."""

    hostname: str = ""
    local_domains: tuple[str, ...] = ()
    trusted_users: tuple[str, ...] = ("postfix", "Debian-exim", "opensmtpd", "smtpd", "_smtpd")
    message_size: int = 52_428_800
    command_line: int = 2048
    path: int = 1000
    text_line: int = 0
    recipients: int = 1000
    received_lines: int = 100
    strict_syntax: bool = False
    bare_newlines: str = "accept"
    vrfy: str = "local"
    vrfy_networks: tuple[str, ...] = ()
    vrfy_names: bool = False
    tls_certificate: str = ""
    tls_key: str = ""
    starttls_required: tuple[str, ...] = ()
    relay_networks: tuple[str, ...] = ()
    relay_users: tuple[str, ...] = ()
    proxy_peers: tuple[str, ...] = ()
    xclient_peers: tuple[str, ...] = ()
    turn_peers: tuple[str, ...] = ()
    idle_seconds: int = 300
    session_seconds: int = 14_400
    errors: int = 50
    junk_commands: int = 100
    connections_per_user: int = 20
    connections: int = 400


class Recipients(Section):
    """`[recipients]`: which accounts are persons, and what steers their mail."""

    uid_min: int = 1000
    uid_max: int = 60_000
    postmaster: str = "root"
    extension_separator: str = "+"
    aliases: str = "/etc/aliases"
    forward: bool = True
    mta_expands: bool = True
    forwarding: str = "accept"
    tell_forwarding: str = "names"


class Delivery(Section):
    """`[delivery]`: the mailboxes and their locks."""

    mailbox: str = "/var/mail/{user}"
    mailbox_mode: int = 0o660
    lock_seconds: int = 60
    flock: bool = False
    spool: str = "/var/spool/mda"
    memory: int = 1_048_576
    quota_size: int = 0
    quota_messages: int = 0
    quota_defers: bool = False
    alias_user: str = "nobody"
    commands: bool = False
    command_seconds: int = 300


class TerminalSection(Section):
    """`[terminal]`: SEND, SOML and SAML."""

    enabled: bool = True
    peers: tuple[str, ...] = ("local", "loopback")
    networks: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    group: str = "tty"
    choose: str = "newest"
    scan: bool = False
    scan_minutes: int = 10
    hide: bool = False
    sender_rate: int = 40
    recipient_rate: int = 80
    lines: int = 20
    bytes: int = 4096
    bell: bool = True
    wait_milliseconds: int = 200
    keep: int = 131_072


class Outbound(Section):
    """`[outbound]`: mail for other hosts, and what waits in the queue."""

    via: str = "smtp"
    smarthost: str = ""
    retry_minutes: int = 5
    retry_most_minutes: int = 240
    delay_notice_hours: int = 4
    give_up_hours: int = 120
    connections: int = 20
    connections_per_hop: int = 5
    keep_free: int = 104_857_600


class Relay(Section):
    """`[relay]`: mail that comes to us and is for other hosts."""

    source_routes: str = "ignore"


class Routes(Section):
    """`[routes]`: a domain, ".domain" for all below it or "*", and its next hop."""


class Forward(Section):
    """`[forward]`: a name of this host, and the mailbox elsewhere that it has now."""


class Config:
    """The whole file, frozen; `SECTIONS` names its tables."""

    __slots__ = (
        "delivery",
        "forward",
        "outbound",
        "receiver",
        "recipients",
        "relay",
        "routes",
        "terminal",
    )

    def __init__(self, tables: dict[str, dict[str, Any]] | None = None) -> None:
        tables = tables or {}
        self.receiver = Receiver(tables.get("receiver", {}))
        self.recipients = Recipients(tables.get("recipients", {}))
        self.delivery = Delivery(tables.get("delivery", {}))
        self.terminal = TerminalSection(tables.get("terminal", {}))
        self.outbound = Outbound(tables.get("outbound", {}))
        self.relay = Relay(tables.get("relay", {}))
        self.routes = Routes(tables.get("routes", {}))
        self.forward = Forward(tables.get("forward", {}))

    def with_values(self, section: str, **values: Any) -> Config:
        """A copy with other values in one section, for a user's own receiver."""
        tables = {name: dict(vars(getattr(self, name))) for name in self.__slots__}
        tables[section].update(values)
        return Config(tables)


def _defaults(section: type[Section]) -> dict[str, Any]:
    return {key: getattr(section, key) for key in section.__annotations__}


SECTIONS: dict[str, dict[str, Any]] = {
    "receiver": _defaults(Receiver),
    "recipients": _defaults(Recipients),
    "delivery": _defaults(Delivery),
    "terminal": _defaults(TerminalSection),
    "outbound": _defaults(Outbound),
    "relay": _defaults(Relay),
    "routes": {},
    "forward": {},
}
# Whose keys are names that the administrator chooses; the values are texts.
OPEN_SECTIONS = ("routes", "forward")

# What a value must be beyond its type: (smallest, largest) for numbers.
RANGES: dict[str, tuple[int, int]] = {
    "receiver.message_size": (65_536, 1 << 40),
    "receiver.command_line": (512, 8192),
    "receiver.path": (256, 8192),
    "receiver.text_line": (0, 1 << 40),
    "receiver.recipients": (100, 100_000),
    "receiver.received_lines": (10, 10_000),
    "receiver.idle_seconds": (10, 86_400),
    "receiver.session_seconds": (60, 604_800),
    "receiver.errors": (5, 1_000_000),
    "receiver.junk_commands": (20, 1_000_000),
    "receiver.connections_per_user": (1, 256),
    "receiver.connections": (1, 100_000),
    "recipients.uid_min": (1, 1 << 31),
    "recipients.uid_max": (1, 1 << 31),
    "delivery.lock_seconds": (1, 60),
    "delivery.memory": (0, 1 << 30),
    "delivery.quota_size": (0, 1 << 50),
    "delivery.quota_messages": (0, 1 << 40),
    "delivery.command_seconds": (1, 400),
    "terminal.lines": (1, 60),
    "terminal.bytes": (256, 8192),
    "terminal.scan_minutes": (1, 1440),
    "terminal.sender_rate": (1, 10_000),
    "terminal.recipient_rate": (1, 10_000),
    "terminal.wait_milliseconds": (0, 5000),
    "terminal.keep": (0, 1 << 24),
    "outbound.retry_minutes": (1, 1440),
    "outbound.retry_most_minutes": (1, 10_080),
    "outbound.delay_notice_hours": (0, 1000),
    "outbound.give_up_hours": (1, 1000),
    "outbound.connections": (1, 200),
    "outbound.keep_free": (0, 1 << 50),
    "outbound.connections_per_hop": (1, 200),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "receiver.bare_newlines": ("accept", "reject"),
    "receiver.vrfy": ("local", "networks", "nobody"),
    "terminal.peers": ("local", "loopback", "networks", "all"),
    "terminal.choose": ("newest", "all"),
    "recipients.forwarding": ("accept", "refuse"),
    "recipients.tell_forwarding": ("names", "everybody", "nobody"),
    "outbound.via": ("smtp", "sendmail", "nothing"),
    "relay.source_routes": ("ignore", "honour"),
}
# Whose items are networks.
NETWORKS = (
    "receiver.vrfy_networks",
    "receiver.relay_networks",
    "receiver.proxy_peers",
    "receiver.xclient_peers",
    "terminal.networks",
)
# Others may do nothing with a mailbox, and nobody may run it.
MAILBOX_MODES = (0o600, 0o620, 0o640, 0o660)


def load(path: str = CONFIG_FILE, snapshot: str = SNAPSHOT) -> Config:
    """Read `path`; a missing default file means the defaults, a missing named one an error.

    Raises ConfigError for anything that cannot be read or is not understood.
    """
    try:
        tables = _read(path, snapshot)
    except FileNotFoundError:
        # A link to a file that is missing is not a file that nobody has written.
        if path == CONFIG_FILE and not os.path.lexists(path):
            return Config()
        raise ConfigError(path, 0, "", "no such file") from None
    except OSError as error:
        raise ConfigError(path, 0, "", error.strerror or "cannot be read") from error
    return Config(tables)


def _read(path: str, snapshot: str) -> dict[str, dict[str, Any]]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(path, 0, "", "not a regular file")
        stamp = _stamp(path, status)
        tables = _read_snapshot(snapshot, stamp)
        if tables is None:
            tables = _parse(path, _read_text(path, fd))
            _write_snapshot(snapshot, stamp, tables)
        return tables
    finally:
        os.close(fd)


def _read_text(path: str, fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        text = file.read(_LARGEST_FILE + 1)
    if len(text) > _LARGEST_FILE:
        raise ConfigError(path, 0, "", f"larger than {_LARGEST_FILE} bytes")
    return text


def _stamp(path: str, status: os.stat_result) -> tuple[object, ...]:
    return (
        __version__,
        sys.version,
        path,
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _read_snapshot(snapshot: str, stamp: tuple[object, ...]) -> dict[str, dict[str, Any]] | None:
    """The tables that were parsed from the very same file, or None."""
    try:
        fd = os.open(snapshot, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # marshal believes what it reads, so only a file that nobody else can write counts.
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        with open(fd, "rb", closefd=False) as file:
            kept_stamp, tables = marshal.loads(file.read())  # noqa: S302 (ours alone, see above)
    except (OSError, ValueError, EOFError, TypeError):
        return None
    finally:
        os.close(fd)
    return tables if kept_stamp == stamp else None


def _write_snapshot(
    snapshot: str, stamp: tuple[object, ...], tables: dict[str, dict[str, Any]]
) -> None:
    """Keep the parsed tables for the next start; without /run/mda there is none to keep."""
    fresh = f"{snapshot}.{os.getpid()}"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        with open(fd, "wb") as file:
            marshal.dump((stamp, tables), file)  # type: ignore[arg-type]
        os.rename(fresh, snapshot)
    except OSError:
        os.unlink(fresh)


def _parse(path: str, text: bytes) -> dict[str, dict[str, Any]]:
    import tomllib  # here, since it costs 17 ms that a snapshot spares

    try:
        document = tomllib.loads(text.decode("utf-8"))
    except ValueError as error:  # not TOML, not UTF-8, or a number with too many digits
        raise ConfigError(path, _line_in_message(str(error)), "", str(error)) from error
    except RecursionError as error:
        raise ConfigError(path, 0, "", "nested too deeply") from error
    for name, table in document.items():
        if name not in SECTIONS or not isinstance(table, dict):
            _reject(path, text, name, "", f"unknown section{_nearest(name, SECTIONS)}")
        for key in table:
            if name not in OPEN_SECTIONS and key not in SECTIONS[name]:
                _reject(path, text, name, key, f"unknown key{_nearest(key, SECTIONS[name])}")
    return _check(path, text, document)


def _check(
    path: str, text: bytes, document: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The values of known keys as a `Config` has them, or ConfigError."""
    tables: dict[str, dict[str, Any]] = {}
    for name, table in document.items():
        tables[name] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        for key, value in tables[name].items():
            if complaint := _judge(name, key, value):
                _reject(path, text, name, key, complaint)
    own = tables.get("recipients", {})
    persons = SECTIONS["recipients"] | own
    if persons["uid_min"] > persons["uid_max"]:
        key = next(key for key in ("uid_min", "uid_max") if key in own)
        _reject(path, text, "recipients", key, "uid_min must not be above uid_max")
    return tables


def _judge(section: str, key: str, value: object) -> str:
    """What is wrong with a value, "" if nothing is."""
    name = f"{section}.{key}"
    kind = type(SECTIONS[section].get(key, ""))
    if type(value) is not kind:
        return f"must be {_KINDS[kind]}, not {_show(value)}"
    if isinstance(value, tuple):
        return next(filter(None, (_judge_item(name, item) for item in value)), "")
    if isinstance(value, int) and name in RANGES:
        low, high = RANGES[name]
        if not low <= value <= high:
            return f"must be between {low} and {high}, not {_show(value)}"
    if isinstance(value, str) and name in CHOICES:
        return _judge_item(name, value)
    if section == "forward":
        return _judge_moved(value)
    return _JUDGES[name](value) if name in _JUDGES else ""


def _judge_item(name: str, item: object) -> str:
    choices = CHOICES.get(name)
    if not isinstance(item, str):
        return f"{_show(item)} is not a text"
    if choices and item not in choices:
        return f"{_show(item)} is not one of {', '.join(choices)}"
    if name == "receiver.local_domains" and not (_is_host_name(item) or _is_literal(item)):
        return f"{_show(item)} is not a domain"
    if name in NETWORKS and not is_network(item):
        return f"{_show(item)} is not a network, such as 192.0.2.0/24"
    if name == "receiver.starttls_required" and not (item.isdigit() and 0 < int(item) < 65_536):
        return f"{_show(item)} is not a port, such as 25"
    if name in ("terminal.never", "receiver.relay_users"):
        return _judge_account(item)
    if name == "receiver.turn_peers" and not _is_turn_peer(item):
        return f"{_show(item)} is not a channel and a host, such as 'user:vax vax.example.org'"
    return ""


def _is_turn_peer(item: str) -> bool:
    """`pipe`, `user:NAME` or the path of a serial line, then the name of the host behind it."""
    channel, _, host = item.partition(" ")
    is_user = channel.startswith("user:") and not _judge_account(channel.removeprefix("user:"))
    is_line = channel.startswith("/dev/") and ".." not in channel.split("/")
    return (channel == "pipe" or is_user or is_line) and _is_host_name(host)


def is_network(text: str) -> bool:
    """An address, or a network with the length of its prefix."""
    import ipaddress  # only where the file names a network

    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    tuple: "a list of texts",
}


def _show(value: object) -> str:
    """A wrong value for a message: what is long or nested would not help anybody."""
    if isinstance(value, (tuple, list, dict)):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return "so large a number"
    shown = ascii(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."


def _is_host_name(name: str) -> bool:
    """Labels of letters, digits, - and _, with dots between them."""
    is_plain = name.isascii() and name.replace(".", "").replace("-", "").replace("_", "").isalnum()
    return is_plain and len(name) <= 255 and all(0 < len(label) < 64 for label in name.split("."))


def _is_literal(name: str) -> bool:
    """An address literal by its looks: "[192.0.2.1]", "[IPv6:2001:db8::1]"."""
    inner = name.removeprefix("[").removesuffix("]")
    is_plain = inner.isascii() and inner.replace(".", "").replace(":", "").isalnum()
    return is_plain and name == f"[{inner}]"


def _judge_host_name(name: Any) -> str:
    return "" if not name or _is_host_name(name) else f"{_show(name)} is not a host name"


def _judge_separator(separator: Any) -> str:
    is_good = len(separator) <= 1 and separator not in ("@", "/", " ", '"', "\\")
    is_good = is_good and not separator.isalnum() and separator.isprintable()
    return "" if is_good and separator.isascii() else "must be one mark, or empty for none"


def _judge_account(name: Any) -> str:
    is_plain = bool(name) and name.isprintable() and not set(name) & set(":/")
    return "" if is_plain else f"{_show(name)} is no name in the account database"


def _judge_mode(mode: Any) -> str:
    allowed = ", ".join(f"0o{each:o}" for each in MAILBOX_MODES)
    return "" if mode in MAILBOX_MODES else f"must be one of {allowed}"


def _judge_text_line(octets: Any) -> str:
    return "" if octets == 0 or octets >= 1000 else "must be 0, for no limit, or at least 1000"


def _judge_keep(octets: Any) -> str:
    return "" if octets == 0 or octets >= 16_384 else "must be 0, for nothing, or at least 16384"


def _judge_directory(path: Any) -> str:
    return "" if path.startswith("/") and path.isprintable() else "must be an absolute path"


def _judge_path(path: Any) -> str:
    return _judge_directory(path) if path else ""


def _judge_alias_user(name: Any) -> str:
    return "must not be root" if name == "root" else _judge_account(name)


def _judge_moved(value: Any) -> str:
    mailbox = value.removeprefix("551 ")
    local_part, _, domain = mailbox.rpartition("@")
    is_plain = value.isprintable() and not set(mailbox) & set(" <>") and len(mailbox) <= 320
    return "" if local_part and domain and is_plain else "must be a mailbox, as in user@example.org"


def _judge_template(template: Any) -> str:
    rest = template.replace("{user}", "").replace("{home}", "")
    is_path = (
        template.startswith(("/", "{home}/"))
        and template.isprintable()
        and not template.endswith("//")
        and ".." not in template.split("/")
    )
    if not is_path or "{" in rest or "}" in rest:
        return "must be a path with {user} or {home} in it"
    return "would be one mailbox for everybody" if rest == template else ""


_JUDGES: dict[str, Callable[[Any], str]] = {
    "receiver.hostname": _judge_host_name,
    "receiver.text_line": _judge_text_line,
    "receiver.tls_certificate": _judge_path,
    "receiver.tls_key": _judge_path,
    "recipients.postmaster": _judge_account,
    "recipients.extension_separator": _judge_separator,
    "delivery.mailbox": _judge_template,
    "delivery.mailbox_mode": _judge_mode,
    "recipients.aliases": _judge_path,
    "delivery.spool": _judge_directory,
    "delivery.alias_user": _judge_alias_user,
    "terminal.group": _judge_account,
    "terminal.keep": _judge_keep,
}


def _reject(path: str, text: bytes, section: str, key: str, message: str) -> NoReturn:
    name = f"{section}.{key}" if key else section
    raise ConfigError(path, _line_of(text, section, key), name, message)


def _nearest(name: str, known: dict[str, Any]) -> str:
    import difflib  # only where the start has failed anyway

    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _line_of(text: bytes, section: str, key: str) -> int:
    """The line (from 1) on which `key` of `section` stands, as far as plain looking shows."""
    inside = False
    for number, line in enumerate(text.decode("utf-8", "replace").split("\n"), 1):
        words = line.strip()
        if words.startswith("["):
            inside = words.partition("]")[0].strip("[ ") == section
            if inside and not key:
                return number
        elif (inside and words.split("=")[0].strip(" \"'") == key) or (
            words.split("=")[0].strip() == (f"{section}.{key}" if key else section)
        ):
            return number
    return 0


def _line_in_message(message: str) -> int:
    words = message.replace(",", " ").split()
    if "line" in words[:-1]:
        number = words[words.index("line") + 1]
        return int(number) if number.isdigit() else 0
    return 0


def mailbox_mode_for(config: Config) -> int:
    """The mode of a new mailbox: for nobody but the user, where that is not a spool.

    A mailbox outside of a common directory gets the user's own group, which on many hosts
    is everybody's.
    """
    mode = config.delivery.mailbox_mode
    return mode & 0o600 if "{" in mailbox_folder(config) else mode


def largest_text(config: Config) -> int:
    """The most bytes that a message can have as it is kept: quoting at most doubles it."""
    return 2 * config.receiver.message_size + 1_048_576


def queue_directory(config: Config) -> str:
    """Where messages wait for their next try."""
    return os.path.join(config.delivery.spool, "queue")


def is_maildir(config: Config) -> bool:
    """Mailboxes are Maildirs: their template ends in a slash, as in Postfix and procmail."""
    return config.delivery.mailbox.endswith("/")


def mailbox_folder(config: Config) -> str:
    """The directory that a mailbox is created in; not filled in, it may hold {user}."""
    return os.path.dirname(config.delivery.mailbox.rstrip("/"))


def official_name(config: Config) -> str:
    """Our name for greeting, HELO's answer and time stamps (RFC 821 3.7), without DNS."""
    return config.receiver.hostname or _full_name(os.uname().nodename)


def local_domains(config: Config) -> frozenset[str]:
    """The domains whose mailboxes are ours, in lower case (design, decision 8)."""
    if config.receiver.local_domains:
        return frozenset(domain.lower() for domain in config.receiver.local_domains)
    node = os.uname().nodename
    names = {
        node,
        _full_name(node),
        "localhost",
        _read_start(MAILNAME_FILE).split("\n")[0].strip(),
    }
    return frozenset(name.lower() for name in names if name)


def own_domains(config: Config) -> frozenset[str]:
    """The local domains and our official name, in lower case: what mail for us may have."""
    return local_domains(config) | {official_name(config).lower()}


def _full_name(node: str) -> str:
    """The name with a dot that /etc/hosts gives beside `node`, else `node` itself."""
    for line in _read_start(HOSTS_FILE).split("\n"):
        names = line.split("#")[0].split()[1:]
        if node in names:
            return next((name for name in names if name.startswith(node + ".")), node)
    return node


def _read_start(path: str) -> str:
    """The beginning of a file, "" if it cannot be read; decoded without loading a codec."""
    try:
        with open(path, "rb") as file:
            return file.read(65_536).decode("ascii", "replace")
    except OSError:
        return ""
