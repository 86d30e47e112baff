"""Resuming a recorded episode from one of its states, by an expert or another policy.

The actions that led to the state are executed again and lead there exactly. Workers import this
module, so it does not import torch, nor the rollouts before the parent needs them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32, Int32

from vla_opd.envs.protocol import Env, Observation, Placement
from vla_opd.experts import make_expert
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Job, Outcome, observe_start, stack_outcome
from vla_opd.simulation.pool import Pool, PoolSettings, SimulationStats

if TYPE_CHECKING:
    from vla_opd.data.trajectory import Episode
    from vla_opd.policies.load import Policy
    from vla_opd.simulation.rollout import RolloutSettings

# Tolerated difference to the recorded proprioception, in its units: zero on the same machine, the
# last bits on another.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class EpisodeRecord:
    """What leads to the N kept states of an episode of L control steps again.

    `step` and `proprio` are those of `Episode`.
    """

    placement: Placement
    success: bool
    actions: Float32[np.ndarray, "L A"]
    step: Int32[np.ndarray, " N"]
    proprio: Float32[np.ndarray, "N P"]


@dataclass(frozen=True)
class Resume:
    """Start at the kept state `row` of a recorded episode.

    Returns one observation, which counts as that of step 0. ValueError if the episode ends before
    that state or reaches another one: then the environment's episodes do not follow from placement
    and actions.
    """

    episode: EpisodeRecord
    row: int

    def __call__(self, env: Env) -> Outcome:
        return observe_start(self.restore(env))

    def restore(self, env: Env) -> Observation:
        """Bring the environment to the state, and return its observation."""
        episode = self.episode
        step = int(episode.step[self.row])
        expected = episode.proprio[self.row]
        observation = env.reset(episode.placement)
        if step:
            actions = episode.actions[:step]
            advance = env.advance(actions, step)
            if advance.steps < step or advance.success:
                reason = f"it ended after {advance.steps}"
                raise ValueError(self._mismatch(reason))
            observation = advance.observations[-1]
        proprio = observation.proprio
        if not np.allclose(proprio, expected, rtol=0, atol=TOLERANCE):
            reason = f"proprioception was {proprio.tolist()}, recorded is {expected.tolist()}"
            raise ValueError(self._mismatch(reason))
        return observation

    def _mismatch(self, reason: str) -> str:
        steps = self.episode.step[self.row]
        return (
            f"environment.family: {self.episode.placement} was replayed for {steps} control steps, "
            f"and {reason}; expected the recorded episode"
        )


@dataclass(frozen=True)
class QueryExpert:
    """Run a scripted expert in closed loop for S = `chunk` steps from every kept state.

    `Outcome.actions` are N x S rows, `clean` where they were executed: after a success the last
    action is repeated.
    """

    episode: EpisodeRecord
    expert: str
    chunk: int

    def __call__(self, env: Env) -> Outcome:
        actions: list[Float32[np.ndarray, "S A"]] = []
        executed: list[Bool[np.ndarray, " S"]] = []
        for row in range(len(self.episode.step)):
            answer = self._run_expert(env, row)
            steps = np.arange(self.chunk)
            last = len(answer) - 1
            actions.append(answer[np.minimum(steps, last)])
            executed.append(steps <= last)
        return stack_outcome(
            0,
            [],
            np.zeros(0, np.int32),
            success=False,
            actions=np.concatenate(actions),
            clean=np.concatenate(executed),
        )

    def _run_expert(self, env: Env, row: int) -> Float32[np.ndarray, "s A"]:
        Resume(self.episode, row).restore(env)
        expert = make_expert(self.expert, env)
        expert.reset()
        actions: list[Float32[np.ndarray, " A"]] = []
        success = False
        while len(actions) < self.chunk and not success:
            action = np.asarray(expert.act(), dtype=np.float32).copy()
            actions.append(action)
            advance = env.advance(action[None], 0)
            success = advance.success
        return np.stack(actions)


@dataclass(frozen=True)
class ExpertActions:
    """An expert's S actions from each of N states, and which of them were executed.

    After a success the last action is repeated, unexecuted.
    """

    actions: Float32[np.ndarray, "N S A"]
    executed: Bool[np.ndarray, "N S"]


def query_expert(
    episodes: Mapping[Job, EpisodeRecord],
    environment: EnvironmentParams,
    expert: str,
    chunk: int,
    pool_settings: PoolSettings,
    stats: SimulationStats,
) -> Iterator[tuple[Job, ExpertActions]]:
    """Yield the scripted expert's actions at every kept state, an episode at a time.

    Errors as in `rollout.rollout`, and those of `Resume`.
    """
    pool = Pool(
        environment,
        episodes,
        lambda job: QueryExpert(episodes[job], expert, chunk),
        capacity=1,
        settings=pool_settings,
        stats=stats,
    )
    with pool:
        while pool.unfinished:
            for job, outcome in pool.collect():
                pool.finish(job)
                states = len(episodes[job].step)
                actions = outcome.actions.reshape(states, chunk, -1)
                executed = outcome.clean.reshape(states, chunk)
                yield job, ExpertActions(actions, executed)


@dataclass(frozen=True)
class Recovery:
    """Whether the policy succeeds from each of N states, and the cost of finding out."""

    recoverable: Bool[np.ndarray, " N"]
    env_steps: int = 0
    decisions: int = 0

    def add(self, states: Bool[np.ndarray, " N"], episode: "Episode") -> "Recovery":
        """Return the recovery with the result of one more episode, which holds for `states`."""
        return Recovery(
            recoverable=np.where(states, episode.success, self.recoverable),
            env_steps=self.env_steps + episode.steps,
            decisions=self.decisions + len(episode.tokens),
        )


def find_recoverable_states(
    policy: "Policy",
    episodes: Mapping[Job, EpisodeRecord],
    environment: EnvironmentParams,
    settings: "RolloutSettings",
    every: int,
    pool_settings: PoolSettings,
    stats: SimulationStats,
) -> Iterator[tuple[Job, Recovery]]:
    """Yield from which states of each episode the policy still succeeds, an episode at a time.

    In a failed episode the policy takes over at every n-th decision (n = `every`); the states up to
    the next such decision share its result. All states of a successful episode are recoverable.
    Errors as in `rollout.rollout`, and those of `Resume`.
    """
    from vla_opd.simulation.rollout import rollout

    stretch = policy.chunk * every
    attempts: list[tuple[Job, int]] = []
    recoveries: dict[Job, Recovery] = {}
    for job, episode in episodes.items():
        states = len(episode.step)
        recovery = Recovery(np.full(states, episode.success))
        recoveries[job] = recovery
        rows = _start_rows(episode, stretch)
        attempts.extend((job, row) for row in rows)
        if not rows:
            yield job, recovery
    pending = Counter(job for job, _ in attempts)
    commands = _resume_commands(episodes, attempts)
    rollouts = rollout(
        policy,
        commands,
        environment,
        settings,
        pool_settings,
        stats,
        first=commands.__getitem__,
    )
    for attempt in rollouts:
        job, row = attempts[attempt.member]
        step = episodes[job].step
        later = step - step[row]
        covered = (later >= 0) & (later < stretch)
        recoveries[job] = recoveries[job].add(covered, attempt)
        pending[job] -= 1
        if not pending[job]:
            yield job, recoveries[job]


def _start_rows(episode: EpisodeRecord, every: int) -> list[int]:
    """Return the kept states at which the policy takes over: every n steps, if it failed."""
    if episode.success:
        return []
    starts = episode.step % every == 0
    return np.flatnonzero(starts).tolist()


def _resume_commands(
    episodes: Mapping[Job, EpisodeRecord], attempts: Sequence[tuple[Job, int]]
) -> dict[Job, Resume]:
    """Return a job for each attempt, whose member is the attempt's number, with its command."""
    commands: dict[Job, Resume] = {}
    for number, (job, row) in enumerate(attempts):
        attempt = Job(job.placement, number, 0)
        commands[attempt] = Resume(episodes[job], row)
    return commands
