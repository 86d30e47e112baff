"""Labels of trajectory shards, by the teacher or by a scripted expert."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float

from vla_opd.data.action_space import ActionSpace
from vla_opd.data.labels import LabelCost, Labels, smooth_bins, start_log_softmax
from vla_opd.data.trajectory import Observations, read_shard, read_states, split_batches
from vla_opd.params.stages import EnvironmentParams, LabelParams
from vla_opd.policies.policy import Policy
from vla_opd.simulation.jobs import Job
from vla_opd.simulation.pool import PoolSettings, SimulationStats
from vla_opd.simulation.resume import EpisodeRecord, find_recoverable_states, query_expert
from vla_opd.simulation.rollout import RolloutSettings, torch_threads

Result = TypeVar("Result")
Recordings = dict[str, dict[Job, EpisodeRecord]]  # by shard
PendingLogProbs = Callable[[], Float[np.ndarray, "B K V"]]  # waits for them


@dataclass(frozen=True)
class Simulation:
    """How simulators are set up for labels that need them. horizon: in control steps."""

    environment: EnvironmentParams
    horizon: int
    pool: PoolSettings
    stats: SimulationStats


@dataclass(frozen=True)
class Labeler:
    """Labels the shards in a folder of trajectories. space: of the teacher's actions."""

    settings: LabelParams
    teacher: Policy
    space: ActionSpace
    trajectories: Path
    simulation: Simulation

    def label(self, names: Sequence[str]) -> Iterator[tuple[str, Labels]]:
        """Yield the labels of some shards, each as soon as it is complete."""
        if self.settings.expert is not None:
            return self._by_expert(names, self.settings.expert)
        if self.settings.recover_every is not None:
            return self._with_recovery(names, self.settings.recover_every)
        return ((name, Labels(self._log_probs(name))) for name in names)

    def _log_probs(self, name: str) -> Float[np.ndarray, "N K V"]:
        """Return the teacher's log-probabilities at the states of a shard.

        FloatingPointError at the first state whose label is not finite.
        """
        states = read_states([self.trajectories / name])
        tokens = states.mask.shape[1]
        if tokens != self.space.tokens:
            raise ValueError(
                f"{self.trajectories / name}: has {tokens} tokens per state; "
                f"expected the teacher's {self.space.tokens}"
            )
        with torch.inference_mode(), torch_threads(self.settings.threads):
            started = self._start_batches(states.observations)
            labels = np.concatenate([wait() for wait in _one_behind(started)])
        finite = np.isfinite(labels).all(axis=(1, 2))
        if not finite.all():
            broken = np.flatnonzero(~finite)
            raise FloatingPointError(
                f"the teacher's log-probabilities of {len(broken)} states of {name} are not finite "
                f"in {self.settings.dtype}, the first of them state {broken[0]}; expected finite "
                "numbers (nothing of this shard is kept)"
            )
        return labels

    def _start_batches(self, observations: Observations) -> Iterator[PendingLogProbs]:
        """Yield batches of log-probabilities that are being computed."""
        numbers = np.arange(len(observations))
        for rows in split_batches(numbers, self.settings.batch_size):
            logits = self.teacher.logits(observations.at(rows))
            yield start_log_softmax(logits, self.settings.dtype)

    def _with_recovery(self, names: Sequence[str], every: int) -> Iterator[tuple[str, Labels]]:
        """Yield the teacher's labels, with the states from which it still succeeds, greedily."""
        recordings = self._recordings(names)
        simulation = self.simulation
        recoveries = find_recoverable_states(
            self.teacher,
            _all_jobs(recordings),
            simulation.environment,
            RolloutSettings(simulation.horizon, None),
            every,
            simulation.pool,
            simulation.stats,
        )
        for name, episodes in _by_shard(recordings, recoveries):
            cost = LabelCost(
                env_steps=sum(episode.env_steps for episode in episodes),
                decisions=sum(episode.decisions for episode in episodes),
            )
            recoverable = np.concatenate([episode.recoverable for episode in episodes])
            yield name, Labels(self._log_probs(name), recoverable, cost=cost)

    def _by_expert(self, names: Sequence[str], expert: str) -> Iterator[tuple[str, Labels]]:
        """Yield the expert's actions, as distributions around their bins."""
        recordings = self._recordings(names)
        simulation = self.simulation
        answers = query_expert(
            _all_jobs(recordings),
            simulation.environment,
            expert,
            self.space.chunk,
            simulation.pool,
            simulation.stats,
        )
        for name, episodes in _by_shard(recordings, answers):
            actions = np.concatenate([episode.actions for episode in episodes])
            executed = np.concatenate([episode.executed for episode in episodes])
            bins = self.teacher.encode(actions)
            settings = self.settings
            log_probs = smooth_bins(bins, self.space.bins, settings.smoothing, settings.dtype)
            cost = LabelCost(env_steps=int(executed.sum()))
            yield name, Labels(log_probs, given=executed, cost=cost)

    def _recordings(self, names: Sequence[str]) -> Recordings:
        """Read what leads a simulator to the states of some shards again."""
        recordings: Recordings = {}
        for name in names:
            records: dict[Job, EpisodeRecord] = {}
            for episode in read_shard(self.trajectories / name):
                job = Job(episode.placement, episode.member, seed=0)
                records[job] = EpisodeRecord(
                    episode.placement,
                    episode.success,
                    episode.actions,
                    episode.step,
                    episode.proprio,
                )
            recordings[name] = records
        return recordings


def _one_behind(results: Iterable[Result]) -> Iterator[Result]:
    """Yield each result after the next was requested, so that a GPU works ahead of the host."""
    pending = deque[Result]()
    for result in results:
        pending.append(result)
        if len(pending) > 1:
            yield pending.popleft()
    yield from pending


def _all_jobs(recordings: Recordings) -> dict[Job, EpisodeRecord]:
    jobs: dict[Job, EpisodeRecord] = {}
    for episodes in recordings.values():
        jobs.update(episodes)
    return jobs


def _by_shard(
    recordings: Mapping[str, Mapping[Job, EpisodeRecord]], results: Iterable[tuple[Job, Result]]
) -> Iterator[tuple[str, list[Result]]]:
    """Yield the results of each shard, in the order of its episodes, once it is complete."""
    shard_of: dict[Job, str] = {}
    for name, episodes in recordings.items():
        shard_of.update(dict.fromkeys(episodes, name))
    arrived: defaultdict[str, dict[Job, Result]] = defaultdict(dict)
    for job, result in results:
        name = shard_of[job]
        shard = arrived[name]
        shard[job] = result
        episodes = recordings[name]
        if len(shard) == len(episodes):
            del arrived[name]
            yield name, [shard[episode] for episode in episodes]
