"""sample: student -> trajectories, eq. (3). For each task `prompts` placements, from each G = `group` episodes; a group is a shard."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import read_shard, shard_name, shards
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.section import EVALUATION_STATES
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.seeds import derive
from vla_opd.simulation.collect import counts, fill
from vla_opd.simulation.rollout import Job, RolloutSettings, Tally


def run(
    params: Params, iteration: str, student: Path, teacher: Path, out: Path, host: Host
) -> Manifest | None:
    """Roll the student out. Its placements are seeded resets, never the evaluation's initial states, unless `sample.protocol` says `benchmark`.

    None once a share of the shards is made.
    teacher: acts in the student's place if `sample.visited_by` says so, and is a parent then; not opened otherwise.
    """
    checkpoint = open_checkpoint(student)
    by_teacher = params.sample.visited_by == "teacher"
    actor = open_checkpoint(teacher) if by_teacher else checkpoint
    parents = {"student": checkpoint.digest} | ({"teacher": actor.digest} if by_teacher else {})
    require_environment(actor.facts, params.environment, str(actor.folder))
    settings = {
        "seed": params.run.learning_seed,
        "iteration": iteration,
        "sample": params.sample.model_dump(),
        "environment": params.environment.model_dump(),
        **host.computes,
    }
    groups = _groups(params, iteration)
    tally = Tally()
    with (
        draft(out, "trajectories", parents, settings, host.share) as work,
        track(host, params.run.name, "sample", iteration, settings) as log,
    ):
        its = params.sample
        rolled = RolloutSettings(
            its.horizon, its.temperature, its.observe_every, its.inference_batch
        )
        fill(
            groups,
            load_policy(actor, host.device, graphs=host.graphs),
            params.environment,
            rolled,
            work,
            host,
            tally,
            "sample",
        )
        if not host.share.whole:
            log(tally.as_metrics(), 0)
            return None
        found = counts([episode for shard in shards(work.folder) for episode in read_shard(shard)])
        log({**found, **tally.as_metrics()}, 0)
        return work.publish(
            {
                **found,
                "protocol": params.sample.protocol,
                "action_space": checkpoint.facts.action_space.digest,
            }
        )


def _groups(params: Params, iteration: str) -> dict[str, list[Job]]:
    """The jobs of every shard."""
    groups: dict[str, list[Job]] = {}
    for number, task in enumerate(params.environment.tasks):
        states = (
            _benchmark_states(params, iteration, task)
            if params.sample.protocol == "benchmark"
            else None
        )
        for prompt in range(params.sample.prompts):
            index = derive(params.run.learning_seed, "sample", iteration, task, prompt)
            placement = (
                Placement(task, "training", index)
                if states is None
                else Placement(task, "evaluation", int(states[prompt]))
            )
            jobs = [
                Job(placement, member, derive(index, "member", member))
                for member in range(params.sample.group)
            ]
            groups[shard_name(number, prompt)] = jobs
    return groups


def _benchmark_states(params: Params, iteration: str, task: str) -> Int[np.ndarray, " S"]:
    """The evaluation's own initial states in random order: no two prompts of an iteration share one."""
    return np.random.default_rng(
        derive(params.run.learning_seed, "sample", iteration, task, "states")
    ).permutation(EVALUATION_STATES)
