"""optimize: student, trajectories, labels -> checkpoint, eq. (5).

A fixed budget of AdamW steps towards the teacher, on the student's own states.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import shards
from vla_opd.learning import distillation, fsdp
from vla_opd.learning.decisions import failed_share
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
    replayed = distillation.read_earlier(earlier, trajectories, labels, out, space, settings)
    batch = distillation.concatenate([current, *replayed])
    with (
        fsdp.shared_draft(out, "checkpoint", parents, recorded) as work,
        track(host, run, "optimize", iteration, recorded) as log,
    ):
        if anchor is not None:
            batch = distillation.with_anchor(batch, load_policy(anchor, host.device), settings)
        policy = load_policy(checkpoint, host.device)
        before = distillation.measure_student(policy, current, settings)
        seed = derive(seed, "optimize", iteration)
        batch = distillation.select_states(batch, settings.states, seed)
        budget = plan_budget(settings, depth, len(batch.usable))
        session = Session(f"optimize {iteration}", work.scratch, log, host.dump_folder(run), seed)
        loss = distillation.DistillationLoss(batch, settings, seed)
        update_student(policy, loss, budget, settings, checkpoint, work, session)
        after = distillation.measure_student(policy, current, settings)
        failed = failed_share(shards(trajectories), batch.trained_tokens[: len(current.mask)])
        log({**distillation.compare(before, after), "failed_share": failed}, budget.end)
        return work.publish(
            {
                "checkpoint": checkpoint.facts.model_dump(),
                "before": before.model_dump(),
                "after": after.model_dump(),
                "failed_share": failed,
                "depth": depth,
                "states": len(batch.mask),
                "learnt_from": len(batch.usable),
                **distillation.describe_transfer(labels, space),
            }
        )
