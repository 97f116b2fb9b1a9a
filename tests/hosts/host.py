"""Booted Debian hosts to test on: real init, real logins, real users, nothing faked.

A tree is built once by debootstrap and kept; every run boots a throw-away copy of it in
systemd-nspawn. What a test sees is what an administrator has after a fresh installation:
nothing of mda is in the tree, and nothing but `mda install` puts it there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

SUITES = {"debian12": "bookworm", "debian13": "trixie"}
# One host is installed by a root who keeps new files private.
UMASKS = {"debian12": 0o077, "debian13": 0o022}
PACKAGES = (
    "systemd systemd-sysv dbus libpam-systemd python3 bsdutils bsdextrautils login procps "
    "openssh-server perl swaks s-nail procmail tmux screen iproute2 ca-certificates strace "
    "man-db openbsd-inetd expect curl"
)
MACHINES = Path("/var/lib/machines")
CHECKOUT = Path(__file__).resolve().parents[2]
ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_PATH = "/usr/local/bin:/usr/bin:/bin"

# What a fresh Debian host has beyond the packages, in the words of a shell.
PREPARATION = r"""
set -e
apt-get clean
for user in alice bob carol; do
    useradd -m -s /bin/bash $user
done
mkdir -p -m 700 /root/.ssh
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
for user in alice bob carol; do
    mkdir -m 700 /home/$user/.ssh
    cp /root/.ssh/id_ed25519.pub /home/$user/.ssh/authorized_keys
    chown -R $user: /home/$user/.ssh
done
systemctl mask console-getty.service apt-daily.timer apt-daily-upgrade.timer
"""

LoginKind = Literal["console", "ssh", "tmux", "screen"]
Result = subprocess.CompletedProcess[str]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Poll until `condition` holds; AssertionError naming `what` when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


# -- the trees ------------------------------------------------------------------------


def base_tree(name: str) -> Path:
    """The clean tree of the host `name`, built if it is not there yet (about a minute)."""
    recipe = hashlib.sha256(f"{PACKAGES}\n{PREPARATION}".encode()).hexdigest()[:12]
    tree = MACHINES / f"mda-hosts-{SUITES[name]}-{recipe}"
    MACHINES.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(MACHINES / f"mda-hosts-{SUITES[name]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            fresh = MACHINES / f"{tree.name}.building"
            shutil.rmtree(fresh, ignore_errors=True)
            _bootstrap(name, fresh)
            prepare_tree(fresh)
            fresh.rename(tree)
    return tree


def _bootstrap(name: str, tree: Path) -> None:
    packages = PACKAGES.replace(" ", ",")
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", SUITES[name], str(tree)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0, f"debootstrap: {done.stdout[-2000:]!r} {done.stderr[-500:]!r}"


def prepare_tree(tree: Path) -> None:
    """Give a bootstrapped tree its users and their keys."""
    done = subprocess.run(
        ["chroot", tree, "/bin/sh", "-c", PREPARATION],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={"PATH": ROOT_PATH, "LANG": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr


def _pip_settings() -> dict[str, str]:
    """What pip on this machine is configured with, from its files and its environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", shown, re.MULTILINE)
    return {key: value.replace("\\n", "\n    ") for key, value in found}


def _named_paths(settings: dict[str, str]) -> Iterator[Path]:
    """Files and folders that pip's settings name; an index's files lie beside its pages."""
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists() and path != Path("/"):
            is_index = word.startswith("file://") and path.name == "simple"
            yield path.parent if is_index else path


class Installer:
    """How packages are fetched here: the host must reach what this machine reaches.

    `binds` are the folders to show inside read-only, `environment` the proxies.
    """

    def __init__(self) -> None:
        self._settings = _pip_settings()
        paths = sorted(set(_named_paths(self._settings)))
        self.binds = [path for path in paths if path.is_dir()]
        self._files = [path for path in paths if path.is_file()]
        self._files += [Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/resolv.conf")]
        wanted = re.compile("(http|https|no|ftp)_proxy", re.IGNORECASE)
        self.environment = {key: os.environ[key] for key in os.environ if wanted.fullmatch(key)}

    def set_up(self, tree: Path) -> None:
        """Copy name servers, certificates, apt's and pip's settings into `tree`."""
        for path in self._files:
            if path.exists():
                inside = tree / path.relative_to("/")
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.unlink(missing_ok=True)
                shutil.copyfile(path, inside)
        lines = [f"{key} = {value}\n" for key, value in self._settings.items()]
        (tree / "etc/pip.conf").write_text("[global]\n" + "".join(lines))
        shown = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
        fetching = re.findall(
            r"^Acquire::https?::(?!User-Agent).*;$", shown.stdout, re.MULTILINE | re.IGNORECASE
        )
        (tree / "etc/apt/apt.conf.d/90fetching").write_text("".join(f"{x}\n" for x in fetching))


# -- one booted host ------------------------------------------------------------------


class Host:
    """A booted throw-away copy of a tree.

    `name` is "debian12" or "debian13" and the host's own name too, unless `tree` says
    which of them it is; `root` its tree as seen from outside; `leader` its PID 1 as seen
    from outside; `umask` what root works with where `run` is not told otherwise.
    """

    def __init__(self, name: str, umask: int = 0o022, *, tree: str = "") -> None:
        self.name = name
        self.umask = umask
        self._tree = tree or name
        self.root = MACHINES / f"mda-hosts-live-{name}-{os.getpid()}"
        self.ssh_port = free_port()
        self.leader = 0
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._installer = Installer()
        self._logins: list[Login] = []

    def boot(self) -> None:
        """Copy the tree and boot it; AssertionError with the console's text if it fails."""
        _remove_leftovers(self.name)
        subprocess.run(["cp", "-a", "--reflink=auto", base_tree(self._tree), self.root], check=True)
        self._make_individual()
        log = self.root.with_name(self.root.name + ".boot")
        with open(log, "wb") as console:
            self._nspawn = subprocess.Popen(
                self._nspawn_command(),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                start_new_session=True,
            )
        try:
            wait_until(self._is_up, f"{self.name} is up", 90)
        except AssertionError as error:
            text = log.read_text("utf-8", "replace")[-3000:]
            self.stop()
            raise AssertionError(f"{error}; its console says: {text}") from None
        finally:
            log.unlink()

    def _make_individual(self) -> None:
        etc = self.root / "etc"
        self._installer.set_up(self.root)
        (etc / "hostname").write_text(f"{self.name}\n")
        names = f"{self.name}.example.org {self.name}"
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {names}\n")
        # The machine's network is shared, so each host's sshd has its own port.
        (etc / "ssh/sshd_config.d/test.conf").write_text(
            f"Port {self.ssh_port}\nListenAddress 127.0.0.1\n"
        )

    def _nspawn_command(self) -> list[str]:
        options = ["-q", "--boot", "--register=no", "--keep-unit", "--link-journal=no"]
        options += ["--resolv-conf=off", "--timezone=off", f"--hostname={self.name}"]
        options += [f"--machine={self.root.name}", f"--directory={self.root}"]
        options += [f"--bind-ro={path}" for path in self._installer.binds]
        return ["systemd-nspawn", *options]

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, f"{self.name}: systemd-nspawn ended"
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        pids = children.read_text().split()
        if not pids:
            return False
        self.leader = int(pids[0])
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def stop(self) -> None:
        """Pull the plug and throw the copy away."""
        for login in self._logins:
            login.close()
        if self._nspawn is not None:
            if self.leader:
                os.kill(self.leader, signal.SIGKILL)
            try:
                self._nspawn.wait(10)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        _remove_tree(self.root)

    # -- commands

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str = "root",
        input: str | bytes = b"",
        check: bool = True,
        umask: int | None = None,
        timeout: float = 120,
    ) -> Result:
        """Run a shell's line, or a list of words, inside as `user`, in that user's home.

        Output is text with undecodable bytes escaped to surrogates, line ends unchanged.
        With `check` an exit status other than 0 is an AssertionError that shows it all.
        """
        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            self._entered(words, user, self.umask if umask is None else umask),
            input=input.encode() if isinstance(input, str) else input,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        result = Result(
            command,
            done.returncode,
            done.stdout.decode("utf-8", "surrogateescape"),
            done.stderr.decode("utf-8", "surrogateescape"),
        )
        if check:
            assert done.returncode == 0, f"{self.name}: {user}: {result}"
        return result

    def start(self, command: str | Sequence[str], *, user: str = "root") -> subprocess.Popen[bytes]:
        """Start a command inside with pipes at its three ends; the caller ends it."""
        words = ["sh", "-c", command] if isinstance(command, str) else list(command)
        pipe = subprocess.PIPE
        entered = self._entered(words, user, self.umask)
        return subprocess.Popen(entered, stdin=pipe, stdout=pipe, stderr=pipe)

    def _entered(self, words: Sequence[str], user: str, umask: int) -> list[str]:
        home = "/root" if user == "root" else f"/home/{user}"
        path = ROOT_PATH if user == "root" else USER_PATH
        environment = {**self._installer.environment, "LANG": "C.UTF-8", "TERM": "linux"}
        environment |= {"PATH": path, "HOME": home, "USER": user, "LOGNAME": user}
        enter = ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        enter += ["env", "-i", *(f"{key}={value}" for key, value in environment.items())]
        if user != "root":
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        start = f'umask {umask:03o}; cd; exec "$@"'
        return [*enter, "sh", "-c", start, "sh", *words]

    # -- files and mail

    def path(self, inside: str) -> Path:
        """The file `inside` as seen from outside; the host's absolute links lead astray."""
        # Not below `root`, which does not show what is mounted inside: /run, /tmp.
        return Path(f"/proc/{self.leader}/root") / inside.lstrip("/")

    def mailbox(self, user: str) -> bytes:
        """What `user`'s mailbox in the spool holds, nothing if there is none."""
        path = self.path(f"/var/mail/{user}")
        return path.read_bytes() if path.exists() else b""

    def clear_mail(self) -> None:
        """Take all mailboxes and locks out of the spool."""
        for path in self.path("/var/mail").iterdir():
            path.unlink()

    def files(self) -> set[str]:
        """All names on the host but what lives in memory, as absolute paths."""
        found = self.run("find / -xdev -print0").stdout.split("\0")
        return {name for name in found if name}

    def add_checkout(self, target: str = "/src") -> None:
        """Put a copy of the checkout into `target`, as a user would have unpacked it."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT,
            capture_output=True,
            check=True,
        )
        for name in listed.stdout.decode().split("\0"):
            if name and (CHECKOUT / name).is_file():
                copy = self.path(target) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, copy)

    # -- people

    def login(self, user: str, kind: LoginKind = "console") -> Login:
        """Log `user` in on a terminal that stays: a console, SSH, tmux or screen within SSH."""
        login = Login(self, user, kind)
        self._logins.append(login)
        return login

    def terminals(self, user: str) -> set[str]:
        """The pseudo-terminals that `user` owns ("/dev/pts/3")."""
        found = self.run(f"find /dev/pts -user {user}", check=False)
        return set(found.stdout.split())


class InstalledHost(Host):
    """A host with mda on it.

    `installation` is how the README's command went, `files_before` the names on the
    host before it.
    """

    installation: Result
    files_before: set[str]

    def install(self) -> None:
        """Run the README's first command as root in the checkout, and remove that."""
        self.files_before = self.files()
        self.add_checkout("/src")
        command = f"cd /src && {readme_command()}"
        self.installation = self.run(command, check=False, timeout=600)
        shutil.rmtree(self.path("/src"))


def readme_command() -> str:
    """The README's first command."""
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if "mda install --now" in line]
    assert commands, "README.md has no line with `mda install --now`"
    return commands[0].removeprefix("# ").removeprefix("$ ")


def start(name: str) -> InstalledHost:
    """Boot and install; the host is stopped if that fails."""
    host = InstalledHost(name, UMASKS[name])
    try:
        host.boot()
        host.install()
    except BaseException:
        host.stop()
        raise
    return host


class Login:
    """A logged-in user: what the terminal shows, and a keyboard.

    `tty` is the terminal that the user's shell runs on (in tmux and screen: the pane's).
    """

    def __init__(self, host: Host, user: str, kind: LoginKind) -> None:
        self.host = host
        self.user = user
        self._commands = 0
        self._shown: IO[bytes] = open(_unnamed_file(), "w+b", buffering=0)  # noqa: SIM115 (kept)
        how = f"login -f {user}"
        if kind != "console":
            how = f"ssh -tt -q -o StrictHostKeyChecking=no -p {host.ssh_port} {user}@127.0.0.1"
        # The line's size is set, since a terminal without one has no columns.
        inner = f"stty rows 24 cols 80; exec {how}"
        self._process = subprocess.Popen(
            host._entered(["script", "-qfc", inner, "/dev/null"], "root", 0o022),
            stdin=subprocess.PIPE,
            stdout=self._shown,
            stderr=subprocess.STDOUT,
        )
        self.wait_for("$ ")
        if kind == "tmux":
            self.type("exec tmux\n")
            self.wait_for("[0] 0:")
        if kind == "screen":
            # Its first page wants a key, unless told otherwise.
            self.command("echo startup_message off > ~/.screenrc")
            self.type("exec screen\n")
        self.tty = self._ask_tty()

    def screen(self) -> str:
        """Everything the terminal has been sent since the login."""
        size = os.fstat(self._shown.fileno()).st_size
        return os.pread(self._shown.fileno(), size, 0).decode("utf-8", "backslashreplace")

    def type(self, text: str) -> None:
        """Press keys; a newline is the Enter key."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def wait_for(self, text: str, seconds: float = 20) -> None:
        """Wait until the terminal has shown `text`."""
        try:
            wait_until(lambda: text in self.screen(), f"{text!r} on {self.user}'s screen", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows {self.screen()!r}") from None

    def command(self, line: str) -> None:
        """Type a shell's line and wait until it is done."""
        self._commands += 1
        # The sum tells the answer from the echo of what was typed.
        self.type(f"{line}; echo done-$((1000 + {self._commands})).\n")
        self.wait_for(f"done-{1000 + self._commands}.")

    def mesg(self, answer: Literal["y", "n"]) -> None:
        """Take messages on this terminal, or none: what mesg(1) does, which not all have."""
        self.command(f"chmod g{'+' if answer == 'y' else '-'}w {self.tty}")

    def _ask_tty(self) -> str:
        note = f"/tmp/tty-of-{os.urandom(4).hex()}"
        self.command(f"tty > {note}")
        return self.host.run(["cat", note]).stdout.strip()

    def logout(self) -> None:
        """Type exit, and wait until the terminal is gone."""
        self.type("exit\n")
        self._process.wait(20)
        self.hang_up()

    def hang_up(self) -> None:
        """Lose the line, as when a modem hangs up, and wait until the terminal is gone."""
        self.cut()
        self._wait_until_gone()

    def cut(self) -> None:
        """Lose the line, if it is there still."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Cut the line and forget what was on the screen."""
        self.cut()
        self._shown.close()

    def _wait_until_gone(self) -> None:
        wait_until(
            lambda: self.tty not in self.host.terminals(self.user),
            f"{self.user}'s {self.tty} is gone",
        )


def _unnamed_file() -> int:
    return os.memfd_create("screen")


def free_port() -> int:
    """A TCP port that nobody has: the hosts share the network of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _remove_leftovers(name: str) -> None:
    """Throw away hosts of test runs that were killed."""
    for tree in MACHINES.glob(f"mda-hosts-live-{name}-*[0-9]"):
        owner = int(tree.name.rpartition("-")[2])
        if not Path(f"/proc/{owner}").exists() or owner == os.getpid():
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    is_inside = os.readlink(process / "root") == str(tree)
                except OSError:
                    continue
                if is_inside:
                    os.kill(int(process.name), signal.SIGKILL)
            _remove_tree(tree)


def _remove_tree(tree: Path) -> None:
    def clear() -> bool:
        shutil.rmtree(tree, ignore_errors=True)
        return not tree.exists()

    wait_until(clear, f"{tree} is removed")
