"""finetune: demonstrations -> checkpoint, by supervised learning, eq. (1).

The base (a policy pre-trained on other tasks), the teacher (many demonstrations) and the student (one a task) differ in parameters and parent only.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.data.action_space import action_space, gaussian
from vla_opd.data.trajectory import States, read_states, shards
from vla_opd.learning import fsdp
from vla_opd.learning.objectives import masked_mean
from vla_opd.learning.optimizer import Budget, Evidence, Loss, Means, Schedule, train
from vla_opd.learning.update import order, write
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import PretrainedParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import (
    Checkpoint,
    CheckpointFacts,
    open_checkpoint,
    require_environment,
)
from vla_opd.policies.load import Policy, build_policy, load_policy
from vla_opd.policies.tiny import extend_vocabulary
from vla_opd.seeds import derive


def run(
    params: Params, name: str, demonstrations: Path, parent: Path | None, out: Path, host: Host
) -> Manifest:
    """Train the checkpoint `name` on (some of) a set of demonstrations, from its parent's weights if it has one."""
    made, sft = params.trained[name], params.finetune
    seed = params.run.seed if made.seed is None else made.seed
    source, origin = (
        open_artifact(demonstrations, "demonstrations"),
        open_checkpoint(parent) if parent else None,
    )
    parents = {"demonstrations": source.digest} | ({"parent": origin.digest} if origin else {})
    settings = {
        "seed": seed,
        "name": name,
        "checkpoint": {"parent": None, **made.model_dump()},
        "finetune": sft.model_dump(),
        "policy": None if origin else params.policy.model_dump(),
        "environment": params.environment.model_dump(exclude={"tasks"}),
        "device": host.device,
    }
    torch.set_num_threads(sft.threads)
    states = read_states(shards(demonstrations), made.per_task)
    facts = _facts(params, states, origin)
    with (
        fsdp.shared_draft(out, "checkpoint", parents, settings) as work,
        track(host, params.run.name, "finetune", name, settings) as log,
    ):
        policy = _policy(facts, origin, derive(seed, "finetune", name), host.device)
        bins = policy.encode(states.labels)
        states_of = order(
            np.arange(len(states)), sft.batch_size, derive(seed, "finetune", name, "order")
        )
        loss = _loss(
            bins, states, smoothed_targets(facts.action_space.bins, sft.smoothing), states_of
        )
        evidence = Evidence(
            host.not_finite(params.run.name), lambda step: _examples(states, bins, states_of(step))
        )
        lora.prepare(
            policy, sft.lora if origin else None, derive(seed, "finetune", name), "finetune"
        )
        with (
            fsdp.sharded(policy) as shared,
            lora.recomputing(shared, wanted=sft.gradient_checkpointing),
        ):
            rows, _ = train(
                shared,
                loss,
                _budget(made, params),
                work.scratch,
                None,
                f"finetune {name}",
                log,
                evidence,
            )
        write(work, policy, origin, rows, None)
        return work.publish(
            {
                "checkpoint": facts.model_dump(),
                "states": len(states),
                "episodes": int(states.episode[-1]) + 1,
            }
        )


def _facts(params: Params, states: States, parent: Checkpoint | None) -> CheckpointFacts:
    """The parent's description with the new words added; without a parent, one whose statistics are those of the demonstrations."""
    instructions = states.observations.instructions
    if parent is not None:
        require_environment(parent.facts, params.environment, str(parent.folder))
        known = parent.facts.vocabulary  # empty, if it has a tokenizer
        vocabulary = extend_vocabulary(known, instructions) if known else ()
        return parent.facts.model_copy(
            update={"vocabulary": vocabulary, "environment": params.environment}
        )
    shape, proprio = params.policy, states.observations.proprio
    return CheckpointFacts(
        policy=shape,
        action_space=action_space(states.labels[:, 0], shape.chunk, shape.bins),
        environment=params.environment,
        vocabulary=extend_vocabulary((), instructions),
        proprio_mean=tuple(proprio.mean(0, dtype=np.float64).tolist()) if shape.proprio else (),
        proprio_std=tuple((proprio.std(0, dtype=np.float64) + 1e-3).tolist())
        if shape.proprio
        else (),
    )


def _policy(facts: CheckpointFacts, parent: Checkpoint | None, seed: int, device: str) -> Any:
    torch.manual_seed(seed)
    policy = (
        build_policy(facts).to(device)
        if parent is None
        else load_policy(replace(parent, facts=facts), device)
    )
    return policy.train()


def _budget(made: PretrainedParams, params: Params) -> Budget:
    sft = params.finetune
    peak = made.learning_rate
    schedule = Schedule(
        peak, peak * sft.final_fraction, round(made.steps * sft.warmup_fraction), made.steps
    )
    return Budget(made.steps, schedule, sft.gradient_clip, sft.weight_decay, sft.save_every)


def _loss(
    bins: Int16[np.ndarray, "N K"],
    states: States,
    soft: Float[Tensor, "V V"],
    states_of: Callable[[int], Int[np.ndarray, " B"]],
) -> Loss:
    """-sum_v q(v) log p(v) over valid tokens, q the row of `soft` that is the demonstrated bin's. states_of: step -> its batch of them."""

    def loss(policy: Policy, step: int) -> Means:
        rows = states_of(step)
        log_probs = policy.logits(states.observations.at(rows)).log_softmax(-1)
        target = soft[torch.from_numpy(bins[rows]).long()].to(log_probs.device)
        mask = torch.from_numpy(states.mask[rows]).to(log_probs.device)
        with torch.no_grad():
            hit = masked_mean((log_probs.argmax(-1) == target.argmax(-1)).float(), mask).item()
        return Means(
            masked_mean(-(target * log_probs).sum(-1), mask),
            {"accuracy": hit},
            int(states.mask[rows].sum()),
        )

    return loss


def _examples(
    states: States, bins: Int16[np.ndarray, "N K"], rows: Int[np.ndarray, " B"]
) -> dict[str, np.ndarray]:
    """Some states with their demonstrated bins, by name, and which they are."""
    seen = states.observations.at(rows)
    return {
        "states": rows,
        "frames": seen.frames,
        "proprio": seen.proprio,
        "mask": states.mask[rows],
        "bins": bins[rows],
    }


def smoothed_targets(bins: int, sigma: float) -> Float[Tensor, "V V"]:
    """Row v: the target distribution for bin v, proportional to exp(-(u - v)^2 / (2 sigma^2)); the one-hot for sigma = 0."""
    if sigma == 0:
        return torch.eye(bins)
    return torch.softmax(torch.from_numpy(gaussian(bins, sigma)), -1)
