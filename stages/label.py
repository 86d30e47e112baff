"""label: teacher, trajectories -> labels, eq. (4): log-probabilities at every kept state.

With `label.expert`, a scripted expert is asked in the teacher's place, as in DAgger.
"""

from pathlib import Path

import torch

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.data.labels import summarize_outcomes, write_shard
from vla_opd.data.trajectory import shards
from vla_opd.experts import EXPERTS
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, LabelParams
from vla_opd.plugins import named_function
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.simulation.labeler import Labeler, Simulation
from vla_opd.simulation.pool import PoolSettings, SimulationStats


def run(
    *, run: str, settings: LabelParams, teacher: Path, trajectories: Path, out: Path, host: Host
) -> Manifest | None:
    """Store log p_T over all V bins, shard by shard.

    The store names the trajectories and the teacher's action space by digest. ValueError if the
    teacher's tokens mean other actions than the student's, unless `transfer` is set.
    Returns None after one share of the shards.
    """
    source = open_artifact(trajectories, "trajectories")
    checkpoint = open_checkpoint(teacher)
    environment = EnvironmentParams.model_validate(source.params["environment"])
    require_environment(checkpoint.facts, environment, str(teacher))
    space = checkpoint.facts.action_space
    student_space = source.facts["action_space"]
    if student_space != space.digest and not settings.transfer:
        raise ValueError(
            f"{trajectories}: the student's action space is {student_space[:12]}; "
            f"expected the teacher's, {space.digest[:12]} (or label.transfer true)"
        )
    if settings.expert is not None:
        named_function(settings.expert, EXPERTS, "label.expert")
    recorded = {"label": settings.model_dump(), "device": host.device}
    parents = {"teacher": checkpoint.digest, "trajectories": source.digest}
    with (
        draft(out, "labels", parents, recorded, host.share) as work,
        track(host, run, "label", out.name, recorded) as log,
    ):
        torch.set_num_threads(settings.threads)
        horizon = source.params["sample"]["horizon"]
        pool = PoolSettings(host.workers, host.timeout_s)
        simulation = Simulation(environment, horizon, pool, SimulationStats())
        policy = load_policy(checkpoint, host.device)
        labeler = Labeler(settings, policy, space, trajectories, simulation)
        names = [shard.name for shard in shards(trajectories)]
        missing = work.missing(names)
        total = len(host.share.select(names))
        progress = ProgressBar(
            labeler.label(missing),
            "label",
            scratch=work.scratch,
            total=total,
            initial=total - len(missing),
            unit="shard",
        )
        for name, labels in progress:
            if simulation.stats.environment:
                work.record_made_with(simulation.stats.environment)
            with work.part(name) as path:
                write_shard(path, labels)
            simulation.stats.states += len(labels.log_probs)
        if not host.share.whole:
            log(simulation.stats.as_metrics(), 0)
            return None
        paths = [work.folder / name for name in names]
        facts = summarize_outcomes(paths, int(source.facts["states"]))
        log({**facts, **simulation.stats.as_metrics()}, 0)
        return work.publish(
            {**facts, "action_space": space.model_dump(), "environment": environment.model_dump()}
        )
