"""The section `optimize`: the objective and its options."""

from typing import Literal

from pydantic import Field, model_validator

from vla_opd.params.section import Fraction, Section
from vla_opd.params.training import UpdateParams


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


class OptimizeParams(UpdateParams, GroupParams, ClipParams):
    """The student's update towards the teacher, eq. (5).

    objective: a key of `vla_opd.learning.objectives.OBJECTIVES` or `ON_DECISIONS`, or
        `"package.module:function"`, a function of a `TokenBatch`.
    temperature: softmax temperature at which student and teacher are scored.
    teacher_temperature: the teacher's, if it differs from `temperature`.
    confidence: power of the weight (1 - H(p_T) / log V) per token; 0 weights all tokens equally.
    anchor: weight of KL(p_S || p_0), added to any objective at the same states. p_0 is the
        checkpoint `student`, with which the run begins.
    beta: weight of the teacher in the mixture of `jsd`.
    distill: weight of the reverse KL in `mixed`.
    clamp: bound c of the reward of the sampled objectives, in nats per token: [-c, c].
    centre: subtract the reward's mean under the student (same expected gradient, less variance).
    ratio: weight `reverse_kl_rollout` by p_S(a) / p_old(a) instead of log p_S(a).
    reward: log p_S in the reward of `reverse_kl_rollout`: of the current student (`fresh`), or as
        the rollout recorded it (`rollout`).
    discount: factor per decision, for adding later decisions' rewards in `reverse_kl_rollout`.
    recoverable: learn only from states from which the teacher still succeeds
        (`label.recover_every`).
    states: number of states to learn from, drawn at random; all usable states if null. With it,
        arms learn from equally many states, whatever the length of their episodes. An iteration
        that has usable states, but fewer, fails.
    earlier: number of previous iterations whose states and labels are learned from as well, with
        equal weight (DAgger's aggregation). Metrics before and after the update are still measured
        on this iteration's states.
    """

    objective: str = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)
    confidence: float = Field(default=0.0, ge=0)
    anchor: float = Field(default=0.0, ge=0)
    beta: float = Field(default=0.5, gt=0, lt=1)
    distill: float = Field(default=1.0, ge=0)
    clamp: float | None = Field(default=None, gt=0)
    centre: bool = False
    ratio: bool = False
    reward: Literal["fresh", "rollout"] = "fresh"
    discount: Fraction = 0.0
    recoverable: bool = False
    states: int | None = Field(default=None, ge=1)
    earlier: int = Field(default=0, ge=0)


OPTIONS_OF = {
    "beta": {"jsd"},
    "clamp": {"reverse_kl_sampled", "reverse_kl_rollout"},
    "centre": {"reverse_kl_sampled", "reverse_kl_rollout"},
    "ratio": {"reverse_kl_rollout"},
    "reward": {"reverse_kl_rollout"},
    "discount": {"reverse_kl_rollout"},
    "distill": {"mixed"},
    "keep_low": {"mixed"},
    "keep_high": {"mixed"},
    "clip_low": {"mixed"},
    "clip_high": {"mixed"},
}
"""Options of `optimize` that only some objectives read, and those objectives."""

ON_SAMPLED_TOKENS = {"reverse_kl_rollout", "mixed"}
"""Objectives of the tokens that the rollout sampled: the keys of `ON_DECISIONS`."""
