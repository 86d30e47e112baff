"""optimize: student, trajectories, logits -> checkpoint, eq. (5): a fixed budget of AdamW steps towards the teacher on the student's own states."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.artifacts import Manifest, draft, open_artifact
from vla_opd.checkpoint import WEIGHTS, Checkpoint, open_checkpoint, require_same_actions, save_weights
from vla_opd.host import Host
from vla_opd.logits import read_shard
from vla_opd.objectives import OBJECTIVES, TokenBatch, drawn, entropy, masked_mean, reverse_kl, tempered
from vla_opd.params import OptimizeParams, Params, named_function
from vla_opd.policies import Policy, load_policy
from vla_opd.seeds import derive
from vla_opd.tokens import ActionSpace
from vla_opd.tracking import track
from vla_opd.training import Budget, Evidence, Loss, Row, Schedule, batches, train, write_rows
from vla_opd.trajectory import Observations, joined, read_states, shards

MOMENTS = "optimizer.safetensors"
PROBE = 256  # states on which KL and entropy are measured before and after


@dataclass(frozen=True)
class Labelled:
    """Student-visited states and what the teacher says there."""

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    teacher: Float[np.ndarray, "N K V"]

    def at(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Some states, by name, and which they are."""
        seen = self.observations.at(rows)
        return {"states": rows, "frames": seen.frames, "proprio": seen.proprio, "mask": self.mask[rows], "teacher": self.teacher[rows]}


def run(params: Params, iteration: str, student: Path, trajectories: Path, logits: Path, out: Path, host: Host) -> Manifest:
    """One iteration's update. ValueError unless the logits label these trajectories, the student made these, and tokens mean the same actions."""
    checkpoint, opt = open_checkpoint(student), params.optimize
    parents = _require_alignment(checkpoint, trajectories, logits)
    settings = {"seed": params.run.seed, "iteration": iteration, "optimize": opt.model_dump(), "device": host.device}
    torch.set_num_threads(opt.threads)
    data = _read(trajectories, logits)
    depth = _depth(params, iteration)
    with draft(out, "checkpoint", parents, settings) as work, track(host, params.run.name, "optimize", iteration, settings) as log:
        policy = load_policy(checkpoint, host.device)
        before = _probe(policy, data, opt.temperature)
        seed = derive(params.run.seed, "optimize", iteration)
        loss = _loss(policy, data, params, seed)
        evidence = Evidence(host.not_finite(params.run.name), lambda step: data.at(_order(data, opt, seed)(step)))
        moments = safetensors.torch.load_file(student / MOMENTS) if (student / MOMENTS).is_file() else None
        rows, moments = train(policy, loss, _budget(params, depth), work.scratch, moments, f"optimize {iteration}", log, evidence)
        with work.part(WEIGHTS) as path:
            save_weights(path, policy.state_dict())
        with work.part(MOMENTS) as path:
            save_weights(path, moments)
        with work.part("metrics.jsonl") as path:
            write_rows(path, rows)
        after = _probe(policy, data, opt.temperature)
        return work.publish({"checkpoint": checkpoint.facts.model_dump(), "before": before, "after": after, "depth": depth, "states": len(data.mask)})


def _require_alignment(student: Checkpoint, trajectories: Path, logits: Path) -> dict[str, str]:
    """The parents' digests, once it is proved that they belong together."""
    visited, labels = open_artifact(trajectories, "trajectories"), open_artifact(logits, "logits")
    if labels.parents["trajectories"] != visited.digest:
        raise ValueError(
            f"{logits}: labels trajectories {labels.parents['trajectories'][:12]}; expected {visited.digest[:12]}, those of {trajectories}"
        )
    if visited.parents["student"] != student.digest:
        raise ValueError(
            f"{trajectories}: sampled by {visited.parents['student'][:12]}; expected {student.digest[:12]}, the student in {student.folder}"
        )
    require_same_actions(student.facts, ActionSpace.model_validate(labels.facts["action_space"]), str(logits))
    return {"student": student.digest, "trajectories": visited.digest, "logits": labels.digest}


def _read(trajectories: Path, logits: Path) -> Labelled:
    paths = shards(trajectories)
    states = [read_states([path]) for path in paths]
    whole = joined(states)
    return Labelled(
        observations=whole.observations,
        mask=whole.mask,
        teacher=np.concatenate([read_shard(logits / path.name, len(s)) for path, s in zip(paths, states, strict=True)]),
    )


def _depth(params: Params, iteration: str) -> int:
    """How many iterations came before on the chain from the checkpoint that finetune made. ValueError if the chain bites its tail."""
    seen = [iteration]
    while (parent := params.iterations[seen[-1]]) in params.iterations:
        if parent in seen:
            raise ValueError(f"iterations: {' -> '.join([*seen, parent])} is a circle; expected a chain that starts from a fine-tuned checkpoint")
        seen.append(parent)
    return len(seen) - 1


def _budget(params: Params, depth: int) -> Budget:
    opt = params.optimize
    total = opt.steps * opt.schedule_iterations
    schedule = Schedule(opt.learning_rate, opt.learning_rate * opt.final_fraction, round(total * opt.warmup_fraction), total)
    return Budget(opt.steps, schedule, opt.gradient_clip, opt.weight_decay, opt.save_every, first=depth * opt.steps)


def _loss(policy: Policy, data: Labelled, params: Params, seed: int) -> Loss:
    opt = params.optimize
    objective = named_function(opt.objective, OBJECTIVES, "optimize.objective")
    order = _order(data, opt, seed)

    def loss(step: int) -> tuple[Float[Tensor, ""], Row]:
        batch, mask = _token_batch(policy, data, order(step), opt.temperature, derive(seed, step))
        row = {"student_entropy": masked_mean(entropy(batch.student.detach()), mask).item()}
        if objective is not reverse_kl:
            row["reverse_kl"] = masked_mean(reverse_kl(batch).detach(), mask).item()
        return masked_mean(objective(batch), mask), row

    return loss


def _order(data: Labelled, opt: OptimizeParams, seed: int) -> Callable[[int], Int[np.ndarray, " B"]]:
    """Step -> the states of its batch, among those with a valid token."""
    usable = np.flatnonzero(data.mask.any(1))
    order = batches(len(usable), opt.batch_size, seed)
    return lambda step: usable[order(step)]


def _token_batch(policy: Policy, data: Labelled, rows: np.ndarray, temperature: float, seed: int) -> tuple[TokenBatch, Bool[Tensor, "N K"]]:
    """Both distributions at some states, at one temperature."""
    student = tempered(policy.logits(data.observations.at(rows)), temperature)
    teacher = tempered(torch.from_numpy(data.teacher[rows]).to(student.device).float(), temperature)
    return TokenBatch(student, teacher, lambda: drawn(student, seed)), torch.from_numpy(data.mask[rows]).to(student.device)


def _probe(policy: Policy, data: Labelled, temperature: float) -> dict[str, float]:
    """Reverse KL, and both entropies, in nats a token, on a fixed selection of the states."""
    usable = np.flatnonzero(data.mask.any(1))
    rows = usable[np.linspace(0, len(usable) - 1, min(PROBE, len(usable))).astype(int)]
    with torch.inference_mode():
        batch, mask = _token_batch(policy, data, rows, temperature, 0)
        return {
            "reverse_kl": masked_mean(reverse_kl(batch), mask).item(),
            "student_entropy": masked_mean(entropy(batch.student), mask).item(),
            "teacher_entropy": masked_mean(entropy(batch.teacher), mask).item(),
        }
