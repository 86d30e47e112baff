"""The scripted expert in LIBERO, judged by the benchmark's own predicate."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vla_opd.envs import Env, Placement, make_env
from vla_opd.experts import make_expert
from vla_opd.experts.libero import expert
from vla_opd.experts.libero.scene import Scene
from vla_opd.params.stages import EnvironmentParams

pytestmark = pytest.mark.simulator

TASKS = (
    "libero_object/3",
    "libero_spatial/0",
    "libero_goal/5",
    "libero_goal/6",
    "libero_goal/3",
    "libero_goal/7",
)
BOWLS = ("libero_spatial/1", "libero_spatial/2")


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    env = make_env(EnvironmentParams(tasks=(*TASKS, *BOWLS), stepping="fast"))
    yield env
    env.close()


def solve(env: Env, placement: Placement, noise: float = 0.0) -> tuple[bool, np.ndarray]:
    """Play an episode; return success and the expert's actions (before noise)."""
    env.reset(placement)
    scripted = make_expert("libero", env)
    scripted.reset()
    generator = np.random.default_rng(placement.index)
    actions: list[np.ndarray] = []
    for _ in range(200):
        action = scripted.act()
        actions.append(action)
        executed = action.copy()
        if noise:
            executed[:3] += generator.normal(0, noise, 3).astype(np.float32)
        clipped = np.clip(executed, -1, 1)
        if env.advance(clipped[None], observe_every=0).success:
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
    _, repeated = solve(env, Placement(task, "evaluation", 0))
    np.testing.assert_array_equal(actions, repeated)


def test_expert_corrects_what_was_executed_instead(env: Env) -> None:
    success, _ = solve(env, Placement(TASKS[0], "training", 1), noise=0.15)
    assert success


@pytest.mark.parametrize(
    "placement",
    [Placement("libero_goal/5", "evaluation", 4), Placement("libero_goal/6", "evaluation", 3)],
)
def test_thin_rims_and_narrow_gaps_are_grasped(env: Env, placement: Placement) -> None:
    success, actions = solve(env, placement)
    assert success
    assert len(actions) < 130


@pytest.mark.parametrize(
    "placement",
    [
        Placement("libero_spatial/0", "training", 101),
        Placement("libero_spatial/1", "training", 104),
    ],
)
def test_a_load_that_tilts_the_hand_is_released_before_the_arm_stands_still(
    env: Env, placement: Placement
) -> None:
    env.reset(placement)
    scripted = expert.make(env)  # pyright: ignore[reportArgumentType]
    scripted.reset()
    phases: list[str] = []
    while not env.advance(scripted.act()[None], observe_every=0).success:
        phases.append(scripted.phase)
        assert len(phases) < 100
    assert 1 <= phases.count("lower") <= 5  # an expert that waits takes 13 or 14


def test_a_bowl_comes_to_rest_where_only_the_corners_of_its_rectangle_would_meet_another(
    env: Env,
) -> None:
    placement = Placement("libero_spatial/2", "evaluation", 0)
    env.reset(placement)
    scene = Scene(env)  # pyright: ignore[reportArgumentType]
    (goal,) = scene.goals()
    place = expert.find_resting_place(scene, goal)
    assert place is not None
    table = scene.floor(scene.lowest(goal.item))
    assert 0 < place.height - table < 0.03  # on the plate; the other bowl's rim is 3 cm higher
    success, _ = solve(env, placement)
    assert success


def test_a_bowl_is_grasped_by_the_same_side_wherever_it_stands(env: Env) -> None:
    sides = []
    for task in BOWLS:
        for index in range(6):
            env.reset(Placement(task, "training", index))
            scene = Scene(env)  # pyright: ignore[reportArgumentType]
            (goal,) = scene.goals()
            plan = expert.make_plan(scene, goal, ())
            assert plan is not None
            offset = plan.grasp.position - scene.origin(goal.item)
            sides.append(np.sign(offset[1]))
    assert set(sides) == {1.0}


def test_expert_plans_again_without_a_grasp(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan = expert.make_plan
    failures = [None, None]

    def fail_twice(*arguments: Any) -> expert.Plan | None:
        return failures.pop() if failures else make_plan(*arguments)

    monkeypatch.setattr(expert, "make_plan", fail_twice)
    success, actions = solve(env, Placement(TASKS[0], "evaluation", 0))
    assert success
    assert not actions[: 2 * expert.PATIENCE, :6].any()


@pytest.mark.parametrize("task", TASKS[4:])
def test_tasks_beyond_pick_and_place_are_refused(env: Env, task: str) -> None:
    env.reset(Placement(task, "evaluation", 0))
    with pytest.raises(ValueError, match="the scripted expert for LIBERO only"):
        make_expert("libero", env).reset()
