"""Supervised training: its targets, and the description that a checkpoint inherits or gets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.finetune import _facts, _loss, smoothed_targets
from tests.vla_opd import small
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.data.trajectory import States
from vla_opd.params.run import Params
from vla_opd.params.stages import (
    DemonstrationSet,
    EnvironmentParams,
    FinetuneParams,
    PretrainedParams,
    RunParams,
)
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy

RECIPE = PretrainedParams(demonstrations="main", steps=3, learning_rate=1e-3)
PARAMS = Params(
    run=RunParams(name="test"),
    environment=small.ENVIRONMENT,
    policy=small.SHAPE,
    finetune=FinetuneParams(batch_size=4, smoothing=0),
    demonstrations={"main": DemonstrationSet(episodes=1)},
    pretrained={"teacher": RECIPE, "student": RECIPE},
    iterations={},
    evaluations={},
)


def states(rows: int = 6) -> States:
    random = np.random.default_rng(0)
    labels = random.uniform(-1, 1, (rows, small.CHUNK, small.DIMS)).astype(np.float32)
    mask = random.random((rows, small.TOKENS)) < 0.7
    mask[:, 0] = True
    return States(small.observations(rows), mask, labels, np.zeros(rows, np.int32))


@pytest.mark.parametrize("sigma", [0.3, 1.5, 4.0])
def test_targets_are_a_gaussian_around_the_bin(sigma: float) -> None:
    targets = smoothed_targets(16, sigma).double()
    torch.testing.assert_close(
        targets.sum(-1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert torch.equal(targets.argmax(-1), torch.arange(16))
    u = np.arange(16)
    for v in (0, 7, 15):  # cut off and renormalised at the ends
        weights = np.exp(-((u - v) ** 2) / (2 * sigma**2))
        np.testing.assert_allclose(targets[v].numpy(), weights / weights.sum(), atol=1e-6)


def test_without_smoothing_targets_are_one_hot() -> None:
    assert torch.equal(smoothed_targets(5, 0), torch.eye(5))
    torch.testing.assert_close(smoothed_targets(5, 0.05), torch.eye(5))


def test_the_loss_is_the_cross_entropy_of_valid_tokens() -> None:
    seen = states(4)  # one batch holds them all
    torch.manual_seed(0)
    policy = build_policy(small.FACTS).eval()
    encoded = small.SPACE.encode(seen.labels)
    found = _loss(encoded, seen, smoothed_targets(small.BINS, 0), lambda step: np.arange(4))(
        policy, 0
    )
    bins = torch.from_numpy(encoded).long()
    with torch.no_grad():
        logits = policy.logits(seen.observations)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), bins.flatten(), reduction="none"
    ).view_as(bins)
    mask = torch.from_numpy(seen.mask)
    assert found.loss.item() == pytest.approx(each[mask].mean().item(), rel=1e-5)
    assert found.row["accuracy"] == pytest.approx(
        (logits.argmax(-1) == bins)[mask].float().mean().item()
    )


def test_a_checkpoint_without_a_parent_is_described_by_its_demonstrations() -> None:
    seen = states(6)
    facts = _facts(PARAMS, seen, None)
    np.testing.assert_allclose(
        facts.action_space.q01, np.quantile(seen.labels[:, 0].astype(float), 0.01, axis=0)
    )
    np.testing.assert_allclose(facts.proprio_mean, seen.observations.proprio.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        facts.proprio_std, seen.observations.proprio.std(0) + 1e-3, rtol=1e-6
    )
    assert facts.vocabulary == ("cube", "pick", "red", "the")
    assert (facts.policy, facts.environment, facts.action_space.chunk) == (
        small.SHAPE,
        small.ENVIRONMENT,
        small.CHUNK,
    )


def test_a_checkpoint_with_a_parent_keeps_what_a_token_means(tmp_path: Path) -> None:
    publish(
        tmp_path / "base",
        build_policy(small.FACTS).state_dict(),
        {"checkpoint": small.FACTS.model_dump()},
    )
    base = open_checkpoint(tmp_path / "base")
    facts = _facts(PARAMS, states(), base)
    assert facts.action_space == small.SPACE  # not the statistics of the new demonstrations
    assert facts.vocabulary == (*small.FACTS.vocabulary, "the")
    assert facts.proprio_mean == small.FACTS.proprio_mean
    other = PARAMS.model_copy(
        update={
            "environment": EnvironmentParams(**small.ENVIRONMENT.model_dump() | {"render": "exact"})
        }
    )
    with pytest.raises(
        ValueError,
        match=r"environment\.render is 'exact'; expected 'fast', which .*base was trained with",
    ):
        _facts(other, states(), base)
