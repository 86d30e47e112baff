"""What all sections have in common: strict numbers and names, no unknown keys, no changes."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import EvaluateParams, RunParams


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimize.learning_rat=1", r"optimize\.learning_rat is 1 \(no such key\)"),
        ("optimise.steps=1", r"optimise is \{'steps': 1\} \(no such key\)"),
        ("optimize.steps=many", r"optimize\.steps is 'many': .*valid integer"),
        ("optimize.steps=0", r"optimize\.steps is 0: .*greater than or equal to 1"),
        ("optimize.steps=1.5", r"optimize\.steps is 1\.5: .*valid integer"),
        ("optimize.steps=true", r"optimize\.steps is True: expected a number, not true or false"),
        ("optimize.learning_rate=.inf", r"optimize\.learning_rate is inf: .*finite number"),
        ("optimize.lora_rank=0", r"optimize\.lora_rank is 0: .*greater than or equal to 1"),
        ("sample.temperature=0", r"sample\.temperature is 0: .*greater than 0"),
        ("sample.protocol=train", r"sample\.protocol is 'train': .*'held-out' or 'benchmark'"),
        ("explore.group=1", r"explore\.group is 1: .*greater than or equal to 2"),
        ("label.smoothing=1e-9", r"label\.smoothing is 1e-09: .*greater than or equal to 0\.01"),
        ("policy.bins=257", r"policy\.bins is 257: .*less than or equal to 256"),
        ("run.name=../elsewhere", r"run\.name is '\.\./elsewhere': .*pattern"),
        ("environment.tasks=[]", r"environment\.tasks is \[\]: .*at least 1"),
        (
            "finetune.warmup_fraction=1.2",
            r"finetune\.warmup_fraction is 1\.2: .*less than or equal to 1",
        ),
        (
            "finetune.warmup_fraction=true",
            r"finetune\.warmup_fraction is True: expected a number, not true or false",
        ),
        ("finetune.final_fraction=.nan", r"finetune\.final_fraction is nan: .*finite number"),
        (
            "finetuned.student.per_task=false",
            r"finetuned\.student\.per_task is False: expected a number, not true or false",
        ),
        (
            "pretrained.teacher.learning_rate=.nan",
            r"pretrained\.teacher\.learning_rate is nan: .*finite number",
        ),
        (
            "pretrained.teacher.parent=student",
            r"pretrained\.teacher\.parent is 'student' \(no such key\)",
        ),
        (
            "environment.tasks=[a, b, a]",
            (
                r"environment\.tasks is \['a', 'b', 'a'\]: "
                r"expected each value once; \['a'\] appear more than once"
            ),
        ),
        (
            "environment.cameras=[a, a]",
            r"environment\.cameras is \['a', 'a'\]: expected each value once; \['a'\] appear",
        ),
        (
            "demonstrations.main.tasks=[a, a]",
            r"demonstrations\.main\.tasks is \['a', 'a'\]: expected each value once; \['a'\]",
        ),
    ],
)
def test_mistakes_name_field_value_and_expectation(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_numbers_are_checked_in_sections_made_in_code() -> None:
    with pytest.raises(ValidationError, match="expected a number, not true or false"):
        EvaluateParams(episodes=True)
    with pytest.raises(ValidationError, match="finite number"):
        EvaluateParams(confidence=float("nan"))


def test_params_cannot_be_changed(minimal: Path) -> None:
    params = load(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        params.optimize.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


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
    """DVC would look for `start-v1`, and for `5` in it."""
    message = (
        r"start-v1\.5[\s\S]*expected letters, digits, _ and - only: "
        r"dvc\.yaml can't name one with a dot"
    )
    params = {
        "run": {"name": "a.b"},
        "environment": {"tasks": ["reach"]},
        section: {"start-v1.5": "student"},
    }
    with pytest.raises(ValidationError, match=message):
        Params.model_validate(params)


def test_a_dot_in_the_name_of_a_run_is_accepted() -> None:
    assert RunParams(name="smolvla-0.5").name == "smolvla-0.5"
