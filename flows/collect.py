"""Which artifacts nobody needs any more: everything but what the kept checkpoints and evaluations came from."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flows.store import Artifact, Store
from vla_opd.params import Params


@dataclass(frozen=True)
class Garbage:
    """Artifacts that may go, and the bytes that their files take."""

    artifacts: tuple[Artifact, ...]
    bytes: int


def kept(store: Store, params: Params, more: Iterable[Artifact] = ()) -> set[str]:
    """The digests of what must stay: all that params.yaml's run is made of, what is named besides, and all that any of these came from."""
    run = [a for a in store.artifacts if a.run == params.run.name and _planned(a, params)]
    return {one.digest for artifact in [*run, *more] for one in store.ancestors(artifact)}


def garbage(store: Store, params: Params, more: Iterable[Artifact] = ()) -> Garbage:
    """What isn't kept. Artifacts whose manifest can't be read are left alone: what they were made for isn't known."""
    needed = kept(store, params, more)
    unneeded = tuple(a for a in store.artifacts if a.digest not in needed and not _linked(a.folder))
    return Garbage(unneeded, sum(entry.size for a in unneeded for entry in a.manifest.files.values()))


def remove(found: Garbage) -> None:
    """Delete the folders; each is renamed out of sight first, so that what a kill leaves behind is no half artifact."""
    for artifact in found.artifacts:
        hidden = artifact.folder.with_name(f".{artifact.folder.name}.removed")
        artifact.folder.rename(hidden)
        shutil.rmtree(hidden)


def _planned(artifact: Artifact, params: Params) -> bool:
    """Whether the run that params.yaml describes has an artifact of this name."""
    folder, _, name = artifact.name.partition("/")[2].partition("/")
    planned: dict[str, set[str]] = {
        "checkpoints": {*params.finetuned, *params.iterations},
        "trajectories": set(params.iterations),
        "logits": set(params.iterations),
        "demonstrations": set(params.demonstrations),
        "evaluations": set(params.evaluations),
        "report": {"page"},
    }
    return name in planned.get(folder, ())


def _linked(folder: Path) -> bool:
    """Whether it is part of another run, and only linked into this one."""
    return any(parent.is_symlink() for parent in (folder, *folder.parents))
