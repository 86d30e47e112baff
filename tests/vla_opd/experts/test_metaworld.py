"""Meta-World's scripted policies behind the `Expert` protocol."""

from collections.abc import Iterator

import numpy as np
import pytest

from vla_opd.envs import metaworld
from vla_opd.envs.protocol import Placement, Split
from vla_opd.experts.metaworld import make
from vla_opd.params.stages import EnvironmentParams


@pytest.fixture(scope="module")
def env() -> Iterator[metaworld.MetaworldEnv]:
    params = EnvironmentParams(
        family="metaworld", tasks=("window-open-v3",), cameras=("corner4",), image_size=32
    )
    environment = metaworld.make(params)
    yield environment
    environment.close()


def _solve(env: metaworld.MetaworldEnv, placement: Placement, noise: float = 0.0) -> int | None:
    """Count the expert's steps to success, with Gaussian noise on x, y and z; None after 150."""
    expert = make(env)
    generator = np.random.default_rng(placement.seed)
    env.reset(placement)
    expert.reset()
    for step in range(150):
        action = expert.act()
        assert action.shape == (4,)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        action[:3] += noise * generator.standard_normal(3).astype(np.float32)
        if env.advance(action[None], 0).success:
            return step + 1
    return None


@pytest.mark.parametrize(
    "task", ["window-close-v3", "handle-press-v3", "reach-v3", "pick-place-v3"]
)
@pytest.mark.parametrize("placement", [("evaluation", 0), ("training", 1)], ids=str)
def test_the_expert_solves_the_task(
    env: metaworld.MetaworldEnv, task: str, placement: tuple[Split, int]
) -> None:
    steps = _solve(env, Placement(task, *placement))
    assert steps is not None
    assert steps > 10, "a task that is solved immediately teaches nothing"


def test_the_expert_corrects_noise(env: metaworld.MetaworldEnv) -> None:
    assert _solve(env, Placement("handle-press-v3", "evaluation", 1), noise=0.3) is not None


def test_the_expert_is_deterministic(env: metaworld.MetaworldEnv) -> None:
    placement = Placement("handle-press-v3", "training", 1)
    assert _solve(env, placement) == _solve(env, placement)


def test_acting_needs_a_reset(env: metaworld.MetaworldEnv) -> None:
    with pytest.raises(RuntimeError, match="reset"):
        make(env).act()
