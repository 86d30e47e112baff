"""reinforce: student, trajectories -> checkpoint, eq. (2): GRPO on the student's own successes."""

from pathlib import Path

import torch

from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.learning import fsdp, grpo
from vla_opd.learning.grpo import GrpoLoss, measure_entropy
from vla_opd.learning.optimizer import Session
from vla_opd.learning.update import plan_budget, require_own_rollouts, update_student
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import ReinforceParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.seeds import derive


def run(
    *,
    run: str,
    seed: int,
    settings: ReinforceParams,
    iteration: str,
    depth: int,
    student: Path,
    trajectories: Path,
    out: Path,
    host: Host,
) -> Manifest:
    """Update the student. ValueError unless it sampled these trajectories.

    depth: iterations of this kind before this one.
    """
    checkpoint = open_checkpoint(student)
    visited = open_artifact(trajectories, "trajectories")
    require_own_rollouts(checkpoint, visited, trajectories)
    recorded = {
        "seed": seed,
        "iteration": iteration,
        "reinforce": settings.model_dump(),
        "device": host.device,
    }
    torch.set_num_threads(settings.threads)
    chunk = checkpoint.facts.action_space.chunk
    batch = grpo.read_batch(trajectories, visited.params["explore"], chunk)
    parents = {"student": checkpoint.digest, "trajectories": visited.digest}
    with (
        fsdp.shared_draft(out, "checkpoint", parents, recorded) as work,
        track(host, run, "reinforce", iteration, recorded) as log,
    ):
        policy = load_policy(checkpoint, host.device)
        before = measure_entropy(policy, batch, settings.batch_size)
        seed = derive(seed, "reinforce", iteration)
        budget = plan_budget(settings, depth, len(batch.usable))
        session = Session(f"reinforce {iteration}", work.scratch, log, host.dump_folder(run), seed)
        loss = GrpoLoss(batch, settings, seed)
        update_student(policy, loss, budget, settings, checkpoint, work, session)
        after = measure_entropy(policy, batch, settings.batch_size)
        metrics = {f"before/{name}": value for name, value in before.items()}
        metrics |= {f"after/{name}": value for name, value in after.items()}
        log(metrics, budget.end)
        return work.publish(
            {
                "checkpoint": checkpoint.facts.model_dump(),
                "before": before,
                "after": after,
                "depth": depth,
                "states": len(batch.usable),
            }
        )
