"""Studies: arms x seeds."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from vla_opd.params.section import Fraction, Name, Section, once_each
from vla_opd.params.stages import START

LEARNING = ("sample", "label", "optimize", "explore", "reinforce")
OWN = f"finetuned.{START}"
"""The sections in which the arms of a study may differ; in how the student is fine-tuned too, but then not all of them have one start."""


class ArmParams(Section):
    """One way to learn: so many iterations with the teacher, then so many of GRPO.

    after:    the arm that it goes on from, with the same seed and the same settings; if none is named, it starts from the run's student.
    switch:   from where on: from the checkpoint of that arm's first iteration whose rollouts had at least this success, not from its last one.
    settings: `section.key: value`, in which the arm differs from the run. Some of `finetuned.student` give it a student of its own; without
              iterations, it is that student, made once with every seed: offline fine-tuning, for example on all demonstrations
              (`finetuned.student.per_task: null`).
    """

    after: Name | None = None
    switch: Fraction | None = None
    distill: int = Field(default=0, ge=0)
    reinforce: int = Field(default=0, ge=0)
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _learns(self) -> "ArmParams":
        if other := [
            dotted for dotted in self.settings if dotted.rpartition(".")[0] not in (*LEARNING, OWN)
        ]:
            raise ValueError(
                f"settings has {other[0]!r}; expected section.key with one of the sections {[*LEARNING, OWN]}"
            )
        if self.switch is not None and self.after is None:
            raise ValueError(
                f"switch is {self.switch} and after is null; expected the arm after which it switches"
            )
        if not self.distill + self.reinforce and not self.own_student:
            raise ValueError(
                f"distill and reinforce are 0; expected at least one iteration of either kind, or settings of {OWN}"
            )
        return self

    @property
    def sections(self) -> tuple[str, ...]:
        """What its iterations read."""
        return (*LEARNING[:3],) * bool(self.distill) + (*LEARNING[3:],) * bool(self.reinforce)

    @property
    def own_student(self) -> bool:
        """Whether it starts from another student than the run's."""
        return any(dotted.startswith(OWN) for dotted in self.settings)


class StudyParams(Section):
    """Arms x seeds: every arm learns once with every seed, from the run's own student and teacher, and is scored on the same initial states.

    seeds:         values of `run.learning_seed`; of `finetuned.student.seed`, for arms without iterations and those after them.
    every:         checkpoints are scored after every that many iterations, and at the end.
    keep_rollouts: keep what the iterations saw, and the labels. By default they go once a member is done; its checkpoints name their digests, and DVC
                   can make them again.
    """

    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(once_each)
    ] = (0, 1, 2, 3, 4)
    every: int = Field(default=1, ge=1)
    keep_rollouts: bool = False
    arms: Mapping[Name, ArmParams] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_follow_arms(self) -> "StudyParams":
        before = {name: arm.after for name, arm in self.arms.items() if arm.after is not None}
        for name, other in before.items():
            if other not in self.arms:
                raise ValueError(
                    f"arms.{name}.after is {other!r}; expected another arm, one of {sorted(self.arms)}"
                )
        if circle := find_cycle(before):
            raise ValueError(
                f"arms: {' after '.join(circle)} is a circle; expected an arm that starts from the run's student"
            )
        for name, other in before.items():
            used = {section for arm in self.lineage(other) for section in (OWN, *arm.sections)}
            if changed := [
                dotted for dotted in self.arms[name].settings if dotted.rpartition(".")[0] in used
            ]:
                raise ValueError(
                    f"arms.{name}.settings has {changed[0]!r}; expected those of {other}, which it goes on from, for what that made"
                )
        return self

    def lineage(self, arm: str) -> list[ArmParams]:
        """The arm and all that it goes on from, the first of them first."""
        its = self.arms[arm]
        return [*(self.lineage(its.after) if its.after else []), its]

    def own_student(self, arm: str) -> bool:
        """Whether it starts from another student than the run's."""
        return any(one.own_student for one in self.lineage(arm))


def find_cycle(chain: Mapping[str, str]) -> list[str]:
    """A chain that comes back to where it was, if there is one."""
    for name in chain:
        seen = [name]
        while seen[-1] in chain:
            seen.append(chain[seen[-1]])
            if seen[-1] in seen[:-1]:
                return seen
    return []
