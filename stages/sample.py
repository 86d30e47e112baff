"""sample: student -> trajectories, eq. (3).

For each task `prompts` placements, and G = `group` episodes from each; a group is a shard.
"""

from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import read_shard, shards
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, SampleParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.simulation.collect import Collector, summarize_episodes
from vla_opd.simulation.placements import plan_groups
from vla_opd.simulation.rollout import RolloutSettings


def run(
    *,
    run: str,
    seed: int,
    settings: SampleParams,
    environment: EnvironmentParams,
    iteration: str,
    student: Path,
    teacher: Path,
    out: Path,
    host: Host,
) -> Manifest | None:
    """Roll the student out from seeded placements.

    These are never the evaluation's initial states, unless `protocol` is `benchmark`.
    teacher: acts instead if `visited_by` says so, and is then a parent; not opened otherwise.
    Returns None after one share of the shards.
    """
    checkpoint = open_checkpoint(student)
    actor = checkpoint
    parents = {"student": checkpoint.digest}
    if settings.visited_by == "teacher":
        actor = open_checkpoint(teacher)
        parents["teacher"] = actor.digest
    require_environment(actor.facts, environment, str(actor.folder))
    recorded = {
        "seed": seed,
        "iteration": iteration,
        "sample": settings.model_dump(),
        "environment": environment.model_dump(),
        **host.compute_params,
    }
    groups = plan_groups(settings, environment.tasks, seed, iteration)
    with (
        draft(out, "trajectories", parents, recorded, host.share) as work,
        track(host, run, "sample", iteration, recorded) as log,
    ):
        policy = load_policy(actor, host.device, graphs=host.graphs)
        rollout = RolloutSettings(
            settings.horizon, settings.temperature, settings.observe_every, settings.inference_batch
        )
        collector = Collector(policy, environment, rollout, work, host)
        collector.write(groups, "sample")
        if not host.share.whole:
            log(collector.stats.as_metrics(), 0)
            return None
        episodes = [episode for shard in shards(work.folder) for episode in read_shard(shard)]
        facts = summarize_episodes(episodes)
        log({**facts, **collector.stats.as_metrics()}, 0)
        space = checkpoint.facts.action_space.digest
        return work.publish({**facts, "protocol": settings.protocol, "action_space": space})
