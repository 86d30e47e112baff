"""The scripted expert in LIBERO itself, by the benchmark's own predicate."""

from collections.abc import Iterator

import numpy as np
import pytest

from vla_opd.envs import Env, Placement, make_env
from vla_opd.experts import libero, make_expert
from vla_opd.params import EnvironmentParams

pytestmark = pytest.mark.simulator

TASKS = ("libero_object/3", "libero_spatial/0", "libero_goal/5", "libero_goal/6", "libero_goal/3", "libero_goal/7")


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    env = make_env(EnvironmentParams(tasks=TASKS, stepping="fast"))
    yield env
    env.close()


def solve(env: Env, placement: Placement, noise: float = 0.0) -> tuple[bool, np.ndarray]:
    """Whether the expert solves an episode, and the actions that it wanted."""
    env.reset(placement)
    expert = make_expert("libero", env)
    expert.reset()
    rng = np.random.default_rng(placement.index)
    actions: list[np.ndarray] = []
    for _ in range(200):
        action = expert.act()
        actions.append(action)
        executed = action + np.append(rng.normal(0, noise, 3), np.zeros(4)).astype(np.float32) if noise else action
        if env.advance(np.clip(executed, -1, 1)[None], observe_every=0).success:
            return True, np.array(actions)
    return False, np.array(actions)


@pytest.mark.parametrize("task", TASKS[:2])
def test_expert_solves_a_task_quickly_and_repeatably(env: Env, task: str) -> None:
    success, actions = solve(env, Placement(task, "evaluation", 0))
    assert success
    assert len(actions) < 130
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    assert set(actions[:, 6]) <= {-1.0, 1.0}
    _, again = solve(env, Placement(task, "evaluation", 0))
    np.testing.assert_array_equal(actions, again)


def test_expert_corrects_what_was_executed_instead(env: Env) -> None:
    success, _ = solve(env, Placement(TASKS[0], "training", 1), noise=0.15)
    assert success


@pytest.mark.parametrize("placement", [Placement("libero_goal/5", "evaluation", 4), Placement("libero_goal/6", "evaluation", 3)])
def test_thin_rims_and_narrow_gaps_are_grasped(env: Env, placement: Placement) -> None:
    success, actions = solve(env, placement)
    assert success
    assert len(actions) < 130


def test_expert_looks_again_where_it_found_no_grasp(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan, refused = libero.make_plan, [True, True]
    monkeypatch.setattr(libero, "make_plan", lambda *scene: None if refused and refused.pop() else make_plan(*scene))
    success, actions = solve(env, Placement(TASKS[0], "evaluation", 0))
    assert success
    assert not actions[: 2 * libero.PATIENCE, :6].any()


@pytest.mark.parametrize("task", TASKS[4:])
def test_tasks_beyond_pick_and_place_are_refused(env: Env, task: str) -> None:
    env.reset(Placement(task, "evaluation", 0))
    with pytest.raises(ValueError, match="the scripted expert for LIBERO only"):
        make_expert("libero", env).reset()
