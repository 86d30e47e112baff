"""The commands of `python -m flows`: run, plan, accept."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flows import pipeline, server, settings, summary, terminal
from flows.pipeline import Busy, StageFailed
from vla_opd import params
from vla_opd.host import METRICS

QUIET = {  # the terminal is for the stages; Prefect's own log is in its interface
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and run it. Returns the exit code: 0, or 1 for what the user is told."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except StageFailed as failure:
        print(f"\n{failure.name} failed; its last lines were\n{terminal.last_lines(failure.said)}\n\n  go on with  make run", file=sys.stderr)
    except (ValueError, RuntimeError, Busy) as error:
        print(f"\n{error}\n", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n\n  interrupted; go on with  make run", file=sys.stderr)
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows", description="When the stages run.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="bring the run that params.yaml describes up to date")
    run.add_argument("targets", nargs="*", metavar="STAGE", help="only what leads to these stages, e.g. evaluate@final")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="write a setting into params.yaml first")
    run.set_defaults(command=_run)
    plan = commands.add_parser("plan", help="say what is up to date and what is not")
    plan.add_argument("targets", nargs="*", metavar="STAGE")
    plan.set_defaults(command=_plan)
    accept = commands.add_parser("accept", help="declare that edits of code didn't change what these stages made")
    accept.add_argument("stages", nargs="+", metavar="STAGE")
    accept.set_defaults(command=_accept)
    return parser


def _run(parsed: argparse.Namespace) -> int:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # before Prefect reads it
    settings.write(_changes(parsed.set))
    with server.in_use() as url:
        from flows.train import opd

        states = opd(targets=parsed.targets)
    if "report" in states:
        name = params.load().run.name
        run = Path("artifacts") / name
        print(terminal.closing(run, summary.write(run, METRICS / name, states), url.removesuffix("/api")))
    return 0


def _changes(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set {pair}: expected SECTION.KEY=VALUE, as in optimize.steps=120")
    return dict(pair.split("=", 1) for pair in pairs)


def _plan(parsed: argparse.Namespace) -> int:
    for step in pipeline.plan(parsed.targets):
        state = "to do" if step.stale else "may be to do" if step.due else "not needed" if step.missing else "up to date"
        print(f"  {step.name:<20} {state}")
    return 0


def _accept(parsed: argparse.Namespace) -> int:
    for name in pipeline.accept(parsed.stages):
        print(f"  {name}: dvc.lock now holds its code as it is; what it made stays as it was")
    return 0
