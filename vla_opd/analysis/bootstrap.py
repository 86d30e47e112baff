"""What a study's table says: every arm's success over what it cost, differences, and the cost of coming so far, each with its interval.

Intervals are percentiles of a bootstrap in two stages: seeds are drawn again, and within every task its initial states. An arm's seeds and another's
are drawn together, and so are the states: all arms meet the same ones, and what is compared is what each made of them. With five seeds such an
interval is a little too short (Davison & Hinkley, 1997, section 3.8).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from vla_opd.analysis.study_table import Cost, EpisodeRow, Table, UpdateRow

RESAMPLES = 4000
COSTS = tuple(Cost.model_fields)
SHARE = 0.8  # of the teacher's success: how far is far enough, to ask what it cost

Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval of 95 % around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Float[np.ndarray, " R"]) -> Self:
        """The interval of a bootstrap."""
        low, high = np.quantile(
            resampled, [0.025, 0.975], method="inverted_cdf"
        )  # some may be infinite, and there is nothing between those
        return cls(value, float(low), float(high))


@dataclass(frozen=True)
class Curve:
    """One arm: S seeds, P checkpoints that were scored, E episodes each. The first is the start, or the arm's own student if it has one.

    outcomes: whether an episode succeeded. costs: by name, what it had cost to come to a checkpoint.
    """

    arm: str
    seeds: tuple[int, ...]
    checkpoints: tuple[str, ...]
    outcomes: Bool[np.ndarray, "S P E"]
    costs: dict[str, Float[np.ndarray, "S P"]]
    updates: tuple[UpdateRow, ...]

    @property
    def per_seed(self) -> Float[np.ndarray, " S"]:
        """The success of the last checkpoint with each seed."""
        return self.outcomes[:, -1].mean(-1)

    def cost(self, name: str) -> Float[np.ndarray, " P"]:
        """The mean over seeds; NaN where it isn't known of all."""
        return self.costs[name].mean(0)

    def at_end(self, quantity: str) -> float | None:
        """The mean over seeds of what the last update says; None if it says nothing of it."""
        last = {
            row.seed: getattr(row, quantity) for row in self.updates
        }  # a later row of a seed takes an earlier one's place
        return None if not last or None in last.values() else float(np.mean(list(last.values())))

    def by_position(self, quantity: str) -> dict[int, float]:
        """The mean over seeds for each iteration that says it; not where one seed distils and another doesn't any more."""
        said: dict[int, list[float]] = {}
        kinds: dict[int, set[str]] = {}
        for row in self.updates:
            kinds.setdefault(row.position, set()).add(row.kind)
            if (value := getattr(row, quantity)) is not None:
                said.setdefault(row.position, []).append(value)
        return {
            position: float(np.mean(values))
            for position, values in sorted(said.items())
            if len(kinds[position]) == 1
        }


@dataclass(frozen=True)
class Study:
    """All arms, and what they share: the student that they start from, and the teacher, with what it took to make it. tasks: of every episode."""

    curves: tuple[Curve, ...]
    start: Bool[np.ndarray, " E"]
    teacher: Bool[np.ndarray, " E"]
    teacher_cost: Cost
    tasks: tuple[str, ...]
    horizon: int

    @cached_property
    def _weights(self) -> Float[np.ndarray, "R E"]:
        """How often each episode is drawn in each resample, as a share of all."""
        random, weights = np.random.default_rng(0), np.zeros((RESAMPLES, len(self.tasks)))
        for task in dict.fromkeys(self.tasks):
            members = np.flatnonzero(np.array(self.tasks) == task)
            weights[:, members] = random.multinomial(
                len(members), np.full(len(members), 1 / len(members)), RESAMPLES
            )
        return weights / len(self.tasks)

    def _seeds(self, curve: Curve) -> Float[np.ndarray, "R S"]:
        count = len(curve.seeds)
        return (
            np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), RESAMPLES)
            / count
        )

    @property
    def resampled_start(self) -> Float[np.ndarray, " R"]:
        """The success of the start in each resample."""
        return self._weights @ self.start

    def resampled(self, curve: Curve) -> Float[np.ndarray, "R P"]:
        """The success of every checkpoint, the mean over seeds, in each resample."""
        return np.einsum(
            "rs,spe,re->rp", self._seeds(curve), curve.outcomes, self._weights, optimize=True
        )

    def shared(self, outcomes: Bool[np.ndarray, " E"]) -> Estimate:
        """The success of the start, or of the teacher: one checkpoint, so only its episodes are drawn again."""
        return Estimate.of(float(outcomes.mean()), self._weights @ outcomes)

    def success(self, curve: Curve) -> list[Estimate]:
        """Of every checkpoint, the mean over seeds."""
        means, resampled = curve.outcomes.mean((0, 2)), self.resampled(curve)
        return [Estimate.of(float(mean), resampled[:, point]) for point, mean in enumerate(means)]

    def difference(self, one: Curve, other: Curve) -> Estimate | None:
        """Of the success at the end, other minus one, over the seeds that both have; None if they share none."""
        first, second = _paired(one, other)
        if not first.seeds:
            return None
        value = float(second.per_seed.mean() - first.per_seed.mean())
        return Estimate.of(value, self.resampled(second)[:, -1] - self.resampled(first)[:, -1])

    def forgotten(self, curve: Curve) -> Estimate:
        """Of the success at the end, what it is less than at the start."""
        resampled = self.resampled_start - self.resampled(curve)[:, -1]
        return Estimate.of(float(self.start.mean() - curve.per_seed.mean()), resampled)

    def task_success(self, outcomes: Bool[np.ndarray, "... E"]) -> dict[str, float]:
        """For each task."""
        return {
            task: float(outcomes[..., np.array(self.tasks) == task].mean())
            for task in dict.fromkeys(self.tasks)
        }

    def reach(self, curve: Curve, cost: str, share: float = SHARE) -> Estimate:
        """What it cost until the mean success over seeds came to `share` of the teacher's: interpolated between checkpoints.

        Infinite where it never came so far.
        """
        return Estimate.of(*self._reached(curve, cost, share))

    def ratio(self, one: Curve, other: Curve, cost: str, share: float = SHARE) -> Estimate | None:
        """`reach` of the other over that of the one, over the seeds that both have.

        Where the other never came so far, what it has spent stands in for it: at least so much. None if the one itself doesn't come so far in one of
        ten resamples or more, it cost either nothing, or they share no seed. The interval is that of the resamples in which it does.
        """
        one, other = _paired(one, other)
        if not one.seeds or not other.cost(cost)[-1] > 0:
            return None
        value, resampled = self._reached(one, cost, share)
        came = (resampled > 0) & (resampled < np.inf)
        if not 0 < value < np.inf or came.mean() < 0.9:
            return None
        its_value, its_resampled = self._reached(other, cost, share)
        spent = self._seeds(other) @ other.costs[cost][:, -1]
        least = np.where(np.isinf(its_resampled), spent, its_resampled)
        return Estimate.of(
            (float(other.cost(cost)[-1]) if np.isinf(its_value) else its_value) / value,
            least[came] / resampled[came],
        )

    def _reached(
        self, curve: Curve, cost: str, share: float
    ) -> tuple[float, Float[np.ndarray, " R"]]:
        value = crossing(
            curve.outcomes.mean((0, 2))[None],
            curve.cost(cost)[None],
            np.array([share * self.teacher.mean()]),
        )
        spent = self._seeds(curve) @ curve.costs[cost]
        return float(value[0]), crossing(
            self.resampled(curve), spent, share * (self._weights @ self.teacher)
        )


def crossing(
    success: Float[np.ndarray, "R P"],
    spent: Float[np.ndarray, "R P"],
    wanted: Float[np.ndarray, " R"],
) -> Float[np.ndarray, " R"]:
    """What was spent, or whatever else goes along, where each curve first comes to what is wanted of it: between two points by a straight line.

    Infinite where it never does.
    """
    above = success >= wanted[:, None]
    first, rows = above.argmax(1), np.arange(len(success))
    before = np.maximum(first - 1, 0)
    rise = success[rows, first] - success[rows, before]
    part = np.divide(
        wanted - success[rows, before], rise, out=np.ones(len(success)), where=rise > 0
    )
    at = spent[rows, before] + part * (spent[rows, first] - spent[rows, before])
    return np.where(above.any(1), np.where(first == 0, spent[rows, 0], at), np.inf)


def shared_seeds(one: Curve, other: Curve) -> tuple[int, ...]:
    """The seeds that both have."""
    return tuple(sorted({*one.seeds} & {*other.seeds}))


def _paired(one: Curve, other: Curve) -> tuple[Curve, Curve]:
    """Both with the seeds that both have."""
    common = shared_seeds(one, other)
    return _only(one, common), _only(other, common)


def _only(curve: Curve, seeds: Sequence[int]) -> Curve:
    kept = [curve.seeds.index(seed) for seed in seeds]
    costs = {name: values[kept] for name, values in curve.costs.items()}
    return Curve(
        curve.arm,
        tuple(seeds),
        curve.checkpoints,
        curve.outcomes[kept],
        costs,
        tuple(u for u in curve.updates if u.seed in seeds),
    )


# From rows.


def read_study(table: Table, start: str, teacher: str, *, seen: bool = True) -> Study:
    """start, teacher: the names of their evaluations. seen: of the tasks that the run trains on, or of those that it doesn't.

    ValueError if they are not there, or an evaluation has other episodes than another.
    """
    rows = [row for row in table.episodes if row.seen is seen]
    shared = _by(rows, lambda row: row.evaluation if row.arm is None else None)
    if absent := [name for name in (start, teacher) if name not in shared]:
        raise ValueError(
            f"the table has no evaluation {absent[0]!r} of what the members share; expected one of {sorted(shared)}"
        )
    episodes = [(row.task, row.state) for row in shared[start]]
    own = _by(rows, lambda row: row.arm)
    begun = _outcomes(shared[start], episodes)
    curves = tuple(
        _curve(arm, own[arm], [u for u in table.updates if u.arm == arm], begun, episodes)
        for arm in table.arms
        if arm in own
    )
    cost, tasks = (
        Cost(**{name: getattr(shared[teacher][0], name) for name in COSTS}),
        tuple(task for task, _ in episodes),
    )
    return Study(
        curves,
        begun,
        _outcomes(shared[teacher], episodes),
        cost,
        tasks,
        max(row.horizon for row in rows),
    )


def _curve(
    arm: str,
    rows: Sequence[EpisodeRow],
    updates: Sequence[UpdateRow],
    start: np.ndarray,
    episodes: list[tuple[str, int]],
) -> Curve:
    by_seed = _by(rows, lambda row: row.seed)
    scored = {seed: _by(its, lambda row: row.checkpoint) for seed, its in by_seed.items()}
    common = set.intersection(*(set(its) for its in scored.values()))
    first = next(iter(scored.values()))
    checkpoints = sorted(
        (name for name in first if name in common),
        key=lambda name: (first[name][0].iterations, first[name][0].optimizer_steps),
    )
    own = (
        first[checkpoints[0]][0].iterations == 0
    )  # a student of its own: it never was at the start
    outcomes = [
        [*([] if own else [start]), *(_outcomes(its[name], episodes) for name in checkpoints)]
        for its in scored.values()
    ]
    spent = {
        name: [[_number(getattr(its[c][0], name)) for c in checkpoints] for its in scored.values()]
        for name in COSTS
    }
    costs = {
        name: np.array([[*([] if own else [0.0]), *row] for row in rows], dtype=float)
        for name, rows in spent.items()
    }
    return Curve(
        arm,
        tuple(scored),
        (*(() if own else ("start",)), *checkpoints),
        np.array(outcomes),
        costs,
        tuple(updates),
    )


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _by(
    rows: Sequence[EpisodeRow], key: Callable[[EpisodeRow], Key | None]
) -> dict[Key, list[EpisodeRow]]:
    groups: dict[Key, list[EpisodeRow]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return groups


def _outcomes(
    rows: Sequence[EpisodeRow], episodes: list[tuple[str, int]]
) -> Bool[np.ndarray, " E"]:
    found = {(row.task, row.state): row.success for row in rows}
    if unlike := sorted(found.keys() ^ set(episodes)):
        task, state = unlike[0]
        raise ValueError(
            f"{rows[0].arm or 'shared'}, seed {rows[0].seed}, {rows[0].evaluation}: {len(unlike)} episodes differ from those of the start, the first "
            f"of them state {state} of {task}; expected every evaluation of a study to have the same"
        )
    return np.array([found[one] for one in episodes])
