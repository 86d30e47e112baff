"""Errors as their reader needs them: one message and an exit code, and no traceback for what isn't a defect of the program."""

import os
import shutil
import traceback
from pathlib import Path

TRACEBACK = "OPD_TRACEBACK"  # the environment variable that asks for tracebacks all the same
OURS = ("flows", "stages", "vla_opd")  # whose own words say enough
FULL = ("No space left", "Disk quota exceeded")
NO_ROOM = (
    "{free:.0f} MB are free here. What was finished is kept: make room (`opd gc --dry-run` lists artifacts that nothing needs), "
    "and run the same command again"
)


def exit_code(error: BaseException) -> int | None:
    """The exit code of a process that an error ends; None for a defect, which is to show its traceback.

    2: a setting, a file or the machine has to be put right first. 1: the attempt failed. 130: interrupted.
    """
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, KeyboardInterrupt):
        return 130
    if _disk_is_full(error):
        return 1
    if isinstance(error, (ValueError, OSError)):
        return 2
    if isinstance(error, (RuntimeError, FloatingPointError, MemoryError)):
        return 1
    return None


def message(error: BaseException) -> str:
    """What is said of an error: its own words, with the file that an OSError is about in front, and what to do next."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was finished is kept: run the same command again"
    if _disk_is_full(error):
        return f"{error}. {NO_ROOM.format(free=shutil.disk_usage(Path()).free / 1e6)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
        return f"{name}: {error.strerror[0].lower()}{error.strerror[1:]}; expected a file that can be read, or a folder that can be written to"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); `opd plan --memory` says what the run needs"
    if type(error) is RuntimeError and _raised_by_a_library(error):
        return f"{error} ({TRACEBACK}=1 shows where it was raised)"
    return str(error)


def _raised_by_a_library(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, _line = frames[-1]
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] not in OURS


def _disk_is_full(error: BaseException) -> bool:
    """By its words: some writers aren't Python's, and raise no OSError."""
    return isinstance(error, Exception) and any(words in str(error) for words in FULL)
