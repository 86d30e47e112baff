"""Whether what is on disk is what was published, and whether it belongs together: every file hashed again, every parent compared."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vla_opd.artifacts.manifest import open_artifact
from vla_opd.data import zarr_zip
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.labels import read_shard
from vla_opd.data.trajectory import read_states, shards
from vla_opd.learning.bin_transfer import require_comparable
from vla_opd.lineage.store import Artifact, Store
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment, require_same_actions

UNKNOWN = "unknown: its digest can't be read"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: with which artifact, what, and what was made from it and is void with it."""

    name: str
    what: str
    void: tuple[str, ...]


def verify(
    store: Store, wanted: Iterable[Artifact] | None = None, *, deep: bool = False
) -> Iterator[Finding]:
    """Hash every file of the wanted artifacts again (all of the store's if none are named).

    deep: also read all arrays and weights, and compare every artifact with its parents: as many labels as states, shard by shard, tokens that mean
    the same actions for student and teacher, rollouts in the environment that the student was made for. (That a shard is what its parents and seed
    make, only `replay` proves.)
    """
    chosen = list(store.artifacts if wanted is None else wanted)
    if wanted is None:
        for name, what in store.broken.items():
            void = store.descendants(store.claimed[name]) if name in store.claimed else None
            yield Finding(
                name, what, tuple(one.name for one in void) if void is not None else (UNKNOWN,)
            )
    for artifact in chosen:
        for check in (_files, *((_aligned,) if deep else ())):
            try:
                check(store, artifact)
            except (OSError, ValueError, KeyError) as error:
                yield Finding(
                    artifact.name,
                    f"{artifact.name}: {error!r}" if isinstance(error, KeyError) else str(error),
                    tuple(one.name for one in store.descendants(artifact.digest)),
                )
                break


def _files(_: Store, artifact: Artifact) -> None:
    open_artifact(artifact.folder, artifact.manifest.kind)


def _aligned(store: Store, artifact: Artifact) -> None:
    """ValueError where an artifact contradicts a parent that is here."""
    parents = {role: found for role, _, found in store.parents(artifact) if found is not None}
    match artifact.manifest.kind:
        case "trajectories" | "demonstrations":
            read_states(shards(artifact.folder))
            _same_environment(artifact, parents.get("student"))
            _same_space(artifact, parents.get("student"))
        case "logits":
            _same_rows(artifact, parents.get("trajectories"))
            _same_actions(artifact, parents.get("teacher"))
        case "checkpoint":
            open_checkpoint(artifact.folder).weights()
            _comparable(artifact, parents.get("logits"))
        case _:
            pass


def _same_environment(artifact: Artifact, student: Artifact | None) -> None:
    if student is not None:
        environment = EnvironmentParams.model_validate(artifact.manifest.params["environment"])
        require_environment(open_checkpoint(student.folder).facts, environment, student.name)


def _same_actions(labels: Artifact, teacher: Artifact | None) -> None:
    if teacher is not None:
        require_same_actions(
            open_checkpoint(teacher.folder).facts,
            ActionSpace.model_validate(labels.manifest.facts["action_space"]),
            labels.name,
        )


def _comparable(student: Artifact, labels: Artifact | None) -> None:
    if labels is not None:
        require_comparable(open_checkpoint(student.folder).facts, labels.manifest, labels.name)


def _same_space(trajectories: Artifact, student: Artifact | None) -> None:
    if student is not None:
        ours, theirs = (
            trajectories.manifest.facts["action_space"],
            open_checkpoint(student.folder).facts.action_space.digest,
        )
        if ours != theirs:
            raise ValueError(
                f"{trajectories.name}: its action space is {ours[:12]}; expected {theirs[:12]}, that of {student.name}"
            )


def _same_rows(labels: Artifact, trajectories: Artifact | None) -> None:
    """Shard by shard, a label for every state; all of them are read, so their checksums are checked too."""
    if trajectories is None:
        for path in shards(labels.folder):
            zarr_zip.read(path)
        return
    ours, theirs = (
        {path.name: path for path in shards(one.folder)} for one in (labels, trajectories)
    )
    if set(ours) != set(theirs):
        raise ValueError(
            f"{labels.name}: labels the shards {sorted(ours)}; expected those of {trajectories.name}, {sorted(theirs)}"
        )
    for name, path in ours.items():
        read_shard(path, len(read_states([theirs[name]])))
