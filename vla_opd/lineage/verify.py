"""Verification: hash every file of an artifact again, compare the artifact with its parents."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vla_opd.artifacts.manifest import open_artifact
from vla_opd.data import zarr_zip
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.labels import read_shard
from vla_opd.data.trajectory import read_states, shards
from vla_opd.learning.bin_transfer import require_comparable
from vla_opd.lineage.store import SHORT, Artifact, Store
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.checkpoint import open_checkpoint, require_environment, require_same_actions

Check = Callable[[Store, Artifact], None]
UNKNOWN = "unknown: its digest can't be read"


@dataclass(frozen=True)
class Finding:
    """A damaged artifact: its name, the problem, and the artifacts that it makes void."""

    name: str
    problem: str
    void: tuple[str, ...]


def verify(
    store: Store, artifacts: Iterable[Artifact] | None = None, *, deep: bool = False
) -> Iterator[Finding]:
    """Hash every file of the artifacts again; by default of all artifacts in the store.

    deep: also read all arrays and weights, and compare every artifact with its parents: there are
    as many labels as states in every shard, tokens mean the same actions for student and teacher,
    and rollouts are from the environment of the student. (Only `replay` proves that a shard is
    what its parents and seed produce.)
    """
    if artifacts is None:
        yield from _report_broken(store)
    checks: list[Check] = [_check_files]
    if deep:
        checks.append(_check_parents)
    for artifact in store.artifacts if artifacts is None else artifacts:
        problem = _find_problem(store, artifact, checks)
        if problem is not None:
            void = _names_of_descendants(store, artifact.digest)
            yield Finding(artifact.name, problem, void)


def _report_broken(store: Store) -> Iterator[Finding]:
    for name, problem in store.broken.items():
        digest = store.claimed.get(name)
        void: tuple[str, ...] = (UNKNOWN,)
        if digest is not None:
            void = _names_of_descendants(store, digest)
        yield Finding(name, problem, void)


def _names_of_descendants(store: Store, digest: str) -> tuple[str, ...]:
    descendants = store.descendants(digest)
    return tuple(artifact.name for artifact in descendants)


def _find_problem(store: Store, artifact: Artifact, checks: Iterable[Check]) -> str | None:
    """Return the message of the first check that fails."""
    try:
        for check in checks:
            check(store, artifact)
    except KeyError as error:
        return f"{artifact.name}: {error!r}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _check_files(_: Store, artifact: Artifact) -> None:
    open_artifact(artifact.folder, artifact.kind)


def _check_parents(store: Store, artifact: Artifact) -> None:
    """ValueError if an artifact contradicts a parent that is not missing."""
    parents = {role: parent for role, _, parent in store.parents(artifact) if parent is not None}
    match artifact.kind:
        case "trajectories" | "demonstrations":
            read_states(shards(artifact.folder))
            _require_environment(artifact, parents.get("student"))
            _require_action_space(artifact, parents.get("student"))
        case "labels":
            _require_same_rows(artifact, parents.get("trajectories"))
            _require_same_actions(artifact, parents.get("teacher"))
        case "checkpoint":
            open_checkpoint(artifact.folder).weights()
            _require_comparable(artifact, parents.get("labels"))
        case _:
            pass


def _require_environment(trajectories: Artifact, student: Artifact | None) -> None:
    if student is not None:
        recorded = trajectories.manifest.params["environment"]
        environment = EnvironmentParams.model_validate(recorded)
        require_environment(open_checkpoint(student.folder).facts, environment, student.name)


def _require_same_actions(labels: Artifact, teacher: Artifact | None) -> None:
    if teacher is not None:
        facts = open_checkpoint(teacher.folder).facts
        action_space = ActionSpace.model_validate(labels.manifest.facts["action_space"])
        require_same_actions(facts, action_space, labels.name)


def _require_comparable(student: Artifact, labels: Artifact | None) -> None:
    if labels is not None:
        require_comparable(open_checkpoint(student.folder).facts, labels.manifest, labels.name)


def _require_action_space(trajectories: Artifact, student: Artifact | None) -> None:
    if student is None:
        return
    recorded = trajectories.manifest.facts["action_space"]
    expected = open_checkpoint(student.folder).facts.action_space.digest
    if recorded != expected:
        raise ValueError(
            f"{trajectories.name}: its action space is {recorded[:SHORT]}; "
            f"expected {expected[:SHORT]}, that of {student.name}"
        )


def _require_same_rows(labels: Artifact, trajectories: Artifact | None) -> None:
    """ValueError unless every state has a label, shard by shard. Also checks all checksums."""
    label_paths = {path.name: path for path in shards(labels.folder)}
    if trajectories is None:
        for path in label_paths.values():
            zarr_zip.read(path)
        return
    state_paths = {path.name: path for path in shards(trajectories.folder)}
    if set(label_paths) != set(state_paths):
        raise ValueError(
            f"{labels.name}: labels the shards {sorted(label_paths)}; "
            f"expected those of {trajectories.name}, {sorted(state_paths)}"
        )
    for name, path in label_paths.items():
        read_shard(path, len(read_states([state_paths[name]])))
