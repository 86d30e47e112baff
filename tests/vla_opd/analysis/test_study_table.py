"""A study's table: costs add up, and Parquet restores the rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.made_run import (
    params,
    publish_finetuned,
    publish_iteration,
    publish_reinforcement,
    publish_run,
)
from vla_opd.analysis import study_table
from vla_opd.analysis.finished_run import Run, discard, read_run
from vla_opd.analysis.study_table import (
    Cost,
    Table,
    concatenate,
    cost_from_scratch,
    member_rows,
    shared_rows,
)
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.params.run import Params


def grown(root: Path) -> Params:
    """The run made by hand, and one iteration of GRPO after it."""
    publish_run(root)
    publish_reinforcement(root, "rl001", read_manifest(root / "checkpoints/it003", "checkpoint"))
    return params(reinforcements={"rl001": "it003"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "small"
    grown(folder)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    return read_run(params(reinforcements={"rl001": "it003"}), root)


@pytest.fixture(scope="module")
def table(run: Run) -> Table:
    seconds = {
        manifest.digest: 2.0 for update in run.updates for manifest in update.artifacts.values()
    }
    return member_rows(run, "arm", 7, seconds)


def test_an_iteration_is_a_row_with_its_own_cost(table: Table) -> None:
    assert [(row.iteration, row.kind, row.position) for row in table.updates] == [
        ("it001", "distill", 1),
        ("it002", "distill", 2),
        ("it003", "distill", 3),
        ("rl001", "reinforce", 4),
    ]
    second, last = table.updates[1], table.updates[-1]
    assert (
        second.env_steps,
        second.teacher_queries,
        second.optimizer_steps,
        second.episodes,
        second.iterations,
    ) == (1000, 551, 20, 8, 1)
    assert (second.reverse_kl_before, second.reverse_kl_after, second.failed_share) == (
        pytest.approx(0.95),
        pytest.approx(0.55),
        0.5,
    )
    assert second.seconds == 6  # rollouts, labels and update
    assert (
        last.teacher_queries,
        last.optimizer_steps,
        last.groups,
        last.useful_groups,
        last.reverse_kl_after,
    ) == (0, 7, 4, 3, None)
    assert last.seconds == 4


def test_an_episode_has_the_costs_of_its_checkpoint(table: Table) -> None:
    by_name = {row.evaluation: row for row in table.episodes}
    assert set(by_name) == {"it002", "final"}  # start and teacher are nobody's own
    assert [row.evaluation for row in table.episodes] == ["it002"] * 20 + ["final"] * 20
    final = by_name["final"]
    assert (
        final.iterations,
        final.env_steps,
        final.teacher_queries,
        final.optimizer_steps,
        final.seconds,
    ) == (3, 3000, 1653, 60, 18)
    assert (final.arm, final.seed, final.horizon, final.checkpoint) == ("arm", 7, 280, "it003")
    assert sum(row.success for row in table.episodes if row.evaluation == "it002") == 11


def test_unknown_seconds_of_a_part_make_the_total_unknown(run: Run) -> None:
    first = run.iterations[0].artifacts
    seconds = {
        manifest.digest: 1.0
        for update in run.updates
        for manifest in update.artifacts.values()
        if manifest.digest != first["labels"].digest
    }
    rows = member_rows(run, "arm", 0, seconds)
    assert [row.seconds for row in rows.updates] == [None, 3, 3, 2]
    assert {row.seconds for row in rows.episodes} == {None}


def test_an_own_student_counts_as_a_cost_of_the_arm(run: Run) -> None:
    rows = member_rows(run, "sft", 0, {run.checkpoints["student"].digest: 4.0}, own_student=True)
    by_name = {row.evaluation: row for row in rows.episodes}
    assert set(by_name) == {"start", "it002", "final"}
    assert (
        by_name["start"].arm,
        by_name["start"].optimizer_steps,
        by_name["start"].seconds,
        by_name["start"].iterations,
    ) == ("sft", 5, 4, 0)
    assert by_name["final"].optimizer_steps == 65


def test_unseen_tasks_are_marked(run: Run) -> None:
    start = run.evaluations["start"]
    seen, unseen = start.records[:10], start.records[10:]
    rows = shared_rows(
        replace(run, evaluations={"start": replace(start, records=seen, unseen=unseen)}), {}
    )
    assert [(row.task, row.seen) for row in rows] == [("libero_object/0", True)] * 10 + [
        ("libero_object/1", False)
    ] * 10


def test_costs_add_up() -> None:
    assert Cost(iterations=1, env_steps=5) + Cost(iterations=2, seconds=1.5) == Cost(
        iterations=3, env_steps=5, seconds=1.5
    )
    assert (Cost(seconds=None) + Cost(seconds=1.0)).seconds is None


def test_shared_episodes_belong_to_no_arm(run: Run) -> None:
    rows = shared_rows(only(run, "start", "teacher"), {})
    assert {(row.arm, row.seed, row.evaluation, row.iterations) for row in rows} == {
        (None, None, "start", 0),
        (None, None, "teacher", 0),
    }
    assert len(rows) == 40


def test_shared_checkpoints_have_the_cost_of_making_them_from_scratch(run: Run) -> None:
    """The student is fine-tuned from the teacher, on a part of the teacher's demonstrations."""
    teacher, student = run.checkpoints["teacher"], run.checkpoints["student"]
    demonstrations = teacher.parents["demonstrations"]
    assert student.parents["demonstrations"] == demonstrations
    seconds = {demonstrations: 30.0, teacher.digest: 20.0, student.digest: 4.0}
    student_cost = cost_from_scratch(run, "student", seconds)
    teacher_cost = cost_from_scratch(run, "teacher", seconds)
    facts, every = teacher.facts, run.params.demonstrate.observe_every
    assert teacher_cost == Cost(
        episodes=facts["episodes"],
        optimizer_steps=10,
        env_steps=every * facts["states"],
        seconds=50,
    )
    assert student_cost == Cost(
        episodes=facts["episodes"],
        optimizer_steps=15,
        env_steps=every * facts["states"],
        seconds=54,
    )
    assert cost_from_scratch(run, "teacher", {teacher.digest: 20.0}).seconds is None
    assert {row.seconds for row in shared_rows(only(run, "teacher"), seconds)} == {50}


def only(run: Run, *evaluations: str) -> Run:
    return replace(run, evaluations={name: run.evaluations[name] for name in evaluations})


def test_parquet_restores_the_rows(table: Table, run: Run, tmp_path: Path) -> None:
    whole = concatenate([table, member_rows(run, "other", 8, {})]).with_shared(
        shared_rows(only(run, "start"), {})
    )
    study_table.write(whole, tmp_path)
    restored = study_table.read(tmp_path)
    assert restored == whole
    assert restored.arms == ("arm", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "episodes.parquet",
        "updates.parquet",
    ]


def test_the_same_rows_are_the_same_bytes(table: Table, tmp_path: Path) -> None:
    for name in ("one", "two"):
        study_table.write(table, tmp_path / name)
    for file in study_table.FILES.values():
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_empty_table_can_be_written(tmp_path: Path) -> None:
    study_table.write(Table((), ()), tmp_path)
    assert study_table.read(tmp_path) == Table((), ())


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"episodes\.parquet does not exist; expected a study's table \(opd study NAME",
    ):
        study_table.read(tmp_path)


def test_rows_are_the_same_once_the_rollouts_are_discarded(tmp_path: Path) -> None:
    settings = grown(tmp_path / "small")
    before = member_rows(read_run(settings, tmp_path / "small"), "arm", 0, {})
    for kind in ("trajectories", "labels"):
        for folder in sorted((tmp_path / "small" / kind).glob("[!.]*")):
            discard(tmp_path / "small", kind, folder.name)
    assert not (tmp_path / "small/labels/it001").exists()
    assert member_rows(read_run(settings, tmp_path / "small"), "arm", 0, {}) == before


def test_a_distillation_may_follow_grpo(tmp_path: Path) -> None:
    root = tmp_path / "small"
    made = {name: publish_finetuned(root / "checkpoints" / name) for name in ("teacher", "student")}
    made["rl001"] = publish_reinforcement(root, "rl001", made["student"])
    publish_iteration(root, "it001", 1, made["rl001"], made["teacher"])
    settings = params(
        iterations={"it001": "rl001"}, reinforcements={"rl001": "student"}, evaluations={}
    )
    rows = member_rows(read_run(settings, root), "arm", 0, {})
    assert [(row.iteration, row.position) for row in rows.updates] == [("rl001", 1), ("it001", 2)]


def test_discard_continues_after_a_kill(tmp_path: Path) -> None:
    grown(tmp_path / "small")
    (tmp_path / "small/labels/.it001.removed/left").mkdir(parents=True)
    discard(tmp_path / "small", "labels", "it001")
    assert [path.name for path in (tmp_path / "small/labels").glob("*it001*")] == [".it001.lock"]
