"""Scores against Wilson's formula, and the episodes that decide an evaluation."""

from collections.abc import Iterator

import numpy as np
import pytest

from vla_opd.analysis.comparison import SequentialTest
from vla_opd.analysis.evaluation import collect, plan_states, score, score_records
from vla_opd.data.records import Record, State
from vla_opd.params.stages import EvaluateParams


@pytest.mark.parametrize(
    ("successes", "episodes", "confidence", "z"),
    [
        (0, 10, 0.95, 1.959963984540054),
        (7, 10, 0.95, 1.959963984540054),
        (10, 10, 0.95, 1.959963984540054),
        (30, 50, 0.99, 2.5758293035489004),
    ],
)
def test_intervals_are_wilsons(successes: int, episodes: int, confidence: float, z: float) -> None:
    p = successes / episodes
    centre = (p + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = z / (1 + z**2 / episodes) * np.sqrt(p * (1 - p) / episodes + z**2 / (4 * episodes**2))
    result = score([True] * successes + [False] * (episodes - successes), confidence)
    assert (result.success, result.episodes) == (p, episodes)
    assert result.low == pytest.approx(centre - half, abs=1e-9)
    assert result.high == pytest.approx(centre + half, abs=1e-9)


def test_no_episodes_have_no_score() -> None:
    with pytest.raises(ValueError, match="expected at least one episode"):
        score([], 0.95)


def play(*states: State) -> Iterator[Record]:
    """Yield a success from each state."""
    for task, number in states:
        yield Record(task=task, instruction="", state=number, success=True, steps=7)


def test_the_first_planned_episodes_decide() -> None:
    """Whichever finished first, so the decision does not depend on the number of workers."""
    settings = EvaluateParams(episodes=30, decide=(0.5, 0.95))
    planned = plan_states(settings, ("a", "b"))
    assert planned[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    _, count = SequentialTest(0.5, 0.95).decide([True] * 60)
    assert count == 5
    deciding = list(play(*planned[:count]))
    assert collect(play(*planned), planned, settings) == (deciding, 0.95)
    second_is_late = play(planned[0], *planned[2:], planned[1])
    assert collect(second_is_late, planned, settings) == (deciding, 0.95)
    too_few = planned[: count - 1]
    assert collect(play(*too_few), too_few, settings) == (deciding[:-1], None)


def test_no_episode_is_played_after_the_decision() -> None:
    settings = EvaluateParams(episodes=30, decide=(0.5, 0.95))
    planned = plan_states(settings, ("a", "b"))
    played = play(*planned)
    collect(played, planned, settings)
    assert len(list(played)) == 60 - 5


def test_without_rates_to_decide_between_all_episodes_are_played() -> None:
    settings = EvaluateParams(episodes=3)
    planned = plan_states(settings, ("a", "b"))
    assert planned == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    in_order = list(play(*planned))
    assert collect(play(*planned[::-1]), planned, settings) == (in_order, None)


def test_unseen_tasks_have_a_score_of_their_own() -> None:
    settings = EvaluateParams(episodes=2, unseen=("c",))
    records = [*play(("a", 0), ("a", 1), ("b", 0)), next(play(("c", 0)))]
    records[0] = records[0].model_copy(update={"success": False})
    facts = score_records(records, settings, ("a", "b"))
    assert facts["overall"] == score([False, True, True], 0.95).model_dump()
    assert facts["unseen"] == score([True], 0.95).model_dump()
    assert list(facts["tasks"]) == ["a", "b", "c"]
    assert facts["env_steps"] == 4 * 7
    assert "unseen" not in score_records(records, EvaluateParams(), ("a", "b"))
