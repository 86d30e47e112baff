"""Paired comparison of two evaluations, and a sequential test that stops as early as it can.

Evaluations start from fixed initial states, so both policies meet the same ones. Outcomes are
compared state by state, which cancels how difficult a state is for both. Whether two separate
intervals overlap says far less.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Int

from vla_opd.data.records import Record, State

RESAMPLES = 9999
LONG = 300  # episodes


@dataclass(frozen=True)
class Comparison:
    """Outcomes of N episodes under two policies.

    both, first, second, neither: how many succeed under both policies, only the first, only the
                second, and neither.
    difference: success rate of the second minus that of the first.
    low, high:  its percentile interval by the paired bootstrap over episodes within tasks.
    p:          the p value of McNemar's exact test: the probability that of `first + second` fair
                coins at least as many fall on one side. 1 if all outcomes are equal.
    """

    both: int
    first: int
    second: int
    neither: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def episodes(self) -> int:
        return self.both + self.first + self.second + self.neither


def compare(
    first: Sequence[Record],
    second: Sequence[Record],
    confidence: float = 0.95,
    horizon: int | None = None,
) -> Comparison:
    """Compare two evaluations. ValueError unless they have the same tasks and initial states.

    horizon: end every episode after this many control steps, in both evaluations.
    """
    tasks, outcomes = _pair(first, second, horizon)
    before, after = outcomes.T
    differences = after.astype(int) - before.astype(int)
    only_before = int((differences < 0).sum())
    only_after = int((differences > 0).sum())
    low, high = _interval(tasks, differences, confidence)
    return Comparison(
        both=int((before & after).sum()),
        first=only_before,
        second=only_after,
        neither=int((~before & ~after).sum()),
        difference=float(after.mean() - before.mean()),
        low=low,
        high=high,
        p=_mcnemar(only_before, only_after),
    )


def _pair(
    first: Sequence[Record], second: Sequence[Record], horizon: int | None
) -> tuple[list[str], Bool[np.ndarray, "N 2"]]:
    """Return the task of every episode, and its outcome in both evaluations."""
    before = _outcomes(first, horizon)
    after = _outcomes(second, horizon)
    unpaired = sorted(before.keys() ^ after.keys())
    if unpaired:
        task, state = unpaired[0]
        total = len(before.keys() | after.keys())
        raise ValueError(
            f"{len(unpaired)} of {total} episodes are in one evaluation only, the first of them "
            f"state {state} of {task}; expected the same tasks and initial states in both"
        )
    if not before:
        raise ValueError("the evaluations have no episodes; expected at least one")
    episodes = sorted(before)
    tasks = [task for task, _ in episodes]
    return tasks, np.array([[before[episode], after[episode]] for episode in episodes])


def _outcomes(records: Sequence[Record], horizon: int | None) -> dict[State, bool]:
    outcomes: dict[State, bool] = {}
    for record in records:
        state = (record.task, record.state)
        in_time = horizon is None or record.steps <= horizon
        outcomes[state] = record.success and in_time
    return outcomes


def _interval(
    tasks: Sequence[str], differences: Int[np.ndarray, " N"], confidence: float
) -> tuple[float, float]:
    """Return percentiles of the mean difference. Episodes are resampled within their task."""
    random = np.random.default_rng(0)
    task_of = np.array(tasks)
    totals = np.zeros(RESAMPLES, dtype=int)
    for task in dict.fromkeys(tasks):
        group = differences[task_of == task]
        count = len(group)
        shape = (RESAMPLES, count)
        rows = random.integers(0, count, shape)
        resampled = group[rows]
        totals += resampled.sum(1)
    means = totals / len(differences)
    levels = [
        (1 - confidence) / 2,
        (1 + confidence) / 2,
    ]
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def _mcnemar(only_before: int, only_after: int) -> float:
    from scipy.stats import binomtest  # takes a second to import, which `opd` can do without

    differing = only_before + only_after
    return float(binomtest(only_after, differing).pvalue) if differing else 1.0


@dataclass(frozen=True)
class SequentialTest:
    """Wald's sequential probability ratio test: is the success rate `low` or `high`?

    Both error probabilities are at most e = 1 - `confidence`. After n outcomes with s successes
    the log ratio is s log(high / low) + (n - s) log((1 - high) / (1 - low)); the test decides for
    `high` at an upper bound, for `low` at a lower one. Wald's bounds, +-log((1 - e) / e), are exact
    for a ratio that meets them; one that jumps past them makes fewer errors and takes longer. So
    both bounds are tightened until the exact error probabilities are e. No test with the same
    errors needs fewer episodes on average at either rate.
    Source: Wald, Ann. Math. Stat. 16 (1945); Wald and Wolfowitz, 19 (1948).
    """

    low: float
    high: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ValueError(
                f"low is {self.low} and high is {self.high}; expected 0 < low < high < 1"
            )
        if not 0.5 < self.confidence < 1:
            raise ValueError(
                f"confidence is {self.confidence}; expected more than 0.5 and less than 1"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The log ratios at which the test decides for `low` and for `high`."""
        return _bounds(self)

    @property
    def steps(self) -> tuple[float, float]:
        """The changes of the log ratio with a failure and with a success."""
        failure = (1 - self.high) / (1 - self.low)
        success = self.high / self.low
        return math.log(failure), math.log(success)

    def chances(
        self, rate: float, bounds: tuple[float, float] | None = None
    ) -> tuple[float, float, float]:
        """Return the test's properties at a true success rate.

        These are the probability that it decides for `low`, the probability that it decides for
        `high`, and the mean number of episodes. They are exact: the distribution of the number of
        successes is followed until the probability of being undecided is less than 1e-6.
        """
        lower, upper = bounds or self.bounds
        failure, success = self.steps
        undecided = np.ones(1)  # probabilities of `fewest` successes, one more, and so on
        fewest = 0
        low = 0.0
        high = 0.0
        episodes = 0.0
        for count in itertools.count(1):
            episodes += float(undecided.sum())
            failed = np.append(undecided * (1 - rate), 0)
            succeeded = np.append(0, undecided * rate)
            undecided = failed + succeeded
            successes = fewest + np.arange(len(undecided))
            failures = count - successes
            ratio = successes * success + failures * failure
            below = ratio <= lower
            above = ratio >= upper
            low += float(undecided[below].sum())
            high += float(undecided[above].sum())
            fewest += int(below.sum())
            undecided = undecided[~below & ~above]
            if undecided.sum() < 1e-6:
                return low, high, episodes
        raise AssertionError

    def decide(self, outcomes: Iterable[bool]) -> tuple[float | None, int]:
        """Return the rate decided for, or None, and the number of outcomes used.

        No more outcomes are taken than the decision needs.
        """
        lower, upper = self.bounds
        failure, success = self.steps
        successes = count = 0
        for count, outcome in enumerate(outcomes, 1):
            successes += bool(outcome)
            ratio = successes * success + (count - successes) * failure
            if ratio >= upper:
                return self.high, count
            if ratio <= lower:
                return self.low, count
        return None, count


@cache
def _bounds(test: SequentialTest) -> tuple[float, float]:
    error = 1 - test.confidence
    wald = math.log(test.confidence / error)
    lower = -wald
    upper = wald
    if wald > LONG * _slower_drift(test):
        return lower, upper  # the jumps are so small that tightening gains little and takes long

    def errs_rarely_at_low(bound: float) -> bool:
        return test.chances(test.low, (lower, bound))[1] <= error

    def errs_rarely_at_high(bound: float) -> bool:
        return test.chances(test.high, (-bound, upper))[0] <= error

    for _ in range(3):  # each bound has a small effect on the other's error
        upper = _smallest_bound(errs_rarely_at_low, wald)
        lower = -_smallest_bound(errs_rarely_at_high, wald)
    return lower, upper


def _slower_drift(test: SequentialTest) -> float:
    """Return the mean change of the log ratio per episode, at the rate where it is smaller."""
    drifts: list[float] = []
    failure, success = test.steps
    for rate in (test.low, test.high):
        mean = rate * success + (1 - rate) * failure
        drifts.append(abs(mean))  # negative at `low`, positive at `high`
    return min(drifts)


def _smallest_bound(holds: Callable[[float], bool], largest: float) -> float:
    """Return the smallest bound for which a condition holds, to 1e-3, by bisection.

    The condition holds for all bounds from some bound on, which is at most `largest`.
    """
    low = 0.0
    high = largest
    while high - low > 1e-3:
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
