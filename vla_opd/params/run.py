"""The whole run: every section of `params.yaml`, and what they name of each other."""

from collections.abc import Mapping

from pydantic import Field, model_validator

from vla_opd.params.objective import OptimizeParams
from vla_opd.params.section import Key, Name, Section
from vla_opd.params.stages import (
    START,
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
    """The run, whole: every section of `params.yaml`."""

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
    def batch_sizes(self) -> dict[str, int]:
        """Of the stages of this run that train, by the name of the setting."""
        used = {
            "finetune": self.trained,
            "optimize": self.iterations,
            "reinforce": self.reinforcements,
        }
        return {
            f"{verb}.batch_size": getattr(self, verb).batch_size
            for verb, what in used.items()
            if what
        }

    @property
    def trained(self) -> dict[str, PretrainedParams]:
        """The checkpoints that `finetune` makes, by name."""
        return {**self.pretrained, **self.finetuned}

    @property
    def origins(self) -> dict[str, str]:
        """The checkpoints that no iteration makes, and the stage that makes each."""
        ways = {"pretrain": self.pretrained, "finetune": self.finetuned, "adopt": self.adopt}
        return {name: f"{stage}@{name}" for stage, made in ways.items() for name in made}

    @property
    def reference(self) -> dict[str, str]:
        """The evaluations that need no iteration."""
        return {
            name: checkpoint
            for name, checkpoint in self.evaluations.items()
            if checkpoint in self.origins
        }

    @property
    def updates(self) -> dict[str, str]:
        """Every iteration, of either kind: the checkpoint that it starts from."""
        return {**self.iterations, **self.reinforcements}

    def chain(self, checkpoint: str) -> list[str]:
        """A checkpoint and all that it came from, back to one that no iteration made."""
        names = [checkpoint]
        while names[-1] in self.updates:
            names.append(self.updates[names[-1]])
        return names

    def depth(self, iteration: str) -> int:
        """How many iterations of the same kind come right before it on its chain; one of the other kind begins a schedule of its own."""
        chain = self.iterations if iteration in self.iterations else self.reinforcements
        parent = chain[iteration]
        return self.depth(parent) + 1 if parent in chain else 0

    @model_validator(mode="after")
    def _no_study_takes_the_reports_place(self) -> "Params":
        if "page" in self.studies:
            raise ValueError(
                "studies has 'page': that is where the run's own report is; expected another name"
            )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> "Params":
        checkpoints = {*self.origins, *self.updates}
        wanted = {
            f"{kind}.{k}": v
            for kind in ("iterations", "reinforcements", "evaluations")
            for k, v in getattr(self, kind).items()
        }
        wanted |= {"label.teacher": self.label.teacher}
        for field, name in wanted.items():
            if name not in checkpoints:
                raise ValueError(
                    f"{field} is {name!r}: no such checkpoint; expected one of {sorted(checkpoints)}"
                )
        for field, made in {
            f"{kind}.{k}": c
            for kind in ("pretrained", "finetuned")
            for k, c in getattr(self, kind).items()
        }.items():
            if made.demonstrations not in self.demonstrations:
                choices = sorted(self.demonstrations)
                raise ValueError(
                    f"{field}.demonstrations is {made.demonstrations!r}: no such set of demonstrations; expected one of {choices}"
                )
        return self

    @model_validator(mode="after")
    def _checkpoints_come_from_somewhere(self) -> "Params":
        taken: set[str] = set()
        for kind in ("pretrained", "finetuned", "adopt", "iterations", "reinforcements"):
            if overlap := taken.intersection(getattr(self, kind)):
                raise ValueError(
                    f"{kind} has {sorted(overlap)}: these names belong to other checkpoints; choose others"
                )
            taken.update(getattr(self, kind))
        for name, made in self.finetuned.items():
            if made.parent not in self.origins:
                raise ValueError(
                    f"finetuned.{name}.parent is {made.parent!r}: no such checkpoint; expected one of {sorted(self.origins)}"
                )
        if circle := find_cycle({name: made.parent for name, made in self.finetuned.items()}):
            raise ValueError(
                f"finetuned: {' -> '.join(circle)} is a circle; expected a chain that starts from another checkpoint"
            )
        if circle := find_cycle(self.updates):
            raise ValueError(
                f"iterations: {' -> '.join(circle)} is a circle; expected a chain that starts from a fine-tuned checkpoint"
            )
        if START not in self.origins:
            raise ValueError(
                f"pretrained, finetuned and adopt have {sorted(self.origins)}; expected {START!r} among them, which the run begins with"
            )
        return self
