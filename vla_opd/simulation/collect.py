"""Groups of episodes, rolled out and stored.

Each group, the G episodes of one prompt, is a shard, written as soon as it is complete.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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


def write_groups(
    groups: Mapping[str, Sequence[Job]],
    policy: Policy,
    environment: EnvironmentParams,
    settings: RolloutSettings,
    work: Draft,
    host: Host,
    stats: SimulationStats,
    description: str,
) -> None:
    """Write the missing shards in this process's share; `groups` are the jobs of each shard.

    description: of the progress bar.
    """
    jobs: list[Job] = []
    shard_of: dict[tuple[Placement, int], str] = {}
    for shard in work.missing(groups):
        for job in groups[shard]:
            jobs.append(job)
            shard_of[job.placement, job.member] = shard
    arrived: defaultdict[str, list[Episode]] = defaultdict(list)
    planned = host.share.select(list(groups))
    total = sum(len(groups[shard]) for shard in planned)
    pool_settings = PoolSettings(host.workers, host.timeout_s)
    episodes = rollout(policy, jobs, environment, settings, pool_settings, stats)
    progress = ProgressBar(
        episodes,
        description,
        scratch=work.scratch,
        total=total,
        initial=total - len(jobs),
        unit="episode",
    )
    for episode in progress:
        shard = shard_of[episode.placement, episode.member]
        group = arrived[shard]
        group.append(episode)
        work.record_made_with(stats.environment)
        if len(group) == len(groups[shard]):
            del arrived[shard]
            group.sort(key=attrgetter("member"))
            with work.part(shard) as path:
                write_shard(path, group, policy.chunk)


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
