"""The members of a study: which exist, their settings, and what each gets from others."""

from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import pipeline
from flows.members import (
    DONE,
    STUDIES,
    Member,
    continue_predecessor,
    fingerprint,
    has_same_recipe,
    is_done,
    oversubscription_warning,
    plan_iterations,
    prepare,
    process_environment,
    reference_stages,
    select_members,
    share_reference,
)
from tests.flows.toy import REFERENCE, Toy
from tests.vla_opd.analysis.test_bootstrap import update
from tests.vla_opd.lineage.manifests import publish
from vla_opd.analysis.study_table import Table, write
from vla_opd.artifacts.manifest import Kind
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.study import ArmParams

STUDY = """
studies:
  which:
    seeds: [3, 5]
    every: 2
    arms:
      plain: {distill: 3}
      other: {distill: 3, settings: {optimize.steps: 9, sample.group: 4}}
      both: {after: other, reinforce: 3}
"""


EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS: dict[str, Kind] = {
    "checkpoints/teacher": "checkpoint",
    "checkpoints/student": "checkpoint",
    "evaluations/start": "evaluation",
}
CHECKPOINT = Path("artifacts/toy/checkpoints/teacher")
TEACHER_LOCK = {"finetune@teacher": {"cmd": "x", "outs": [{"path": str(CHECKPOINT), "md5": "y"}]}}
TEACHER = {"parent": "base", "demonstrations": "main", "steps": 3, "learning_rate": 0.1}
STUDENT = TEACHER | {"steps": 2}


@pytest.fixture
def run(toy: Toy) -> Params:
    with Path("params.yaml").open("a") as file:
        file.write(STUDY)
    return load()


def read_member_params(member: Member) -> Params:
    return load(member.folder / "params.yaml")


def with_arms(run: Params, **arms: ArmParams) -> Params:
    study = run.studies["which"]
    study = study.model_copy(update={"arms": {**study.arms, **arms}})
    return run.model_copy(update={"studies": {"which": study}})


def with_settings(run: Params, section: str, **settings: object) -> Params:
    changed = getattr(run, section).model_copy(update=settings)
    return run.model_copy(update={section: changed})


def publish_teacher(name: str = "teacher") -> str:
    return publish(CHECKPOINT, "checkpoint", {}, name=name)


def test_members_are_ordered_by_seed(run: Params) -> None:
    members = [(member.arm, member.seed) for member in select_members("which", run)]
    assert members == [
        ("plain", 3),
        ("other", 3),
        ("both", 3),
        ("plain", 5),
        ("other", 5),
        ("both", 5),
    ]
    assert select_members("which", run, ["both"], [5]) == (Member("which", "both", 5),)


def test_additions_to_a_run_leave_its_members_as_they_were(run: Params) -> None:
    earlier = run.model_dump()
    study = earlier["studies"]["which"]
    study["arms"]["tuned"] = {"settings": {"finetuned.student.steps": 9}}
    finetuned = earlier["finetuned"]
    evaluations = earlier["evaluations"]
    changed_teacher = finetuned["teacher"] | {"steps": 7}

    def same(arm: str, **sections: object) -> bool:
        later = Params.model_validate(earlier | sections)
        member = Member("which", arm, 3)
        return has_same_recipe(member, later, Params.model_validate(earlier))

    added = {
        "finetuned": finetuned | {"kept": changed_teacher},
        "evaluations": evaluations | {"kept": "kept"},
    }
    assert same("both", **added)
    assert same("tuned", **added)
    assert not same("both", finetuned=finetuned | {"teacher": changed_teacher})

    optimize = earlier["optimize"] | {"steps": 8}
    assert not same("plain", optimize=optimize)
    assert same("other", optimize=optimize), "the arm has a setting of its own"

    evaluated_again = evaluations | {"again": "student"}
    assert not same("tuned", evaluations=evaluated_again), "the student is the arm's own"
    assert same("plain", evaluations=evaluated_again)
    assert not has_same_recipe(Member("which", "plain", 7), run, run)
    assert not has_same_recipe(Member("whose", "plain", 3), run, run)


def test_a_member_that_switches_at_another_success_is_another(run: Params) -> None:
    early = with_arms(run, both=ArmParams(after="other", reinforce=3, switch=0.5))
    late = with_arms(run, both=ArmParams(after="other", reinforce=3, switch=0.9))
    assert not has_same_recipe(Member("which", "both", 3), early, late)


def test_wandb_can_tell_members_apart_and_each_has_its_share_of_the_cores(
    run: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPD_WORKERS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    members = select_members("which", run)
    environments = [process_environment(member, run, parallel=3) for member in members]
    assert environments[2]["WANDB_RUN_GROUP"] == f"{run.run.name}/which/both/3"
    assert len({environment["WANDB_RUN_GROUP"] for environment in environments}) == 6
    assert environments[0]["OPD_WORKERS"] == "2"
    monkeypatch.setenv("OPD_WORKERS", "5")
    assert process_environment(members[0], run, parallel=3)["OPD_WORKERS"] == "5"


def test_oversubscribed_cores_are_warned_of(run: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    changed = with_settings(run, "optimize", threads=3)
    changed = with_settings(changed, "label", threads=1)
    assert oversubscription_warning(changed, parallel=1) is None
    few = with_settings(changed, "optimize", threads=1)
    assert oversubscription_warning(few, parallel=2) is None
    warning = oversubscription_warning(changed, parallel=2)
    assert warning is not None
    assert warning.startswith(
        "2 members at the same time on 4 cores, but label.threads is 1, optimize.threads is 3, "
        "reinforce.threads is 2"
    )


def test_an_arm_without_iterations_is_fine_tuned_by_the_members_seed(run: Params) -> None:
    """So are arms that continue it; an arm with its own student has the same one for every seed."""
    tuned = ArmParams(settings={"finetuned.student.steps": 7})
    own_student = tuned.model_copy(update={"distill": 1})
    changed = with_arms(run, sft=tuned, on=ArmParams(after="sft", distill=1), off=own_student)
    for arm, seed, expected in (
        ("sft", 5, 5),
        ("sft", run.run.seed, None),
        ("on", 5, 5),
        ("off", 5, None),
    ):
        member = Member("which", arm, seed)
        prepare(member, changed)
        student = read_member_params(member).finetuned["student"]
        assert (student.steps, student.seed) == (7, expected)


@pytest.mark.parametrize(
    ("study", "arms", "seeds", "message"),
    [
        ("nothing", [], [], r"studies has no 'nothing'; expected one of \['which'\]"),
        (
            "which",
            ["plane"],
            [],
            r"studies\.which\.arms has no 'plane'; expected some of \['plain', 'other', 'both'\]",
        ),
        ("which", [], [4], r"studies\.which\.seeds has no 4; expected some of \[3, 5\]"),
    ],
)
def test_an_unknown_study_arm_or_seed_is_named(
    run: Params, study: str, arms: list[str], seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_members(study, run, arms, seeds)


def test_evaluations_that_decide_early_are_refused(run: Params) -> None:
    message = r"evaluate\.decide is \[0\.8, 0\.9\]; expected null in a study"
    with pytest.raises(ValueError, match=message):
        select_members("which", with_settings(run, "evaluate", decide=(0.8, 0.9)))


def test_a_study_with_the_name_of_the_runs_report_is_refused(run: Params) -> None:
    studies = {"page": {"arms": {"a": {"distill": 1}}}}
    message = "studies has 'page': that is where the run's own report is"
    with pytest.raises(ValueError, match=message):
        Params.model_validate({**run.model_dump(), "studies": studies})


def test_an_arm_may_change_sections_that_its_predecessor_does_not_use(run: Params) -> None:
    arms = {
        "a": {"distill": 1},
        "b": {"after": "a", "reinforce": 1, "settings": {"reinforce.steps": 9}},
    }
    changed = Params.model_validate({**run.model_dump(), "studies": {"which": {"arms": arms}}})
    assert changed.studies["which"].arms["b"].settings == {"reinforce.steps": 9}


def test_a_member_is_done_until_its_settings_or_checkpoints_change(run: Params) -> None:
    member = Member("which", "plain", 3)
    prepare(member, run)
    assert not is_done(member, run)
    (member.folder / DONE).write_text(fingerprint(member, run))
    assert is_done(member, run)
    assert not is_done(member, with_settings(run, "optimize", steps=5))
    publish_teacher()
    assert not is_done(member, run)


def test_a_copy_that_was_killed_does_not_count(run: Params) -> None:
    """The manifest may arrive before the weights, so a copy is hidden until it is whole."""
    publish_teacher()
    write_lock(TEACHER_LOCK)
    member = Member("which", "plain", 3)
    target = prepare(member, run) / CHECKPOINT

    def link_and_die(source: Path, to: Path) -> None:
        copyfile(source, to)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flows.projects.link", link_and_die)
        share_reference(member, run)
    assert not target.exists()
    share_reference(member, run)
    assert (target / "file").is_file()


def test_a_teacher_that_iterations_made_is_refused(run: Params) -> None:
    message = r"label\.teacher is 'it001'; expected one of \['base', 'student', 'teacher'\]"
    with pytest.raises(ValueError, match=message):
        select_members("which", with_settings(run, "label", teacher="it001"))


def test_a_member_has_the_settings_of_its_arm_and_its_seed(run: Params) -> None:
    member = Member("which", "other", 5)
    prepare(member, run)
    params = read_member_params(member)
    assert (params.run.seed, params.run.learning_seed) == (0, 5)
    assert (params.optimize.steps, params.sample.group) == (9, 4)
    assert dict(params.iterations) == {"it001": "student", "it002": "it001", "it003": "it002"}
    assert dict(params.evaluations) == {
        "start": "student",
        "teacher": "teacher",
        "it002": "it002",
        "it003": "it003",
    }
    assert (params.report.final, params.studies, params.finetuned) == ("it003", {}, run.finetuned)
    assert member.folder == STUDIES / "which/other/5"


@pytest.mark.parametrize(
    "settings",
    [
        {"optimize.objective": {"name": "jsd", "beta": 0.3}},
        {"optimize.objective": "jsd", "optimize.objective.beta": 0.3},
        {"optimize.objective.name": "jsd", "optimize.objective.beta": 0.3},
        {"optimize.objective": {"name": "jsd"}, "optimize.objective.beta": 0.3},
    ],
)
def test_an_arm_may_have_an_objective_with_options(run: Params, settings: dict[str, Any]) -> None:
    arm = ArmParams(distill=1, settings=settings)
    before = arm.model_dump()
    member = Member("which", "jsd", 3)
    prepare(member, with_arms(run, jsd=arm))
    objective = read_member_params(member).optimize.objective
    assert objective.model_dump() == {"name": "jsd", "beta": 0.3}
    assert arm.model_dump() == before


def test_an_arm_with_an_option_in_its_former_place_is_told_the_present_one(run: Params) -> None:
    settings = {"optimize.objective": "jsd", "optimize.beta": 0.3}
    message = (
        r"arms\.jsd: (?s:.*)optimize\.beta moved: write `objective: \{name: jsd, beta: 0\.3\}`"
    )
    with pytest.raises(ValueError, match=message):
        prepare(
            Member("which", "jsd", 3),
            with_arms(run, jsd=ArmParams(distill=1, settings=settings)),
        )


def test_an_arm_continues_another_with_its_settings(run: Params) -> None:
    member = Member("which", "both", 3)
    prepare(member, run)
    params = read_member_params(member)
    assert params.optimize.steps == 9
    assert dict(params.reinforcements) == {"rl001": "it003", "rl002": "rl001", "rl003": "rl002"}
    assert list(params.evaluations) == ["start", "teacher", "it002", "it003", "rl002", "rl003"]


def test_an_arm_may_be_a_student_of_its_own(run: Params) -> None:
    changed = with_arms(run, sft=ArmParams(settings={"finetuned.student.steps": 7}))
    member = Member("which", "sft", 3)
    prepare(member, changed)
    params = read_member_params(member)
    assert params.finetuned["student"].steps == 7
    assert (params.iterations, params.reinforcements) == ({}, {})
    assert dict(params.evaluations) == {"start": "student", "teacher": "teacher"}
    assert changed.studies["which"].own_student("sft")
    assert not run.studies["which"].own_student("both")


def test_stretches_follow_each_other_and_are_scored_apart(run: Params) -> None:
    study = with_arms(run, third=ArmParams(after="both", distill=2)).studies["which"]
    names, scored = plan_iterations(Member("which", "third", 3), study)
    assert names == ["it001", "it002", "it003", "rl001", "rl002", "rl003", "it004", "it005"]
    assert scored == ["it002", "it003", "rl002", "rl003", "it005"]


def test_an_arm_switches_after_the_first_rollouts_that_are_good_enough(run: Params) -> None:
    changed = with_arms(
        run,
        early=ArmParams(after="plain", switch=0.6, reinforce=1),
        never=ArmParams(after="plain", switch=0.9, reinforce=1),
    )
    plain, early, never = (Member("which", arm, 3) for arm in ("plain", "early", "never"))
    for member in (plain, early, never):
        prepare(member, changed)
    before = read_member_params(early)
    assert list(before.iterations) == ["it001", "it002", "it003"], "where to switch is unknown yet"

    rows = [
        update("plain", 3, position, 1.0).model_copy(update={"success": success})
        for position, success in ((1, 0.35), (2, 0.7))
    ]
    rows.append(update("plain", 3, 3, 1.0))
    write(Table((), tuple(rows)), plain.folder / "table")
    message = (
        r"early, seed 3 switches at a success rate of plain, seed 3, which is not done; "
        r"expected plain, seed 3 to be done first"
    )
    with pytest.raises(ValueError, match=message):
        continue_predecessor(early, changed)

    (plain.folder / DONE).write_text(fingerprint(plain, changed))
    for member in (early, never):
        continue_predecessor(member, changed)
    params = read_member_params(early)
    assert list(params.iterations) == ["it001", "it002"]
    assert dict(params.reinforcements) == {"rl001": "it002"}
    assert list(params.evaluations) == ["start", "teacher", "it002", "rl001"]
    assert list(read_member_params(never).iterations) == ["it001", "it002", "it003"]


def test_an_arm_that_makes_no_valid_run_is_refused_and_nothing_is_written(run: Params) -> None:
    arm = ArmParams(distill=1, settings={"optimize.stepz": 9})
    message = r"studies\.which\.arms\.wrong: (?s:.*)optimize\.stepz is 9 \(no such key\)"
    with pytest.raises(ValueError, match=message):
        prepare(Member("which", "wrong", 3), with_arms(run, wrong=arm))
    assert not (STUDIES / "which/wrong/3/params.yaml").exists()


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {}}, "expected at least one iteration"),
        ({"a": {"distill": 1, "after": "b"}}, r"arms\.a\.after is 'b'; expected another arm"),
        ({"a": {"distill": 1, "after": "b"}, "b": {"distill": 1, "after": "a"}}, "is a cycle"),
        (
            {"a": {"distill": 1, "settings": {"evaluate.horizon": 9}}},
            r"settings has 'evaluate\.horizon'; expected section\.key with one of the sections",
        ),
        (
            {
                "a": {"distill": 1},
                "b": {"after": "a", "reinforce": 1, "settings": {"optimize.steps": 9}},
            },
            r"arms\.b\.settings has 'optimize\.steps'; expected the settings of a, which it",
        ),
        (
            {"a": {"distill": 1, "switch": 0.5}},
            r"switch is 0\.5 and after is null; expected the arm after which it switches",
        ),
        (
            {"a": {"distill": 1, "settings": {"optimize": {"steps": 9}}}},
            r"settings has 'optimize'; expected section\.key with one of the sections",
        ),
        ({}, "at least 1"),
    ],
)
def test_studies_that_make_no_sense_are_refused(
    run: Params, arms: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Params.model_validate({**run.model_dump(), "studies": {"which": {"arms": arms}}})


def test_a_member_has_the_reference_and_need_not_make_it(
    clone: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's stages write no manifests, by which artifacts are recognized."""
    with Path("params.yaml").open("a") as file:
        file.write(STUDY)
    run = load()
    stages = reference_stages(run)
    assert stages == ["pretrain@base", "finetune@teacher", "finetune@student", *REFERENCE]
    member = Member("which", "plain", 3)
    folder = prepare(member, run).resolve()
    share_reference(member, run)
    assert not list(folder.glob("$*")), "a reference of dvc.yaml was taken for a folder of code"
    assert not (folder / "artifacts").exists(), "an artifact without a manifest was copied"
    monkeypatch.chdir(folder)
    assert sorted(read_locked(Path())) == sorted([*stages, "demonstrate@main", "demonstrate@pre"])
    steps = {step.name: step for step in pipeline.plan(["evaluate@it003"])}
    assert not steps["finetune@teacher"].stale
    assert steps["sample@it001"].stale


def write_lock(entries: dict[str, object], folder: Path = Path()) -> None:
    with (folder / "dvc.lock").open("w") as file:
        YAML(typ="safe").dump({"schema": "2.0", "stages": entries}, file)


def read_locked(folder: Path) -> list[str]:
    return list(YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"])


def test_artifacts_that_the_arms_settings_make_otherwise_stay(run: Params) -> None:
    """An arm with its own student gets the teacher, but makes that student and its evaluation."""
    artifacts = Path("artifacts/toy")
    digests = {name: publish(artifacts / name, kind, {}, name=name) for name, kind in KINDS.items()}

    def entry(out: str, **made_from: object) -> dict[str, object]:
        outs = [{"path": str(artifacts / out), "md5": "y"}]
        return {"cmd": "x", "outs": outs, **made_from}

    def settings(name: str, values: dict[str, object]) -> dict[str, object]:
        return {"params.yaml": {f"finetuned.{name}": {**values}}}

    student_dep = {"path": str(artifacts / "checkpoints/student"), "md5": "y"}
    write_lock(
        {
            "finetune@teacher": entry("checkpoints/teacher", params=settings("teacher", TEACHER)),
            "finetune@student": entry("checkpoints/student", params=settings("student", STUDENT)),
            "evaluate@start": entry("evaluations/start", deps=[student_dep]),
        }
    )
    changed = with_arms(run, sft=ArmParams(settings={"finetuned.student.steps": 7}))
    member = Member("which", "sft", 3)
    folder = prepare(member, changed)
    share_reference(member, changed)
    assert read_locked(folder) == ["finetune@teacher"]

    copies = folder / artifacts
    student = publish(copies / "checkpoints/student", "checkpoint", {}, name="own")
    share_reference(member, changed)
    assert student in (copies / "checkpoints/student/manifest.json").read_text()
    teacher = (copies / "checkpoints/teacher/manifest.json").read_text()
    assert digests["checkpoints/teacher"] in teacher
    assert not (copies / "evaluations/start").exists()


def test_an_artifact_of_the_reference_is_copied_once(run: Params) -> None:
    digest = publish_teacher()
    write_lock(TEACHER_LOCK)
    member = Member("which", "plain", 3)
    copied = prepare(member, run) / CHECKPOINT / "manifest.json"
    share_reference(member, run)
    assert digest in copied.read_text()
    before = copied.stat().st_ino
    share_reference(member, run)
    assert copied.stat().st_ino == before
    publish_teacher("another")
    share_reference(member, run)
    assert copied.read_text() == (CHECKPOINT / "manifest.json").read_text()


def test_a_member_gets_what_its_predecessor_has_made(run: Params) -> None:
    before = Member("which", "other", 3)
    after = Member("which", "both", 3)
    for member in (before, after):
        prepare(member, run)
    continue_predecessor(before, run)  # it has none
    checkpoint = Path("artifacts/toy/checkpoints/it001")
    discarded = Path("artifacts/toy/.discarded/labels/it001")
    digest = publish(before.folder / checkpoint, "checkpoint", {}, name="it001")
    outs = [{"path": str(checkpoint), "md5": "y"}]
    write_lock({"optimize@it001": {"cmd": "x", "outs": outs}}, before.folder)
    (before.folder / discarded).mkdir(parents=True)
    (before.folder / discarded / "manifest.json").write_text("{}")
    continue_predecessor(after, run)
    assert digest in (after.folder / checkpoint / "manifest.json").read_text()
    assert (after.folder / discarded / "manifest.json").is_file()
    assert "optimize@it001" in read_locked(after.folder)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_an_example_is_a_whole_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copyfile(example, "params.yaml")
    for name in ("dvc.yaml", ".dvcignore"):
        copyfile(EXAMPLES.parent / name, name)
    run = load()
    for name, study in run.studies.items():
        for member in select_members(name, run):
            prepare(member, run)
            names, _ = plan_iterations(member, study)
            assert len(read_member_params(member).updates) == len(names)
