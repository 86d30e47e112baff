"""The names by which sections refer to each other: every one exists, and chains have a start."""

import re
from pathlib import Path

import pytest

from tests.vla_opd.params.minimal import MINIMAL
from vla_opd.params.load import load
from vla_opd.params.run import Params

CHECKPOINTS = re.escape("expected one of ['it001', 'it002', 'student', 'teacher']")


def test_a_minimal_run_has_the_recommended_settings(minimal: Path) -> None:
    params = load(minimal)
    assert params.environment.tasks == ("reach-v3",)
    assert params.optimize.objective.name == "reverse_kl"
    assert params.label.teacher == "teacher"
    assert params.origins == {"teacher": "pretrain@teacher", "student": "finetune@student"}
    assert params.iterations == {"it001": "student", "it002": "it001"}
    assert Params.model_validate_json(params.model_dump_json()) == params


def test_the_run_begins_with_a_student(minimal: Path) -> None:
    minimal.write_text(
        MINIMAL.replace("student: {parent", "pupil: {parent").replace(": student", ": pupil")
    )
    message = (
        r"pretrained, finetuned and adopt have \['pupil', 'teacher'\]; "
        r"expected 'student' among them, with which the run begins"
    )
    with pytest.raises(ValueError, match=message):
        load(minimal)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "pretrained.teacher.demonstrations=other",
            (
                r"pretrained\.teacher\.demonstrations is 'other': "
                r"no such set of demonstrations; expected one of \['main'\]"
            ),
        ),
        (
            "finetuned.student.parent=base",
            (
                r"finetuned\.student\.parent is 'base': "
                r"no such checkpoint; expected one of \['student', 'teacher'\]"
            ),
        ),
        (
            "finetuned.student.parent=it001",
            (
                r"finetuned\.student\.parent is 'it001': "
                r"no such checkpoint; expected one of \['student', 'teacher'\]"
            ),
        ),
        (
            "iterations.it001=it000",
            rf"iterations\.it001 is 'it000': no such checkpoint; {CHECKPOINTS}",
        ),
        (
            "reinforcements.rl001=it000",
            r"reinforcements\.rl001 is 'it000': no such checkpoint; expected one of",
        ),
        (
            "evaluations.final=it003",
            rf"evaluations\.final is 'it003': no such checkpoint; {CHECKPOINTS}",
        ),
        ("label.teacher=expert", rf"label\.teacher is 'expert': no such checkpoint; {CHECKPOINTS}"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "finetuned.teacher={parent: teacher, demonstrations: main, steps: 1, learning_rate: 1}",
            r"finetuned has \['teacher'\]: these names belong to other checkpoints",
        ),
        (
            "iterations.student=teacher",
            r"iterations has \['student'\]: these names belong to other checkpoints",
        ),
        (
            "reinforcements.it002=teacher",
            r"reinforcements has \['it002'\]: these names belong to other checkpoints",
        ),
    ],
)
def test_a_name_that_two_checkpoints_share_is_refused(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["finetuned.student.parent=student"],
            (
                r"finetuned: student -> student is a cycle; "
                r"expected a chain that starts from another checkpoint"
            ),
        ),
        (
            ["iterations.it001=it001"],
            (
                r"iterations: it001 -> it001 is a cycle; "
                r"expected a chain that starts from a fine-tuned checkpoint"
            ),
        ),
        (
            ["iterations.it001=rl001", "reinforcements.rl001=it001"],
            "iterations: it001 -> rl001 -> it001 is a cycle",
        ),
    ],
)
def test_a_cycle_is_refused(minimal: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, overrides)


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
