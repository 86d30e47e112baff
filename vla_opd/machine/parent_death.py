"""A process that doesn't outlive the one that started it. Linux; elsewhere it does."""

import ctypes
import os
import signal
from contextlib import suppress

STARTED_BY = "OPD_STARTED_BY"  # the environment variable by which a process that is to die with its parent is told which that is
_PR_SET_PDEATHSIG = 1


def die_with_parent(by: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel end this process, by this signal, with the thread that started it. SystemExit if that is dead already.

    parent: its process id, where it is known; otherwise it counts as dead if init has adopted this process.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent if parent is not None else os.getppid() == 1:
        raise SystemExit("the process that started this one has died")
