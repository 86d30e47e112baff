"""The history of an artifact: everything it came from, as a tree, as a graph, or compared."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from rich.tree import Tree

from vla_opd.artifacts.manifest import differing_keys, flatten
from vla_opd.lineage.provenance import Origin, find_origin
from vla_opd.lineage.store import SHORT, Artifact, Settings, Store
from vla_opd.machine.tracking import Execution
from vla_opd.pages import html

TEMPLATE = "lineage.html.jinja"
ABSENT = "not in its history"


@dataclass(frozen=True)
class History:
    """An artifact and everything it came from.

    artifacts: its ancestors and then itself, parents first. missing: digest and role of ancestors
    that are not in the store.
    """

    artifact: Artifact
    store: Store

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        return self.store.ancestors(self.artifact)

    @cached_property
    def missing(self) -> dict[str, str]:
        return self.store.missing(self.artifact)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """How every artifact was made, by digest. Reads all their files."""
        return {artifact.digest: find_origin(artifact) for artifact in self.artifacts}

    @property
    def versions(self) -> dict[str, list[str]]:
        """The versions of packages, graphics and devices; several values where they differ."""
        return _collect_values(artifact.manifest.made_with for artifact in self.artifacts)

    @property
    def settings(self) -> dict[str, dict[str, list[str]]]:
        """The settings by kind of artifact and dotted key; several values where they differ."""
        by_kind: dict[str, list[Settings]] = {}
        for artifact in self.artifacts:
            rows = by_kind.setdefault(artifact.kind, [])
            settings = flatten(artifact.manifest.params)
            rows.append(settings)
        return {kind: _collect_values(rows) for kind, rows in by_kind.items()}


def _collect_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the distinct values of every key, in order of appearance; keys are sorted."""
    values: dict[str, list[str]] = {}
    for row in rows:
        for key, value in row.items():
            distinct = values.setdefault(key, [])
            if str(value) not in distinct:
                distinct.append(str(value))
    return dict(sorted(values.items()))


# As a tree


def tree(history: History) -> Tree:
    """Draw the artifact as the root and its parents below it, by role; each artifact once."""
    root = Tree(_describe(history, history.artifact), guide_style="dim")
    _add_parents(history, history.artifact, root, {history.artifact.digest})
    return root


def _add_parents(history: History, artifact: Artifact, branch: Tree, drawn: set[str]) -> None:
    parents = history.store.parents(artifact)
    for role, digest, parent in parents:
        short = digest[:SHORT]
        if parent is None:
            branch.add(f"{role}: [yellow]{short}, not here[/]")
        elif digest in drawn:
            branch.add(f"{role}: {parent.name} [dim]{short}, see above[/]")
        else:
            drawn.add(digest)
            description = _describe(history, parent)
            child = branch.add(f"{role}: {description}")
            _add_parents(history, parent, child, drawn)


def _describe(history: History, artifact: Artifact) -> str:
    phrases = describe_origin(history.origins[artifact.digest])
    origin = "; ".join(phrases)
    return f"[bold]{artifact.name}[/] {artifact.short} [dim]{origin}[/]"


def describe_origin(origin: Origin) -> Iterator[str]:
    """Yield phrases: stage and command; who ran it, where and when; its run ids; its commits."""
    if origin.stage:
        yield f"{origin.stage}, by {origin.command}"
    if origin.last:
        yield from _describe_execution(origin.last, len(origin.executions))
    if origin.code and origin.commit:
        yield f"its code is that of {origin.commit[:7]}"
    elif origin.code:
        yield "its code is in no commit"


def _describe_execution(last: Execution, count: int) -> Iterator[str]:
    duration = last.ended - last.began
    seconds = round(duration.total_seconds())
    times = f", {count} times" if count > 1 else ""
    yield f"{last.began:%Y-%m-%d %H:%M} UTC by {last.user} on {last.host} in {seconds} s{times}"
    if last.task_run:
        yield f"as Prefect task run {last.task_run} and W&B run {last.id}"
    if not last.commit:
        yield "outside git"
    elif last.edited:
        yield f"at commit {last.commit[:7]} with edits"
    else:
        yield f"at commit {last.commit[:7]}"


# As a graph


def mermaid(history: History) -> str:
    """Return a Mermaid flowchart, which GitHub and many editors render."""
    nodes: list[str] = []
    edges: list[str] = []
    for artifact in history.artifacts:
        child = artifact.short
        nodes.append(f'  n{child}["{artifact.name}<br/>{child}"]')
        parents = _shorten(artifact.manifest.parents)
        for role, parent in parents.items():
            edges.append(f"  n{parent} -- {role} --> n{child}")
    for digest, role in history.missing.items():
        short = digest[:SHORT]
        nodes.append(f'  n{short}(["{role}<br/>{short}, not here"])')
    lines = ["flowchart LR", *nodes, *edges, ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class Box:
    """A box of the drawn graph. x, y: its column and row, counted from the top left."""

    digest: str
    name: str
    kind: str
    x: int
    y: int


COLUMNS = (
    "demonstrations",
    "trajectories",
    "labels",
    "checkpoint",
    "evaluation",
    "study",
    "report",
)
"""The kinds of artifacts, in the order of the drawn graph's columns."""


def layout(history: History) -> dict[str, Box]:
    """Place every artifact in the column of its kind, below all its parents.

    A missing artifact is placed in the column of its role, or in the first column.
    """
    labels = _labels(history)
    columns = _columns(history)
    graph = history.store.graph.subgraph(labels)
    boxes: dict[str, Box] = {}
    top = 0
    for generation in nx.topological_generations(graph):
        filled = Counter[int]()
        for digest in sorted(generation, key=labels.__getitem__):
            x = columns[digest]
            y = top + filled[x]
            name, kind = labels[digest]
            boxes[digest] = Box(digest, name, kind, x, y)
            filled[x] += 1
        top += max(filled.values())
    return boxes


def _labels(history: History) -> dict[str, tuple[str, str]]:
    """Return name and kind of every artifact by digest."""
    labels: dict[str, tuple[str, str]] = {}
    for artifact in history.artifacts:
        label = (artifact.name, artifact.kind)
        labels[artifact.digest] = label
    for digest, role in history.missing.items():
        labels[digest] = (role, "missing")
    return labels


def _columns(history: History) -> dict[str, int]:
    """Return the column of every artifact by digest; columns that would be empty are left out."""
    kinds = dict(history.missing)
    for artifact in history.artifacts:
        kinds[artifact.digest] = artifact.kind
    present = set(kinds.values())
    used = [kind for kind in COLUMNS if kind in present]
    columns: dict[str, int] = {}
    for digest, kind in kinds.items():
        is_used = kind in used
        columns[digest] = used.index(kind) if is_used else 0
    return columns


def page(history: History) -> str:
    """Return an HTML page with the graph and what is recorded of every artifact in it.

    It has no scripts and loads nothing from the network.
    """
    boxes = layout(history)
    return html.render(
        "vla_opd.lineage",
        TEMPLATE,
        history=history,
        boxes=boxes.values(),
        edges=list(_edges(history, boxes)),
        describe_origin=describe_origin,
        short=SHORT,
        flatten=flatten,
    )


def _edges(history: History, boxes: Mapping[str, Box]) -> Iterator[tuple[Box, Box]]:
    for artifact in history.artifacts:
        child = boxes[artifact.digest]
        for parent in artifact.manifest.parents.values():
            yield boxes[parent], child


# Compared


@dataclass(frozen=True)
class Difference:
    """A difference between two histories: in which artifact, in which field, and both values."""

    part: str
    field: str
    first: str
    second: str


def diff(first: History, second: History) -> Iterator[Difference]:
    """Yield the differences between two histories, artifact by artifact, ancestors first.

    Artifacts of the same name are compared, of whatever run; the two artifacts themselves are
    compared even if their names differ. Equal digests are skipped.
    """
    first_parts = _parts(first)
    second_parts = _parts(second)
    if _name_in_run(first.artifact) != _name_in_run(second.artifact):
        first_parts["itself"] = first.artifact
        second_parts["itself"] = second.artifact
    for part in dict.fromkeys([*first_parts, *second_parts]):
        before = first_parts.get(part)
        after = second_parts.get(part)
        if before is None or after is None:
            yield Difference(
                part,
                "artifact",
                _short_digest(before),
                _short_digest(after),
            )
        elif before.digest != after.digest:
            fields_before = _fields(first, before)
            fields_after = _fields(second, after)
            yield from _compare_fields(part, fields_before, fields_after)
    yield from _compare_missing(first, second)


def _parts(history: History) -> dict[str, Artifact]:
    """Return the artifacts by name without their run, or with it if two have the same name."""
    parts: dict[str, Artifact] = {}
    for artifact in history.artifacts:
        name = _name_in_run(artifact)
        parts[artifact.name if name in parts else name] = artifact
    return parts


def _name_in_run(artifact: Artifact) -> str:
    return artifact.name.partition("/")[2]


def _short_digest(artifact: Artifact | None) -> str:
    return ABSENT if artifact is None else artifact.short


def _fields(history: History, artifact: Artifact) -> Settings:
    """Return everything in which two artifacts can differ: digest, parents, settings, and so on."""
    manifest = artifact.manifest
    origin = history.origins[artifact.digest]
    groups: dict[str, Mapping[str, Any]] = {
        "parent": _shorten(manifest.parents),
        "params": flatten(manifest.params),
        "facts": flatten(manifest.facts),
        "made with": manifest.made_with,
        "code": _shorten(origin.code or {}),
    }
    fields: Settings = {"digest": artifact.short}
    for group, values in groups.items():
        for key, value in values.items():
            fields[f"{group} {key}"] = value
    return fields


def _shorten(digests: Mapping[str, str]) -> dict[str, str]:
    short: dict[str, str] = {}
    for name, digest in digests.items():
        short[name] = digest[:SHORT]
    return short


def _compare_fields(part: str, first: Settings, second: Settings) -> Iterator[Difference]:
    for key in differing_keys(first, second):
        yield Difference(
            part,
            key,
            str(first.get(key, "-")),
            str(second.get(key, "-")),
        )


def _compare_missing(first: History, second: History) -> Iterator[Difference]:
    first_names = _missing_names(first)
    second_names = _missing_names(second)
    for name in sorted(first_names ^ second_names):
        values = ("needed", ABSENT) if name in first_names else (ABSENT, "needed")
        yield Difference("not here", name, *values)


def _missing_names(history: History) -> set[str]:
    names: set[str] = set()
    for digest, role in history.missing.items():
        names.add(f"{role} {digest[:SHORT]}")
    return names
