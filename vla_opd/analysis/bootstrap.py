"""Results of a study: success against cost, differences between arms, and costs to reach a level.

Intervals are percentiles of a two-stage bootstrap: seeds are resampled, and within every task its
initial states. All arms share the resamples of states, since they all meet the same ones, and arms
with as many seeds share those of seeds. With five seeds such an interval is a little too short
(Davison & Hinkley, 1997, section 3.8).

Shapes: `S` seeds, `P` checkpoints, `E` episodes, `R` resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from vla_opd.analysis.study_table import Cost, EpisodeRow, Table, UpdateRow

RESAMPLES = 4000
COSTS = tuple(Cost.model_fields)
SHARE = 0.8  # the level for costs: this fraction of the teacher's success rate
REACHED = 0.9  # the fraction of resamples in which an arm must reach the level to be a reference

Episode = tuple[str, int]  # task and initial state
Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def from_resamples(cls, value: float, resampled: Float[np.ndarray, " R"]) -> Self:
        """Return the number with its bootstrap percentile interval."""
        low, high = np.quantile(
            resampled,
            [0.025, 0.975],
            method="inverted_cdf",  # no interpolation: resamples may be infinite
        )
        return cls(value, float(low), float(high))


@dataclass(frozen=True)
class Curve:
    """One arm.

    checkpoints: the evaluated ones, in order. The first is the start, or the arm's own student.
    outcomes:    whether each episode succeeded.
    costs:       what it took to make each checkpoint, by name; NaN where that is not recorded.
    """

    arm: str
    seeds: tuple[int, ...]
    checkpoints: tuple[str, ...]
    outcomes: Bool[np.ndarray, "S P E"]
    costs: dict[str, Float[np.ndarray, "S P"]]
    updates: tuple[UpdateRow, ...]

    @property
    def per_seed(self) -> Float[np.ndarray, " S"]:
        """The success rate of the last checkpoint, per seed."""
        return self.outcomes[:, -1].mean(-1)

    def cost(self, name: str) -> Float[np.ndarray, " P"]:
        """Return the mean cost over seeds; NaN where it is not recorded for all."""
        return self.costs[name].mean(0)

    def at_end(self, quantity: str) -> float | None:
        """Return the mean over seeds of a quantity after the last update; None without it."""
        by_seed: dict[int, Any] = {}
        for row in self.updates:
            by_seed[row.seed] = getattr(row, quantity)
        values = list(by_seed.values())
        if not values or None in values:
            return None
        return float(np.mean(values))

    def by_position(self, quantity: str) -> dict[int, float]:
        """Return the mean over seeds of a quantity, by number of the iteration.

        Iterations that are distillation for one seed and GRPO for another are left out.
        """
        by_position: dict[int, list[UpdateRow]] = {}
        for row in self.updates:
            rows = by_position.setdefault(row.position, [])
            rows.append(row)
        means: dict[int, float] = {}
        for position in sorted(by_position):
            rows = by_position[position]
            kinds = {row.kind for row in rows}
            values = [getattr(row, quantity) for row in rows]
            recorded = [value for value in values if value is not None]
            if recorded and len(kinds) == 1:
                mean = np.mean(recorded)
                means[position] = float(mean)
        return means

    def select_seeds(self, seeds: Sequence[int]) -> "Curve":
        """Return the curve of some of its seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            outcomes=self.outcomes[rows],
            costs={name: values[rows] for name, values in self.costs.items()},
            updates=tuple(row for row in self.updates if row.seed in seeds),
        )


@dataclass(frozen=True)
class Study:
    """All arms, with the outcomes of the student that they start from and of the teacher.

    teacher_cost: what making the teacher took. tasks: the task of every episode.
    """

    curves: tuple[Curve, ...]
    start: Bool[np.ndarray, " E"]
    teacher: Bool[np.ndarray, " E"]
    teacher_cost: Cost
    tasks: tuple[str, ...]
    horizon: int

    def find(self, arm: str) -> Curve | None:
        """Return the curve of an arm, if it has one."""
        for curve in self.curves:
            if curve.arm == arm:
                return curve
        return None

    @cached_property
    def _weights(self) -> Float[np.ndarray, "R E"]:
        """The weight of every episode in every resample; the weights of a resample sum to 1."""
        random = np.random.default_rng(0)
        tasks = np.array(self.tasks)
        count = len(tasks)
        draws = np.zeros((RESAMPLES, count))
        for task in dict.fromkeys(self.tasks):
            of_task = tasks == task
            draws[:, of_task] = _draw(random, int(of_task.sum()))
        return draws / count

    def _seed_weights(self, curve: Curve) -> Float[np.ndarray, "R S"]:
        count = len(curve.seeds)
        random = np.random.default_rng(1)
        return _draw(random, count) / count

    @property
    def resampled_start(self) -> Float[np.ndarray, " R"]:
        """The success rate of the start in every resample."""
        return self._weights @ self.start

    def resampled(self, curve: Curve) -> Float[np.ndarray, "R P"]:
        """Return the success rate of every checkpoint, averaged over seeds, in every resample."""
        return np.einsum(
            "rs,spe,re->rp",
            self._seed_weights(curve),
            curve.outcomes,
            self._weights,
            optimize=True,
        )

    def checkpoint_success(self, outcomes: Bool[np.ndarray, " E"]) -> Estimate:
        """Return the success rate of the start or the teacher; only its episodes are resampled."""
        return Estimate.from_resamples(float(outcomes.mean()), self._weights @ outcomes)

    def success(self, curve: Curve) -> list[Estimate]:
        """Return the success rate of every checkpoint, averaged over seeds."""
        means = curve.outcomes.mean((0, 2))
        resampled = self.resampled(curve)
        estimates: list[Estimate] = []
        for mean, column in zip(means, resampled.T, strict=True):
            estimate = Estimate.from_resamples(float(mean), column)
            estimates.append(estimate)
        return estimates

    def difference(self, reference: Curve, curve: Curve) -> Estimate | None:
        """Return by how much the final success rate of `curve` exceeds that of `reference`.

        Over the seeds that both have; None if there are none.
        """
        reference, curve = _pair(reference, curve)
        if not reference.seeds:
            return None
        value, resampled = self._final_success(curve)
        reference_value, reference_resampled = self._final_success(reference)
        return Estimate.from_resamples(
            value - reference_value,
            resampled - reference_resampled,
        )

    def forgetting(self, curve: Curve) -> Estimate:
        """Return by how much the final success rate is below that of the start."""
        value, resampled = self._final_success(curve)
        return Estimate.from_resamples(
            float(self.start.mean()) - value,
            self.resampled_start - resampled,
        )

    def _final_success(self, curve: Curve) -> tuple[float, Float[np.ndarray, " R"]]:
        """Return the mean success rate of the last checkpoint, and that of every resample."""
        resampled = self.resampled(curve)
        return float(curve.per_seed.mean()), resampled[:, -1]

    def task_success(self, outcomes: Bool[np.ndarray, "... E"]) -> dict[str, float]:
        """Return the success rate of every task."""
        tasks = np.array(self.tasks)
        rates: dict[str, float] = {}
        for task in dict.fromkeys(self.tasks):
            of_task = tasks == task
            rate = outcomes[..., of_task].mean()
            rates[task] = float(rate)
        return rates

    def reach(self, curve: Curve, cost: str, share: float = SHARE) -> Estimate:
        """Return the cost at which the mean success rate reaches `share` of the teacher's.

        Interpolated between checkpoints; infinite if it never does.
        """
        return Estimate.from_resamples(*self._reach(curve, cost, share))

    def ratio(
        self, reference: Curve, curve: Curve, cost: str, share: float = SHARE
    ) -> Estimate | None:
        """Return `reach` of `curve` over `reach` of `reference`, over the seeds that both have.

        Where `curve` never reaches the level, its total cost is used: a lower bound. The interval
        is over the resamples in which `reference` reaches it. None if it does not in a tenth of the
        resamples or more, if either cost is zero, or if they share no seed.
        """
        reference, curve = _pair(reference, curve)
        if not curve.seeds:
            return None
        total = float(curve.cost(cost)[-1])
        if not total > 0:  # also if it is NaN
            return None
        unit, resampled_unit = self._reach(reference, cost, share)
        reached = (resampled_unit > 0) & (resampled_unit < np.inf)
        if not 0 < unit < np.inf or reached.mean() < REACHED:
            return None
        value, resampled = self._reach(curve, cost, share)
        final_costs = curve.costs[cost][:, -1]
        resampled_total = self._seed_weights(curve) @ final_costs
        value = total if np.isinf(value) else value
        resampled = np.where(
            np.isinf(resampled),
            resampled_total,
            resampled,
        )
        return Estimate.from_resamples(
            value / unit,
            resampled[reached] / resampled_unit[reached],
        )

    def _reach(
        self, curve: Curve, cost: str, share: float
    ) -> tuple[float, Float[np.ndarray, " R"]]:
        means = curve.outcomes.mean((0, 2))
        costs = curve.cost(cost)
        level = share * self.teacher.mean()
        value = crossing(
            means[None],
            costs[None],
            np.array([level]),
        )
        resampled_level = share * (self._weights @ self.teacher)
        resampled = crossing(
            self.resampled(curve),
            self._seed_weights(curve) @ curve.costs[cost],
            resampled_level,
        )
        return float(value[0]), resampled


def crossing(
    success: Float[np.ndarray, "R P"],
    quantity: Float[np.ndarray, "R P"],
    level: Float[np.ndarray, " R"],
) -> Float[np.ndarray, " R"]:
    """Return the quantity where each curve first reaches its level of success.

    Interpolated linearly between two points; infinite where it never does.
    """
    above = success >= level[:, None]
    rows = np.arange(len(success))
    after = above.argmax(1)  # the first point that is not below the level
    before = np.maximum(after - 1, 0)
    success_before = success[rows, before]
    quantity_before = quantity[rows, before]
    quantity_after = quantity[rows, after]
    rise = success[rows, after] - success_before
    fraction = np.divide(
        level - success_before,
        rise,
        out=np.ones(len(success)),
        where=rise > 0,
    )
    increase = quantity_after - quantity_before
    interpolated = quantity_before + fraction * increase
    reached = np.where(
        after == 0,
        quantity_after,
        interpolated,
    )
    return np.where(
        above.any(1),
        reached,
        np.inf,
    )


def _draw(random: np.random.Generator, count: int) -> Int[np.ndarray, "R N"]:
    """Return how often each of `count` items is drawn in every resample."""
    uniform = np.full(count, 1 / count)
    return random.multinomial(count, uniform, RESAMPLES)


def common_seeds(first: Curve, second: Curve) -> tuple[int, ...]:
    """Return the seeds that both curves have."""
    return tuple(sorted({*first.seeds} & {*second.seeds}))


def _pair(first: Curve, second: Curve) -> tuple[Curve, Curve]:
    """Return both curves with the seeds that both have."""
    seeds = common_seeds(first, second)
    return first.select_seeds(seeds), second.select_seeds(seeds)


# From rows


def read_study(table: Table, start: str, teacher: str, *, seen: bool = True) -> Study:
    """Return the study of a table.

    start, teacher: the names of their evaluations. seen: of the tasks that the run trains on, or
    of the others.
    ValueError if an evaluation is missing or has other episodes than the start's.
    """
    rows = [row for row in table.episodes if row.seen is seen]
    of_no_arm = [row for row in rows if row.arm is None]
    shared = _group(of_no_arm, _evaluation)
    for name in (start, teacher):
        if name not in shared:
            raise ValueError(
                f"the table has no evaluation {name!r} of what the members share; "
                f"expected one of {sorted(shared)}"
            )
    start_rows = shared[start]
    teacher_rows = shared[teacher]
    episodes = [(row.task, row.state) for row in start_rows]
    start_outcomes = _outcomes(start_rows, episodes)
    curves: list[Curve] = []
    for arm in table.arms:
        of_arm = [row for row in rows if row.arm == arm]
        if of_arm:
            updates = tuple(row for row in table.updates if row.arm == arm)
            curve = _read_curve(arm, of_arm, updates, start_outcomes, episodes)
            curves.append(curve)
    teacher_cost = teacher_rows[0].model_dump(include=set(COSTS))
    return Study(
        curves=tuple(curves),
        start=start_outcomes,
        teacher=_outcomes(teacher_rows, episodes),
        teacher_cost=Cost(**teacher_cost),
        tasks=tuple(task for task, _ in episodes),
        horizon=max(row.horizon for row in rows),
    )


def _read_curve(
    arm: str,
    rows: Sequence[EpisodeRow],
    updates: tuple[UpdateRow, ...],
    start: Bool[np.ndarray, " E"],
    episodes: Sequence[Episode],
) -> Curve:
    by_seed = _group(rows, _seed)
    evaluated = [_group(of_seed, _checkpoint) for of_seed in by_seed.values()]
    checkpoints = _common_checkpoints(evaluated)
    first = evaluated[0][checkpoints[0]]
    begins_at_start = first[0].iterations > 0  # the arm has no student of its own
    outcomes: list[list[np.ndarray]] = []
    costs: list[list[Cost]] = []
    for by_checkpoint in evaluated:
        outcomes_of_seed: list[np.ndarray] = []
        costs_of_seed: list[Cost] = []
        if begins_at_start:
            outcomes_of_seed.append(start)
            costs_of_seed.append(Cost())
        for checkpoint in checkpoints:
            point = by_checkpoint[checkpoint]
            outcomes_of_seed.append(_outcomes(point, episodes))
            costs_of_seed.append(point[0])
        outcomes.append(outcomes_of_seed)
        costs.append(costs_of_seed)
    if begins_at_start:
        checkpoints.insert(0, "start")
    return Curve(
        arm=arm,
        seeds=tuple(by_seed),
        checkpoints=tuple(checkpoints),
        outcomes=np.array(outcomes),
        costs={name: _cost_array(costs, name) for name in COSTS},
        updates=updates,
    )


def _cost_array(costs: Sequence[Sequence[Cost]], name: str) -> Float[np.ndarray, "S P"]:
    rows = [[getattr(cost, name) for cost in of_seed] for of_seed in costs]
    return np.array(rows, dtype=float)  # None becomes NaN


def _checkpoint(row: EpisodeRow) -> str:
    return row.checkpoint


def _evaluation(row: EpisodeRow) -> str:
    return row.evaluation


def _seed(row: EpisodeRow) -> int | None:
    return row.seed


def _common_checkpoints(evaluated: Sequence[dict[str, list[EpisodeRow]]]) -> list[str]:
    """Return the checkpoints that were evaluated with every seed, in order of training."""
    first_seed = evaluated[0]
    common = set(first_seed)
    for of_seed in evaluated:
        common &= of_seed.keys()

    def order(checkpoint: str) -> tuple[int, int]:
        rows = first_seed[checkpoint]
        return rows[0].iterations, rows[0].optimizer_steps

    in_order = [checkpoint for checkpoint in first_seed if checkpoint in common]
    return sorted(in_order, key=order)


def _group(
    rows: Sequence[EpisodeRow], key: Callable[[EpisodeRow], Key | None]
) -> dict[Key, list[EpisodeRow]]:
    """Group rows by their key; rows whose key is None are left out."""
    groups: dict[Key, list[EpisodeRow]] = {}
    for row in rows:
        name = key(row)
        if name is not None:
            group = groups.setdefault(name, [])
            group.append(row)
    return groups


def _outcomes(rows: Sequence[EpisodeRow], episodes: Sequence[Episode]) -> Bool[np.ndarray, " E"]:
    """Return the outcomes in the order of `episodes`. ValueError for other episodes."""
    outcomes: dict[Episode, bool] = {}
    for row in rows:
        outcomes[row.task, row.state] = row.success
    differing = sorted(outcomes.keys() ^ set(episodes))
    if differing:
        first = rows[0]
        task, state = differing[0]
        raise ValueError(
            f"{first.arm or 'shared'}, seed {first.seed}, {first.evaluation}: "
            f"{len(differing)} episodes differ from those of the start, the first of them "
            f"state {state} of {task}; expected every evaluation of a study to have the same"
        )
    return np.array([outcomes[episode] for episode in episodes])
