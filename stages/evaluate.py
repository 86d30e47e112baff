"""evaluate: checkpoint -> evaluation.

Greedy rollouts from the benchmark's fixed initial states, every episode recorded.
"""

from contextlib import closing
from pathlib import Path

from vla_opd.analysis.evaluation import collect, plan_states, score_records
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.records import EPISODES, write_records
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, EvaluateParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.simulation.evaluate import play_states
from vla_opd.simulation.rollout import SimulationStats


def run(
    *,
    run: str,
    seed: int,
    settings: EvaluateParams,
    environment: EnvironmentParams,
    checkpoint: Path,
    out: Path,
    host: Host,
) -> Manifest | None:
    """Score a checkpoint.

    `episodes.jsonl` has one record per episode, the manifest the success per task and overall with
    Wilson intervals. Overall are the run's own tasks; those of `unseen` have a score of their own.
    With `decide`, it stops as soon as the episodes decide.
    Returns None after one share of the episodes.
    """
    policy = open_checkpoint(checkpoint)
    if not settings.allow_mismatch:
        require_environment(policy.facts, environment, str(checkpoint))
    recorded = {
        "seed": seed,
        "evaluate": settings.model_dump(exclude_none=True),
        "environment": environment.model_dump(),
        **host.compute_params,
    }
    trained = environment.tasks
    evaluated = environment.model_copy(update={"tasks": (*trained, *(settings.unseen or ()))})
    states = host.share.select(plan_states(settings, evaluated.tasks))
    stats = SimulationStats()
    with (
        draft(out, "evaluation", {"checkpoint": policy.digest}, recorded, host.share) as work,
        track(host, run, "evaluate", out.name, recorded) as log,
    ):
        model = load_policy(policy, host.device, graphs=host.graphs)
        episodes = play_states(states, model, settings, evaluated, work, host, stats)
        with closing(episodes):
            records, decided = collect(episodes, states, settings)
        if not host.share.whole:
            log(stats.as_metrics(), 0)
            return None
        with work.part(EPISODES) as path:
            write_records(records, path)
        facts = score_records(records, settings, trained)
        if settings.decide:
            facts["decided"] = decided
        log({**facts["overall"], **stats.as_metrics()}, 0)
        return work.publish(facts)
