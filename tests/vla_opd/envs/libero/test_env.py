"""LIBERO against the stock environment: `exact` has the same bits, `fast` is close."""

# ruff: noqa: NPY002 (robosuite draws from numpy's global generator, which these tests check)

import hashlib
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
BOWL = "libero_spatial/0"
DRAWER = "libero_goal/3"
MODULE = "tests.vla_opd.envs.libero.test_env"

simulator = pytest.mark.simulator


def _actions(steps: int = STEPS, seed: int = 0) -> Float32[np.ndarray, "S 7"]:
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, (steps, 7)).astype(np.float32)


def _params(**changes: Any) -> EnvironmentParams:
    settings = {"family": "libero", "tasks": (BOWL, DRAWER), "cameras": CAMERAS, **changes}
    return EnvironmentParams(**settings)


def _state(model: Any, data: Any) -> Float64[np.ndarray, "D"]:
    """Return all that the next step depends on, and what resets and stoves change in the model."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return np.concatenate(
        [
            state,
            model.body_pos.ravel(),
            model.body_quat.ravel(),
            model.site_rgba.ravel(),
        ]
    )


def _episode(
    env: LiberoEnv, placement: Placement
) -> tuple[list[Observation], list[Float64[np.ndarray, "D"]]]:
    """Return the observations at decisions, and the states there."""
    observations = [env.reset(placement)]
    states = [_state(env.model, env.data)]
    for start in range(0, STEPS, CHUNK):
        actions = _actions()[start : start + CHUNK]
        observations += env.advance(actions, CHUNK).observations
        states.append(_state(env.model, env.data))
    return observations, states


def _disturb(env: LiberoEnv) -> None:
    """Play other episodes of this task and of another; stop with a closed gripper."""
    closed = np.tile(np.array([0.5, 0.5, -0.5, 0.2, 0, 0, 1], dtype=np.float32), (7, 1))
    for task in (DRAWER, BOWL):
        env.reset(Placement(task, "training", 99))
        env.advance(closed, 3)


def _stock_episode(placement: Placement) -> tuple[list[Any], list[Float64[np.ndarray, "D"]]]:
    """Play in the stock environment, which renders every step; keep the decisions."""
    from libero.libero.envs import OffScreenRenderEnv

    task = find_task(placement.task)
    is_fixed = placement.split == "evaluation"
    env = OffScreenRenderEnv(
        bddl_file_name=str(task.bddl),
        camera_names=list(CAMERAS),
        camera_heights=128,
        camera_widths=128,
        initialization_noise=None if is_fixed else "default",
    )
    env.seed(placement.seed)
    observation = env.env.reset()
    if is_fixed:
        observation = env.set_init_state(task.initial_states()[placement.index])
    model = env.sim.model._model
    data = env.sim.data._data
    for _ in range(10):
        observation = env.step([0, 0, 0, 0, 0, 0, -1])[0]
    observations = [observation]
    states = [_state(model, data)]
    for step, action in enumerate(_actions().astype(np.float64), start=1):
        observation = env.step(action)[0]
        if step % CHUNK == 0:
            observations.append(observation)
            states.append(_state(model, data))
    env.close()
    return observations, states


def _digest(observations: list[Observation], states: list[Float64[np.ndarray, "D"]]) -> str:
    total = hashlib.sha256()
    for observation, state in zip(observations, states, strict=True):
        total.update(observation.frames.tobytes())
        total.update(observation.proprio.tobytes())
        total.update(state.tobytes())
    return total.hexdigest()


def _stock_proprio(observation: Any) -> Float32[np.ndarray, "8"]:
    from robosuite.utils.transform_utils import quat2axisangle

    position = observation["robot0_eef_pos"]
    orientation = quat2axisangle(observation["robot0_eef_quat"].copy())
    fingers = observation["robot0_gripper_qpos"]
    return np.concatenate([position, orientation, fingers]).astype(np.float32)


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
    observations, states = _episode(exact, placement)
    stock, stock_states = _stock_episode(placement)
    for observation, expected in zip(observations, stock, strict=True):
        frames = np.stack([expected[f"{camera}_image"][::-1] for camera in CAMERAS])
        assert np.array_equal(observation.frames, frames)
        assert np.array_equal(observation.proprio, _stock_proprio(expected))
    for state, stock_state in zip(states, stock_states, strict=True):
        assert np.array_equal(state, stock_state)


@simulator
def test_an_episode_is_the_same_after_others(fast: LiberoEnv) -> None:
    placement = Placement(BOWL, "training", 7)
    first, first_states = _episode(fast, placement)
    _disturb(fast)
    second, second_states = _episode(fast, placement)
    assert _digest(first, first_states) == _digest(second, second_states)


@simulator
def test_an_episode_is_the_same_in_a_fresh_process(fast: LiberoEnv) -> None:
    placement = Placement(BOWL, "evaluation", 4)
    _disturb(fast)
    observations, states = _episode(fast, placement)
    script = (
        f"from {MODULE} import Placement, _digest, _episode, _params, make\n"
        "env = make(_params(stepping='fast', render='fast'))\n"
        f"print(_digest(*_episode(env, {placement!r})))\n"
        "env.close()\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == _digest(observations, states)
    assert child.stderr == ""


@simulator
def test_fast_stepping_follows_exact_stepping_over_a_chunk(fast: LiberoEnv) -> None:
    exact_stepping = make(_params(stepping="exact", render="fast"))
    for placement in (Placement(BOWL, "evaluation", 0), Placement(DRAWER, "training", 2)):
        for env in (fast, exact_stepping):
            env.reset(placement)
            env.advance(_actions(CHUNK), 0)
        difference = np.abs(fast.data.qpos - exact_stepping.data.qpos)
        assert difference[:7].max() < 1e-9, "the arm differs"
        assert difference.max() < 1e-5, "objects in contact differ"
    exact_stepping.close()


@simulator
@pytest.mark.slow
def test_the_slim_model_has_the_same_physics(exact: LiberoEnv) -> None:
    slim = make(_params(stepping="exact", render="fast"))
    placement = Placement(BOWL, "evaluation", 1)
    observations, states = _episode(slim, placement)
    stock, stock_states = _episode(exact, placement)
    for state, stock_state in zip(states, stock_states, strict=True):
        assert np.array_equal(state, stock_state)
    assert slim.model.nbuffer < exact.model.nbuffer / 5
    for observation, expected in zip(observations, stock, strict=True):
        difference = np.abs(observation.frames.astype(float) - expected.frames)
        assert 0 < difference.mean() < 20
        for frame, stock_frame in zip(observation.frames, expected.frames, strict=True):
            correlation = np.corrcoef(frame.ravel(), stock_frame.ravel())[0, 1]
            assert correlation > 0.9
    slim.close()


@simulator
def test_frames_and_instruction(fast: LiberoEnv) -> None:
    observation = fast.reset(Placement(BOWL, "evaluation", 0))
    frames = observation.frames
    proprio = observation.proprio
    assert frames.shape == (2, 128, 128, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert (
        observation.instruction
        == "pick the akita black bowl between the plate and the ramekin and place it on the plate"
    )
    assert proprio.shape == (8,)
    assert proprio.dtype == np.float32
    # The hand points down: half a turn about x.
    assert proprio[3] == pytest.approx(np.pi, abs=0.01)
    # The image is upright: the grey wall above, the light table below.
    rows = frames[0].astype(float).mean(axis=(1, 2))
    assert rows[:30].mean() < rows[-30:].mean() - 10


@simulator
def test_training_placements_are_never_the_fixed_states(fast: LiberoEnv) -> None:
    fixed = find_task(BOWL).initial_states()[:, 1:]
    positions = []
    for index in range(3):
        fast.problem.restart(Placement(BOWL, "training", index).seed, None)
        qpos = fast.data.qpos.copy()
        differences = np.abs(fixed[:, : len(qpos)] - qpos).max(axis=1)
        assert differences.min() > 1e-4
        positions.append(qpos)
    assert np.abs(positions[0] - positions[1]).max() > 1e-3


@simulator
def test_the_arm_starts_as_scattered_as_in_the_fixed_states(fast: LiberoEnv) -> None:
    """A policy trained only with the arm at rest is worse on the benchmark's states."""
    fixed = find_task(BOWL).initial_states()[:, 1:8]
    arms = []
    for index in range(50):
        fast.problem.restart(Placement(BOWL, "training", index).seed, None)
        arms.append(fast.data.qpos[:7].copy())
    assert np.std(arms, axis=0) == pytest.approx(fixed.std(axis=0), rel=0.5)
    assert np.mean(arms, axis=0) == pytest.approx(fixed.mean(axis=0), abs=0.01)


@simulator
def test_the_callers_random_numbers_are_unchanged(fast: LiberoEnv) -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    fast.reset(Placement(BOWL, "training", 0))
    assert np.random.rand() == expected


@simulator
def test_mistakes_are_named(fast: LiberoEnv) -> None:
    with pytest.raises(
        ValueError,
        match=r"environment.tasks has 'libero_object/10'; "
        r"expected libero_object/0 ... libero_object/9",
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
def test_describe_has_versions_and_modes(fast: LiberoEnv) -> None:
    facts = fast.describe()
    assert facts["mujoco"] == "3.3.0"
    assert facts["robosuite"] == "1.4.0"
    assert facts["stepping"] == "fast"
    assert facts["render"] == "fast"
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
    task = find_task("libero_object/0")
    assert task.instruction() == "pick the alphabet soup and place it in the basket"
    assert len(task.initial_states()) == 50


@simulator
@pytest.mark.parametrize("suite", ["libero_object", "libero_goal", "libero_10", "libero_90"])
def test_instructions_in_the_benchmarks_wording(suite: str) -> None:
    # The module imports far more than this function.
    from libero.libero.benchmark import grab_language_from_filename

    for name in task_names(suite):
        task = find_task(name)
        assert task.instruction("benchmark") == grab_language_from_filename(task.bddl.name)


@simulator
def test_an_instruction_in_the_benchmarks_wording() -> None:
    instruction = find_task("libero_object/0").instruction("benchmark")
    assert instruction == "pick up the alphabet soup and place it in the basket"


@simulator
@pytest.mark.parametrize(
    "name", ["libero_object_task/0", "libero_goal_lan/0", "libero_study_table/0"]
)
def test_the_benchmarks_wording_is_refused_for_other_file_names(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"environment\.wording is benchmark, and a task is {name}; "
        "expected bddl, or tasks of libero_spatial",
    ):
        find_task(name).instruction("benchmark")


@simulator
def test_observations_use_the_benchmarks_wording() -> None:
    env = make(_params(tasks=(BOWL,), wording="benchmark"))
    try:
        observation = env.reset(Placement(BOWL, "training", 0))
    finally:
        env.close()
    assert (
        observation.instruction
        == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    )


def test_importing_has_no_effect() -> None:
    script = (
        "import os, sys, json\n"
        "before = dict(os.environ)\n"
        "import vla_opd.envs.libero.env\n"
        "names = ('mujoco', 'robosuite', 'libero', 'torch', 'OpenGL')\n"
        "heavy = [name for name in names if name in sys.modules]\n"
        "print(json.dumps([heavy, dict(os.environ) == before]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(child.stdout) == [[], True]


@simulator
def test_a_simulator_writes_nothing_at_home_and_prints_nothing(tmp_path: Path) -> None:
    script = f"from {MODULE} import _params, make; make(_params()).close()"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))
    }
    environment["HOME"] = str(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert child.stdout == ""
    assert child.stderr == ""
    assert list(tmp_path.iterdir()) == []
