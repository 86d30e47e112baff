"""Studies: arms x seeds."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from vla_opd.params.section import Fraction, Name, Section, require_unique
from vla_opd.params.stages import INITIAL_STUDENT

DISTILL_SECTIONS = ("sample", "label", "optimize")
REINFORCE_SECTIONS = ("explore", "reinforce")
STUDENT_SECTION = f"finetuned.{INITIAL_STUDENT}"
ARM_SECTIONS = (*DISTILL_SECTIONS, *REINFORCE_SECTIONS, STUDENT_SECTION)
"""The sections in which arms may differ. With the last, they no longer share one student."""


class ArmParams(Section):
    """One way to learn: iterations of distillation, then iterations of GRPO.

    after: arm that this one continues, with the same seed and settings; if null, the arm starts
        from the run's student.
    switch: success rate at which to continue: from the checkpoint of that arm's first iteration
        whose rollouts reached it, instead of from its last checkpoint.
    distill: number of iterations of distillation.
    reinforce: number of iterations of GRPO.
    settings: differences from the run, as `section.key: value`, e.g. `optimize.objective: jsd`.
        With settings of `finetuned.student` the arm has a student of its own. Without iterations
        the arm is that student, trained once per seed: offline fine-tuning, for example on all
        demonstrations (`finetuned.student.per_task: null`).
    """

    after: Name | None = None
    switch: Fraction | None = None
    distill: int = Field(default=0, ge=0)
    reinforce: int = Field(default=0, ge=0)
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _require_learning(self) -> "ArmParams":
        for dotted in self.settings:
            if _section_of(dotted) is None:
                raise ValueError(
                    f"settings has {dotted!r}; "
                    f"expected section.key with one of the sections {list(ARM_SECTIONS)}"
                )
        if self.switch is not None and self.after is None:
            raise ValueError(
                f"switch is {self.switch} and after is null; "
                "expected the arm after which it switches"
            )
        if self.distill + self.reinforce == 0 and not self.own_student:
            raise ValueError(
                "distill and reinforce are 0; "
                f"expected at least one iteration of either kind, or settings of {STUDENT_SECTION}"
            )
        return self

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections that the arm's iterations read."""
        distill = DISTILL_SECTIONS if self.distill else ()
        reinforce = REINFORCE_SECTIONS if self.reinforce else ()
        return (*distill, *reinforce)

    @property
    def own_student(self) -> bool:
        """True if the arm starts from another student than the run's."""
        return any(_section_of(dotted) == STUDENT_SECTION for dotted in self.settings)


class StudyParams(Section):
    """Arms x seeds: every arm learns once per seed, from the run's own student and teacher.

    All checkpoints are scored on the same initial states.

    seeds: values of `run.learning_seed`. In arms without iterations, and in those that continue
        one, also values of `finetuned.student.seed`.
    every: iterations per evaluation; the last checkpoint is always scored.
    keep_rollouts: keep the rollouts and labels. By default they are deleted when a member is done:
        its checkpoints name their digests, and DVC can make them again.
    arms: the arms, by name.
    """

    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1),
        AfterValidator(require_unique),
    ] = (0, 1, 2, 3, 4)
    every: int = Field(default=1, ge=1)
    keep_rollouts: bool = False
    arms: Mapping[Name, ArmParams] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_arms_to_follow_arms(self) -> "StudyParams":
        predecessors = {name: arm.after for name, arm in self.arms.items() if arm.after is not None}
        for name, predecessor in predecessors.items():
            if predecessor not in self.arms:
                raise ValueError(
                    f"arms.{name}.after is {predecessor!r}; "
                    f"expected another arm, one of {sorted(self.arms)}"
                )
        cycle = find_cycle(predecessors)
        if cycle:
            raise ValueError(
                f"arms: {' after '.join(cycle)} is a cycle; "
                "expected an arm that starts from the run's student"
            )
        for name, predecessor in predecessors.items():
            self._require_unchanged_settings(name, predecessor)
        return self

    def _require_unchanged_settings(self, name: str, predecessor: str) -> None:
        """ValueError if an arm changes a setting that the arm before it has learned with."""
        used = {STUDENT_SECTION}
        for arm in self.lineage(predecessor):
            used.update(arm.sections)
        for dotted in self.arms[name].settings:
            if _section_of(dotted) in used:
                raise ValueError(
                    f"arms.{name}.settings has {dotted!r}; "
                    f"expected the settings of {predecessor}, which it continues (remove this one)"
                )

    def lineage(self, arm: str) -> list[ArmParams]:
        """Return the arm and all that it continues, the first of them first."""
        settings = self.arms[arm]
        earlier = self.lineage(settings.after) if settings.after else []
        return [*earlier, settings]

    def own_student(self, arm: str) -> bool:
        """Return whether the arm, or one that it continues, starts from a student of its own."""
        return any(settings.own_student for settings in self.lineage(arm))


def find_cycle(parents: Mapping[str, str]) -> list[str]:
    """Return a chain of names that comes back to one of its own; empty if there is none."""
    for name in parents:
        chain = [name]
        while chain[-1] in parents:
            parent = parents[chain[-1]]
            if parent in chain:
                return [*chain, parent]
            chain.append(parent)
    return []


def _section_of(dotted: str) -> str | None:
    """Return the section of a setting; None if arms may not differ in it."""
    for section in ARM_SECTIONS:
        if dotted.startswith(f"{section}."):
            return section
    return None
