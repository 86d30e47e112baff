"""Two evaluations of the same episodes, pair by pair; and a test that stops as soon as it has seen enough.

Evaluations start from fixed initial states, so two policies meet the same ones: what is compared is what became of each, and the difficulty that a
state has for both drops out. Two intervals that overlap say far less.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest

from vla_opd.analysis.evaluation import Record

RESAMPLES = 9999
LONG = 300  # episodes


@dataclass(frozen=True)
class Comparison:
    """What became of N episodes under two policies.

    both, first, second, neither: how many succeeded under both, under the first only, the second only, and neither.
    difference: second minus first, of success; low, high: its interval by the paired bootstrap (percentiles; episodes are drawn within their task).
    p: of McNemar's exact test: how often, of `first + second` fair coins, at least as many would fall on one side. 1 if no episode differs.
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
    """Compare two evaluations. ValueError unless their episodes are the same tasks' same initial states.

    horizon: episodes are given up after so many control steps, in both.
    """
    tasks, outcomes = _paired(first, second, horizon)
    a, b = outcomes.T
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    low, high = _interval(tasks, b.astype(int) - a.astype(int), confidence)
    return Comparison(
        both=int((a & b).sum()),
        first=only_first,
        second=only_second,
        neither=int((~a & ~b).sum()),
        difference=float(b.mean() - a.mean()),
        low=low,
        high=high,
        p=float(binomtest(only_second, only_first + only_second).pvalue)
        if only_first + only_second
        else 1.0,
    )


def _paired(
    first: Sequence[Record], second: Sequence[Record], horizon: int | None
) -> tuple[list[str], Bool[np.ndarray, "N 2"]]:
    """The task of every episode, and whether it succeeded in the one and in the other."""
    one, other = (
        {(r.task, r.state): r.success and (horizon is None or r.steps <= horizon) for r in records}
        for records in (first, second)
    )
    if unpaired := sorted(one.keys() ^ other.keys()):
        task, state = unpaired[0]
        raise ValueError(
            f"{len(unpaired)} of {len(one.keys() | other.keys())} episodes are in one evaluation only, the first of them state {state} of {task}; "
            "expected the same tasks and initial states in both"
        )
    if not one:
        raise ValueError("the evaluations have no episodes; expected at least one")
    keys = sorted(one)
    return [task for task, _ in keys], np.array([[one[key], other[key]] for key in keys])


def _interval(
    tasks: Sequence[str], differences: np.ndarray, confidence: float
) -> tuple[float, float]:
    """Percentiles of the mean difference, each task's episodes drawn again from its own: the tasks are fixed, their episodes are a sample."""
    groups = [differences[np.array(tasks) == task] for task in dict.fromkeys(tasks)]
    random = np.random.default_rng(0)
    drawn = sum(
        group[random.integers(0, len(group), (RESAMPLES, len(group)))].sum(1) for group in groups
    ) / len(differences)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class SequentialTest:
    """Wald's sequential probability ratio test: is the success rate `low` or `high`? Each error's chance is at most e = 1 - `confidence`.

    After n outcomes with s successes the log ratio is s log(high / low) + (n - s) log((1 - high) / (1 - low)); it decides for `high` at an upper
    bound, for `low` at a lower one. Wald's own bounds, +-log((1 - e) / e), are for a ratio that meets them; one that jumps past them errs less, and
    takes longer. So both are drawn in until the chances of erring, computed exactly, are e. On average no test with the same errors needs fewer
    episodes at either rate. Source: Wald, Ann. Math. Stat. 16 (1945); Wald and Wolfowitz, 19 (1948).
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
        """Of the log ratio: the lower, at which it decides for `low`, and the upper."""
        return _bounds(self)

    @property
    def steps(self) -> tuple[float, float]:
        """Of the log ratio: with a failure, and with a success."""
        return math.log((1 - self.high) / (1 - self.low)), math.log(self.high / self.low)

    def chances(
        self, rate: float, bounds: tuple[float, float] | None = None
    ) -> tuple[float, float, float]:
        """At a true success rate: the chance that it decides for `low`, that it decides for `high`, and the episodes that it takes on average.

        Exact, by following the numbers of successes that leave it open, until less than 1e-6 of all do.
        """
        lower, upper = bounds or self.bounds
        failure, success = self.steps
        chance, fewest = (
            np.ones(1),
            0,
        )  # of being open with `fewest` successes, and one more, and so on
        decided, episodes = [0.0, 0.0], 0.0
        for count in itertools.count(1):
            episodes += float(chance.sum())
            chance = np.append(chance * (1 - rate), 0) + np.append(0, chance * rate)
            successes = fewest + np.arange(len(chance))
            ratio = successes * success + (count - successes) * failure
            below, above = ratio <= lower, ratio >= upper
            decided = [
                decided[0] + float(chance[below].sum()),
                decided[1] + float(chance[above].sum()),
            ]
            fewest, chance = fewest + int(below.sum()), chance[~below & ~above]
            if chance.sum() < 1e-6:
                return decided[0], decided[1], episodes
        raise AssertionError

    def decide(self, outcomes: Iterable[bool]) -> tuple[float | None, int]:
        """The rate decided for, or None, and after how many outcomes; no more of them are taken than it needs."""
        lower, upper = self.bounds
        failure, success = self.steps
        successes = count = 0
        for count, outcome in enumerate(outcomes, 1):
            successes += bool(outcome)
            ratio = successes * success + (count - successes) * failure
            if not lower < ratio < upper:
                return self.high if ratio >= upper else self.low, count
        return None, count


@cache
def _bounds(test: SequentialTest) -> tuple[float, float]:
    wald, error = math.log(test.confidence / (1 - test.confidence)), 1 - test.confidence
    lower, upper = -wald, wald
    failure, success = test.steps
    slower = min(
        -(test.low * success + (1 - test.low) * failure),
        test.high * success + (1 - test.high) * failure,
    )
    if (
        wald > LONG * slower
    ):  # so many small jumps that there is next to nothing to draw in, and much to compute
        return lower, upper
    for _ in range(3):  # each bound matters a little to the other's error
        upper = _least(
            lambda bound, other=lower: test.chances(test.low, (other, bound))[1] <= error, wald
        )
        lower = -_least(
            lambda bound, other=upper: test.chances(test.high, (-bound, other))[0] <= error, wald
        )
    return lower, upper


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The least bound up to `most` for which it holds, to a thousandth: it does from some bound on."""
    low, high = 0.0, most
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
