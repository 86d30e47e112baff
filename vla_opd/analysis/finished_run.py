"""A run's artifacts, read together once it is proved that they belong together: every iteration, every evaluation, and what they cost."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.evaluation import Record, Score, read_records, score
from vla_opd.artifacts.files import remove
from vla_opd.artifacts.manifest import MANIFEST, Manifest, open_artifact, read_manifest
from vla_opd.data.divergence import Distance, Means
from vla_opd.params.run import Params

DISCARDED = ".discarded"  # in a run's folder: the manifests of what was removed from it


class Read(BaseModel):
    """What is read from an artifact, as far as anything asks for it."""

    model_config = ConfigDict(frozen=True)


class Evaluated(Read):
    """The facts of an evaluation.

    overall: of the tasks that the run trains on; unseen: of those that it doesn't. decided: for which of the rates of `evaluate.decide`.
    """

    overall: Score
    unseen: Score | None = None
    decided: float | None = None
    tasks: dict[str, Score]
    horizon: int


class Step(Read):
    """A line of `metrics.jsonl`. Where the objective is the reverse KL itself, the loss is it.

    gradient_norm: before it is clipped. clip_fraction, clamp_fraction: of the tokens, whose gradient the ratio's clip stops, or whose reward is cut.
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


class UpdateResult(Read):
    """Of an iteration of either kind: means over its optimiser steps of what `Step` says, None where none says it."""

    gradient_norm: float | None = None
    clip_fraction: float | None = None
    clamp_fraction: float | None = None


class IterationResult(UpdateResult):
    """What an iteration did and cost. `success` is that of its rollouts: sampled, and before its update. depth: iterations before it, of either kind.

    failed_share: the share of the tokens that are learnt from, and so of the labels' say, that lies in rollouts that failed.
    recoverable:  the share of states from which the teacher still succeeds, where it was tried.
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
    before: Means
    after: Means


class Entropy(Read):
    """The mean over valid tokens, in nats a token, at the rollout's temperature."""

    student_entropy: float


class ReinforcementResult(UpdateResult):
    """What an iteration of GRPO did and cost. `success` is that of its rollouts; useful_groups: of its `groups`, those to learn from."""

    name: str
    success: float
    episodes: int
    env_steps: int
    groups: int
    useful_groups: int
    before: Entropy
    after: Entropy


class Results(Read):
    """`results.json`. Steps and queries are totals over all iterations, of either kind."""

    teacher: Score
    start: Score
    final: Score
    env_steps: int
    teacher_queries: int
    iterations: tuple[IterationResult, ...]
    reinforcements: tuple[ReinforcementResult, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, whose checkpoint has `position` iterations behind it; None if no iteration starts from it or made it.

    records: of the tasks that the run trains on. unseen: of those that it doesn't.
    """

    name: str
    checkpoint: str
    position: int | None
    manifest: Manifest
    facts: Evaluated
    records: tuple[Record, ...]
    unseen: tuple[Record, ...]

    @property
    def asked(self) -> tuple[float, float] | None:
        """Between which rates it was to decide, and so stopped early."""
        return self.manifest.params["evaluate"].get("decide")

    @property
    def confidence(self) -> float:
        return self.manifest.params["evaluate"]["confidence"]

    def scored_at(self, horizon: int) -> Score | None:
        """The score if episodes had ended after `horizon` control steps; None beyond the horizon that was run."""
        if horizon > self.facts.horizon:
            return None
        return score((r.success and r.steps <= horizon for r in self.records), self.confidence)


@dataclass(frozen=True)
class Iteration:
    """An iteration, its artifacts by their folder's name, a row of metrics for every optimiser step, and in what the student was off."""

    result: IterationResult
    made: Mapping[str, Manifest]
    steps: tuple[Step, ...]
    before: Distance
    after: Distance


@dataclass(frozen=True)
class Reinforcement:
    """An iteration of GRPO, its artifacts by their folder's name, and a row of metrics for every optimiser step."""

    result: ReinforcementResult
    made: Mapping[str, Manifest]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Run:
    """A run, whole. Evaluations in the order of their columns; iterations in the order of their depth, of GRPO too."""

    params: Params
    checkpoints: Mapping[str, Manifest]
    iterations: tuple[Iteration, ...]
    reinforcements: tuple[Reinforcement, ...]
    evaluations: Mapping[str, Evaluation]

    @property
    def updates(self) -> tuple[Iteration | Reinforcement, ...]:
        """Iterations of either kind, each after all that it came from."""
        return tuple(
            sorted(
                self.iterations + self.reinforcements,
                key=lambda one: len(self.params.chain(one.result.name)),
            )
        )

    @property
    def parents(self) -> dict[str, str]:
        """The digest of everything that was read."""
        read = {
            f"checkpoints/{name}": manifest.digest for name, manifest in self.checkpoints.items()
        }
        read |= {
            f"{kind}/{one.result.name}": manifest.digest
            for one in self.updates
            for kind, manifest in one.made.items()
        }
        return read | {
            f"evaluations/{name}": one.manifest.digest for name, one in self.evaluations.items()
        }

    @property
    def versions(self) -> dict[str, str]:
        """What the artifacts were made with; several values where they differ."""
        manifests = [
            *self.checkpoints.values(),
            *(one.manifest for one in self.evaluations.values()),
        ]
        manifests += [manifest for one in self.updates for manifest in one.made.values()]
        names = sorted({name for manifest in manifests for name in manifest.made_with})
        return {
            name: ", ".join(sorted({m.made_with[name] for m in manifests if name in m.made_with}))
            for name in names
        }

    @property
    def optimizer_steps(self) -> int:
        return sum(len(one.steps) for one in self.updates)

    @property
    def results(self) -> Results:
        named, rows = self.params.report, [one.result for one in self.iterations]
        return Results(
            teacher=self.evaluations[named.teacher].facts.overall,
            start=self.evaluations[named.start].facts.overall,
            final=self.evaluations[named.final].facts.overall,
            env_steps=sum(one.result.env_steps for one in self.updates),
            teacher_queries=sum(row.teacher_queries for row in rows),
            iterations=tuple(rows),
            reinforcements=tuple(one.result for one in self.reinforcements),
        )


def read_run(params: Params, root: Path) -> Run:
    """Everything of the run in `root`. The data of trajectories and logits need not be there; their manifests must.

    ValueError names what is missing, or does not belong to the others.
    """
    checkpoints = {
        name: read_manifest(root / "checkpoints" / name, "checkpoint") for name in params.origins
    }
    positions = {
        name: len(params.chain(name)) - 1 for name in {*params.updates, *params.updates.values()}
    }
    iterations = tuple(
        _iteration(name, root, positions[name] - 1)
        for name in sorted(params.iterations, key=positions.__getitem__)
    )
    reinforcements = tuple(
        _reinforcement(name, root)
        for name in sorted(params.reinforcements, key=positions.__getitem__)
    )
    checkpoints |= {one.result.name: one.made["checkpoints"] for one in iterations + reinforcements}
    evaluations = [
        _evaluation(name, params, root, checkpoints, positions) for name in params.evaluations
    ]
    evaluations.sort(
        key=lambda one: (
            one.name == params.report.teacher,
            -1 if one.position is None else one.position,
        )
    )
    return Run(
        params, checkpoints, iterations, reinforcements, {one.name: one for one in evaluations}
    )


def discard(root: Path, kind: Literal["trajectories", "logits"], name: str) -> None:
    """Remove an artifact of the run in `root` to make room, and keep its manifest: what it was is known, and read as before."""
    folder, kept = root / kind / name, root / DISCARDED / kind / name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / MANIFEST, kept / MANIFEST)
    remove(folder)


def _manifest(root: Path, kind: Literal["trajectories", "logits"], name: str) -> Manifest:
    """Of the artifact that is there, or of the one that was."""
    folder, kept = root / kind / name, root / DISCARDED / kind / name
    return read_manifest(kept if kept.exists() and not folder.exists() else folder, kind)


def _iteration(name: str, root: Path, depth: int) -> Iteration:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories, logits = _manifest(root, "trajectories", name), _manifest(root, "logits", name)
    for role, manifest in {"trajectories": trajectories, "logits": logits}.items():
        _require_parent(folder, checkpoint, role, manifest)
    asked = {
        key: logits.facts[key] for key in ("teacher_queries", "recoverable") if key in logits.facts
    }
    env_steps = trajectories.facts["env_steps"] + logits.facts.get("env_steps", 0)
    steps = _steps(folder)
    facts = {
        **checkpoint.facts,
        **trajectories.facts,
        **asked,
        **_means(steps),
        "env_steps": env_steps,
        "name": name,
        "depth": depth,
    }
    made = {"checkpoints": checkpoint, "trajectories": trajectories, "logits": logits}
    before, after = (Distance.model_validate(facts[when]) for when in ("before", "after"))
    return Iteration(IterationResult.model_validate(facts), made, steps, before, after)


def _reinforcement(name: str, root: Path) -> Reinforcement:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories = _manifest(root, "trajectories", name)
    _require_parent(folder, checkpoint, "trajectories", trajectories)
    steps = _steps(folder)
    result = ReinforcementResult.model_validate(
        {**checkpoint.facts, **trajectories.facts, **_means(steps), "name": name}
    )
    return Reinforcement(result, {"checkpoints": checkpoint, "trajectories": trajectories}, steps)


def _steps(folder: Path) -> tuple[Step, ...]:
    return tuple(
        Step.model_validate_json(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    )


def _means(steps: Sequence[Step]) -> dict[str, float]:
    """See `UpdateResult`."""
    said = {
        name: [value for step in steps if (value := getattr(step, name)) is not None]
        for name in UpdateResult.model_fields
    }
    return {name: sum(values) / len(values) for name, values in said.items() if values}


def _evaluation(
    name: str,
    params: Params,
    root: Path,
    checkpoints: Mapping[str, Manifest],
    positions: Mapping[str, int],
) -> Evaluation:
    folder, checkpoint = root / "evaluations" / name, params.evaluations[name]
    manifest = open_artifact(folder, "evaluation")
    _require_parent(folder, manifest, "checkpoint", checkpoints[checkpoint])
    unseen = manifest.params["evaluate"].get("unseen", ())
    records, other = (
        tuple(r for r in read_records(folder) if (r.task in unseen) is which)
        for which in (False, True)
    )
    return Evaluation(
        name,
        checkpoint,
        positions.get(checkpoint),
        manifest,
        Evaluated.model_validate(manifest.facts),
        records,
        other,
    )


def _require_parent(folder: Path, child: Manifest, role: str, parent: Manifest) -> None:
    if child.parents.get(role) != parent.digest:
        made = str(child.parents.get(role))[:12]
        raise ValueError(
            f"{folder}: made from {role} {made}; expected {parent.digest[:12]}, which is there now (run the stage that makes it)"
        )
