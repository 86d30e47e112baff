"""Success rates of evaluations with Wilson intervals, and when an evaluation has decided."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
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
    outcomes: dict[str, list[bool]] = {}
    steps = 0
    for record in records:
        outcomes.setdefault(record.task, []).append(record.success)
        steps += record.steps

    def success(tasks: Sequence[str]) -> dict[str, float]:
        of_tasks = [outcome for task in tasks for outcome in outcomes.get(task, ())]
        return score(of_tasks, settings.confidence).model_dump()

    facts: dict[str, Any] = {
        "overall": success(trained),
        "tasks": {task: success([task]) for task in outcomes},
        "env_steps": steps,
        "horizon": settings.horizon,
    }
    if settings.unseen:
        facts["unseen"] = success(settings.unseen)
    return facts


def plan_states(settings: EvaluateParams, tasks: Sequence[str]) -> list[State]:
    """Return the states to play, task after task.

    For a decision, state after state, so that every task contributes early.
    """
    numbers = range(settings.first_state, settings.first_state + settings.episodes)
    if settings.decide:
        return [(task, number) for number in numbers for task in tasks]
    return [(task, number) for task in tasks for number in numbers]


def collect(
    played: Iterable[Record], planned: Sequence[State], settings: EvaluateParams
) -> tuple[list[Record], float | None]:
    """Return the records in planned order, or those up to a decision and the rate decided for.

    No more episodes are taken than the decision needs. The first planned ones decide, whichever
    are played first, so the result does not depend on the number of workers.
    """
    test = None
    if settings.decide:
        test = SequentialTest(*settings.decide, settings.confidence)
    records: dict[State, Record] = {}
    for record in played:
        records[record.task, record.state] = record
        if test is not None:
            first = [records[state] for state in takewhile(records.__contains__, planned)]
            rate, count = test.decide(record.success for record in first)
            if rate is not None:
                return first[:count], rate
    return [records[state] for state in planned], None
