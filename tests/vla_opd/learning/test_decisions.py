"""The rollout's decisions, state by state, and their advantages for GRPO."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vla_opd.small import CHUNK, TOKENS, episode
from vla_opd.data.trajectory import read_states, write_shard
from vla_opd.learning.decisions import Decisions, failed_share, read_decisions
from vla_opd.learning.objectives import masked_mean
from vla_opd.params.objective import GroupParams

EVERY_GROUP = GroupParams(keep_low=0, keep_high=1)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two groups of two episodes of different lengths, with every state kept."""
    groups = [[(5, True), (3, False)], [(4, False), (2, False)]]
    paths: list[Path] = []
    for number, group in enumerate(groups):
        path = tmp_path / f"shard-000-{number:05d}.zarr.zip"
        members = [
            replace(episode(10 * number, steps=steps, member=member), success=success)
            for member, (steps, success) in enumerate(group)
        ]
        write_shard(path, members, CHUNK)
        paths.append(path)
    return paths


def test_they_are_aligned_with_the_states(shards: list[Path]) -> None:
    states = read_states(shards)
    decisions = read_decisions(shards, CHUNK)
    assert len(decisions.decided) == len(states.mask) == 5 + 3 + 4 + 2
    np.testing.assert_array_equal(decisions.episode, states.episode)
    assert decisions.group.tolist() == [0] * 8 + [1] * 6
    assert decisions.success.tolist() == [True] * 5 + [False] * 9
    first_group = [True, False, True, False, True, True, False, True]
    second_group = [True, False, True, False, True, False]
    assert decisions.decided.tolist() == first_group + second_group
    first = episode(0, steps=5)
    np.testing.assert_array_equal(decisions.tokens[:5], first.tokens[[0, 0, 1, 1, 2]])
    np.testing.assert_array_equal(decisions.log_probs[:5], first.log_probs[[0, 0, 1, 1, 2]])


def test_the_share_of_failures_is_by_token(shards: list[Path]) -> None:
    mask = np.zeros((14, TOKENS), np.bool_)
    mask[[0, 4, 6, 13]] = True  # the first two in the episode that succeeded
    assert failed_share(shards, mask) == 0.5
    assert failed_share(shards, np.ones_like(mask)) == 9 / 14


def test_groups_with_one_outcome_are_left_out(shards: list[Path]) -> None:
    decisions = read_decisions(shards, CHUNK)
    mask = np.ones((14, TOKENS), np.bool_)
    mask[4] = False
    advantages = decisions.advantages(mask, GroupParams())
    # Decisions of the first group, with a valid token.
    assert np.flatnonzero(advantages.usable).tolist() == [0, 2, 5, 7]
    expected = [0.5**0.5, -(0.5**0.5), 0]
    assert advantages.advantage[[0, 5, 8]] == pytest.approx(expected, abs=1e-5)
    everything = decisions.advantages(mask, EVERY_GROUP)
    assert np.flatnonzero(everything.usable).tolist() == [0, 2, 5, 7, 8, 10, 12]
    nothing = decisions.advantages(mask, GroupParams(keep_low=0.6, keep_high=0.9))
    assert not nothing.usable.any()


def test_episodes_count_the_same_whatever_their_length(shards: list[Path]) -> None:
    states = read_states(shards)
    decisions = read_decisions(shards, CHUNK)
    advantages = decisions.advantages(states.mask, EVERY_GROUP)
    rows = np.flatnonzero(advantages.usable)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(14, TOKENS)))[rows]
    mask = torch.from_numpy(states.mask[rows])
    weight = torch.from_numpy(advantages.weight[rows]).unsqueeze(-1)
    mean = masked_mean(values * weight, mask)
    means: list[float] = []
    for number in range(4):
        members = torch.from_numpy(decisions.episode[rows] == number)
        means.append(values[members][mask[members]].mean().item())
    assert mean.item() == pytest.approx(np.mean(means), rel=1e-5)


def test_a_group_of_one_has_no_advantage() -> None:
    ones = np.ones(2, np.int64)
    single = Decisions(
        decided=ones.astype(bool),
        tokens=np.zeros((2, 3), np.int64),
        log_probs=np.zeros((2, 3), np.float32),
        episode=ones,
        group=ones,
        success=ones.astype(bool),
    )
    with pytest.raises(ValueError, match="group is 1; expected at least 2 episodes"):
        single.advantages(np.ones((2, 3), np.bool_), GroupParams())
