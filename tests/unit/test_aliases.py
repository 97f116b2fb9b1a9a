"""The alias file: as text, as a compiled index, and when it is not to be trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mda.model import Outcome
from mda.recipients import aliases
from mda.recipients.aliases import Aliases
from mda.recipients.destinations import Destination

TEXT = b"""# Aliases of this host.
postmaster: root
Root:	alice,
	bob
"two words": alice
# a comment in the middle
staff: :include:/etc/lists/staff,

    carol
archive: /var/spool/archive/mbox
ticket: "|/usr/bin/ticket --new, please"
empty:
broken alice
torn: "alice
root: carol
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "aliases"
    path.write_bytes(TEXT)
    path.chmod(0o644)
    return path


def load(path: Path) -> Aliases:
    found = aliases.load(str(path))
    assert isinstance(found, Aliases), found
    return found


def refusal(path: Path) -> str:
    found = aliases.load(str(path))
    assert isinstance(found, Outcome)
    assert (found.code, found.enhanced) == (451, "4.3.5")
    return found.text


def names(found: list[Destination] | Outcome | None) -> list[bytes]:
    assert isinstance(found, list), found
    return [each.text for each in found]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_text_and_index_say_the_same(file: Path, is_compiled: bool) -> None:
    if is_compiled:
        assert aliases.write_index(str(file)) == 9
    found = load(file)
    assert found.is_indexed == is_compiled
    assert names(found.find(b"POSTMASTER")) == [b"root"]
    assert names(found.find(b"root")) == [b"alice", b"bob"]
    assert names(found.find(b"two words")) == [b"alice"]
    assert found.find(b"staff") == [
        Destination("include", b"/etc/lists/staff"),
        Destination("mailbox", b"carol"),
    ]
    assert found.find(b"archive") == [Destination("file", b"/var/spool/archive/mbox")]
    assert found.find(b"ticket") == [Destination("command", b"/usr/bin/ticket --new, please")]
    assert found.find(b"nobody") is None
    assert found.find(b"") is None
    assert found.find(b"root\0=alice") is None
    assert found.find(b"postmaster\0=root\nroot") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"broken", "no colon behind its name"),
        (b"torn", "a quotation mark that is not closed"),
        (b"empty", "stands for nobody"),
    ],
)
def test_a_broken_entry_defers_its_own_mail(file: Path, name: bytes, reason: str) -> None:
    found = load(file).find(name)
    assert found == Outcome(451, "4.3.5", f"Alias {name.decode()}: {reason}")
    assert dict(load(file).faults())[name.decode()] == f"Alias {name.decode()}: {reason}"


def test_an_index_counts_only_for_its_own_text(file: Path) -> None:
    aliases.write_index(str(file))
    assert not aliases.is_index_stale(str(file))
    status = file.stat()
    file.write_bytes(TEXT.replace(b"bob", b"eve"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert aliases.is_index_stale(str(file))
    assert not load(file).is_indexed
    assert names(load(file).find(b"root")) == [b"alice", b"eve"]


def test_an_index_of_somebody_else_does_not_count(file: Path) -> None:
    aliases.write_index(str(file))
    index = Path(f"{file}.mda")
    os.chown(index, 1001, 1001)
    assert not load(file).is_indexed
    os.chown(index, 0, 0)
    assert load(file).is_indexed
    index.chmod(0o666)
    assert not load(file).is_indexed


def test_a_torn_index_does_not_count(file: Path) -> None:
    aliases.write_index(str(file))
    index = Path(f"{file}.mda")
    os.truncate(index, index.stat().st_size - 3)
    assert not load(file).is_indexed
    assert names(load(file).find(b"root")) == [b"alice", b"bob"]


def test_aliases_that_others_can_write_are_not_followed(file: Path) -> None:
    file.chmod(0o664)
    assert refusal(file) == f"{file} can be written by others (chmod go-w {file})"
    file.chmod(0o644)
    os.chown(file, 1001, 0)
    assert refusal(file) == f"{file} is owned by uid 1001, not by uid 0"


def test_aliases_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing").endswith("cannot be read: ENOENT")
    assert refusal(tmp_path).endswith("is not a regular file")
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert refusal(tmp_path / "pipe").endswith("is not a regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "loop").endswith("cannot be read: ELOOP")


def test_no_file_at_all_is_no_aliases() -> None:
    found = aliases.load("")
    assert isinstance(found, Aliases)
    assert found.find(b"root") is None


def test_compiling_leaves_nothing_else_behind(file: Path) -> None:
    aliases.write_index(str(file))
    assert sorted(path.name for path in file.parent.iterdir()) == ["aliases", "aliases.mda"]
    assert Path(f"{file}.mda").stat().st_mode & 0o777 == 0o644


def test_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "aliases"
    path.touch(0o644)
    os.truncate(path, (64 << 20) + 1)
    assert "larger than" in refusal(path)
