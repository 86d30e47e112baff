"""Labels: the expert's are what it would do there, and a GPU works ahead of the host."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import out_of_tree
from vla_opd.data.trajectory import read_shard, read_states, shards
from vla_opd.params.load import load
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.simulation.labeler import Labeler, Simulation, _one_behind
from vla_opd.simulation.pool import PoolSettings, SimulationStats


@pytest.fixture
def labeler(small: Path) -> Labeler:
    params = load("params.yaml")
    teacher = open_checkpoint(small / "checkpoints/teacher")
    simulation = Simulation(
        params.environment, params.sample.horizon, PoolSettings(), SimulationStats()
    )
    return Labeler(
        params.label,
        load_policy(teacher, "cpu"),
        teacher.facts.action_space,
        small / "trajectories/it001",
        simulation,
    )


def count_steps_to_success(env: out_of_tree.PointMass, hand: np.ndarray, limit: int) -> int:
    """Count the expert's steps from a position of the hand, at most `limit`. Restores the hand."""
    env.hand = hand.astype(np.float64)
    steps = 0
    success = False
    while steps < limit and not success:
        success = env.advance(out_of_tree.expert(env).act()[None], 0).success
        steps += 1
    env.hand = hand.astype(np.float64)
    return steps


def test_the_experts_labels_are_what_it_would_do_there(labeler: Labeler) -> None:
    settings = labeler.settings.model_copy(update={"expert": "tests.out_of_tree:expert"})
    labeler = replace(labeler, settings=settings)
    space = labeler.space
    env = out_of_tree.make(labeler.simulation.environment)
    paths = shards(labeler.trajectories)[:3]
    labels_of = dict(labeler.label([path.name for path in paths]))
    for path in paths:
        states = read_states([path])
        labels = labels_of[path.name]
        assert len(labels.log_probs) == len(states)
        given = labels.restrict(np.ones_like(states.mask)).reshape(-1, space.chunk, 2)
        assert labels.cost.env_steps == given.all(2).sum()
        episode = read_shard(path)[0]
        env.reset(episode.placement)
        for row in range(len(episode.step)):
            hand = states.observations.proprio[row]
            steps = count_steps_to_success(env, hand, space.chunk)
            assert given[row].all(1).sum() == given[row].any(1).sum() == steps
            action = np.tile(out_of_tree.expert(env).act(), (1, space.chunk, 1))
            expected = space.encode(action)[0, :2]
            bins = labels.log_probs[row, :2].argmax(-1)
            # Not equal: the recorded hand is rounded to float32.
            assert np.abs(bins - expected).max() <= 1


def test_the_next_result_is_requested_before_one_is_awaited() -> None:
    events: list[str] = []

    def requests() -> Iterator[int]:
        for number in range(3):
            events.append(f"request {number}")
            yield number

    events.extend(f"await {number}" for number in _one_behind(requests()))
    assert events == [
        "request 0",
        "request 1",
        "await 0",
        "request 2",
        "await 1",
        "await 2",
    ]
    assert list(_one_behind(iter(()))) == []
