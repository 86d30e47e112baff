"""Meta-World behind the protocol: its tasks, its placements and its images."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
from jaxtyping import UInt8

from vla_opd.envs.metaworld import SCENES, TASKS, MetaworldEnv, _gl_context, _load, _reset_raw, make
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

WINDOW = Placement("window-open-v3", "evaluation", 0)
FEW = ["window-open-v3", "push-v3", "hammer-v3", "faucet-close-v3"]
OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in sorted(set(TASKS) - set(FEW))]


def _params(**changes: object) -> EnvironmentParams:
    settings = {
        "family": "metaworld",
        "tasks": ("window-open-v3",),
        "cameras": ("corner4",),
        "image_size": 64,
        **changes,
    }
    return EnvironmentParams.model_validate(settings)


@pytest.fixture
def env() -> MetaworldEnv:
    return make(_params())


def test_the_tasks_of_a_scene_share_one_model_file() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert len(TASKS) >= 10
    assert sum(len(scene) >= 2 for scene in SCENES) >= 5
    for scene in SCENES:
        environments = [ALL_V3_ENVIRONMENTS[task] for task in scene]
        files = {environment.model_name.fget(None) for environment in environments}
        assert len(files) == 1


def test_every_task_has_its_own_instruction() -> None:
    assert len(TASKS) == sum(map(len, SCENES))
    assert len(set(TASKS.values())) == len(TASKS)


def test_placements_move_the_object_and_the_splits_never_meet(env: MetaworldEnv) -> None:
    positions: list[bytes] = []
    for split in ("evaluation", "training"):
        for index in range(10):
            env.reset(Placement("window-open-v3", split, index))
            window = env.raw.model.body("window")
            positions.append(window.pos.tobytes())
    assert len(set(positions)) == 20


@pytest.mark.parametrize("task", [*FEW, *OTHERS])
def test_a_reset_forgets_the_previous_episode(task: str) -> None:
    used = _load(task)
    new = _load(task)
    generator = np.random.default_rng(0)
    _reset_raw(used, 1)
    for _ in range(60):  # violent actions, into the table
        x, y = generator.choice([-1, 1], 2)
        gripper = generator.choice([-1, 1])
        used.step(np.array([x, y, -1, gripper], np.float32))
    assert _full_state(used, 2) == _full_state(new, 2)
    assert _full_state(used, 3) != _full_state(new, 2)


def test_the_first_observation_is_current() -> None:
    env = make(_params(settle=0))
    first = env.reset(WINDOW)
    handle = env.raw_observation[4:7].copy()
    after = env.advance(np.array([[0, 0, 0, -1]], np.float32), 1).observations[0]
    handle_motion = np.abs(env.raw_observation[4:7] - handle)
    frame_change = np.abs(after.frames.astype(int) - first.frames)
    assert handle_motion.max() < 1e-3
    assert frame_change.mean() < 1
    env.close()


def test_settling_equals_idle_steps() -> None:
    settled = make(_params(settle=6))
    idle = make(_params(settle=0))
    first = settled.reset(WINDOW)
    idle.reset(WINDOW)
    still = np.tile(np.array([0, 0, 0, -1], np.float32), (6, 1))
    after = idle.advance(still, 6).observations[0]
    assert np.array_equal(after.frames, first.frames)
    settled.close()
    idle.close()


def test_proprioception_is_hand_and_gripper(env: MetaworldEnv) -> None:
    before = env.reset(WINDOW).proprio
    assert np.allclose(before[:3], env.raw.get_endeff_pos(), atol=1e-6)
    raise_and_close = np.tile(np.array([0, 0, 1, 1], np.float32), (10, 1))
    after = env.advance(raise_and_close, 10).observations[0].proprio
    assert after[2] > before[2] + 0.03
    assert after[3] < before[3] - 0.2
    env.close()


def test_episodes_may_outlast_metaworlds_own_limit(env: MetaworldEnv) -> None:
    env.reset(Placement("reach-v3", "evaluation", 0))
    assert env.advance(np.zeros((501, 4), np.float32), 0).steps == 501
    env.close()


def test_actions_must_be_finite(env: MetaworldEnv) -> None:
    env.reset(WINDOW)
    with pytest.raises(ValueError, match="nan"):
        env.advance(np.full((1, 4), np.nan, np.float32), 0)
    env.close()


def test_exact_images_are_the_stock_ones_turned_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(_params(render="exact", cameras=("corner2", "topview")))
    corner, top = env.reset(WINDOW).frames
    stock_corner = _stock_image(env, "corner2", monkeypatch)
    stock_top = _stock_image(env, "topview", monkeypatch)
    assert np.array_equal(corner, stock_corner[::-1, ::-1])
    assert np.array_equal(top, stock_top)
    env.close()


def test_raising_the_hand_raises_it_in_the_image() -> None:
    env = make(_params(cameras=("corner", "corner2", "corner3", "corner4")))
    before = env.reset(WINDOW).frames
    upward = np.tile(np.array([0, 0, 1, -1], np.float32), (20, 1))
    after = env.advance(upward, 20).observations[0].frames
    for low, high in zip(before, after, strict=True):
        assert _height_of_red(high) > _height_of_red(low) + 0.5
    env.close()


def test_fast_images_resemble_exact_ones_and_the_physics_is_the_same() -> None:
    fast = make(_params(render="fast"))
    exact = make(_params(render="exact"))
    simple = fast.reset(WINDOW)
    stock = exact.reset(WINDOW)
    assert np.array_equal(simple.proprio, stock.proprio)
    difference = np.abs(simple.frames.astype(int) - stock.frames).mean()
    assert 0.5 < difference < 25
    fast.close()
    exact.close()


def _full_state(raw: "SawyerXYZEnv", seed: int) -> list[bytes]:
    """Return the first observations of a new episode, and all of the simulator after them.

    The latter are its whole state and every array of the model.
    """
    import mujoco

    arrays = [_reset_raw(raw, seed)]
    for _ in range(10):
        observation, *_ = raw.step(np.array([0, 0.5, -0.5, 1], np.float32))
        arrays.append(observation)
    state = np.empty(mujoco.mj_stateSize(raw.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(raw.model, raw.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    arrays.append(state)
    attributes = [getattr(raw.model, name) for name in dir(raw.model)]
    arrays += [value for value in attributes if isinstance(value, np.ndarray)]
    return [np.ascontiguousarray(array).tobytes() for array in arrays]


def _stock_image(
    env: MetaworldEnv, camera: str, monkeypatch: pytest.MonkeyPatch
) -> UInt8[np.ndarray, "H W 3"]:
    """Render with MuJoCo's own renderer, on the environment's backend.

    An earlier test may have imported mujoco with another backend.
    """
    import mujoco

    monkeypatch.setattr(
        "mujoco.gl_context.GLContext",
        lambda width, height: _gl_context(env.describe()["graphics"], max(width, height)),
    )
    with mujoco.Renderer(env.raw.model, 64, 64) as renderer:
        renderer.update_scene(env.raw.data, camera)
        return renderer.render()


def _height_of_red(frame: UInt8[np.ndarray, "H W 3"]) -> float:
    """Mean height, in pixels from the lower edge, of the pixels that are the arm's red."""
    red, green, blue = np.moveaxis(frame.astype(int), -1, 0)
    rows = np.nonzero((red > 2 * green) & (red > 2 * blue) & (red > 60))[0]
    return len(frame) - rows.mean()
