"""Locks of DVC that were left by dead processes.

DVC drops an entry of `.dvc/tmp/rwlock` itself once its process is gone. But a zombie, or another
process that got the same number since, blocks DVC for ever; so does a lock file that was cut short
when its writer was killed.
"""

import json
from pathlib import Path
from typing import Any, cast

import psutil

TEMPORARY = Path(".dvc/tmp")


def drop_stale_locks(folder: Path = TEMPORARY) -> tuple[str, ...]:
    """Drop locks that no living process holds. Returns the commands that had taken them."""
    from dvc.fs import localfs
    from dvc.lock import LockError
    from dvc.rwlock import (
        RWLOCK_FILE,
        RWLockFileCorruptedError,
        RWLockFileFormatError,
        _edit_rwlock,
    )

    path = folder / RWLOCK_FILE
    if not path.is_file():
        return ()
    try:
        with _edit_rwlock(str(folder), localfs, hardlink=False) as lock:
            stale = _drop_stale_entries(cast("dict[str, Any]", lock))
    except LockError:  # another process is writing the file at this moment, and checks it
        return ()
    except (RWLockFileCorruptedError, RWLockFileFormatError):
        path.unlink(missing_ok=True)
        return (f"{path}, which was cut short",)
    return tuple(dict.fromkeys(entry["cmd"] for entry in stale))


def _drop_stale_entries(lock: dict[str, Any]) -> list[dict[str, Any]]:
    """Remove entries without a living process from a lock's data, and return them."""
    entries = list(lock["write"].values())
    for readers in lock["read"].values():
        entries.extend(readers)
    stale = [entry for entry in entries if not is_held(entry)]
    lock["write"] = {name: entry for name, entry in lock["write"].items() if entry not in stale}
    read: dict[str, Any] = {}
    for name, readers in lock["read"].items():
        alive = [entry for entry in readers if entry not in stale]
        if alive:
            read[name] = alive
    lock["read"] = read
    return stale


def outputs_being_written(folder: Path = TEMPORARY) -> frozenset[Path]:
    """Return the outputs that living processes are writing, by their locks; empty on any error."""
    try:
        entries = json.loads((folder / "rwlock").read_text())["write"]
        return frozenset(Path(path) for path, entry in entries.items() if is_held(entry))
    except (OSError, ValueError, KeyError):
        return frozenset()


def is_held(entry: dict[str, Any]) -> bool:
    """Return whether an entry's process lives, is no zombie, and runs the command it locked for."""
    arguments = " ".join(entry["cmd"].split()[1:])
    try:
        process = psutil.Process(entry["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return " ".join(process.cmdline()).endswith(arguments)
    except psutil.NoSuchProcess:
        return False
