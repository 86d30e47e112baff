"""The whole run: every section of `params.yaml`, and the names by which they refer to others."""

from collections.abc import Mapping

from pydantic import Field, model_validator

from vla_opd.params.objective import OptimizeParams
from vla_opd.params.section import Key, Name, Section
from vla_opd.params.stages import (
    INITIAL_STUDENT,
    AdoptParams,
    DemonstrateParams,
    DemonstrationSet,
    EnvironmentParams,
    EvaluateParams,
    ExploreParams,
    FinetunedParams,
    FinetuneParams,
    LabelParams,
    PolicyParams,
    PretrainedParams,
    ReinforceParams,
    ReportParams,
    RunParams,
    SampleParams,
)
from vla_opd.params.study import StudyParams, find_cycle


class Params(Section):
    """The run: every section of `params.yaml`.

    run, environment: what several stages read.
    demonstrate ... report: settings of the stage of that name; `policy` belongs to `finetune`.
    demonstrations: the sets of demonstrations, by name.
    pretrained, finetuned, adopt: the checkpoints that no iteration makes, by name.
    iterations, reinforcements: the iterations of distillation and of GRPO, by name: the checkpoint
        from which each starts.
    evaluations: the evaluations, by name: the checkpoint that each scores.
    studies: the studies, by name; their pages are `report/<name>`, beside the run's own
        `report/page`.
    """

    run: RunParams
    environment: EnvironmentParams
    demonstrate: DemonstrateParams = DemonstrateParams()
    policy: PolicyParams = PolicyParams()
    finetune: FinetuneParams = FinetuneParams()
    sample: SampleParams = SampleParams()
    label: LabelParams = LabelParams()
    optimize: OptimizeParams = OptimizeParams()
    explore: ExploreParams = ExploreParams()
    reinforce: ReinforceParams = ReinforceParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    demonstrations: Mapping[Key, DemonstrationSet] = Field(default_factory=dict)
    pretrained: Mapping[Key, PretrainedParams] = Field(default_factory=dict)
    finetuned: Mapping[Key, FinetunedParams] = Field(default_factory=dict)
    adopt: Mapping[Key, AdoptParams] = Field(default_factory=dict)
    iterations: Mapping[Key, Name] = Field(description="iteration: the checkpoint it starts from")
    reinforcements: Mapping[Key, Name] = Field(
        default_factory=dict, description="iteration of GRPO: the checkpoint it starts from"
    )
    evaluations: Mapping[Key, Name] = Field(description="evaluation: the checkpoint it scores")
    studies: Mapping[Name, StudyParams] = Field(
        default_factory=dict,
        description="each is `report/<name>` beside the run's own, `report/page`",
    )

    @property
    def trained(self) -> dict[str, PretrainedParams]:
        """The checkpoints that `finetune` makes, by name."""
        return {**self.pretrained, **self.finetuned}

    @property
    def origins(self) -> dict[str, str]:
        """The checkpoints that no iteration makes, and the stage that makes each."""
        return {
            **{name: f"pretrain@{name}" for name in self.pretrained},
            **{name: f"finetune@{name}" for name in self.finetuned},
            **{name: f"adopt@{name}" for name in self.adopt},
        }

    @property
    def reference_evaluations(self) -> dict[str, str]:
        """The evaluations of checkpoints that no iteration makes."""
        origins = self.origins
        return {name: scored for name, scored in self.evaluations.items() if scored in origins}

    @property
    def updates(self) -> dict[str, str]:
        """The iterations of both kinds, and the checkpoint from which each starts."""
        return {**self.iterations, **self.reinforcements}

    def chain(self, checkpoint: str) -> list[str]:
        """Return a checkpoint and all that it came from, back to one that no iteration made."""
        names = [checkpoint]
        while names[-1] in self.updates:
            names.append(self.updates[names[-1]])
        return names

    def depth(self, iteration: str) -> int:
        """Return how many iterations of the same kind directly precede this one on its chain.

        That is its position on the schedule: an iteration of the other kind starts a new one.
        """
        starts = self.iterations if iteration in self.iterations else self.reinforcements
        parent = starts[iteration]
        return self.depth(parent) + 1 if parent in starts else 0

    @model_validator(mode="after")
    def _require_no_study_called_page(self) -> "Params":
        if "page" in self.studies:
            raise ValueError(
                "studies has 'page': that is where the run's own report is; expected another name"
            )
        return self

    @model_validator(mode="after")
    def _require_existing_checkpoints(self) -> "Params":
        for kind in ("iterations", "reinforcements", "evaluations"):
            for name, checkpoint in getattr(self, kind).items():
                self._require_checkpoint(f"{kind}.{name}", checkpoint)
        self._require_checkpoint("label.teacher", self.label.teacher)
        return self

    def _require_checkpoint(self, field: str, checkpoint: str) -> None:
        checkpoints = {*self.origins, *self.updates}
        if checkpoint not in checkpoints:
            raise ValueError(
                f"{field} is {checkpoint!r}: no such checkpoint; "
                f"expected one of {sorted(checkpoints)}"
            )

    @model_validator(mode="after")
    def _require_existing_demonstrations(self) -> "Params":
        for kind in ("pretrained", "finetuned"):
            for name, recipe in getattr(self, kind).items():
                if recipe.demonstrations not in self.demonstrations:
                    raise ValueError(
                        f"{kind}.{name}.demonstrations is {recipe.demonstrations!r}: "
                        "no such set of demonstrations; "
                        f"expected one of {sorted(self.demonstrations)}"
                    )
        return self

    @model_validator(mode="after")
    def _require_unique_checkpoints(self) -> "Params":
        taken: set[str] = set()
        for kind in ("pretrained", "finetuned", "adopt", "iterations", "reinforcements"):
            names = getattr(self, kind)
            overlap = taken.intersection(names)
            if overlap:
                raise ValueError(
                    f"{kind} has {sorted(overlap)}: these names belong to other checkpoints; "
                    "choose others"
                )
            taken.update(names)
        return self

    @model_validator(mode="after")
    def _require_existing_parents(self) -> "Params":
        for name, recipe in self.finetuned.items():
            if recipe.parent not in self.origins:
                raise ValueError(
                    f"finetuned.{name}.parent is {recipe.parent!r}: no such checkpoint; "
                    f"expected one of {sorted(self.origins)}"
                )
        return self

    @model_validator(mode="after")
    def _require_no_cycles(self) -> "Params":
        cycle = find_cycle({name: recipe.parent for name, recipe in self.finetuned.items()})
        if cycle:
            raise ValueError(
                f"finetuned: {' -> '.join(cycle)} is a cycle; "
                "expected a chain that starts from another checkpoint"
            )
        cycle = find_cycle(self.updates)
        if cycle:
            raise ValueError(
                f"iterations: {' -> '.join(cycle)} is a cycle; "
                "expected a chain that starts from a fine-tuned checkpoint"
            )
        return self

    @model_validator(mode="after")
    def _require_initial_student(self) -> "Params":
        if INITIAL_STUDENT not in self.origins:
            raise ValueError(
                f"pretrained, finetuned and adopt have {sorted(self.origins)}; "
                f"expected {INITIAL_STUDENT!r} among them, with which the run begins"
            )
        return self
