"""Manifests: what they record, what their digest depends on, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.vla_opd.artifacts.artifact_builder import PARAMS, PARENTS, PARTS, make
from vla_opd.artifacts.draft import VERSIONED_PACKAGES, draft
from vla_opd.artifacts.manifest import MANIFEST, flatten, open_artifact, read_manifest


def test_a_manifest_describes_its_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "it001"
    published = make(folder, facts={"rows": 7}, made_with={"device": "cpu"})
    manifest = open_artifact(folder, "labels")
    assert manifest == published
    assert manifest.kind == "labels"
    assert manifest.parents == PARENTS
    assert manifest.params == {"steps": 3, "names": ["a", "b"]}
    assert manifest.facts == {"rows": 7}
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    assert sizes == {"one": 5, "two": 6, "inner/three": 5}
    assert manifest.made_with["device"] == "cpu"
    assert set(VERSIONED_PACKAGES) < set(manifest.made_with)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*PARTS, MANIFEST}  # neither scratch nor temporary files
    assert sorted(path.name for path in folder.parent.iterdir()) == [".it001.lock", "it001"]


def test_the_digest_does_not_depend_on_order_or_machine(tmp_path: Path) -> None:
    first = make(tmp_path / "a", made_with={"device": "cpu"})
    second = make(tmp_path / "b", dict(reversed(PARTS.items())), made_with={"device": "cuda"})
    assert first.digest == second.digest
    assert first.made_with != second.made_with


def test_the_digest_depends_on_everything_else(tmp_path: Path) -> None:
    digests = {
        make(tmp_path / "a").digest,
        make(tmp_path / "b", facts={"rows": 2}).digest,
        make(tmp_path / "c", {**PARTS, "two": b"secone"}).digest,
        make(tmp_path / "d", {**PARTS, "four": b""}).digest,
    }
    for name, kind, parents, params in [
        ("e", "report", PARENTS, PARAMS),
        ("f", "labels", {}, PARAMS),
        ("g", "labels", PARENTS, {"steps": 3}),
    ]:
        with draft(tmp_path / name, kind, parents, params) as work:
            for part, content in PARTS.items():
                with work.part(part) as path:
                    path.write_bytes(content)
            digests.add(work.publish({"rows": 1}).digest)
    assert len(digests) == 7


def test_a_file_that_was_not_published_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "shard-999").write_bytes(b"stray")
    with pytest.raises(
        ValueError, match=r"shard-999: not in manifest\.json; expected only the 3 files"
    ):
        open_artifact(tmp_path / "a", "labels")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path / "a", tmp_path / "nothing"):
        message = f"{folder.name}: no manifest.json; expected a complete artifact of kind 'report'"
        with pytest.raises(ValueError, match=message):
            read_manifest(folder, "report")


@pytest.mark.parametrize(("content", "size"), [(b"firsu", 5), (b"fir", 3), (b"", 0)])
def test_a_changed_or_truncated_file_is_refused_and_named(
    tmp_path: Path, content: bytes, size: int
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "one").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"a/one: {size} bytes with sha256 \w+; expected 5 bytes with \w+: it is corrupt",
    ):
        open_artifact(tmp_path / "a", "labels")
    assert read_manifest(tmp_path / "a", "labels").files["one"].size == 5


def test_a_missing_file_is_refused_and_named(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "inner" / "three").unlink()
    with pytest.raises(ValueError, match="a/inner/three: missing; expected 5 bytes"):
        open_artifact(tmp_path / "a", "labels")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="kind is 'labels'; expected 'checkpoint'"):
        open_artifact(tmp_path / "a", "checkpoint")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kind": "labels"}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"a/manifest.json: not a manifest of format 1"):
        open_artifact(tmp_path / "a", "labels")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    _edit(tmp_path / "a", format=2)
    with pytest.raises(ValueError, match="format"):
        open_artifact(tmp_path / "a", "labels")


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", facts={"rows": 7})
    _edit(tmp_path / "a", facts={"rows": 8})
    with pytest.raises(ValueError, match="digest"):
        open_artifact(tmp_path / "a", "labels")


def _edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nested_settings_are_flattened_to_dotted_keys() -> None:
    nested = {"a": {"b": 1, "c": {"d": []}}, "e": {}, "f": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [], "e": {}, "f": None}
