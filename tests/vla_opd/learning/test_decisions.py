"""What a rollout decided, state by state, and what GRPO makes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.vla_opd.small import CHUNK, TOKENS, episode
from vla_opd.data.trajectory import read_states, write_shard
from vla_opd.learning.decisions import Decisions, failed_share, read_decisions
from vla_opd.learning.objectives import masked_mean
from vla_opd.params.objective import GroupParams


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two groups of two episodes of different lengths, with every state kept."""
    groups = [[(5, True), (3, False)], [(4, False), (2, False)]]
    paths = [tmp_path / f"shard-000-{number:05d}.zarr.zip" for number in range(2)]
    for number, (path, group) in enumerate(zip(paths, groups, strict=True)):
        members = [
            replace(episode(10 * number, steps=steps, member=m), success=success)
            for m, (steps, success) in enumerate(group)
        ]
        write_shard(path, members, CHUNK)
    return paths


def test_they_are_aligned_with_the_states(shards: list[Path]) -> None:
    states, decisions = read_states(shards), read_decisions(shards, CHUNK)
    assert len(decisions.decided) == len(states.mask) == 5 + 3 + 4 + 2
    np.testing.assert_array_equal(decisions.episode, states.episode)
    assert decisions.group.tolist() == [0] * 8 + [1] * 6
    assert decisions.success.tolist() == [True] * 5 + [False] * 9
    assert (
        decisions.decided.tolist()
        == [True, False] * 2 + [True] + [True, False, True] + [True, False] * 3
    )
    first = episode(0, steps=5)
    np.testing.assert_array_equal(decisions.tokens[:5], first.tokens[[0, 0, 1, 1, 2]])
    np.testing.assert_array_equal(decisions.log_probs[:5], first.log_probs[[0, 0, 1, 1, 2]])


def test_the_share_of_failures_is_by_token(shards: list[Path]) -> None:
    mask = np.zeros((14, TOKENS), np.bool_)
    mask[[0, 4, 6, 13]] = True  # the first two in the episode that succeeded
    assert failed_share(shards, mask) == 0.5
    assert failed_share(shards, np.ones_like(mask)) == 9 / 14


def test_groups_of_one_outcome_are_left_out(shards: list[Path]) -> None:
    decisions = read_decisions(shards, CHUNK)
    mask = np.ones((14, TOKENS), np.bool_)
    mask[4] = False
    graded = decisions.graded(mask, GroupParams())
    assert np.flatnonzero(graded.usable).tolist() == [
        0,
        2,
        5,
        7,
    ]  # states of decisions in the first group, with a valid token
    assert graded.advantage[[0, 5, 8]] == pytest.approx([0.5**0.5, -(0.5**0.5), 0], abs=1e-5)
    everything = decisions.graded(mask, GroupParams(keep_low=0, keep_high=1))
    assert np.flatnonzero(everything.usable).tolist() == [0, 2, 5, 7, 8, 10, 12]
    assert not decisions.graded(mask, GroupParams(keep_low=0.6, keep_high=0.9)).usable.any()


def test_episodes_count_the_same_whatever_their_length(shards: list[Path]) -> None:
    import torch

    states, decisions = read_states(shards), read_decisions(shards, CHUNK)
    graded = decisions.graded(states.mask, GroupParams(keep_low=0, keep_high=1))
    rows = np.flatnonzero(graded.usable)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(14, TOKENS)))[rows]
    mask = torch.from_numpy(states.mask[rows])
    found = masked_mean(values * torch.from_numpy(graded.weight[rows]).unsqueeze(-1), mask)
    each = [
        values[decisions.episode[rows] == e][mask[decisions.episode[rows] == e]].mean().item()
        for e in range(4)
    ]
    assert found.item() == pytest.approx(np.mean(each), rel=1e-5)


def test_a_group_of_one_has_no_advantage() -> None:
    ones = np.ones(2, np.int64)
    alone = Decisions(
        ones.astype(bool),
        np.zeros((2, 3), np.int64),
        np.zeros((2, 3), np.float32),
        ones,
        ones,
        ones.astype(bool),
    )
    with pytest.raises(ValueError, match="group is 1; expected at least 2 episodes"):
        alone.graded(np.ones((2, 3), np.bool_), GroupParams())
