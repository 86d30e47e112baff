"""The flow `study`: every arm with every seed a subflow of its own, from the same teacher and student, then one table of all of them.

Each member is brought up to date by the flow `opd` in a folder and a process of its own (see `flows.projects`), so a study that is stopped goes on
where it was, and members can run side by side.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.flow_engine import run_flow_in_subprocess
from prefect.runtime import flow_run
from pydantic import Field, ValidationError

from flows import terminal
from flows.prefect_server import liveness
from flows.projects import (
    DONE,
    TABLE,
    Member,
    crowded,
    environment,
    fingerprint,
    go_on,
    hand_over,
    is_done,
    made_alike,
    members,
    prepare,
    reference,
)
from flows.train import opd
from vla_opd.analysis import study_page
from vla_opd.analysis.finished_run import discard, read_run
from vla_opd.analysis.study_table import Table, joined, member_rows, read, shared_rows, write
from vla_opd.artifacts.draft import BusyError, Draft, draft
from vla_opd.artifacts.manifest import MANIFEST, Manifest, open_artifact
from vla_opd.lineage.store import ROOT
from vla_opd.machine.host import METRICS
from vla_opd.machine.parent_death import die_with_parent
from vla_opd.machine.tracking import executions
from vla_opd.params.load import load
from vla_opd.params.run import Params

LOG = "study.log"


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
    for member in wanted:  # before anything is made: a mistake in the last of them is one now
        prepare(member, run)
    if told := crowded(run, parallel):
        print(f"  {told}", file=sys.stderr)
    with liveness.held(str(flow_run.get_id())):
        opd.with_options(flow_run_name="reference")(targets=reference(run))
        for member in wanted:
            hand_over(member, run)
        with closing(_side_by_side(wanted, run, parallel)) as ended:
            failed = [member for member in ended if not _noted(member, run)]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} members failed: {'; '.join(f'{one} (see {one.folder / LOG})' for one in failed)}"
        )


def _noted(member: Member, run: Params) -> bool:
    """Bring table and page up to date once a member has ended. Whether it is done."""
    try:
        if tabulate.with_options(task_run_name="table")(member.study, run).facts["members"]:
            page.with_options(task_run_name="page")(member.study, run)
    except BusyError as error:  # another command of this study: it has the members that are done, and so will the next
        print(f"  {error}", file=sys.stderr)
    return is_done(member, run)


def _side_by_side(wanted: Sequence[Member], run: Params, parallel: int) -> Generator[Member]:
    """Each member once its process has ended, well or not. One that goes on from another waits for it. Closed early, it ends the processes."""
    its = run.studies[wanted[0].study]
    waiting, running = list(wanted), dict[Member, tuple[SpawnProcess | None, float]]()
    try:
        while waiting or running:
            ready = [one for one in waiting if one.before(its) not in (*waiting, *running)]
            for member in ready[: parallel - len(running)]:
                waiting.remove(member)
                running[member] = _started(member, run, parallel), time.monotonic()
            time.sleep(0.2)
            for member, (process, began) in list(running.items()):
                if process is None or process.exitcode is not None:
                    del running[member]
                    mark, took = (
                        "✓" if is_done(member, run) else "✗",
                        terminal.clock(time.monotonic() - began),
                    )
                    print(f"  {mark} {member!s:<32} {took:>7}", flush=True)
                    yield member
    finally:
        for process, _ in running.values():
            if process is not None:
                process.terminate()


def _started(member: Member, run: Params, parallel: int) -> SpawnProcess | None:
    """The process that brings a member up to date; none, and a line in its log, if what it is to go on from isn't there."""
    (member.folder / DONE).unlink(missing_ok=True)
    try:
        go_on(member, run)
    except ValueError as error:
        (member.folder / LOG).write_text(f"{error}\n")
        return None
    its = run.studies[member.study]
    parameters = {
        "folders": [str(one.folder.resolve()) for one in member.lineage(its)],
        "arm": member.arm,
        "seed": member.seed,
        "own_student": its.own_student(member.arm),
        "keep_rollouts": its.keep_rollouts,
        "made_from": fingerprint(member, run),
    }
    return run_flow_in_subprocess(
        member_run.with_options(flow_run_name=str(member)),
        parameters=parameters,
        env=environment(member, run, parallel),
    )


@flow(name="member", validate_parameters=False)
def member_run(
    folders: list[str],
    arm: str,
    seed: int,
    *,
    own_student: bool,
    keep_rollouts: bool,
    made_from: str,
) -> None:
    """Bring one member up to date, and note its rows of the study's table. What it says goes to `study.log` in its folder.

    folders: its own, then those of the members that it goes on from, which know how long their stages took.
    made_from: its fingerprint, which is left behind at the end: Prefect ends a process whose flow has failed with exit code 0.
    """
    starter = multiprocessing.parent_process()
    die_with_parent(parent=starter.pid if starter else None)
    os.chdir(folders[0])
    with Path(LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    run = load()
    opd(targets=[f"evaluate@{name}" for name in run.evaluations])
    root = ROOT / run.run.name
    seconds = _seconds(run, *map(Path, folders))
    temporary = Path(f".{TABLE}")
    write(member_rows(read_run(run, root), arm, seed, seconds, own_student=own_student), temporary)
    shutil.rmtree(TABLE, ignore_errors=True)
    temporary.rename(TABLE)
    if not keep_rollouts:
        _discard_rollouts(root)
    Path(DONE).write_text(made_from)


def _seconds(run: Params, *folders: Path) -> dict[str, float]:
    """How long the making of artifacts took, by their digests, as these projects' records of executions say."""
    known = [one for folder in folders for one in executions(folder / METRICS / run.run.name)]
    return {one.digest: (one.ended - one.began).total_seconds() for one in known}


def _discard_rollouts(root: Path) -> None:
    """What the iterations saw, and the labels, in the folder and in DVC's cache, which is this member's own."""
    for kind in ("trajectories", "logits"):
        for folder in sorted((root / kind).glob("[!.]*")):
            discard(root, kind, folder.name)
    shutil.rmtree(".dvc/cache", ignore_errors=True)


@task(cache_policy=NO_CACHE)
def tabulate(name: str, run: Params) -> Manifest:
    """`artifacts/<run>/studies/<name>`: the rows of all members that are done, in the order of arms and seeds, and those of what they share.

    Of members that aren't, say because another machine has them, the rows stay that the table has which is there, if they are of the same checkpoints
    and settings; `members_kept` counts them, as other code may have made them.
    """
    root, its = ROOT / run.run.name, run.studies[name]
    shared = read_run(
        run.model_copy(
            update={"iterations": {}, "reinforcements": {}, "evaluations": run.reference}
        ),
        root,
    )
    parents = {
        f"checkpoints/{checkpoint}": manifest.digest
        for checkpoint, manifest in shared.checkpoints.items()
    }
    parameters = run.model_copy(update={"studies": {name: its}}).model_dump(mode="json")
    with draft(root / "studies" / name, "study", parents, {"parameters": parameters}) as work:
        every = [member for arm in its.arms for member in members(name, run, [arm])]
        before, earlier = _before(work)
        done = {member: read(member.folder / TABLE) for member in every if is_done(member, run)}
        missing = [
            member
            for member in every
            if member not in done and earlier is not None and made_alike(member, run, earlier)
        ]
        kept = {
            member: rows
            for member in missing
            if (rows := before.of(member.arm, member.seed)).episodes
        }
        table = joined(
            (done | kept)[member] for member in every if member in done or member in kept
        )
        write(table.with_shared(shared_rows(shared, _seconds(run, Path()))), work.folder)
        facts = {"members_kept": len(kept)} if kept else {}
        return work.publish(
            {
                **facts,
                "members": len(done) + len(kept),
                "episodes": len(table.episodes),
                "iterations": len(table.updates),
            }
        )


def _before(work: Draft) -> tuple[Table, Params | None]:
    """What stands where a table is to be published, and by which settings, if it is one of these checkpoints, of all or some of them."""
    nothing = Table((), ()), None
    if not (work.target / MANIFEST).is_file():
        return nothing
    there = open_artifact(work.target, "study")
    if not there.parents.items() <= work.parents.items():
        return nothing
    try:
        return read(work.target), Params.model_validate(there.params["parameters"])
    except ValidationError:  # settings have other names by now
        return nothing


@task(cache_policy=NO_CACHE)
def page(name: str, run: Params) -> Manifest:
    """`artifacts/<run>/report/<name>`: the page of the table."""
    return study_page.run(ROOT / run.run.name, name)
