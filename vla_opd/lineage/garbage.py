"""Garbage collection: find and remove artifacts that nothing in use was made from."""

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from vla_opd.artifacts import files
from vla_opd.lineage.store import ROOT, SHORT, Artifact, Store
from vla_opd.params.run import Params


@dataclass(frozen=True)
class Garbage:
    """Artifacts that can be removed, and the size of their files in bytes."""

    artifacts: tuple[Artifact, ...]
    bytes: int


def find_needed(
    store: Store, params: Params, planned: Collection[Path], keep: Iterable[Artifact] = ()
) -> set[str]:
    """Return the digests of the artifacts that must stay.

    These are the run in params.yaml, the artifacts in `keep`, those that another run links to, and
    everything that any of them came from.
    planned: the folders of what the run's stages make.
    ValueError if that cannot be known, so that nothing is removed on a guess: no artifact stays, a
    manifest is broken, or an ancestor of an artifact that stays is missing (a set of
    demonstrations may be missing: it has no parents).
    """
    if store.broken:
        raise ValueError(
            f"gc: the manifests of {len(store.broken)} artifacts cannot be trusted, so it is "
            "unknown what these artifacts came from; expected none: "
            f"{', '.join(store.broken)} (remove them, or make them again)"
        )
    linked = _find_linked(store)
    roots = [
        artifact
        for artifact in store.artifacts
        if _is_planned(artifact, params, planned) or artifact.folder.resolve() in linked
    ]
    roots += keep
    if not roots:
        raise ValueError(
            f"gc: run.name is {params.run.name!r}, and there is no artifact of that run; "
            "expected the name of a run that was made, or --keep"
        )
    needed: set[str] = set()
    for artifact in roots:
        _require_ancestors(store, artifact)
        needed.update(ancestor.digest for ancestor in store.ancestors(artifact))
    return needed


def _require_ancestors(store: Store, artifact: Artifact) -> None:
    missing = [
        f"{role} {digest[:SHORT]}"
        for digest, role in store.missing(artifact).items()
        if role != "demonstrations"
    ]
    if missing:
        raise ValueError(
            f"gc: {artifact.name} came from {', '.join(missing)}, which is missing, so it is "
            "unknown what else it came from; expected all its ancestors (dvc pull)"
        )


def find_garbage(
    store: Store, params: Params, planned: Collection[Path], keep: Iterable[Artifact] = ()
) -> Garbage:
    """Find the artifacts that nothing needs. Arguments and errors as of `find_needed`.

    Tables of studies are never garbage: they are small, and making one again takes all members.
    """
    needed = find_needed(store, params, planned, keep)
    unneeded = tuple(
        artifact
        for artifact in store.artifacts
        if artifact.digest not in needed and artifact.kind != "study"
    )
    return Garbage(unneeded, sum(artifact.size for artifact in unneeded))


def remove(garbage: Garbage, root: Path = ROOT) -> None:
    """Delete the artifacts' folders, and what an earlier call that was killed left over.

    A folder is renamed before it is deleted, so that a kill never leaves half an artifact.
    """
    for leftover in root.rglob(".*.removed"):
        shutil.rmtree(leftover)
    for artifact in garbage.artifacts:
        files.remove(artifact.folder)


def _is_planned(artifact: Artifact, params: Params, planned: Collection[Path]) -> bool:
    """Return whether the run in params.yaml makes this artifact, by a stage or by a study."""
    if ROOT / artifact.name in planned:
        return True
    studies = ROOT / params.run.name
    pages = {studies / "report" / study for study in params.studies}
    tables = {studies / "studies" / study for study in params.studies}
    return ROOT / artifact.name in pages | tables


def _find_linked(store: Store, root: Path = ROOT) -> set[Path]:
    """Return the artifacts' folders that another run uses through a symbolic link.

    The link may be to the folder itself or to one above it.
    """
    targets: list[Path] = []
    for path in (*root.glob("*/*"), *root.glob("*/*/*")):
        if path.is_symlink():
            target = path.resolve()
            targets.append(target)
    linked: set[Path] = set()
    for artifact in store.artifacts:
        folder = artifact.folder.resolve()
        if any(folder.is_relative_to(target) for target in targets):
            linked.add(folder)
    return linked
