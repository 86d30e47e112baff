"""Answers about artifacts as the person at the terminal sees them: histories, differences, findings, tables."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from vla_opd.analysis.comparison import Comparison, compare
from vla_opd.analysis.evaluation import Record, read_records
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.lineage.history import Difference, History, tree
from vla_opd.lineage.store import Artifact
from vla_opd.lineage.verify import Finding


def history(told: History) -> str:
    """A history as a tree, and what all of it was made with: a setting that differs between artifacts of one kind with all its values."""
    parts: list[RenderableType] = [tree(told)]
    for kind, settings in told.settings.items():
        parts += ["", f"[bold]{kind}[/]: settings", _pairs(settings)]
    parts += ["", "[bold]versions[/]", _pairs(told.versions)]
    if told.missing:
        parts += [
            "",
            f"[yellow]{len(told.missing)} artifacts of this history aren't here; their digests are all that is known of them[/]",
        ]
    return _drawn(*parts)


def differences(found: Sequence[Difference]) -> str:
    """What differs between two histories, a line each."""
    return (
        rows(
            ["part", "what", "first", "second"],
            [(d.part, d.what, d.first, d.second) for d in found],
        )
        if found
        else "  nothing differs"
    )


def findings(found: Sequence[Finding], checked: int) -> str:
    """What is wrong, and what is void with it; or that nothing is."""
    lines = [f"  {one.what}\n    void with it: {', '.join(one.void) or 'nothing'}" for one in found]
    return "\n".join([*lines, f"  {checked} artifacts checked, {len(found)} damaged"])


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, opened: its name, the environment and the horizon that it ran with, and its episodes."""

    name: str
    environment: Mapping[str, Any]
    horizon: int
    records: tuple[Record, ...]


def evaluated(artifact: Artifact, horizon: int | None) -> Evaluated:
    """Open an evaluation. ValueError if it is none, or ran for less than `horizon`."""
    if artifact.manifest.kind != "evaluation":
        raise ValueError(
            f"{artifact.name}: is of kind {artifact.manifest.kind}; expected an evaluation"
        )
    manifest = open_artifact(artifact.folder, "evaluation")
    ran = int(manifest.facts["horizon"])
    if horizon is not None and horizon > ran:
        raise ValueError(
            f"--horizon is {horizon}; expected at most {ran}, for which {artifact.name} ran"
        )
    return Evaluated(
        artifact.name, manifest.params["environment"], ran, read_records(artifact.folder)
    )


def compared(first: Evaluated, second: Evaluated, confidence: float, horizon: int | None) -> str:
    """The comparison of two evaluations, task by task and over all. ValueError unless they are of the same episodes, horizon and environment."""
    for field, ours in first.environment.items():
        if field != "tasks" and ours != second.environment[field]:
            raise ValueError(
                f"environment.{field} is {ours!r} in {first.name} and {second.environment[field]!r} in {second.name}; expected the same in both"
            )
    if horizon is None and first.horizon != second.horizon:
        raise ValueError(
            f"{first.name} ran for {first.horizon} control steps and {second.name} for {second.horizon}; expected --horizon"
        )
    whole = compare(first.records, second.records, confidence, horizon)
    shown: list[tuple[Any, ...]] = []
    for task in dict.fromkeys(record.task for record in first.records):
        ours, theirs = (
            [record for record in one.records if record.task == task] for one in (first, second)
        )
        shown.append(_compared(task, compare(ours, theirs, confidence, horizon)))
    shown.append(_compared("all", whole))
    columns = ["task", "episodes", first.name, second.name, "first only", "second only"]
    told = (
        f"  second - first: {whole.difference:+.1%}, {confidence:.0%} interval "
        f"{whole.low:+.1%} ... {whole.high:+.1%} (paired bootstrap within tasks)"
    )
    return f"{rows(columns, shown)}\n{told}\n  McNemar's exact test: p = {whole.p:.3g}"


def _compared(name: str, found: Comparison) -> tuple[Any, ...]:
    successes = (
        f"{(found.both + alone) / found.episodes:.1%}" for alone in (found.first, found.second)
    )
    return (name, found.episodes, *successes, found.first, found.second)


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
