"""evaluate: checkpoint -> evaluation. Greedy, from the benchmark's fixed initial states, every episode recorded."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from vla_opd.artifacts import Draft, Manifest, draft
from vla_opd.checkpoint import open_checkpoint, require_environment
from vla_opd.envs.protocol import Placement
from vla_opd.evaluation import EPISODES, Record, score
from vla_opd.host import Host
from vla_opd.params import Params
from vla_opd.policies import Policy, load_policy
from vla_opd.rollout import Job, PoolSettings, RolloutSettings, Tally, rollout
from vla_opd.seeds import derive
from vla_opd.tracking import track


def run(params: Params, checkpoint: Path, out: Path, host: Host) -> Manifest:
    """Score a checkpoint: `episodes.jsonl` holds a record an episode, the manifest the success per task and overall with Wilson intervals.

    Overall are the run's own tasks; those of `evaluate.unseen` have a score of their own.
    """
    policy, how = open_checkpoint(checkpoint), params.evaluate
    if not how.allow_mismatch:
        require_environment(policy.facts, params.environment, str(checkpoint))
    settings = {
        "seed": params.run.seed,
        "evaluate": how.model_dump(exclude_none=True),
        "environment": params.environment.model_dump(),
        "device": host.device,
    }
    tally = Tally()
    with (
        draft(out, "evaluation", {"checkpoint": policy.digest}, settings) as work,
        track(host, params.run.name, "evaluate", out.name, settings) as log,
    ):
        records = _records(params, load_policy(policy, host.device), work, host, tally)
        with work.part(EPISODES) as path:
            path.write_text("".join(_line(record) for record in records))
        tasks = {task: score((r.success for r in records if r.task == task), how.confidence).model_dump() for task in _tasks(params)}
        overall = score((r.success for r in records if r.task in params.environment.tasks), how.confidence).model_dump()
        log({**overall, **tally.as_metrics()}, 0)
        facts = {"overall": overall, "tasks": tasks, "env_steps": sum(r.steps for r in records), "horizon": how.horizon}
        if how.unseen:
            facts["unseen"] = score((r.success for r in records if r.task in how.unseen), how.confidence).model_dump()
        return work.publish(facts)


def _tasks(params: Params) -> tuple[str, ...]:
    """Those of the run, then those that it doesn't train on."""
    return (*params.environment.tasks, *(params.evaluate.unseen or ()))


def _records(params: Params, policy: Policy, work: Draft, host: Host, tally: Tally) -> list[Record]:
    """All records in order of task and state; finished episodes of a killed run are read from the draft's journal."""
    how, tasks = params.evaluate, _tasks(params)
    journal = work.scratch / "journal.jsonl"
    known = {(r.task, r.state): r for r in _read_journal(journal)}
    wanted = [(task, how.first_state + i) for task in tasks for i in range(how.episodes)]
    jobs = [Job(Placement(task, "evaluation", state), 0, derive(task, state)) for task, state in wanted if (task, state) not in known]
    settings = RolloutSettings(how.horizon, None, None, how.inference_batch)
    if known:
        print(f"{work.target.name}: reusing {len(known)} of {len(wanted)} episodes", file=sys.stderr)
    environment = params.environment.model_copy(update={"tasks": tasks})
    episodes = rollout(policy, jobs, environment, settings, PoolSettings(host.workers, host.timeout_s), tally)
    with journal.open("a") as stream:
        for episode in tqdm(episodes, total=len(wanted), initial=len(known), desc="evaluate", unit="episode", mininterval=5):
            work.remember(tally.environment)
            record = Record(
                task=episode.placement.task,
                instruction=episode.instruction,
                state=episode.placement.index,
                success=episode.success,
                steps=episode.steps,
            )
            known[record.task, record.state] = record
            stream.write(_line(record))
            stream.flush()
    return [known[key] for key in wanted]


def _line(record: Record) -> str:
    return json.dumps(record.model_dump(), sort_keys=True) + "\n"


def _read_journal(path: Path) -> list[Record]:
    """The records of whole lines; a line cut by a kill is dropped, and its episode run again."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole, _, cut = text.rpartition("\n")
    if cut:
        path.write_text(whole + "\n" if whole else "")
    return [Record.model_validate_json(line) for line in whole.splitlines()]
