"""The flow `study`: every arm with every seed as a subflow, then one table of all of them.

Each member is brought up to date by the flow `opd` in a folder and a process of its own (see
`flows.members`), so a study that was stopped resumes where it was, and members can run side by
side.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.flow_engine import run_flow_in_subprocess
from prefect.runtime import flow_run
from pydantic import Field, ValidationError

from flows import terminal
from flows.members import (
    DONE,
    TABLE,
    Member,
    continue_predecessor,
    fingerprint,
    has_same_recipe,
    is_done,
    oversubscription_warning,
    prepare,
    process_environment,
    reference_stages,
    select_members,
    share_reference,
)
from flows.prefect_server import liveness
from flows.train import opd
from vla_opd.analysis.finished_run import discard, read_run
from vla_opd.analysis.study_table import Table, concatenate, member_rows, read, shared_rows, write
from vla_opd.artifacts.draft import BusyError, Draft, draft
from vla_opd.artifacts.layout import ROOT
from vla_opd.artifacts.manifest import MANIFEST, Manifest, open_artifact
from vla_opd.machine.host import METRICS
from vla_opd.machine.parent_death import die_with_parent
from vla_opd.machine.tracking import read_executions
from vla_opd.pages import study_page
from vla_opd.params.load import load
from vla_opd.params.recorded import read_recorded
from vla_opd.params.run import Params

LOG = "study.log"


@flow(name="study", flow_run_name="{name}")
def study(
    name: str,
    arms: list[str] | None = None,
    seeds: list[int] | None = None,
    parallel: Annotated[int, Field(ge=1)] = 1,
) -> None:
    """Bring a study of params.yaml up to date, and the table of its finished members.

    Args:
        name: the study.
        arms: bring only these up to date; all if None or empty.
        seeds: bring only these up to date; all if None or empty.
        parallel: members that run at the same time. Each gets an equal share of the cores for its
            simulators, unless OPD_WORKERS is set.

    Raises:
        ValueError: the study, an arm or a seed does not exist, or an arm's settings make no valid
            run; nothing is run then.
        RuntimeError: some members failed, which it names; the others are done.
    """
    run = load()
    members = select_members(name, run, arms or (), seeds or ())
    for member in members:  # all of them first: a mistake in the last is found before any runs
        prepare(member, run)
    warning = oversubscription_warning(run, parallel)
    if warning is not None:
        print(f"  {warning}", file=sys.stderr)
    with liveness.hold_run(str(flow_run.get_id())):
        opd.with_options(flow_run_name="reference")(targets=reference_stages(run))
        for member in members:
            share_reference(member, run)
        with closing(_run_side_by_side(members, run, parallel)) as ended:
            failures = [member for member in ended if not _update_table(member, run)]
    if failures:
        logs = [f"{member} (see {member.folder / LOG})" for member in failures]
        count = f"{len(failures)} of {len(members)} members failed"
        raise RuntimeError(f"{count}: {'; '.join(logs)}")


def _update_table(member: Member, run: Params) -> bool:
    """Bring table and page up to date after a member has ended; return whether it is done."""
    try:
        manifest = tabulate.with_options(task_run_name="table")(member.study, run)
        if manifest.facts["members"]:
            page.with_options(task_run_name="page")(member.study, run)
    except BusyError as error:  # another command is writing this study's table; the next one will
        print(f"  {error}", file=sys.stderr)
    return is_done(member, run)


@dataclass(frozen=True)
class MemberProcess:
    """A member's process, and when it began; no process if the member could not be started."""

    process: SpawnProcess | None
    began: float

    @property
    def has_ended(self) -> bool:
        return self.process is None or self.process.exitcode is not None

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()


def _run_side_by_side(members: Sequence[Member], run: Params, parallel: int) -> Generator[Member]:
    """Run the members, and yield each once its process has ended, successfully or not.

    A member that continues another waits for it. Closing the generator ends the processes.
    """
    study = run.studies[members[0].study]
    waiting = list(members)
    running: dict[Member, MemberProcess] = {}
    try:
        while waiting or running:
            pending = {*waiting, *running}
            ready = [member for member in waiting if member.predecessor(study) not in pending]
            for member in ready[: parallel - len(running)]:
                waiting.remove(member)
                process = _start(member, run, parallel)
                running[member] = MemberProcess(process, time.monotonic())
            time.sleep(0.2)
            for member, process in list(running.items()):
                if process.has_ended:
                    del running[member]
                    _print_end(member, run, process)
                    yield member
    finally:
        for process in running.values():
            process.terminate()


def _print_end(member: Member, run: Params, process: MemberProcess) -> None:
    mark = "✓" if is_done(member, run) else "✗"
    seconds = time.monotonic() - process.began
    duration = terminal.format_duration(seconds)
    print(f"  {mark} {member!s:<32} {duration:>7}", flush=True)


def _start(member: Member, run: Params, parallel: int) -> SpawnProcess | None:
    """Start the process that brings a member up to date.

    If its predecessor isn't done, return None and write that into the member's log.
    """
    (member.folder / DONE).unlink(missing_ok=True)
    try:
        continue_predecessor(member, run)
    except ValueError as error:
        (member.folder / LOG).write_text(f"{error}\n")
        return None
    study = run.studies[member.study]
    parameters = {
        "folders": [str(ancestor.folder.resolve()) for ancestor in member.lineage(study)],
        "arm": member.arm,
        "seed": member.seed,
        "own_student": study.own_student(member.arm),
        "keep_rollouts": study.keep_rollouts,
        "made_from": fingerprint(member, run),
    }
    return run_flow_in_subprocess(
        member_run.with_options(flow_run_name=str(member)),
        parameters=parameters,
        env=process_environment(member, run, parallel),
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
    """Bring one member up to date, and write its rows of the study's table.

    Its output goes to `study.log` in its folder.

    folders: the member's, then those of the members it continues, whose executions are recorded
        there.
    made_from: the member's fingerprint, written at the very end. Without it the member has failed:
        Prefect ends the process of a failed flow with exit code 0.
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
    finished_run = read_run(run, root)
    seconds = _read_seconds(run, *map(Path, folders))
    rows = member_rows(finished_run, arm, seed, seconds, own_student=own_student)
    temporary = Path(f".{TABLE}")
    write(rows, temporary)
    shutil.rmtree(TABLE, ignore_errors=True)
    temporary.rename(TABLE)
    if not keep_rollouts:
        _discard_rollouts(root)
    Path(DONE).write_text(made_from)


def _read_seconds(run: Params, *projects: Path) -> dict[str, float]:
    """Return how long artifacts took to make, by digest, from the projects' executions."""
    seconds: dict[str, float] = {}
    for project in projects:
        for execution in read_executions(project / METRICS / run.run.name):
            seconds[execution.digest] = (execution.ended - execution.began).total_seconds()
    return seconds


def _discard_rollouts(root: Path) -> None:
    """Remove trajectories and labels, and DVC's cache, which is this member's alone."""
    for kind in ("trajectories", "labels"):
        for folder in sorted((root / kind).glob("[!.]*")):
            discard(root, kind, folder.name)
    shutil.rmtree(".dvc/cache", ignore_errors=True)


@task(cache_policy=NO_CACHE)
def tabulate(name: str, run: Params) -> Manifest:
    """Publish `artifacts/<run>/studies/<name>`: the rows of all finished members.

    Their order is that of arms, then seeds; the rows of what members share come before them. For
    members that are not done here (another machine has them, say), the rows of the present table
    are kept if they come from the same checkpoints and settings. The fact `members_kept` counts
    those, since other code may have made them.
    """
    root = ROOT / run.run.name
    shared = read_run(_without_iterations(run), root)
    parents = {
        f"checkpoints/{checkpoint}": manifest.digest
        for checkpoint, manifest in shared.checkpoints.items()
    }
    this_study = {name: run.studies[name]}
    only_this = run.model_copy(update={"studies": this_study})
    recorded = {"parameters": only_this.model_dump(mode="json")}
    with draft(root / "studies" / name, "study", parents, recorded) as work:
        tables, kept = _read_member_tables(name, run, work)
        table = concatenate(tables.values())
        seconds = _read_seconds(run, Path())
        rows = shared_rows(shared, seconds)
        write(table.with_shared(rows), work.folder)
        facts = {"members_kept": kept} if kept else {}
        facts["members"] = len(tables)
        facts["episodes"] = len(table.episodes)
        facts["iterations"] = len(table.updates)
        return work.publish(facts)


def _without_iterations(run: Params) -> Params:
    """Return the run without its iterations: its origins, and the evaluations of those."""
    changes = {"iterations": {}, "reinforcements": {}, "evaluations": run.reference_evaluations}
    return run.model_copy(update=changes)


def _read_member_tables(name: str, run: Params, work: Draft) -> tuple[dict[Member, Table], int]:
    """Return each member's rows, and how many members' are kept from the present table."""
    present, settings = _read_present_table(work)
    tables: dict[Member, Table] = {}
    kept = 0
    for arm in run.studies[name].arms:
        for member in select_members(name, run, [arm]):
            if is_done(member, run):
                tables[member] = read(member.folder / TABLE)
            elif settings is not None and has_same_recipe(member, run, settings):
                rows = present.select(member.arm, member.seed)
                if rows.episodes:
                    tables[member] = rows
                    kept += 1
    return tables, kept


def _read_present_table(work: Draft) -> tuple[Table, Params | None]:
    """Return the table that is about to be replaced, and its settings.

    An empty table and None if there is none, or its checkpoints are not among those of `work`.
    """
    empty = Table((), ())
    if not (work.target / MANIFEST).is_file():
        return empty, None
    manifest = open_artifact(work.target, "study")
    if not manifest.parents.items() <= work.parents.items():
        return empty, None
    try:
        return read(work.target), read_recorded(manifest.params["parameters"])
    except ValidationError:  # an older version, whose settings had other names
        return empty, None


@task(cache_policy=NO_CACHE)
def page(name: str, run: Params) -> Manifest:
    """Publish `artifacts/<run>/report/<name>`: the page of the table."""
    return study_page.run(ROOT / run.run.name, name)
