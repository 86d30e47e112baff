"""A policy needs its eyes: with blank frames a teacher of Meta-World loses most of its success, though it still feels its hand and reads the task.

The teacher in tests/data is one of `examples/metaworld.yaml`; its manifest says how it was made.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float32, Int

from vla_opd.envs.protocol import Placement
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, load_policy
from vla_opd.policies.policy import Observations
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, rollout

TEACHER = Path(__file__).parents[2] / "data/metaworld_teacher"
HORIZON = 120


@dataclass(frozen=True)
class Blind:
    """A policy whose frames are blank."""

    sees: Policy

    @property
    def chunk(self) -> int:
        return self.sees.chunk

    @property
    def action_dim(self) -> int:
        return self.sees.action_dim

    def logits(self, observations: Observations) -> Float[torch.Tensor, "B K V"]:
        return self.sees.logits(replace(observations, frames=np.zeros_like(observations.frames)))

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        return self.sees.decode(tokens)


@pytest.mark.slow
def test_a_blind_policy_loses_most_of_its_success() -> None:
    """Greedy, on the fixed initial state 0 of each of its eight tasks."""
    checkpoint = open_checkpoint(TEACHER)
    environment, seeing = checkpoint.facts.environment, load_policy(checkpoint)
    jobs = [Job(Placement(task, "evaluation", 0), 0, 0) for task in environment.tasks]
    success = {
        name: sum(
            episode.success
            for episode in rollout(
                policy, jobs, environment, RolloutSettings(HORIZON, None), PoolSettings(workers=2)
            )
        )
        for name, policy in {"sees": seeing, "blind": Blind(seeing)}.items()
    }
    print(f"of {len(jobs)} episodes: {success}")
    assert success["sees"] >= 0.8 * len(jobs)
    assert success["blind"] <= 0.2 * len(jobs)
