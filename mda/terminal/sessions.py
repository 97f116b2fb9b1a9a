"""Who is logged in, and on which terminals: three ways, merged (design, decision 6).

What is said here is only a list of candidates. utmp may be stale or forged, logind does
not know every terminal, a user names his own processes: whether a candidate is really the
user's terminal is decided in `tty`, on the device.
"""

from __future__ import annotations

import os
import pwd
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterable

PROC = "/proc"
PTS = "/dev/pts"
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
UTMP = ("/run/utmp", "/var/run/utmp")
LOGIND = "/run/systemd/seats"

EVERYBODY = -1

# A user may have any number of processes and, below user@UID.service, of cgroups.
MAX_PROCESSES = 4096
MAX_CGROUPS = 1024
MAX_ANCESTORS = 64

_PTS_MAJORS = range(136, 144)
_CONSOLE_MAJOR = 4
_CONSOLES = range(1, 64)
_LOGIN_CLASSES = ("user", "user-early", "user-light", "user-early-light")
_GRAPHICAL_TYPES = ("x11", "wayland", "mir")
_PROMPTS = (b"agetty", b"getty", b"login", b"sulogin")
_MULTIPLEXERS = {
    b"tmux": "tmux",
    b"tmux: client": "tmux",
    b"tmux: server": "tmux",
    b"screen": "screen",
    b"SCREEN": "screen",
}


class Terminal:
    """One terminal of a user: `device` as in "/dev/pts/3".

    `is_outer` says that its foreground process is a tmux or screen client: text written
    there is overdrawn, so a pane is to be preferred.
    """

    __slots__ = ("device", "is_outer")

    def __init__(self, device: str, is_outer: bool = False) -> None:
        self.device = device
        self.is_outer = is_outer

    def __repr__(self) -> str:
        return f"Terminal({self.device!r}, {self.is_outer!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Terminal) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


class Logins:
    """What was found out about one user.

    `is_available` is False where none of the three ways could be asked: then an empty list
    does not mean "not logged in".
    """

    __slots__ = ("is_available", "terminals")

    def __init__(self, terminals: list[Terminal], is_available: bool) -> None:
        self.terminals = terminals
        self.is_available = is_available


class Session:
    """One session as logind knows it; `tty` is "" where logind was told of none."""

    __slots__ = ("kind", "session_class", "tty", "uid")

    def __init__(self, uid: int, tty: str, session_class: str, kind: str) -> None:
        self.uid = uid
        self.tty = tty
        self.session_class = session_class
        self.kind = kind


class Process:
    """What /proc/PID/stat says: `tty` is its controlling terminal's device, "" if none.

    `foreground` is the process group that `tty` takes its input for.
    """

    __slots__ = ("comm", "foreground", "group", "parent", "tty")

    def __init__(self, comm: bytes, parent: int, group: int, tty: str, foreground: int) -> None:
        self.comm = comm
        self.parent = parent
        self.group = group
        self.tty = tty
        self.foreground = foreground


def find_terminals(uid: int, idle_at_most: float = 0) -> Logins:
    """The terminals of `uid`: those where text will be seen first, outer ones last.

    On a host with none of the three ways the devices themselves are asked, if
    `idle_at_most` says for how many seconds somebody may have typed nothing there.
    """
    processes = list_processes(uid)
    pids = None if processes is None else processes.get(uid, [])
    found = _merge(uid, read_utmp(), read_logind(uid), pids)
    if found.is_available or not idle_at_most:
        return found
    return scan_devices(uid, idle_at_most)


def scan_devices(uid: int, idle_at_most: float) -> Logins:
    """The pseudo-terminals that `uid` owns and has typed at within so many seconds.

    One that no login stands behind (script(1), a container's) is among them, hence the
    bound: nobody types at those.
    """
    try:
        names = sorted(os.listdir(PTS))
    except OSError:
        return Logins([], is_available=False)
    latest = time.time() - idle_at_most
    found = []
    for name in names:
        device = name_line(f"pts/{name}")
        try:
            status = os.stat(f"{PTS}/{name}", follow_symlinks=False)
        except FileNotFoundError:
            continue  # hung up just now
        if device and status.st_uid == uid and status.st_atime >= latest:
            found.append(Terminal(device))
    return Logins(found, is_available=True)


def list_logins() -> tuple[list[tuple[int, Terminal]], bool]:
    """Everybody's terminals as (uid, terminal), and whether that could be found out."""
    records, sessions, processes = read_utmp(), read_logind(), list_processes()
    uids = {look_up_uid(name) for name, line in records or [] if name_line(line)}
    uids.update(session.uid for session in sessions or [])
    uids.update(processes or {})
    found = []
    for uid in sorted(uids - {EVERYBODY}):
        pids = None if processes is None else processes.get(uid, [])
        found += [(uid, terminal) for terminal in _merge(uid, records, sessions, pids).terminals]
    return found, any(way is not None for way in (records, sessions, processes))


def _merge(
    uid: int,
    records: list[tuple[str, str]] | None,
    sessions: list[Session] | None,
    pids: list[int] | None,
) -> Logins:
    """Bring together what the three ways said; None stands for a way that is missing here."""
    own = [session for session in sessions or [] if session.uid == uid]
    is_available = any(way is not None for way in (records, sessions, pids))
    # Somebody is logged in and it is not known where: sshd tells logind of no terminal.
    if pids is None and any(not s.tty and s.session_class in _LOGIN_CLASSES for s in own):
        is_available = False
    processes = read_processes(pids or [])
    devices = {process.tty for process in processes.values()}
    devices |= {name_line(s.tty) for s in own if s.session_class in _LOGIN_CLASSES}
    devices |= _find_records(uid, records or [])
    devices -= {name_line(s.tty) for s in own if s.kind in _GRAPHICAL_TYPES}
    terminals = _arrange(devices - {""}, processes)
    return Logins(terminals, is_available or bool(terminals))


def _find_records(uid: int, records: list[tuple[str, str]]) -> set[str]:
    """The devices that records give to a name of `uid`'s.

    A uid may have several names, but with hundreds logged in not every name of a record
    can be looked up: only those on a device that is `uid`'s now.
    """
    own_name = _name_of(uid)
    devices = set()
    for name, line in records:
        device = name_line(line)
        if device and (name == own_name or (owns(uid, device) and look_up_uid(name) == uid)):
            devices.add(device)
    return devices


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def owns(uid: int, device: str) -> bool:
    """Is the device `uid`'s now?"""
    try:
        return os.stat(device, follow_symlinks=False).st_uid == uid
    except OSError:
        return False


def _arrange(devices: set[str], processes: dict[int, Process]) -> list[Terminal]:
    """Order `devices` by where text is seen, without the panes that nobody looks at.

    A pane of tmux or screen is looked at only through a client; without any client of
    its kind on one of the user's terminals its server is detached.
    """
    users: dict[str, list[Process]] = {device: [] for device in devices}
    for process in processes.values():
        if process.tty in users:
            users[process.tty].append(process)
    clients = {device: _find_client(users[device], processes) for device in devices}
    attached = {"", *clients.values()}
    terminals = [
        Terminal(device, is_outer=bool(clients[device]))
        for device in sorted(devices)
        if _find_server(users[device], processes) in attached
    ]
    return sorted(terminals, key=lambda terminal: terminal.is_outer)


def _find_client(users: Iterable[Process], processes: dict[int, Process]) -> str:
    """Which multiplexer's client the foreground process group of a terminal is, or ""."""
    # Any member will do: a client started from a login script is not its group's leader.
    leaders = set()
    for process in users:
        if process.group == process.foreground and process.comm in _MULTIPLEXERS:
            return _MULTIPLEXERS[process.comm]
        leaders.add(process.foreground)
    for pid in leaders - set(processes):
        leader = read_process(pid)
        if leader and leader.comm in _MULTIPLEXERS:
            return _MULTIPLEXERS[leader.comm]
    return ""


def _find_server(users: Iterable[Process], processes: dict[int, Process]) -> str:
    """Which multiplexer's server the processes on a terminal hang under, or ""."""
    for process in users:
        ancestor = processes.get(process.parent)
        for _ in range(MAX_ANCESTORS):
            if ancestor is None:
                break
            if ancestor.comm in _MULTIPLEXERS:
                return _MULTIPLEXERS[ancestor.comm]
            ancestor = processes.get(ancestor.parent)
    return ""


def name_line(line: str) -> str:
    """The device that a record's terminal name stands for, "" unless pts/N or ttyN.

    One device has one name here, so names can be compared for device numbers.
    """
    line = line.removeprefix("/dev/")
    prefix = "pts/" if line.startswith("pts/") else "tty"
    digits = line.removeprefix(prefix)
    if digits == line or not (digits.isascii() and digits.isdecimal()) or len(digits) > 7:
        return ""
    number = int(digits)
    if str(number) != digits or (prefix == "tty" and number not in _CONSOLES):
        return ""
    return f"/dev/{prefix}{number}"


def name_device(number: int) -> str:
    """The device of a device number (tty_nr in proc(5)), "" unless pts or virtual console."""
    major, minor = os.major(number), os.minor(number)
    if major in _PTS_MAJORS:
        return f"/dev/pts/{(major - _PTS_MAJORS.start) * 256 + minor}"
    if major == _CONSOLE_MAJOR and minor in _CONSOLES:
        return f"/dev/tty{minor}"
    return ""


def look_up_uid(name: str) -> int:
    """The uid of a login name exactly as recorded, EVERYBODY if there is none."""
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        return EVERYBODY


def read_utmp() -> list[tuple[str, str]] | None:
    """The (name, terminal) records of utmp, unchecked; None where nothing maintains it."""
    if not any(os.path.exists(path) for path in UTMP):
        return None
    import psutil  # here, since it costs 30 ms and half of all hosts have no utmp

    return [(user.name, user.terminal or "") for user in psutil.users()]


def read_logind(uid: int = EVERYBODY) -> list[Session] | None:
    """The sessions of `uid` that logind knows; None without libsystemd or without logind."""
    # Without logind libsystemd answers "no sessions", not that it cannot know.
    if not os.path.exists(LOGIND):
        return None
    try:
        library = _Libsystemd()
    except OSError:
        return None
    return [library.read_session(name) for name in library.list_sessions(uid)]


class _Libsystemd:
    """The few calls of sd-login(3) that are needed, through ctypes; OSError if missing."""

    def __init__(self) -> None:
        import ctypes  # here, since only a probe or `mda who` needs it

        self._ctypes = ctypes
        self._library = ctypes.CDLL("libsystemd.so.0")
        self._free = ctypes.CDLL(None).free
        self._free.argtypes = [ctypes.c_void_p]
        self._free.restype = None

    def list_sessions(self, uid: int) -> list[bytes]:
        array = self._ctypes.POINTER(self._ctypes.c_void_p)()
        place = self._ctypes.byref(array)
        if uid == EVERYBODY:
            count = self._library.sd_get_sessions(place)
        else:
            count = self._library.sd_uid_get_sessions(self._ctypes.c_uint32(uid), 0, place)
        names = [self._take(array[index]) for index in range(max(count, 0))]
        self._free(array)
        return names

    def read_session(self, name: bytes) -> Session:
        uid = self._ctypes.c_uint32()
        if self._library.sd_session_get_uid(name, self._ctypes.byref(uid)) < 0:
            return Session(EVERYBODY, "", "", "")
        tty, session_class, kind = (
            self._ask(function, name)
            for function in (
                self._library.sd_session_get_tty,
                self._library.sd_session_get_class,
                self._library.sd_session_get_type,
            )
        )
        return Session(uid.value, tty, session_class, kind)

    def _ask(self, function: ctypes._NamedFuncPointer, name: bytes) -> str:
        text = self._ctypes.c_void_p()
        if function(name, self._ctypes.byref(text)) < 0:
            return ""
        return self._take(text.value).decode("utf-8", "replace")

    def _take(self, address: int | None) -> bytes:
        """The C string at `address`, which was ours to free."""
        if not address:
            return b""
        text = self._ctypes.string_at(address)
        self._free(address)
        return text


def list_processes(uid: int = EVERYBODY) -> dict[int, list[int]] | None:
    """The processes of `uid`'s (or everybody's) logins by uid; None where they are hidden.

    The user's slice has them all, also a tmux server that left its session; where no
    slices are kept, all processes with that real uid.
    """
    # With hidepid= (proc(5)) one sees one's own processes only.
    if uid != os.getuid() and not os.path.exists(f"{PROC}/1/stat"):
        return None
    trees = [f"{root}/user.slice" for root in CGROUPS if os.path.isdir(f"{root}/user.slice")]
    if not trees:
        return scan_processes()
    found: dict[int, list[int]] = {}
    for tree in trees:
        for owner in [uid] if uid != EVERYBODY else _list_slices(tree):
            found.setdefault(owner, []).extend(_read_slice(f"{tree}/user-{owner}.slice"))
    return found


def scan_processes() -> dict[int, list[int]]:
    """All processes by real uid, without the help of slices."""
    import psutil  # here, since hosts with systemd never need it for this

    found: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        try:
            found.setdefault(process.uids().real, []).append(process.pid)
        except psutil.Error:
            continue
    return found


def _list_slices(tree: str) -> list[int]:
    names = [name.removeprefix("user-").removesuffix(".slice") for name in _list_below(tree)]
    return [int(name) for name in names if name.isascii() and name.isdecimal()]


def _list_below(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _read_slice(top: str) -> list[int]:
    """The processes in a cgroup and all below it, session scopes before user@.service."""
    pids: list[int] = []
    directories = [top]
    for directory in directories:
        pids += _read_pids(f"{directory}/cgroup.procs")
        room = MAX_CGROUPS - len(directories)
        directories += [f"{directory}/{name}" for name in _list_below(directory)[:room]]
    return pids


def _read_pids(path: str) -> list[int]:
    try:
        with open(path, "rb") as file:
            text = file.read(65_536)
    except OSError:
        return []
    # 0 stands for a process outside of our PID namespace.
    return [int(pid) for pid in text.split() if pid.isdigit() and pid != b"0"]


def read_processes(pids: list[int]) -> dict[int, Process]:
    """What /proc says about `pids`, without those that have ended and login prompts."""
    found = {}
    for pid in pids[:MAX_PROCESSES]:
        process = read_process(pid)
        if process and process.comm not in _PROMPTS:
            found[pid] = process
    return found


def read_process(pid: int) -> Process | None:
    """What /proc/PID/stat says, None if there is no such process (any more)."""
    try:
        fd = os.open(f"{PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(fd, 1024)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The name stands in parentheses and may itself hold spaces and parentheses.
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    if len(fields) < 6:
        return None
    parent, group, _, number, foreground = (int(field) for field in fields[1:6])
    comm = head.partition(b"(")[2]
    return Process(comm, parent, group, name_device(number), foreground)
