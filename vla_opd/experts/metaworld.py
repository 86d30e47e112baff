"""Meta-World's own scripted policies, one per task, as an `Expert`."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from vla_opd.envs.metaworld import MetaworldEnv

if TYPE_CHECKING:
    from metaworld.policies.policy import Policy


def make(env: MetaworldEnv) -> "MetaworldExpert":
    """Make the expert for any task that `env` is reset to."""
    return MetaworldExpert(env)


class MetaworldExpert:
    """A P-controller through a few waypoints, from the privileged observation.

    Source: `metaworld.policies`.
    """

    def __init__(self, env: MetaworldEnv) -> None:
        self._env = env
        self._policy: Policy | None = None

    def reset(self) -> None:
        """Select the policy for the task of the environment's last reset."""
        from metaworld.policies import ENV_POLICY_MAP

        self._policy = ENV_POLICY_MAP[self._env.task]()

    def act(self) -> Float32[np.ndarray, "4"]:
        """Return x, y, z and gripper in [-1, 1]. RuntimeError before the first `reset`."""
        if self._policy is None:
            raise RuntimeError("act before reset: the expert does not know the task")
        with warnings.catch_warnings():
            # Meta-World warns of actions that will be clipped, as below.
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")
            action = self._policy.get_action(self._env.raw_observation)
        clipped = np.clip(action, -1, 1)
        return clipped.astype(np.float32)
