"""One shard of an artifact, made again and compared byte for byte.

The stage itself does it: it is given a draft that has every shard but this one, as if it had been killed just before, and goes on.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import Manifest, differing, flat
from vla_opd.data import zarr_zip
from vla_opd.data.zarr_zip import SUFFIX
from vla_opd.lineage.store import SHORT, Artifact, Store
from vla_opd.machine.host import Host
from vla_opd.params.run import Params
from vla_opd.params.stages import DemonstrationSet

Section = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """What came out. `differing` are the arrays of the shard that differ; none, if the shard is what its inputs and settings make, byte for byte."""

    name: str
    shard: str
    differing: tuple[str, ...]


def replay(store: Store, artifact: Artifact, shard: str, params: Params, host: Host) -> Replay:
    """Make one shard of a set of demonstrations, trajectories or logits again, with the code and on the machine that are here.

    params: a run from which everything is taken that the artifact's own settings don't say.
    ValueError if a parent isn't here, there is no such shard, or this version of the stage has other settings.
    """
    stage = _stage(store, artifact, params)
    shard = f"{shard.removesuffix(SUFFIX)}{SUFFIX}"
    there = sorted(name for name in artifact.manifest.files if name.endswith(SUFFIX))
    if shard not in there:
        raise ValueError(f"{artifact.name} has no shard {shard!r}; expected one of {there}")
    with tempfile.TemporaryDirectory(dir=artifact.folder.parent, prefix=".replay-") as folder:
        out = Path(folder) / artifact.folder.name
        draft = Draft(
            out, artifact.manifest.kind, artifact.manifest.parents, artifact.manifest.params
        )
        draft.prepare()
        for name in there:
            if name != shard:
                link(artifact.folder / name, draft.folder / name)
        made = stage(out=out, host=host)
        assert made is not None  # all of it, not a share
        if unlike := sorted(differing(flat(artifact.manifest.params), flat(made.params))):
            raise ValueError(
                f"{artifact.name}: with the code that is here it can't be made under the settings that it has; {', '.join(unlike)} would differ"
            )
        if shard not in made.files:
            raise ValueError(
                f"{artifact.name}: the code that is here makes no {shard}; it makes {sorted(made.files)}"
            )
        if made.files[shard] == artifact.manifest.files[shard]:
            return Replay(artifact.name, shard, ())
        unlike = differing(_contents(artifact.folder / shard), _contents(out / shard))
        return Replay(
            artifact.name, shard, tuple(sorted(unlike)) or ("only the bytes of the file",)
        )


def _contents(shard: Path) -> dict[str, Any]:
    columns, attributes = zarr_zip.read(shard)
    return {"attributes": attributes} | {
        name: (values.dtype.str, values.shape, values.tobytes()) for name, values in columns.items()
    }


def _stage(store: Store, artifact: Artifact, params: Params) -> Callable[..., Manifest | None]:
    """The stage that made the artifact, with the settings and inputs that it had. ValueError for a kind that isn't made of shards."""
    from stages import demonstrate, explore, label, sample

    its = artifact.manifest.params
    match artifact.manifest.kind:
        case "demonstrations":
            again = _with(
                params,
                run={"seed": its["seed"]},
                demonstrate=its["demonstrate"],
                environment=its["environment"],
                policy={"chunk": its["chunk"]},
            )
            wanted = DemonstrationSet(
                tasks=tuple(its["environment"]["tasks"]), episodes=its["episodes"]
            )
            return partial(
                demonstrate.run,
                again.model_copy(update={"demonstrations": {its["set"]: wanted}}),
                its["set"],
            )
        case "trajectories" if "explore" in its:
            again = _with(
                params,
                run={"learning_seed": its["seed"]},
                explore=its["explore"],
                environment=its["environment"],
            )
            return partial(
                explore.run, again, its["iteration"], _parent(store, artifact, "student")
            )
        case "trajectories":
            again = _with(
                params,
                run={"learning_seed": its["seed"]},
                sample=its["sample"],
                environment=its["environment"],
            )
            student = _parent(store, artifact, "student")
            teacher = (
                _parent(store, artifact, "teacher")
                if "teacher" in artifact.manifest.parents
                else student
            )
            return partial(sample.run, again, its["iteration"], student, teacher)
        case "logits":
            return partial(
                label.run,
                _with(params, label=its["label"]),
                _parent(store, artifact, "teacher"),
                _parent(store, artifact, "trajectories"),
            )
        case kind:
            raise ValueError(
                f"{artifact.name}: a {kind} isn't made of shards; expected demonstrations, trajectories or logits"
            )


def _with(params: Params, **sections: Mapping[str, Any]) -> Params:
    """The run with some settings replaced. Whether the result is a run that params.yaml could hold is no matter here."""
    changed = {
        name: type(old := getattr(params, name)).model_validate(old.model_dump() | dict(values))
        for name, values in sections.items()
    }
    return params.model_copy(update=changed)


def _parent(store: Store, artifact: Artifact, role: str) -> Path:
    digest = artifact.manifest.parents[role]
    if (found := store.by_digest.get(digest)) is None:
        raise ValueError(
            f"{artifact.name}: its {role} {digest[:SHORT]} isn't here; expected it, to make a shard again (dvc pull, or make it)"
        )
    return found.folder
