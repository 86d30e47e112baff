"""A policy needs its eyes: with blank frames a Meta-World teacher loses most of its success.

It still has its proprioception and reads the task. The teacher in tests/data is one of
`examples/metaworld.yaml`; its manifest says how it was made.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float32, Int, Int16

from vla_opd.envs.protocol import Placement
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, load_policy
from vla_opd.policies.policy import Observations
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, rollout

TEACHER = Path(__file__).parents[2] / "data/metaworld_teacher"
HORIZON = 120


class Blind(Policy):
    """A policy whose frames are blank."""

    def __init__(self, seeing: Policy) -> None:
        super().__init__()
        self.seeing = seeing
        self.chunk = seeing.chunk
        self.action_dim = seeing.action_dim

    def logits(self, observations: Observations) -> Float[torch.Tensor, "B K V"]:
        blank = np.zeros_like(observations.frames)
        return self.seeing.logits(replace(observations, frames=blank))

    def decode(self, tokens: Int[np.ndarray, "B K"]) -> Float32[np.ndarray, "B S A"]:
        return self.seeing.decode(tokens)

    def encode(self, actions: Float32[np.ndarray, "B S A"]) -> Int16[np.ndarray, "B K"]:
        return self.seeing.encode(actions)


@pytest.mark.slow
def test_a_blind_policy_loses_most_of_its_success() -> None:
    """Greedy, on the fixed initial state 0 of each of the teacher's eight tasks."""
    checkpoint = open_checkpoint(TEACHER)
    environment = checkpoint.facts.environment
    jobs = [Job(Placement(task, "evaluation", 0), 0, 0) for task in environment.tasks]
    settings = RolloutSettings(HORIZON, None)

    def count_successes(policy: Policy) -> int:
        episodes = rollout(policy, jobs, environment, settings, PoolSettings(workers=2))
        return sum(episode.success for episode in episodes)

    policy = load_policy(checkpoint)
    seeing = count_successes(policy)
    blind = count_successes(Blind(policy))
    print(f"of {len(jobs)} episodes: {seeing} successes, {blind} when blind")
    assert seeing >= 0.8 * len(jobs)
    assert blind <= 0.2 * len(jobs)
