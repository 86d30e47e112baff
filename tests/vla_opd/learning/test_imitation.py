"""Imitation: its targets, its loss, and the facts of the checkpoint to be trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla_opd import small as tiny
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.data.trajectory import States
from vla_opd.learning.imitation import ImitationLoss, describe_checkpoint, smoothed_targets
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy


def demonstrated_states(rows: int = 6) -> States:
    random = np.random.default_rng(0)
    labels = random.uniform(-1, 1, (rows, tiny.CHUNK, tiny.DIMS)).astype(np.float32)
    mask = random.random((rows, tiny.TOKENS)) < 0.7
    mask[:, 0] = True
    return States(tiny.observations(rows), mask, labels, np.zeros(rows, np.int32))


@pytest.mark.parametrize("sigma", [0.3, 1.5, 4.0])
def test_targets_are_a_gaussian_around_the_bin(sigma: float) -> None:
    targets = smoothed_targets(16, sigma).double()
    ones = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(targets.sum(-1), ones, rtol=0, atol=1e-6)
    assert torch.equal(targets.argmax(-1), torch.arange(16))
    bins = np.arange(16)
    for center in (0, 7, 15):  # cut off and renormalised at the ends
        weights = np.exp(-((bins - center) ** 2) / (2 * sigma**2))
        np.testing.assert_allclose(targets[center].numpy(), weights / weights.sum(), atol=1e-6)


def test_without_smoothing_targets_are_one_hot() -> None:
    assert torch.equal(smoothed_targets(5, 0), torch.eye(5))
    torch.testing.assert_close(smoothed_targets(5, 0.05), torch.eye(5))


def test_the_loss_is_the_cross_entropy_of_valid_tokens() -> None:
    states = demonstrated_states(4)
    torch.manual_seed(0)
    policy = build_policy(tiny.FACTS).eval()
    encoded = tiny.SPACE.encode(states.labels)
    targets = smoothed_targets(tiny.BINS, 0)
    # One batch has all states.
    result = ImitationLoss(states, encoded, targets, batch_size=4, seed=0)(policy, 0)
    bins = torch.from_numpy(encoded).long()
    with torch.no_grad():
        logits = policy.logits(states.observations)
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none")
    mask = torch.from_numpy(states.mask)
    expected = flat.view_as(bins)[mask].mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    accuracy = (logits.argmax(-1) == bins)[mask].float().mean()
    assert result.row["accuracy"] == pytest.approx(accuracy.item())


def test_a_checkpoint_without_a_parent_is_described_by_its_demonstrations() -> None:
    states = demonstrated_states()
    facts = describe_checkpoint(states, tiny.SHAPE, tiny.ENVIRONMENT, None)
    first_actions = states.labels[:, 0].astype(float)
    proprio = states.observations.proprio
    np.testing.assert_allclose(facts.action_space.q01, np.quantile(first_actions, 0.01, axis=0))
    np.testing.assert_allclose(facts.proprio_mean, proprio.mean(0), rtol=1e-6)
    np.testing.assert_allclose(facts.proprio_std, proprio.std(0) + 1e-3, rtol=1e-6)
    assert facts.vocabulary == ("cube", "pick", "red", "the")
    assert facts.policy == tiny.SHAPE
    assert facts.environment == tiny.ENVIRONMENT
    assert facts.action_space.chunk == tiny.CHUNK


def test_a_checkpoint_with_a_parent_keeps_the_meaning_of_its_tokens(tmp_path: Path) -> None:
    weights = build_policy(tiny.FACTS).state_dict()
    publish(tmp_path / "base", weights, {"checkpoint": tiny.FACTS.model_dump()})
    parent = open_checkpoint(tmp_path / "base")
    states = demonstrated_states()
    facts = describe_checkpoint(states, tiny.SHAPE, tiny.ENVIRONMENT, parent)
    assert facts.action_space == tiny.SPACE  # not the statistics of the new demonstrations
    assert facts.vocabulary == (*tiny.FACTS.vocabulary, "the")
    assert facts.proprio_mean == tiny.FACTS.proprio_mean
    exact = EnvironmentParams(**tiny.ENVIRONMENT.model_dump() | {"render": "exact"})
    message = r"environment\.render is 'exact'; expected 'fast', which .*base was trained with"
    with pytest.raises(ValueError, match=message):
        describe_checkpoint(states, tiny.SHAPE, exact, parent)
