"""Output on the terminal: one line per stage, and a table at the end."""

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from flows.dvc_runner.process import Line
from flows.pipeline import Step
from flows.status import Status
from vla_opd.artifacts.progress import Progress

ROWS = (("before", "start"), ("after", "final"), ("teacher", "teacher"))
PASSING_EVERY = 15.0  # seconds between progress lines that cannot be rewritten in place


class StageLine:
    """The line of one stage: its progress while it runs, then its outcome and duration.

    On a terminal the line is rewritten in place; in a log file, progress appears every
    `PASSING_EVERY` seconds.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name = name
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._began = time.monotonic()
        self._last_passing = self._began
        self._last_output = ""

    def show(self, line: Line) -> None:
        """Show a line of the stage's output, unless it is DVC's."""
        if line.chatter:
            return
        self._last_output = line.text.strip()
        text = f"  ▸ {self.name:<20} {self._last_output}"
        now = time.monotonic()
        if self._live:
            self._rewrite(text)
        elif not line.passing or now - self._last_passing > PASSING_EVERY:
            self._last_passing = now
            self._write(text + "\n")

    def succeed(self) -> None:
        """End the line of a stage that ran; its last output stays as its result."""
        result = self._last_output if self._live else ""
        self._end("✓", f"{self._duration():>7}  {result}")

    def skip(self, reason: str) -> None:
        """End the line of a stage that did not have to run."""
        self._end("·", f"{'':>7}  {reason}")

    def fail(self) -> None:
        """End the line of a stage that failed."""
        self._end("✗", f"{self._duration():>7}  failed")

    def _duration(self) -> str:
        return format_duration(time.monotonic() - self._began)

    def _end(self, mark: str, text: str) -> None:
        line = f"  {mark} {self.name:<20} {text}".rstrip()
        if self._live:
            self._rewrite(line)
            self._write("\n")
        else:
            self._write(line + "\n")

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._write("\r\x1b[2K" + text[: width - 1])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def print_heading(text: str) -> None:
    """Print a line above a group of stages; an empty line for a group without a name."""
    print(f"\n{text}" if text else "", flush=True)


def last_lines(lines: Iterable[str], count: int = 15) -> str:
    """Return the last `count` lines that are not blank, indented."""
    written = [line for line in lines if line.strip()]
    return "\n".join(f"    {line}" for line in written[-count:])


def results_table(summary: dict[str, Any]) -> str:
    """Format before, after and teacher of a `summary.json`, with intervals and episodes."""
    lines = [f"  {'':<10}{'success':>9}{'interval':>18}{'episodes':>10}"]
    for label, key in ROWS:
        if key in summary:
            lines.append(_row(label, summary[key]))
    return "\n".join(lines)


def _row(label: str, score: dict[str, float]) -> str:
    success = score["success"]
    low = score["low"]
    high = score["high"]
    interval = f"{low:.1%} - {high:.1%}"
    episodes = int(score["episodes"])
    return f"  {label:<10}{success:>9.1%}{interval:>18}{episodes:>10}"


def closing_message(folder: Path, summary: dict[str, Any], interface: str, project: Path) -> str:
    """Format the end of a run: results, cost, where the report is, and commands to try next.

    folder:  the run's artifacts, relative to the project.
    project: the folder of the run, relative to the checkout; `.` for the checkout's own.
    """
    cost = (
        f"{summary['env_steps']:,} environment steps and "
        f"{summary['teacher_queries']:,} teacher queries in {format_duration(summary['seconds'])}"
    )
    run = "make run"
    changed = 'make run ARGS="--set optimize.steps=120"'
    opd = ".venv/bin/opd {}"
    if project != Path():
        opd = f"opd {{}} -p {project}"
        run = opd.format("run")
        changed = f"{run} --set optimize.steps=120"
    hints = {
        run: "run again: every artifact is reused",
        changed: "change a setting: only dependent stages run",
        opd.format("plan"): "list stages that are up to date or to do",
        f"{opd.format('lineage')} {folder.name}/report/page": "show what the report was made from",
        "make stop": "stop the server that shows the runs",
    }
    width = max(map(len, hints))
    rows = [f"{command:<{width}}   {meaning}" for command, meaning in hints.items()]
    indented = "\n             ".join(rows)
    return f"""
{folder.name}: before, after, teacher
{results_table(summary)}

  cost       {cost}
  report     {project / folder / "report" / "page" / "index.html"}
  runs       {interface}

  next       {indented}"""


def format_status(run: str, status: Status) -> str:
    """Format how far a run is, in a few lines."""
    done = len(status.done)
    count = done + len(status.at_work) + len(status.to_come)
    lines = [f"{run}: {done} of {count} stages are up to date"]
    for step, progress in status.at_work.items():
        line = f"  at work    {step.name:<20} {format_progress(progress)}"
        lines.append(line.rstrip())
    if status.to_come:
        lines.append(f"  to come    {_list_stages(status.to_come)}")
    if status.at_work or status.to_come:
        lines.append(f"  time left  {_time_left(status)}")
    return "\n".join(lines)


def _list_stages(steps: Sequence[Step]) -> str:
    names = [step.name for step in steps]
    text = ", ".join(names)
    if len(names) > 3:
        first, second, *_, last = names
        text = f"{first}, {second} ... {last}"
    return f"{text} ({len(names)} in all)"


def _time_left(status: Status) -> str:
    left = format_duration(status.seconds_left)
    unknown = ", ".join(status.unknown)
    if unknown:
        return f"over {left}: how long {unknown} takes here is not known yet"
    return f"about {left}, if each stage takes as long as the last of its kind"


def format_progress(progress: Progress | None) -> str:
    """Format how far a stage is, e.g. `12 of 24 shards, 0:14 left`; empty if it isn't known."""
    if progress is None:
        return ""
    text = f"{progress.done} of {progress.total} {progress.unit}s"
    if progress.seconds_left is None:
        return text
    return f"{text}, {format_duration(progress.seconds_left)} left"


def format_duration(seconds: float) -> str:
    """Format seconds as `m:ss`."""
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes}:{remainder:02d}"
