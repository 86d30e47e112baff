"""A study on the real stages: members side by side as subflows, one that goes on from another, one that fails, and the same command again."""

import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_server.server import free_port
from flows.projects import TABLE, Member
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
    "evaluations: {start: student, final: it001, teacher: teacher}": "evaluations: {start: student, teacher: teacher}",
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
    its = Served(checkout(SETTINGS, tmp_path_factory.mktemp("study")), free_port())
    yield its
    its.kill_everything()


def bring(served: Served, *words: str) -> subprocess.CompletedProcess[str]:
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
    return bring(served)


def member(served: Served, arm: str) -> Path:
    return served.toy.folder / "artifacts/.studies/which" / arm / "4"


def table(served: Served) -> study_table.Table:
    folder = served.toy.folder / "artifacts/small/studies/which"
    open_artifact(folder, "study")
    return study_table.read(folder)


def test_a_member_that_fails_is_named_and_the_others_are_done(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    assert (
        "1 of 3 members failed: broken, seed 4 (see artifacts/.studies/which/broken/4/study.log)"
        in first.stderr
    )
    assert (
        "optimize.objective is 'nowhere:nothing'"
        in (member(served, "broken") / "study.log").read_text()
    )
    made = table(served)
    assert [(row.arm, row.iteration) for row in made.updates] == [
        ("plain", "it001"),
        ("longer", "it001"),
        ("longer", "rl001"),
    ]
    assert {(row.arm, row.checkpoint, row.iterations) for row in made.episodes} == {
        (None, "student", 0),
        (None, "teacher", 0),
        ("plain", "it001", 1),
        ("longer", "it001", 1),
        ("longer", "rl001", 2),
    }
    assert all(row.seconds for row in made.updates)


def test_what_it_goes_on_from_is_taken_over_and_not_made_again(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    log = (member(served, "longer") / "study.log").read_text()
    assert "optimize@it001" in log
    assert "✓ reinforce@rl001" in log
    assert "✓ optimize@it001" not in log
    assert "✓ teacher" not in log
    digests = {row.arm: row.digest for row in table(served).updates if row.iteration == "it001"}
    assert digests["plain"] == digests["longer"]


def test_members_are_subflows(served: Served, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 1
    runs: dict[str, Any] = {
        run["name"]: run for run in served.ask("flow_runs/filter", {"limit": 50})
    }
    (whole,) = [run for run in runs.values() if run["parent_task_run_id"] is None]
    assert whole["state_type"] == "FAILED"
    states = {
        name: runs[name]["state_type"]
        for name in ("plain, seed 4", "longer, seed 4", "broken, seed 4", "reference")
    }
    assert states == {
        "plain, seed 4": "COMPLETED",
        "longer, seed 4": "COMPLETED",
        "broken, seed 4": "FAILED",
        "reference": "COMPLETED",
    }
    parent = served.ask("task_runs/" + runs["plain, seed 4"]["parent_task_run_id"])
    assert parent["flow_run_id"] == whole["id"]


def test_rollouts_go_and_their_manifests_stay(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    run = member(served, "plain") / "artifacts/small"
    assert not (run / "trajectories/it001").exists()
    assert (run / ".discarded/logits/it001/manifest.json").is_file()
    assert not (member(served, "plain") / ".dvc/cache").exists()


def test_again_nothing_is_made_and_the_page_is_there(
    served: Served, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 1
    before = table(served)
    served.toy.edit(
        "params.yaml",
        '      broken: {distill: 1, settings: {optimize.objective: "nowhere:nothing"}}\n',
        "",
    )
    logged = {
        arm: len((member(served, arm) / "study.log").read_text()) for arm in ("plain", "longer")
    }
    again = bring(served)
    assert again.returncode == 0, again.stderr
    for arm, length in logged.items():
        assert "✓" not in (member(served, arm) / "study.log").read_text()[length:]
    assert (
        table(served) == before
    )  # to the seconds, which nobody but the record of executions knows
    assert "plain has" in (
        served.toy.folder / "artifacts/small/report/which/index.html"
    ).read_text().replace("</strong>", "")


def test_an_arm_that_is_not_there_is_refused_before_a_server_is_asked(served: Served) -> None:
    refused = bring(served, "--arm", "plane")
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


def test_what_an_adopted_checkpoint_cost_is_in_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its making was somebody else's: a study that starts from public checkpoints has a table all the same."""
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
    made = tabulate.fn("which", run)
    assert made.facts == {"members": 0, "episodes": 0, "iterations": 0}
    assert set(made.parents) == {"checkpoints/student", "checkpoints/teacher"}


def episode(arm: str, seed: int) -> study_table.EpisodeRow:
    its = {
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
    return study_table.EpisodeRow.model_validate({"arm": arm, "seed": seed, **its})


def test_a_table_keeps_the_members_that_another_machine_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone, in which only one seed is made, or after seeds, arms and teachers were added; not if settings or checkpoints are others."""
    monkeypatch.chdir(tmp_path)
    its: dict[str, Any] = {
        "seeds": [0, 1, 2],
        "arms": {"late": {"distill": 1}, "early": {"distill": 1}},
    }
    settings: dict[str, Any] = {
        "run": {"name": "small"},
        "environment": {"tasks": ["libero_object/0"]},
        "adopt": {"student": {"folder": "public"}, "teacher": {"folder": "public"}},
        "iterations": {},
        "evaluations": {},
        "studies": {"which": its},
    }
    run = Params.model_validate(settings)
    for name in (*run.origins, "another"):
        publish(tmp_path / "artifacts/small/checkpoints" / name, "checkpoint", {}, name=name)
    here: dict[Member, bool] = {}
    monkeypatch.setattr("flows.study.is_done", lambda member, _run: member in here)
    read = study_table.read

    def read_made(folder: Path) -> study_table.Table:
        _, arm, seed, of_member = folder.parts[-4:]
        return (
            study_table.Table((episode(arm, int(seed)),), ())
            if of_member == TABLE
            else read(folder)
        )

    monkeypatch.setattr("flows.study.read", read_made)

    def found(*done: tuple[str, int]) -> tuple[list[tuple[str | None, int | None]], dict[str, int]]:
        here.clear()
        here.update({Member("which", *one): True for one in done})
        made = tabulate.fn("which", Params.model_validate(settings))
        table = study_table.read(tmp_path / "artifacts/small/studies/which")
        return [(row.arm, row.seed) for row in table.episodes], {
            name: made.facts[name] for name in ("members", "members_kept") if name in made.facts
        }

    assert found(("early", 0), ("late", 1)) == ([("late", 1), ("early", 0)], {"members": 2})
    assert found(("late", 0)) == (
        [("late", 0), ("late", 1), ("early", 0)],
        {"members": 3, "members_kept": 2},
    )
    assert found(("late", 0), ("late", 1), ("early", 0)) == (
        [("late", 0), ("late", 1), ("early", 0)],
        {"members": 3},
    )

    its["seeds"].append(3)
    its["arms"]["new"] = {"distill": 2}
    settings["adopt"]["another"] = {"folder": "public"}
    assert found(("new", 3)) == (
        [("late", 0), ("late", 1), ("early", 0), ("new", 3)],
        {"members": 4, "members_kept": 3},
    )
    its["arms"]["late"] = {"distill": 1, "settings": {"optimize.steps": 7}}
    assert found() == ([("early", 0), ("new", 3)], {"members": 2, "members_kept": 2})
    its["every"] = 2
    assert found() == ([("early", 0)], {"members": 1, "members_kept": 1})
    settings["label"] = {"batch_size": 7}
    assert found() == ([], {"members": 0})
    assert found(("early", 0)) == ([("early", 0)], {"members": 1})
    publish(tmp_path / "artifacts/small/checkpoints/student", "checkpoint", {}, name="another")
    assert found(("early", 2)) == ([("early", 2)], {"members": 1})
