"""optimize: student, trajectories, labels -> checkpoint, eq. (5).

A fixed budget of AdamW steps towards the teacher, on the student's own states.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.divergence import Divergence
from vla_opd.data.trajectory import shards
from vla_opd.learning import distillation, fsdp
from vla_opd.learning.decisions import failed_share
from vla_opd.learning.distillation import DistillationBatch, DistillationLoss, measure_student
from vla_opd.learning.optimizer import Session
from vla_opd.learning.update import plan_budget, update_student
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.objective import OptimizeParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.seeds import derive


def run(
    *,
    run: str,
    seed: int,
    settings: OptimizeParams,
    iteration: str,
    depth: int,
    earlier: Sequence[str],
    student: Path,
    trajectories: Path,
    labels: Path,
    initial: Path,
    out: Path,
    host: Host,
) -> Manifest:
    """Update the student. ValueError unless the labels are of these trajectories, by this student.

    depth:   iterations of this kind before this one. earlier: those whose states are used again.
    initial: the run's first student; opened only if `anchor` is set.
    """
    checkpoint = open_checkpoint(student)
    parents = distillation.require_alignment(checkpoint, trajectories, labels)
    anchor = distillation.open_anchor(checkpoint, initial) if settings.anchor else None
    if anchor is not None:
        parents["anchor"] = anchor.digest
    recorded = {
        "seed": seed,
        "iteration": iteration,
        "optimize": settings.model_dump(),
        "device": host.device,
    }
    torch.set_num_threads(settings.threads)
    space = checkpoint.facts.action_space
    current = distillation.read_batch(trajectories, labels, space, settings)
    replayed = _read_earlier(earlier, trajectories, labels, out, space, settings)
    batch = distillation.concatenate([current, *replayed])
    with (
        fsdp.shared_draft(out, "checkpoint", parents, recorded) as work,
        track(host, run, "optimize", iteration, recorded) as log,
    ):
        if anchor is not None:
            scores = distillation.score_states(load_policy(anchor, host.device), batch, settings)
            batch = replace(batch, initial=scores)
        policy = load_policy(checkpoint, host.device)
        before = measure_student(policy, current, settings)
        seed = derive(seed, "optimize", iteration)
        if settings.states is not None:
            batch = distillation.select_states(batch, settings.states, seed)
        budget = plan_budget(settings, depth, len(batch.usable))
        session = Session(f"optimize {iteration}", work.scratch, log, host.non_finite_folder(run))
        loss = DistillationLoss(batch, settings, seed)
        update_student(policy, loss, budget, settings, checkpoint, work, session, seed)
        after = measure_student(policy, current, settings)
        failed = failed_share(shards(trajectories), batch.trained_tokens[: len(current.mask)])
        log({**_metrics(before, after), "failed_share": failed}, budget.end)
        facts: dict[str, Any] = {
            "checkpoint": checkpoint.facts.model_dump(),
            "before": before.model_dump(),
            "after": after.model_dump(),
            "failed_share": failed,
            "depth": depth,
            "states": len(batch.mask),
            "learnt_from": len(batch.usable),
        }
        teacher_space = distillation.read_action_space(labels)
        if teacher_space != space:
            facts["transferred_from"] = teacher_space.digest
        return work.publish(facts)


def _read_earlier(
    iterations: Sequence[str],
    trajectories: Path,
    labels: Path,
    out: Path,
    space: ActionSpace,
    settings: OptimizeParams,
) -> list[DistillationBatch]:
    """Read the rollouts and labels of earlier iterations, the latest first.

    ValueError unless they are what those iterations learned from. DVC need not know of them: they
    are behind the checkpoint that this iteration starts from.
    """
    batches: list[DistillationBatch] = []
    for name in iterations:
        folders = trajectories.with_name(name), labels.with_name(name)
        sources = zip(("trajectories", "labels"), folders, strict=True)
        distillation.require_parents(out.with_name(name), sources)
        batches.append(distillation.read_batch(*folders, space, settings))
    return batches


def _metrics(before: Divergence, after: Divergence) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for when, measured in {"before": before, "after": after}.items():
        metrics |= {f"{when}/{name}": value for name, value in measured.numbers.items()}
    return metrics
