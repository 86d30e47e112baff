"""The plan of a run at work, in a file, so that other processes need not ask DVC for it.

DVC takes more than a second of processor time to tell what is up to date. While a run is at work,
the run knows.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flows.pipeline import Step
from flows.prefect_server import liveness

PLANS = Path(".prefect/plans")


@dataclass
class RunningPlan:
    """The steps of a run at work; those that have ended are up to date."""

    file: Path
    steps: dict[str, Step]

    def write(self) -> None:
        """Replace the file at once."""
        temporary = self.file.with_suffix(".tmp")
        rows = [asdict(step) for step in self.steps.values()]
        temporary.write_text(json.dumps(rows))
        temporary.rename(self.file)


_CURRENT: ContextVar[RunningPlan | None] = ContextVar("running_plan", default=None)


@contextmanager
def shown(run: str, steps: Sequence[Step]) -> Generator[None]:
    """Show the plan of a flow run to other processes for the duration of the context."""
    PLANS.mkdir(parents=True, exist_ok=True)
    for killed in liveness.abandoned_runs():
        (PLANS / f"{killed}.json").unlink(missing_ok=True)
    plan = RunningPlan(PLANS / f"{run}.json", {step.name: step for step in steps})
    plan.write()
    token = _CURRENT.set(plan)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        plan.file.unlink()


def finish(step: Step) -> None:
    """Show that a step of the plan has ended; without effect outside of `shown`."""
    plan = _CURRENT.get()
    if plan is not None:
        missing = step.missing and not step.due
        plan.steps[step.name] = replace(step, stale=False, missing=missing, due=False)
        plan.write()


def read_running_plan() -> tuple[Step, ...]:
    """Return the steps of the run at work in this folder; none if there is no such run."""
    for run in liveness.other_living_runs():
        with suppress(FileNotFoundError):  # a study at work, or the run has just ended
            text = (PLANS / f"{run}.json").read_text()
            return tuple(_read_step(row) for row in json.loads(text))
    return ()


def _read_step(row: dict[str, object]) -> Step:
    values = dict(row)
    for key, value in row.items():
        if isinstance(value, list):  # JSON has no tuples
            values[key] = tuple(value)
    return Step(**values)  # pyright: ignore[reportArgumentType]
