"""Flow runs with a living process, by a lock on a file that is named after the run.

The kernel releases the lock when the process dies. Prefect alone can't tell: a run whose process
and runner were both killed stays RUNNING on its server for good (Prefect's issue 16746).
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

RUNS = Path(".prefect/runs")


@contextmanager
def hold_lock(path: Path, message: str) -> Generator[None]:
    """Hold the lock on a file, which is created if missing, for the duration of the context.

    The file then names this process's folder. RuntimeError(message) if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(message) from None
        file.truncate(0)
        file.write(str(Path.cwd()))  # a checkout's projects hold their locks in one folder
        file.flush()
        yield


@contextmanager
def hold_run(run: str) -> Generator[None]:
    """Be the process of a flow run for the duration of the context.

    RuntimeError if another process is.
    """
    with hold_unreported_run(run):
        try:
            yield
        finally:  # skipped by a kill, so that `abandoned_runs` returns the run
            forget_run(run)


@contextmanager
def hold_unreported_run(run: str) -> Generator[None]:
    """Be the process of a flow run whose end can't be reported any more.

    The run's file is kept, and the process that next serves this folder reports the end.
    """
    path = RUNS / run
    message = f"flow run {run} has a process already, which holds {path}; wait for it, or end it"
    with hold_lock(path, message):
        yield


def abandoned_runs() -> tuple[str, ...]:
    """Return the flow runs of this checkout whose processes died."""
    return tuple(sorted(path.name for path in RUNS.glob("*") if not _is_locked(path)))


def is_alive(run: str) -> bool:
    """Return whether a flow run has a process on this machine, in any process's folder."""
    # Other users' processes have no "cwd" here.
    folders = {Path(process.info["cwd"] or "/") for process in psutil.process_iter(["cwd"])}
    folders.add(Path())
    for folder in folders:
        file = folder / RUNS / run
        if os.access(file, os.R_OK) and _is_locked(file):
            return True
    return False


def other_living_runs(current: str = "") -> tuple[str, ...]:
    """Return the flow runs of this very folder that have a process, except the current one."""
    folder = str(Path.cwd())
    living = [path for path in RUNS.glob("*") if _is_locked(path)]
    runs = [path.name for path in living if path.read_text() == folder]
    return tuple(sorted(run for run in runs if run != current))


def forget_run(run: str) -> None:
    """Remove a run whose end was reported: it is not abandoned."""
    (RUNS / run).unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
