"""label: teacher, trajectories -> logits, eq. (4). The teacher is asked at every kept state of the rollouts."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from vla_opd.artifacts import Manifest, draft, open_artifact
from vla_opd.checkpoint import open_checkpoint, require_environment
from vla_opd.host import Host
from vla_opd.logits import normalised, write_shard
from vla_opd.params import EnvironmentParams, Params
from vla_opd.policies import Policy, load_policy
from vla_opd.tracking import track
from vla_opd.trajectory import Observations, read_states, shards


def run(params: Params, teacher: Path, trajectories: Path, out: Path, host: Host) -> Manifest:
    """Store log p_T over all V bins, shard by shard. The store names the trajectories and the teacher's action space by digest."""
    source, checkpoint = open_artifact(trajectories, "trajectories"), open_checkpoint(teacher)
    environment = EnvironmentParams.model_validate(source.params["environment"])
    require_environment(checkpoint.facts, environment, str(teacher))
    space = checkpoint.facts.action_space
    if source.facts["action_space"] != space.digest:
        raise ValueError(
            f"{trajectories}: the student's action space is {source.facts['action_space'][:12]}; expected the teacher's, {space.digest[:12]}"
        )
    settings = {"label": params.label.model_dump(), "device": host.device}
    parents = {"teacher": checkpoint.digest, "trajectories": source.digest}
    with draft(out, "logits", parents, settings) as work, track(host, params.run.name, "label", out.name, settings) as log:
        torch.set_num_threads(params.label.threads)
        policy = load_policy(checkpoint, host.device)
        names = [shard.name for shard in shards(trajectories)]
        missing = work.missing(names)
        for name in tqdm(missing, initial=len(names) - len(missing), total=len(names), desc="label", unit="shard", mininterval=5):
            with work.part(name) as path:
                write_shard(path, _label(policy, read_states([trajectories / name]).observations, params, name))
        queries = int(source.facts["states"])
        log({"teacher_queries": queries}, 0)
        return work.publish({"teacher_queries": queries, "action_space": space.model_dump(), "environment": environment.model_dump()})


def _label(policy: Policy, observations: Observations, params: Params, name: str) -> Float[np.ndarray, "N K V"]:
    """A shard's labels. FloatingPointError at the first state whose label is not finite."""
    batches = np.array_split(np.arange(len(observations)), max(1, -(-len(observations) // params.label.batch_size)))
    with torch.inference_mode():
        labels = np.concatenate([normalised(policy.logits(observations.at(rows)), params.label.dtype) for rows in batches])
    spoilt = np.flatnonzero(~np.isfinite(labels).all((1, 2)))
    if len(spoilt):
        raise FloatingPointError(
            f"the teacher's log-probabilities of {len(spoilt)} states of {name} are not finite in {params.label.dtype}, the first of them state "
            f"{spoilt[0]}; expected finite numbers (nothing of this shard is kept)"
        )
    return labels
