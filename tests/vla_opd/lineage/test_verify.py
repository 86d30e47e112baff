"""Whether what is on disk is what was published: damage of every kind is found, named, and what it voids with it; a shard is made again."""

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
    "small/logits/it001",
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


def found(deep: bool = False) -> dict[str, Finding]:
    return {finding.name: finding for finding in verify(read_store(), deep=deep)}


def test_a_whole_run_is_sound(run: Path) -> None:
    assert len(read_store().artifacts) == 12
    assert list(verify(read_store(), deep=True)) == []


def test_a_flipped_bit_is_found_with_its_file_and_what_it_voids(run: Path) -> None:
    path = run / LABELS / SHARD
    spoiled = bytearray(path.read_bytes())
    spoiled[len(spoiled) // 3] ^= 4
    path.write_bytes(spoiled)
    (finding,) = found().values()
    assert path.name in finding.what
    assert "corrupt" in finding.what
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
    assert list(found()) == [STUDENT]
    assert STUDENT in next(iter(found().values())).what


def test_an_edited_manifest_voids_what_was_made_from_it(run: Path) -> None:
    path = run / "small/checkpoints/teacher/manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 2'))
    assert {"small/checkpoints/student", LABELS, *AFTER_LABELS} <= set(
        found()["small/checkpoints/teacher"].void
    )


def republished(
    folder: Path, kind: str, params: dict[str, object] | None = None, **changes: object
) -> None:
    """Publish an artifact again, intact in itself, with something of its description changed."""
    old = read_manifest(folder, kind)  # pyright: ignore[reportArgumentType]
    kept = folder.with_name("kept")
    folder.rename(kept)
    facts = {**old.facts, **changes}
    with draft(folder, old.kind, old.parents, {**old.params, **(params or {})}) as work:
        for name in old.files:
            shutil.copyfile(kept / name, work.folder / name)
        work.publish(facts)
    shutil.rmtree(kept)


def test_labels_of_another_number_of_states_are_found_by_looking_deep(run: Path) -> None:
    """Intact files, a sound manifest, and yet the wrong labels: those of another shard."""
    folder = run / LABELS
    shutil.copyfile(folder / "shard-001-00003.zarr.zip", folder / SHARD)
    republished(folder, "logits")
    assert found() == {}
    assert "labels" in found(deep=True)[LABELS].what


@pytest.mark.parametrize("transfer", [False, True])
def test_labels_whose_tokens_mean_other_actions_than_the_teachers_are_found_by_looking_deep(
    run: Path, transfer: bool
) -> None:
    manifest = json.loads((run / LABELS / "manifest.json").read_text())
    space, label = (
        manifest["facts"]["action_space"],
        manifest["params"]["label"] | {"transfer": transfer},
    )
    republished(
        run / LABELS,
        "logits",
        {"label": label},
        action_space=space | {"q01": [value - 1 for value in space["q01"]]},
    )
    assert found() == {}
    assert "action_space.q01" in found(deep=True)[LABELS].what


def test_rollouts_whose_tokens_mean_other_actions_than_their_students_are_found_by_looking_deep(
    run: Path,
) -> None:
    republished(run / "small/trajectories/rl001", "trajectories", action_space="0" * 64)
    assert found() == {}
    assert (
        "its action space is 000000000000; expected"
        in found(deep=True)["small/trajectories/rl001"].what
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
def test_a_shard_made_again_has_the_same_bytes(run: Path, name: str, shard: str) -> None:
    store = read_store()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = replay(store, store.find(name), shard, load(), Host(workers=2))
    assert again.differing == ()
    assert {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }.items() <= before.items()


def test_a_shard_that_its_student_did_not_make_is_told_by_its_arrays(run: Path) -> None:
    """The trajectories' manifest and files agree with each other; only rolling out again shows that this isn't what the student does."""
    folder = run / "small/trajectories/it001"
    shutil.copyfile(folder / "shard-000-00001.zarr.zip", folder / SHARD)
    republished(folder, "trajectories")
    store = read_store()
    assert found() == {}
    again = replay(store, store.find("trajectories/it001"), "shard-000-00000", load(), Host())
    assert {"tokens", "frames", "index"} <= set(again.differing)
    assert "clean" not in again.differing


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
        match=r"small/trajectories/it001: with the code that is here .*; tilt would differ",
    ):
        replay(store, store.find("trajectories/it001"), "shard-000-00000", load(), Host())


def test_only_shards_can_be_made_again(run: Path) -> None:
    store = read_store()
    with pytest.raises(
        ValueError,
        match=r"small/logits/it001 has no shard 'shard-9\.zarr\.zip'; expected one of \['shard-000-00000\.zarr\.zip'",
    ):
        replay(store, store.find(LABELS), "shard-9", load(), Host())
    with pytest.raises(ValueError, match="a checkpoint isn't made of shards"):
        replay(store, store.find(FINAL), "model.safetensors", load(), Host())
    shutil.rmtree(run / STUDENT)
    without = read_store()
    with pytest.raises(ValueError, match=r"its student [0-9a-f]{12} isn't here"):
        replay(without, without.find("trajectories/it001"), "shard-000-00000", load(), Host())
