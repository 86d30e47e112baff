"""The artifacts on disk as a graph: which artifact was made from which, by digest."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import networkx as nx

from vla_opd.artifacts.layout import ROOT
from vla_opd.artifacts.manifest import MANIFEST, Kind, Manifest, read_manifest

Settings = dict[str, Any]
SHORT = 12  # digits of a digest that are printed
SHORTEST = 6  # digits of a digest that are enough to name an artifact
LISTED = 20  # artifacts that an error message lists


@dataclass(frozen=True)
class Artifact:
    """A published artifact. `name` is its path, e.g. `libero-object/checkpoints/it003`."""

    name: str
    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def short(self) -> str:
        """The digits of its digest that are printed."""
        return self.digest[:SHORT]

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    @property
    def run(self) -> str:
        return self.name.partition("/")[0]

    @property
    def size(self) -> int:
        """The size of its files in bytes, without the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())


@dataclass(frozen=True)
class Store:
    """All artifacts under a folder. Of artifacts with equal digests, the first by name is used.

    broken:  folders whose manifest is missing or cannot be trusted: name and error message.
    claimed: the digests that broken manifests claim to have, where they can be read.
    """

    artifacts: tuple[Artifact, ...]
    broken: dict[str, str] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_digest(self) -> dict[str, Artifact]:
        return {artifact.digest: artifact for artifact in reversed(self.artifacts)}

    @cached_property
    def graph(self) -> nx.DiGraph:
        """An edge from every parent to its child, with its `role`. Nodes are digests.

        Artifacts that are missing are nodes too.
        """
        graph = nx.DiGraph()
        for artifact in self.artifacts:
            graph.add_node(artifact.digest)
            for role, parent in artifact.manifest.parents.items():
                graph.add_edge(parent, artifact.digest, role=role)
        return graph

    def parents(self, artifact: Artifact) -> Iterator[tuple[str, str, Artifact | None]]:
        """Yield role, digest and artifact of every parent; the artifact is None if missing."""
        for role, digest in artifact.manifest.parents.items():
            yield role, digest, self.by_digest.get(digest)

    def ancestors(self, artifact: Artifact) -> tuple[Artifact, ...]:
        """Return everything that an artifact came from, and then itself, parents first."""
        digests = nx.ancestors(self.graph, artifact.digest)
        return self._sort({artifact.digest, *digests})

    def descendants(self, digest: str) -> tuple[Artifact, ...]:
        """Return everything made from an artifact, which may be missing itself; parents first."""
        if digest not in self.graph:
            return ()
        return self._sort(nx.descendants(self.graph, digest))

    def missing(self, artifact: Artifact) -> dict[str, str]:
        """Return digest and role of the ancestors that are missing."""
        missing: dict[str, str] = {}
        for ancestor in self.ancestors(artifact):
            missing.update(self._missing_parents(ancestor))
        return missing

    def _missing_parents(self, artifact: Artifact) -> dict[str, str]:
        parents = artifact.manifest.parents.items()
        return {digest: role for role, digest in parents if digest not in self.by_digest}

    def find(self, text: str, run: str = "") -> Artifact:
        """Return the artifact with this path, end of a name or beginning of a digest.

        run: preferred if several runs have an artifact of that name.
        ValueError unless exactly one artifact matches.
        """
        matches = self._find_by_name(text, run) or self._find_by_digest(text)
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(artifact.name for artifact in matches)
            raise ValueError(
                f"{text} means {len(matches)} artifacts; expected one of them: {names}"
            )
        raise ValueError(f"{text}: {self._explain_absence(text)}")

    def _find_by_name(self, text: str, run: str) -> list[Artifact]:
        folder = Path(text).resolve()
        parts = _name_parts(text)
        in_folder: list[Artifact] = []
        by_name: list[Artifact] = []
        for artifact in self.artifacts:
            if artifact.folder.resolve() == folder:
                in_folder.append(artifact)
            if _ends_with(artifact.name, parts):
                by_name.append(artifact)
        matches = in_folder or by_name
        preferred = [artifact for artifact in matches if artifact.run == run]
        return preferred or matches

    def _find_by_digest(self, text: str) -> list[Artifact]:
        if len(text) < SHORTEST:
            return []
        artifacts = self.by_digest.values()
        return [artifact for artifact in artifacts if artifact.digest.startswith(text)]

    def _explain_absence(self, text: str) -> str:
        parts = _name_parts(text)
        for name, message in self.broken.items():
            if _ends_with(name, parts):
                return message
        names = ", ".join(artifact.name for artifact in self.artifacts[:LISTED])
        return (
            "no such artifact; expected a name, the end of one, or "
            f"{SHORTEST} or more digits of a digest. There are: {names or 'none yet: make run'}"
        )

    def _sort(self, digests: Iterable[str]) -> tuple[Artifact, ...]:
        selected = set(digests)
        artifacts: list[Artifact] = []
        for digest in nx.lexicographical_topological_sort(self.graph):
            artifact = self.by_digest.get(digest)
            if artifact is not None and digest in selected:
                artifacts.append(artifact)
        return tuple(artifacts)


def _name_parts(text: str) -> tuple[str, ...]:
    """Return the parts of a name; a leading `artifacts` is dropped."""
    parts = Path(text).parts
    if parts[:1] == ROOT.parts:
        return parts[1:]
    return parts


def _ends_with(name: str, parts: tuple[str, ...]) -> bool:
    if not parts:
        return False
    end = Path(name).parts[-len(parts) :]
    return end == parts


def read_store(root: Path = ROOT) -> Store:
    """Read every manifest under `root`, but not the files that they list (see `verify`).

    Links are not followed; drafts are skipped.
    """
    artifacts: list[Artifact] = []
    broken: dict[str, str] = {}
    claimed: dict[str, str] = {}
    for folder in _artifact_folders(root):
        name = folder.relative_to(root).as_posix()
        try:
            artifacts.append(read_artifact(folder, name))
        except (OSError, ValueError) as error:
            broken[name] = str(error)
            digest = _read_claimed_digest(folder / MANIFEST)
            if digest:
                claimed[name] = digest
    return Store(tuple(artifacts), broken, claimed)


def _artifact_folders(root: Path) -> Iterator[Path]:
    """Yield every folder with a manifest, and those that are where an artifact should be."""
    folders = {path.parent for path in root.rglob(MANIFEST)}
    for path in root.glob("*/*/*"):
        if path.is_dir():
            folders.add(path)
    for folder in sorted(folders):
        name = folder.relative_to(root).as_posix()  # of `root` itself: "."
        hidden = name.startswith(".") or "/." in name
        if not hidden and not folder.is_symlink():
            yield folder


def read_artifact(folder: Path, name: str) -> Artifact:
    """Read the artifact in a folder, of whatever kind.

    ValueError if its manifest cannot be trusted, OSError if it cannot be read.
    """
    kind = _read_kind(folder / MANIFEST)
    return Artifact(name, folder, read_manifest(folder, kind))


def _read_claimed_digest(path: Path) -> str:
    """Return the digest that a broken manifest claims to have; empty if it cannot be read."""
    try:
        return str(json.loads(path.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read_kind(path: Path) -> Kind:
    kinds = get_args(Kind)
    try:
        kind = json.loads(path.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a manifest: {problem}") from error
    if kind == "logits":
        raise ValueError(
            f"{path}: kind is 'logits', which earlier versions called a teacher's labels; expected "
            "'labels' (make them again with `opd run`, then remove this folder)"
        )
    if kind not in kinds:
        raise ValueError(f"{path}: kind is {kind!r}; expected one of {list(kinds)}")
    return kind
