"""Garbage collection: nothing that a kept checkpoint needs is removed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from stages.catalog import planned_artifacts
from tests.vla_opd.lineage.manifests import publish
from vla_opd.lineage.garbage import Garbage, find_garbage, find_needed, remove
from vla_opd.lineage.store import Artifact, Store, read_store
from vla_opd.params.load import load
from vla_opd.params.run import Params


@pytest.fixture
def run(small: Path) -> Path:
    """The small run with an iteration that params.yaml doesn't have, and another run."""
    start = read_store().find("checkpoints/it001").digest
    visited = publish(small / "trajectories/it002", "trajectories", {"student": start})
    publish(small / "checkpoints/it002", "checkpoint", {"student": start, "trajectories": visited})
    publish(small.parent / "older/checkpoints/student", "checkpoint", {})
    return small


def garbage_of(store: Store, params: Params, keep: Sequence[Artifact] = ()) -> Garbage:
    return find_garbage(store, params, planned_artifacts(params), keep)


def unneeded(*keep: str) -> list[str]:
    store = read_store()
    kept = [store.find(name) for name in keep]
    return [artifact.name for artifact in garbage_of(store, load(), kept).artifacts]


def test_the_run_stays_and_other_artifacts_are_garbage(run: Path) -> None:
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_everything_that_the_stages_of_a_run_make_stays(small: Path) -> None:
    """So what a new stage makes is no garbage either."""
    params = load()
    planned = planned_artifacts(params)
    kept = {store.folder for store in read_store().artifacts}
    assert {folder.resolve() for folder in kept} <= {folder.resolve() for folder in planned}
    assert garbage_of(read_store(), params).artifacts == ()


def test_a_study_table_stays_even_if_its_parents_are_missing(run: Path) -> None:
    publish(run.parent / "other/studies/objectives", "study", {"checkpoints/teacher": "7" * 64})
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_artifacts_named_by_the_user_stay_with_their_ancestors(run: Path) -> None:
    assert unneeded("checkpoints/it002") == ["older/checkpoints/student"]
    assert unneeded("older/checkpoints/student") == [
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_ancestors_of_needed_artifacts_are_never_garbage(
    run: Path,
) -> None:
    """Without iterations in params.yaml, the evaluation of it001 keeps its whole iteration."""
    text = Path("params.yaml").read_text()
    params = load().model_copy(update={"iterations": {}})
    store = read_store()
    needed = find_needed(store, params, planned_artifacts(params))
    for artifact in store.artifacts:
        if artifact.digest in needed:
            assert {ancestor.digest for ancestor in store.ancestors(artifact)} <= needed
    assert store.find("labels/it001").digest in needed
    assert Path("params.yaml").read_text() == text


def test_remove_deletes_the_garbage_and_nothing_else(run: Path) -> None:
    store = read_store()
    garbage = garbage_of(store, load())
    assert (
        garbage.bytes
        == sum(entry.size for a in garbage.artifacts for entry in a.manifest.files.values())
        > 0
    )
    remove(garbage)
    assert unneeded() == []
    assert {a.name for a in read_store().artifacts} == {a.name for a in store.artifacts} - {
        a.name for a in garbage.artifacts
    }
    assert not list(Path("artifacts").rglob("*.removed"))


def named(run_name: str) -> Params:
    """Return the settings of the small run under another name."""
    params = load()
    return params.model_copy(update={"run": params.run.model_copy(update={"name": run_name})})


def test_artifacts_linked_by_another_run_stay_with_their_ancestors(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "artifacts/other/checkpoints").mkdir(parents=True)
    (tmp_path / "artifacts/other/checkpoints/student").symlink_to(
        run / "checkpoints/it002", target_is_directory=True
    )
    assert unneeded() == ["older/checkpoints/student"]


def test_a_run_without_artifacts_is_refused(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"run\.name is 'brandnew', and there is no artifact of that run"
    ):
        garbage_of(read_store(), named("brandnew"))
    keep = [read_store().find("older/checkpoints/student")]
    assert garbage_of(read_store(), named("brandnew"), keep).artifacts


def test_nothing_is_removed_if_a_manifest_is_broken(run: Path) -> None:
    (run / "checkpoints/it002/manifest.json").write_text("{")
    with pytest.raises(ValueError, match="small/checkpoints/it002"):
        unneeded()


def test_nothing_is_removed_if_a_parent_is_missing(run: Path) -> None:
    shutil.rmtree(run / "labels/it001")
    with pytest.raises(ValueError, match=r"came from labels [0-9a-f]{12}, which is missing"):
        unneeded()


def test_missing_demonstrations_are_allowed(run: Path) -> None:
    shutil.rmtree(run / "demonstrations")
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_remains_of_a_killed_removal_are_deleted(run: Path) -> None:
    (run / "checkpoints/.it002.removed/shard").mkdir(parents=True)
    remove(garbage_of(read_store(), load()))
    assert not [path for path in run.rglob("*it002*") if path.is_dir()]
