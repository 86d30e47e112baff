"""What the person at the terminal sees: one line a stage, a table at the end."""

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from flows.lineage import Difference, History, tree
from flows.pipeline import Line
from flows.verify import Finding

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
        self._end("✓", f"{_clock(time.monotonic() - self._began):>7}  {self._said if self._live else ''}")

    def unchanged(self, why: str) -> None:
        """Nothing had to be done."""
        self._end("·", f"{'':>7}  {why}")

    def failed(self) -> None:
        """The stage failed."""
        self._end("✗", f"{_clock(time.monotonic() - self._began):>7}  failed")

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
    cost = f"{summary['env_steps']:,} environment steps and {summary['teacher_queries']:,} teacher queries in {_clock(summary['seconds'])}"
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


def history(told: History) -> str:
    """A history as a tree, and what all of it was made with: a setting that differs between artifacts of one kind with all its values."""
    parts: list[RenderableType] = [tree(told)]
    for kind, settings in told.settings.items():
        parts += ["", f"[bold]{kind}[/]: settings", _pairs(settings)]
    parts += ["", "[bold]versions[/]", _pairs(told.versions)]
    if told.missing:
        parts += ["", f"[yellow]{len(told.missing)} artifacts of this history aren't here; their digests are all that is known of them[/]"]
    return _drawn(*parts)


def differences(found: Sequence[Difference]) -> str:
    """What differs between two histories, a line each."""
    return rows(["part", "what", "first", "second"], [(d.part, d.what, d.first, d.second) for d in found]) if found else "  nothing differs"


def findings(found: Sequence[Finding], checked: int) -> str:
    """What is wrong, and what is void with it; or that nothing is."""
    lines = [f"  {one.what}\n    void with it: {', '.join(one.void) or 'nothing'}" for one in found]
    return "\n".join([*lines, f"  {checked} artifacts checked, {len(found)} damaged"])


def rows(columns: Sequence[str], values: Sequence[Sequence[Any]]) -> str:
    """A table."""
    shown = Table(*columns, box=box.SIMPLE, header_style="bold", pad_edge=False)
    for row in values:
        shown.add_row(*(Text(str(value)) for value in row))
    return _drawn(shown)


def _pairs(values: dict[str, list[str]]) -> Table:
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for key, each in values.items():
        shown.add_row(Text(f"  {key}"), Text(" | ".join(each)))
    return shown


def _drawn(*parts: RenderableType) -> str:
    """As rich draws it: in colour and as wide as the terminal; elsewhere plain, and as wide as need be."""
    width = None if sys.stdout.isatty() else 4000
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
