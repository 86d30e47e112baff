"""What the person at the terminal sees: one line a stage, a table at the end."""

import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from flows.dvc_runner.process import Line

ROWS = (("before", "start"), ("after", "final"), ("teacher", "teacher"))
PASSING_EVERY = 15.0  # seconds between progress lines where they can't be rewritten in place


class StageLine:
    """The line of one stage: its progress while it runs, how it ended and how long it took after that.

    On a terminal the line is rewritten in place; elsewhere (a log file) progress appears now and then.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name = name
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._began = time.monotonic()
        self._last_passing = self._began
        self._said = ""

    def tell(self, line: Line) -> None:
        """Show a line of the stage's output; DVC's own chatter is left out."""
        if line.chatter:
            return
        self._said = line.text.strip()
        now = time.monotonic()
        if self._live:
            self._rewrite(f"  ▸ {self.name:<20} {self._said}")
        elif not line.passing or now - self._last_passing > PASSING_EVERY:
            self._last_passing = now
            self._write(f"  ▸ {self.name:<20} {self._said}\n")

    def ran(self) -> None:
        """The stage ran and succeeded; its last words stand as its result."""
        self._end(
            "✓", f"{clock(time.monotonic() - self._began):>7}  {self._said if self._live else ''}"
        )

    def unchanged(self, why: str) -> None:
        """Nothing had to be done."""
        self._end("·", f"{'':>7}  {why}")

    def failed(self) -> None:
        """The stage failed."""
        self._end("✗", f"{clock(time.monotonic() - self._began):>7}  failed")

    def _end(self, mark: str, text: str) -> None:
        line = f"  {mark} {self.name:<20} {text}".rstrip()
        if self._live:
            self._rewrite(line)
        self._write("\n" if self._live else line + "\n")

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._write("\r\x1b[2K" + text[: width - 1])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def heading(text: str) -> None:
    """A line of its own above a group of stages; nothing but an empty line for a group without a name."""
    print(f"\n{text}" if text else "", flush=True)


def last_lines(lines: Iterable[str], count: int = 15) -> str:
    """The last `count` lines that say something, indented."""
    return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-count:])


def table(summary: dict[str, Any]) -> str:
    """Before, after and teacher of a `summary.json`, each with its interval and number of episodes."""
    head = f"  {'':<10}{'success':>9}{'interval':>18}{'episodes':>10}"
    return "\n".join([head, *(_row(label, summary[key]) for label, key in ROWS if key in summary)])


def _row(label: str, score: dict[str, float]) -> str:
    interval = f"{score['low']:.1%} - {score['high']:.1%}"
    return f"  {label:<10}{score['success']:>9.1%}{interval:>18}{int(score['episodes']):>10}"


def closing(folder: Path, summary: dict[str, Any], interface: str) -> str:
    """What stands at the end of a run: the table, what it cost, where the report is, and what one may do next."""
    cost = f"{summary['env_steps']:,} environment steps and {summary['teacher_queries']:,} teacher queries in {clock(summary['seconds'])}"
    return "\n".join(
        [
            f"\n{folder.name}: before, after, teacher\n{table(summary)}\n",
            f"  cost       {cost}",
            f"  report     {folder / 'report' / 'page' / 'index.html'}",
            f"  runs       {interface}",
            "\n  next       make run                                      again: reuses all of it",
            '             make run ARGS="--set optimize.steps=120"       with another setting: only what depends on it',
            "             .venv/bin/opd plan                            what is up to date and what is not",
            f"             .venv/bin/opd lineage {folder.name}/report/page",
            "             make stop                                     stop the server that shows the runs",
        ]
    )


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
