"""sample: student -> trajectories, eq. (3). For each task `prompts` placements, from each G = `group` episodes; a group is a shard."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from vla_opd.artifacts import Draft, Manifest, draft
from vla_opd.checkpoint import CheckpointFacts, open_checkpoint, require_environment
from vla_opd.envs.protocol import Placement
from vla_opd.host import Host
from vla_opd.params import EVALUATION_STATES, Params
from vla_opd.policies import Policy, load_policy
from vla_opd.rollout import Job, PoolSettings, RolloutSettings, Tally, rollout
from vla_opd.seeds import derive
from vla_opd.tracking import track
from vla_opd.trajectory import Episode, read_shard, shard_name, shards, write_shard


def run(params: Params, iteration: str, student: Path, out: Path, host: Host) -> Manifest:
    """Roll the student out. Its placements are seeded resets, never the evaluation's initial states, unless `sample.protocol` says `benchmark`."""
    checkpoint = open_checkpoint(student)
    require_environment(checkpoint.facts, params.environment, str(student))
    settings = {
        "seed": params.run.seed,
        "iteration": iteration,
        "sample": params.sample.model_dump(),
        "environment": params.environment.model_dump(),
        "device": host.device,
    }
    groups = _groups(params, iteration)
    tally = Tally()
    with (
        draft(out, "trajectories", {"student": checkpoint.digest}, settings) as work,
        track(host, params.run.name, "sample", iteration, settings) as log,
    ):
        _fill(params, checkpoint.facts, load_policy(checkpoint, host.device), groups, work, host, tally)
        episodes = [episode for shard in shards(work.folder) for episode in read_shard(shard)]
        counts = _summary(episodes)
        log({**counts, **tally.as_metrics()}, 0)
        return work.publish({**counts, "protocol": params.sample.protocol, "action_space": checkpoint.facts.action_space.digest})


def _groups(params: Params, iteration: str) -> dict[str, list[Job]]:
    """The jobs of every shard."""
    groups: dict[str, list[Job]] = {}
    for number, task in enumerate(params.environment.tasks):
        states = _benchmark_states(params, iteration, task) if params.sample.protocol == "benchmark" else None
        for prompt in range(params.sample.prompts):
            index = derive(params.run.seed, "sample", iteration, task, prompt)
            placement = Placement(task, "training", index) if states is None else Placement(task, "evaluation", int(states[prompt]))
            jobs = [Job(placement, member, derive(index, "member", member)) for member in range(params.sample.group)]
            groups[shard_name(number, prompt)] = jobs
    return groups


def _benchmark_states(params: Params, iteration: str, task: str) -> Int[np.ndarray, " S"]:
    """The evaluation's own initial states in random order: no two prompts of an iteration share one."""
    return np.random.default_rng(derive(params.run.seed, "sample", iteration, task, "states")).permutation(EVALUATION_STATES)


def _fill(params: Params, facts: CheckpointFacts, policy: Policy, groups: dict[str, list[Job]], work: Draft, host: Host, tally: Tally) -> None:
    """Write the shards that are not there yet, each as soon as its group is complete."""
    missing = {shard: groups[shard] for shard in work.missing(groups)}
    home = {(job.placement, job.member): shard for shard, jobs in missing.items() for job in jobs}
    arrived: dict[str, list[Episode]] = {shard: [] for shard in missing}
    total = params.sample.group * len(groups)
    settings = RolloutSettings(params.sample.horizon, params.sample.temperature, params.sample.observe_every, params.sample.inference_batch)
    jobs = [job for jobs in missing.values() for job in jobs]
    episodes = rollout(policy, jobs, params.environment, settings, PoolSettings(host.workers, host.timeout_s), tally)
    for episode in tqdm(episodes, total=total, initial=total - len(jobs), desc="sample", unit="episode", mininterval=5):
        shard = home[episode.placement, episode.member]
        arrived[shard].append(episode)
        work.remember(tally.environment)
        if len(arrived[shard]) == params.sample.group:
            with work.part(shard) as path:
                write_shard(path, sorted(arrived.pop(shard), key=lambda e: e.member), facts.action_space.chunk)


def _summary(episodes: list[Episode]) -> dict[str, float]:
    return {
        "episodes": len(episodes),
        "success": sum(e.success for e in episodes) / len(episodes),
        "env_steps": sum(e.steps for e in episodes),
        "states": sum(len(e.step) for e in episodes),
    }
