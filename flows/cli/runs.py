"""Commands on runs: bring up to date, plan, extend, serve."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flows import pipeline, projects, serve, settings, summary, terminal
from flows.cli.app import app
from flows.pipeline import Step
from flows.prefect_server import server
from vla_opd.machine import host
from vla_opd.params.load import load

PREFECT = {  # the terminal is for the stages; Prefect's own log is in its interface. A server that is silent for 15 seconds (2 + 4 + 8) is lost
    "PREFECT_CLIENT_MAX_RETRIES": "3",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
LOST = threading.Event()  # Prefect's server, in the middle of a run

Stages = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE]...", help="only what leads to these stages, e.g. evaluate@final"
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="write a setting into params.yaml first"
    ),
]


@app.command()
def run(targets: Stages = None, changes: Changes = None) -> None:
    """Bring the run that params.yaml describes up to date, as a Prefect flow."""
    _quiet()
    settings.write(_changes(changes or ()))
    with _interruptible("make run"), server.in_use() as url:
        from httpx import HTTPError
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.train import bring_alone, opd

        try:
            # Who sits at the terminal sees a run end; the heartbeat's thread takes 1 s to.
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                opd(targets=targets or [])
        except HTTPError:  # the server was lost, and the end of the run could not be told to it
            LOST.set()
            bring_alone(targets or [])
    folder = Path("artifacts") / load().run.name
    if "report" in (targets or ["report"]) and (told := summary.read(folder)):
        print(terminal.closing(folder, told, url.removesuffix("/api")))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="a study of params.yaml")],
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="only this arm; may be said again")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="only this seed; may be said again")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="members at the same time; each gets its share of the cores")
    ] = 1,
) -> None:
    """Bring a study up to date: every arm with every seed, then its table and its page."""
    run = load()
    projects.members(
        name, run, arms or (), seeds or ()
    )  # a name that isn't there is refused before a server is started
    _quiet()
    with _interruptible(f"opd study {name}"), server.in_use():
        from httpx import HTTPError

        from flows.study import study as flow

        try:
            flow(name, arms, seeds, parallel)
        except HTTPError as error:
            LOST.set()
            raise RuntimeError(
                f"Prefect's server does not answer any more ({error}); what is done stays, go on with  opd study {name}"
            ) from error
    folder = Path("artifacts") / run.run.name
    print(
        f"\n  table      {folder / 'studies' / name}\n  page       {folder / 'report' / name / 'index.html'}"
    )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, taken for what Ctrl-C is."""


@contextmanager
def _interruptible(again: str) -> Generator[None]:
    """End on Ctrl-C and on SIGTERM with one sentence: by which command the run is resumed."""

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(
        signal.SIGTERM, terminate
    )  # Prefect, which takes the signal first, hands it on when its run is ended
    try:
        yield
    except KeyboardInterrupt as end:
        print(f"\n\n  interrupted; what is done is kept: resume with  {again}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(end, _Terminated) else INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet() -> None:
    """What Prefect is told where the terminal is for something else. It has to be there before Prefect is imported."""
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)


@app.command()
def plan(
    targets: Stages = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="what the run will take of the memory, and whether it fits, in place of what is to do",
        ),
    ] = False,
    capacity: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="GB",
            help="with --memory: of the device, if it isn't the one that is here",
        ),
    ] = None,
    processes: Annotated[
        str,
        typer.Option(
            metavar="N",
            envvar="OPD_PROCESSES",
            help="with --memory: that train together, each on a device of its own",
        ),
    ] = "1",
) -> None:
    """Say what is up to date and what is not; or, with --memory, what the run will need. Exit code 1 if that is more than there is."""
    if memory and not targets:
        _plan_memory(capacity, processes)
        return
    if memory or capacity is not None:
        raise ValueError(
            f"--memory with {targets or 'no stages'}, --capacity is {capacity}; expected --memory without stages, and --capacity with it only"
        )
    for step in pipeline.inspect(targets or ()):
        print(f"  {step.name:<20} {_state(step)}")


def _state(step: Step) -> str:
    if step.at_work:
        return "at work"
    if step.stale:
        return "to do"
    if step.due:
        return "may be to do"
    return "not needed" if step.missing else "up to date"


def _plan_memory(capacity: float | None, processes: str) -> None:
    from flows.cli import capacity as needed

    told, too_much = needed.plan(load(), capacity, host.processes(processes))
    print(told)
    if too_much:
        raise ValueError("\n".join(too_much))


@app.command("serve")
def serve_() -> None:
    """Serve the deployment opd/train, and start a Prefect server if none answers."""
    raise typer.Exit(serve.main())


@app.command()
def extend(iterations: Annotated[int, typer.Option(min=1, help="how many more")]) -> None:
    """Add iterations to the end of the run; `opd run` then makes them, and repeats nothing."""
    changes = settings.extension(len(load().iterations) + iterations)
    settings.write(changes)
    for field, value in changes.items():
        print(f"  {field}: {value}")
    run = load()
    decay = run.optimize.schedule_iterations
    if run.depth(run.evaluations[run.report.final]) >= decay:
        print(
            f"  the learning rate has decayed after iteration {decay} (optimize.schedule_iterations): later ones make small steps"
        )


@app.command()
def accept(stages: Annotated[list[str], typer.Argument(metavar="STAGE...")]) -> None:
    """Declare that edits of code didn't change what these stages made."""
    for name in pipeline.accept(stages):
        print(f"  {name}: dvc.lock now holds its code as it is; what it made stays as it was")


def _changes(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set {pair}: expected SECTION.KEY=VALUE, as in optimize.steps=120")
    return dict(pair.split("=", 1) for pair in pairs)
