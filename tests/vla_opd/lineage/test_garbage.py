"""What may go: nothing that a kept checkpoint needs."""

import shutil
from pathlib import Path

import pytest

from tests.vla_opd.lineage.manifests import publish
from vla_opd.lineage.garbage import garbage, kept, remove
from vla_opd.lineage.store import read_store
from vla_opd.params.load import load
from vla_opd.params.run import Params


@pytest.fixture
def run(small: Path) -> Path:
    """The small run with an iteration that params.yaml doesn't have; beside it a run from another time."""
    start = read_store().find("checkpoints/it001").digest
    visited = publish(small / "trajectories/it002", "trajectories", {"student": start})
    publish(small / "checkpoints/it002", "checkpoint", {"student": start, "trajectories": visited})
    publish(small.parent / "older/checkpoints/student", "checkpoint", {})
    return small


def unneeded(*more: str) -> list[str]:
    store = read_store()
    return [a.name for a in garbage(store, load(), [store.find(name) for name in more]).artifacts]


def test_what_the_run_is_made_of_stays_and_the_rest_may_go(run: Path) -> None:
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_the_table_of_a_study_stays_although_what_it_came_from_is_not_here(run: Path) -> None:
    publish(run.parent / "other/studies/objectives", "study", {"checkpoints/teacher": "7" * 64})
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_what_is_named_stays_with_all_that_it_came_from(run: Path) -> None:
    assert unneeded("checkpoints/it002") == ["older/checkpoints/student"]
    assert unneeded("older/checkpoints/student") == [
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_the_ancestors_of_what_is_kept_are_never_garbage_whatever_params_yaml_has(
    run: Path,
) -> None:
    """With no iteration left in params.yaml, an evaluation of it001 that stays still keeps the whole of its iteration."""
    text = Path("params.yaml").read_text()
    params = load().model_copy(update={"iterations": {}})
    store = read_store()
    needed = kept(store, params)
    for artifact in store.artifacts:
        if artifact.digest in needed:
            assert {one.digest for one in store.ancestors(artifact)} <= needed
    assert store.find("logits/it001").digest in needed
    assert Path("params.yaml").read_text() == text


def test_removing_takes_what_was_said_and_leaves_a_sound_rest(run: Path) -> None:
    store = read_store()
    found = garbage(store, load())
    assert (
        found.bytes
        == sum(entry.size for a in found.artifacts for entry in a.manifest.files.values())
        > 0
    )
    remove(found)
    assert unneeded() == []
    assert {a.name for a in read_store().artifacts} == {a.name for a in store.artifacts} - {
        a.name for a in found.artifacts
    }
    assert not list(Path("artifacts").rglob("*.removed"))


def named(run_name: str) -> Params:
    """The settings of the small run, for a run of another name."""
    params = load()
    return params.model_copy(update={"run": params.run.model_copy(update={"name": run_name})})


def test_what_another_run_links_to_stays_with_all_that_it_came_from(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "artifacts/other/checkpoints").mkdir(parents=True)
    (tmp_path / "artifacts/other/checkpoints/student").symlink_to(
        run / "checkpoints/it002", target_is_directory=True
    )
    assert unneeded() == ["older/checkpoints/student"]


def test_a_run_of_which_nothing_is_here_keeps_nothing_and_is_refused(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"run\.name is 'brandnew', and nothing of that run is here"
    ):
        garbage(read_store(), named("brandnew"))
    assert garbage(
        read_store(), named("brandnew"), [read_store().find("older/checkpoints/student")]
    ).artifacts


def test_a_broken_manifest_hides_what_is_needed_so_nothing_is_removed(run: Path) -> None:
    (run / "checkpoints/it002/manifest.json").write_text("{")
    with pytest.raises(ValueError, match="small/checkpoints/it002"):
        unneeded()


def test_a_missing_parent_hides_what_is_needed_so_nothing_is_removed(run: Path) -> None:
    shutil.rmtree(run / "logits/it001")
    with pytest.raises(ValueError, match=r"came from logits [0-9a-f]{12}, which isn't here"):
        unneeded()


def test_demonstrations_that_are_not_here_are_in_nobodys_way(run: Path) -> None:
    shutil.rmtree(run / "demonstrations")
    assert unneeded() == [
        "older/checkpoints/student",
        "small/checkpoints/it002",
        "small/trajectories/it002",
    ]


def test_what_a_kill_left_behind_is_swept_up(run: Path) -> None:
    (run / "checkpoints/.it002.removed/shard").mkdir(parents=True)
    remove(garbage(read_store(), load()))
    assert not [path for path in run.rglob("*it002*") if path.is_dir()]
