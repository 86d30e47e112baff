"""Errors as their reader needs them: one message and an exit code, and no traceback for what isn't a defect of the program."""

import errno
import os
import shutil
import traceback
from pathlib import Path
from zipfile import BadZipFile

TRACEBACK = "OPD_TRACEBACK"  # the environment variable that asks for tracebacks all the same
EXPECTED = {  # of a file, by what is wrong with it
    errno.ENOENT: "; expected it to be there",
    errno.EACCES: "; expected one that you may read, or a folder that you may write to",
    errno.EROFS: "; expected a folder that can be written to",
    errno.EISDIR: "; expected a file",
    errno.ENOTDIR: "; expected a folder",
}
FULL = ("No space left", "Disk quota exceeded")
NO_ROOM = (
    "{free:.0f} MB are free here. What was finished is kept: make room (`opd gc --dry-run` lists artifacts that nothing needs), "
    "and run the same command again"
)


def exit_code(error: BaseException) -> int | None:
    """The exit code of a process that an error ends; None for a defect, which is to show its traceback.

    2: a setting, a file or the machine has to be put right first. 1: the attempt failed. 130: interrupted.
    """
    from safetensors import SafetensorError

    defects = (NotImplementedError, RecursionError)
    if os.environ.get(TRACEBACK) == "1" or isinstance(error, defects):
        return None
    if isinstance(error, KeyboardInterrupt):
        return 130
    if _disk_is_full(error):
        return 1
    if isinstance(error, (ValueError, OSError, EOFError, BadZipFile, SafetensorError)):
        return 2
    return 1 if isinstance(error, (RuntimeError, FloatingPointError, MemoryError)) else None


def message(error: BaseException) -> str:
    """What is said of an error: its own words, with the file that an OSError is about in front, and what to do next."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was finished is kept: run the same command again"
    if _disk_is_full(error):
        return f"{error}. {NO_ROOM.format(free=shutil.disk_usage(Path()).free / 1e6)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _of_a_file(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); `opd plan --memory` says what the run needs"
    return _of_a_library(error) if isinstance(error, RuntimeError) else str(error)


def _of_a_file(error: OSError) -> str:
    name = (
        error.filename.decode(errors="replace")
        if isinstance(error.filename, bytes)
        else error.filename
    )
    reason = error.strerror or ""
    expected = EXPECTED.get(error.errno or 0, "")
    return f"{name}: {reason[:1].lower()}{reason[1:]}{expected}"


def _of_a_library(error: RuntimeError) -> str:
    """Our own RuntimeErrors say enough; others' need a place to look at, or the name of what they miss."""
    if "home directory" in str(error):  # in the words of pathlib, and of what DVC asks
        return f"HOME is {os.environ.get('HOME')!r}; expected a folder that you may write to: DVC and Prefect keep their settings there ({error})"
    frames = traceback.extract_tb(error.__traceback__)
    ours = (
        type(error) is not RuntimeError
        or not frames
        or (frames[-1].line or "").startswith("raise ")
    )
    return str(error) if ours else f"{error} ({TRACEBACK}=1 shows where it was raised)"


def _disk_is_full(error: BaseException) -> bool:
    """By its words: some writers aren't Python's, and raise no OSError."""
    return isinstance(error, Exception) and any(words in str(error) for words in FULL)
