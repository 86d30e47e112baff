"""Somebody else goes on from a state of a recorded episode: the actions that led there are executed again, and lead there exactly.

Workers import this module, so it imports no torch; what rolls a policy out, no sooner than in the parent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32, Int32

from vla_opd.envs.protocol import Env, Observation, Placement
from vla_opd.experts import make_expert
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Job, Outcome, outcome
from vla_opd.simulation.pool import Pool, PoolSettings, Tally

if TYPE_CHECKING:
    from vla_opd.policies.load import Policy
    from vla_opd.simulation.rollout import RolloutSettings

SAME = 1e-3  # how far proprioception may be from what was recorded: nothing on one machine, the last bits on another


@dataclass(frozen=True)
class Recorded:
    """What is left of an episode of L control steps that leads to its N kept states again; `step` and `proprio` as in `Episode`."""

    placement: Placement
    success: bool
    actions: Float32[np.ndarray, "L A"]
    step: Int32[np.ndarray, " N"]
    proprio: Float32[np.ndarray, "N P"]


@dataclass(frozen=True)
class Resume:
    """Start where a recorded episode was at its kept state `row`; one observation, which counts as that of step 0.

    ValueError if the way there ends early, or leads elsewhere: the environment's episodes don't follow from placement and actions.
    """

    episode: Recorded
    row: int

    def __call__(self, env: Env) -> Outcome:
        return outcome(0, [self.observed(env)], np.zeros(1, np.int32), success=False)

    def observed(self, env: Env) -> Observation:
        """The state, in the environment, and as it looks there."""
        step, expected = int(self.episode.step[self.row]), self.episode.proprio[self.row]
        seen = env.reset(self.episode.placement)
        if step:
            advance = env.advance(self.episode.actions[:step], step)
            if advance.steps < step or advance.success:
                raise ValueError(self._elsewhere(f"it ended after {advance.steps}"))
            seen = advance.observations[-1]
        if not np.allclose(seen.proprio, expected, rtol=0, atol=SAME):
            raise ValueError(
                self._elsewhere(
                    f"proprioception was {seen.proprio.tolist()}, recorded is {expected.tolist()}"
                )
            )
        return seen

    def _elsewhere(self, why: str) -> str:
        return (
            f"environment.family: {self.episode.placement} was replayed for {self.episode.step[self.row]} control steps, and {why}; expected the "
            "recorded episode"
        )


@dataclass(frozen=True)
class Ask:
    """What a scripted expert would do from every kept state of a recorded episode: S = `chunk` actions from each, executed and closed loop.

    `Outcome.actions` are N x S rows; `clean` where they were executed: after a success the last action is repeated.
    """

    episode: Recorded
    expert: str
    chunk: int

    def __call__(self, env: Env) -> Outcome:
        answers = [self._answer(env, row) for row in range(len(self.episode.step))]
        padded = [
            np.concatenate([actions, np.repeat(actions[-1:], self.chunk - len(actions), axis=0)])
            for actions in answers
        ]
        executed = np.concatenate([np.arange(self.chunk) < len(actions) for actions in answers])
        return outcome(
            0,
            [],
            np.zeros(0, np.int32),
            success=False,
            actions=np.concatenate(padded),
            clean=executed,
        )

    def _answer(self, env: Env, row: int) -> Float32[np.ndarray, "s A"]:
        Resume(self.episode, row).observed(env)
        expert = make_expert(self.expert, env)
        expert.reset()
        actions: list[Float32[np.ndarray, " A"]] = []
        success = False
        while len(actions) < self.chunk and not success:
            actions.append(np.asarray(expert.act(), dtype=np.float32).copy())
            success = env.advance(actions[-1][None], 0).success
        return np.stack(actions)


@dataclass(frozen=True)
class Answers:
    """An expert's S actions from each of N states, and which of them it executed: after a success the last one is repeated."""

    actions: Float32[np.ndarray, "N S A"]
    executed: Bool[np.ndarray, "N S"]


def ask(
    episodes: Mapping[Job, Recorded],
    environment: EnvironmentParams,
    expert: str,
    chunk: int,
    pool_settings: PoolSettings,
    tally: Tally,
) -> Iterator[tuple[Job, Answers]]:
    """What the scripted expert would do at every kept state of every episode, as it is known. Errors as in `rollout.rollout`, and `Resume`'s."""
    with Pool(
        environment,
        episodes,
        lambda job: Ask(episodes[job], expert, chunk),
        capacity=1,
        settings=pool_settings,
        tally=tally,
    ) as pool:
        while pool.unfinished:
            for job, answered in pool.collect():
                pool.finish(job)
                states = len(episodes[job].step)
                yield (
                    job,
                    Answers(
                        answered.actions.reshape(states, chunk, -1),
                        answered.clean.reshape(states, chunk),
                    ),
                )


@dataclass(frozen=True)
class Recovery:
    """Whether the policy succeeds from each of N states, and the control steps and decisions that it took to find out."""

    recoverable: Bool[np.ndarray, " N"]
    env_steps: int = 0
    decisions: int = 0


def take_over(
    policy: "Policy",
    episodes: Mapping[Job, Recorded],
    environment: EnvironmentParams,
    settings: "RolloutSettings",
    every: int,
    pool_settings: PoolSettings,
    tally: Tally,
) -> Iterator[tuple[Job, Recovery]]:
    """From which states of the episodes the policy still succeeds, as they are known.

    It takes over at every `every`-th decision of an episode that failed; the states up to the next are as that one. Of an episode that succeeded
    all are recoverable. Errors as in `rollout.rollout`, and `Resume`'s.
    """
    from vla_opd.simulation.rollout import rollout

    starts = {job: _starts(one, policy.chunk * every) for job, one in episodes.items()}
    tries = [(job, row) for job, rows in starts.items() for row in rows]
    jobs = [Job(job.placement, number, 0) for number, (job, _) in enumerate(tries)]
    first = {one: Resume(episodes[job], row) for one, (job, row) in zip(jobs, tries, strict=True)}
    found: dict[Job, Recovery] = {
        job: Recovery(np.full(len(one.step), one.success)) for job, one in episodes.items()
    }
    left = {job: len(rows) for job, rows in starts.items()}
    yield from ((job, found[job]) for job in episodes if not left[job])
    for episode in rollout(
        policy, jobs, environment, settings, pool_settings, tally, first.__getitem__
    ):
        job, row = tries[episode.member]
        one, step = found[job], episodes[job].step
        there = (step >= step[row]) & (step < step[row] + policy.chunk * every)
        recoverable = np.where(there, episode.success, one.recoverable)
        found[job] = Recovery(
            recoverable, one.env_steps + episode.steps, one.decisions + len(episode.tokens)
        )
        left[job] -= 1
        if not left[job]:
            yield job, found[job]


def _starts(episode: Recorded, every: int) -> list[int]:
    """The kept states at which somebody else takes over: one every so many control steps, in an episode that failed."""
    return [] if episode.success else np.flatnonzero(episode.step % every == 0).tolist()
