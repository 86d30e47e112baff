"""LIBERO against the stock environment: the same bits where `exact` promises them, close enough where `fast` does."""

# ruff: noqa: NPY002 (robosuite draws from numpy's global generator, and these tests look after it)

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float32, Float64

from vla_opd.envs.libero.env import LiberoEnv, make, suites, task_names
from vla_opd.envs.libero.tasks import find_task
from vla_opd.envs.protocol import Observation, Placement
from vla_opd.params.stages import EnvironmentParams

CAMERAS = ("agentview", "robot0_eye_in_hand")
STEPS = 24
CHUNK = 8
BOWL, DRAWER = "libero_spatial/0", "libero_goal/3"

simulator = pytest.mark.simulator


def _actions(steps: int = STEPS, seed: int = 0) -> Float32[np.ndarray, "S 7"]:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


def _params(**changes: Any) -> EnvironmentParams:
    return EnvironmentParams(
        **{"family": "libero", "tasks": (BOWL, DRAWER), "cameras": CAMERAS, **changes}
    )


def _state(model: Any, data: Any) -> Float64[np.ndarray, "D"]:
    """Everything that the next step depends on, and what resets and stoves change in the model."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return np.concatenate(
        [state, model.body_pos.ravel(), model.body_quat.ravel(), model.site_rgba.ravel()]
    )


def _episode(
    env: LiberoEnv, placement: Placement
) -> tuple[list[Observation], list[Float64[np.ndarray, "D"]]]:
    """What is seen at decisions, and the states there."""
    seen = [env.reset(placement)]
    states = [_state(env.model, env.data)]
    for start in range(0, STEPS, CHUNK):
        seen += env.advance(_actions()[start : start + CHUNK], CHUNK).observations
        states.append(_state(env.model, env.data))
    return seen, states


def _disturb(env: LiberoEnv) -> None:
    """Other episodes in the same process, of this task and of another, left in the middle with a closed gripper."""
    closed = np.tile(np.array([0.5, 0.5, -0.5, 0.2, 0, 0, 1], dtype=np.float32), (7, 1))
    for task in (DRAWER, BOWL):
        env.reset(Placement(task, "training", 99))
        env.advance(closed, 3)


def _stock_episode(placement: Placement) -> tuple[list[Any], list[Float64[np.ndarray, "D"]]]:
    """The stock environment, rendering every step; kept at decisions."""
    from libero.libero.envs import OffScreenRenderEnv

    task = find_task(placement.task)
    noise = {"initialization_noise": None if placement.split == "evaluation" else "default"}
    env = OffScreenRenderEnv(
        bddl_file_name=str(task.bddl),
        camera_names=list(CAMERAS),
        camera_heights=128,
        camera_widths=128,
        **noise,
    )
    env.seed(placement.seed)
    seen = env.env.reset()
    if placement.split == "evaluation":
        seen = env.set_init_state(task.initial_states()[placement.index])
    model, data = env.sim.model._model, env.sim.data._data
    for _ in range(10):
        seen = env.step([0, 0, 0, 0, 0, 0, -1])[0]
    kept, states = [seen], [_state(model, data)]
    for step, action in enumerate(_actions().astype(np.float64), start=1):
        seen = env.step(action)[0]
        if step % CHUNK == 0:
            kept.append(seen)
            states.append(_state(model, data))
    env.close()
    return kept, states


@pytest.fixture(scope="module")
def exact() -> Iterator[LiberoEnv]:
    env = make(_params(stepping="exact", render="exact"))
    yield env
    env.close()


@pytest.fixture(scope="module")
def fast() -> Iterator[LiberoEnv]:
    env = make(_params(stepping="fast", render="fast"))
    yield env
    env.close()


@simulator
@pytest.mark.slow
@pytest.mark.timeout(900)  # the stock environment renders every step
@pytest.mark.parametrize(
    "placement", [Placement(BOWL, "evaluation", 3), Placement(DRAWER, "training", 1)]
)
def test_exact_is_the_stock_environment_bit_for_bit(exact: LiberoEnv, placement: Placement) -> None:
    _disturb(exact)
    seen, states = _episode(exact, placement)
    stock, stock_states = _stock_episode(placement)

    from robosuite.utils.transform_utils import quat2axisangle

    for mine, theirs in zip(seen, stock, strict=True):
        assert np.array_equal(
            mine.frames, np.stack([theirs[f"{camera}_image"][::-1] for camera in CAMERAS])
        )
        turn = quat2axisangle(theirs["robot0_eef_quat"].copy())
        proprio = np.concatenate([theirs["robot0_eef_pos"], turn, theirs["robot0_gripper_qpos"]])
        assert np.array_equal(mine.proprio, proprio.astype(np.float32))
    assert all(
        np.array_equal(mine, theirs) for mine, theirs in zip(states, stock_states, strict=True)
    )


@simulator
def test_an_episode_is_the_same_after_others(fast: LiberoEnv) -> None:
    placement = Placement(BOWL, "training", 7)
    first, states = _episode(fast, placement)
    _disturb(fast)
    again, states_again = _episode(fast, placement)
    assert all(np.array_equal(a, b) for a, b in zip(states, states_again, strict=True))
    assert all(
        np.array_equal(a.frames, b.frames) and np.array_equal(a.proprio, b.proprio)
        for a, b in zip(first, again, strict=True)
    )


@simulator
def test_an_episode_is_the_same_in_a_fresh_process(fast: LiberoEnv) -> None:
    placement = Placement(BOWL, "evaluation", 4)
    _disturb(fast)
    seen, states = _episode(fast, placement)
    script = (
        "import sys, hashlib, numpy as np\n"
        "from tests.vla_opd.envs import test_libero as t\n"
        "env = t.make(t._params(stepping='fast', render='fast'))\n"
        f"seen, states = t._episode(env, t.Placement({placement.task!r}, {placement.split!r}, {placement.index}))\n"
        "print(t._digest(seen, states)); env.close()\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == _digest(seen, states)
    assert child.stderr == ""


def _digest(seen: list[Observation], states: list[Float64[np.ndarray, "D"]]) -> str:
    import hashlib

    total = hashlib.sha256()
    for observation, state in zip(seen, states, strict=True):
        total.update(observation.frames.tobytes() + observation.proprio.tobytes() + state.tobytes())
    return total.hexdigest()


@simulator
def test_fast_stepping_follows_exact_stepping_over_a_chunk(fast: LiberoEnv) -> None:
    same_pictures = make(_params(stepping="exact", render="fast"))
    for placement in (Placement(BOWL, "evaluation", 0), Placement(DRAWER, "training", 2)):
        for env in (fast, same_pictures):
            env.reset(placement)
            env.advance(_actions(CHUNK), 0)
        difference = np.abs(fast.data.qpos - same_pictures.data.qpos)
        assert difference[:7].max() < 1e-9, "the arm"
        assert difference.max() < 1e-5, "objects in contact"
    same_pictures.close()


@simulator
@pytest.mark.slow
def test_the_slim_model_has_the_same_physics(exact: LiberoEnv) -> None:
    slim = make(_params(stepping="exact", render="fast"))
    placement = Placement(BOWL, "evaluation", 1)
    seen, states = _episode(slim, placement)
    stock, stock_states = _episode(exact, placement)
    assert all(np.array_equal(a, b) for a, b in zip(states, stock_states, strict=True))
    assert slim.model.nbuffer < exact.model.nbuffer / 5
    for mine, theirs in zip(seen, stock, strict=True):
        difference = np.abs(mine.frames.astype(float) - theirs.frames)
        assert 0 < difference.mean() < 20
        assert all(
            np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9
            for a, b in zip(mine.frames, theirs.frames, strict=True)
        )
    slim.close()


@simulator
def test_frames_and_instruction(fast: LiberoEnv) -> None:
    seen = fast.reset(Placement(BOWL, "evaluation", 0))
    assert (seen.frames.shape, seen.frames.dtype) == ((2, 128, 128, 3), np.uint8)
    assert seen.frames.flags.c_contiguous
    assert (
        seen.instruction
        == "pick the akita black bowl between the plate and the ramekin and place it on the plate"
    )
    assert (seen.proprio.shape, seen.proprio.dtype) == ((8,), np.float32)
    assert seen.proprio[3] == pytest.approx(np.pi, abs=0.01), (
        "the hand points down: half a turn about x"
    )
    agentview = seen.frames[0].astype(float).mean(axis=2)
    assert agentview[:30].mean() < agentview[-30:].mean() - 10, (
        "upright: the grey wall above, the light table below"
    )


@simulator
def test_training_placements_are_never_the_fixed_states(fast: LiberoEnv) -> None:
    fixed = find_task(BOWL).initial_states()[:, 1:]
    placed = []
    for index in range(3):
        fast.problem.restart(Placement(BOWL, "training", index).seed, None)
        placed.append(fast.data.qpos.copy())
    assert all(np.abs(fixed[:, : len(qpos)] - qpos).max(axis=1).min() > 1e-4 for qpos in placed)
    assert np.abs(placed[0] - placed[1]).max() > 1e-3


@simulator
def test_the_arm_starts_as_scattered_as_in_the_fixed_states(fast: LiberoEnv) -> None:
    """A policy that has only seen the arm at rest is worse on the benchmark's states than where it was trained."""
    fixed = find_task(BOWL).initial_states()[:, 1:8]
    placed = []
    for index in range(50):
        fast.problem.restart(Placement(BOWL, "training", index).seed, None)
        placed.append(fast.data.qpos[:7].copy())
    assert np.std(placed, axis=0) == pytest.approx(fixed.std(axis=0), rel=0.5)
    assert np.mean(placed, axis=0) == pytest.approx(fixed.mean(axis=0), abs=0.01)


@simulator
def test_the_callers_random_numbers_are_left_alone(fast: LiberoEnv) -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    fast.reset(Placement(BOWL, "training", 0))
    assert np.random.rand() == expected


@simulator
def test_mistakes_are_named(fast: LiberoEnv) -> None:
    with pytest.raises(
        ValueError,
        match=r"environment.tasks has 'libero_object/10'; expected libero_object/0 ... libero_object/9",
    ):
        make(_params(tasks=("libero_object/10",)))
    with pytest.raises(ValueError, match="no suite 'libero_nine'"):
        fast.reset(Placement("libero_nine/0", "training", 0))
    with pytest.raises(
        ValueError, match=r"placement.index is 50; libero_spatial/0 has initial states 0 ... 49"
    ):
        fast.reset(Placement(BOWL, "evaluation", 50))
    fast.reset(Placement(BOWL, "evaluation", 0))
    with pytest.raises(ValueError, match=r"actions has shape \(2, 6\)"):
        fast.advance(np.zeros((2, 6), np.float32), 0)
    with pytest.raises(ValueError, match="not finite"):
        fast.advance(np.full((1, 7), np.nan, np.float32), 0)


@simulator
def test_an_unknown_camera_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"environment.cameras has 'sideview2'; expected some of agentview"
    ):
        make(_params(cameras=("sideview2",)))


@simulator
def test_describe_tells_versions_and_choices(fast: LiberoEnv) -> None:
    facts = fast.describe()
    assert facts["mujoco"] == "3.3.0"
    assert facts["robosuite"] == "1.4.0"
    assert (facts["stepping"], facts["render"]) == ("fast", "fast")
    assert facts["graphics"] in {"egl", "osmesa"}


@simulator
def test_catalogue() -> None:
    assert len(task_names("libero_90")) == 90
    assert {
        "libero_spatial",
        "libero_object",
        "libero_goal",
        "libero_10",
        "libero_object_swap",
    } <= set(suites())
    assert (
        find_task("libero_object/0").instruction()
        == "pick the alphabet soup and place it in the basket"
    )


@simulator
def test_the_benchmarks_wording_is_its_own() -> None:
    from libero.libero.benchmark import (
        grab_language_from_filename,
    )  # imports far more than one function

    for name in (
        *task_names("libero_object"),
        *task_names("libero_goal"),
        *task_names("libero_10"),
        *task_names("libero_90"),
    ):
        task = find_task(name)
        assert task.instruction("benchmark") == grab_language_from_filename(task.bddl.name)
    assert (
        find_task("libero_object/0").instruction("benchmark")
        == "pick up the alphabet soup and place it in the basket"
    )
    for other in (
        "libero_object_task/0",
        "libero_goal_lan/0",
        "libero_study_table/0",
    ):  # whose files are called otherwise
        with pytest.raises(
            ValueError,
            match=rf"environment\.wording is benchmark, and a task is {other}; expected bddl, or tasks of libero_spatial",
        ):
            find_task(other).instruction("benchmark")
    env = make(_params(tasks=(BOWL,), wording="benchmark"))
    try:
        seen = env.reset(Placement(BOWL, "training", 0))
    finally:
        env.close()
    assert (
        seen.instruction
        == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    )
    assert find_task("libero_object/0").initial_states().shape[0] == 50


def test_importing_starts_nothing() -> None:
    script = (
        "import os, sys, json\nbefore = dict(os.environ)\nimport vla_opd.envs.libero\n"
        "heavy = [name for name in ('mujoco', 'robosuite', 'libero', 'torch', 'OpenGL') if name in sys.modules]\n"
        "print(json.dumps([heavy, dict(os.environ) == before]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(child.stdout) == [[], True]


@simulator
def test_a_simulator_writes_nothing_at_home_and_says_nothing(tmp_path: Path) -> None:
    script = "from tests.vla_opd.envs import test_libero as t; t.make(t._params()).close()"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))
    } | {"HOME": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert (child.stdout, child.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
