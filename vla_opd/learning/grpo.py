"""GRPO, eq. (2): the student's own decisions with the outcomes of their episodes, and their loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vla_opd.data.trajectory import Observations, read_states, shards, split_batches
from vla_opd.learning.decisions import Decisions, GrpoAdvantages, read_decisions
from vla_opd.learning.objectives import (
    SampledTokens,
    at_temperature,
    entropy,
    grpo,
    is_clipped,
    masked_mean,
    select_token,
)
from vla_opd.learning.optimizer import StepLoss
from vla_opd.learning.update import probe_states, state_order
from vla_opd.params.stages import ExploreParams, ReinforceParams
from vla_opd.policies.policy import Policy


@dataclass(frozen=True)
class GrpoBatch:
    """N states with the student's decisions there. temperature: at which it sampled."""

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    decisions: Decisions
    advantages: GrpoAdvantages
    temperature: float

    @property
    def usable(self) -> Int[np.ndarray, " U"]:
        """The states to learn from."""
        return np.flatnonzero(self.advantages.usable)

    def arrays(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Return some states, by name, with their indices."""
        observations = self.observations.at(rows)
        return {
            "states": rows,
            "frames": observations.frames,
            "proprio": observations.proprio,
            "mask": self.mask[rows],
            "tokens": self.decisions.tokens[rows],
            "log_probs": self.decisions.log_probs[rows],
            "advantage": self.advantages.advantage[rows],
        }


def read_batch(trajectories: Path, explore: Mapping[str, Any], chunk: int) -> GrpoBatch:
    """Read states and decisions.

    explore: the settings that the trajectories were made with, which decided the groups to learn
    from.
    """
    settings = ExploreParams.model_validate(explore)
    paths = shards(trajectories)
    states = read_states(paths)
    decisions = read_decisions(paths, chunk)
    advantages = decisions.advantages(states.mask, settings)
    return GrpoBatch(states.observations, states.mask, decisions, advantages, settings.temperature)


class GrpoLoss:
    """The clipped objective's mean over the valid tokens of a step's decisions."""

    def __init__(self, batch: GrpoBatch, settings: ReinforceParams, seed: int) -> None:
        self._batch = batch
        self._settings = settings
        self._order = state_order(batch.usable, settings.batch_size, seed)

    def __call__(self, policy: Policy, step: int) -> StepLoss:
        """Return the loss of this step's decisions, and its metrics."""
        batch = self._batch
        rows = self._order(step)
        logits = policy.logits(batch.observations.at(rows))
        log_probs = at_temperature(logits, batch.temperature)

        def select(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[rows]).to(log_probs.device)

        mask = select(batch.mask)
        sampled = SampledTokens(
            now=select_token(log_probs, select(batch.decisions.tokens)),
            then=select(batch.decisions.log_probs),
            advantage=select(batch.advantages.advantage),
        )
        row = {
            "student_entropy": masked_mean(entropy(log_probs.detach()), mask).item(),
            "clip_fraction": masked_mean(is_clipped(sampled, self._settings).float(), mask).item(),
        }
        weight = select(batch.advantages.weight).unsqueeze(-1)
        loss = masked_mean(grpo(sampled, self._settings) * weight, mask)
        return StepLoss(loss, row, int(batch.mask[rows].sum()))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return this step's states, by name."""
        return self._batch.arrays(self._order(step))


def measure_entropy(policy: Policy, batch: GrpoBatch, batch_size: int) -> dict[str, float]:
    """Return the student's entropy at the rollout's temperature, in nats per token.

    On a fixed selection of the states.
    """
    rows = probe_states(batch.mask)
    with torch.inference_mode():
        parts = split_batches(rows, batch_size)
        logits = torch.cat([policy.logits(batch.observations.at(part)) for part in parts])
        log_probs = at_temperature(logits, batch.temperature)
        mask = torch.from_numpy(batch.mask[rows]).to(log_probs.device)
        return {"student_entropy": masked_mean(entropy(log_probs), mask).item()}
