"""DVC's locks, freed from those who died with them.

DVC drops an entry of `.dvc/tmp/rwlock` itself once its process is gone. A process that is a zombie, or another one that got the same number since,
blocks it for ever; so does a file that was cut short when its writer was killed.
"""

import json
from pathlib import Path
from typing import Any, cast

import psutil

TEMPORARY = Path(".dvc/tmp")


def heal(folder: Path = TEMPORARY) -> tuple[str, ...]:
    """Drop what nobody alive holds. Returns the commands whose locks were dropped."""
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
        with _edit_rwlock(str(folder), localfs, hardlink=False) as opened:
            lock = cast("dict[str, Any]", opened)
            dead = [info for info in _holders(lock) if not held(info)]
            lock["write"] = {name: info for name, info in lock["write"].items() if info not in dead}
            left = {
                name: [info for info in infos if info not in dead]
                for name, infos in lock["read"].items()
            }
            lock["read"] = {name: infos for name, infos in left.items() if infos}
    except LockError:  # somebody is writing the file at this moment, and sees to it
        return ()
    except (RWLockFileCorruptedError, RWLockFileFormatError):
        path.unlink(missing_ok=True)
        return (f"{path}, which was cut short",)
    return tuple(dict.fromkeys(info["cmd"] for info in dead))


def written(folder: Path = TEMPORARY) -> frozenset[Path]:
    """What processes that are alive are writing now, as DVC's stages have said. Read only; nothing where it can't be read."""
    try:
        entries = json.loads((folder / "rwlock").read_text())["write"]
        return frozenset(Path(path) for path, info in entries.items() if held(info))
    except (OSError, ValueError, KeyError):
        return frozenset()


def held(info: dict[str, Any]) -> bool:
    """Whether the process that an entry names is alive, no zombie, and still running the command that took the lock."""
    arguments = " ".join(info["cmd"].split()[1:])
    try:
        process = psutil.Process(info["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).endswith(
            arguments
        )
    except psutil.NoSuchProcess:
        return False


def _holders(lock: dict[str, Any]) -> list[dict[str, Any]]:
    return [*lock["write"].values(), *(info for infos in lock["read"].values() for info in infos)]
