"""Meta-World behind the protocol: its tasks, its placements and its pictures."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
from jaxtyping import UInt8

from vla_opd.envs.metaworld import SCENES, TASKS, MetaworldEnv, _gl_context, _load, _start, make
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

WINDOW = Placement("window-open-v3", "evaluation", 0)


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


def test_tasks_are_metaworlds_and_a_scene_is_one_file() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert len(TASKS) >= 10
    assert sum(len(scene) >= 2 for scene in SCENES) >= 5
    for scene in SCENES:
        assert len({ALL_V3_ENVIRONMENTS[task].model_name.fget(None) for task in scene}) == 1


def test_instructions_tell_all_tasks_apart() -> None:
    assert len(set(TASKS.values())) == len(TASKS) == sum(map(len, SCENES))


def test_placements_move_the_object_and_the_splits_never_meet(env: MetaworldEnv) -> None:
    positions: list[bytes] = []
    for split, indices in (("evaluation", range(10)), ("training", range(10))):
        for index in indices:
            env.reset(Placement("window-open-v3", split, index))
            positions.append(env.raw.model.body("window").pos.tobytes())
    assert len(set(positions)) == 20


FEW = ["window-open-v3", "push-v3", "hammer-v3", "faucet-close-v3"]
OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in sorted(set(TASKS) - set(FEW))]


@pytest.mark.parametrize("task", [*FEW, *OTHERS])
def test_a_reset_forgets_the_episode_before(task: str) -> None:
    used, new = _load(task), _load(task)
    generator = np.random.default_rng(0)
    _start(used, 1)
    for _ in range(60):  # violently, and into the table
        used.step(
            np.array([*generator.choice([-1, 1], 2), -1, generator.choice([-1, 1])], np.float32)
        )
    assert _everything(used, 2) == _everything(new, 2)
    assert _everything(used, 3) != _everything(new, 2)


def test_the_first_observation_is_not_stale() -> None:
    env = make(_params(settle=0))
    first = env.reset(WINDOW)
    handle = env.raw_observation[4:7].copy()
    after = env.advance(np.array([[0, 0, 0, -1]], np.float32), 1).observations[0]
    assert np.abs(env.raw_observation[4:7] - handle).max() < 1e-3
    assert np.abs(after.frames.astype(int) - first.frames).mean() < 1
    env.close()


def test_settling_is_that_many_idle_steps() -> None:
    settled, idle = make(_params(settle=6)), make(_params(settle=0))
    first = settled.reset(WINDOW)
    idle.reset(WINDOW)
    still = np.tile(np.array([0, 0, 0, -1], np.float32), (6, 1))
    assert np.array_equal(idle.advance(still, 6).observations[0].frames, first.frames)
    settled.close(), idle.close()


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


def test_exact_pictures_are_the_stock_ones_turned_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(_params(render="exact", cameras=("corner2", "topview")))
    corner, top = env.reset(WINDOW).frames
    assert np.array_equal(corner, _stock(env, "corner2", monkeypatch)[::-1, ::-1])
    assert np.array_equal(top, _stock(env, "topview", monkeypatch))
    env.close()


def test_raising_the_hand_raises_it_in_the_picture() -> None:
    env = make(_params(cameras=("corner", "corner2", "corner3", "corner4")))
    before = env.reset(WINDOW).frames
    after = (
        env.advance(np.tile(np.array([0, 0, 1, -1], np.float32), (20, 1)), 20)
        .observations[0]
        .frames
    )
    for low, high in zip(before, after, strict=True):
        assert _height_of_red(high) > _height_of_red(low) + 0.5
    env.close()


def test_fast_pictures_are_near_the_exact_ones_and_physics_the_same() -> None:
    fast, exact = (make(_params(render=render)) for render in ("fast", "exact"))
    simple, stock = fast.reset(WINDOW), exact.reset(WINDOW)
    assert np.array_equal(simple.proprio, stock.proprio)
    difference = np.abs(simple.frames.astype(int) - stock.frames).mean()
    assert 0.5 < difference < 25
    fast.close(), exact.close()


def _everything(raw: "SawyerXYZEnv", seed: int) -> list[bytes]:
    """The first observations of a new episode, the simulator's whole state after it, and every array of the model."""
    import mujoco

    seen = [
        _start(raw, seed),
        *(raw.step(np.array([0, 0.5, -0.5, 1], np.float32))[0] for _ in range(10)),
    ]
    state = np.empty(mujoco.mj_stateSize(raw.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(raw.model, raw.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    arrays = [
        value
        for name in dir(raw.model)
        if isinstance(value := getattr(raw.model, name), np.ndarray)
    ]
    return [np.ascontiguousarray(array).tobytes() for array in (*seen, state, *arrays)]


def _stock(
    env: MetaworldEnv, camera: str, monkeypatch: pytest.MonkeyPatch
) -> UInt8[np.ndarray, "H W 3"]:
    """MuJoCo's own renderer, on the environment's backend even where an earlier test imported mujoco with none chosen."""
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
