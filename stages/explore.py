"""explore: student -> trajectories for GRPO, eq. (2).

For each task `prompts` placements, and G = `group` episodes from each; a group is a shard.
"""

from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import Episode, read_shard
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, ExploreParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.simulation.collect import Collector, summarize_episodes
from vla_opd.simulation.placements import plan_round
from vla_opd.simulation.rollout import RolloutSettings


def run(
    *,
    run: str,
    seed: int,
    settings: ExploreParams,
    environment: EnvironmentParams,
    iteration: str,
    student: Path,
    out: Path,
    host: Host,
) -> Manifest | None:
    """Roll the student out from seeded placements, in rounds, until enough groups are useful.

    Groups of one outcome are kept, too. Returns None after one share of the first round: a second
    round depends on the whole of the first.
    """
    checkpoint = open_checkpoint(student)
    require_environment(checkpoint.facts, environment, str(student))
    recorded = {
        "seed": seed,
        "iteration": iteration,
        "explore": settings.model_dump(),
        "environment": environment.model_dump(),
        **host.compute_params,
    }
    parents = {"student": checkpoint.digest}
    with (
        draft(out, "trajectories", parents, recorded, host.share) as work,
        track(host, run, "explore", iteration, recorded) as log,
    ):
        policy = load_policy(checkpoint, host.device, graphs=host.graphs)
        rollout = RolloutSettings(
            settings.horizon, settings.temperature, policy.chunk, settings.inference_batch
        )
        collector = Collector(policy, environment, rollout, work, host)
        groups: list[tuple[Episode, ...]] = []
        useful = 0
        for number in range(settings.rounds):
            jobs = plan_round(settings, environment.tasks, seed, iteration, number)
            label = f"explore, round {number + 1}"
            collector.write(jobs, label)
            if not host.share.whole:
                log(collector.stats.as_metrics(), 0)
                return None
            # Not every shard of the draft: a killed attempt may have left some of later rounds.
            groups += [read_shard(work.folder / shard) for shard in jobs]
            useful = sum(settings.keeps(success_rate(group)) for group in groups)
            if useful >= settings.prompts * len(environment.tasks):
                break
        facts = {
            **summarize_episodes([episode for group in groups for episode in group]),
            "groups": len(groups),
            "useful_groups": useful,
        }
        log({**facts, **collector.stats.as_metrics()}, 0)
        space = checkpoint.facts.action_space.digest
        return work.publish({**facts, "protocol": "held-out", "action_space": space})


def success_rate(group: tuple[Episode, ...]) -> float:
    """Return the mean success of a group."""
    return sum(episode.success for episode in group) / len(group)
