"""explore: student -> trajectories for GRPO, eq. (2): for each task `prompts` placements, from each G = `group` episodes; a group is a shard."""

from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import Episode, read_shard, shard_name
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.seeds import derive
from vla_opd.simulation.collect import counts, fill
from vla_opd.simulation.rollout import Job, RolloutSettings, Tally


def run(params: Params, iteration: str, student: Path, out: Path, host: Host) -> Manifest | None:
    """Roll the student out from seeded placements, round after round until there are groups enough to learn from; groups of one outcome stay too.

    None once a share of the first round is made: whether there is another depends on all of that one.
    """
    checkpoint, its = open_checkpoint(student), params.explore
    require_environment(checkpoint.facts, params.environment, str(student))
    settings = {
        "seed": params.run.learning_seed,
        "iteration": iteration,
        "explore": its.model_dump(),
        "environment": params.environment.model_dump(),
        **host.computes,
    }
    tally, wanted = Tally(), its.prompts * len(params.environment.tasks)
    with (
        draft(out, "trajectories", {"student": checkpoint.digest}, settings, host.share) as work,
        track(host, params.run.name, "explore", iteration, settings) as log,
    ):
        policy = load_policy(checkpoint, host.device, graphs=host.graphs)
        rolled = RolloutSettings(its.horizon, its.temperature, policy.chunk, its.inference_batch)
        groups, useful = list[tuple[Episode, ...]](), 0
        for number in range(its.rounds):
            tried = _round(params, iteration, number)
            fill(
                tried,
                policy,
                params.environment,
                rolled,
                work,
                host,
                tally,
                f"explore, round {number + 1}",
            )
            if not host.share.whole:
                log(tally.as_metrics(), 0)
                return None
            groups += [
                read_shard(work.folder / shard) for shard in tried
            ]  # not what a killed attempt left of later rounds
            useful = sum(
                its.keeps(sum(episode.success for episode in group) / len(group))
                for group in groups
            )
            if useful >= wanted:
                break
        facts = {
            **counts([episode for group in groups for episode in group]),
            "groups": len(groups),
            "useful_groups": useful,
        }
        log({**facts, **tally.as_metrics()}, 0)
        return work.publish(
            {**facts, "protocol": "held-out", "action_space": checkpoint.facts.action_space.digest}
        )


def _round(params: Params, iteration: str, number: int) -> dict[str, list[Job]]:
    """The jobs of every shard of a round."""
    groups: dict[str, list[Job]] = {}
    prompts = params.explore.prompts
    for index, task in enumerate(params.environment.tasks):
        for prompt in range(number * prompts, (number + 1) * prompts):
            seed = derive(params.run.learning_seed, "explore", iteration, task, prompt)
            placement = Placement(task, "training", seed)
            groups[shard_name(index, prompt)] = [
                Job(placement, member, derive(seed, "member", member))
                for member in range(params.explore.group)
            ]
    return groups
