"""Groups of episodes, rolled out and stored.

Each group, the G episodes of one prompt, is a shard, written as soon as it is complete.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.data.trajectory import Episode, write_shard
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.load import Policy
from vla_opd.seeds import derive
from vla_opd.simulation.rollout import (
    Job,
    PoolSettings,
    RolloutSettings,
    SimulationStats,
    rollout,
)


@dataclass(frozen=True)
class Collector:
    """Rolls a policy out, and writes groups of its episodes into a draft.

    stats: what the simulators did so far.
    """

    policy: Policy
    environment: EnvironmentParams
    settings: RolloutSettings
    work: Draft
    host: Host
    stats: SimulationStats = field(default_factory=SimulationStats)

    def write(self, groups: Mapping[str, Sequence[Job]], description: str) -> None:
        """Write the missing shards in this process's share; `groups` are the jobs of each shard.

        description: of the progress bar.
        """
        jobs: list[Job] = []
        shard_of: dict[tuple[Placement, int], str] = {}
        for shard in self.work.missing(groups):
            for job in groups[shard]:
                jobs.append(job)
                shard_of[job.placement, job.member] = shard
        planned = self.host.share.select(list(groups))
        total = sum(len(groups[shard]) for shard in planned)
        progress = ProgressBar(
            self._roll_out(jobs),
            description,
            scratch=self.work.scratch,
            total=total,
            initial=total - len(jobs),
            unit="episode",
        )
        arrived: defaultdict[str, list[Episode]] = defaultdict(list)
        for episode in progress:
            shard = shard_of[episode.placement, episode.member]
            group = arrived[shard]
            group.append(episode)
            self.work.record_made_with(self.stats.environment)
            if len(group) == len(groups[shard]):
                del arrived[shard]
                group.sort(key=attrgetter("member"))
                with self.work.part(shard) as path:
                    write_shard(path, group, self.policy.chunk)

    def _roll_out(self, jobs: Sequence[Job]) -> Iterator[Episode]:
        pool = PoolSettings(self.host.workers, self.host.timeout_s)
        return rollout(self.policy, jobs, self.environment, self.settings, pool, self.stats)


def summarize_episodes(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the numbers of a set of rollouts: episodes, success rate, control steps, states."""
    count = len(episodes)
    successes = 0
    env_steps = 0
    states = 0
    for episode in episodes:
        successes += episode.success
        env_steps += episode.steps
        states += len(episode.step)
    return {
        "episodes": count,
        "success": successes / count,
        "env_steps": env_steps,
        "states": states,
    }


def group_jobs(placement: Placement, size: int, seed: int) -> list[Job]:
    """Return the jobs of a group: `size` episodes from one placement, each with its own seed."""
    jobs: list[Job] = []
    for member in range(size):
        job_seed = derive(seed, "member", member)
        jobs.append(Job(placement, member, job_seed))
    return jobs
