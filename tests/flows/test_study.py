"""A study on the real stages, with members that run side by side, continue another, or fail."""

import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from flows.members import TABLE, Member
from flows.prefect_server.server import free_port
from flows.study import tabulate
from tests.flows.served import Served, checkout, wait_for
from tests.small_run import PARAMS
from tests.vla_opd.lineage.manifests import publish
from vla_opd.analysis import study_table
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.params.run import Params
from vla_opd.params.stages import AdoptParams, EnvironmentParams, RunParams
from vla_opd.params.study import ArmParams, StudyParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHANGES = {
    "evaluate: {episodes: 10": "evaluate: {episodes: 2",
    ", final: it001, teacher: teacher}": ", teacher: teacher}",
}
MORE = """
adopt: {}
label: {teacher: teacher}
report: {start: start, final: start, teacher: teacher}
studies:
  which:
    seeds: [4]
    arms:
      plain: {distill: 1}
      broken: {distill: 1, settings: {optimize.objective: "nowhere:nothing"}}
      longer: {after: plain, reinforce: 1}
"""
SETTINGS = reduce(lambda text, change: text.replace(*change), CHANGES.items(), PARAMS) + MORE


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = Served(checkout(SETTINGS, tmp_path_factory.mktemp("study")), free_port())
    yield project
    project.kill_everything()


def run_study(served: Served, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows", "study", "which", "--parallel", "2", *words]
    return subprocess.run(
        command,
        cwd=served.toy.folder,
        env=served.environment,
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture(scope="module")
def first(served: Served) -> subprocess.CompletedProcess[str]:
    return run_study(served)


def member_folder(served: Served, arm: str) -> Path:
    return served.toy.folder / "artifacts/.studies/which" / arm / "4"


def read_log(served: Served, arm: str) -> str:
    return (member_folder(served, arm) / "study.log").read_text()


def read_table(served: Served) -> study_table.Table:
    folder = served.toy.folder / "artifacts/small/studies/which"
    open_artifact(folder, "study")
    return study_table.read(folder)


def test_a_member_that_fails_is_named_and_the_others_are_done(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    message = (
        "1 of 3 members failed: broken, seed 4 (see artifacts/.studies/which/broken/4/study.log)"
    )
    assert message in first.stderr
    assert "optimize.objective is 'nowhere:nothing'" in read_log(served, "broken")
    table = read_table(served)
    assert [(row.arm, row.iteration) for row in table.updates] == [
        ("plain", "it001"),
        ("longer", "it001"),
        ("longer", "rl001"),
    ]
    assert {(row.arm, row.checkpoint, row.iterations) for row in table.episodes} == {
        (None, "student", 0),
        (None, "teacher", 0),
        ("plain", "it001", 1),
        ("longer", "it001", 1),
        ("longer", "rl001", 2),
    }
    assert all(row.seconds for row in table.updates)


def test_iterations_of_the_predecessor_are_copied_and_not_made_again(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    log = read_log(served, "longer")
    assert "optimize@it001" in log
    assert "✓ reinforce@rl001" in log
    assert "✓ optimize@it001" not in log
    assert "✓ teacher" not in log
    updates = read_table(served).updates
    digests = {row.arm: row.digest for row in updates if row.iteration == "it001"}
    assert digests["plain"] == digests["longer"]


def test_members_are_subflows(served: Served, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 1
    runs: dict[str, Any] = {
        run["name"]: run for run in served.ask("flow_runs/filter", {"limit": 50})
    }
    (whole,) = [run for run in runs.values() if run["parent_task_run_id"] is None]
    assert whole["state_type"] == "FAILED"
    expected = {
        "plain, seed 4": "COMPLETED",
        "longer, seed 4": "COMPLETED",
        "broken, seed 4": "FAILED",
        "reference": "COMPLETED",
    }
    assert {name: runs[name]["state_type"] for name in expected} == expected
    parent = served.ask("task_runs/" + runs["plain, seed 4"]["parent_task_run_id"])
    assert parent["flow_run_id"] == whole["id"]


def test_rollouts_go_and_their_manifests_stay(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    run = member_folder(served, "plain") / "artifacts/small"
    assert not (run / "trajectories/it001").exists()
    assert (run / ".discarded/labels/it001/manifest.json").is_file()
    assert not (member_folder(served, "plain") / ".dvc/cache").exists()


def test_the_same_command_makes_nothing_again_and_publishes_the_page(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    before = read_table(served)
    broken = '      broken: {distill: 1, settings: {optimize.objective: "nowhere:nothing"}}\n'
    served.toy.edit("params.yaml", broken, "")
    lengths = {arm: len(read_log(served, arm)) for arm in ("plain", "longer")}
    second = run_study(served)
    assert second.returncode == 0, second.stderr
    for arm, length in lengths.items():
        assert "✓" not in read_log(served, arm)[length:]
    assert read_table(served) == before, "seconds come from the record of executions alone"
    page = (served.toy.folder / "artifacts/small/report/which/index.html").read_text()
    assert "<strong>plain</strong>" in page


def test_an_unknown_arm_is_refused_before_a_server_is_started(served: Served) -> None:
    refused = run_study(served, "--arm", "plane")
    assert refused.returncode == 1
    assert "studies.which.arms has no 'plane'" in refused.stderr


def test_a_killed_study_takes_its_members_along_and_all_are_declared_crashed(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    served.toy.edit("params.yaml", "    seeds: [4]", "    seeds: [4, 5]")
    command = [sys.executable, "-m", "flows", "study", "which", "--seed", "5", "--arm", "plain"]
    process = subprocess.Popen(
        command,
        cwd=served.toy.folder,
        env=served.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    under_way = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}

    def running() -> set[str]:
        return {run["name"] for run in served.ask("flow_runs/filter", under_way)}

    wait_for(lambda: {"which", "plain, seed 5", "it001"} <= running(), 180, lambda: str(running()))
    process.kill()
    process.wait()
    wait_for(lambda: not served.with_words("spawn_main"), 30, lambda: str(served.with_words("")))
    assert "it001" in running()
    served.serve()
    assert served.log.count("its process is gone") == 1
    assert running() == set()


def test_the_cost_of_an_adopted_checkpoint_is_in_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that starts from public checkpoints has a table although their cost is unknown."""
    monkeypatch.chdir(tmp_path)
    run = Params(
        run=RunParams(name="public"),
        environment=EnvironmentParams(tasks=("libero_object/0",)),
        adopt={name: AdoptParams(folder="public") for name in ("student", "teacher")},
        iterations={},
        evaluations={},
        studies={"which": StudyParams(arms={"plain": ArmParams(distill=1)})},
    )
    for name in run.origins:
        publish(tmp_path / "artifacts/public/checkpoints" / name, "checkpoint", {}, name=name)
    manifest = tabulate.fn("which", run)
    assert manifest.facts == {"members": 0, "episodes": 0, "iterations": 0}
    assert set(manifest.parents) == {"checkpoints/student", "checkpoints/teacher"}


def episode(arm: str, seed: int) -> study_table.EpisodeRow:
    row = {
        "arm": arm,
        "seed": seed,
        "evaluation": "e",
        "checkpoint": "it001",
        "horizon": 9,
        "task": "red",
        "seen": True,
        "state": 0,
        "success": True,
        "steps": 3,
        "digest": "d",
    }
    return study_table.EpisodeRow.model_validate(row)


class PartialStudy:
    """A study of adopted checkpoints; in this clone only some of its members are done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.artifacts = folder / "artifacts/small"
        self.study: dict[str, Any] = {
            "seeds": [0, 1, 2],
            "arms": {"late": {"distill": 1}, "early": {"distill": 1}},
        }
        self.settings: dict[str, Any] = {
            "run": {"name": "small"},
            "environment": {"tasks": ["libero_object/0"]},
            "adopt": {"student": {"folder": "public"}, "teacher": {"folder": "public"}},
            "iterations": {},
            "evaluations": {},
            "studies": {"which": self.study},
        }
        self._done: set[Member] = set()
        self._read = study_table.read
        monkeypatch.chdir(folder)
        monkeypatch.setattr("flows.study.is_done", lambda member, _run: member in self._done)
        monkeypatch.setattr("flows.study.read", self._read_member)
        for name in ("student", "teacher", "another"):
            self.publish(name, name)

    def _read_member(self, folder: Path) -> study_table.Table:
        *_, arm, seed, file = folder.parts
        if file != TABLE:
            return self._read(folder)
        return study_table.Table((episode(arm, int(seed)),), ())

    def publish(self, checkpoint: str, name: str) -> None:
        publish(self.artifacts / "checkpoints" / checkpoint, "checkpoint", {}, name=name)

    def tabulate(self, *done: tuple[str, int]) -> tuple[list[tuple[str | None, int | None]], int]:
        """Publish the table when these members are done; return its members, and how many kept."""
        self._done = {Member("which", arm, seed) for arm, seed in done}
        facts = tabulate.fn("which", Params.model_validate(self.settings)).facts
        table = self._read(self.artifacts / "studies/which")
        members = [(row.arm, row.seed) for row in table.episodes]
        assert facts["members"] == len(members)
        assert facts.get("members_kept") != 0, "the fact is there only if members were kept"
        return members, facts.get("members_kept", 0)


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartialStudy:
    return PartialStudy(tmp_path, monkeypatch)


def test_a_table_keeps_the_members_that_another_machine_has_made(partial: PartialStudy) -> None:
    two = [("late", 1), ("early", 0)]
    three = [("late", 0), ("late", 1), ("early", 0)]
    assert partial.tabulate(("early", 0), ("late", 1)) == (two, 0)
    assert partial.tabulate(("late", 0)) == (three, 2)
    assert partial.tabulate(("late", 0), ("late", 1), ("early", 0)) == (three, 0)

    partial.study["seeds"].append(3)
    partial.study["arms"]["new"] = {"distill": 2}
    partial.settings["adopt"]["another"] = {"folder": "public"}
    assert partial.tabulate(("new", 3)) == ([*three, ("new", 3)], 3)


def test_a_table_drops_members_with_other_settings_or_checkpoints(partial: PartialStudy) -> None:
    partial.tabulate(("late", 0), ("late", 1), ("early", 0))
    partial.study["arms"]["late"] = {"distill": 1, "settings": {"optimize.steps": 7}}
    assert partial.tabulate() == ([("early", 0)], 1)
    partial.settings["label"] = {"batch_size": 7}
    assert partial.tabulate() == ([], 0)
    assert partial.tabulate(("early", 0)) == ([("early", 0)], 0)
    partial.publish("student", "another")
    assert partial.tabulate(("early", 2)) == ([("early", 2)], 0)


def test_a_table_drops_members_that_were_scored_at_other_iterations(partial: PartialStudy) -> None:
    partial.study["arms"]["new"] = {"distill": 2}
    partial.tabulate(("early", 0), ("new", 0))
    partial.study["every"] = 2
    assert partial.tabulate() == ([("early", 0)], 1)
