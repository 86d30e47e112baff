"""finetune: demonstrations -> checkpoint, by supervised learning, eq. (1).

The base (a policy pretrained on other tasks), the teacher (many demonstrations) and the student
(one per task) differ in settings and parent only.
"""

from pathlib import Path

import torch

from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.data.trajectory import read_states, shards
from vla_opd.learning import fsdp, imitation
from vla_opd.learning.imitation import ImitationLoss
from vla_opd.learning.optimizer import Session, train
from vla_opd.learning.update import write_checkpoint
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, FinetuneParams, PolicyParams, PretrainedParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.seeds import derive


def run(
    *,
    run: str,
    seed: int,
    settings: FinetuneParams,
    policy: PolicyParams,
    environment: EnvironmentParams,
    name: str,
    recipe: PretrainedParams,
    demonstrations: Path,
    parent: Path | None,
    out: Path,
    host: Host,
) -> Manifest:
    """Train a checkpoint on (some of) a set of demonstrations, from its parent's weights if any.

    policy: the architecture of a checkpoint without a parent.
    """
    if recipe.seed is not None:
        seed = recipe.seed
    source = open_artifact(demonstrations, "demonstrations")
    origin = None if parent is None else open_checkpoint(parent)
    parents = {"demonstrations": source.digest}
    if origin is not None:
        parents["parent"] = origin.digest
    recorded = {
        "seed": seed,
        "name": name,
        "checkpoint": {"parent": None, **recipe.model_dump()},
        "finetune": settings.model_dump(),
        "policy": policy.model_dump() if origin is None else None,
        "environment": environment.model_dump(exclude={"tasks"}),
        "device": host.device,
    }
    torch.set_num_threads(settings.threads)
    states = read_states(shards(demonstrations), recipe.per_task)
    facts = imitation.describe_checkpoint(states, policy, environment, origin)
    first = derive(seed, "finetune", name)
    with (
        fsdp.shared_draft(out, "checkpoint", parents, recorded) as work,
        track(host, run, "finetune", name, recorded) as log,
    ):
        model = imitation.initial_policy(facts, origin, first, host.device)
        bins = model.encode(states.labels)
        targets = imitation.smoothed_targets(facts.action_space.bins, settings.smoothing)
        order = derive(seed, "finetune", name, "order")
        loss = ImitationLoss(states, bins, targets, settings.batch_size, order)
        adapter = None if origin is None else settings.lora
        lora.prepare(model, adapter, first, "finetune")
        budget = imitation.plan_budget(settings, recipe)
        session = Session(f"finetune {name}", work.scratch, log, host.dump_folder(run))
        with (
            fsdp.sharded(model) as shared,
            lora.recomputing(shared, enabled=settings.gradient_checkpointing),
        ):
            rows, _ = train(shared, loss, budget, session)
        write_checkpoint(work, model, origin, rows)
        return work.publish(
            {
                "checkpoint": facts.model_dump(),
                "states": len(states),
                "episodes": int(states.episode[-1]) + 1,
            }
        )
