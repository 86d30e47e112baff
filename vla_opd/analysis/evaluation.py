"""Success rates of evaluations with Wilson intervals, and when an evaluation has decided."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.comparison import SequentialTest
from vla_opd.data.records import Record, State
from vla_opd.params.stages import EvaluateParams


class Score(BaseModel):
    """A success rate with its Wilson score interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    success: float
    low: float
    high: float
    episodes: int


def score(outcomes: Iterable[bool], confidence: float) -> Score:
    """Return the fraction of true outcomes, with the Wilson score interval of that confidence.

    ValueError if there are no outcomes.
    """
    from scipy.stats import binomtest  # takes a second to import, which `opd` can do without

    episodes = list(outcomes)
    if not episodes:
        raise ValueError("outcomes: none; expected at least one episode")
    successes = sum(episodes)
    test = binomtest(successes, len(episodes))
    interval = test.proportion_ci(confidence, method="wilson")
    return Score(
        success=successes / len(episodes),
        low=float(interval.low),
        high=float(interval.high),
        episodes=len(episodes),
    )


def score_records(
    records: Iterable[Record], settings: EvaluateParams, trained: Sequence[str]
) -> dict[str, Any]:
    """Return the success per task, overall, and on the unseen tasks.

    trained: the tasks that the run trains on, which are those that count overall.
    """
    played = list(records)

    def success(tasks: Sequence[str]) -> dict[str, float]:
        outcomes = [record.success for record in played if record.task in tasks]
        return score(outcomes, settings.confidence).model_dump()

    by_task: dict[str, dict[str, float]] = {}
    for record in played:
        if record.task not in by_task:
            by_task[record.task] = success([record.task])
    facts: dict[str, Any] = {
        "overall": success(trained),
        "tasks": by_task,
        "env_steps": sum(record.steps for record in played),
        "horizon": settings.horizon,
    }
    if settings.unseen:
        facts["unseen"] = success(settings.unseen)
    return facts


def plan_states(settings: EvaluateParams, tasks: Sequence[str]) -> list[State]:
    """Return the states to play, task after task.

    For a decision, state after state, so that every task contributes early.
    """
    stop = settings.first_state + settings.episodes
    numbers = range(settings.first_state, stop)
    if settings.decide:
        return [(task, number) for number, task in product(numbers, tasks)]
    return list(product(tasks, numbers))


def collect(
    played: Iterable[Record], planned: Sequence[State], settings: EvaluateParams
) -> tuple[list[Record], float | None]:
    """Return the records in planned order, or those up to a decision and the rate decided for.

    No more episodes are taken than the decision needs. The first planned ones decide, whichever
    are played first, so the result does not depend on the number of workers.
    """
    test = None
    if settings.decide:
        low, high = settings.decide
        test = SequentialTest(low, high, settings.confidence)
    records: dict[State, Record] = {}
    for record in played:
        state = (record.task, record.state)
        records[state] = record
        if test:
            first = _first_planned(records, planned)
            rate, count = test.decide(record.success for record in first)
            if rate is not None:
                return first[:count], rate
    return [records[state] for state in planned], None


def _first_planned(records: Mapping[State, Record], planned: Iterable[State]) -> list[Record]:
    """Return the planned records in order, up to the first one that is missing."""
    first: list[Record] = []
    for state in planned:
        if state not in records:
            break
        first.append(records[state])
    return first
