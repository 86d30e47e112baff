"""Processes that end with the process that started them. Linux only; elsewhere they live on."""

import ctypes
import os
import signal
from contextlib import suppress

STARTED_BY = "OPD_STARTED_BY"  # environment variable: the process id to end with
_PR_SET_PDEATHSIG = 1


def die_with_parent(by: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    parent: the parent's process id, if known. Otherwise a process adopted by init counts as
            orphaned. SystemExit if the parent is dead already.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    current = os.getppid()
    if parent is None:
        orphaned = current == 1
    else:
        orphaned = current != parent
    if orphaned:
        raise SystemExit("the process that started this one has died")
