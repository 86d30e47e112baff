"""Errors for the reader: one message and an exit code; a traceback only for a defect."""

import errno
import os
import shutil
import traceback
from pathlib import Path
from zipfile import BadZipFile

TRACEBACK = "OPD_TRACEBACK"  # environment variable: 1 shows the traceback of every error
EXPECTED = {  # by the error number of a file operation
    errno.ENOENT: "; expected an existing file or folder",
    errno.EACCES: "; expected a file that you may read, or a folder that you may write to",
    errno.EROFS: "; expected a folder that can be written to",
    errno.EISDIR: "; expected a file",
    errno.ENOTDIR: "; expected a folder",
}
DISK_FULL = ("No space left", "Disk quota exceeded")
MAKE_ROOM = (
    "{free:.0f} MB are free here. Finished work is kept: free some space (`opd gc --dry-run` "
    "lists artifacts that nothing needs), and run the same command again"
)


def exit_code(error: BaseException) -> int | None:
    """Return the exit code for an error; None for a defect, which shows its traceback.

    2: a setting, a file or the machine has to be fixed first. 1: the attempt failed.
    130: interrupted.
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
    """Return an error's text, the file of an OSError first, and what to do next."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; finished work is kept: run the same command again"
    if _disk_is_full(error):
        return f"{error}. {MAKE_ROOM.format(free=shutil.disk_usage(Path()).free / 1e6)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _file_message(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); `opd plan --memory` estimates what the run needs"
    return _runtime_message(error) if isinstance(error, RuntimeError) else str(error)


def _file_message(error: OSError) -> str:
    name = error.filename
    if isinstance(name, bytes):
        name = name.decode(errors="replace")
    reason = error.strerror or ""
    expected = EXPECTED.get(error.errno or 0, "")
    return f"{name}: {reason[:1].lower()}{reason[1:]}{expected}"


def _runtime_message(error: RuntimeError) -> str:
    """Complete the message of a library's RuntimeError; those of this project are complete."""
    if "home directory" in str(error):  # as pathlib says it, and a library that DVC uses
        return (
            f"HOME is {os.environ.get('HOME')!r}; expected a folder that you may write to: DVC and "
            f"Prefect keep their settings there ({error})"
        )
    frames = traceback.extract_tb(error.__traceback__)
    raised_in_python = not frames or (frames[-1].line or "").startswith("raise ")
    if type(error) is not RuntimeError or raised_in_python:
        return str(error)
    return f"{error} ({TRACEBACK}=1 shows where it was raised)"


def _disk_is_full(error: BaseException) -> bool:
    """Return whether an error's text says so: writers outside Python raise no OSError."""
    return isinstance(error, Exception) and any(words in str(error) for words in DISK_FULL)
