"""Locks of dead processes, zombies and reused process ids are dropped; those in use are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import pipeline
from flows.dvc_runner import stale_locks
from tests.flows.toy import Toy

REPRO = "dvc repro --single-item base"
AT_WORK = [sys.executable, "-c", "import time; time.sleep(60)", *REPRO.split()[1:]]


@pytest.fixture
def zombie() -> Iterator[int]:
    """Yield a process that has ended, and that its parent has not waited for."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    yield child
    os.waitpid(child, 0)


@pytest.fixture
def at_work() -> Iterator[int]:
    """Yield a process with the command line of a `dvc repro`."""
    with subprocess.Popen(AT_WORK) as process:
        yield process.pid
        process.kill()


def write(folder: Path, **entries: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rwlock").write_text(json.dumps(entries))


def info(pid: int, cmd: str = REPRO) -> dict[str, Any]:
    return {"pid": pid, "cmd": cmd}


def test_locks_of_zombies_and_reused_ids_are_dropped_and_those_in_use_kept(
    tmp_path: Path, zombie: int, at_work: int
) -> None:
    reused = info(os.getpid())  # this process has another command line
    write(
        tmp_path,
        write={"a": info(zombie), "b": info(at_work)},
        read={"c": [reused, info(at_work)], "d": [reused]},
    )
    assert stale_locks.drop_stale_locks(tmp_path) == (REPRO,)
    kept = json.loads((tmp_path / "rwlock").read_text())
    assert kept == {"write": {"b": info(at_work)}, "read": {"c": [info(at_work)]}}
    assert stale_locks.drop_stale_locks(tmp_path) == ()


@pytest.mark.parametrize("text", ['{"write": {"a": {"pid"', '{"write": {"a": {"pid": "seven"}}}'])
def test_a_file_cut_short_by_a_kill_is_deleted(tmp_path: Path, text: str) -> None:
    (tmp_path / "rwlock").write_text(text)
    assert "cut short" in stale_locks.drop_stale_locks(tmp_path)[0]
    assert not (tmp_path / "rwlock").exists()


def test_without_a_lock_no_file_is_created(tmp_path: Path) -> None:
    assert stale_locks.drop_stale_locks(tmp_path) == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stage_that_a_zombie_blocks_runs_all_the_same(toy: Toy, zombie: int) -> None:
    out = toy.folder / "artifacts/toy/demonstrations/pre"
    write(toy.folder / ".dvc/tmp", write={str(out): info(zombie)})
    # DVC alone is blocked for ever.
    assert "is busy" in toy.dvc("repro", "--single-item", "demonstrate@pre", check=False)
    assert pipeline.reproduce("demonstrate@pre", lambda _: None)
    assert out.is_dir()
