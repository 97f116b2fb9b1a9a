"""The aliases of this host: /etc/aliases, in sendmail's form (aliases(5)).

Both forms of the file, the text and the compiled index beside it, become the same bytes: one
line for each alias, its name in lower case, a NUL, a mark and its value. An index counts as
long as the text is the very file that it was made from.
"""

from __future__ import annotations

import os

from mda.model import Outcome
from mda.recipients.destinations import Destination, DestinationError, parse_list
from mda.recipients.steering import (
    Distrusted,
    cannot_read,
    nobodys,
    open_trusted,
    printable,
    read_whole,
)

ALIASES_FILE = "/etc/aliases"
INDEX_SUFFIX = ".mda"

_LARGEST = 64 << 20
_ROOT = (0,)
_MAGIC = b"mda-aliases-1"
_GOOD = b"="
_BROKEN = b"!"


class Aliases:
    """The aliases as they were read once; `is_indexed` says that an index spared the work.

    `stamp` is of the text that they are from (`stamp_of`).
    """

    def __init__(self, lines: bytes, stamp: bytes = b"", *, is_indexed: bool = False) -> None:
        self._lines = lines
        self.stamp = stamp
        self.is_indexed = is_indexed

    def find(self, name: bytes) -> list[Destination] | Outcome | None:
        """What the alias `name` (in any case) stands for, None where there is none.

        An outcome, 451 4.3.5, says what is wrong with its entry.
        """
        found = self._find(name)
        if found is None:
            return None
        shown = printable(os.fsdecode(name))
        if found.startswith(_BROKEN):
            return Outcome(451, "4.3.5", f"Alias {shown}: {found[1:].decode('ascii')}")
        try:
            destinations = parse_list(found[1:])
        except DestinationError as error:
            return Outcome(451, "4.3.5", f"Alias {shown}: {error}")
        return destinations or Outcome(451, "4.3.5", f"Alias {shown}: stands for nobody")

    def has(self, name: bytes) -> bool:
        """Is there an alias of this name, whatever it stands for?"""
        return self._find(name) is not None

    def _find(self, name: bytes) -> bytes | None:
        if not name or b"\n" in name or b"\0" in name:
            return None
        key = b"\n%b\0" % name.lower()
        at = self._lines.find(key)
        if at < 0:
            return None
        begin = at + len(key)
        return self._lines[begin : self._lines.find(b"\n", begin)]

    def faults(self) -> list[tuple[str, str]]:
        """The names of the aliases that are broken, each with what is wrong."""
        names = [line.partition(b"\0")[0] for line in self._lines.split(b"\n") if line]
        found = ((name, self.find(name)) for name in names)
        return [
            (printable(os.fsdecode(name)), each.text)
            for name, each in found
            if isinstance(each, Outcome)
        ]


NO_ALIASES = Aliases(b"\n")


def load(path: str) -> Aliases | Outcome:
    """The aliases in `path`, or 451 4.3.5 with the reason why they cannot be followed.

    "" means no aliases, and so does the default file where it is missing. Its owner must
    be root, and nobody else may write it.
    """
    if not path:
        return NO_ALIASES
    try:
        fd = open_trusted(path, _ROOT, nobodys)
    except FileNotFoundError as error:
        return NO_ALIASES if path == ALIASES_FILE else cannot_read(path, error)
    except Distrusted as distrusted:
        return distrusted.outcome
    except OSError as error:
        return cannot_read(path, error)
    try:
        stamp = _stamp(os.fstat(fd))
        indexed = _read_index(path, stamp)
        if indexed is not None:
            return Aliases(indexed, stamp, is_indexed=True)
        return Aliases(compile_text(read_whole(path, fd, _LARGEST)), stamp)
    except Distrusted as distrusted:
        return distrusted.outcome
    except OSError as error:
        return cannot_read(path, error)
    finally:
        os.close(fd)


def stamp_of(path: str) -> bytes:
    """What changes whenever the text does; b"" where it cannot be told."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return b""


def _stamp(status: os.stat_result) -> bytes:
    numbers = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return b"%b %d %d %d %d\n" % (_MAGIC, *numbers)


def _read_index(path: str, stamp: bytes) -> bytes | None:
    """The index that was made from the very same text, else None."""
    try:
        fd = open_trusted(path + INDEX_SUFFIX, _ROOT, nobodys)
    except (OSError, Distrusted):
        return None
    try:
        if os.read(fd, len(stamp)) != stamp:
            return None
        lines = read_whole(path, fd, _LARGEST)
        return lines if lines.startswith(b"\n") and lines.endswith(b"\n") else None
    except (OSError, Distrusted):
        return None
    finally:
        os.close(fd)


def write_index(path: str) -> int:
    """Compile `path` into the index beside it; the number of aliases in it.

    Raises OSError, or Distrusted for a text that is not to be followed.
    """
    fd = open_trusted(path, _ROOT, nobodys)
    try:
        stamp = _stamp(os.fstat(fd))
        lines = compile_text(read_whole(path, fd, _LARGEST))
    finally:
        os.close(fd)
    fresh = f"{path}{INDEX_SUFFIX}.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(stamp + lines)
            file.flush()
            os.fsync(fd)
        os.rename(fresh, path + INDEX_SUFFIX)
    except OSError:
        os.unlink(fresh)
        raise
    return lines.count(b"\n") - 1


def is_index_stale(path: str) -> bool:
    """Is there an index that counts no more, since the text is another by now?"""
    if not os.path.lexists(path + INDEX_SUFFIX):
        return False
    return _read_index(path, _stamp(os.stat(path))) is None


def compile_text(text: bytes) -> bytes:
    """The aliases of a text file, one to a line, with a line end before the first.

    The first of two entries with one name counts, as in Postfix.
    """
    entries: dict[bytes, bytes] = {}
    for line in _join_lines(text):
        name, value = _read_entry(line)
        if name:
            entries.setdefault(name, value)
    return b"\n" + b"".join(b"%b\0%b\n" % entry for entry in entries.items())


def _join_lines(text: bytes) -> list[bytes]:
    """The entries, each with the lines that continue it; no comments, no empty lines."""
    entries: list[list[bytes]] = []
    for line in text.replace(b"\r\n", b"\n").split(b"\n"):
        if line.startswith(b"#") or not line.strip():
            continue
        if line[:1] in (b" ", b"\t") and entries:
            entries[-1].append(line)
        else:
            entries.append([line])
    return [b"".join(parts) for parts in entries]


def _read_entry(line: bytes) -> tuple[bytes, bytes]:
    """Name and marked value; an entry that is none keeps its name, so that its mail waits."""
    if line.startswith(b'"'):
        name, quote, rest = line[1:].partition(b'"')
        _, colon, value = rest.partition(b":")
        is_good = bool(quote and colon) and not rest.partition(b":")[0].strip()
    else:
        name, colon, value = line.partition(b":")
        is_good = bool(colon)
    if not is_good:
        name = (line.strip(b'"').split() or [b""])[0].split(b"\0")[0]
        return name.lower(), _BROKEN + b"no colon behind its name"
    if b"\0" in line:
        return name.split(b"\0")[0].strip().lower(), _BROKEN + b"a NUL byte"
    return name.strip().lower(), _GOOD + value.strip()
