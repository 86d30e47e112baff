"""Two evaluations of the same episodes, pair by pair; and a test that stops as soon as it has seen enough.

Evaluations start from fixed initial states, so two policies meet the same ones: what is compared is what became of each, and the difficulty that a
state has for both drops out. Two intervals that overlap say far less.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest

from vla_opd.evaluation import Record

RESAMPLES = 9999


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


def compare(first: Sequence[Record], second: Sequence[Record], confidence: float = 0.95, horizon: int | None = None) -> Comparison:
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
        p=float(binomtest(only_second, only_first + only_second).pvalue) if only_first + only_second else 1.0,
    )


def _paired(first: Sequence[Record], second: Sequence[Record], horizon: int | None) -> tuple[list[str], Bool[np.ndarray, "N 2"]]:
    """The task of every episode, and whether it succeeded in the one and in the other."""
    one, other = ({(r.task, r.state): r.success and (horizon is None or r.steps <= horizon) for r in records} for records in (first, second))
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


def _interval(tasks: Sequence[str], differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentiles of the mean difference, each task's episodes drawn again from its own: the tasks are fixed, their episodes are a sample."""
    groups = [differences[np.array(tasks) == task] for task in dict.fromkeys(tasks)]
    random = np.random.default_rng(0)
    drawn = sum(group[random.integers(0, len(group), (RESAMPLES, len(group)))].sum(1) for group in groups) / len(differences)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class SequentialTest:
    """Wald's sequential probability ratio test: is the success rate `low` or `high`? Each error's chance is at most about 1 - `confidence`.

    After n outcomes with s successes the log ratio is s log(high / low) + (n - s) log((1 - high) / (1 - low)); it decides for `high` above
    log((1 - e) / e), for `low` below its negative, e = 1 - `confidence`. On average no test with these errors needs fewer episodes at either rate.
    Source: Wald, Ann. Math. Stat. 16 (1945).
    """

    low: float
    high: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ValueError(f"low is {self.low} and high is {self.high}; expected 0 < low < high < 1")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; expected more than 0.5 and less than 1")

    def decide(self, outcomes: Iterable[bool]) -> tuple[float | None, int]:
        """The rate decided for, or None, and after how many outcomes; no more of them are taken than it needs."""
        bound = math.log(self.confidence / (1 - self.confidence))
        steps = {True: math.log(self.high / self.low), False: math.log((1 - self.high) / (1 - self.low))}
        ratio, count = 0.0, 0
        for count, outcome in enumerate(outcomes, 1):
            ratio += steps[bool(outcome)]
            if abs(ratio) >= bound:
                return self.high if ratio > 0 else self.low, count
        return None, count
