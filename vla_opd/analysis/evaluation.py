"""Evaluations: a record an episode, and a success rate with its interval. Everything else that is said of an evaluation follows from its records."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest

EPISODES = "episodes.jsonl"


class Record(BaseModel):
    """One episode: `steps` is the control step of the first success, or the horizon: so one run can be scored at every shorter horizon."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    instruction: str
    state: int
    success: bool
    steps: int


class Score(BaseModel):
    """A fraction of successes with its Wilson score interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    success: float
    low: float
    high: float
    episodes: int


def score(outcomes: Iterable[bool], confidence: float) -> Score:
    """The fraction of true outcomes, and the Wilson score interval of that confidence. ValueError if there are none."""
    seen = list(outcomes)
    if not seen:
        raise ValueError("outcomes: none; expected at least one episode")
    interval = binomtest(sum(seen), len(seen)).proportion_ci(confidence, method="wilson")
    return Score(
        success=sum(seen) / len(seen),
        low=float(interval.low),
        high=float(interval.high),
        episodes=len(seen),
    )


def read_records(evaluation: Path) -> tuple[Record, ...]:
    """The records of an evaluation, in order of task and state."""
    return tuple(
        Record.model_validate_json(line)
        for line in (evaluation / EPISODES).read_text().splitlines()
    )
