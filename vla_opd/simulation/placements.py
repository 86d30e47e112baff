"""The placements that the students of an iteration start from, as jobs of every shard."""

import numpy as np
from jaxtyping import Int

from vla_opd.data.trajectory import shard_name
from vla_opd.envs.protocol import Placement
from vla_opd.params.section import EVALUATION_STATES
from vla_opd.params.stages import ExploreParams, SampleParams
from vla_opd.seeds import derive
from vla_opd.simulation.collect import group_jobs
from vla_opd.simulation.rollout import Job


def plan_groups(
    settings: SampleParams, tasks: tuple[str, ...], seed: int, iteration: str
) -> dict[str, list[Job]]:
    """Return the jobs of every shard of `sample`."""
    groups: dict[str, list[Job]] = {}
    for number, task in enumerate(tasks):
        states = _shuffle_states(seed, iteration, task)
        for prompt in range(settings.prompts):
            index = derive(seed, "sample", iteration, task, prompt)
            if settings.protocol == "benchmark":
                placement = Placement(task, "evaluation", int(states[prompt]))
            else:
                placement = Placement(task, "training", index)
            groups[shard_name(number, prompt)] = group_jobs(placement, settings.group, index)
    return groups


def _shuffle_states(seed: int, iteration: str, task: str) -> Int[np.ndarray, " S"]:
    """Return the evaluation's initial states in random order, for `protocol: benchmark`.

    No two prompts of an iteration share a state.
    """
    random = np.random.default_rng(derive(seed, "sample", iteration, task, "states"))
    return random.permutation(EVALUATION_STATES)


def plan_round(
    settings: ExploreParams, tasks: tuple[str, ...], seed: int, iteration: str, number: int
) -> dict[str, list[Job]]:
    """Return the jobs of every shard of a round of `explore`."""
    groups: dict[str, list[Job]] = {}
    for index, task in enumerate(tasks):
        for prompt in range(number * settings.prompts, (number + 1) * settings.prompts):
            group_seed = derive(seed, "explore", iteration, task, prompt)
            placement = Placement(task, "training", group_seed)
            jobs = group_jobs(placement, settings.group, group_seed)
            groups[shard_name(index, prompt)] = jobs
    return groups
