"""Code that runs in a forked child: other identities, kills, locks of another process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def start_child(run: Callable[[], object]) -> int:
    """Run a function in a forked child; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:  # noqa: BLE001 (a child must never return into pytest)
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def in_child(run: Callable[[], object]) -> int:
    """Run a function in a forked child; its exit status, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(run), 0)[1])
