"""reinforce: student, trajectories -> checkpoint, eq. (2): GRPO on the student's own successes. Nobody is asked for a label."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.data.trajectory import Observations, in_batches, read_states, shards
from vla_opd.learning import fsdp
from vla_opd.learning.decisions import Decisions, Graded, read_decisions
from vla_opd.learning.objectives import Taken, clipped, entropy, grpo, masked_mean, of, tempered
from vla_opd.learning.optimizer import Evidence, Loss, Means
from vla_opd.learning.update import budget, learn, order, probed, require_own_rollouts
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import ExploreParams, ReinforceParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, load_policy
from vla_opd.seeds import derive


@dataclass(frozen=True)
class Rolled:
    """The student's decisions, what came of them, and the temperature at which it drew."""

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    decisions: Decisions
    graded: Graded
    temperature: float

    @property
    def usable(self) -> Int[np.ndarray, " U"]:
        """The states to learn from."""
        return np.flatnonzero(self.graded.usable)

    def at(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Some states, by name, and which they are."""
        seen, advantage = self.observations.at(rows), self.graded.advantage[rows]
        tokens, log_probs = self.decisions.tokens[rows], self.decisions.log_probs[rows]
        return {
            "states": rows,
            "frames": seen.frames,
            "proprio": seen.proprio,
            "mask": self.mask[rows],
            "tokens": tokens,
            "log_probs": log_probs,
            "advantage": advantage,
        }


def run(
    params: Params, iteration: str, student: Path, trajectories: Path, out: Path, host: Host
) -> Manifest:
    """One iteration's update. ValueError unless the student made these trajectories."""
    checkpoint, its = open_checkpoint(student), params.reinforce
    visited = open_artifact(trajectories, "trajectories")
    require_own_rollouts(checkpoint, visited, trajectories)
    settings = {
        "seed": params.run.learning_seed,
        "iteration": iteration,
        "reinforce": its.model_dump(),
        "device": host.device,
    }
    torch.set_num_threads(its.threads)
    data, depth = (
        _read(visited.params["explore"], trajectories, checkpoint.facts.action_space.chunk),
        params.depth(iteration),
    )
    parents = {"student": checkpoint.digest, "trajectories": visited.digest}
    with (
        fsdp.shared_draft(out, "checkpoint", parents, settings) as work,
        track(host, params.run.name, "reinforce", iteration, settings) as log,
    ):
        policy, seed = (
            load_policy(checkpoint, host.device),
            derive(params.run.learning_seed, "reinforce", iteration),
        )
        before, plan = _probe(policy, data, its.batch_size), budget(its, depth, len(data.usable))
        evidence = Evidence(
            host.not_finite(params.run.name),
            lambda step: data.at(order(data.usable, its.batch_size, seed)(step)),
        )
        learn(
            policy,
            _loss(data, its, seed),
            its,
            plan,
            work,
            checkpoint,
            f"reinforce {iteration}",
            seed,
            log,
            evidence,
        )
        after = _probe(policy, data, its.batch_size)
        log(
            {
                f"{when}/{name}": value
                for when, it in (("before", before), ("after", after))
                for name, value in it.items()
            },
            plan.end,
        )
        facts = {"checkpoint": checkpoint.facts.model_dump(), "before": before, "after": after}
        return work.publish({**facts, "depth": depth, "states": len(data.usable)})


def _read(explored: Mapping[str, Any], trajectories: Path, chunk: int) -> Rolled:
    """explored: the settings that the trajectories were made with. By them it was decided which groups are to be learned from."""
    its, paths = ExploreParams.model_validate(explored), shards(trajectories)
    states, decisions = read_states(paths), read_decisions(paths, chunk)
    return Rolled(
        states.observations,
        states.mask,
        decisions,
        decisions.graded(states.mask, its),
        its.temperature,
    )


def _loss(data: Rolled, its: ReinforceParams, seed: int) -> Loss:
    states = order(data.usable, its.batch_size, seed)

    def loss(policy: Policy, step: int) -> Means:
        rows = states(step)
        log_probs = tempered(policy.logits(data.observations.at(rows)), data.temperature)

        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[rows]).to(log_probs.device)

        mask, tokens = there(data.mask), there(data.decisions.tokens)
        taken = Taken(
            of(log_probs, tokens),
            there(data.decisions.log_probs),
            there(data.graded.advantage),
            its,
        )
        row = {
            "student_entropy": masked_mean(entropy(log_probs.detach()), mask).item(),
            "clip_fraction": masked_mean(clipped(taken).float(), mask).item(),
        }
        value = masked_mean(grpo(taken) * there(data.graded.weight).unsqueeze(-1), mask)
        return Means(value, row, int(data.mask[rows].sum()))

    return loss


def _probe(policy: Policy, data: Rolled, batch_size: int) -> dict[str, float]:
    """The student's entropy at the rollout's temperature, in nats a token, on a fixed selection of the states."""
    rows = probed(data.mask)
    with torch.inference_mode():
        logits = torch.cat(
            [policy.logits(data.observations.at(part)) for part in in_batches(rows, batch_size)]
        )
        log_probs = tempered(logits, data.temperature)
        return {
            "student_entropy": masked_mean(
                entropy(log_probs), torch.from_numpy(data.mask[rows]).to(log_probs.device)
            ).item()
        }
