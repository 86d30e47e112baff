"""One episode reduced to a digest, by a function that a fresh process can import."""

import hashlib

import numpy as np
from jaxtyping import Float32

from vla_opd.envs import Observation, Placement, make_env
from vla_opd.envs.protocol import Env
from vla_opd.params.stages import EnvironmentParams


def digest(observations: list[Observation]) -> str:
    """sha256 of every byte that a policy would see."""
    total = hashlib.sha256()
    for observation in observations:
        total.update(
            observation.frames.tobytes()
            + observation.proprio.tobytes()
            + observation.instruction.encode()
        )
    return total.hexdigest()


def play(
    env: Env,
    placement: Placement,
    actions: Float32[np.ndarray, "S A"],
    observe_every: int = 2,
    chunk: int = 4,
) -> str:
    """The digest of what is seen while `actions` are executed, `chunk` at a time, from `placement`."""
    seen = [env.reset(placement)]
    for start in range(0, len(actions), chunk):
        seen.extend(env.advance(actions[start : start + chunk], observe_every).observations)
    return digest(seen)


def play_afresh(
    params: EnvironmentParams, placement: Placement, actions: Float32[np.ndarray, "S A"]
) -> str:
    """`play` in an environment of its own."""
    env = make_env(params)
    try:
        return play(env, placement, actions)
    finally:
        env.close()
