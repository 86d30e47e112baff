"""Comparisons: pairs counted by hand, intervals by simulation, and the sequential test."""

import math
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from vla_opd.analysis.comparison import SequentialTest, compare
from vla_opd.data.records import Record


def records(outcomes: dict[str, list[bool]], steps: int = 50) -> list[Record]:
    return [
        Record(task=task, instruction=task, state=state, success=success, steps=steps + state)
        for task, of_task in outcomes.items()
        for state, success in enumerate(of_task)
    ]


FIRST = records({"a": [True, False, False, True], "b": [False, False, True, False]})
SECOND = records({"a": [True, True, True, False], "b": [False, True, True, True]})


def test_pairs_are_counted_whatever_their_order() -> None:
    comparison = compare(FIRST, SECOND[::-1])
    assert (
        comparison.both,
        comparison.first,
        comparison.second,
        comparison.neither,
        comparison.episodes,
    ) == (2, 1, 4, 1, 8)
    assert comparison.difference == pytest.approx(3 / 8)
    turned = compare(SECOND, FIRST)
    assert (turned.first, turned.second, turned.difference, turned.p) == (
        4,
        1,
        -3 / 8,
        comparison.p,
    )
    assert (turned.low, turned.high) == pytest.approx(
        (-comparison.high, -comparison.low), abs=0.13
    )  # an eighth is one episode


def test_p_is_mcnemars() -> None:
    """Of 5 episodes that differ, as many as 4 on one side: 2 (5 + 1) / 32."""
    assert compare(FIRST, SECOND).p == pytest.approx(2 * (comb(5, 4) + comb(5, 5)) / 2**5)
    same = compare(FIRST, FIRST)
    assert (same.p, same.difference, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)


def test_a_shorter_horizon_counts_in_both() -> None:
    assert compare(FIRST, SECOND, horizon=52).both == 2
    assert compare(FIRST, SECOND, horizon=51).both == 1  # state 2 of b took 52 steps
    assert compare(FIRST, SECOND, horizon=49).neither == 8


def test_evaluations_of_other_episodes_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="1 of 8 episodes are in one evaluation only, the first of them state 3 of b; "
        "expected the same tasks",
    ):
        compare(FIRST, SECOND[:-1])
    with pytest.raises(ValueError, match="expected at least one"):
        compare([], [])


def test_the_interval_has_its_confidence() -> None:
    """Pairs of evaluations with correlated outcomes: 8 tasks of 10 episodes, rates 0.15 apart."""
    random = np.random.default_rng(0)
    inside = 0
    rates = random.uniform(0.2, 0.8, (8, 1))
    for _ in range(200):
        shared_luck = random.random((8, 10))
        second_luck = random.random((8, 10))
        is_shared = random.random((8, 10)) < 0.7
        first = shared_luck < rates
        second = np.where(is_shared, shared_luck, second_luck) < rates + 0.15
        pair = [
            records({str(task): list(map(bool, row)) for task, row in enumerate(rows)})
            for rows in (first, second)
        ]
        comparison = compare(*pair, confidence=0.9)
        inside += comparison.low <= 0.15 <= comparison.high
    assert 0.82 < inside / 200 < 0.97


@pytest.mark.parametrize(("low", "high"), [(0.8, 0.9), (0.5, 0.7)])
def test_the_sequential_test_needs_less_than_half_of_the_episodes(low: float, high: float) -> None:
    """Compared with the smallest fixed design with two errors of at most 5 %."""
    fixed = next(
        n
        for n in range(1, 999)
        if any(
            binom.sf(c - 1, n, low) <= 0.05 and binom.cdf(c - 1, n, high) <= 0.05
            for c in range(int(n * low), n + 1)
        )
    )
    test, random = SequentialTest(low, high), np.random.default_rng(1)
    expected, simulated = list[float](), list[float]()
    for rate in (low, high):
        for_low, for_high, episodes = test.chances(rate)
        assert for_low + for_high == pytest.approx(1, abs=1e-5)
        assert min(for_low, for_high) <= 0.05
        ends = [test.decide((random.random(3000) < rate).tolist()) for _ in range(1500)]
        assert None not in {decided for decided, _ in ends}
        counts = np.array([count for _, count in ends])
        assert counts.mean() == pytest.approx(episodes, abs=3 * counts.std() / 1500**0.5)
        assert np.mean([decided == high for decided, _ in ends]) == pytest.approx(
            for_high, abs=3 * (0.05 * 0.95 / 1500) ** 0.5
        )
        expected.append(episodes)
        simulated.append(float(counts.mean()))
    assert fixed / np.mean(expected) > 2
    assert fixed / np.mean(simulated) > 2


@pytest.mark.parametrize("rates", [(0.8, 0.9), (0.2, 0.35), (0.5, 0.9)])
def test_bounds_are_tightened_as_far_as_the_errors_allow(rates: tuple[float, float]) -> None:
    test = SequentialTest(*rates)
    lower, upper = test.bounds
    assert -math.log(19) < lower < 0 < upper < math.log(19)
    assert max(test.chances(test.low)[1], test.chances(test.high)[0]) <= 0.05
    assert (
        test.chances(test.low, (lower, upper - 0.1))[1] > 0.05
        or test.chances(test.high, (lower + 0.1, upper))[0] > 0.05
    )


def test_bounds_are_walds_if_the_jumps_are_small() -> None:
    assert SequentialTest(0.01, 0.011).bounds == pytest.approx((-math.log(19), math.log(19)))


def test_it_takes_no_more_outcomes_than_it_needs() -> None:
    outcomes = iter([True] * 100)
    decided, count = SequentialTest(0.5, 0.9).decide(outcomes)
    assert (decided, count) == (0.9, 5)  # 1.8^5 > exp(2.66) > 1.8^4
    assert len(list(outcomes)) == 95
    assert SequentialTest(0.5, 0.9).decide([False, False]) == (0.5, 2)  # 0.2^2 < exp(-2.45) < 0.2
    assert SequentialTest(0.5, 0.9).decide([True, False]) == (None, 2)


@pytest.mark.parametrize(
    ("low", "high", "confidence"),
    [*product([0.0, 0.9], [0.9, 1.0], [0.95]), (0.8, 0.9, 1.0), (0.8, 0.9, 0.5)],
)
def test_invalid_rates_are_refused(low: float, high: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        SequentialTest(low, high, confidence)
