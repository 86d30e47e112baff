"""Commands on runs: new, run, plan, status, extend, serve, study, accept."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flows import pipeline, projects, serve, settings, status, summary, terminal
from flows.cli.app import app, on_project
from flows.pipeline import StageFailed, Step
from flows.prefect_server import server
from vla_opd.machine import host
from vla_opd.params.load import load

PREFECT_ENVIRONMENT = {
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # a server that is silent for 2 + 4 + 8 s is lost
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows the stages' output
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
SERVER_LOST = threading.Event()  # set when Prefect's server stops answering during a run

Stages = Annotated[
    list[str] | None,
    typer.Argument(metavar="[STAGE]...", help="these stages and their inputs only"),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="first write a setting into params.yaml"
    ),
]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="the project's name: it becomes runs/NAME")],
    source: Annotated[
        Path,
        typer.Option("--from", metavar="FILE", help="settings to begin with; they are copied"),
    ] = Path("params.yaml"),
    changes: Changes = None,
) -> None:
    """Make a project: a run in a folder of its own, with its own params.yaml and artifacts."""
    project = projects.create(name, source, _parse_changes(changes or ()))
    folder = project.folder
    taken = len(project.read_lock())
    print(f"  {folder / 'params.yaml'}   edit it, or change settings by --set")
    print(f"  {taken} stages are made by the same settings here; their artifacts are linked")
    print(f"  next       opd plan -p {folder}\n             opd run -p {folder}")


@app.command()
@on_project
def run(targets: Stages = None, changes: Changes = None) -> None:
    """Bring the run in params.yaml up to date, as a Prefect flow."""
    _configure_prefect()
    settings.write(_parse_changes(changes or ()))
    stages = targets or []
    folder = projects.relative_folder()
    with _interruptible(projects.resume_command()), server.use_server() as url:
        from httpx import HTTPError
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.train import opd, reproduce_without_server

        try:
            # Nobody needs a heartbeat of a run at the terminal, and its thread takes 1 s to stop.
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                name = None if folder == Path() else str(folder)
                opd.with_options(flow_run_name=name)(targets=stages)
        except HTTPError:  # the server was lost and does not know how the run ended
            SERVER_LOST.set()
            reproduce_without_server(stages)
    if not stages or "report" in stages:
        _print_results(url.removesuffix("/api"))


def _print_results(interface: str) -> None:
    folder = Path("artifacts") / load().run.name
    results = summary.read(folder)
    if results:
        print(terminal.closing_message(folder, results, interface, projects.relative_folder()))


@app.command()
@on_project
def study(
    name: Annotated[str, typer.Argument(help="a study in params.yaml")],
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="only this arm; can be repeated")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="only this seed; can be repeated")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="members at the same time, which share the CPU cores")
    ] = 1,
) -> None:
    """Bring a study up to date: every arm with every seed, then its table and its page."""
    from flows import members

    params = load()
    members.select_members(name, params, arms or (), seeds or ())  # refuses unknown names early
    _configure_prefect()
    resume = f"opd study {name}{projects.option()}"
    with _interruptible(resume), server.use_server():
        from httpx import HTTPError

        from flows.study import study as study_flow

        try:
            study_flow(name, arms, seeds, parallel)
        except HTTPError as error:
            SERVER_LOST.set()
            raise RuntimeError(
                f"Prefect's server no longer answers ({error}); finished members are kept: "
                f"resume with  {resume}"
            ) from error
    folder = Path("artifacts") / params.run.name
    page = folder / "report" / name / "index.html"
    shown = projects.relative_folder()
    print(f"\n  table      {shown / folder / 'studies' / name}\n  page       {shown / page}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def _interruptible(resume: str) -> Generator[None]:
    """When a stage fails, and on Ctrl-C and SIGTERM, print the command that resumes, and exit."""

    def terminate(*_: object) -> None:
        raise _Terminated

    # Prefect installs a handler of its own, and calls this one when its run has ended.
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"\n\n  interrupted; what is done is kept: resume with  {resume}", file=sys.stderr)
        code = TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED
        raise typer.Exit(code) from None
    except StageFailed as failure:
        lines = terminal.last_lines(failure.output)
        print(
            f"\n{failure.name} failed; its last lines were\n{lines}\n\n"
            f"  when you have fixed this, resume with  {resume}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _configure_prefect() -> None:
    """Set Prefect's environment variables. Call this before Prefect is imported."""
    for name, value in PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@app.command("plan")
@on_project
def show_plan(
    targets: Stages = None,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="estimate memory instead of listing stages"),
    ] = False,
    capacity: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="GB", help="with --memory: the device's memory, if it is another device"
        ),
    ] = None,
    processes: Annotated[
        str,
        typer.Option(
            metavar="N",
            envvar="OPD_PROCESSES",
            help="with --memory: how many train together, each on a device of its own",
        ),
    ] = "1",
) -> None:
    """List which stages are up to date; or, with --memory, estimate the memory of the run.

    Exit code 1 if the run needs more memory than there is.
    """
    if memory and not targets:
        _print_memory(capacity, processes)
        return
    if memory or capacity is not None:
        raise ValueError(
            f"--memory with {targets or 'no stages'}, --capacity is {capacity}; "
            "expected --memory without stages, and --capacity with it only"
        )
    steps = status.read_steps(targets or ())
    at_work = status.read_status(load().run.name, steps).at_work
    for step in steps:
        state = _state(step)
        if step in at_work:
            state = f"at work  {terminal.format_progress(at_work[step])}"
        print(f"  {step.name:<20} {state}".rstrip())


@app.command("status")
@on_project
def show_status() -> None:
    """Show how far the run is: stages done, at work and to come, and the time left."""
    run = load().run.name
    print(terminal.format_status(run, status.read_status(run, status.read_steps())))


def _state(step: Step) -> str:
    if step.stale:
        return "to do"
    if step.due:
        return "may be to do"
    return "not needed" if step.missing else "up to date"


def _print_memory(capacity_gb: float | None, processes: str) -> None:
    from flows.cli import capacity

    count = host.parse_processes(processes)
    text, excesses = capacity.plan(load(), capacity_gb, count)
    print(text)
    if excesses:
        raise ValueError("\n".join(excesses))


@app.command("serve")
@on_project
def serve_deployment() -> None:
    """Serve the deployment opd/train; starts a Prefect server if none answers."""
    raise typer.Exit(serve.main())


@app.command()
@on_project
def extend(iterations: Annotated[int, typer.Option(min=1, help="how many to add")]) -> None:
    """Add iterations to the end of the run; `opd run` then makes only these."""
    changes = settings.extension(len(load().iterations) + iterations)
    settings.write(changes)
    for field, value in changes.items():
        print(f"  {field}: {value}")
    params = load()
    decay = params.optimize.schedule_iterations
    final = params.evaluations[params.report.final]
    if params.depth(final) >= decay:
        print(
            f"  the learning rate has decayed after iteration {decay} "
            "(optimize.schedule_iterations): later iterations make small steps"
        )


@app.command()
@on_project
def accept(stages: Annotated[list[str], typer.Argument(metavar="STAGE...")]) -> None:
    """Declare that edits of the code do not change the outputs of these stages."""
    for name in pipeline.accept(stages):
        print(f"  {name}: dvc.lock now has the present code; the outputs are unchanged")


def _parse_changes(pairs: Sequence[str]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--set {pair}: expected SECTION.KEY=VALUE, as in optimize.steps=120")
        changes[key] = value
    return changes
