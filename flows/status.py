"""How far a run is: stages done, at work and to come, and the time that is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows import pipeline
from flows.pipeline import Step
from flows.running_plan import read_running_plan
from stages.catalog import BEHIND
from vla_opd.artifacts.progress import Progress, read_progress
from vla_opd.machine.host import METRICS
from vla_opd.machine.tracking import read_executions


@dataclass(frozen=True)
class Status:
    """The stages of a run by what has become of them, in DVC's order.

    at_work:  how far each is; None before its first progress.
    durations: seconds that the last execution of a stage's kind took, by the stage's verb.
    """

    done: tuple[Step, ...]
    at_work: dict[Step, Progress | None]
    to_come: tuple[Step, ...]
    durations: dict[str, float]

    @property
    def seconds_left(self) -> float:
        """The time that stages at work and to come will take, as far as it can be estimated."""
        seconds = 0.0
        for step, progress in self.at_work.items():
            if progress is not None and progress.seconds_left is not None:
                seconds += progress.seconds_left
            else:
                seconds += self._duration(step)
        for step in self.to_come:
            seconds += self._duration(step)
        return seconds

    def _duration(self, step: Step) -> float:
        return self.durations.get(BEHIND[step.verb], 0.0)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The kinds of stages to come of which none has run here, so that no time is known."""
        verbs = dict.fromkeys(step.verb for step in self.to_come)
        return tuple(verb for verb in verbs if BEHIND[verb] not in self.durations)


def read_steps(targets: Sequence[str] = ()) -> tuple[Step, ...]:
    """Return the plan of the run at work in this folder, if there is one, else DVC's plan.

    DVC is asked, too, for the stages that lead to some targets. Errors as of `pipeline.inspect`.
    """
    steps = () if targets else read_running_plan()
    if steps:
        return pipeline.mark_at_work(steps)
    return pipeline.inspect(targets)


def read_status(run: str, steps: Sequence[Step]) -> Status:
    """Return the status of a run by its plan."""
    done: list[Step] = []
    at_work: dict[Step, Progress | None] = {}
    to_come: list[Step] = []
    for step in steps:
        progress = _read_progress(step)
        if step.at_work or progress is not None:
            at_work[step] = progress
        elif step.due:
            to_come.append(step)
        else:
            done.append(step)
    return Status(tuple(done), at_work, tuple(to_come), _read_durations(run))


def _read_durations(run: str) -> dict[str, float]:
    durations: dict[str, float] = {}
    for execution in read_executions(METRICS / run):
        duration = execution.ended - execution.began
        durations[execution.stage] = duration.total_seconds()
    return durations


def _read_progress(step: Step) -> Progress | None:
    for out in step.outs:
        progress = read_progress(Path(out))
        if progress is not None:
            return progress
    return None
