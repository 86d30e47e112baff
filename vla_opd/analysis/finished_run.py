"""The artifacts of a finished run, read together: iterations, evaluations and their costs.

Reading proves that the artifacts belong together: every one names the digests of its parents.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.evaluation import Score, score
from vla_opd.artifacts.files import remove
from vla_opd.artifacts.manifest import MANIFEST, Manifest, open_artifact, read_manifest
from vla_opd.data.divergence import Divergence, DivergenceMeans
from vla_opd.data.records import Record, read_records
from vla_opd.params.run import Params

DISCARDED = ".discarded"  # in a run's folder: the manifests of artifacts that were removed from it
BulkyKind = Literal["trajectories", "labels"]


class Metadata(BaseModel):
    """Fields that are read from an artifact; all others are ignored."""

    model_config = ConfigDict(frozen=True)


class EvaluationFacts(Metadata):
    """The facts of an evaluation.

    overall: the score on the tasks that the run trains on; unseen: that on the other tasks.
    decided: the rate of `evaluate.decide` for which the episodes decided.
    """

    overall: Score
    unseen: Score | None = None
    decided: float | None = None
    tasks: dict[str, Score]
    horizon: int


class StepMetrics(Metadata):
    """A line of `metrics.jsonl`: one optimiser step.

    reverse_kl:    None where the objective is the reverse KL, which then is the loss.
    gradient_norm: before clipping.
    clip_fraction: the fraction of tokens whose gradient is stopped by the ratio's clip.
    clamp_fraction: the fraction of tokens whose reward is clamped.
    """

    loss: float
    student_entropy: float
    reverse_kl: float | None = None
    gradient_norm: float
    clip_fraction: float | None = None
    clamp_fraction: float | None = None

    @property
    def kl(self) -> float:
        return self.loss if self.reverse_kl is None else self.reverse_kl


class UpdateResult(Metadata):
    """Means over the optimiser steps of an iteration; None where no step has the metric."""

    gradient_norm: float | None = None
    clip_fraction: float | None = None
    clamp_fraction: float | None = None


class IterationResult(UpdateResult):
    """The results and the cost of an iteration of distillation.

    depth:        the number of iterations before it, of either kind.
    success:      the success rate of its rollouts, which are sampled and before its update.
    failed_share: the fraction of the tokens learned from that is in failed rollouts.
    recoverable:  the fraction of states from which the teacher still succeeds, where it was tried.
    """

    name: str
    depth: int
    success: float
    episodes: int
    states: int
    env_steps: int
    teacher_queries: int
    failed_share: float
    recoverable: float | None = None
    before: DivergenceMeans
    after: DivergenceMeans


class Entropy(Metadata):
    """Mean entropy over valid tokens in nats per token, at the temperature of the rollouts."""

    student_entropy: float


class ReinforcementResult(UpdateResult):
    """The results and the cost of an iteration of GRPO.

    success:       the success rate of its rollouts, which are sampled and before its update.
    useful_groups: how many of its `groups` can be learned from.
    """

    name: str
    success: float
    episodes: int
    env_steps: int
    groups: int
    useful_groups: int
    before: Entropy
    after: Entropy


class Results(Metadata):
    """`results.json`. Environment steps and teacher queries are totals over all iterations."""

    teacher: Score
    start: Score
    final: Score
    env_steps: int
    teacher_queries: int
    iterations: tuple[IterationResult, ...]
    reinforcements: tuple[ReinforcementResult, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation.

    position: the number of iterations that led to its checkpoint; None if no iteration made it or
              starts from it.
    records:  of the tasks that the run trains on. unseen: of the other tasks.
    """

    name: str
    checkpoint: str
    position: int | None
    manifest: Manifest
    facts: EvaluationFacts
    records: tuple[Record, ...]
    unseen: tuple[Record, ...]

    @property
    def rates(self) -> tuple[float, float] | None:
        """The rates between which it decides; it stops as soon as it has decided."""
        return self.manifest.params["evaluate"].get("decide")

    @property
    def confidence(self) -> float:
        return self.manifest.params["evaluate"]["confidence"]

    def scored_at(self, horizon: int) -> Score | None:
        """Return the score at a shorter horizon, in control steps; None if it is longer."""
        if horizon > self.facts.horizon:
            return None
        outcomes = [record.success and record.steps <= horizon for record in self.records]
        return score(outcomes, self.confidence)


@dataclass(frozen=True)
class Iteration:
    """An iteration of distillation.

    artifacts: their manifests by folder: `checkpoints`, `trajectories`, `labels`.
    before, after: the student's divergence from the teacher before and after the update.
    """

    result: IterationResult
    artifacts: Mapping[str, Manifest]
    steps: tuple[StepMetrics, ...]
    before: Divergence
    after: Divergence


@dataclass(frozen=True)
class Reinforcement:
    """An iteration of GRPO. artifacts: their manifests by folder: `checkpoints`, `trajectories`."""

    result: ReinforcementResult
    artifacts: Mapping[str, Manifest]
    steps: tuple[StepMetrics, ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    evaluations: sorted by position, the teacher's last. iterations: sorted by depth.
    """

    params: Params
    checkpoints: Mapping[str, Manifest]
    iterations: tuple[Iteration, ...]
    reinforcements: tuple[Reinforcement, ...]
    evaluations: Mapping[str, Evaluation]

    @property
    def updates(self) -> tuple[Iteration | Reinforcement, ...]:
        """Iterations of both kinds, each after those that it came from."""

        def position(update: Iteration | Reinforcement) -> int:
            return len(self.params.chain(update.result.name))

        updates = (*self.iterations, *self.reinforcements)
        return tuple(sorted(updates, key=position))

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all artifacts by `<folder>/<name>`."""
        manifests: dict[str, Manifest] = {}
        for name, manifest in self.checkpoints.items():
            manifests[f"checkpoints/{name}"] = manifest
        for update in self.updates:
            name = update.result.name
            for folder, manifest in update.artifacts.items():
                manifests[f"{folder}/{name}"] = manifest
        for name, evaluation in self.evaluations.items():
            manifests[f"evaluations/{name}"] = evaluation.manifest
        return manifests

    @property
    def parents(self) -> dict[str, str]:
        """The digests of all artifacts by `<folder>/<name>`."""
        return {name: manifest.digest for name, manifest in self.manifests.items()}

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the artifacts were made with; several values where they differ."""
        values: dict[str, set[str]] = {}
        for manifest in self.manifests.values():
            for package, version in manifest.made_with.items():
                distinct = values.setdefault(package, set())
                distinct.add(version)
        versions: dict[str, str] = {}
        for package in sorted(values):
            distinct = sorted(values[package])
            versions[package] = ", ".join(distinct)
        return versions

    @property
    def optimizer_steps(self) -> int:
        return sum(len(update.steps) for update in self.updates)

    @property
    def results(self) -> Results:
        names = self.params.report
        teacher = self.evaluations[names.teacher]
        start = self.evaluations[names.start]
        final = self.evaluations[names.final]
        iterations = [iteration.result for iteration in self.iterations]
        reinforcements = [iteration.result for iteration in self.reinforcements]
        env_steps = sum(update.result.env_steps for update in self.updates)
        queries = sum(result.teacher_queries for result in iterations)
        return Results(
            teacher=teacher.facts.overall,
            start=start.facts.overall,
            final=final.facts.overall,
            env_steps=env_steps,
            teacher_queries=queries,
            iterations=tuple(iterations),
            reinforcements=tuple(reinforcements),
        )


def read_run(params: Params, root: Path) -> Run:
    """Read the run in the folder `root`.

    Trajectories and labels may have been discarded; their manifests must exist.
    ValueError names an artifact that is missing or does not belong to the others.
    """
    checkpoints: dict[str, Manifest] = {}
    for name in params.origins:
        checkpoints[name] = read_manifest(root / "checkpoints" / name, "checkpoint")
    positions = _positions(params)
    iterations = tuple(
        _read_iteration(name, root, positions[name] - 1)
        for name in sorted(params.iterations, key=positions.__getitem__)
    )
    reinforcements = tuple(
        _read_reinforcement(name, root)
        for name in sorted(params.reinforcements, key=positions.__getitem__)
    )
    for update in (*iterations, *reinforcements):
        checkpoints[update.result.name] = update.artifacts["checkpoints"]
    evaluations: dict[str, Evaluation] = {}
    for name in _sort_evaluations(params, positions):
        checkpoint = params.evaluations[name]
        evaluations[name] = _read_evaluation(
            root / "evaluations" / name,
            checkpoint,
            checkpoints[checkpoint],
            positions.get(checkpoint),
        )
    return Run(params, checkpoints, iterations, reinforcements, evaluations)


def _positions(params: Params) -> dict[str, int]:
    """Return how many iterations lead to each checkpoint that an iteration makes or starts from."""
    positions: dict[str, int] = {}
    for name in (*params.updates, *params.updates.values()):
        chain = params.chain(name)
        positions[name] = len(chain) - 1
    return positions


def _sort_evaluations(params: Params, positions: Mapping[str, int]) -> list[str]:
    """Return the evaluations by position, the teacher's last."""

    def order(name: str) -> tuple[bool, int]:
        is_teacher = name == params.report.teacher
        checkpoint = params.evaluations[name]
        position = positions.get(checkpoint, -1)
        return is_teacher, position

    return sorted(params.evaluations, key=order)


def discard(root: Path, kind: BulkyKind, name: str) -> None:
    """Remove an artifact of the run in `root` to make room, but keep its manifest."""
    folder = root / kind / name
    kept = root / DISCARDED / kind / name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(
        folder / MANIFEST,
        kept / MANIFEST,
    )
    remove(folder)


def _read_bulky_manifest(root: Path, kind: BulkyKind, name: str) -> Manifest:
    """Read the manifest of an artifact, which may have been discarded."""
    folder = root / kind / name
    kept = root / DISCARDED / kind / name
    if kept.exists() and not folder.exists():
        folder = kept
    return read_manifest(folder, kind)


def _read_iteration(name: str, root: Path, depth: int) -> Iteration:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories = _read_bulky_manifest(root, "trajectories", name)
    labels = _read_bulky_manifest(root, "labels", name)
    _require_parent(folder, checkpoint, "trajectories", trajectories)
    _require_parent(folder, checkpoint, "labels", labels)
    steps = _read_steps(folder)
    facts = {
        **checkpoint.facts,
        **trajectories.facts,
        **_label_facts(labels),
        **_means(steps),
        "env_steps": trajectories.facts["env_steps"] + labels.facts.get("env_steps", 0),
        "name": name,
        "depth": depth,
    }
    return Iteration(
        IterationResult.model_validate(facts),
        {"checkpoints": checkpoint, "trajectories": trajectories, "labels": labels},
        steps,
        Divergence.model_validate(facts["before"]),
        Divergence.model_validate(facts["after"]),
    )


def _label_facts(labels: Manifest) -> dict[str, Any]:
    names = labels.facts.keys() & {"teacher_queries", "recoverable"}
    return {name: labels.facts[name] for name in names}


def _read_reinforcement(name: str, root: Path) -> Reinforcement:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories = _read_bulky_manifest(root, "trajectories", name)
    _require_parent(folder, checkpoint, "trajectories", trajectories)
    steps = _read_steps(folder)
    facts = {
        **checkpoint.facts,
        **trajectories.facts,
        **_means(steps),
        "name": name,
    }
    return Reinforcement(
        ReinforcementResult.model_validate(facts),
        {"checkpoints": checkpoint, "trajectories": trajectories},
        steps,
    )


def _read_steps(folder: Path) -> tuple[StepMetrics, ...]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tuple(StepMetrics.model_validate_json(line) for line in lines)


def _means(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the fields of `UpdateResult` that any step has."""
    means: dict[str, float] = {}
    for name in UpdateResult.model_fields:
        values: list[float] = []
        for step in steps:
            value = getattr(step, name)
            if value is not None:
                values.append(value)
        if values:
            means[name] = sum(values) / len(values)
    return means


def _read_evaluation(
    folder: Path, checkpoint: str, parent: Manifest, position: int | None
) -> Evaluation:
    manifest = open_artifact(folder, "evaluation")
    _require_parent(folder, manifest, "checkpoint", parent)
    unseen_tasks = manifest.params["evaluate"].get("unseen", ())
    seen: list[Record] = []
    unseen: list[Record] = []
    for record in read_records(folder):
        records = unseen if record.task in unseen_tasks else seen
        records.append(record)
    return Evaluation(
        name=folder.name,
        checkpoint=checkpoint,
        position=position,
        manifest=manifest,
        facts=EvaluationFacts.model_validate(manifest.facts),
        records=tuple(seen),
        unseen=tuple(unseen),
    )


def _require_parent(folder: Path, child: Manifest, role: str, parent: Manifest) -> None:
    recorded = str(child.parents.get(role))
    if recorded != parent.digest:
        raise ValueError(
            f"{folder}: made from {role} {recorded[:12]}; expected {parent.digest[:12]}, "
            "the artifact that is there now (run the stage that makes it)"
        )
