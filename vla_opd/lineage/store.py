"""The artifacts on disk as a graph: who was made from whom, by digest."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import networkx as nx

from vla_opd.artifacts.manifest import MANIFEST, Kind, Manifest, read_manifest

ROOT = Path("artifacts")
Settings = dict[str, Any]
SHORT = 12  # digits of a digest that a person is shown
SHORTEST = 6  # digits of a digest that name an artifact


@dataclass(frozen=True)
class Artifact:
    """An artifact that is there. `name` is where it lies, e.g. `libero-object/checkpoints/it003`."""

    name: str
    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def run(self) -> str:
        return self.name.partition("/")[0]

    @property
    def size(self) -> int:
        """The bytes of its files, the manifest left out."""
        return sum(entry.size for entry in self.manifest.files.values())


@dataclass(frozen=True)
class Store:
    """All artifacts under a folder. Where two have one digest they are the same, and the first by name stands for both.

    broken: what lies in an artifact's place and has no manifest that can be trusted: the folder's name, and what is wrong.
    claimed: the digests that broken manifests say they have, as far as they can be read.
    """

    artifacts: tuple[Artifact, ...]
    broken: dict[str, str] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_digest(self) -> dict[str, Artifact]:
        return {artifact.digest: artifact for artifact in reversed(self.artifacts)}

    @cached_property
    def graph(self) -> nx.DiGraph:
        """An edge from every parent to what was made from it, named by its `role`; nodes are digests, those of missing artifacts too."""
        graph = nx.DiGraph()
        for artifact in self.artifacts:
            graph.add_node(artifact.digest)
            for role, parent in artifact.manifest.parents.items():
                graph.add_edge(parent, artifact.digest, role=role)
        return graph

    def parents(self, artifact: Artifact) -> Iterator[tuple[str, str, Artifact | None]]:
        """Role, digest and the artifact itself, None if it isn't here."""
        for role, digest in artifact.manifest.parents.items():
            yield role, digest, self.by_digest.get(digest)

    def ancestors(self, artifact: Artifact) -> tuple[Artifact, ...]:
        """Everything here that it came from and then itself, each after its own parents."""
        return self._in_order({artifact.digest} | nx.ancestors(self.graph, artifact.digest))

    def descendants(self, digest: str) -> tuple[Artifact, ...]:
        """Everything here that was made from an artifact (which need not be here), each after its own parents."""
        return self._in_order(nx.descendants(self.graph, digest) if digest in self.graph else set())

    def missing(self, artifact: Artifact) -> dict[str, str]:
        """Digest and role of what it came from and isn't here."""
        edges = [
            (role, digest)
            for one in self.ancestors(artifact)
            for role, digest, found in self.parents(one)
            if found is None
        ]
        return {digest: role for role, digest in edges}

    def find(self, text: str, run: str = "") -> Artifact:
        """The artifact that a path, the end of a name (`checkpoints/it003`) or the beginning of a digest means. ValueError if not exactly one.

        run: whose artifact is meant where several runs have one of that name.
        """
        parts = Path(text).parts
        wanted = parts[1:] if parts[:1] == ROOT.parts else parts
        there = Path(text).resolve()
        named = [a for a in self.artifacts if a.folder.resolve() == there] or [
            a for a in self.artifacts if _ends(a.name, wanted)
        ]
        named = [a for a in named if a.run == run] or named
        numbered = [
            a
            for a in self.by_digest.values()
            if len(text) >= SHORTEST and a.digest.startswith(text)
        ]
        found = named or numbered
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{text} means {len(found)} artifacts; expected one of them: {', '.join(a.name for a in found)}"
            )
        if spoiled := [what for name, what in self.broken.items() if _ends(name, wanted)]:
            raise ValueError(f"{text}: {spoiled[0]}")
        known = ", ".join(a.name for a in self.artifacts[:20]) or "none yet: make run"
        raise ValueError(
            f"{text}: no such artifact; expected a name, the end of one, or {SHORTEST} or more digits of a digest. There are: {known}"
        )

    def _in_order(self, digests: Iterable[str]) -> tuple[Artifact, ...]:
        wanted = set(digests)
        return tuple(
            self.by_digest[d]
            for d in nx.lexicographical_topological_sort(self.graph)
            if d in wanted and d in self.by_digest
        )


def _ends(name: str, parts: tuple[str, ...]) -> bool:
    return bool(parts) and Path(name).parts[-len(parts) :] == parts


def read_store(root: Path = ROOT) -> Store:
    """Read every manifest under `root`; the files that they list are not read (see `verify`). Links are not followed, drafts not seen."""
    artifacts: list[Artifact] = []
    broken: dict[str, str] = {}
    claimed: dict[str, str] = {}
    for folder in sorted(
        {path.parent for path in root.rglob(MANIFEST)}
        | {path for path in root.glob("*/*/*") if path.is_dir()}
    ):
        name = folder.relative_to(root).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or folder.is_symlink():
            continue
        try:
            artifacts.append(read_artifact(folder, name))
        except (OSError, ValueError) as error:
            broken[name] = str(error)
            claimed |= {name: digest} if (digest := _claimed(folder / MANIFEST)) else {}
    return Store(tuple(artifacts), broken, claimed)


def read_artifact(folder: Path, name: str) -> Artifact:
    """The artifact in a folder, whatever its kind. ValueError if its manifest can't be trusted, OSError if it can't be read."""
    return Artifact(name, folder, read_manifest(folder, _kind(folder / MANIFEST)))


def _claimed(path: Path) -> str:
    """The digest that an untrustworthy manifest says it has; empty if it can't be read."""
    try:
        return str(json.loads(path.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _kind(path: Path) -> Kind:
    try:
        kind = json.loads(path.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest: {type(error).__name__}: {error}") from error
    if kind not in get_args(Kind):
        raise ValueError(f"{path}: kind is {kind!r}; expected one of {list(get_args(Kind))}")
    return kind
