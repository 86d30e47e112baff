"""evaluate: checkpoint -> evaluation. Greedy, from the benchmark's fixed initial states, every episode recorded."""

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from vla_opd.analysis.comparison import SequentialTest
from vla_opd.analysis.evaluation import EPISODES, Record, score
from vla_opd.artifacts.draft import Draft, draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import Episode
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import EvaluateParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import Policy, load_policy
from vla_opd.seeds import derive
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, Tally, rollout


def run(params: Params, checkpoint: Path, out: Path, host: Host) -> Manifest | None:
    """Score a checkpoint: `episodes.jsonl` holds a record an episode, the manifest the success per task and overall with Wilson intervals.

    Overall are the run's own tasks; those of `evaluate.unseen` have a score of their own. With `evaluate.decide` it stops as soon as that is decided.
    None once a share of the episodes is played.
    """
    policy, how = open_checkpoint(checkpoint), params.evaluate
    if not how.allow_mismatch:
        require_environment(policy.facts, params.environment, str(checkpoint))
    settings = {
        "seed": params.run.seed,
        "evaluate": how.model_dump(exclude_none=True),
        "environment": params.environment.model_dump(),
        **host.computes,
    }
    tally = Tally()
    with (
        draft(out, "evaluation", {"checkpoint": policy.digest}, settings, host.share) as work,
        track(host, params.run.name, "evaluate", out.name, settings) as log,
    ):
        records, decided = _records(
            params, load_policy(policy, host.device, graphs=host.graphs), work, host, tally
        )
        if not host.share.whole:
            log(tally.as_metrics(), 0)
            return None
        with work.part(EPISODES) as path:
            path.write_text("".join(_line(record) for record in records))
        by_task = {task: [r.success for r in records if r.task == task] for task in _tasks(params)}
        tasks = {
            task: score(outcomes, how.confidence).model_dump()
            for task, outcomes in by_task.items()
            if outcomes
        }
        overall = score(
            (r.success for r in records if r.task in params.environment.tasks), how.confidence
        ).model_dump()
        log({**overall, **tally.as_metrics()}, 0)
        facts: dict[str, Any] = {
            "overall": overall,
            "tasks": tasks,
            "env_steps": sum(r.steps for r in records),
            "horizon": how.horizon,
        }
        if how.unseen:
            facts["unseen"] = score(
                (r.success for r in records if r.task in how.unseen), how.confidence
            ).model_dump()
        if how.decide:
            facts["decided"] = decided
        return work.publish(facts)


def _tasks(params: Params) -> tuple[str, ...]:
    """Those of the run, then those that it doesn't train on."""
    return (*params.environment.tasks, *(params.evaluate.unseen or ()))


def _records(
    params: Params, policy: Policy, work: Draft, host: Host, tally: Tally
) -> tuple[list[Record], float | None]:
    """All records in order of task and state, and no decision; or those up to a decision, and for which rate it was, if there came one.

    Finished episodes, of a killed run or of those who have shares, are read from the journals in the draft.
    """
    how, tasks = params.evaluate, _tasks(params)
    journal, wanted = (
        work.scratch / f"journal-{secrets.token_hex(4)}.jsonl",
        host.share.of(_wanted(how, tasks)),
    )
    mine = set(wanted)
    known = {
        (r.task, r.state): r for r in _read_journals(work.scratch) if (r.task, r.state) in mine
    }
    if known:
        print(
            f"{work.target.name}: reusing {len(known)} of {len(wanted)} episodes", file=sys.stderr
        )
    if (decision := _decision(how, wanted, known)) is not None:
        return decision
    jobs = [
        Job(Placement(task, "evaluation", state), 0, derive(task, state))
        for task, state in wanted
        if (task, state) not in known
    ]
    settings = RolloutSettings(how.horizon, None, None, how.inference_batch)
    environment = params.environment.model_copy(update={"tasks": tasks})
    episodes = rollout(
        policy, jobs, environment, settings, PoolSettings(host.workers, host.timeout_s), tally
    )
    with journal.open("a") as stream, closing(episodes):
        for episode in tqdm(
            episodes,
            total=len(wanted),
            initial=len(known),
            desc="evaluate",
            unit="episode",
            mininterval=5,
        ):
            work.remember(tally.environment)
            record = _record(episode)
            known[record.task, record.state] = record
            stream.write(_line(record))
            stream.flush()
            if (decision := _decision(how, wanted, known)) is not None:
                return decision
    return [known[key] for key in wanted], None


def _wanted(how: EvaluateParams, tasks: Sequence[str]) -> list[tuple[str, int]]:
    """Tasks and states: task after task; for a decision, state after state, so that every task has its say early."""
    states = range(how.first_state, how.first_state + how.episodes)
    return (
        [(task, state) for state in states for task in tasks]
        if how.decide
        else [(task, state) for task in tasks for state in states]
    )


def _decision(
    how: EvaluateParams, wanted: Sequence[tuple[str, int]], known: Mapping[tuple[str, int], Record]
) -> tuple[list[Record], float] | None:
    """The records that decide, and for which rate, if they do: the first ones that are wanted, whichever others are there too."""
    if how.decide is None:
        return None
    there = [known[key] for key in takewhile(known.__contains__, wanted)]
    rate, count = SequentialTest(*how.decide, how.confidence).decide(
        record.success for record in there
    )
    return None if rate is None else (there[:count], rate)


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


def _read_journals(folder: Path) -> Iterator[Record]:
    """The records of whole lines, each process's of its own; a line cut by a kill is passed over, and its episode run again."""
    for path in sorted(folder.glob("journal-*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValidationError):
                yield Record.model_validate_json(line)
