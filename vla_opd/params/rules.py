"""Rules between sections of `params.yaml`: one function each, which yields its error messages.

They are checked when a file is loaded. A `Params` made in code, which may leave sections unused, is
not checked.
"""

from collections.abc import Callable, Iterator
from typing import Any

from vla_opd.params.objective import ON_SAMPLED_TOKENS, RolloutParams
from vla_opd.params.run import Params

EXPERTS_WITH_MEMORY = {"libero"}
"""Scripted experts that remember what they did, and so cannot take over another's episode."""


def find_contradictions(params: Params) -> Iterator[str]:
    """Yield a message for every rule that is broken."""
    for rule in RULES:
        yield from rule(params)


def crop_fits_image(params: Params) -> Iterator[str]:
    crop = params.policy.crop
    size = params.environment.image_size
    if crop > size:
        yield f"policy.crop is {crop}; expected at most environment.image_size, which is {size}"


def stored_states_include_decisions(params: Params) -> Iterator[str]:
    every = params.sample.observe_every
    chunk = params.policy.chunk
    if chunk % every:
        divisors = [number for number in range(1, chunk + 1) if chunk % number == 0]
        yield (
            f"sample.observe_every is {every}; expected a divisor of policy.chunk, "
            f"which is {chunk}: one of {divisors}"
        )


def unseen_tasks_are_not_trained_on(params: Params) -> Iterator[str]:
    trained_on = params.environment.tasks
    overlap = [task for task in params.evaluate.unseen or () if task in trained_on]
    if overlap:
        yield (
            f"evaluate.unseen has {overlap[0]!r}; "
            "expected other tasks than environment.tasks, which are trained on"
        )


def wording_is_for_libero(params: Params) -> Iterator[str]:
    wording = params.environment.wording
    if wording != "bddl" and params.environment.family == "metaworld":
        yield (
            f"environment.wording is {wording}; "
            "expected bddl: only LIBERO has a choice of instructions"
        )


DEPENDENT_OPTIONS = {
    "finetune.lora_alpha": "finetune.lora_rank",
    "optimize.lora_alpha": "optimize.lora_rank",
    "reinforce.lora_alpha": "reinforce.lora_rank",
    "label.smoothing": "label.expert",
}
"""Options that have no effect while another setting is null."""


def options_have_an_effect(params: Params) -> Iterator[str]:
    for option, setting in DEPENDENT_OPTIONS.items():
        value = _get(params, option)
        if value != _default(params, option) and _get(params, setting) is None:
            yield (
                f"{option} is {value}, which has no effect while {setting} is null; "
                f"set {setting}, or remove {option}"
            )


def _get(params: Params, dotted: str) -> Any:
    section, field = dotted.split(".")
    return getattr(getattr(params, section), field)


def _default(params: Params, dotted: str) -> Any:
    section, field = dotted.split(".")
    return type(getattr(params, section)).model_fields[field].default


def expert_can_take_over(params: Params) -> Iterator[str]:
    expert = params.label.expert
    if expert in EXPERTS_WITH_MEMORY:
        yield (
            f"label.expert is {expert}, which remembers what it did; "
            "expected an expert that can take over in any state, or null"
        )


def expert_is_for_the_environment(params: Params) -> Iterator[str]:
    expert = params.label.expert
    family = params.environment.family
    if {expert, family} == {"metaworld", "libero"}:
        yield f"label.expert is {expert}; expected one for environment.family {family}"


def recovery_needs_the_teacher(params: Params) -> Iterator[str]:
    label = params.label
    if label.expert is not None and label.recover_every is not None:
        yield (
            f"label.recover_every is {label.recover_every}; "
            "expected null with label.expert: only the teacher takes over"
        )


def recoverable_states_need_recovery(params: Params) -> Iterator[str]:
    if params.optimize.recoverable and params.label.recover_every is None:
        yield (
            "label.recover_every is null; expected a number with optimize.recoverable true, "
            "which needs to know from which states the teacher succeeds"
        )


def transfer_needs_a_teacher(params: Params) -> Iterator[str]:
    if params.label.transfer and params.label.expert is not None:
        yield (
            "label.transfer is true; expected false with label.expert, "
            "whose actions are encoded in the student's bins"
        )


def transfer_needs_the_students_tokens(params: Params) -> Iterator[str]:
    if params.label.transfer and params.sample.visited_by == "teacher":
        yield (
            "label.transfer is true; expected false with sample.visited_by teacher, "
            "whose tokens aren't the student's"
        )


def transfer_needs_temperature_1(params: Params) -> Iterator[str]:
    if not params.label.transfer:
        return
    for field in ("temperature", "teacher_temperature"):
        temperature = getattr(params.optimize, field)
        if temperature not in {1.0, None}:
            yield (
                f"optimize.{field} is {temperature}; expected 1 with label.transfer, "
                "which distributes the teacher's probabilities as they are stored"
            )


def sampled_tokens_are_the_students(params: Params) -> Iterator[str]:
    objective = params.optimize.objective.name
    if objective in ON_SAMPLED_TOKENS and params.sample.visited_by == "teacher":
        yield (
            f"sample.visited_by is teacher; expected student with optimize.objective {objective}, "
            "which learns from the student's own tokens"
        )


def sampled_tokens_are_of_this_iteration(params: Params) -> Iterator[str]:
    settings = params.optimize
    objective = settings.objective.name
    if objective in ON_SAMPLED_TOKENS and settings.earlier:
        yield (
            f"optimize.earlier is {settings.earlier}; "
            f"expected 0 with optimize.objective {objective}, "
            "which learns from the student's own tokens"
        )


def mixed_learns_from_whole_episodes(params: Params) -> Iterator[str]:
    settings = params.optimize
    if settings.objective.name == "mixed" and settings.states is not None:
        yield (
            f"optimize.states is {settings.states}; expected null with optimize.objective mixed: "
            "GRPO's means are over whole episodes"
        )


def mixed_needs_groups(params: Params) -> Iterator[str]:
    group = params.sample.group
    if params.optimize.objective.name == "mixed" and group < 2:
        yield (
            f"sample.group is {group}; expected at least 2 with optimize.objective mixed: "
            "an advantage compares an episode with the others of its group"
        )


def sampled_tokens_are_scored_as_drawn(params: Params) -> Iterator[str]:
    """Require one temperature for drawing and scoring, unless the ratio corrects for it."""
    settings = params.optimize
    objective = settings.objective
    if not isinstance(objective, RolloutParams):
        return
    if objective.ratio and objective.reward == "fresh" and objective.discount == 0:
        return
    drawn_at = params.sample.temperature
    for field in ("temperature", "teacher_temperature"):
        temperature = getattr(settings, field)
        if temperature not in {drawn_at, None}:
            yield (
                f"optimize.{field} is {temperature}; expected sample.temperature, {drawn_at}, "
                "with reverse_kl_rollout (unless ratio is true, reward fresh and discount 0)"
            )


def reported_evaluations_exist(params: Params) -> Iterator[str]:
    if not params.evaluations:  # a run without evaluations has no report
        return
    for field, name in params.report.model_dump().items():
        if name not in params.evaluations:
            yield (
                f"report.{field} is {name!r}; "
                f"expected one of the evaluations {sorted(params.evaluations)}"
            )


RULES: tuple[Callable[[Params], Iterator[str]], ...] = (
    crop_fits_image,
    stored_states_include_decisions,
    unseen_tasks_are_not_trained_on,
    wording_is_for_libero,
    options_have_an_effect,
    expert_can_take_over,
    expert_is_for_the_environment,
    recovery_needs_the_teacher,
    recoverable_states_need_recovery,
    transfer_needs_a_teacher,
    transfer_needs_the_students_tokens,
    transfer_needs_temperature_1,
    sampled_tokens_are_the_students,
    sampled_tokens_are_of_this_iteration,
    mixed_learns_from_whole_episodes,
    mixed_needs_groups,
    sampled_tokens_are_scored_as_drawn,
    reported_evaluations_exist,
)
"""In the order in which mistakes are listed."""
