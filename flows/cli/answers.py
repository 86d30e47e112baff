"""Text for the terminal: histories, differences, findings, comparisons and tables."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from vla_opd.analysis.comparison import Comparison, compare
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.data.records import Record, read_records
from vla_opd.lineage.history import Difference, History, tree
from vla_opd.lineage.store import Artifact
from vla_opd.lineage.verify import Finding


def history(artifact_history: History) -> str:
    """Format a history as a tree, followed by its settings and versions."""
    parts: list[RenderableType] = [tree(artifact_history)]
    for kind, settings in artifact_history.settings.items():
        parts += ["", f"[bold]{kind}[/]: settings", _values_table(settings)]
    parts += ["", "[bold]versions[/]", _values_table(artifact_history.versions)]
    count = len(artifact_history.missing)
    if count:
        message = f"{count} artifacts of this history are missing; only their digests are known"
        parts += ["", f"[yellow]{message}[/]"]
    return _render(*parts)


def differences(items: Sequence[Difference]) -> str:
    """Format the differences between two histories, one per line."""
    if not items:
        return "  nothing differs"
    rows = [(item.part, item.field, item.first, item.second) for item in items]
    return table(["part", "field", "first", "second"], rows)


def findings(items: Sequence[Finding], checked: int) -> str:
    """Format damaged artifacts with what they make void, and the number of artifacts checked."""
    lines: list[str] = []
    for item in items:
        void = ", ".join(item.void) or "nothing"
        lines.append(f"  {item.problem}\n    void with it: {void}")
    lines.append(f"  {checked} artifacts checked, {len(items)} damaged")
    return "\n".join(lines)


@dataclass(frozen=True)
class OpenedEvaluation:
    """An evaluation's name, its environment, its horizon in control steps, and its episodes."""

    name: str
    environment: Mapping[str, Any]
    horizon: int
    records: tuple[Record, ...]

    def of_task(self, task: str) -> list[Record]:
        """Return the episodes of one task."""
        return [record for record in self.records if record.task == task]


def open_evaluation(artifact: Artifact, horizon: int | None) -> OpenedEvaluation:
    """Open an evaluation. ValueError if it is another kind of artifact, or ran for less steps."""
    if artifact.kind != "evaluation":
        raise ValueError(f"{artifact.name}: is of kind {artifact.kind}; expected an evaluation")
    manifest = open_artifact(artifact.folder, "evaluation")
    recorded = int(manifest.facts["horizon"])
    if horizon is not None and horizon > recorded:
        raise ValueError(
            f"--horizon is {horizon}; expected at most {recorded}, the horizon of {artifact.name}"
        )
    return OpenedEvaluation(
        artifact.name,
        manifest.params["environment"],
        recorded,
        read_records(artifact.folder),
    )


def comparison(
    first: OpenedEvaluation, second: OpenedEvaluation, confidence: float, horizon: int | None
) -> str:
    """Format the comparison of two evaluations, by task and overall.

    ValueError unless they have the same episodes, horizon and environment.
    """
    _require_same_environment(first, second)
    if horizon is None and first.horizon != second.horizon:
        raise ValueError(
            f"the horizon of {first.name} is {first.horizon} control steps and that of "
            f"{second.name} is {second.horizon}; expected --horizon"
        )
    overall = compare(first.records, second.records, confidence, horizon)
    rows: list[tuple[Any, ...]] = []
    tasks = dict.fromkeys(record.task for record in first.records)
    for task in tasks:
        of_task = compare(first.of_task(task), second.of_task(task), confidence, horizon)
        rows.append(_comparison_row(task, of_task))
    rows.append(_comparison_row("all", overall))
    columns = ["task", "episodes", first.name, second.name, "first only", "second only"]
    interval = f"{overall.low:+.1%} ... {overall.high:+.1%}"
    outcomes = table(columns, rows)
    return (
        f"{outcomes}\n"
        f"  second - first: {overall.difference:+.1%}, {confidence:.0%} interval {interval} "
        "(paired bootstrap within tasks)\n"
        f"  McNemar's exact test: p = {overall.p:.3g}"
    )


def _require_same_environment(first: OpenedEvaluation, second: OpenedEvaluation) -> None:
    for field, value in first.environment.items():
        if field != "tasks" and value != second.environment[field]:
            raise ValueError(
                f"environment.{field} is {value!r} in {first.name} and "
                f"{second.environment[field]!r} in {second.name}; expected the same in both"
            )


def _comparison_row(name: str, outcome: Comparison) -> tuple[Any, ...]:
    first_rate = (outcome.both + outcome.first) / outcome.episodes
    second_rate = (outcome.both + outcome.second) / outcome.episodes
    return (
        name,
        outcome.episodes,
        f"{first_rate:.1%}",
        f"{second_rate:.1%}",
        outcome.first,
        outcome.second,
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table with a header."""
    shown = Table(*columns, box=box.SIMPLE, header_style="bold", pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(str(value)) for value in row))
    return _render(shown)


def _values_table(values: Mapping[str, Sequence[str]]) -> Table:
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for key, distinct in values.items():
        shown.add_row(Text(f"  {key}"), Text(" | ".join(distinct)))
    return shown


def _render(*parts: RenderableType) -> str:
    """Render in colour and at the terminal's width, or elsewhere as plain lines of any width."""
    width = None if sys.stdout.isatty() else 4000
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    lines = captured.get().splitlines()
    return "\n".join(line.rstrip() for line in lines)
