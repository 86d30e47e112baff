"""The section `optimize`: the objective and its options.

`objective: {name: jsd, beta: 0.3}` has one model per objective, so that an option of another
objective can't be written. `objective: jsd` is short for `{name: jsd}`: all options at their
defaults.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from vla_opd.params.section import Fraction, Section
from vla_opd.params.training import UpdateParams

CUSTOM = "package.module:function"


class GroupParams(Section):
    """Which groups GRPO learns from: those with a mean success in [keep_low, keep_high].

    A group whose episodes all succeed, or all fail, has no advantage to learn from.
    """

    keep_low: Fraction = 0.1
    keep_high: Fraction = 0.9

    @model_validator(mode="after")
    def _require_interval(self) -> "GroupParams":
        if self.keep_low > self.keep_high:
            raise ValueError(
                f"keep_low is {self.keep_low} and keep_high is {self.keep_high}; "
                "expected keep_low to be at most keep_high"
            )
        return self

    def keeps(self, success: float) -> bool:
        """Return whether GRPO learns from a group with this mean success."""
        return self.keep_low <= success <= self.keep_high


class ClipParams(Section):
    """Bounds of GRPO's ratio p_S / p_old per token: [1 - clip_low, 1 + clip_high]."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)


class ReverseKlParams(Section):
    """The exact reverse KL: no options."""

    name: Literal["reverse_kl"]


class ForwardKlParams(Section):
    """The exact forward KL: no options."""

    name: Literal["forward_kl"]


class HardCeParams(Section):
    """Cross-entropy with the teacher's greedy token: no options."""

    name: Literal["hard_ce"]


class JsdParams(Section):
    """The generalised Jensen-Shannon divergence. beta: weight of the teacher in the mixture."""

    name: Literal["jsd"]
    beta: float = Field(default=0.5, gt=0, lt=1)


class RewardParams(Section):
    """The reward of the sampled objectives.

    clamp: bound c, in nats per token: [-c, c].
    centre: subtract the reward's mean under the student (same expected gradient, less variance).
    """

    clamp: float | None = Field(default=None, gt=0)
    centre: bool = False


class SampledParams(RewardParams):
    """The reverse KL on tokens that are drawn from the current student."""

    name: Literal["reverse_kl_sampled"]


class RolloutParams(RewardParams):
    """The reverse KL on the tokens that the rollout sampled.

    ratio: weight by p_S(a) / p_old(a) instead of log p_S(a).
    reward: log p_S in the reward: of the current student (`fresh`), or as the rollout recorded it
        (`rollout`).
    discount: factor per decision, for adding later decisions' rewards.
    """

    name: Literal["reverse_kl_rollout"]
    ratio: bool = False
    reward: Literal["fresh", "rollout"] = "fresh"
    discount: Fraction = 0.0


class MixedParams(GroupParams, ClipParams):
    """GRPO plus the reverse KL. distill: weight of the reverse KL."""

    name: Literal["mixed"]
    distill: float = Field(default=1.0, ge=0)


class CustomParams(Section):
    """An objective from outside the package, `"package.module:function"`, with any options.

    The function reads them as attributes: `batch.options.tau`.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str = Field(pattern=":")


def _spell_out(value: Any) -> Any:
    """Return `{name: jsd}` for `jsd`; a mapping without a name is of the default objective."""
    if isinstance(value, str):
        return {"name": value}
    return {"name": "reverse_kl", **value} if isinstance(value, Mapping) else value


def _select_model(value: Any) -> str:
    """Return the tag of an objective's model: its name, or `CUSTOM`."""
    name = str(value["name"] if isinstance(value, Mapping) else getattr(value, "name", value))
    return CUSTOM if ":" in name else name


Objective = Annotated[
    Annotated[ReverseKlParams, Tag("reverse_kl")]
    | Annotated[SampledParams, Tag("reverse_kl_sampled")]
    | Annotated[RolloutParams, Tag("reverse_kl_rollout")]
    | Annotated[ForwardKlParams, Tag("forward_kl")]
    | Annotated[HardCeParams, Tag("hard_ce")]
    | Annotated[JsdParams, Tag("jsd")]
    | Annotated[MixedParams, Tag("mixed")]
    | Annotated[CustomParams, Tag(CUSTOM)],
    Discriminator(_select_model),
    BeforeValidator(_spell_out, json_schema_input_type=str | dict[str, Any]),
]
"""In a JSON schema it is a name or any mapping: Prefect can't embed a schema with references."""


class OptimizeParams(UpdateParams):
    """The student's update towards the teacher, eq. (5).

    objective: a key of `vla_opd.learning.objectives.OBJECTIVES` or `ON_DECISIONS`, or
        `"package.module:function"`, a function of a `TokenBatch`; with its options.
    temperature: softmax temperature at which student and teacher are scored.
    teacher_temperature: the teacher's, if it differs from `temperature`.
    confidence: power of the weight (1 - H(p_T) / log V) per token; 0 weights all tokens equally.
    anchor: weight of KL(p_S || p_0), added to any objective at the same states. p_0 is the
        checkpoint `student`, with which the run begins.
    recoverable: learn only from states from which the teacher still succeeds
        (`label.recover_every`).
    states: number of states to learn from, drawn at random; all usable states if null. With it,
        arms learn from equally many states, whatever the length of their episodes. An iteration
        that has usable states, but fewer, fails.
    earlier: number of previous iterations whose states and labels are learned from as well, with
        equal weight (DAgger's aggregation). Metrics before and after the update are still measured
        on this iteration's states.
    """

    objective: Objective = ReverseKlParams(name="reverse_kl")
    temperature: float = Field(default=1.0, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)
    confidence: float = Field(default=0.0, ge=0)
    anchor: float = Field(default=0.0, ge=0)
    recoverable: bool = False
    states: int | None = Field(default=None, ge=1)
    earlier: int = Field(default=0, ge=0)


ON_SAMPLED_TOKENS = {"reverse_kl_rollout", "mixed"}
"""Objectives of the tokens that the rollout sampled: the keys of `ON_DECISIONS`."""
