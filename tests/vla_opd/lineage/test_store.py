"""The store of artifacts, from manifests alone."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from vla_opd.lineage.store import Artifact, Store, read_store


def names(artifacts: Iterable[Artifact]) -> list[str]:
    return [artifact.name.removeprefix("one/") for artifact in artifacts]


def test_published_artifacts_are_found_and_drafts_are_not(root: Path) -> None:
    (root / "one/checkpoints/.it002.draft").mkdir()
    (root / "one/checkpoints/.it002.draft/manifest.json").write_text("{}")
    store = read_store(root)
    assert len(store.artifacts) == 6
    assert store.broken == {}


def test_ancestors_are_sorted_parents_first_and_the_artifact_last(root: Path) -> None:
    store = read_store(root)
    order = names(store.ancestors(store.find("checkpoints/it001")))
    assert order[-1] == "checkpoints/it001"
    assert set(order) == {
        "checkpoints/teacher",
        "checkpoints/student",
        "trajectories/it001",
        "labels/it001",
        "checkpoints/it001",
    }
    assert (
        order.index("checkpoints/student")
        < order.index("trajectories/it001")
        < order.index("labels/it001")
    )
    assert names(store.ancestors(store.find("evaluations/teacher"))) == [
        "checkpoints/teacher",
        "evaluations/teacher",
    ]


def test_a_missing_artifact_has_descendants(root: Path) -> None:
    store = read_store(root)
    assert len(store.descendants("0" * 64)) == 6
    assert names(store.descendants(store.find("labels/it001").digest)) == ["checkpoints/it001"]
    assert store.descendants("f" * 64) == ()
    assert store.missing(store.find("checkpoints/it001")) == {"0" * 64: "demonstrations"}


@pytest.mark.parametrize(
    "text", ["checkpoints/teacher", "one/checkpoints/teacher", "artifacts/one/checkpoints/teacher"]
)
def test_an_artifact_is_found_by_its_path_or_the_end_of_its_name(root: Path, text: str) -> None:
    assert read_store(root).find(text).name == "one/checkpoints/teacher"


def test_an_artifact_is_found_by_the_beginning_of_its_digest(root: Path) -> None:
    store = read_store(root)
    labels = store.find("labels/it001")
    assert store.find(labels.digest[:8]) is labels
    with pytest.raises(ValueError, match="no such artifact"):
        store.find(labels.digest[:5])


def test_an_ambiguous_or_unknown_name_is_refused(root: Path) -> None:
    store = read_store(root)
    with pytest.raises(
        ValueError,
        match=r"it001 means 3 artifacts; expected one of them: "
        r"one/checkpoints/it001, one/labels/it001",
    ):
        store.find("it001")
    with pytest.raises(
        ValueError, match=r"it009: no such artifact; .* There are: one/checkpoints/it001"
    ):
        store.find("it009")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a manifest"),
        ('{"kind": "pickle"}', "kind is 'pickle'; expected one of"),
        ('{"kind": "labels"}', "not a manifest of format"),
        ('{"kind": "logits"}', "earlier versions called a teacher's labels; expected 'labels'"),
    ],
)
def test_a_broken_manifest_is_reported_and_hides_no_other_artifact(
    root: Path, text: str, message: str
) -> None:
    (root / "one/labels/it001/manifest.json").write_text(text)
    store = read_store(root)
    assert message in store.broken["one/labels/it001"]
    assert len(store.artifacts) == 5
    with pytest.raises(ValueError, match=message):
        store.find("labels/it001")


def test_an_edited_manifest_is_broken(root: Path) -> None:
    path = root / "one/checkpoints/it001/manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert "digest is" in read_store(root).broken["one/checkpoints/it001"]


def test_an_empty_folder_is_an_empty_store(tmp_path: Path) -> None:
    assert read_store(tmp_path / "none") == Store((), {})
    with pytest.raises(ValueError, match="none yet: make run"):
        read_store(tmp_path).find("it001")
