"""`params.yaml`: parsed once, and every mistake answered with the field, the value and what was expected."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from vla_opd.learning.objectives import ON_DECISIONS
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import AdoptParams, EvaluateParams, RunParams
from vla_opd.plugins import named_function

MINIMAL = """
run: {name: test}
environment: {family: metaworld, tasks: [reach-v3]}
demonstrations: {main: {episodes: 2}}
pretrained: {teacher: {demonstrations: main, steps: 3, learning_rate: 1.0e-3}}
finetuned: {student: {parent: teacher, demonstrations: main, per_task: 1, steps: 3, learning_rate: 1.0e-3}}
iterations: {it001: student, it002: it001}
evaluations: {start: student, final: it002}
report: {teacher: start}
"""
CHECKPOINTS = re.escape("expected one of ['it001', 'it002', 'student', 'teacher']")


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_run_has_the_recommended_settings(minimal: Path) -> None:
    params = load(minimal)
    assert params.environment.tasks == ("reach-v3",)
    assert (params.optimize.objective, params.label.teacher) == ("reverse_kl", "teacher")
    assert params.origins == {"teacher": "pretrain@teacher", "student": "finetune@student"}
    assert params.iterations == {"it001": "student", "it002": "it001"}
    assert Params.model_validate_json(params.model_dump_json()) == params


def test_the_projects_own_file_is_in_order() -> None:
    params = load(Path(__file__).parents[2] / "params.yaml")
    assert set(params.evaluations) >= {
        params.report.start,
        params.report.final,
        params.report.teacher,
    }


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimize.learning_rate=1e-4", "optimize", "learning_rate", 1e-4),
        ("optimize.steps=7", "optimize", "steps", 7),
        ("sample.protocol=benchmark", "sample", "protocol", "benchmark"),
        ("policy.proprio=false", "policy", "proprio", False),
        ("environment.tasks=[a-v3, b-v3]", "environment", "tasks", ("a-v3", "b-v3")),
        ("optimize.objective=a.b:c=d", "optimize", "objective", "a.b:c=d"),
    ],
)
def test_overrides_are_yaml_on_the_same_schema(
    minimal: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load(minimal, [override]), section), key) == value
    assert getattr(getattr(load(minimal), section), key) != value


def test_the_run_begins_with_a_student(minimal: Path) -> None:
    minimal.write_text(
        MINIMAL.replace("{student: {parent", "{pupil: {parent").replace(": student", ": pupil")
    )
    with pytest.raises(
        ValueError,
        match=r"pretrained, finetuned and adopt have \['pupil', 'teacher'\]; expected 'student' among them, which the run begins",
    ):
        load(minimal)


def test_later_overrides_win_and_deeper_ones_reach_in(minimal: Path) -> None:
    params = load(
        minimal,
        [
            "optimize.steps=7",
            "optimize.steps=8",
            "demonstrations.main.episodes=5",
            "demonstrations.more.episodes=6",
        ],
    )
    assert params.optimize.steps == 8
    assert {name: made.episodes for name, made in params.demonstrations.items()} == {
        "main": 5,
        "more": 6,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimize.learning_rat=1", r"optimize\.learning_rat is 1 \(no such key\)"),
        ("optimise.steps=1", r"optimise is \{'steps': 1\} \(no such key\)"),
        ("optimize.steps=many", r"optimize\.steps is 'many': .*valid integer"),
        ("optimize.steps=0", r"optimize\.steps is 0: .*greater than or equal to 1"),
        ("optimize.steps=1.5", r"optimize\.steps is 1\.5: .*valid integer"),
        ("sample.temperature=0", r"sample\.temperature is 0: .*greater than 0"),
        ("sample.protocol=train", r"sample\.protocol is 'train': .*'held-out' or 'benchmark'"),
        ("environment.tasks=[]", r"environment\.tasks is \[\]: .*at least 1"),
        ("policy.bins=257", r"policy\.bins is 257: .*less than or equal to 256"),
        ("run.name=../elsewhere", r"run\.name is '\.\./elsewhere': .*pattern"),
        (
            "finetune.warmup_fraction=1.2",
            r"finetune\.warmup_fraction is 1\.2: .*less than or equal to 1",
        ),
        (
            "pretrained.teacher.demonstrations=other",
            r"pretrained\.teacher\.demonstrations is 'other': no such set of demonstrations; expected one of \['main'\]",
        ),
        (
            "finetuned.student.parent=base",
            r"finetuned\.student\.parent is 'base': no such checkpoint; expected one of \['student', 'teacher'\]",
        ),
        (
            "finetuned.student.parent=it001",
            r"finetuned\.student\.parent is 'it001': no such checkpoint; expected one of \['student', 'teacher'\]",
        ),
        (
            "finetuned.student.parent=student",
            r"finetuned: student -> student is a circle; expected a chain that starts from another checkpoint",
        ),
        (
            "pretrained.teacher.parent=student",
            r"pretrained\.teacher\.parent is 'student' \(no such key\)",
        ),
        (
            "finetuned.teacher={parent: teacher, demonstrations: main, steps: 1, learning_rate: 1}",
            r"finetuned has \['teacher'\]: these names belong to",
        ),
        (
            "iterations.it001=it000",
            rf"iterations\.it001 is 'it000': no such checkpoint; {CHECKPOINTS}",
        ),
        (
            "evaluations.final=it003",
            rf"evaluations\.final is 'it003': no such checkpoint; {CHECKPOINTS}",
        ),
        ("label.teacher=expert", rf"label\.teacher is 'expert': no such checkpoint; {CHECKPOINTS}"),
        (
            "iterations.it001=it001",
            r"iterations: it001 -> it001 is a circle; expected a chain that starts from a fine-tuned checkpoint",
        ),
        (
            "reinforcements.it002=teacher",
            r"reinforcements has \['it002'\]: these names belong to other checkpoints",
        ),
        (
            "reinforcements.rl001=it000",
            r"reinforcements\.rl001 is 'it000': no such checkpoint; expected one of",
        ),
        ("explore.group=1", r"explore\.group is 1: .*greater than or equal to 2"),
        (
            "iterations.student=teacher",
            r"iterations has \['student'\]: these names belong to other checkpoints",
        ),
        (
            "environment.wording=benchmark",
            r"environment\.wording is benchmark; expected bddl: the choice is between LIBERO's instructions",
        ),
        (
            "policy.crop=129",
            r"policy\.crop is 129; expected at most environment\.image_size, which is 128",
        ),
        (
            "environment.image_size=64",
            r"policy\.crop is 96; expected at most environment\.image_size, which is 64",
        ),
        (
            "report.final=it003",
            r"report\.final is 'it003'; expected one of the evaluations \['final', 'start'\]",
        ),
        (
            "report.teacher=teacher",
            r"report\.teacher is 'teacher'; expected one of the evaluations \['final', 'start'\]",
        ),
        (
            "sample.observe_every=3",
            r"sample\.observe_every is 3; expected a divisor of policy\.chunk, which is 8: one of \[1, 2, 4, 8\]",
        ),
        (
            "sample.observe_every=16",
            r"sample\.observe_every is 16; expected a divisor of policy\.chunk",
        ),
        (
            "optimize.recoverable=true",
            r"label\.recover_every is null; expected a number with optimize\.recoverable true",
        ),
        (
            "label.smoothing=2",
            r"label\.smoothing is 2\.0; expected that with label\.expert only, and it is null",
        ),
        ("label.smoothing=1e-9", r"label\.smoothing is 1e-09: .*greater than or equal to 0\.01"),
        (
            "label.expert=libero",
            r"label\.expert is libero, which remembers what it did; expected one that can take over anywhere, or null",
        ),
        (
            "optimize.beta=0.3",
            r"optimize\.beta is 0\.3; expected that with optimize\.objective one of \['jsd'\] only, and it is reverse_kl",
        ),
        (
            "optimize.clamp=2",
            r"optimize\.clamp is 2\.0; expected that with .* \['reverse_kl_rollout', 'reverse_kl_sampled'\] only",
        ),
        (
            "optimize.clip_high=0.3",
            r"optimize\.clip_high is 0\.3; expected that with .* \['mixed'\] only",
        ),
        ("optimize.beta=1", r"optimize\.beta is 1: .*less than 1"),
        ("optimize.reward=stale", r"optimize\.reward is 'stale': .*'fresh' or 'rollout'"),
        (
            "optimize.lora_alpha=32",
            r"optimize\.lora_alpha is 32; expected that with optimize\.lora_rank only, and it is null",
        ),
        ("optimize.lora_rank=0", r"optimize\.lora_rank is 0: .*greater than or equal to 1"),
        (
            "optimize.keep_low=0.95",
            r"keep_low is 0\.95 and keep_high is 0\.9; expected keep_low to be at most keep_high",
        ),
        (
            "environment.tasks=[a, b, a]",
            r"environment\.tasks is \['a', 'b', 'a'\]: expected each name once; \['a'\] come again",
        ),
        (
            "environment.cameras=[a, a]",
            r"environment\.cameras is \['a', 'a'\]: expected each name once; \['a'\] come again",
        ),
        (
            "demonstrations.main.tasks=[a, a]",
            r"demonstrations\.main\.tasks is \['a', 'a'\]: expected each name once; \['a'\] come again",
        ),
        (
            "evaluate.first_state=41",
            r"first_state is 41 and episodes is 10; expected first_state \+ episodes to be at most 50",
        ),
        (
            "evaluate.episodes=51",
            r"first_state is 0 and episodes is 51; expected first_state \+ episodes to be at most 50",
        ),
        ("optimize.steps=true", r"optimize\.steps is True: expected a number, not true or false"),
        (
            "finetuned.student.per_task=false",
            r"finetuned\.student\.per_task is False: expected a number, not true or false",
        ),
        (
            "finetune.warmup_fraction=true",
            r"finetune\.warmup_fraction is True: expected a number, not true or false",
        ),
        ("optimize.learning_rate=.inf", r"optimize\.learning_rate is inf: .*finite number"),
        (
            "pretrained.teacher.learning_rate=.nan",
            r"pretrained\.teacher\.learning_rate is nan: .*finite number",
        ),
        ("finetune.final_fraction=.nan", r"finetune\.final_fraction is nan: .*finite number"),
    ],
)
def test_mistakes_name_field_value_and_expectation(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_the_rollouts_tokens_are_scored_at_the_temperature_they_were_drawn_at(
    minimal: Path,
) -> None:
    rollout = "optimize.objective=reverse_kl_rollout"
    with pytest.raises(
        ValueError,
        match=r"optimize\.temperature is 1\.0; expected sample\.temperature, 0\.6, with reverse_kl_rollout",
    ):
        load(minimal, [rollout])
    with pytest.raises(
        ValueError,
        match=r"optimize\.teacher_temperature is 1\.0; expected sample\.temperature, 0\.6",
    ):
        load(minimal, [rollout, "optimize.temperature=0.6", "optimize.teacher_temperature=1"])
    load(minimal, [rollout, "optimize.temperature=0.6"])
    load(minimal, [rollout, "optimize.ratio=true"])
    for biased in ("optimize.reward=rollout", "optimize.discount=0.5"):
        with pytest.raises(ValueError, match=r"expected sample\.temperature"):
            load(minimal, [rollout, "optimize.ratio=true", biased])


def test_depth_counts_the_iterations_of_the_same_kind_before(minimal: Path) -> None:
    more = [
        "iterations.branch=it001",
        "iterations.fresh=teacher",
        "reinforcements.rl001=it002",
        "reinforcements.rl002=rl001",
        "iterations.after=rl002",
    ]
    params = load(minimal, more)
    depths = {"it001": 0, "it002": 1, "branch": 1, "fresh": 0, "rl001": 0, "rl002": 1, "after": 0}
    assert {name: params.depth(name) for name in params.updates} == depths


def test_a_circle_of_both_kinds_is_refused(minimal: Path) -> None:
    with pytest.raises(ValueError, match="iterations: it001 -> rl001 -> it001 is a circle"):
        load(minimal, ["iterations.it001=rl001", "reinforcements.rl001=it001"])


def test_a_decision_is_between_two_rates_and_about_the_run_s_own_tasks(minimal: Path) -> None:
    load(minimal, ["evaluate.decide=[0.8, 0.9]"])
    for wrong in ("[0.9, 0.8]", "[0.8, 1.0]", "[0, 0.5]"):
        with pytest.raises(
            ValueError,
            match=r"evaluate\.decide is .*: expected two success rates between 0 and 1, the lower one first",
        ):
            load(minimal, [f"evaluate.decide={wrong}"])
    with pytest.raises(ValueError, match=r"expected no unseen tasks, and a confidence above 0\.5"):
        load(minimal, ["evaluate.decide=[0.8, 0.9]", "evaluate.unseen=[other]"])


def test_unseen_tasks_are_other_tasks(minimal: Path) -> None:
    own = load(minimal).environment.tasks[0]
    with pytest.raises(
        ValueError,
        match=rf"evaluate\.unseen has '{own}'; expected other tasks than environment\.tasks, which are trained on",
    ):
        load(minimal, [f"evaluate.unseen=[other, {own}]"])


def test_an_expert_that_can_take_over_labels_alone(minimal: Path) -> None:
    by_expert = ["label.expert=metaworld", "label.smoothing=2"]
    load(minimal, by_expert)
    with pytest.raises(
        ValueError, match=r"label\.expert is metaworld; expected one for environment\.family libero"
    ):
        load(minimal, [*by_expert, "environment.family=libero"])
    with pytest.raises(
        ValueError,
        match=r"label\.recover_every is 4; expected null with label\.expert: it is the teacher that takes over",
    ):
        load(minimal, [*by_expert, "label.recover_every=4"])
    with pytest.raises(
        ValueError, match=r"label\.transfer is true; expected false with label\.expert"
    ):
        load(minimal, [*by_expert, "label.transfer=true"])
    with pytest.raises(
        ValueError, match=r"label\.transfer is true; expected false with sample\.visited_by teacher"
    ):
        load(minimal, ["sample.visited_by=teacher", "label.transfer=true"])
    with pytest.raises(
        ValueError, match=r"optimize\.temperature is 0\.6; expected 1 with label\.transfer"
    ):
        load(minimal, ["optimize.temperature=0.6", "label.transfer=true"])
    load(minimal, ["label.recover_every=4", "optimize.recoverable=true"])


def test_an_objective_is_asked_for_what_it_reads(minimal: Path) -> None:
    load(minimal, ["optimize.objective=jsd", "optimize.beta=0.3"])
    load(
        minimal, ["optimize.objective=a.b:c", "optimize.beta=0.3", "optimize.clamp=1"]
    )  # nobody knows what it reads
    for name in ON_DECISIONS:
        load(minimal, [f"optimize.objective={name}", "sample.temperature=1"])
        with pytest.raises(
            ValueError,
            match=rf"sample\.visited_by is teacher; expected student with optimize\.objective {name}, which learns",
        ):
            load(
                minimal,
                [f"optimize.objective={name}", "sample.temperature=1", "sample.visited_by=teacher"],
            )
    with pytest.raises(
        ValueError,
        match=r"optimize\.states is 9; expected null with optimize\.objective mixed: GRPO's",
    ):
        load(minimal, ["optimize.objective=mixed", "optimize.states=9"])
    with pytest.raises(
        ValueError, match=r"sample\.group is 1; expected at least 2 with optimize\.objective mixed"
    ):
        load(minimal, ["optimize.objective=mixed", "sample.group=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimize.steps", r"override 'optimize\.steps': expected section\.key=value"),
        ("steps=3", r"override 'steps=3': expected section\.key=value"),
        ("run.name.first=x", r"override 'run\.name\.first=x': name is not a section"),
        ("environment.tasks=[a", r"override 'environment\.tasks=\[a'"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_all_mistakes_are_told_at_once(minimal: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: 2 mistake\(s\)") as caught:
        load(minimal, ["optimize.steps=0", "sample.group=none"])
    assert "optimize.steps is 0" in str(caught.value)
    assert "sample.group is 'none'" in str(caught.value)


def test_what_sections_ask_of_each_other_is_told_at_once_too(minimal: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"params\.yaml: 2 mistake\(s\)\n  policy\.crop is 200; .*\n  sample\.observe_every is 5; ",
    ):
        load(minimal, ["policy.crop=200", "sample.observe_every=5"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["policy.crop=128"],
        ["policy.chunk=9", "sample.observe_every=3"],
        ["evaluate.first_state=40"],
        ["policy.proprio=true"],
        ["optimize.learning_rate=1"],
    ],
)
def test_what_only_just_fits_is_accepted(minimal: Path, overrides: list[str]) -> None:
    load(minimal, overrides)


def test_a_run_without_evaluations_has_nothing_to_report(minimal: Path) -> None:
    minimal.write_text(
        MINIMAL.replace("{start: student, final: it002}", "{}").replace(
            "report: {teacher: start}", ""
        )
    )
    assert load(minimal).evaluations == {}


def test_numbers_are_checked_in_every_section_however_it_is_made() -> None:
    with pytest.raises(ValidationError, match="expected a number, not true or false"):
        EvaluateParams(episodes=True)
    with pytest.raises(ValidationError, match="finite number"):
        EvaluateParams(confidence=float("nan"))


def test_a_missing_section_is_named(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("run: {name: test}", ""))
    with pytest.raises(ValueError, match=r"run: Field required"):
        load(minimal)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere\.yaml does not exist; expected the run's params\.yaml"
    ):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds list; expected one mapping"),
        ("", "holds NoneType; expected one mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(minimal: Path, text: str, message: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(minimal)


@pytest.mark.parametrize("text", ["run: {name: [", MINIMAL + "run: {name: again}\n", "a: b: c"])
def test_a_file_that_is_no_yaml_is_refused_and_named(minimal: Path, text: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml"):
        load(minimal)


def test_params_cannot_be_changed(minimal: Path) -> None:
    params = load(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        params.optimize.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_functions_by_name_or_by_path() -> None:
    known = {"length": len}
    assert named_function("length", known, "f") is len
    assert named_function("os.path:join", known, "f")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "size",
            r"""policy\.family is 'size'; expected one of \['length'\] or "package\.module:function\"""",
        ),
        ("no_such_package:f", r"policy\.family is 'no_such_package:f': No module named"),
        ("math:no_such_function", r"policy\.family is 'math:no_such_function': .*no attribute"),
    ],
)
def test_functions_that_do_not_exist_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_function(name, {"length": len}, "policy.family")


def test_a_public_checkpoint_is_known_by_its_name() -> None:
    name = "Haozhan72/Openvla-oft-SFT-libero10-traj1"
    its = AdoptParams.model_validate({"folder": "x", "known": name})
    assert its.variant == ("libero_10_no_noops", 0.9)
    assert its.model_dump(exclude_unset=True) == {
        "folder": "x",
        "known": name,
    }  # as a study hands it on
    for said in ({"unnorm_key": "libero_10_no_noops"}, {"unnorm_key": None}, {"crop": 0.9}):
        assert (
            AdoptParams.model_validate({"folder": "x", "known": name, **said}).variant
            == its.variant
        )
    with pytest.raises(
        ValidationError,
        match=rf"crop is 1\.0; expected 0\.9, by which {name} was trained, or nothing",
    ):
        AdoptParams.model_validate({"folder": "x", "known": name, "crop": 1.0})
    with pytest.raises(
        ValidationError,
        match=r"known is 'openvla'; expected one of \['Haozhan72/.*'\], or unnorm_key and crop in its place",
    ):
        AdoptParams.model_validate({"folder": "x", "known": "openvla"})
    assert AdoptParams(folder="x", unnorm_key="k", crop=1.0).variant == ("k", 1.0)
    assert "known" not in AdoptParams(folder="x").model_dump()


@pytest.mark.parametrize(
    "section",
    [
        "demonstrations",
        "pretrained",
        "finetuned",
        "adopt",
        "iterations",
        "reinforcements",
        "evaluations",
    ],
)
def test_a_dot_in_a_name_that_dvc_yaml_looks_up_is_refused(section: str) -> None:
    """DVC would look for `start-v1`, and `5` in it."""
    with pytest.raises(
        ValidationError,
        match=r"start-v1\.5[\s\S]*expected letters, digits, _ and - only: dvc\.yaml can't name one with a dot",
    ):
        Params.model_validate(
            {
                "run": {"name": "a.b"},
                "environment": {"tasks": ["reach"]},
                section: {"start-v1.5": "student"},
            }
        )


def test_a_dot_in_the_name_of_a_run_is_no_mistake() -> None:
    assert RunParams(name="smolvla-0.5").name == "smolvla-0.5"


@pytest.mark.parametrize("changes", [[], ["optimize.steps=3"]])
def test_a_file_in_another_encoding_is_named_with_the_line(
    tmp_path: Path, changes: list[str]
) -> None:
    (tmp_path / "params.yaml").write_bytes(MINIMAL.encode() + "# pr\u00e9s\n".encode("latin-1"))
    line = MINIMAL.count("\n") + 1
    with pytest.raises(
        ValueError, match=rf"params\.yaml: line {line} has the byte 0xe9; expected a text in UTF-8"
    ):
        load(tmp_path / "params.yaml", changes)


def test_a_mark_of_byte_order_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(tmp_path / "params.yaml").run.name
