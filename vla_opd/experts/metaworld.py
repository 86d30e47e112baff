"""Meta-World's own scripted policies, one a task, as an `Expert`."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from vla_opd.envs.metaworld import MetaworldEnv

if TYPE_CHECKING:
    from metaworld.policies.policy import Policy


def make(env: MetaworldEnv) -> "MetaworldExpert":
    """The expert of whichever task `env` is reset to."""
    return MetaworldExpert(env)


class MetaworldExpert:
    """A P-controller through a few waypoints, from the privileged observation. Source: `metaworld.policies`."""

    def __init__(self, env: MetaworldEnv) -> None:
        self._env = env
        self._policy: Policy | None = None

    def reset(self) -> None:
        """Take up the task that the environment has just been reset to."""
        from metaworld.policies import ENV_POLICY_MAP

        self._policy = ENV_POLICY_MAP[self._env.task]()

    def act(self) -> Float32[np.ndarray, "4"]:
        """x, y, z and gripper in [-1, 1]. RuntimeError before the first `reset`."""
        if self._policy is None:
            raise RuntimeError("act before reset: the expert does not know the task")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Constant.s. may be too high"
            )  # it means that the action is clipped, as it is here
            action = self._policy.get_action(self._env.raw_observation)
        return np.clip(action, -1, 1).astype(np.float32)
