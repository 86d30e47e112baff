"""The flow `study`: every arm with every seed a subflow of its own, from the same teacher and student, then one table of all of them.

Each member is brought up to date by the flow `opd` in a folder and a process of its own (see `flows.members`), so a study that is stopped goes on
where it was, and members can run side by side.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.flow_engine import run_flow_in_subprocess
from prefect.runtime import flow_run
from pydantic import Field

from flows import presence, terminal
from flows.members import STUDIES, TABLE, Member, go_on, members, prepare, reference
from flows.store import ROOT
from flows.train import opd
from vla_opd import study_page
from vla_opd.artifacts import Manifest, draft
from vla_opd.host import METRICS
from vla_opd.lifeline import die_with_parent
from vla_opd.params import Params, load
from vla_opd.results import discard, read_run
from vla_opd.study import FILES, joined, member_rows, read, shared_rows, write
from vla_opd.tracking import executions

LOG = "study.log"
DONE = Path(".done")  # there while its last process has come to its end; Prefect ends a process whose flow has failed with exit code 0


@flow(name="study", flow_run_name="{name}")
def study(
    name: str,
    arms: list[str] | None = None,
    seeds: list[int] | None = None,
    parallel: Annotated[int, Field(ge=1)] = 1,
) -> None:
    """Bring a study of params.yaml up to date, and its table of what is done.

    Args:
        name: of the study.
        arms: only these; all if none are named.
        seeds: only these.
        parallel: members that run at the same time; each gets its share of the cores for its simulators, unless OPD_WORKERS says otherwise.

    Raises:
        ValueError: if there is no such study, arm or seed, or an arm's settings make no valid run; nothing is run then.
        RuntimeError: names the members that failed; the others are done.
    """
    run = load()
    wanted = members(name, run, arms or (), seeds or ())
    with presence.held(str(flow_run.get_id())):
        opd.with_options(flow_run_name="reference")(targets=reference(run))
        failed = _bring_all(wanted, run, parallel)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} members failed: {'; '.join(f'{one} (see {one.folder / LOG})' for one in failed)}")


def _bring_all(wanted: Sequence[Member], run: Params, parallel: int) -> list[Member]:
    """Bring members up to date, and table and page after each. Returns those that failed."""
    for member in wanted:  # all of them first: params.yaml may be another by the time the last one's turn comes
        prepare(member, run)
    failed: list[Member] = []
    for member in _side_by_side(wanted, run, parallel):
        failed += [] if (member.folder / DONE).is_file() else [member]
        table = tabulate.with_options(task_run_name="table")(member.study, run)
        if table.facts["members"]:
            page.with_options(task_run_name="page")(member.study, run)
    return failed


def _side_by_side(wanted: Sequence[Member], run: Params, parallel: int) -> Iterator[Member]:
    """Each member once its process has ended, well or not. One that goes on from another waits for it."""
    workers = os.environ.get("OPD_WORKERS") or str(max(1, len(os.sched_getaffinity(0)) // parallel))
    path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])  # a module of this folder is found from theirs too
    environment: dict[str, str | None] = {"OPD_WORKERS": workers, "PYTHONPATH": path}
    its = run.studies[wanted[0].study]
    waiting, running = list(wanted), dict[Member, tuple[SpawnProcess, float]]()
    while waiting or running:
        ready = [one for one in waiting if one.before(its) not in (*waiting, *running)]
        for member in ready[: parallel - len(running)]:
            waiting.remove(member)
            go_on(member, run)
            (member.folder / DONE).unlink(missing_ok=True)
            parameters = {"folders": [str(one.folder.resolve()) for one in member.lineage(its)], "arm": member.arm, "seed": member.seed}
            parameters |= {"own_student": its.own_student(member.arm), "keep_rollouts": its.keep_rollouts}
            named = member_run.with_options(flow_run_name=str(member))
            running[member] = run_flow_in_subprocess(named, parameters=parameters, env=environment), time.monotonic()
        time.sleep(0.2)
        for member, (process, began) in list(running.items()):
            if process.exitcode is not None:
                del running[member]
                mark, took = "✓" if (member.folder / DONE).is_file() else "✗", terminal.clock(time.monotonic() - began)
                print(f"  {mark} {member!s:<32} {took:>7}", flush=True)
                yield member


@flow(name="member", validate_parameters=False)
def member_run(folders: list[str], arm: str, seed: int, *, own_student: bool, keep_rollouts: bool) -> None:
    """Bring one member up to date, and note its rows of the study's table. What it says goes to `study.log` in its folder.

    folders: its own, then those of the members that it goes on from, which know how long their stages took.
    """
    die_with_parent()
    os.chdir(folders[0])
    with Path(LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    run = load()
    opd(targets=[f"evaluate@{name}" for name in run.evaluations])
    root = ROOT / run.run.name
    known = [one for folder in folders for one in executions(Path(folder) / METRICS / run.run.name)]
    seconds = {one.digest: (one.ended - one.began).total_seconds() for one in known}
    temporary = Path(f".{TABLE}")
    write(member_rows(read_run(run, root), arm, seed, seconds, own_student=own_student), temporary)
    shutil.rmtree(TABLE, ignore_errors=True)
    temporary.rename(TABLE)
    if not keep_rollouts:
        _discard_rollouts(root)
    DONE.touch()


def _discard_rollouts(root: Path) -> None:
    """What the iterations saw, and the labels, in the folder and in DVC's cache, which is this member's own."""
    for kind in ("trajectories", "logits"):
        for folder in sorted((root / kind).glob("[!.]*")):
            discard(root, kind, folder.name)
    shutil.rmtree(".dvc/cache", ignore_errors=True)


@task(cache_policy=NO_CACHE)
def tabulate(name: str, run: Params) -> Manifest:
    """`artifacts/<run>/studies/<name>`: the rows of all members that are done, in the order of arms and seeds, and those of what they share."""
    root = ROOT / run.run.name
    folders = [STUDIES / name / arm / str(seed) / TABLE for arm in run.studies[name].arms for seed in run.studies[name].seeds]
    done = [read(folder) for folder in folders if folder.is_dir()]
    shared = read_run(run.model_copy(update={"iterations": {}, "reinforcements": {}, "evaluations": run.reference}), root)
    table = joined(done)
    parents = {f"checkpoints/{checkpoint}": manifest.digest for checkpoint, manifest in shared.checkpoints.items()}
    with draft(root / "studies" / name, "study", parents, {"parameters": run.model_dump(mode="json")}) as work:
        write(table.with_shared(shared_rows(shared.evaluations.values())), work.scratch / "table")
        for file in FILES.values():
            with work.part(file) as path:
                (work.scratch / "table" / file).rename(path)
        facts = {name: _made(manifest) for name, manifest in shared.checkpoints.items()}
        return work.publish({**facts, "members": len(done), "episodes": len(table.episodes), "iterations": len(table.updates)})


def _made(checkpoint: Manifest) -> dict[str, int]:
    """What a fine-tuned checkpoint cost."""
    return {"episodes": checkpoint.facts["episodes"], "optimizer_steps": checkpoint.params["checkpoint"]["steps"]}


@task(cache_policy=NO_CACHE)
def page(name: str, run: Params) -> Manifest:
    """`artifacts/<run>/report/<name>`: the page of the table."""
    return study_page.run(ROOT / run.run.name, name)
