"""From an artifact back to everything that made it: as a tree, as a graph, as a comparison of two histories."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import networkx as nx
from jinja2 import Environment, StrictUndefined
from rich.tree import Tree

from vla_opd.artifacts.manifest import differing, flat
from vla_opd.lineage.provenance import Origin, origin
from vla_opd.lineage.store import SHORT, Artifact, Settings, Store

TEMPLATE = "lineage.html.jinja"


@dataclass(frozen=True)
class History:
    """An artifact and all that it came from: what is here, each after its own parents, and the digests (with their role) of what isn't."""

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
        """What dvc.lock, git and the record of executions say of each of its parts, by digest. All their files are read."""
        return {one.digest: origin(one) for one in self.artifacts}

    @property
    def versions(self) -> dict[str, list[str]]:
        """What the artifacts were made with: packages, graphics, devices; all the values where they differ."""
        return _values(one.manifest.made_with for one in self.artifacts)

    @property
    def settings(self) -> dict[str, dict[str, list[str]]]:
        """For every kind of artifact its settings by dotted name; all the values where they differ."""
        kinds = dict.fromkeys(one.manifest.kind for one in self.artifacts)
        return {
            kind: _values(
                flat(one.manifest.params) for one in self.artifacts if one.manifest.kind == kind
            )
            for kind in kinds
        }


def _values(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, {})[str(value)] = None
    return {key: list(values) for key, values in sorted(found.items())}


# As a tree


def tree(told: History) -> Tree:
    """The artifact at the root, its parents below it by role. What stands twice is told once."""
    root = Tree(_line(told, told.artifact), guide_style="dim")
    _grow(told, told.artifact, root, {told.artifact.digest})
    return root


def _grow(told: History, artifact: Artifact, branch: Tree, seen: set[str]) -> None:
    for role, digest, parent in told.store.parents(artifact):
        if parent is None:
            branch.add(f"{role}: [yellow]{digest[:SHORT]}, not here[/]")
        elif digest in seen:
            branch.add(f"{role}: {parent.name} [dim]{digest[:SHORT]}, see above[/]")
        else:
            seen.add(digest)
            _grow(told, parent, branch.add(f"{role}: {_line(told, parent)}"), seen)


def _line(told: History, artifact: Artifact) -> str:
    return f"[bold]{artifact.name}[/] {artifact.digest[:SHORT]} [dim]{'; '.join(how(told.origins[artifact.digest]))}[/]"


def how(made: Origin) -> Iterator[str]:
    """The stage that made it, its command, who ran it, where, when, for how long and as which run of Prefect and W&B, and the commit of its code."""
    if made.stage:
        yield f"{made.stage}, by {made.command}"
    if last := made.last:
        times = f", {len(made.executions)} times" if len(made.executions) > 1 else ""
        yield f"{last.began:%Y-%m-%d %H:%M} UTC by {last.user} on {last.host} in {round((last.ended - last.began).total_seconds())} s{times}"
        if last.task_run:
            yield f"as Prefect task run {last.task_run} and W&B run {last.id}"
        yield (
            f"at commit {last.commit[:7]}{' with edits' if last.edited else ''}"
            if last.commit
            else "outside git"
        )
    if made.code:
        yield (
            f"its code is that of {made.commit[:7]}" if made.commit else "its code is in no commit"
        )


# As a graph


def mermaid(told: History) -> str:
    """A Mermaid flowchart, which GitHub and many editors draw."""
    lines = ["flowchart LR"]
    lines += [
        f'  {_node(one.digest)}["{one.name}<br/>{one.digest[:SHORT]}"]' for one in told.artifacts
    ]
    lines += [
        f'  {_node(digest)}(["{role}<br/>{digest[:SHORT]}, not here"])'
        for digest, role in told.missing.items()
    ]
    for one in told.artifacts:
        lines += [
            f"  {_node(parent)} -- {role} --> {_node(one.digest)}"
            for role, parent, _ in told.store.parents(one)
        ]
    return "\n".join(lines) + "\n"


def _node(digest: str) -> str:
    return f"n{digest[:SHORT]}"


@dataclass(frozen=True)
class Box:
    """Where an artifact is drawn, in boxes from the left and from the top."""

    digest: str
    name: str
    kind: str
    x: int
    y: int


COLUMNS = ("demonstrations", "trajectories", "logits", "checkpoint", "evaluation", "report")


def layout(told: History) -> dict[str, Box]:
    """Every artifact in the column of its kind, below all its parents. What is missing stands in its role's column, or in the first."""
    known = {one.digest: (one.name, str(one.manifest.kind)) for one in told.artifacts} | {
        d: (r, "missing") for d, r in told.missing.items()
    }
    kinds = {digest: name if kind == "missing" else kind for digest, (name, kind) in known.items()}
    present = [kind for kind in COLUMNS if kind in kinds.values()] or ["missing"]
    boxes: dict[str, Box] = {}
    top = 0
    for generation in nx.topological_generations(told.store.graph.subgraph(known)):
        filled = Counter[int]()
        for digest in sorted(generation, key=known.__getitem__):
            x = present.index(kinds[digest]) if kinds[digest] in present else 0
            boxes[digest] = Box(digest, *known[digest], x, top + filled[x])
            filled[x] += 1
        top += max(filled.values())
    return boxes


def page(told: History) -> str:
    """One HTML page, without scripts or anything from elsewhere: the graph, and what is known of every artifact in it."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("vla_opd.lineage").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    boxes = layout(told)
    edges = [
        (boxes[parent], boxes[one.digest])
        for one in told.artifacts
        for _, parent, _ in told.store.parents(one)
    ]
    lines = {one.digest: list(how(told.origins[one.digest])) for one in told.artifacts}
    return template.render(
        told=told, boxes=boxes.values(), edges=edges, lines=lines, short=SHORT, flat=flat
    )


# Two histories beside each other


@dataclass(frozen=True)
class Difference:
    """One thing that differs: in which part of the histories, what, and its value in the one and in the other."""

    part: str
    what: str
    first: str
    second: str


def diff(first: History, second: History) -> Iterator[Difference]:
    """What differs between the histories of two artifacts, part by part in the order in which they were made.

    Parts that play the same role are compared: those of the same name, whatever their run. Equal digests are the same part, and say nothing.
    """
    ours, theirs = (_parts(told) for told in (first, second))
    if _part(first.artifact) != _part(second.artifact):
        ours["itself"], theirs["itself"] = first.artifact, second.artifact
    absent = "not in its history"
    for role in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(role), theirs.get(role)
        if one is None or other is None:
            yield Difference(
                role,
                "artifact",
                one.digest[:SHORT] if one else absent,
                other.digest[:SHORT] if other else absent,
            )
        elif one.digest != other.digest:
            yield from (
                Difference(role, *row)
                for row in _rows(_described(first, one), _described(second, other))
            )
    gone = [
        {f"{role} {digest[:SHORT]}" for digest, role in told.missing.items()}
        for told in (first, second)
    ]
    yield from (
        Difference(
            "not here",
            name,
            (name in gone[0] and "needed") or absent,
            (name in gone[1] and "needed") or absent,
        )
        for name in sorted(gone[0] ^ gone[1])
    )


def _parts(told: History) -> dict[str, Artifact]:
    """The artifacts by name, without that of their run; with it where two runs have one of the same name."""
    parts: dict[str, Artifact] = {}
    for one in told.artifacts:
        parts[one.name if _part(one) in parts else _part(one)] = one
    return parts


def _part(artifact: Artifact) -> str:
    return artifact.name.partition("/")[2]


def _described(told: History, artifact: Artifact) -> Settings:
    """Everything that can tell two artifacts apart, by name: digest, parents, settings, results, versions, code."""
    manifest, made = artifact.manifest, told.origins[artifact.digest]
    described: Settings = {"digest": artifact.digest[:SHORT]}
    described |= {f"parent {role}": digest[:SHORT] for role, digest in manifest.parents.items()}
    described |= {f"params {key}": value for key, value in flat(manifest.params).items()}
    described |= {f"facts {key}": value for key, value in flat(manifest.facts).items()}
    described |= {f"made with {key}": value for key, value in manifest.made_with.items()}
    return described | {f"code {path}": md5[:SHORT] for path, md5 in (made.code or {}).items()}


def _rows(one: Settings, other: Settings) -> Iterator[tuple[str, str, str]]:
    for key in differing(one, other):
        yield key, str(one.get(key, "-")), str(other.get(key, "-"))
