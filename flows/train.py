"""The flow `opd`: every stage of dvc.yaml is a task, every iteration a subflow, in DVC's order.

Prefect knows when, who and how it went; what is up to date is DVC's decision. So Prefect caches no
task here, and tasks end as `Completed` or `Unchanged`.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed
from pydantic import Field

from flows import pipeline, projects, running_plan, shares, summary
from flows.dvc_runner import process
from flows.dvc_runner.process import Line, LineHandler, ThrottledLog
from flows.parameters import Settings
from flows.pipeline import Busy, StageFailed, Step
from flows.prefect_server import gpu_limit, liveness, page, server
from flows.settings import extension, write
from flows.terminal import StageLine, print_heading, results_table
from stages.catalog import BEHIND, batch_sizes
from vla_opd.artifacts.layout import ROOT
from vla_opd.artifacts.manifest import MANIFEST
from vla_opd.machine import checkout
from vla_opd.machine.host import METRICS, parse_processes, require_equal_shares
from vla_opd.params.load import load

BUSY_RETRIES = 720  # an hour, as long as a stage run by hand may take
BUSY_DELAY = 5  # seconds
DEPLOYED = "PREFECT__FLOW_RUN_ID"  # set in the process of a deployed run
TARGET = rf"^({'|'.join(BEHIND)})(@[\w.-]+)?$"
States = dict[str, State[Any]]


def _is_busy(_task: object, _run: object, state: State[Any]) -> bool:
    return (
        isinstance(state.data, Busy)
        or isinstance(getattr(state.data, "exception", None), Busy)
        or "Busy" in (state.message or "")
    )


@task(
    cache_policy=NO_CACHE,
    retries=BUSY_RETRIES,
    retry_delay_seconds=BUSY_DELAY,
    retry_condition_fn=_is_busy,
)
def reproduce(step: Step) -> State[Any]:
    """Bring one stage up to date."""
    screen = StageLine(step.name)
    if not step.due:
        why = "not needed" if step.missing else "up to date"
        screen.skip(why)
        return Completed(name="Unchanged", message=f"{step.name}: {why}")
    kept = ThrottledLog(get_run_logger())
    with gpu_limit.hold_gpu(step.verb):
        ran = _reproduce(step, screen, kept.write, str(task_run.get_id()), shared=True)
    if ran:
        try:
            page.post_outputs(step)
        except Exception as error:  # noqa: BLE001 - only a view; the stage has succeeded
            get_run_logger().warning("no artifact page for %s: %s", step.name, error)
        return Completed(message=f"{step.name}: ran")
    return Completed(name="Unchanged", message=f"{step.name}: nothing it depends on had changed")


def _reproduce(
    step: Step, screen: StageLine, tell: LineHandler, task_run: str = "", *, shared: bool = False
) -> bool:
    """Reproduce a due step, on the terminal and in the record of times. Returns whether it ran.

    shared: make its shares first.
    """
    started = time.monotonic()
    pipeline.require_same_settings(step)

    def hear(line: Line) -> None:
        screen.show(line)
        tell(line)

    try:
        launch = shares.make(step, screen.show) if shared else ""
        ran = pipeline.reproduce(step.name, hear, task_run, launch)
    except StageFailed:
        screen.fail()
        raise
    if ran:
        summary.record_seconds(METRICS / step.run, step.name, time.monotonic() - started)
        screen.succeed()
    else:
        screen.skip("its inputs came out the same")
    return ran


@flow(name="iteration", validate_parameters=False)
def iteration(name: str, steps: list[Step]) -> States:
    """Run one iteration: sample, label, optimize, and evaluate the new checkpoint.

    As a whole it waits for what its stages need from before it.
    """
    print_heading(name)
    return _reproduce_all(steps, {})


@flow(name="opd")
def opd(
    settings: Settings | None = None,
    iterations: Annotated[int, Field(ge=1)] | None = None,
    targets: list[Annotated[str, Field(pattern=TARGET)]] | None = None,
    project: Path | None = None,
) -> States:
    """Bring the run that params.yaml describes up to date.

    Args:
        settings: `{"optimize.learning_rate": 1e-4}`; written into params.yaml first, for DVC.
        iterations: total number of iterations; existing ones are kept.
        targets: stages, e.g. `optimize@it004`: only what leads to them. All by default.
        project: the folder of the run, e.g. `runs/NAME`; by default this folder.

    Returns:
        The final state of each stage, up to the loss of Prefect's server if it is lost.

    Raises:
        StageFailed: with the stage's last lines.
        ValueError: if the settings are not valid (nothing is written then), or if params.yaml is
            edited while the run is at work.
        RuntimeError: if another run at work in this folder has other settings.
    """
    checkout.require_own_code()
    with projects.entered(project):
        return _bring_up_to_date(settings or {}, iterations, targets or ())


def _bring_up_to_date(
    changes: dict[str, Any], iterations: int | None, targets: Sequence[str]
) -> States:
    run = str(flow_run.get_id())
    try:
        shares.wanted()  # refuses a mistake before any stage
        with liveness.hold_run(run):
            write(changes, run=run)
            write(extension(iterations) if iterations else {}, run=run)
            count = parse_processes(os.environ.get("OPD_PROCESSES", "1"))
            require_equal_shares(batch_sizes(load()), count)
            # Iterations need no heartbeat of their own, which takes up to 1 s to end.
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                plan = pipeline.plan(targets)
                with running_plan.shown(run, plan):
                    return _reproduce_run(plan)
    except httpx.HTTPError as error:
        print(
            f"\n  Prefect's server does not answer any more ({error}): continuing without it",
            file=sys.stderr,
            flush=True,
        )
    with liveness.hold_unreported_run(run):  # on the server it stays in state Running
        reproduce_without_server(targets)
    if DEPLOYED in os.environ:  # a run from the terminal still has things to print
        server.exit_now(0)
    return {}


def reproduce_without_server(targets: Iterable[str]) -> tuple[str, ...]:
    """Bring what leads to some stages (all without targets) up to date, without Prefect.

    Returns the names of all these stages. Errors as of `opd`.
    """
    plan = pipeline.plan(targets)
    with process.shared_dvc():
        for name, steps in in_groups(step for step in plan if step.due):
            print_heading(name or "")
            for step in steps:
                _reproduce(step, StageLine(step.name), lambda _line: None)
    names = tuple(step.name for step in plan)
    _write_summary(names)
    return names


def _write_summary(stages: Iterable[str]) -> dict[str, Any] | None:
    """Write the run's `summary.json` and return it.

    None if these stages are not all of the run, or its report does not exist.
    """
    name = load().run.name
    folder = ROOT / name
    if "report" not in stages or not (folder / "report/page" / MANIFEST).is_file():
        return None
    return summary.write(folder, METRICS / name, stages)


def _reproduce_run(plan: Sequence[Step]) -> States:
    states: States = {}
    with process.shared_dvc() as dvc:
        if any(step.due for step in plan):
            dvc.start()
        for name, steps in in_groups(plan):
            if name is None:
                print_heading("")
                states |= _reproduce_all(steps, states)
            else:
                # Prefect's overloads leave wait_for out.
                subflow: Any = iteration.with_options(flow_run_name=name)
                states |= subflow(name, steps, wait_for=_parents(steps, states))
    results = _write_summary(states)
    if results:
        get_run_logger().info("%s", results_table(results))
    return states


def in_groups(steps: Iterable[Step]) -> Iterator[tuple[str | None, list[Step]]]:
    """Split the plan into stages of one iteration and stages of none, in DVC's order."""
    for name, group in groupby(steps, key=lambda step: step.iteration):
        yield name, list(group)


def _reproduce_all(steps: Iterable[Step], before: States) -> States:
    states = dict(before)
    new: States = {}
    for step in steps:
        named = reproduce.with_options(name=step.verb, task_run_name=step.name)
        state = named(step, wait_for=_parents([step], states), return_state=True)
        states[step.name] = state
        new[step.name] = state
        state.result(raise_on_failure=True)
        running_plan.finish(step)
    return new


def _parents(steps: Iterable[Step], states: States) -> list[State[Any]]:
    parents: set[str] = set()
    for step in steps:
        parents.update(step.parents)
    return [state for name, state in states.items() if name in parents]
