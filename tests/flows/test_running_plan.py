"""The plan of a run at work, as another process reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import pipeline, status
from flows.pipeline import Step
from flows.prefect_server import liveness
from flows.running_plan import PLANS, finish, read_running_plan, shown

DONE = Step("pretrain@base", stale=False, missing=True, due=False, outs=("artifacts/a",))
SAMPLE = Step("sample@it001", parents=("finetune@student",), outs=("artifacts/b",))
REPORT = Step("report", parents=("sample@it001",))
STEPS = (DONE, SAMPLE, REPORT)
KILLED = """
import os
from flows.prefect_server import liveness
from flows.running_plan import shown
with liveness.hold_run("killed"), shown("killed", []):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_at_work_shows_its_plan_and_what_has_ended() -> None:
    assert read_running_plan() == ()
    with liveness.hold_run("one"), shown("one", STEPS):
        assert read_running_plan() == STEPS
        finish(DONE)
        finish(SAMPLE)
        done, sample, report = read_running_plan()
        assert done == DONE, "it is still missing, and not needed"
        assert (sample.stale, sample.missing, sample.due) == (False, False, False)
        assert report == REPORT
    assert read_running_plan() == ()
    assert list(PLANS.iterdir()) == []


def test_dvc_is_not_asked_while_a_run_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "inspect", lambda targets: (Step(f"asked for {targets}"),))
    with liveness.hold_run("one"), shown("one", STEPS):
        assert status.read_steps() == STEPS
        assert status.read_steps(["report"])[0].name == "asked for ['report']"
    assert status.read_steps()[0].name == "asked for ()"


def test_a_study_at_work_has_no_plan() -> None:
    with liveness.hold_run("study"):
        assert read_running_plan() == ()


def test_the_plan_of_another_project_is_not_this_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projects share the checkout's `.prefect`."""
    with liveness.hold_run("one"), shown("one", STEPS):
        (folder / "project").mkdir()
        (folder / "project/.prefect").symlink_to(folder / ".prefect")
        monkeypatch.chdir(folder / "project")
        assert read_running_plan() == ()
        monkeypatch.chdir(folder)


def test_the_plan_of_a_killed_run_is_not_read_and_the_next_run_removes_it() -> None:
    path = str(Path(liveness.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": path}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert killed.returncode == -9
    assert (PLANS / "killed.json").is_file()
    assert read_running_plan() == ()
    with liveness.hold_run("next"), shown("next", STEPS):
        assert [path.stem for path in PLANS.iterdir()] == ["next"]


def test_without_a_run_the_end_of_a_step_shows_nothing() -> None:
    finish(SAMPLE)
    assert not PLANS.exists()
