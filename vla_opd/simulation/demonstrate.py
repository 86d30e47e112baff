"""Demonstrations: whole episodes of a scripted expert, with disturbances, in a simulator process.

Workers import this module, so it does not import torch, nor the episodes' module (and Zarr) before
the parent needs it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32

from vla_opd.envs.protocol import Env, Observation
from vla_opd.experts import Expert, make_expert
from vla_opd.params.stages import DemonstrateParams, EnvironmentParams
from vla_opd.simulation.jobs import Job, Outcome, stack_outcome
from vla_opd.simulation.pool import Pool, PoolSettings, SimulationStats

if TYPE_CHECKING:
    from vla_opd.data.trajectory import Episode

# Inclusive bounds.
BURSTS = (1, 2)  # per episode that has any
BURST_LENGTH = (4, 8)  # control steps
BURST_START = (5, 60)  # control steps; never in the second half of the horizon


@dataclass(frozen=True)
class Disturbance:
    """Changes of an expert's xyz at each of H control steps, drawn before the episode starts.

    `noise` is added. Where `burst` is set, `random` is executed instead of the expert's xyz. Both
    are in the environment's units.
    """

    noise: Float32[np.ndarray, "H 3"]
    burst: Bool[np.ndarray, " H"]
    random: Float32[np.ndarray, "H 3"]

    def apply(self, step: int, action: Float32[np.ndarray, " A"]) -> Float32[np.ndarray, " A"]:
        """Return clip(action + noise, -1, 1) on xyz, or the burst's xyz.

        An action without z has its xy changed; the other dimensions are the expert's.
        """
        expert = action[:3]
        dims = len(expert)
        if self.burst[step]:
            xyz = self.random[step, :dims]
        else:
            xyz = expert + self.noise[step, :dims]
        disturbed = np.concatenate([xyz, action[3:]])
        return np.clip(disturbed, -1, 1).astype(np.float32)


def draw_disturbance(seed: int, horizon: int, noise: float, burst: float) -> Disturbance:
    """Draw noise ~ N(0, noise^2) and random ~ U(-1, 1), and bursts with probability `burst`.

    An episode with bursts has one or two, at random times.
    """
    random = np.random.Generator(np.random.Philox(seed))
    return Disturbance(
        noise=random.normal(0.0, noise, (horizon, 3)).astype(np.float32),
        random=random.uniform(-1.0, 1.0, (horizon, 3)).astype(np.float32),
        burst=_draw_bursts(random, horizon, burst),
    )


def _draw_bursts(
    random: np.random.Generator, horizon: int, probability: float
) -> Bool[np.ndarray, " H"]:
    bursts = np.zeros(horizon, dtype=np.bool_)
    earliest, latest = BURST_START
    latest = min(latest, horizon // 2)
    if random.random() >= probability or latest < earliest:
        return bursts
    count = random.integers(*BURSTS, endpoint=True)
    for _ in range(count):
        start = random.integers(earliest, latest, endpoint=True)
        length = random.integers(*BURST_LENGTH, endpoint=True)
        bursts[start : start + length] = True
    return bursts


@dataclass(frozen=True)
class Demonstrate:
    """Run a whole episode of the expert.

    `Outcome.actions` are the expert's own actions, the labels, not those that were executed.
    """

    job: Job
    params: DemonstrateParams

    def __call__(self, env: Env) -> Outcome:
        params = self.params
        observations = [env.reset(self.job.placement)]
        expert = make_expert(params.expert, env)
        expert.reset()
        disturbance = draw_disturbance(
            self.job.seed,
            params.horizon,
            params.noise,
            params.burst,
        )
        actions: list[Float32[np.ndarray, " A"]] = []
        success = False
        while not success and len(actions) < params.horizon:
            success = self._step(env, expert, disturbance, actions, observations)
        steps = len(actions)
        observed = np.arange(0, steps + 1, params.observe_every, dtype=np.int32)
        return stack_outcome(
            steps,
            observations,
            observed,
            success=success,
            actions=np.stack(actions),
            clean=~disturbance.burst[:steps],
        )

    def _step(
        self,
        env: Env,
        expert: Expert,
        disturbance: Disturbance,
        actions: list[Float32[np.ndarray, " A"]],
        observations: list[Observation],
    ) -> bool:
        """Execute one control step, append to both lists, and return whether it succeeded."""
        action = np.asarray(expert.act(), dtype=np.float32).copy()
        disturbed = disturbance.apply(len(actions), action)
        advance = env.advance(disturbed[None], self.params.observe_every)
        actions.append(action)
        observations.extend(advance.observations)
        return advance.success


def demonstrate(
    jobs: Iterable[Job],
    environment: EnvironmentParams,
    params: DemonstrateParams,
    pool_settings: PoolSettings | None = None,
    stats: SimulationStats | None = None,
) -> Iterator["Episode"]:
    """Yield episodes of the scripted expert `params.expert`, in the order in which they finish.

    They may have failed. Executed is clip(expert + N(0, noise^2), -1, 1) on xyz, and random xyz in
    bursts (`clean` False); `actions` holds the expert's own action at every step. Errors as in
    `rollout.rollout`.
    """
    stats = stats or SimulationStats()
    pool = Pool(
        environment,
        jobs,
        lambda job: Demonstrate(job, params),
        capacity=params.horizon // params.observe_every + 1,
        settings=pool_settings or PoolSettings(),
        stats=stats,
    )
    with pool:
        while pool.unfinished:
            for job, outcome in pool.collect():
                pool.finish(job)
                episode = _to_episode(job, outcome)
                stats.states += len(episode.step)
                yield episode


def _to_episode(job: Job, outcome: Outcome) -> "Episode":
    from vla_opd.data.trajectory import Episode  # imports Zarr, which the workers don't need

    keep = outcome.observed < outcome.steps
    return Episode(
        placement=job.placement,
        member=job.member,
        instruction=outcome.instruction,
        success=outcome.success,
        steps=outcome.steps,
        frames=outcome.frames[keep],
        proprio=outcome.proprio[keep],
        step=outcome.observed[keep],
        actions=outcome.actions,
        clean=outcome.clean,
        tokens=np.zeros((0, 0), np.int16),
        log_probs=np.zeros((0, 0), np.float32),
    )
