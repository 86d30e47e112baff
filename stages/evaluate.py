"""evaluate: checkpoint -> evaluation.

Greedy rollouts from the benchmark's fixed initial states, every episode recorded.
"""

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vla_opd.analysis.comparison import SequentialTest
from vla_opd.analysis.evaluation import EPISODES, Record, score
from vla_opd.artifacts.draft import Draft, draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.data.trajectory import Episode
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import EnvironmentParams, EvaluateParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import load_policy
from vla_opd.policies.policy import Policy
from vla_opd.seeds import derive
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, SimulationStats, rollout

State = tuple[str, int]  # a task, and the number of one of its initial states


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
    unseen = settings.unseen or ()
    evaluated = environment.model_copy(update={"tasks": (*environment.tasks, *unseen)})
    stats = SimulationStats()
    with (
        draft(out, "evaluation", {"checkpoint": policy.digest}, recorded, host.share) as work,
        track(host, run, "evaluate", out.name, recorded) as log,
    ):
        model = load_policy(policy, host.device, graphs=host.graphs)
        records, decided = _play(model, settings, evaluated, work, host, stats)
        if not host.share.whole:
            log(stats.as_metrics(), 0)
            return None
        with work.part(EPISODES) as path:
            path.write_text("".join(_line(record) for record in records))
        facts = _score(records, settings, evaluated.tasks, environment.tasks)
        if settings.decide:
            facts["decided"] = decided
        log({**facts["overall"], **stats.as_metrics()}, 0)
        return work.publish(facts)


def _score(
    records: Sequence[Record],
    settings: EvaluateParams,
    tasks: Sequence[str],
    trained: Sequence[str],
) -> dict[str, Any]:
    """Return the success per task, overall, and on the unseen tasks. trained: the run's tasks."""

    def success(names: Sequence[str]) -> dict[str, float]:
        outcomes = [record.success for record in records if record.task in names]
        return score(outcomes, settings.confidence).model_dump()

    played = {record.task for record in records}
    facts: dict[str, Any] = {
        "overall": success(trained),
        "tasks": {task: success([task]) for task in tasks if task in played},
        "env_steps": sum(record.steps for record in records),
        "horizon": settings.horizon,
    }
    if settings.unseen:
        facts["unseen"] = success(settings.unseen)
    return facts


def _play(
    policy: Policy,
    settings: EvaluateParams,
    environment: EnvironmentParams,
    work: Draft,
    host: Host,
    stats: SimulationStats,
) -> tuple[list[Record], float | None]:
    """Return all records in order of task and state, or those up to a decision, and its rate.

    Finished episodes, of a killed run or of other shares, are read from the journals in the draft.
    """
    planned = host.share.select(plan_states(settings, environment.tasks))
    in_share = set(planned)
    journals = _read_journals(work.scratch)
    records = {state: record for state, record in journals if state in in_share}
    if records:
        count = len(records)
        print(f"{work.target.name}: reusing {count} of {len(planned)} episodes", file=sys.stderr)
    decision = decide(settings, planned, records)
    if decision is not None:
        return decision
    jobs = [
        Job(Placement(task, "evaluation", state), 0, derive(task, state))
        for task, state in planned
        if (task, state) not in records
    ]
    greedy = RolloutSettings(settings.horizon, None, None, settings.inference_batch)
    pool = PoolSettings(host.workers, host.timeout_s)
    episodes = rollout(policy, jobs, environment, greedy, pool, stats)
    progress = ProgressBar(
        episodes,
        "evaluate",
        scratch=work.scratch,
        total=len(planned),
        initial=len(records),
        unit="episode",
    )
    journal = work.scratch / f"journal-{secrets.token_hex(4)}.jsonl"
    with journal.open("a") as stream, closing(episodes):
        for episode in progress:
            work.record_made_with(stats.environment)
            record = _record(episode)
            records[record.task, record.state] = record
            stream.write(_line(record))
            stream.flush()
            decision = decide(settings, planned, records)
            if decision is not None:
                return decision
    return [records[state] for state in planned], None


def plan_states(settings: EvaluateParams, tasks: Sequence[str]) -> list[State]:
    """Return the states to play, task after task.

    For a decision, state after state, so that every task contributes early.
    """
    states = range(settings.first_state, settings.first_state + settings.episodes)
    if settings.decide:
        return [(task, state) for state in states for task in tasks]
    return [(task, state) for task in tasks for state in states]


def decide(
    settings: EvaluateParams, planned: Sequence[State], records: Mapping[State, Record]
) -> tuple[list[Record], float] | None:
    """Return the records that decide, and the rate they decide for; None if they do not.

    The first planned ones are used, whichever others have been played.
    """
    if settings.decide is None:
        return None
    first = [records[state] for state in takewhile(records.__contains__, planned)]
    test = SequentialTest(*settings.decide, settings.confidence)
    rate, count = test.decide(record.success for record in first)
    return None if rate is None else (first[:count], rate)


def _record(episode: Episode) -> Record:
    return Record(
        task=episode.placement.task,
        instruction=episode.instruction,
        state=episode.placement.index,
        success=episode.success,
        steps=episode.steps,
    )


def _line(record: Record) -> str:
    return json.dumps(record.model_dump(), sort_keys=True) + "\n"


def _read_journals(folder: Path) -> Iterator[tuple[State, Record]]:
    """Yield the records of complete lines; an episode whose line a kill cut off is played again."""
    for path in sorted(folder.glob("journal-*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValidationError):
                record = Record.model_validate_json(line)
                yield (record.task, record.state), record
