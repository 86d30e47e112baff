"""Which artifacts nobody needs any more: everything but what the kept checkpoints and evaluations came from."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vla_opd.artifacts import files
from vla_opd.lineage.store import ROOT, SHORT, Artifact, Store
from vla_opd.params.run import Params


@dataclass(frozen=True)
class Garbage:
    """Artifacts that may go, and the bytes that their files take."""

    artifacts: tuple[Artifact, ...]
    bytes: int


def kept(store: Store, params: Params, more: Iterable[Artifact] = ()) -> set[str]:
    """The digests of what must stay: params.yaml's run, what is named besides, what another run links to, and all that any of these came from.

    ValueError where that can't be known, so that nothing is ever removed on a guess: nothing is kept at all, a manifest is broken, or something
    that a kept artifact came from, and that itself came from something, isn't here.
    """
    if store.broken:
        raise ValueError(
            f"gc: {len(store.broken)} artifacts have no manifest that can be trusted, and what they came from isn't known; expected none: "
            f"{', '.join(store.broken)} (remove them, or make them again)"
        )
    linked = _linked(store)
    stay = [
        a
        for a in store.artifacts
        if (a.run == params.run.name and _planned(a, params)) or a.folder.resolve() in linked
    ]
    stay += more
    if not stay:
        raise ValueError(
            f"gc: run.name is {params.run.name!r}, and nothing of that run is here; expected a run that was made, or --keep"
        )
    for artifact in stay:
        if gone := [
            f"{role} {digest[:SHORT]}"
            for digest, role in store.missing(artifact).items()
            if role != "demonstrations"
        ]:
            raise ValueError(
                f"gc: {artifact.name} came from {', '.join(gone)}, which isn't here, so what that came from isn't known; expected it (dvc pull)"
            )
    return {one.digest for artifact in stay for one in store.ancestors(artifact)}


def garbage(store: Store, params: Params, more: Iterable[Artifact] = ()) -> Garbage:
    """What isn't kept, but for the tables of studies, which are small and can't be made again without all their members. Errors as of `kept`."""
    needed = kept(store, params, more)
    unneeded = tuple(
        a for a in store.artifacts if a.digest not in needed and a.manifest.kind != "study"
    )
    return Garbage(unneeded, sum(a.size for a in unneeded))


def remove(found: Garbage, root: Path = ROOT) -> None:
    """Delete the folders; each is renamed out of sight first, so that what a kill leaves behind is no half artifact. The next call sweeps it up."""
    for leftover in root.rglob(".*.removed"):
        shutil.rmtree(leftover)
    for artifact in found.artifacts:
        files.remove(artifact.folder)


def _planned(artifact: Artifact, params: Params) -> bool:
    """Whether the run that params.yaml describes has an artifact of this name."""
    folder, _, name = artifact.name.partition("/")[2].partition("/")
    planned: dict[str, set[str]] = {
        "checkpoints": {*params.origins, *params.updates},
        "trajectories": set(params.updates),
        "logits": set(params.iterations),
        "demonstrations": set(params.demonstrations),
        "evaluations": set(params.evaluations),
        "report": {"page", *params.studies},
        "studies": set(params.studies),
    }
    return name in planned.get(folder, ())


def _linked(store: Store, root: Path = ROOT) -> set[Path]:
    """The folders of artifacts that a link in or above an artifact's place leads to: another run lives on them."""
    targets = [
        path.resolve()
        for depth in ("*/*", "*/*/*")
        for path in root.glob(depth)
        if path.is_symlink()
    ]
    return {
        a.folder.resolve()
        for a in store.artifacts
        if any(a.folder.resolve().is_relative_to(target) for target in targets)
    }
