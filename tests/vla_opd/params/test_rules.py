"""Contradictions between sections."""

from pathlib import Path

import pytest

from tests.vla_opd.params.minimal import MINIMAL
from vla_opd.learning.objectives import ON_DECISIONS
from vla_opd.params.load import load
from vla_opd.params.objective import ON_SAMPLED_TOKENS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "environment.wording=benchmark",
            (
                r"environment\.wording is benchmark; "
                r"expected bddl: only LIBERO has a choice of instructions"
            ),
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
            (
                r"sample\.observe_every is 3; "
                r"expected a divisor of policy\.chunk, which is 8: one of \[1, 2, 4, 8\]"
            ),
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
            "label.expert=libero",
            (
                r"label\.expert is libero, which remembers what it did; "
                r"expected an expert that can take over in any state, or null"
            ),
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "label.smoothing=2",
            (
                r"label\.smoothing is 2\.0, which has no effect while label\.expert is null; "
                r"set label\.expert, or remove label\.smoothing"
            ),
        ),
        (
            "optimize.lora_alpha=32",
            r"optimize\.lora_alpha is 32, which has no effect while optimize\.lora_rank is null",
        ),
    ],
)
def test_an_option_without_effect_is_refused(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_the_rollouts_tokens_are_scored_at_the_temperature_at_which_they_were_drawn(
    minimal: Path,
) -> None:
    rollout = "optimize.objective=reverse_kl_rollout"
    message = r"optimize\.temperature is 1\.0; expected sample\.temperature, 0\.6, with reverse_kl"
    with pytest.raises(ValueError, match=message):
        load(minimal, [rollout])
    message = r"optimize\.teacher_temperature is 1\.0; expected sample\.temperature, 0\.6"
    with pytest.raises(ValueError, match=message):
        load(minimal, [rollout, "optimize.temperature=0.6", "optimize.teacher_temperature=1"])
    load(minimal, [rollout, "optimize.temperature=0.6"])


def test_the_ratio_corrects_for_another_temperature_unless_it_is_biased(minimal: Path) -> None:
    rollout = ["optimize.objective=reverse_kl_rollout", "optimize.objective.ratio=true"]
    load(minimal, rollout)
    for biased in ("optimize.objective.reward=rollout", "optimize.objective.discount=0.5"):
        with pytest.raises(ValueError, match=r"expected sample\.temperature"):
            load(minimal, [*rollout, biased])


def test_unseen_tasks_are_other_tasks(minimal: Path) -> None:
    trained_on = load(minimal).environment.tasks[0]
    message = (
        rf"evaluate\.unseen has '{trained_on}'; "
        r"expected other tasks than environment\.tasks, which are trained on"
    )
    with pytest.raises(ValueError, match=message):
        load(minimal, [f"evaluate.unseen=[other, {trained_on}]"])


EXPERT = ("label.expert=metaworld", "label.smoothing=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "environment.family=libero",
            r"label\.expert is metaworld; expected one for environment\.family libero",
        ),
        (
            "label.recover_every=4",
            (
                r"label\.recover_every is 4; "
                r"expected null with label\.expert: only the teacher takes over"
            ),
        ),
        ("label.transfer=true", r"label\.transfer is true; expected false with label\.expert"),
    ],
)
def test_an_expert_labels_without_a_teacher(minimal: Path, override: str, message: str) -> None:
    load(minimal, EXPERT)
    with pytest.raises(ValueError, match=message):
        load(minimal, [*EXPERT, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sample.visited_by=teacher",
            r"label\.transfer is true; expected false with sample\.visited_by teacher",
        ),
        (
            "optimize.temperature=0.6",
            r"optimize\.temperature is 0\.6; expected 1 with label\.transfer",
        ),
    ],
)
def test_labels_are_transferred_as_they_are(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override, "label.transfer=true"])


def test_recoverable_states_are_accepted_with_recovery(minimal: Path) -> None:
    load(minimal, ["label.recover_every=4", "optimize.recoverable=true"])


def test_objectives_on_sampled_tokens_are_those_on_decisions() -> None:
    assert ON_DECISIONS.keys() == ON_SAMPLED_TOKENS


@pytest.mark.parametrize("objective", sorted(ON_SAMPLED_TOKENS))
def test_an_objective_on_sampled_tokens_needs_the_students(minimal: Path, objective: str) -> None:
    settings = [f"optimize.objective={objective}", "sample.temperature=1"]
    load(minimal, settings)
    message = (
        r"sample\.visited_by is teacher; "
        rf"expected student with optimize\.objective {objective}, which learns"
    )
    with pytest.raises(ValueError, match=message):
        load(minimal, [*settings, "sample.visited_by=teacher"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimize.states=9",
            r"optimize\.states is 9; expected null with optimize\.objective mixed: GRPO's",
        ),
        (
            "sample.group=1",
            r"sample\.group is 1; expected at least 2 with optimize\.objective mixed",
        ),
    ],
)
def test_mixed_needs_groups_of_whole_episodes(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, ["optimize.objective=mixed", override])


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
def test_settings_that_only_just_fit_are_accepted(minimal: Path, overrides: list[str]) -> None:
    load(minimal, overrides)


def test_a_run_without_evaluations_has_nothing_to_report(minimal: Path) -> None:
    without_evaluations = MINIMAL.replace("{start: student, final: it002}", "{}")
    minimal.write_text(without_evaluations.replace("report: {teacher: start}", ""))
    assert load(minimal).evaluations == {}


def test_all_contradictions_are_listed_at_once(minimal: Path) -> None:
    message = (
        r"params\.yaml: 2 mistake\(s\)\n"
        r"  policy\.crop is 200; .*\n"
        r"  sample\.observe_every is 5; "
    )
    with pytest.raises(ValueError, match=message):
        load(minimal, ["policy.crop=200", "sample.observe_every=5"])
