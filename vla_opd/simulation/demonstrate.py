"""Expert x environment -> demonstrations: whole episodes of a scripted expert, disturbed on purpose, each run inside a simulator process.

Workers import this module, so it imports no torch, and the episodes that it makes in the parent no sooner than there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32

from vla_opd.envs.protocol import Env, Observation
from vla_opd.experts import Expert, make_expert
from vla_opd.params.stages import DemonstrateParams, EnvironmentParams
from vla_opd.simulation.jobs import Job, Outcome, outcome
from vla_opd.simulation.pool import Pool, PoolSettings, Tally

if TYPE_CHECKING:
    from vla_opd.data.trajectory import Episode

BURSTS = (1, 2)  # in an episode that has any
BURST_LENGTH = (4, 8)  # control steps
BURST_START = (5, 60)  # control steps; never in the second half of the horizon


@dataclass(frozen=True)
class Disturbance:
    """What is done to an expert's xyz at each of H control steps, in the environment's units, drawn before the episode starts.

    noise is added; where `burst`, `random` is executed in the expert's place. Bounds of `BURST_*` are inclusive.
    """

    noise: Float32[np.ndarray, "H 3"]
    burst: Bool[np.ndarray, " H"]
    random: Float32[np.ndarray, "H 3"]

    def executed(self, step: int, action: Float32[np.ndarray, " A"]) -> Float32[np.ndarray, " A"]:
        """clip(action + noise, -1, 1) on xyz (xy of an action that has no more), or the burst's; the other dimensions are the expert's."""
        moved = action[:3]
        xyz = (
            self.random[step, : len(moved)]
            if self.burst[step]
            else moved + self.noise[step, : len(moved)]
        )
        return np.clip(np.concatenate([xyz, action[3:]]), -1, 1).astype(np.float32)


def draw_disturbance(seed: int, horizon: int, noise: float, burst: float) -> Disturbance:
    """Noise ~ N(0, noise^2), random ~ U(-1, 1); with probability `burst`, one or two bursts at random times."""
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
    latest = min(BURST_START[1], horizon // 2)
    if random.random() >= probability or latest < BURST_START[0]:
        return bursts
    for _ in range(random.integers(*BURSTS, endpoint=True)):
        start = random.integers(BURST_START[0], latest, endpoint=True)
        bursts[start : start + random.integers(*BURST_LENGTH, endpoint=True)] = True
    return bursts


@dataclass(frozen=True)
class Demonstrate:
    """A whole episode of the expert. `Outcome.actions` are the expert's own, the labels, and not what was executed."""

    job: Job
    params: DemonstrateParams

    def __call__(self, env: Env) -> Outcome:
        seen = [env.reset(self.job.placement)]
        expert = make_expert(self.params.expert, env)
        expert.reset()
        disturbance = draw_disturbance(
            self.job.seed, self.params.horizon, self.params.noise, self.params.burst
        )
        labels: list[Float32[np.ndarray, " A"]] = []
        success = False
        while not success and len(labels) < self.params.horizon:
            success = self._step(env, expert, disturbance, labels, seen)
        return self._outcome(labels, seen, disturbance, success=success)

    def _step(
        self,
        env: Env,
        expert: Expert,
        disturbance: Disturbance,
        labels: list[Float32[np.ndarray, " A"]],
        seen: list[Observation],
    ) -> bool:
        action = np.asarray(expert.act(), dtype=np.float32).copy()
        advance = env.advance(
            disturbance.executed(len(labels), action)[None], self.params.observe_every
        )
        labels.append(action)
        seen.extend(advance.observations)
        return advance.success

    def _outcome(
        self,
        labels: list[Float32[np.ndarray, " A"]],
        seen: list[Observation],
        disturbance: Disturbance,
        *,
        success: bool,
    ) -> Outcome:
        steps = len(labels)
        observed = np.arange(0, steps + 1, self.params.observe_every, dtype=np.int32)
        return outcome(
            steps,
            seen,
            observed,
            success=success,
            actions=np.stack(labels),
            clean=~disturbance.burst[:steps],
        )


def demonstrate(
    jobs: Iterable[Job],
    environment: EnvironmentParams,
    params: DemonstrateParams,
    pool_settings: PoolSettings | None = None,
    tally: Tally | None = None,
) -> Iterator["Episode"]:
    """Episodes of the scripted expert `params.expert`, successful or not, in the order in which they finish.

    Executed is clip(expert + N(0, noise^2)) on xyz, and random xyz in bursts (`clean` False); `actions` holds the expert's own action at every
    step. Errors as in `rollout.rollout`.
    """
    capacity = params.horizon // params.observe_every + 1
    settings, tally = pool_settings or PoolSettings(), tally or Tally()
    with Pool(
        environment,
        jobs,
        lambda job: Demonstrate(job, params),
        capacity=capacity,
        settings=settings,
        tally=tally,
    ) as pool:
        while pool.unfinished:
            for job, outcome in pool.collect():
                pool.finish(job)
                episode = _demonstration(job, outcome)
                tally.states += len(episode.step)
                yield episode


def _demonstration(job: Job, outcome: Outcome) -> "Episode":
    from vla_opd.data.trajectory import Episode  # brings Zarr, which the workers have no use for

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
