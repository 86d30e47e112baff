"""A stage's artifacts on its run's page (tests/flows/test_train.py reads a real server)."""

import base64
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from flows.pipeline import Step
from flows.prefect_server import page


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """Record the calls of Prefect's three functions: kind, key, content."""
    calls: list[tuple[str, str, Any]] = []
    for kind in ("table", "link", "image"):
        monkeypatch.setattr(
            page,
            f"create_{kind}_artifact",
            lambda content, kind=kind, key="", **_: calls.append((kind, key, content)),
        )
    return calls


def test_the_table_has_digests_parents_and_numbers(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, posted: list[tuple[str, str, Any]]
) -> None:
    monkeypatch.chdir(undisturbed)
    page.post_outputs(Step("optimize@it001", outs=("artifacts/small/checkpoints/it001",)))
    ((kind, key, table),) = posted
    assert (kind, key) == ("table", "optimize-it001")
    values = {row["what"]: row["value"] for row in table}
    assert {
        "digest",
        "parent: student",
        "parent: trajectories",
        "parent: labels",
        "before.reverse_kl",
        "after.reverse_kl",
        "states",
        "megabytes",
    } <= set(values)
    assert values["after.reverse_kl"] < values["before.reverse_kl"]


def test_a_report_posts_its_page_and_drawings_too(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, posted: list[tuple[str, str, Any]]
) -> None:
    monkeypatch.chdir(undisturbed)
    page.post_outputs(Step("report", outs=("artifacts/small/report/page",)))
    kinds = [kind for kind, *_ in posted]
    assert kinds[:2] == ["table", "link"]
    assert kinds.count("image") >= 3
    assert len({key for _, key, _ in posted}) == len(posted)
    assert (
        posted[1][2] == (undisturbed / "artifacts/small/report/page/index.html").resolve().as_uri()
    )
    for _, _, drawing in posted[2:]:
        head, _, body = drawing.partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(body).decode()
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
        assert "--ink:" in svg


def test_a_folder_without_a_manifest_posts_nothing(
    tmp_path: Path, posted: list[tuple[str, str, Any]]
) -> None:
    (tmp_path / "digest").write_text("a toy's")
    page.post_outputs(Step("label@it001", outs=(str(tmp_path), str(tmp_path / "none"))))
    assert posted == []
