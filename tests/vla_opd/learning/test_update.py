"""One iteration's update: its part of the schedule, the order of states, the states to measure."""

from itertools import pairwise

import numpy as np
import pytest

from vla_opd.learning.update import plan_budget, probe_states, state_order
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
    rates: list[float] = []
    for depth in range(4):
        budget = plan_budget(SETTINGS, depth, states=5)
        rates += [budget.schedule.at(budget.first + step) for step in range(budget.steps)]
    assert len(rates) == 40
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])  # 3 of the 30 steps warm up
    assert all(before >= after for before, after in pairwise(rates[3:]))
    assert rates[30:] == pytest.approx([0.1] * 10)


def test_without_states_no_step_is_made() -> None:
    assert plan_budget(SETTINGS, 1, states=0).steps == 0


def test_an_epoch_is_every_usable_state_once() -> None:
    usable = np.array([1, 4, 5, 8, 9, 12])
    order = state_order(usable, 4, seed=3)
    rows = np.concatenate([order(step) for step in range(3)])
    assert sorted(rows[:6]) == sorted(rows[6:]) == usable.tolist()


def test_a_policy_is_measured_on_states_with_a_valid_token() -> None:
    mask = np.zeros((1000, 3), np.bool_)
    mask[::2, 1] = True
    rows = probe_states(mask)
    assert len(rows) == 256
    assert not (rows % 2).any()
    assert (rows[0], rows[-1]) == (0, 998)
    assert probe_states(mask[:5]).tolist() == [0, 2, 4]
