"""GRPO, eq. (2): the student's decisions with their episodes' outcomes, and their loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vla_opd.data.trajectory import Observations, read_states, shards
from vla_opd.learning.decisions import Decisions, GrpoAdvantages, read_decisions
from vla_opd.learning.objectives import (
    SampledTokens,
    at_temperature,
    entropy,
    grpo,
    is_clipped,
    masked_mean,
    masked_means,
    select_token,
)
from vla_opd.learning.optimizer import StepLoss
from vla_opd.learning.update import batched_logits, probe_states, select_rows, state_order
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
        settings = self._settings
        rows = self._order(step)
        logits = policy.logits(batch.observations.at(rows))
        log_probs = at_temperature(logits, batch.temperature)

        def select(array: np.ndarray) -> Tensor:
            return select_rows(array, rows, logits.device)

        mask = select(batch.mask)
        tokens = select(batch.decisions.tokens)
        weight = select(batch.advantages.weight)
        sampled = SampledTokens(
            now=select_token(log_probs, tokens),
            then=select(batch.decisions.log_probs),
            advantage=select(batch.advantages.advantage),
        )
        metrics = {
            "student_entropy": entropy(log_probs.detach()),
            "clip_fraction": is_clipped(sampled, settings).float(),
        }
        row = masked_means(metrics, mask)
        values = grpo(sampled, settings) * weight.unsqueeze(-1)
        loss = masked_mean(values, mask)
        valid_tokens = batch.mask[rows].sum()
        return StepLoss(loss, row, int(valid_tokens))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Return this step's states, by name."""
        return self._batch.arrays(self._order(step))


def measure_entropy(policy: Policy, batch: GrpoBatch, batch_size: int) -> dict[str, float]:
    """Return the student's entropy at the rollout's temperature, in nats per token.

    On a fixed selection of the states.
    """
    rows = probe_states(batch.mask)
    with torch.inference_mode():
        logits = batched_logits(policy, batch.observations, rows, batch_size)
        log_probs = at_temperature(logits, batch.temperature)
        mask = select_rows(batch.mask, rows, logits.device)
        metrics = {"student_entropy": entropy(log_probs)}
        return masked_means(metrics, mask)
