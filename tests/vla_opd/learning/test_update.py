"""One iteration's update: its part of the schedule, the states of a step, and what goes on from the iteration before."""

from itertools import pairwise

import numpy as np
import pytest

from vla_opd.learning.update import budget, order, probed
from vla_opd.params.training import UpdateParams

SETTINGS = UpdateParams(
    steps=10,
    batch_size=4,
    learning_rate=1.0,
    schedule_iterations=3,
    final_fraction=0.1,
    warmup_fraction=0.1,
)


def test_iterations_follow_each_other_on_one_schedule() -> None:
    plans = [budget(SETTINGS, depth, states=5) for depth in range(4)]
    rates = [plan.schedule.at(plan.first + step) for plan in plans for step in range(plan.steps)]
    assert len(rates) == 40
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])  # 3 of the 30 steps warm up
    assert all(ours >= theirs for ours, theirs in pairwise(rates[3:]))
    assert rates[30:] == pytest.approx([0.1] * 10)


def test_without_states_no_step_is_made() -> None:
    assert budget(SETTINGS, 1, states=0).steps == 0


def test_an_epoch_is_every_state_to_learn_from_once() -> None:
    usable = np.array([1, 4, 5, 8, 9, 12])
    at = order(usable, 4, seed=3)
    seen = np.concatenate([at(step) for step in range(3)])
    assert sorted(seen[:6]) == sorted(seen[6:]) == usable.tolist()


def test_a_policy_is_measured_on_states_with_a_valid_token() -> None:
    mask = np.zeros((1000, 3), np.bool_)
    mask[::2, 1] = True
    rows = probed(mask)
    assert len(rows) == 256
    assert not (rows % 2).any()
    assert (rows[0], rows[-1]) == (0, 998)
    assert probed(mask[:5]).tolist() == [0, 2, 4]
