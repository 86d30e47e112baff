"""One iteration's update of a policy, whatever the loss: where it stands on its schedule, which states a step sees, and what is written."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.learning import fsdp
from vla_opd.learning.optimizer import (
    Budget,
    Evidence,
    Loss,
    Row,
    Schedule,
    batches,
    train,
    write_rows,
)
from vla_opd.machine.tracking import Log
from vla_opd.params.training import UpdateParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint, save_weights, write_policy

MOMENTS = "optimizer.safetensors"
PROBE = 256  # states


def budget(settings: UpdateParams, depth: int, states: int) -> Budget:
    """The steps of an iteration with `depth` others before it; none, if there are no states to learn from."""
    total = settings.steps * settings.schedule_iterations
    peak = settings.learning_rate
    schedule = Schedule(
        peak, peak * settings.final_fraction, round(total * settings.warmup_fraction), total
    )
    return Budget(
        settings.steps if states else 0,
        schedule,
        settings.gradient_clip,
        settings.weight_decay,
        settings.save_every,
        first=depth * settings.steps,
    )


def order(
    usable: Int[np.ndarray, " U"], batch_size: int, seed: int
) -> Callable[[int], Int[np.ndarray, " B"]]:
    """Step -> the states of its batch, among those to learn from; this process's share of them."""
    rows = batches(len(usable), batch_size, seed)
    return lambda step: usable[fsdp.share(rows(step))]


def probed(mask: Bool[np.ndarray, "N K"]) -> Int[np.ndarray, " R"]:
    """The states on which a policy is measured before and after: a fixed selection of those with a valid token."""
    usable = np.flatnonzero(mask.any(1))
    return usable[np.linspace(0, len(usable) - 1, min(PROBE, len(usable))).astype(int)]


def require_own_rollouts(student: Checkpoint, visited: Manifest, where: Path) -> None:
    """ValueError unless the student sampled these trajectories."""
    if visited.parents["student"] != student.digest:
        raise ValueError(
            f"{where}: sampled by {visited.parents['student'][:12]}; expected {student.digest[:12]}, the student in {student.folder}"
        )


def learn(
    policy: nn.Module,
    loss: Loss,
    settings: UpdateParams,
    plan: Budget,
    work: Draft,
    student: Checkpoint,
    label: str,
    seed: int,
    log: Log,
    evidence: Evidence,
) -> None:
    """Train, and write policy, moments and metrics into the draft. In the middle of a schedule the moments go on from those beside the student.

    At its beginning they don't: another kind of update left its own there. Nor do they where an adapter begins, or ends.
    """
    kept, before = student.folder / MOMENTS, lora.attached(policy)
    if not plan.steps and not fsdp.rank():
        print(
            f"{label}: no state to learn from (keep_low, keep_high, recoverable); the student stays as it is",
            file=sys.stderr,
        )
    lora.prepare(policy, settings.lora, seed, label.partition(" ")[0])
    same = lora.attached(policy) == before  # otherwise they are of other weights
    moments = safetensors.torch.load_file(kept) if plan.first and same and kept.is_file() else None
    with (
        fsdp.sharded(policy) as shared,
        lora.recomputing(shared, wanted=settings.gradient_checkpointing),
    ):
        rows, moments = train(shared, loss, plan, work.scratch, moments, label, log, evidence)
    write(work, policy, student, rows, moments)


def write(
    work: Draft,
    policy: nn.Module,
    origin: Checkpoint | None,
    rows: Sequence[Row],
    moments: Mapping[str, Tensor] | None,
) -> None:
    """What training made: the policy, the metrics and, where another update may go on from them, the moments. The first process writes."""
    if fsdp.rank():
        return
    write_policy(work, policy, origin)
    if moments is not None:
        with work.part(MOMENTS) as path:
            save_weights(path, moments)
    with work.part("metrics.jsonl") as path:
        write_rows(path, rows)
