"""GRPO's loss on a real run's decisions: successes become likelier, failures less likely."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_opd.artifacts.manifest import open_artifact
from vla_opd.learning.grpo import GrpoBatch, GrpoLoss, read_batch
from vla_opd.learning.objectives import at_temperature, select_token
from vla_opd.learning.optimizer import Session, train
from vla_opd.learning.update import plan_budget
from vla_opd.params.load import load
from vla_opd.params.stages import ReinforceParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.policy import Policy


@pytest.fixture
def settings(small: Path) -> ReinforceParams:
    assert small.is_dir()
    return load("params.yaml").reinforce


@pytest.fixture
def policy(small: Path) -> Policy:
    return load_policy(open_checkpoint(small / "checkpoints/it001"), "cpu")


@pytest.fixture
def batch(small: Path, policy: Policy) -> GrpoBatch:
    trajectories = small / "trajectories/rl001"
    explore = open_artifact(trajectories, "trajectories").params["explore"]
    return read_batch(trajectories, explore, policy.chunk)


def score_sampled_tokens(policy: Policy, batch: GrpoBatch) -> torch.Tensor:
    """Return their log-probabilities at the states to learn from, at the rollout's temperature."""
    with torch.no_grad():
        logits = policy.logits(batch.observations.at(batch.usable))
        log_probs = at_temperature(logits, batch.temperature)
        return select_token(log_probs, torch.from_numpy(batch.decisions.tokens[batch.usable]))


def test_before_the_first_step_every_ratio_is_one(
    settings: ReinforceParams, policy: Policy, batch: GrpoBatch
) -> None:
    usable = batch.usable
    assert len(usable) > 20
    recorded = torch.from_numpy(batch.decisions.log_probs[usable])
    torch.testing.assert_close(score_sampled_tokens(policy, batch), recorded, rtol=0, atol=1e-4)
    settings = settings.model_copy(update={"batch_size": len(usable)})
    result = GrpoLoss(batch, settings, seed=1)(policy, 0)
    assert result.row["clip_fraction"] == 0
    mask = batch.mask[usable]
    weighted = batch.advantages.advantage[usable] * batch.advantages.weight[usable]
    expected = -(mask * weighted[:, None]).sum() / mask.sum()
    assert result.loss.item() == pytest.approx(expected, abs=1e-4)


def test_successes_become_likelier_and_failures_less_likely(
    settings: ReinforceParams, policy: Policy, batch: GrpoBatch, tmp_path: Path
) -> None:
    usable = batch.usable
    changes = {"learning_rate": 1e-3, "steps": 30, "batch_size": len(usable)}
    settings = settings.model_copy(update=changes)
    before = score_sampled_tokens(policy, batch)
    loss = GrpoLoss(batch, settings, seed=1)
    rows, _ = train(policy, loss, plan_budget(settings, 0, len(usable)), Session("rl", tmp_path))
    difference = (score_sampled_tokens(policy, batch) - before).numpy()
    per_state = (difference * batch.mask[usable]).mean(1)
    succeeded = batch.advantages.advantage[usable] > 0
    assert per_state[succeeded].mean() > 0.02
    assert per_state[~succeeded].mean() < -0.02
    assert rows[-1]["clip_fraction"] > 0


def test_the_arrays_of_a_step_have_the_sampled_tokens(batch: GrpoBatch) -> None:
    rows = batch.usable[:2]
    arrays = batch.arrays(rows)
    names = {"states", "frames", "proprio", "mask", "tokens", "log_probs", "advantage"}
    assert set(arrays) == names
    np.testing.assert_array_equal(arrays["tokens"], batch.decisions.tokens[rows])
