"""Digest of one episode, by functions that a fresh process can import."""

import hashlib

import numpy as np
from jaxtyping import Float32

from vla_opd.envs import Observation, Placement, make_env
from vla_opd.envs.protocol import Env
from vla_opd.params.stages import EnvironmentParams


def digest(observations: list[Observation]) -> str:
    """Return the sha256 of every byte that a policy would see."""
    total = hashlib.sha256()
    for observation in observations:
        total.update(observation.frames.tobytes())
        total.update(observation.proprio.tobytes())
        total.update(observation.instruction.encode())
    return total.hexdigest()


def play(
    env: Env,
    placement: Placement,
    actions: Float32[np.ndarray, "S A"],
    observe_every: int = 2,
    chunk: int = 4,
) -> str:
    """Execute `actions` from `placement`, `chunk` at a time; return the observations' digest."""
    observations = [env.reset(placement)]
    for start in range(0, len(actions), chunk):
        advance = env.advance(actions[start : start + chunk], observe_every)
        observations.extend(advance.observations)
    return digest(observations)


def play_in_new_env(
    params: EnvironmentParams, placement: Placement, actions: Float32[np.ndarray, "S A"]
) -> str:
    """Do `play` in a new environment."""
    env = make_env(params)
    try:
        return play(env, placement, actions)
    finally:
        env.close()
