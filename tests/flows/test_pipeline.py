"""What DVC's plan, locks and missing data do, on the real dvc.yaml over toy stages."""

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

MADE = [
    "demonstrate@pre",
    "pretrain@base",
    "demonstrate@main",
    "finetune@student",
    "evaluate@start",
    "finetune@teacher",
]
EACH = ["sample", "label", "optimize"]
ITERATIONS = [f"{verb}@{iteration}" for iteration in ("it001", "it002") for verb in EACH]
PLAN = [*MADE, *ITERATIONS, "evaluate@final", "evaluate@teacher", "report"]


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
    own = {step.name: step.iteration for step in plan if "rl" in (step.iteration or "")}
    assert own == {
        "explore@rl001": "rl001",
        "reinforce@rl001": "rl001",
        "explore@rl002": "rl002",
        "reinforce@rl002": "rl002",
        "evaluate@final": "rl002",
    }
    said = toy.dvc("repro", "reinforce@rl002")
    assert [name for name in ran(said) if name.endswith(("rl001", "rl002"))] == list(own)[:4]
    assert toy.has("checkpoints/rl002", "trajectories/rl002")
    assert not toy.has("logits/rl001")
    assert due(pipeline.plan(["reinforce@rl002"])) == []


def test_a_teacher_may_be_made_by_grpo(toy: Toy) -> None:
    """As the paper's was: fine-tuned, then reinforced; whoever labels comes after that."""
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
    """As `make run` begins: every reference in dvc.yaml resolves, and every section that a stage depends on is there."""
    shutil.copy(path, toy.folder / "params.yaml")
    assert {*load(path).origins.values(), "report"} <= set(due(pipeline.plan()))


def test_a_section_that_a_stage_depends_on_is_asked_for_before_any_stage(toy: Toy) -> None:
    toy.edit("params.yaml", "finetune: {batch_size: 4}\n", "")
    with pytest.raises(
        ValueError,
        match=r"stage pretrain@base depends on \['finetune'\]; expected these sections \(finetune: {} for the defaults\)",
    ):
        pipeline.plan()


@pytest.mark.parametrize(
    ("there", "absent"),
    [("adopt: {}\n", "adopt"), ("label: {teacher: teacher}\n", "label.teacher")],
)
def test_what_dvc_yaml_reads_is_asked_for_by_name(toy: Toy, there: str, absent: str) -> None:
    """DVC itself says where in dvc.yaml it couldn't find something."""
    toy.edit("params.yaml", there, "")
    with pytest.raises(
        ValueError,
        match=rf"params\.yaml: missing {absent}, which dvc\.yaml reads \(add it, if only as {{}} or its default\)",
    ):
        pipeline.plan()


# A fresh clone


@pytest.mark.parametrize(
    ("what", "hostile"),
    [
        ("iterations: {it001: student", 'iterations: {"it001$(touch PWNED)": student'),
        ("run: {name: toy", 'run: {name: "../victim"'),
    ],
)
def test_a_hostile_params_yaml_is_refused_before_dvc_reads_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, what: str, hostile: str
) -> None:
    toy.edit("params.yaml", what, hostile)
    monkeypatch.setattr(pipeline, "_survey", lambda *_: pytest.fail("DVC has read it"))
    with pytest.raises(ValueError, match=r"params\.yaml"):
        pipeline.plan()


def test_a_clone_without_demonstrations_goes_on_from_the_reference(clone: Toy) -> None:
    rest = [*ITERATIONS, "evaluate@final", "report"]
    assert due(pipeline.plan()) == rest
    assert ran(clone.dvc("repro", "--allow-missing")) == rest
    assert not clone.has("demonstrations")


def test_a_clone_remakes_demonstrations_only_for_a_checkpoint_that_needs_them(clone: Toy) -> None:
    clone.edit("params.yaml", "steps: 3", "steps: 5")
    steps = due(pipeline.plan())
    assert steps[:2] == [
        "demonstrate@main",
        "finetune@student",
    ]  # the student may be due, if the demonstrations come out different
    assert "finetune@teacher" in steps
    assert not {"demonstrate@pre", "pretrain@base"} & set(steps)
    assert "failed to reproduce 'finetune@teacher'" in clone.dvc(
        "repro", "--allow-missing", check=False
    )  # DVC alone has to be told
    assert set(ran(clone.dvc("repro", "finetune@teacher"))) == {
        "demonstrate@pre",
        "demonstrate@main",
        "finetune@teacher",
    }


def test_dvc_repro_teacher_student_rebuilds_the_reference(clone: Toy) -> None:
    """With targets, DVC's own order varies from process to process (it walks a set); without, it is that of dvc.yaml."""
    before = clone.lock
    demonstrations = {"demonstrate@pre", "demonstrate@main"}
    assert (
        set(ran(clone.dvc("repro", "finetune@teacher", "finetune@student"))) == demonstrations
    )  # they are the same, and so the checkpoints
    assert set(
        ran(clone.dvc("repro", "--force", "finetune@teacher", "finetune@student"))
    ) == demonstrations | {
        "pretrain@base",
        "finetune@teacher",
        "finetune@student",
    }
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
    heard: list[Line] = []
    assert pipeline.bring("demonstrate@main", heard.append)
    said = [line.text for line in heard if not line.chatter]
    assert said == ["demonstrate main: from 0 inputs", "demonstrate: 1/2", "demonstrate: 2/2"]
    assert [line.text for line in heard if line.passing] == ["demonstrate: 1/2", "demonstrate: 2/2"]
    assert not pipeline.bring("demonstrate@main", heard.append)


@pytest.mark.parametrize("way", ["the flow's", "dvc repro"])
def test_an_artifact_that_came_from_the_cache_and_was_spoilt_is_made_good(
    toy: Toy, way: str
) -> None:
    """What lies in the workspace must not be the cache's own file: DVC trusts that one, and would leave it as it is."""
    for old, new in (("0.1", "0.1"), ("0.1", "0.2"), ("0.2", "0.1")):
        toy.edit("params.yaml", f"noise: {old}", f"noise: {new}")
        toy.dvc("repro", "demonstrate@main")
    spoilt = toy.folder / "artifacts/toy/demonstrations/main/digest"
    good, mode = spoilt.read_bytes(), spoilt.stat().st_mode
    spoilt.chmod(0o644)
    with spoilt.open("r+b") as file:
        file.write(bytes([good[0] ^ 1]))
    spoilt.chmod(mode)
    if way == "dvc repro":
        toy.dvc("repro", "demonstrate@main")
    else:
        pipeline.bring("demonstrate@main", lambda _: None)
    assert spoilt.read_bytes() == good


@pytest.mark.parametrize("kind", ["a file", "a list of files"])
def test_a_cache_that_was_spoilt_is_not_believed(toy: Toy, kind: str) -> None:
    toy.dvc("repro", "demonstrate@main")
    made = toy.folder / "artifacts/toy/demonstrations/main"
    good, lock = (made / "digest").read_bytes(), toy.lock
    (spoilt,) = [
        path
        for path in (toy.folder / ".dvc/cache/files").rglob("*")
        if path.is_file() and (path.suffix == ".dir") == (kind != "a file")
    ]
    mode = spoilt.stat().st_mode
    spoilt.chmod(0o644)
    spoilt.write_bytes(
        spoilt.read_bytes().replace(good[:1], b"x")
        if kind == "a file"
        else spoilt.read_bytes().replace(b"digest", b"digesT")
    )
    spoilt.chmod(mode)
    shutil.rmtree(made)
    heard: list[Line] = []
    assert pipeline.bring("demonstrate@main", heard.append)
    assert (made / "digest").read_bytes() == good
    assert toy.lock == lock
    (told,) = [line.text for line in heard if "was not what DVC had stored" in line.text]
    assert spoilt.relative_to(toy.folder).as_posix() in told
    shutil.rmtree(made)
    assert not pipeline.bring(
        "demonstrate@main", heard.append
    )  # from the cache, which is whole again
    assert (made / "digest").read_bytes() == good


def test_a_failing_stage_hands_back_its_last_words(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAILS", "demonstrate main")
    with pytest.raises(StageFailed) as failure:
        pipeline.bring("demonstrate@main", lambda _: None)
    assert "demonstrate main: no luck" in failure.value.said


def test_a_dvc_repro_by_hand_that_is_at_work_is_left_to_it_and_its_work_is_used(toy: Toy) -> None:
    with toy.started("repro", "demonstrate@main", TOY_SLEEPS="demonstrate main") as other:
        assert other.stdout is not None
        assert any(line == "demonstrate main: from 0 inputs\n" for line in other.stdout)
        with pytest.raises(Busy):
            pipeline.plan(patience=0)
        with pytest.raises(Busy):
            pipeline.bring("demonstrate@main", lambda _: None)
        other.stdout.read()
    assert other.returncode == 0
    assert not pipeline.bring("demonstrate@main", lambda _: None)


def test_a_question_is_answered_while_a_stage_is_at_work(toy: Toy) -> None:
    with toy.started("repro", "demonstrate@main", TOY_SLEEPS="demonstrate main") as other:
        assert other.stdout is not None
        assert any(line == "demonstrate main: from 0 inputs\n" for line in other.stdout)
        began = time.monotonic()
        states = {step.name: step for step in pipeline.inspect()}
        assert time.monotonic() - began < 4
        assert states["demonstrate@main"].at_work
        assert not states["demonstrate@pre"].at_work
        other.stdout.read()
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
    asked = "from flows import pipeline; print(*(f'{step.name} {step.due}' for step in pipeline.inspect()), sep='\\n')"
    mount = f'mount --bind {toy.folder} {toy.folder} && mount -o remount,ro,bind {toy.folder} && cd {toy.folder} && exec {sys.executable} -P -c "$0"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, asked],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr and "permission" in done.stderr.lower():
        pytest.skip("this container can't mount")
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_folder_without_git_is_told_what_to_do(toy: Toy) -> None:
    shutil.rmtree(toy.folder / ".git")
    for ask in (pipeline.plan, pipeline.inspect, lambda: pipeline.accept(["report"])):
        with pytest.raises(
            ValueError,
            match=r"is not a git repository; expected a git repository.*`git init`.*core\.no_scm true",
        ):
            ask()
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
