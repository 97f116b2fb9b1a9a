"""What processes hold in memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

from support.serving import children_of, status_of


def proportional_set(pid: int) -> int:
    """PSS of one process in KiB: what it shares is divided by those who share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss line")


def peak_resident_set(pid: int) -> int:
    """The most that a process ever held in KiB, what it shares counted in full."""
    return int(status_of(pid)["VmHWM"].split()[0])


def family_of(pid: int) -> list[int]:
    """A process and all those below it."""
    return [pid, *(each for child in children_of(pid) for each in family_of(child))]
