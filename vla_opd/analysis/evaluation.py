"""Records of evaluated episodes, and success rates with their Wilson intervals."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

EPISODES = "episodes.jsonl"


class Record(BaseModel):
    """One episode.

    steps: the control step of the first success, or the horizon; so a run can be scored at every
    shorter horizon too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    instruction: str
    state: int
    success: bool
    steps: int


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


def read_records(evaluation: Path) -> tuple[Record, ...]:
    """Read the records of an evaluation, in order of task and state."""
    lines = (evaluation / EPISODES).read_text().splitlines()
    return tuple(Record.model_validate_json(line) for line in lines)
