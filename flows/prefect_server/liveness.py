"""Which flow runs have a living process: each holds a lock on a file named after it, and the kernel lets go of the lock when the process dies.

Prefect alone can't tell: a run whose process and runner were both killed stays RUNNING on its server for good (its issue 16746).
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

RUNS = Path(".prefect/runs")


@contextmanager
def locked(path: Path, otherwise: str) -> Generator[None]:
    """Hold the lock on a file, which is made if need be, for as long as the context lasts. RuntimeError(otherwise) if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(otherwise) from None
        yield


@contextmanager
def held(run: str) -> Generator[None]:
    """Be the living process of a flow run for as long as the context lasts. RuntimeError if another process is."""
    with orphaned(run):
        try:
            yield
        finally:  # a kill skips this: what is left behind is what `abandoned` finds
            forget(run)


@contextmanager
def orphaned(run: str) -> Generator[None]:
    """The same for a run whose end can't be reported any more: it is left behind, for whoever serves this folder next to do so."""
    path = RUNS / run
    with locked(
        path, f"flow run {run} has a process already, which holds {path}; wait for it, or end it"
    ):
        yield


def abandoned() -> tuple[str, ...]:
    """The flow runs of this folder that were begun, and whose processes died."""
    return tuple(sorted(path.name for path in RUNS.glob("*") if not _alive(path)))


def alive(run: str) -> bool:
    """Whether the flow run has a process, in this folder or in another where a process of this machine is at work."""
    folders = {
        Path(process.info["cwd"] or "/") for process in psutil.process_iter(["cwd"])
    }  # of other users' processes it is not told
    files = {folder / RUNS / run for folder in (*folders, Path())}
    return any(os.access(file, os.R_OK) and _alive(file) for file in files)


def others(own: str = "") -> tuple[str, ...]:
    """The flow runs of this folder that have a process, but for our own."""
    return tuple(sorted(path.name for path in RUNS.glob("*") if path.name != own and _alive(path)))


def forget(run: str) -> None:
    """Its end has been reported: it is no longer abandoned."""
    (RUNS / run).unlink(missing_ok=True)


def _alive(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
