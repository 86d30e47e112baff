"""Flow runs with and without a living process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from flows.prefect_server import liveness

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(liveness.__file__).parents[2])}
PROGRAM = """
import os
from flows.prefect_server import liveness
with liveness.hold_run({run!r}):
    print(flush=True)
    {action}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_is_alive_while_it_is_held_and_forgotten_after_it() -> None:
    with liveness.hold_run("one"):
        assert liveness.is_alive("one")
        assert liveness.abandoned_runs() == ()
    assert not liveness.is_alive("one")
    assert liveness.abandoned_runs() == ()


def test_a_run_of_another_folder_is_alive_too(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    command = [sys.executable, "-c", PROGRAM.format(run="far", action="input()")]
    with subprocess.Popen(
        command, cwd="other", env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert liveness.is_alive("far")
        process.communicate(b"\n")
    assert process.returncode == 0
    assert not liveness.is_alive("far")


def test_a_folder_without_read_permission_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherProcess:
        info: ClassVar[dict[str, str]] = {"cwd": "/closed"}

    def closed(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(liveness.psutil, "process_iter", lambda _: [OtherProcess])
    monkeypatch.setattr(Path, "is_file", closed)
    assert not liveness.is_alive("far")


def test_a_run_has_one_process() -> None:
    with (
        liveness.hold_run("one"),
        pytest.raises(RuntimeError, match="flow run one has a process already"),
        liveness.hold_run("one"),
    ):
        pass


def test_a_failed_run_is_not_abandoned() -> None:
    with pytest.raises(KeyError), liveness.hold_run("one"):
        raise KeyError
    assert liveness.abandoned_runs() == ()


def test_the_run_of_a_killed_process_is_abandoned(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.format(run="two", action="os.kill(os.getpid(), 9)")]
    killed = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert killed.returncode == -9
    assert liveness.abandoned_runs() == ("two",)
    liveness.forget_run("two")
    assert liveness.abandoned_runs() == ()
