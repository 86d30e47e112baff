"""What a stage leaves on its run's page, up to what Prefect is handed (tests/flows/test_train.py asks a real server)."""

import base64
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from flows.pipeline import Step
from flows.prefect_server import page


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """What Prefect's three functions are called with: kind, key, what is shown."""
    calls: list[tuple[str, str, Any]] = []
    for kind in ("table", "link", "image"):
        monkeypatch.setattr(
            page,
            f"create_{kind}_artifact",
            lambda shown, kind=kind, key="", **_: calls.append((kind, key, shown)),
        )
    return calls


def test_a_table_says_what_was_made_from_what_and_its_numbers(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, handed: list[tuple[str, str, Any]]
) -> None:
    monkeypatch.chdir(undisturbed)
    page.post(Step("optimize@it001", outs=("artifacts/small/checkpoints/it001",)))
    ((kind, key, table),) = handed
    assert (kind, key) == ("table", "optimize-it001")
    told = {row["what"]: row["value"] for row in table}
    assert {
        "digest",
        "parent: student",
        "parent: trajectories",
        "parent: logits",
        "before.reverse_kl",
        "after.reverse_kl",
        "states",
        "megabytes",
    } <= set(told)
    assert told["after.reverse_kl"] < told["before.reverse_kl"]


def test_of_a_report_the_page_and_its_pictures_are_posted_too(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, handed: list[tuple[str, str, Any]]
) -> None:
    monkeypatch.chdir(undisturbed)
    page.post(Step("report", outs=("artifacts/small/report/page",)))
    kinds = [kind for kind, *_ in handed]
    assert kinds[:2] == ["table", "link"]
    assert kinds.count("image") >= 3
    assert len({key for _, key, _ in handed}) == len(handed)
    assert (
        handed[1][2] == (undisturbed / "artifacts/small/report/page/index.html").resolve().as_uri()
    )
    for _, _, picture in handed[2:]:
        head, _, body = picture.partition(",")
        assert head == "data:image/svg+xml;base64"
        drawing = base64.b64decode(body).decode()
        assert ET.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own drawing
        assert "--ink:" in drawing


def test_what_has_no_manifest_posts_nothing(
    tmp_path: Path, handed: list[tuple[str, str, Any]]
) -> None:
    (tmp_path / "digest").write_text("a toy's")
    page.post(Step("label@it001", outs=(str(tmp_path), str(tmp_path / "none"))))
    assert handed == []
