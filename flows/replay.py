"""One shard of an artifact, made again and compared byte for byte.

The stage itself does it: it gets a draft that has every shard but this one, as if it had been
killed just before, and resumes.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.catalog import STAGES
from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import Manifest, differing_keys, flatten
from vla_opd.data import zarr_zip
from vla_opd.data.zarr_zip import SUFFIX
from vla_opd.lineage.store import SHORT, Artifact, Store
from vla_opd.machine.host import Host
from vla_opd.params.run import Params
from vla_opd.params.stages import DemonstrationSet


@dataclass(frozen=True)
class Replay:
    """A shard made again. differing: the names of its arrays that differ; empty if none does."""

    name: str
    shard: str
    differing: tuple[str, ...]


def replay(store: Store, artifact: Artifact, shard: str, params: Params, host: Host) -> Replay:
    """Make one shard of demonstrations, trajectories or labels again, with this code and machine.

    params: a run, for settings that the artifact did not record.
    ValueError if a parent is missing, there is no such shard, or this version of the stage has
    other settings.
    """
    verb = _stage_of(artifact)
    inputs = _inputs(verb, store, artifact, params)
    shard = f"{shard.removesuffix(SUFFIX)}{SUFFIX}"
    files = artifact.manifest.files
    shards = sorted(name for name in files if name.endswith(SUFFIX))
    if shard not in shards:
        raise ValueError(f"{artifact.name} has no shard {shard!r}; expected one of {shards}")
    with tempfile.TemporaryDirectory(dir=artifact.folder.parent, prefix=".replay-") as folder:
        out = Path(folder) / artifact.folder.name
        _draft_without(shard, shards, artifact, out)
        stage = import_module(f"stages.{verb}")
        remade = stage.run(**inputs, out=out, host=host)
        assert remade is not None  # all of it, not a share
        _require_comparable(artifact, remade, shard)
        if remade.files[shard] == files[shard]:
            return Replay(artifact.name, shard, ())
        before = _contents(artifact.folder / shard)
        after = _contents(out / shard)
        arrays = tuple(sorted(differing_keys(before, after)))
        if not arrays:
            arrays = ("only the bytes of the file",)
        return Replay(artifact.name, shard, arrays)


def _require_comparable(artifact: Artifact, remade: Manifest, shard: str) -> None:
    """ValueError if the artifact was made again by other settings, or without the shard."""
    recorded = flatten(artifact.manifest.params)
    changed = sorted(differing_keys(recorded, flatten(remade.params)))
    if changed:
        raise ValueError(
            f"{artifact.name}: this code cannot make it under its own settings; "
            f"{', '.join(changed)} would differ"
        )
    if shard not in remade.files:
        raise ValueError(
            f"{artifact.name}: this code makes no {shard}; it makes {sorted(remade.files)}"
        )


def _draft_without(shard: str, shards: list[str], artifact: Artifact, out: Path) -> None:
    """Leave a draft that has every shard but one."""
    manifest = artifact.manifest
    draft = Draft(out, manifest.kind, manifest.parents, manifest.params)
    draft.prepare()
    for name in shards:
        if name != shard:
            link(artifact.folder / name, draft.folder / name)


def _contents(shard: Path) -> dict[str, Any]:
    columns, attributes = zarr_zip.read(shard)
    contents: dict[str, Any] = {"attributes": attributes}
    for name, values in columns.items():
        dtype = values.dtype.str
        contents[name] = (dtype, values.shape, values.tobytes())
    return contents


def _stage_of(artifact: Artifact) -> str:
    """Return the stage that made the artifact. ValueError for a kind that has no shards."""
    kind = artifact.manifest.kind
    if kind == "demonstrations":
        return "demonstrate"
    if kind == "trajectories":
        return "explore" if "explore" in artifact.manifest.params else "sample"
    if kind == "labels":
        return "label"
    raise ValueError(
        f"{artifact.name}: a {kind} has no shards; expected demonstrations, trajectories or labels"
    )


def _inputs(verb: str, store: Store, artifact: Artifact, params: Params) -> dict[str, Any]:
    """Return the stage's arguments as the manifest records them, all but `out` and `host`."""
    recorded = artifact.manifest.params
    inputs: dict[str, Any] = {"run": params.run.name}
    stage = STAGES[verb]
    for section in stage.sections:
        name = "settings" if section == verb else section
        present = getattr(params, section)
        inputs[name] = _section(present, recorded.get(section, {}))
    if stage.seed is not None:
        inputs["seed"] = recorded["seed"]
    if "iteration" in recorded:
        inputs["iteration"] = recorded["iteration"]
    if verb == "demonstrate":
        environment = recorded["environment"]
        tasks = tuple(environment["tasks"])
        inputs["name"] = recorded["set"]
        inputs["wanted"] = DemonstrationSet(tasks=tasks, episodes=recorded["episodes"])
        inputs["chunk"] = recorded["chunk"]
    for role in artifact.manifest.parents:
        inputs[role] = _parent(store, artifact, role)
    if verb == "sample":
        inputs.setdefault("teacher", inputs["student"])  # not opened if the student acted
    return inputs


def _section(present: Any, recorded: Mapping[str, Any]) -> Any:
    """Return a section with the recorded settings, and the present run's for any others."""
    values = {**present.model_dump(), **recorded}
    return type(present).model_validate(values)


def _parent(store: Store, artifact: Artifact, role: str) -> Path:
    digest = artifact.manifest.parents[role]
    parent = store.by_digest.get(digest)
    if parent is None:
        raise ValueError(
            f"{artifact.name}: its {role} {digest[:SHORT]} is not here; "
            "expected it, to make a shard again (dvc pull, or make it)"
        )
    return parent.folder
