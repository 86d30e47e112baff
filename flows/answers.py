"""Answers about artifacts as the person at the terminal sees them: histories, differences, findings, tables."""

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from flows.lineage import Difference, History, tree
from flows.verify import Finding


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
