"""DVC's plan, locks and missing data, with the real dvc.yaml and toy stages."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows import pipeline
from flows.pipeline import Busy, StageFailed, Step, mark_due
from tests.flows.toy import ROOT, Toy, ran
from vla_opd.params.load import load

if TYPE_CHECKING:
    from flows.dvc_runner.process import Line

ORIGINS = [
    "demonstrate@pre",
    "pretrain@base",
    "demonstrate@main",
    "finetune@student",
    "evaluate@start",
    "finetune@teacher",
]
EACH = ["sample", "label", "optimize"]
ITERATIONS = [f"{verb}@{iteration}" for iteration in ("it001", "it002") for verb in EACH]
PLAN = [*ORIGINS, *ITERATIONS, "evaluate@final", "evaluate@teacher", "report"]


def due(steps: tuple[Step, ...]) -> list[str]:
    return [step.name for step in steps if step.due]


def test_the_plan_is_the_order_of_dvc_repro(toy: Toy) -> None:
    """This pins DVC's internal API: plan_repro, the graph's direction and `Stage.changed`."""
    steps = pipeline.plan()
    assert [step.name for step in steps] == PLAN == ran(toy.dvc("repro"))
    assert set(next(step for step in steps if step.name == "label@it002").parents) == {
        "sample@it002",
        "finetune@teacher",
    }
    assert due(steps) == PLAN
    assert due(pipeline.plan()) == []


def test_an_iteration_owns_its_stages_and_the_score_of_what_it_made(toy: Toy) -> None:
    owners = {step.name: step.iteration for step in pipeline.plan()}
    assert {owners[f"{verb}@it002"] for verb in EACH} | {owners["evaluate@final"]} == {"it002"}
    assert {
        owners[name]
        for name in ("finetune@teacher", "evaluate@start", "evaluate@teacher", "report")
    } == {None}


def test_an_iteration_of_grpo_has_no_labels(toy: Toy) -> None:
    toy.edit("params.yaml", "reinforcements: {}", "reinforcements: {rl001: it002, rl002: rl001}")
    toy.edit("params.yaml", "final: it002", "final: rl002")
    plan = pipeline.plan()
    iterations = {step.name: step.iteration for step in plan if "rl" in (step.iteration or "")}
    assert iterations == {
        "explore@rl001": "rl001",
        "reinforce@rl001": "rl001",
        "explore@rl002": "rl002",
        "reinforce@rl002": "rl002",
        "evaluate@final": "rl002",
    }
    names = ran(toy.dvc("repro", "reinforce@rl002"))
    assert [name for name in names if name.endswith(("rl001", "rl002"))] == list(iterations)[:4]
    assert toy.has("checkpoints/rl002", "trajectories/rl002")
    assert not toy.has("labels/rl001")
    assert due(pipeline.plan(["reinforce@rl002"])) == []


def test_a_teacher_may_be_made_by_grpo(toy: Toy) -> None:
    """As the paper's was: fine-tuned, then reinforced; the stage `label` comes after that."""
    toy.edit("params.yaml", "reinforcements: {}", "reinforcements: {rl001: teacher, rl002: rl001}")
    toy.edit("params.yaml", "label: {teacher: teacher}", "label: {teacher: rl002}")
    names = [step.name for step in pipeline.plan(["optimize@it001"])]
    assert (
        names.index("finetune@teacher")
        < names.index("reinforce@rl001")
        < names.index("reinforce@rl002")
        < names.index("label@it001")
    )
    assert (
        "reinforce@rl002"
        in next(
            step for step in pipeline.plan(["label@it001"]) if step.name == "label@it001"
        ).parents
    )


def test_the_plan_to_a_target_ends_there(toy: Toy) -> None:
    assert pipeline.plan(["sample@it001"])[-1].name == "sample@it001"
    with pytest.raises(ValueError, match="it009"):
        pipeline.plan(["sample@it009"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name
)
def test_an_example_is_a_run_of_dvc_yaml(toy: Toy, path: Path) -> None:
    """Every reference in dvc.yaml resolves, and every section that a stage depends on exists."""
    shutil.copy(path, toy.folder / "params.yaml")
    assert {*load(path).origins.values(), "report"} <= set(due(pipeline.plan()))


def test_a_section_that_a_stage_depends_on_is_asked_for_before_any_stage(toy: Toy) -> None:
    toy.edit("params.yaml", "finetune: {batch_size: 4}\n", "")
    message = (
        r"stage pretrain@base depends on \['finetune'\]; "
        r"expected these sections \(finetune: {} for the defaults\)"
    )
    with pytest.raises(ValueError, match=message):
        pipeline.plan()


@pytest.mark.parametrize(
    ("line", "absent"),
    [("adopt: {}\n", "adopt"), ("label: {teacher: teacher}\n", "label.teacher")],
)
def test_a_missing_key_that_dvc_yaml_reads_is_named(toy: Toy, line: str, absent: str) -> None:
    """DVC's own message names the place in dvc.yaml."""
    toy.edit("params.yaml", line, "")
    message = rf"params\.yaml: missing {absent}, which dvc\.yaml reads \(add `{absent}"
    with pytest.raises(ValueError, match=message):
        pipeline.plan()


# A fresh clone


@pytest.mark.parametrize(
    ("text", "hostile"),
    [
        ("iterations: {it001: student", 'iterations: {"it001$(touch PWNED)": student'),
        ("run: {name: toy", 'run: {name: "../victim"'),
    ],
)
def test_a_hostile_params_yaml_is_refused_before_dvc_reads_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, text: str, hostile: str
) -> None:
    toy.edit("params.yaml", text, hostile)
    monkeypatch.setattr(pipeline, "_survey", lambda *_: pytest.fail("DVC has read it"))
    with pytest.raises(ValueError, match=r"params\.yaml"):
        pipeline.plan()


def test_a_clone_without_demonstrations_starts_from_the_reference(clone: Toy) -> None:
    expected = [*ITERATIONS, "evaluate@final", "report"]
    assert due(pipeline.plan()) == expected
    assert ran(clone.dvc("repro", "--allow-missing")) == expected
    assert not clone.has("demonstrations")


def test_a_clone_remakes_demonstrations_only_for_a_checkpoint_that_needs_them(clone: Toy) -> None:
    clone.edit("params.yaml", "steps: 3", "steps: 5")
    steps = due(pipeline.plan())
    # The student may be due, if the demonstrations come out different.
    assert steps[:2] == ["demonstrate@main", "finetune@student"]
    assert "finetune@teacher" in steps
    assert not {"demonstrate@pre", "pretrain@base"} & set(steps)
    # DVC alone has to be asked for it.
    output = clone.dvc("repro", "--allow-missing", check=False)
    assert "failed to reproduce 'finetune@teacher'" in output
    assert set(ran(clone.dvc("repro", "finetune@teacher"))) == {
        "demonstrate@pre",
        "demonstrate@main",
        "finetune@teacher",
    }


def test_dvc_repro_teacher_student_rebuilds_the_reference(clone: Toy) -> None:
    """With targets, DVC's order varies from process to process; without, it is dvc.yaml's."""
    before = clone.lock
    targets = ("finetune@teacher", "finetune@student")
    demonstrations = {"demonstrate@pre", "demonstrate@main"}
    # Demonstrations come out the same, so checkpoints need not be made again.
    assert set(ran(clone.dvc("repro", *targets))) == demonstrations
    forced = set(ran(clone.dvc("repro", "--force", *targets)))
    assert forced == {*demonstrations, "pretrain@base", *targets}
    assert clone.lock == before


def test_accept_keeps_the_reference_through_an_edit_of_code_and_nothing_else(clone: Toy) -> None:
    clone.edit("vla_opd/data/action_space.py", "# stands", "# an edit that changes no result\n")
    assert "pretrain@base" in due(pipeline.plan())
    names = [
        "demonstrate",
        "pretrain@base",
        "finetune@teacher",
        "finetune@student",
        "evaluate@start",
        "evaluate@teacher",
    ]
    assert "demonstrate@main" in pipeline.accept(names)
    assert due(pipeline.plan()) == [*ITERATIONS, "evaluate@final", "report"]
    clone.edit("params.yaml", "steps: 3", "steps: 5")
    pipeline.accept(names)
    assert "finetune@teacher" in due(pipeline.plan())


def test_accept_never_accepts_an_artifact(toy: Toy) -> None:
    toy.dvc("repro", "pretrain@base")
    digest = toy.folder / "artifacts/toy/demonstrations/pre/digest"
    digest.unlink()
    digest.write_text("forged")
    pipeline.accept(["pretrain@base"])
    assert "pretrain@base" in due(pipeline.plan(["pretrain@base"]))


def test_accept_names_an_unknown_stage(toy: Toy) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        pipeline.accept(["nonsense"])


def test_due_is_what_is_needed() -> None:
    def step(name: str, *parents: str, stale: bool = False, missing: bool = False) -> Step:
        return Step(name, parents, stale=stale, missing=missing, due=False)

    chain = (step("a", missing=True), step("b", "a", missing=True), step("c", "b"))
    assert due(mark_due(chain)) == []
    assert due(mark_due((*chain[:2], step("c", "b", missing=True)))) == ["a", "b", "c"]
    assert due(mark_due((chain[0], step("b", "a"), step("c", "b", stale=True)))) == ["c"]
    assert due(mark_due((step("a", stale=True), step("b", "a"), step("c")))) == ["a", "b"]


# One stage


def test_bring_streams_and_says_whether_it_ran(toy: Toy) -> None:
    lines: list[Line] = []
    assert pipeline.reproduce("demonstrate@main", lines.append)
    texts = [line.text for line in lines if not line.chatter]
    assert texts == ["demonstrate main: from 0 inputs", "demonstrate: 1/2", "demonstrate: 2/2"]
    assert [line.text for line in lines if line.passing] == ["demonstrate: 1/2", "demonstrate: 2/2"]
    assert not pipeline.reproduce("demonstrate@main", lines.append)


@pytest.mark.parametrize("way", ["the flow's", "dvc repro"])
def test_an_artifact_that_came_from_the_cache_and_was_corrupted_is_restored(
    toy: Toy, way: str
) -> None:
    """A file in the workspace must not be the cache's: DVC trusts that one, and would keep it."""
    for old, new in (("0.1", "0.1"), ("0.1", "0.2"), ("0.2", "0.1")):
        toy.edit("params.yaml", f"noise: {old}", f"noise: {new}")
        toy.dvc("repro", "demonstrate@main")
    corrupted = toy.folder / "artifacts/toy/demonstrations/main/digest"
    good = corrupted.read_bytes()
    mode = corrupted.stat().st_mode
    corrupted.chmod(0o644)
    with corrupted.open("r+b") as file:
        file.write(bytes([good[0] ^ 1]))
    corrupted.chmod(mode)
    if way == "dvc repro":
        toy.dvc("repro", "demonstrate@main")
    else:
        pipeline.reproduce("demonstrate@main", lambda _: None)
    assert corrupted.read_bytes() == good


@pytest.mark.parametrize("kind", ["a file", "a list of files"])
def test_a_cache_that_was_spoilt_is_not_believed(toy: Toy, kind: str) -> None:
    toy.dvc("repro", "demonstrate@main")
    folder = toy.folder / "artifacts/toy/demonstrations/main"
    good = (folder / "digest").read_bytes()
    lock = toy.lock
    (corrupted,) = [
        path
        for path in (toy.folder / ".dvc/cache/files").rglob("*")
        if path.is_file() and (path.suffix == ".dir") == (kind != "a file")
    ]
    mode = corrupted.stat().st_mode
    corrupted.chmod(0o644)
    content = corrupted.read_bytes()
    if kind == "a file":
        corrupted.write_bytes(content.replace(good[:1], b"x"))
    else:
        corrupted.write_bytes(content.replace(b"digest", b"digesT"))
    corrupted.chmod(mode)
    shutil.rmtree(folder)
    lines: list[Line] = []
    assert pipeline.reproduce("demonstrate@main", lines.append)
    assert (folder / "digest").read_bytes() == good
    assert toy.lock == lock
    (warning,) = [line.text for line in lines if "was not what DVC had stored" in line.text]
    assert corrupted.relative_to(toy.folder).as_posix() in warning
    shutil.rmtree(folder)
    assert not pipeline.reproduce("demonstrate@main", lines.append), "the cache is whole again"
    assert (folder / "digest").read_bytes() == good


def test_the_last_lines_of_a_failing_stage_are_reported(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAILS", "demonstrate main")
    with pytest.raises(StageFailed) as failure:
        pipeline.reproduce("demonstrate@main", lambda _: None)
    assert "demonstrate main: no luck" in failure.value.output


def test_a_dvc_repro_by_hand_that_is_at_work_is_left_to_it_and_its_work_is_used(toy: Toy) -> None:
    with toy.started("repro", "demonstrate@main", TOY_SLEEPS="demonstrate main") as repro:
        assert repro.stdout is not None
        assert any(line == "demonstrate main: from 0 inputs\n" for line in repro.stdout)
        with pytest.raises(Busy):
            pipeline.plan(patience=0)
        with pytest.raises(Busy):
            pipeline.reproduce("demonstrate@main", lambda _: None)
        repro.stdout.read()
    assert repro.returncode == 0
    assert not pipeline.reproduce("demonstrate@main", lambda _: None)


def test_a_question_is_answered_while_a_stage_is_at_work(toy: Toy) -> None:
    with toy.started("repro", "demonstrate@main", TOY_SLEEPS="demonstrate main") as repro:
        assert repro.stdout is not None
        assert any(line == "demonstrate main: from 0 inputs\n" for line in repro.stdout)
        began = time.monotonic()
        states = {step.name: step for step in pipeline.inspect()}
        assert time.monotonic() - began < 4
        assert states["demonstrate@main"].at_work
        assert not states["demonstrate@pre"].at_work
        repro.stdout.read()
    assert not any(step.at_work for step in pipeline.inspect())


def test_a_question_has_the_answer_that_a_run_would_plan_by(toy: Toy) -> None:
    assert pipeline.inspect() == pipeline.plan()
    toy.dvc("repro", "finetune@teacher")
    toy.edit("params.yaml", "steps: 3", "steps: 5")
    assert pipeline.inspect() == pipeline.plan()
    assert any(step.due for step in pipeline.inspect())
    assert not all(step.due for step in pipeline.inspect())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_a_read_only_checkout_can_be_planned(toy: Toy) -> None:
    toy.dvc("repro", "finetune@teacher")
    expected = [f"{step.name} {step.due}" for step in pipeline.inspect()]
    shutil.rmtree(toy.folder / ".dvc/tmp")
    program = """
from flows import pipeline
for step in pipeline.inspect():
    print(f"{step.name} {step.due}")
"""
    folder = toy.folder
    mount = (
        f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && cd {folder} && "
        f'exec {sys.executable} -P -c "$0"'
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr and "permission" in done.stderr.lower():
        pytest.skip("this container can't mount")
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_folder_without_git_is_refused_with_the_remedy(toy: Toy) -> None:
    shutil.rmtree(toy.folder / ".git")
    message = (
        r"is not a git repository; DVC expects a git repository.*`git init`.*core\.no_scm true"
    )
    for command in (pipeline.plan, pipeline.inspect, lambda: pipeline.accept(["report"])):
        with pytest.raises(ValueError, match=message):
            command()
    toy.dvc("config", "--local", "core.no_scm", "true")
    assert pipeline.plan()


@pytest.mark.parametrize("linked", ["artifacts", "artifacts/toy", "artifacts/toy/demonstrations"])
def test_artifacts_behind_a_link_are_refused_before_any_stage(
    toy: Toy, tmp_path: Path, linked: str
) -> None:
    folder = toy.folder / linked
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for ask in (pipeline.plan, pipeline.inspect):
        with pytest.raises(
            ValueError,
            match=rf"{linked} is a link to .*elsewhere; expected a folder.*dvc cache dir",
        ):
            ask()
