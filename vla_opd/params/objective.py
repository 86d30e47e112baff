"""The section `optimize`: the objective and its options."""

from typing import Literal

from pydantic import Field, model_validator

from vla_opd.params.section import Fraction, Section
from vla_opd.params.training import UpdateParams


class GroupParams(Section):
    """Which groups GRPO learns from: those whose mean success is within keep_low ... keep_high. Of a single outcome there is nothing to prefer."""

    keep_low: Fraction = 0.1
    keep_high: Fraction = 0.9

    @model_validator(mode="after")
    def _some_are_kept(self) -> "GroupParams":
        if self.keep_low > self.keep_high:
            raise ValueError(
                f"keep_low is {self.keep_low} and keep_high is {self.keep_high}; expected keep_low to be at most keep_high"
            )
        return self

    def keeps(self, success: float) -> bool:
        """Whether a group of that mean success is one to learn from."""
        return self.keep_low <= success <= self.keep_high


class ClipParams(Section):
    """GRPO's ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)


class OptimizeParams(UpdateParams, GroupParams, ClipParams):
    """Eq. (5): the student's update towards the teacher.

    objective:   a key of `vla_opd.learning.objectives.OBJECTIVES` or `ON_DECISIONS`, or `"package.module:function"` of a `TokenBatch`.
    temperature: both student and teacher are scored at it, the teacher at `teacher_temperature` if that is set.
    confidence:  tokens are weighted by (1 - H(p_T) / log V) to this power.
    anchor:      weight of KL(p_S || p_0) at the same states, p_0 the checkpoint `student` that the run began with, whatever the objective.
    beta:        of `jsd`. distill: weight of the reverse KL in `mixed`.
    recoverable: only states from which the teacher still succeeds are learnt from (`label.recover_every`).
    states:      only so many of the states are learnt from, drawn at random: as many in every arm, however long its episodes are. An iteration
                 that has some, but fewer, fails.
    earlier:     states and labels of so many iterations before this one are learnt from too, all of them alike: DAgger's aggregation. What is
                 measured before and after is measured on this iteration's states.
    clamp, centre: the reward of the sampled forms is cut to [-clamp, clamp]; its mean under the student is taken off.
    ratio, reward, discount: of `reverse_kl_rollout`: an importance ratio in place of the log-probability; the student in r as it is now, or as the
                 rollout recorded it; the discount of the rewards of later decisions.
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
    **{field: {"mixed"} for field in (*GroupParams.model_fields, *ClipParams.model_fields)},
}
"""Settings of `optimize` that only these objectives read: with another one they would be silently without effect."""
FROM_STUDENT = {"reverse_kl_rollout", "mixed"}
"""Objectives that take the rollout's tokens for the student's: `vla_opd.learning.objectives.ON_DECISIONS`, as a test says."""
