"""System calls as strace -f -y writes them, and what of them is on disk at a moment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

TRACED = "openat,write,writev,fsync,mkdirat,linkat,unlinkat,exit_group"


@dataclass(frozen=True)
class Call:
    """One call; `begin` and `end` are its places among all the lines of the trace."""

    begin: int
    end: int
    text: str


def read_trace(trace: str) -> list[Call]:
    """The calls in the order in which they ended; those of several processes interleave."""
    begun: dict[str, tuple[int, str]] = {}
    calls = []
    for place, line in enumerate(trace.splitlines()):
        pid, _, text = line.partition(" ")
        text = text.lstrip()
        if text.endswith("<unfinished ...>"):
            begun[pid] = (place, text.removesuffix("<unfinished ...>"))
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>", text)
        begin, head = begun.pop(pid) if resumed else (place, "")
        calls.append(Call(begin, place, head + text[resumed.end() if resumed else 0 :]))
    return calls


class Disk:
    """What was written to mailboxes and named in their folders before a call began.

    `changed` are their paths, `dirty` those that the power cut could still take: a change
    is on disk when an fsync has succeeded that began after it.
    """

    def __init__(self, calls: list[Call], moment: Call) -> None:
        self.changed: set[str] = set()
        self.dirty: set[str] = set()
        changed_at: dict[str, int] = {}
        for call in calls:
            if call.end >= moment.begin:
                continue
            path = changed_path(call.text)
            if path is not None:
                self.changed.add(path)
                self.dirty.add(path)
                changed_at[path] = call.end
            synced = re.match(r"fsync\(\d+<([^>]+)>\)\s+= 0", call.text)
            if synced and changed_at.get(synced[1], call.begin) < call.begin:
                self.dirty.discard(synced[1])


def changed_path(text: str) -> str | None:
    """The mailbox that a call has written to, or the folder that it has put a name into."""
    written = re.match(r"writev?\(\d+<(/var/mail/\w+|/home/[^>]+)>.*= \d+$", text)
    if written:
        return written[1]
    made = re.search(r"= \d+<(/var/mail/\w+)>$", text)
    if made and "O_CREAT" in text:
        return os.path.dirname(made[1])
    named = re.match(r'(?:mkdirat|linkat)\(.*<([^>]+)>, "([^"]+)", \w+\)\s+= 0$', text)
    if named and not named[2].endswith(".lock"):
        return named[1]
    return None
