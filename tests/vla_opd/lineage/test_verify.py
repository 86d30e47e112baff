"""Verification finds damage of every kind and the artifacts that it voids; replay of a shard."""

import json
import shutil
from pathlib import Path

import pytest

from flows.replay import replay
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.lineage.store import read_store
from vla_opd.lineage.verify import Finding, verify
from vla_opd.machine.host import Host
from vla_opd.params.load import load

LABELS, STUDENT, FINAL = (
    "small/labels/it001",
    "small/checkpoints/student",
    "small/checkpoints/it001",
)
SHARD = "shard-000-00000.zarr.zip"
AFTER_LABELS = (
    "small/checkpoints/it001",
    "small/checkpoints/rl001",
    "small/evaluations/final",
    "small/report/page",
    "small/trajectories/rl001",
)


@pytest.fixture
def run(small: Path) -> Path:
    """The folder of all runs, of which there is one."""
    return small.parent


def findings(deep: bool = False) -> dict[str, Finding]:
    return {finding.name: finding for finding in verify(read_store(), deep=deep)}


def test_an_undamaged_run_has_no_findings(run: Path) -> None:
    assert len(read_store().artifacts) == 12
    assert list(verify(read_store(), deep=True)) == []


def test_a_flipped_bit_is_found_with_its_file_and_what_it_voids(run: Path) -> None:
    path = run / LABELS / SHARD
    spoiled = bytearray(path.read_bytes())
    spoiled[len(spoiled) // 3] ^= 4
    path.write_bytes(spoiled)
    (finding,) = findings().values()
    assert path.name in finding.problem
    assert "corrupt" in finding.problem
    assert sorted(finding.void) == sorted(AFTER_LABELS)


@pytest.mark.parametrize(
    "damage", ["lost", "more", "unreadable manifest", "lost manifest", "a folder for a manifest"]
)
def test_a_file_too_few_or_too_many_and_a_lost_manifest_are_found(run: Path, damage: str) -> None:
    folder = run / STUDENT
    match damage:
        case "lost":
            (folder / "model.safetensors").unlink()
        case "more":
            (folder / "notes.pkl").write_bytes(b"")
        case "unreadable manifest":
            (folder / "manifest.json").write_text("{")
        case _:
            (folder / "manifest.json").unlink()
            if "folder" in damage:
                (folder / "manifest.json").mkdir()
    assert list(findings()) == [STUDENT]
    assert STUDENT in next(iter(findings().values())).problem


def test_an_edited_manifest_voids_what_was_made_from_it(run: Path) -> None:
    path = run / "small/checkpoints/teacher/manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 2'))
    assert {"small/checkpoints/student", LABELS, *AFTER_LABELS} <= set(
        findings()["small/checkpoints/teacher"].void
    )


def republish(
    folder: Path, kind: str, params: dict[str, object] | None = None, **changes: object
) -> None:
    """Publish an artifact again, intact in itself, with something of its description changed."""
    old = read_manifest(folder, kind)  # pyright: ignore[reportArgumentType]
    original = folder.with_name("original")
    folder.rename(original)
    facts = {**old.facts, **changes}
    with draft(folder, old.kind, old.parents, {**old.params, **(params or {})}) as work:
        for name in old.files:
            shutil.copyfile(original / name, work.folder / name)
        work.publish(facts)
    shutil.rmtree(original)


def test_deep_verification_finds_labels_of_another_number_of_states(run: Path) -> None:
    """Intact files, a sound manifest, and yet the wrong labels: those of another shard."""
    folder = run / LABELS
    shutil.copyfile(folder / "shard-001-00003.zarr.zip", folder / SHARD)
    republish(folder, "labels")
    assert findings() == {}
    assert "labels" in findings(deep=True)[LABELS].problem


@pytest.mark.parametrize("transfer", [False, True])
def test_deep_verification_finds_labels_in_another_action_space_than_the_teachers(
    run: Path, transfer: bool
) -> None:
    manifest = json.loads((run / LABELS / "manifest.json").read_text())
    space, label = (
        manifest["facts"]["action_space"],
        manifest["params"]["label"] | {"transfer": transfer},
    )
    republish(
        run / LABELS,
        "labels",
        {"label": label},
        action_space=space | {"q01": [value - 1 for value in space["q01"]]},
    )
    assert findings() == {}
    assert "action_space.q01" in findings(deep=True)[LABELS].problem


def test_deep_verification_finds_rollouts_in_another_action_space_than_the_students(
    run: Path,
) -> None:
    republish(run / "small/trajectories/rl001", "trajectories", action_space="0" * 64)
    assert findings() == {}
    assert (
        "its action space is 000000000000; expected"
        in findings(deep=True)["small/trajectories/rl001"].problem
    )


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("demonstrations/main", "shard-001-00010"),
        ("trajectories/it001", "shard-000-00002"),
        ("trajectories/rl001", "shard-001-00004"),
        (LABELS, "shard-001-00001"),
    ],
)
def test_a_replayed_shard_has_the_same_bytes(run: Path, name: str, shard: str) -> None:
    store = read_store()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    replayed = replay(store, store.find(name), shard, load(), Host(workers=2))
    assert replayed.differing == ()
    assert {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }.items() <= before.items()


def test_replay_finds_a_shard_that_the_student_did_not_produce(run: Path) -> None:
    """Manifest and files are consistent; only a replay shows that the student acts otherwise."""
    folder = run / "small/trajectories/it001"
    shutil.copyfile(folder / "shard-000-00001.zarr.zip", folder / SHARD)
    republish(folder, "trajectories")
    store = read_store()
    assert findings() == {}
    replayed = replay(store, store.find("trajectories/it001"), "shard-000-00000", load(), Host())
    assert {"tokens", "frames", "index"} <= set(replayed.differing)
    assert "clean" not in replayed.differing


def test_an_artifact_with_settings_of_another_version_is_not_compared(run: Path) -> None:
    folder = run / "small/trajectories/it001"
    sound = read_manifest(folder, "trajectories")
    with draft(folder, "trajectories", sound.parents, sound.params | {"tilt": 3}) as work:
        for name in sound.files:
            shutil.copyfile(folder / name, work.folder / name)
        work.publish(sound.facts)
    store = read_store()
    with pytest.raises(
        ValueError,
        match=r"small/trajectories/it001: this code cannot make it .*; tilt would differ",
    ):
        replay(store, store.find("trajectories/it001"), "shard-000-00000", load(), Host())


def test_only_shards_can_be_replayed(run: Path) -> None:
    store = read_store()
    with pytest.raises(
        ValueError,
        match=r"small/labels/it001 has no shard 'shard-9\.zarr\.zip'; "
        r"expected one of \['shard-000-00000\.zarr\.zip'",
    ):
        replay(store, store.find(LABELS), "shard-9", load(), Host())
    with pytest.raises(ValueError, match="a checkpoint has no shards"):
        replay(store, store.find(FINAL), "model.safetensors", load(), Host())
    shutil.rmtree(run / STUDENT)
    without = read_store()
    with pytest.raises(ValueError, match=r"its student [0-9a-f]{12} is not here"):
        replay(without, without.find("trajectories/it001"), "shard-000-00000", load(), Host())
