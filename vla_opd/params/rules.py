"""Contradictions between sections of `params.yaml`."""

from collections.abc import Iterator

from vla_opd.params.objective import FROM_STUDENT, OPTIONS_OF, OptimizeParams
from vla_opd.params.run import Params
from vla_opd.params.stages import LabelParams
from vla_opd.params.training import TrainedParams

WITH_MEMORY = {"libero"}
"""Scripted experts that remember what they did, and so can't be asked at a state to which somebody else came."""


def contradictions(params: Params) -> Iterator[str]:
    """What one section asks of another, and doesn't get. Not asked of a `Params` made in code, of which not every section need be in use."""
    crop, size = params.policy.crop, params.environment.image_size
    if crop > size:
        yield f"policy.crop is {crop}; expected at most environment.image_size, which is {size}"
    every, chunk = params.sample.observe_every, params.policy.chunk
    if chunk % every:
        divisors = [n for n in range(1, chunk + 1) if chunk % n == 0]
        yield f"sample.observe_every is {every}; expected a divisor of policy.chunk, which is {chunk}: one of {divisors}"
    if both := [task for task in params.evaluate.unseen or () if task in params.environment.tasks]:
        yield f"evaluate.unseen has {both[0]!r}; expected other tasks than environment.tasks, which are trained on"
    if params.environment.wording != "bddl" and params.environment.family == "metaworld":
        yield f"environment.wording is {params.environment.wording}; expected bddl: the choice is between LIBERO's instructions"
    yield from _adapters_at_odds(params)
    yield from _labels_at_odds(params)
    yield from _transfer_at_odds(params)
    yield from _objective_at_odds(params)
    yield from _temperatures_at_odds(params)
    for field, name in params.report.model_dump().items():
        if (
            params.evaluations and name not in params.evaluations
        ):  # without any, there is nothing to report
            yield f"report.{field} is {name!r}; expected one of the evaluations {sorted(params.evaluations)}"


def _adapters_at_odds(params: Params) -> Iterator[str]:
    for field in ("finetune", "optimize", "reinforce"):
        its: TrainedParams = getattr(params, field)
        if its.lora is None and its.lora_alpha != TrainedParams.model_fields["lora_alpha"].default:
            yield f"{field}.lora_alpha is {its.lora_alpha}; expected that with {field}.lora_rank only, and it is null"


def _labels_at_odds(params: Params) -> Iterator[str]:
    label = params.label
    if label.expert in WITH_MEMORY:
        yield f"label.expert is {label.expert}, which remembers what it did; expected one that can take over anywhere, or null"
    if {label.expert, params.environment.family} == {"metaworld", "libero"}:
        yield f"label.expert is {label.expert}; expected one for environment.family {params.environment.family}"
    if label.expert is None and label.smoothing != LabelParams.model_fields["smoothing"].default:
        yield f"label.smoothing is {label.smoothing}; expected that with label.expert only, and it is null"
    if label.expert is not None and label.recover_every is not None:
        yield f"label.recover_every is {label.recover_every}; expected null with label.expert: it is the teacher that takes over"
    if params.optimize.recoverable and label.recover_every is None:
        yield "label.recover_every is null; expected a number with optimize.recoverable true, which learns from what it finds"


def _transfer_at_odds(params: Params) -> Iterator[str]:
    """Bins are shared out as the teacher's probabilities are at temperature 1; at another they would have to be so before."""
    if not params.label.transfer:
        return
    if params.label.expert is not None:
        yield "label.transfer is true; expected false with label.expert, whose actions are put into the student's bins"
    if params.sample.visited_by == "teacher":
        yield "label.transfer is true; expected false with sample.visited_by teacher, whose tokens aren't the student's"
    for field in ("temperature", "teacher_temperature"):
        if (value := getattr(params.optimize, field)) not in {1.0, None}:
            yield f"optimize.{field} is {value}; expected 1 with label.transfer, which shares out the teacher's probabilities as they are"


def _objective_at_odds(params: Params) -> Iterator[str]:
    opt = params.optimize
    for field, objectives in OPTIONS_OF.items():
        set_to = getattr(opt, field)
        if (
            set_to != OptimizeParams.model_fields[field].default
            and opt.objective not in objectives
            and ":" not in opt.objective
        ):
            yield f"optimize.{field} is {set_to}; expected that with optimize.objective one of {sorted(objectives)} only, and it is {opt.objective}"
    if opt.objective in FROM_STUDENT and params.sample.visited_by == "teacher":
        yield f"sample.visited_by is teacher; expected student with optimize.objective {opt.objective}, which learns from the student's own tokens"
    if opt.objective in FROM_STUDENT and opt.earlier:
        yield f"optimize.earlier is {opt.earlier}; expected 0 with optimize.objective {opt.objective}, which learns from the student's own tokens"
    if opt.objective == "mixed" and opt.states is not None:
        yield f"optimize.states is {opt.states}; expected null with optimize.objective mixed: GRPO's means are over whole episodes"
    if opt.objective == "mixed" and params.sample.group < 2:
        yield f"sample.group is {params.sample.group}; expected at least 2 with optimize.objective mixed: an advantage is one over the others"


def _temperatures_at_odds(params: Params) -> Iterator[str]:
    """The rollout's tokens have to be scored at the temperature at which they were drawn, unless a ratio makes up for it."""
    opt, drawn = params.optimize, params.sample.temperature
    if opt.objective != "reverse_kl_rollout" or (
        opt.ratio and opt.reward == "fresh" and not opt.discount
    ):
        return
    for field, value in {
        "temperature": opt.temperature,
        "teacher_temperature": opt.teacher_temperature,
    }.items():
        if value is not None and value != drawn:
            yield f"optimize.{field} is {value}; expected sample.temperature, {drawn}, with reverse_kl_rollout (but for ratio: true, fresh rewards)"
