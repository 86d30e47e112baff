"""Groups of episodes, rolled out and stored: each prompt's G episodes are a shard, written as soon as the last of them is there."""

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from vla_opd.artifacts.draft import Draft
from vla_opd.data.trajectory import Episode, write_shard
from vla_opd.machine.host import Host
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.load import Policy
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, Tally, rollout


def fill(
    groups: Mapping[str, Sequence[Job]],
    policy: Policy,
    environment: EnvironmentParams,
    settings: RolloutSettings,
    work: Draft,
    host: Host,
    tally: Tally,
    label: str,
) -> None:
    """Write the shards of `groups`, `{file: its episodes}`, that are in this process's share and not there yet."""
    missing = {shard: groups[shard] for shard in work.missing(groups)}
    home = {(job.placement, job.member): shard for shard, jobs in missing.items() for job in jobs}
    arrived: dict[str, list[Episode]] = {shard: [] for shard in missing}
    total = sum(len(groups[shard]) for shard in host.share.of(list(groups)))
    jobs = [job for jobs in missing.values() for job in jobs]
    episodes = rollout(
        policy, jobs, environment, settings, PoolSettings(host.workers, host.timeout_s), tally
    )
    for episode in tqdm(
        episodes, total=total, initial=total - len(jobs), desc=label, unit="episode", mininterval=5
    ):
        shard = home[episode.placement, episode.member]
        arrived[shard].append(episode)
        work.remember(tally.environment)
        if len(arrived[shard]) == len(groups[shard]):
            with work.part(shard) as path:
                write_shard(path, sorted(arrived.pop(shard), key=lambda e: e.member), policy.chunk)


def counts(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a set of rollouts came to."""
    return {
        "episodes": len(episodes),
        "success": sum(e.success for e in episodes) / len(episodes),
        "env_steps": sum(e.steps for e in episodes),
        "states": sum(len(e.step) for e in episodes),
    }
