"""One iteration's update of a policy, whatever the loss: schedule, order of states, output."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import Observations, split_batches
from vla_opd.learning import fsdp
from vla_opd.learning.optimizer import (
    Budget,
    Loss,
    Row,
    Schedule,
    Session,
    batches,
    train,
    write_rows,
)
from vla_opd.params.training import UpdateParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import Checkpoint, save_weights, write_policy
from vla_opd.policies.policy import Policy

MOMENTS = "optimizer.safetensors"
PROBE = 256  # states


def plan_budget(settings: UpdateParams, depth: int, states: int) -> Budget:
    """Return the steps of an iteration that follows `depth` others; none without states."""
    total = settings.steps * settings.schedule_iterations
    peak = settings.learning_rate
    final = peak * settings.final_fraction
    warmup = round(total * settings.warmup_fraction)
    return Budget(
        steps=settings.steps if states else 0,
        schedule=Schedule(peak, final, warmup, total),
        gradient_clip=settings.gradient_clip,
        weight_decay=settings.weight_decay,
        save_every=settings.save_every,
        first=depth * settings.steps,
    )


def state_order(
    usable: Int[np.ndarray, " U"], batch_size: int, seed: int
) -> Callable[[int], Int[np.ndarray, " B"]]:
    """Return a function from a step to the states of its batch: this process's share of them.

    usable: the states to learn from.
    """
    rows = batches(len(usable), batch_size, seed)

    def order(step: int) -> Int[np.ndarray, " B"]:
        share = fsdp.share(rows(step))
        return usable[share]

    return order


def select_rows(
    array: Shaped[np.ndarray, "N ..."], rows: Int[np.ndarray, " B"], device: torch.device
) -> Shaped[Tensor, "B ..."]:
    """Copy some rows of an array to a device."""
    selected = torch.from_numpy(array[rows])
    return selected.to(device)


def batched_logits(
    policy: Policy, observations: Observations, rows: Int[np.ndarray, " R"], batch_size: int
) -> Float[Tensor, "R K V"]:
    """Return a policy's logits at some states, computed in batches of at most `batch_size`."""
    parts: list[Tensor] = []
    for batch in split_batches(rows, batch_size):
        logits = policy.logits(observations.at(batch))
        parts.append(logits)
    return torch.cat(parts)


def probe_states(mask: Bool[np.ndarray, "N K"]) -> Int[np.ndarray, " R"]:
    """Return the states on which a policy is measured before and after: `PROBE`, evenly spaced."""
    usable = np.flatnonzero(mask.any(1))
    count = len(usable)
    size = min(PROBE, count)
    positions = np.linspace(0, count - 1, size)
    return usable[positions.astype(int)]


def require_own_rollouts(student: Checkpoint, trajectories: Manifest, where: Path) -> None:
    """ValueError unless the student sampled these trajectories."""
    actual = trajectories.parents["student"]
    expected = student.digest
    if actual != expected:
        raise ValueError(
            f"{where}: sampled by {actual[:12]}; expected {expected[:12]}, "
            f"the student in {student.folder}"
        )


def update_student(
    policy: Policy,
    loss: Loss,
    budget: Budget,
    settings: UpdateParams,
    student: Checkpoint,
    work: Draft,
    session: Session,
) -> None:
    """Train, and write policy, moments and metrics into the draft.

    Within a schedule the optimizer continues from the moments beside the student. At the beginning
    of a schedule it does not, because another kind of update left them; nor where an adapter begins
    or ends, because they belong to other weights.
    """
    if not budget.steps and not fsdp.rank():
        print(
            f"{session.label}: no state to learn from (keep_low, keep_high, recoverable); "
            "the student stays as it is",
            file=sys.stderr,
        )
    trained_before = lora.attached(policy)
    stage, _, _ = session.label.partition(" ")
    lora.prepare(policy, settings.lora, session.seed, stage)
    moments = None
    saved = student.folder / MOMENTS
    continues = budget.first > 0 and lora.attached(policy) == trained_before
    if continues and saved.is_file():
        moments = safetensors.torch.load_file(saved)
    with (
        fsdp.sharded(policy) as shared,
        lora.recomputing(shared, enabled=settings.gradient_checkpointing),
    ):
        rows, moments = train(shared, loss, budget, session, moments)
    write_checkpoint(work, policy, student, rows, moments)


def write_checkpoint(
    work: Draft,
    policy: Policy,
    parent: Checkpoint | None,
    rows: Sequence[Row],
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Write policy and metrics and, if the next update may continue from them, the moments.

    Only the first process writes.
    """
    if fsdp.rank():
        return
    write_policy(work, policy, parent)
    if moments is not None:
        with work.part(MOMENTS) as path:
            save_weights(path, moments)
    with work.part("metrics.jsonl") as path:
        write_rows(path, rows)
