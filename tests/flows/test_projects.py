"""The members of a study: which there are, what each is told, and what it is given."""

from pathlib import Path
from shutil import copyfile

import pytest
from ruamel.yaml import YAML

from flows import pipeline
from flows.projects import (
    DONE,
    STUDIES,
    Member,
    chain,
    crowded,
    environment,
    fingerprint,
    go_on,
    hand_over,
    is_done,
    made_alike,
    members,
    prepare,
    reference,
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
TEACHER = {"parent": "base", "demonstrations": "main", "steps": 3, "learning_rate": 0.1}
STUDENT = TEACHER | {"steps": 2}


@pytest.fixture
def run(toy: Toy) -> Params:
    with Path("params.yaml").open("a") as file:
        file.write(STUDY)
    return load()


def told(member: Member) -> Params:
    return load(member.folder / "params.yaml")


def test_seed_by_seed(run: Params) -> None:
    found = [(member.arm, member.seed) for member in members("which", run)]
    assert found == [
        ("plain", 3),
        ("other", 3),
        ("both", 3),
        ("plain", 5),
        ("other", 5),
        ("both", 5),
    ]
    assert [(m.arm, m.seed) for m in members("which", run, ["both"], [5])] == [("both", 5)]


def test_what_a_run_has_besides_makes_no_other_members(run: Params) -> None:
    its = run.model_dump()
    its["studies"]["which"]["arms"]["tuned"] = {"settings": {"finetuned.student.steps": 9}}

    def alike(arm: str, **sections: object) -> bool:
        return made_alike(
            Member("which", arm, 3), *map(Params.model_validate, (its | sections, its))
        )

    added = its["finetuned"]["teacher"] | {"steps": 7}
    more = {
        "finetuned": its["finetuned"] | {"kept": added},
        "evaluations": its["evaluations"] | {"kept": "kept"},
    }
    assert alike("both", **more)
    assert alike("tuned", **more)
    assert not alike("both", finetuned=its["finetuned"] | {"teacher": added})
    assert not alike("plain", optimize=its["optimize"] | {"steps": 8})
    assert alike("other", optimize=its["optimize"] | {"steps": 8})  # it says another number itself
    assert not alike(
        "tuned", evaluations=its["evaluations"] | {"again": "student"}
    )  # of which such an arm's rows are
    assert alike("plain", evaluations=its["evaluations"] | {"again": "student"})
    before = its["studies"]["which"]
    arms = [
        before["arms"] | {"both": {"after": "other", "reinforce": 3, "switch": at}}
        for at in (0.5, 0.9)
    ]
    assert not made_alike(
        Member("which", "both", 3),
        *(
            Params.model_validate(its | {"studies": {"which": before | {"arms": one}}})
            for one in arms
        ),
    )
    assert not made_alike(Member("which", "plain", 7), run, run)
    assert not made_alike(Member("whose", "plain", 3), run, run)


def test_wandb_can_tell_members_apart_and_each_has_its_share_of_the_cores(
    run: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPD_WORKERS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    every = [environment(member, run, parallel=3) for member in members("which", run)]
    assert every[2]["WANDB_RUN_GROUP"] == f"{run.run.name}/which/both/3"
    assert len({one["WANDB_RUN_GROUP"] for one in every}) == 6
    assert every[0]["OPD_WORKERS"] == "2"
    monkeypatch.setenv("OPD_WORKERS", "5")
    assert environment(members("which", run)[0], run, parallel=3)["OPD_WORKERS"] == "5"


def test_members_that_would_fight_for_the_cores_are_warned_of(
    run: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    its = run.model_copy(
        update={
            "optimize": run.optimize.model_copy(update={"threads": 3}),
            "label": run.label.model_copy(update={"threads": 1}),
        }
    )
    assert crowded(its, parallel=1) is None
    assert crowded(its.model_copy(update={"optimize": its.label}), parallel=2) is None
    said = crowded(its, parallel=2)
    assert said is not None
    assert said.startswith(
        "2 members at the same time on 4 cores, but label.threads is 1, optimize.threads is 3, reinforce.threads is 2"
    )


def test_an_arm_without_iterations_is_fine_tuned_by_the_members_seed(run: Params) -> None:
    """So are those that go on from it; whoever learns from a student of its own has the same one with every seed."""
    tuned = ArmParams(settings={"finetuned.student.steps": 7})
    its = arms(
        run,
        sft=tuned,
        on=ArmParams(after="sft", distill=1),
        off=tuned.model_copy(update={"distill": 1}),
    )
    for arm, seed, drawn_by in (
        ("sft", 5, 5),
        ("sft", run.run.seed, None),
        ("on", 5, 5),
        ("off", 5, None),
    ):
        prepare(Member("which", arm, seed), its)
        its_own = told(Member("which", arm, seed))
        assert (its_own.finetuned["student"].steps, its_own.finetuned["student"].seed) == (
            7,
            drawn_by,
        )


@pytest.mark.parametrize(
    ("study", "arms", "seeds", "said"),
    [
        ("what", [], [], r"studies has no 'what'; expected one of \['which'\]"),
        (
            "which",
            ["plane"],
            [],
            r"studies\.which\.arms has no 'plane'; expected some of \['plain', 'other', 'both'\]",
        ),
        ("which", [], [4], r"studies\.which\.seeds has no 4; expected some of \[3, 5\]"),
    ],
)
def test_who_is_not_there_is_named(
    run: Params, study: str, arms: list[str], seeds: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        members(study, run, arms, seeds)


def test_what_a_study_cannot_do_is_refused(run: Params) -> None:
    with pytest.raises(
        ValueError, match=r"evaluate\.decide is \[0\.8, 0\.9\]; expected null in a study"
    ):
        members(
            "which",
            run.model_copy(
                update={"evaluate": run.evaluate.model_copy(update={"decide": (0.8, 0.9)})}
            ),
        )
    with pytest.raises(
        ValueError, match="studies has 'page': that is where the run's own report is"
    ):
        Params.model_validate(
            {**run.model_dump(), "studies": {"page": {"arms": {"a": {"distill": 1}}}}}
        )


def test_settings_of_another_section_do_not_touch_what_goes_before(run: Params) -> None:
    its = {
        "a": {"distill": 1},
        "b": {"after": "a", "reinforce": 1, "settings": {"reinforce.steps": 9}},
    }
    assert Params.model_validate({**run.model_dump(), "studies": {"which": {"arms": its}}}).studies[
        "which"
    ].arms["b"].settings == {"reinforce.steps": 9}


def test_a_member_is_done_while_it_is_made_from_what_it_would_be_made_from(run: Params) -> None:
    member = Member("which", "plain", 3)
    prepare(member, run)
    assert not is_done(member, run)
    (member.folder / DONE).write_text(fingerprint(member, run))
    assert is_done(member, run)
    assert not is_done(
        member, run.model_copy(update={"optimize": run.optimize.model_copy(update={"steps": 5})})
    )
    publish(Path("artifacts/toy/checkpoints/teacher"), "checkpoint", {}, name="teacher")
    assert not is_done(member, run)


def test_a_copy_that_was_killed_does_not_count(run: Params) -> None:
    """The manifest may arrive before the weights: so a copy has another name until it is whole."""
    publish(Path("artifacts/toy/checkpoints/teacher"), "checkpoint", {}, name="teacher")
    lock(
        {
            "finetune@teacher": {
                "cmd": "x",
                "outs": [{"path": "artifacts/toy/checkpoints/teacher", "md5": "y"}],
            }
        }
    )
    member = Member("which", "plain", 3)
    target = prepare(member, run) / "artifacts/toy/checkpoints/teacher"

    def killed(source: Path, to: Path) -> None:
        copyfile(source, to)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flows.projects.link", killed)
        hand_over(member, run)
    assert not target.exists()
    hand_over(member, run)
    assert (target / "file").is_file()


def test_a_teacher_that_iterations_made_is_refused(run: Params) -> None:
    with pytest.raises(
        ValueError,
        match=r"label\.teacher is 'it001'; expected one of \['base', 'student', 'teacher'\]",
    ):
        members(
            "which",
            run.model_copy(update={"label": run.label.model_copy(update={"teacher": "it001"})}),
        )


def test_a_member_is_told_its_arm_and_its_seed(run: Params) -> None:
    prepare(Member("which", "other", 5), run)
    its = told(Member("which", "other", 5))
    assert (its.run.seed, its.run.learning_seed, its.optimize.steps, its.sample.group) == (
        0,
        5,
        9,
        4,
    )
    assert dict(its.iterations) == {"it001": "student", "it002": "it001", "it003": "it002"}
    assert dict(its.evaluations) == {
        "start": "student",
        "teacher": "teacher",
        "it002": "it002",
        "it003": "it003",
    }
    assert (its.report.final, its.studies, its.finetuned) == ("it003", {}, run.finetuned)
    assert Member("which", "other", 5).folder == STUDIES / "which/other/5"


def test_an_arm_goes_on_from_another_with_its_settings(run: Params) -> None:
    prepare(Member("which", "both", 3), run)
    its = told(Member("which", "both", 3))
    assert its.optimize.steps == 9
    assert dict(its.reinforcements) == {"rl001": "it003", "rl002": "rl001", "rl003": "rl002"}
    assert list(its.evaluations) == ["start", "teacher", "it002", "it003", "rl002", "rl003"]


def test_an_arm_may_be_a_student_of_its_own(run: Params) -> None:
    arm = ArmParams(settings={"finetuned.student.steps": 7})
    study = run.studies["which"].model_copy(update={"arms": {"sft": arm}})
    prepare(Member("which", "sft", 3), run.model_copy(update={"studies": {"which": study}}))
    its = told(Member("which", "sft", 3))
    assert its.finetuned["student"].steps == 7
    assert (its.iterations, its.reinforcements, dict(its.evaluations)) == (
        {},
        {},
        {"start": "student", "teacher": "teacher"},
    )
    assert study.own_student("sft")
    assert not run.studies["which"].own_student("both")


def arms(run: Params, **changes: ArmParams) -> Params:
    study = run.studies["which"]
    return run.model_copy(
        update={"studies": {"which": study.model_copy(update={"arms": {**study.arms, **changes}})}}
    )


def test_stretches_follow_each_other_and_are_scored_apart(run: Params) -> None:
    third = arms(run, third=ArmParams(after="both", distill=2)).studies["which"]
    names, scored = chain(Member("which", "third", 3), third)
    assert names == ["it001", "it002", "it003", "rl001", "rl002", "rl003", "it004", "it005"]
    assert scored == ["it002", "it003", "rl002", "rl003", "it005"]


def test_an_arm_switches_where_the_other_s_rollouts_first_were_good_enough(run: Params) -> None:
    changed = arms(
        run,
        early=ArmParams(after="plain", switch=0.6, reinforce=1),
        never=ArmParams(after="plain", switch=0.9, reinforce=1),
    )
    plain, early, never = (Member("which", arm, 3) for arm in ("plain", "early", "never"))
    for member in (plain, early, never):
        prepare(member, changed)
    assert list(told(early).iterations) == ["it001", "it002", "it003"]  # as far as one knows by now
    rows = [
        update("plain", 3, position, 1.0).model_copy(update={"success": 0.35 * position})
        for position in (1, 2)
    ]
    write(Table((), (*rows, update("plain", 3, 3, 1.0))), plain.folder / "table")
    with pytest.raises(
        ValueError,
        match=r"early, seed 3 switches by the rollouts of plain, seed 3, which isn't done; expected it first",
    ):
        go_on(early, changed)
    (plain.folder / DONE).write_text(fingerprint(plain, changed))
    for member in (early, never):
        go_on(member, changed)
    assert (list(told(early).iterations), dict(told(early).reinforcements)) == (
        ["it001", "it002"],
        {"rl001": "it002"},
    )
    assert list(told(never).iterations) == ["it001", "it002", "it003"]
    assert list(told(early).evaluations) == ["start", "teacher", "it002", "rl001"]


def test_an_arm_that_makes_no_valid_run_is_refused_and_nothing_is_written(run: Params) -> None:
    arm = ArmParams(distill=1, settings={"optimize.stepz": 9})
    wrong = run.model_copy(
        update={
            "studies": {"which": run.studies["which"].model_copy(update={"arms": {"wrong": arm}})}
        }
    )
    with pytest.raises(
        ValueError,
        match=r"studies\.which\.arms\.wrong: (?s:.*)optimize\.stepz is 9 \(no such key\)",
    ):
        prepare(Member("which", "wrong", 3), wrong)
    assert not (STUDIES / "which/wrong/3/params.yaml").exists()


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"a": {}}, "expected at least one iteration"),
        ({"a": {"distill": 1, "after": "b"}}, r"arms\.a\.after is 'b'; expected another arm"),
        ({"a": {"distill": 1, "after": "b"}, "b": {"distill": 1, "after": "a"}}, "is a circle"),
        (
            {"a": {"distill": 1, "settings": {"evaluate.horizon": 9}}},
            r"settings has 'evaluate\.horizon'; expected section\.key with one of the sections",
        ),
        (
            {
                "a": {"distill": 1},
                "b": {"after": "a", "reinforce": 1, "settings": {"optimize.steps": 9}},
            },
            r"arms\.b\.settings has 'optimize\.steps'; expected those of a, which it goes on from",
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
    run: Params, arms: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Params.model_validate({**run.model_dump(), "studies": {"which": {"arms": arms}}})


def test_a_member_has_the_reference_and_need_not_make_it(
    clone: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's stages write no manifests, by which artifacts are known: they get some here."""
    with Path("params.yaml").open("a") as file:
        file.write(STUDY)
    run = load()
    assert reference(run) == ["pretrain@base", "finetune@teacher", "finetune@student", *REFERENCE]
    member = Member("which", "plain", 3)
    folder = prepare(member, run).resolve()
    hand_over(member, run)
    assert not list(folder.glob("$*"))  # dvc.yaml's references aren't folders of code
    assert not (
        folder / "artifacts"
    ).exists()  # what has no manifest isn't whole, and isn't handed on
    monkeypatch.chdir(folder)
    lock = YAML(typ="safe").load(Path("dvc.lock").read_text())["stages"]
    assert sorted(lock) == sorted([*reference(run), "demonstrate@main", "demonstrate@pre"])
    states = {step.name: step for step in pipeline.plan(["evaluate@it003"])}
    assert not states["finetune@teacher"].stale
    assert states["sample@it001"].stale


def lock(entries: dict[str, object], folder: Path = Path()) -> None:
    with (folder / "dvc.lock").open("w") as file:
        YAML(typ="safe").dump({"schema": "2.0", "stages": entries}, file)


def test_what_its_settings_make_otherwise_is_its_own_and_stays(run: Params) -> None:
    """An arm with another student is given the teacher, but neither the student nor the evaluation of it: those it makes, once."""
    made = Path("artifacts/toy")
    digests = {name: publish(made / name, kind, {}, name=name) for name, kind in KINDS.items()}
    outs = {name: {"cmd": "x", "outs": [{"path": str(made / name), "md5": "y"}]} for name in KINDS}
    shared = {
        "finetune@teacher": outs["checkpoints/teacher"]
        | {"params": {"params.yaml": {"finetuned.teacher": {**TEACHER}}}},
        "finetune@student": outs["checkpoints/student"]
        | {"params": {"params.yaml": {"finetuned.student": {**STUDENT}}}},
        "evaluate@start": outs["evaluations/start"]
        | {"deps": [{"path": str(made / "checkpoints/student"), "md5": "y"}]},
    }
    lock(shared)
    study = run.studies["which"].model_copy(
        update={"arms": {"sft": ArmParams(settings={"finetuned.student.steps": 7})}}
    )
    changed = run.model_copy(update={"studies": {"which": study}})
    folder = prepare(Member("which", "sft", 3), changed)
    hand_over(Member("which", "sft", 3), changed)
    assert list(YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]) == [
        "finetune@teacher"
    ]
    own = publish(folder / made / "checkpoints/student", "checkpoint", {}, name="own")
    hand_over(Member("which", "sft", 3), changed)
    assert own in (folder / made / "checkpoints/student/manifest.json").read_text()
    assert (
        digests["checkpoints/teacher"]
        in (folder / made / "checkpoints/teacher/manifest.json").read_text()
    )
    assert not (folder / made / "evaluations/start").exists()


def test_what_the_reference_made_is_copied_once(run: Params) -> None:
    digest = publish(Path("artifacts/toy/checkpoints/teacher"), "checkpoint", {}, name="teacher")
    lock(
        {
            "finetune@teacher": {
                "cmd": "x",
                "outs": [{"path": "artifacts/toy/checkpoints/teacher", "md5": "y"}],
            }
        }
    )
    folder = prepare(Member("which", "plain", 3), run)
    hand_over(Member("which", "plain", 3), run)
    copied = folder / "artifacts/toy/checkpoints/teacher/manifest.json"
    assert digest in copied.read_text()
    before = copied.stat().st_ino
    hand_over(Member("which", "plain", 3), run)
    assert copied.stat().st_ino == before
    publish(Path("artifacts/toy/checkpoints/teacher"), "checkpoint", {}, name="another")
    hand_over(Member("which", "plain", 3), run)
    assert copied.read_text() == Path("artifacts/toy/checkpoints/teacher/manifest.json").read_text()


def test_what_the_arm_before_has_made_is_taken_over(run: Params) -> None:
    before, after = Member("which", "other", 3), Member("which", "both", 3)
    for member in (before, after):
        prepare(member, run)
    go_on(before, run)  # from nothing
    made, known = (
        Path("artifacts/toy/checkpoints/it001"),
        Path("artifacts/toy/.discarded/logits/it001"),
    )
    digest = publish(before.folder / made, "checkpoint", {}, name="it001")
    lock({"optimize@it001": {"cmd": "x", "outs": [{"path": str(made), "md5": "y"}]}}, before.folder)
    (before.folder / known).mkdir(parents=True)
    (before.folder / known / "manifest.json").write_text("{}")
    go_on(after, run)
    assert digest in (after.folder / made / "manifest.json").read_text()
    assert (after.folder / known / "manifest.json").is_file()
    assert "optimize@it001" in (after.folder / "dvc.lock").read_text()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_an_example_is_a_whole_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copyfile(example, "params.yaml")
    for name in ("dvc.yaml", ".dvcignore"):
        copyfile(EXAMPLES.parent / name, name)
    run = load()
    for study in run.studies:
        for member in members(study, run):
            prepare(member, run)
            assert len(told(member).updates) == len(chain(member, run.studies[study])[0])
