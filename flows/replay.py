"""One shard of an artifact, made again and compared byte for byte.

The stage itself does it: it is given a draft that has every shard but this one, as if it had been killed just before, and goes on.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.store import SHORT, Artifact, Store, differing, flat
from vla_opd.artifacts import Draft, Manifest
from vla_opd.host import Host
from vla_opd.params import DemonstrationSet, Params

Section = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """What came out. `differing` are the files of the shard whose bytes differ; none, if the shard is what its inputs and settings make."""

    name: str
    shard: str
    differing: tuple[str, ...]
    files: int


def replay(store: Store, artifact: Artifact, shard: str, params: Params, host: Host) -> Replay:
    """Make one shard of a set of demonstrations, trajectories or logits again, with the code and on the machine that are here.

    params: a run from which everything is taken that the artifact's own settings don't say.
    ValueError if a parent isn't here, there is no such shard, or this version of the stage has other settings.
    """
    there = sorted({name.partition("/")[0] for name in artifact.manifest.files})
    if shard not in there:
        raise ValueError(f"{artifact.name} has no shard {shard!r}; expected one of {there}")
    stage = _stage(store, artifact, params)
    with tempfile.TemporaryDirectory(dir=artifact.folder.parent, prefix=".replay-") as folder:
        out = Path(folder) / artifact.folder.name
        draft = Draft(out, artifact.manifest.kind, artifact.manifest.parents, artifact.manifest.params)
        draft.prepare()
        for name in there:
            if name != shard:
                shutil.copytree(artifact.folder / name, draft.folder / name, copy_function=_link)
        made = stage(out=out, host=host)
        if unlike := sorted(differing(flat(artifact.manifest.params), flat(made.params))):
            raise ValueError(
                f"{artifact.name}: with the code that is here it can't be made under the settings that it has; {', '.join(unlike)} would differ"
            )
        return Replay(artifact.name, shard, _differing(artifact.manifest, made, shard), sum(n.startswith(f"{shard}/") for n in made.files))


def _link(source: str, target: str) -> None:
    """Shards are never written to, so a link will do where the file system has links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _differing(old: Manifest, new: Manifest, shard: str) -> tuple[str, ...]:
    names = {name for manifest in (old, new) for name in manifest.files if name.startswith(f"{shard}/")}
    return tuple(sorted(name for name in names if old.files.get(name) != new.files.get(name)))


def _stage(store: Store, artifact: Artifact, params: Params) -> Callable[..., Manifest]:
    """The stage that made the artifact, with the settings and inputs that it had. ValueError for a kind that isn't made of shards."""
    from stages import demonstrate, label, sample

    its = artifact.manifest.params
    match artifact.manifest.kind:
        case "demonstrations":
            again = _with(
                params, run={"seed": its["seed"]}, demonstrate=its["demonstrate"], environment=its["environment"], policy={"chunk": its["chunk"]}
            )
            wanted = DemonstrationSet(tasks=tuple(its["environment"]["tasks"]), episodes=its["episodes"])
            return partial(demonstrate.run, again.model_copy(update={"demonstrations": {its["set"]: wanted}}), its["set"])
        case "trajectories":
            again = _with(params, run={"seed": its["seed"]}, sample=its["sample"], environment=its["environment"])
            return partial(sample.run, again, its["iteration"], _parent(store, artifact, "student"))
        case "logits":
            return partial(
                label.run, _with(params, label=its["label"]), _parent(store, artifact, "teacher"), _parent(store, artifact, "trajectories")
            )
        case kind:
            raise ValueError(f"{artifact.name}: a {kind} isn't made of shards; expected demonstrations, trajectories or logits")


def _with(params: Params, **sections: Mapping[str, Any]) -> Params:
    """The run with some settings replaced. Whether the result is a run that params.yaml could hold is no matter here."""
    changed = {name: type(old := getattr(params, name)).model_validate(old.model_dump() | dict(values)) for name, values in sections.items()}
    return params.model_copy(update=changed)


def _parent(store: Store, artifact: Artifact, role: str) -> Path:
    digest = artifact.manifest.parents[role]
    if (found := store.by_digest.get(digest)) is None:
        raise ValueError(f"{artifact.name}: its {role} {digest[:SHORT]} isn't here; expected it, to make a shard again (dvc pull, or make it)")
    return found.folder
