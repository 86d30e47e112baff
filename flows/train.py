"""The flow `opd`: every stage of dvc.yaml a task, every iteration a subflow, in DVC's order and through DVC.

Prefect says when, who and how it went; what is up to date is DVC's to say. So tasks aren't cached here, and end `Completed` or `Unchanged`.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
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

from flows import pipeline, shares, summary
from flows.dvc_runner import process
from flows.dvc_runner.process import Kept, Tell
from flows.pipeline import Busy, StageFailed, Step
from flows.prefect_server import gpu_limit, liveness, page, server
from flows.settings import Settings, extension, write
from flows.terminal import StageLine, heading, table
from vla_opd.artifacts.manifest import MANIFEST
from vla_opd.lineage.store import ROOT
from vla_opd.machine import checkout
from vla_opd.machine.host import METRICS, processes, require_equal_shares
from vla_opd.params.load import load

BUSY_RETRIES, BUSY_DELAY = 720, 5  # an hour: as long as a stage that someone runs by hand may take
DEPLOYED = (
    "PREFECT__FLOW_RUN_ID"  # a deployment's runner says so to the process that it starts for a run
)
TARGET = r"^(demonstrate|pretrain|finetune|adopt|sample|label|optimize|explore|reinforce|evaluate|report)(@[\w.-]+)?$"
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
def bring(step: Step) -> State[Any]:
    """One stage, brought up to date."""
    screen = StageLine(step.name)
    if not step.due:
        why = "not needed" if step.missing else "up to date"
        screen.unchanged(why)
        return Completed(name="Unchanged", message=f"{step.name}: {why}")
    kept = Kept(get_run_logger())
    with gpu_limit.held(step.verb):
        ran = _ran(step, screen, kept.tell, str(task_run.get_id()), shared=True)
    if ran:
        try:
            page.post(step)
        except Exception as error:  # noqa: BLE001 - a view; the stage has succeeded, whatever becomes of it
            get_run_logger().warning("what %s made is not shown on this page: %s", step.name, error)
        return Completed(message=f"{step.name}: ran")
    return Completed(name="Unchanged", message=f"{step.name}: nothing it depends on had changed")


def _ran(
    step: Step, screen: StageLine, tell: Tell, task_run: str = "", *, shared: bool = False
) -> bool:
    """Bring a due step up to date, on the terminal and in the record of times. Whether it had to run. shared: its shares are made before."""
    began = time.monotonic()
    pipeline.require_same_settings(step)
    try:
        launch = shares.make(step, screen.tell) if shared else ""
        ran = pipeline.bring(
            step.name, lambda line: (screen.tell(line), tell(line)), task_run, launch
        )
    except StageFailed:
        screen.failed()
        raise
    if ran:
        summary.note(METRICS / step.run, step.name, time.monotonic() - began)
        screen.ran()
    else:
        screen.unchanged("its inputs came out the same")
    return ran


@flow(name="iteration", validate_parameters=False)
def iteration(name: str, steps: list[Step]) -> States:
    """One iteration: sample, label, optimise, and the evaluation of what came out. It waits, whole, for what its stages need from before it."""
    heading(name)
    return _bring_all(steps, {})


@flow(name="opd")
def opd(
    settings: Settings | None = None,
    iterations: Annotated[int, Field(ge=1)] | None = None,
    targets: list[Annotated[str, Field(pattern=TARGET)]] | None = None,
) -> States:
    """Bring the run that params.yaml describes up to date.

    Args:
        settings: `{"optimize.learning_rate": 1e-4}`, of which params.yaml is told first; DVC sees them there.
        iterations: how many the run is to have; those that it has stay as they are.
        targets: stages, e.g. `optimize@it004`: only what leads to them. All if none are named.

    Returns:
        The final state of each stage; without those that came after Prefect's server was lost, if it was.

    Raises:
        StageFailed: with the stage's last lines.
        ValueError: if the settings make no valid run; nothing is written then. Or if somebody edits params.yaml while the run is at work.
        RuntimeError: if the settings would change those of another run that is at work in this folder.
    """
    run = str(flow_run.get_id())
    checkout.require_own_code()
    try:
        shares.wanted()  # a mistake in it is one now
        with liveness.held(run):
            write(settings or {}, run=run)
            write(extension(iterations) if iterations else {}, run=run)
            require_equal_shares(
                load().batch_sizes, processes(os.environ.get("OPD_PROCESSES", "1"))
            )
            with temporary_settings(
                {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
            ):  # of iterations: the flow's own goes on; each takes up to 1 s to end
                return _bring_run(pipeline.plan(targets or ()))
    except httpx.HTTPError as error:
        print(
            f"\n  Prefect's server does not answer any more ({error}): going on without it",
            file=sys.stderr,
            flush=True,
        )
    with liveness.orphaned(run):  # on the server it will be running still
        bring_alone(targets or ())
    if (
        DEPLOYED in os.environ
    ):  # and nobody else is in this process; a run from the terminal still has things to say
        server.leave(0)
    return {}


def bring_alone(targets: Iterable[str]) -> tuple[str, ...]:
    """What is still due of what leads to some stages (of all, if none are named), without Prefect. Returns the names of all. Errors as of `opd`."""
    plan = pipeline.plan(targets)
    with process.staying():
        for name, steps in in_groups(step for step in plan if step.due):
            heading(name or "")
            for step in steps:
                _ran(step, StageLine(step.name), lambda _line: None)
    names = tuple(step.name for step in plan)
    _summarised(names)
    return names


def _summarised(stages: Iterable[str]) -> dict[str, Any] | None:
    """`summary.json` of the run, written; none if these stages are not all of it, or its report is no artifact."""
    name = load().run.name
    folder = ROOT / name
    if "report" not in stages or not (folder / "report/page" / MANIFEST).is_file():
        return None
    return summary.write(folder, METRICS / name, stages)


def _bring_run(plan: Sequence[Step]) -> States:
    states: States = {}
    with process.staying() as dvc:
        if any(step.due for step in plan):
            dvc.start()
        for name, steps in in_groups(plan):
            if name is None:
                heading("")
                states |= _bring_all(steps, states)
            else:
                subflow: Any = iteration.with_options(
                    flow_run_name=name
                )  # Prefect's overloads leave wait_for out
                states |= subflow(name, steps, wait_for=_parents(steps, states))
    if told := _summarised(states):
        get_run_logger().info("%s", table(told))
    return states


def in_groups(steps: Iterable[Step]) -> Iterator[tuple[str | None, list[Step]]]:
    """The plan cut into runs of stages of one iteration, and of stages of none. Its order is DVC's and stays so."""
    for name, group in groupby(steps, key=lambda step: step.iteration):
        yield name, list(group)


def _bring_all(steps: Iterable[Step], before: States) -> States:
    states = dict(before)
    made: States = {}
    for step in steps:
        named = bring.with_options(name=step.verb, task_run_name=step.name)
        state = named(step, wait_for=_parents([step], states), return_state=True)
        states[step.name] = made[step.name] = state
        state.result(raise_on_failure=True)
    return made


def _parents(steps: Iterable[Step], states: States) -> list[State[Any]]:
    wanted = {parent for step in steps for parent in step.parents}
    return [state for name, state in states.items() if name in wanted]
