"""Which flow runs have a living process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from flows.prefect_server import liveness


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_is_alive_while_it_is_held_and_forgotten_after_it() -> None:
    with liveness.held("one"):
        assert liveness.alive("one")
        assert liveness.abandoned() == ()
    assert not liveness.alive("one")
    assert liveness.abandoned() == ()


def test_a_run_of_another_folder_is_alive_too(tmp_path: Path) -> None:
    program = (
        "from flows import presence\nwith presence.held('far'):\n    print(flush=True)\n    input()"
    )
    (tmp_path / "other").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(liveness.__file__).parents[1])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd="other", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert liveness.alive("far")
        other.communicate(b"\n")
    assert other.returncode == 0
    assert not liveness.alive("far")


def test_a_folder_that_may_not_be_read_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        info: ClassVar[dict[str, str]] = {"cwd": "/closed"}

    def closed(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(liveness.psutil, "process_iter", lambda _: [Elsewhere])
    monkeypatch.setattr(Path, "is_file", closed)
    assert not liveness.alive("far")


def test_a_run_has_one_process() -> None:
    with (
        liveness.held("one"),
        pytest.raises(RuntimeError, match="flow run one has a process already"),
        liveness.held("one"),
    ):
        pass


def test_a_failed_run_has_ended_too() -> None:
    with pytest.raises(KeyError), liveness.held("one"):
        raise KeyError
    assert liveness.abandoned() == ()


def test_what_a_killed_process_leaves_is_found(tmp_path: Path) -> None:
    program = "import os\nfrom flows import presence\nwith presence.held('two'):\n    os.kill(os.getpid(), 9)"
    environment = os.environ | {"PYTHONPATH": str(Path(liveness.__file__).parents[1])}
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False
        ).returncode
        == -9
    )
    assert liveness.abandoned() == ("two",)
    liveness.forget("two")
    assert liveness.abandoned() == ()
