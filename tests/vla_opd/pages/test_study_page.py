"""The page of a study: its numbers, no external resources, the same bytes for the same table."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.made_run import TREE
from tests.vla_opd.analysis.test_bootstrap import table, with_unseen
from vla_opd.analysis import study_table
from vla_opd.analysis.study_table import Table
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.pages import study_page
from vla_opd.pages.study_figures import arm_style
from vla_opd.params.run import Params

STUDIES: dict[str, Any] = {
    "speed": {
        "seeds": [0, 1],
        "arms": {
            "fast": {"distill": 4},
            "slow": {"distill": 4, "settings": {"optimize.objective": "hard_ce"}},
        },
    }
}


def publish(root: Path, rows: Table, **changes: Any) -> None:
    settings = Params.model_validate({**TREE, "studies": STUDIES, **changes})
    parents = {
        f"checkpoints/{name}": digit * 64
        for name, digit in (("student", "5"), ("teacher", "7"), ("other", "8"))
    }
    with draft(
        root / "studies/speed", "study", parents, {"parameters": settings.model_dump(mode="json")}
    ) as work:
        study_table.write(rows, work.folder)
        facts = {name: {"episodes": 50, "optimizer_steps": 10} for name in ("student", "teacher")}
        work.publish(
            {**facts, "members": 4, "episodes": len(rows.episodes), "iterations": len(rows.updates)}
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "small"
    publish(folder, table())
    study_page.run(folder, "speed")
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "report/speed/index.html").read_text()


def test_the_numbers_are_those_of_the_table(root: Path, page: str) -> None:
    results = json.loads((root / "report/speed/results.json").read_text())
    fast, slow = results["arms"]
    assert (fast["success"]["value"], slow["success"]["value"]) == (
        pytest.approx(0.9),
        pytest.approx(0.4),
    )
    assert (results["start"]["value"], results["teacher"]["value"], results["share"]) == (
        pytest.approx(0.2),
        1.0,
        0.8,
    )
    assert fast["reach"]["env_steps"]["value"] == pytest.approx(1000 + 1000 * 2 / 3)
    assert slow["reach"]["env_steps"] is None
    assert slow["ratios"]["env_steps"]["value"] == pytest.approx(9000 / (5000 / 3))
    assert slow["difference"]["value"] == pytest.approx(-0.5)
    assert fast["difference"] is None
    text = re.sub(r"<[^>]*>|\s+", "", page)
    assert "Finalsuccessrates:fast90.0%,slow40.0%." in text
    assert "≥ 5.4 (" in page
    assert "4 iterations of distillation, optimize.objective hard_ce" in page


def test_unknown_costs_are_not_drawn(page: str) -> None:
    labels = re.findall(r'aria-label="(Success against [^:]*)', page)
    assert labels == ["Success against iterations", "Success against environment steps"]


def test_forgetting_is_shown_if_it_was_evaluated(tmp_path: Path, page: str) -> None:
    assert "Forgetting" not in page
    publish(tmp_path, with_unseen())
    study_page.run(tmp_path, "speed")
    text = (tmp_path / "report/speed/index.html").read_text()
    assert (
        "Success on seen tasks and on unseen ones: start 20.0% and 60.0%; "
        "fast 90.0% and 50.0%; slow 40.0% and 10.0%." in text
    )
    results = json.loads((tmp_path / "report/speed/results.json").read_text())
    assert [arm["forgotten"]["value"] for arm in results["arms"]] == pytest.approx([0.1, 0.5])
    assert results["unseen_start"]["value"] == pytest.approx(0.6)
    assert results["start"]["value"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arms", "checkpoint", "success"),
    [
        # One arm has another teacher than the rest, or all have that teacher.
        (("fast",), "7" * 12, 1.0),
        (("fast", "slow"), "8" * 12, 0.9),
    ],
)
def test_the_teacher_is_that_of_all_arms(
    tmp_path: Path, arms: tuple[str, ...], checkpoint: str, success: float
) -> None:
    rows = table()
    second_teacher = [
        row.model_copy(
            update={
                "evaluation": "second",
                "checkpoint": "other",
                "success": row.success and row.state > 0,
            }
        )
        for row in rows.episodes
        if row.evaluation == "teacher"
    ]
    tree = TREE | {
        "adopt": {"other": {"folder": "somewhere"}},
        "evaluations": TREE["evaluations"] | {"second": "other"},
    }
    study = copy.deepcopy(STUDIES["speed"])
    for arm in arms:
        study["arms"][arm]["settings"] = {"label.teacher": "other"}
    publish(tmp_path, rows.with_shared(second_teacher), **tree, studies={"speed": study})
    study_page.run(tmp_path, "speed")
    results = json.loads((tmp_path / "report/speed/results.json").read_text())
    assert results["teacher"]["value"] == pytest.approx(success)
    page = (tmp_path / "report/speed/index.html").read_text()
    assert f"teacher <code>{checkpoint}" in page


def test_the_teacher_is_at_the_cost_of_making_it(tmp_path: Path, page: str) -> None:
    assert "making the teacher took" not in page  # the cost is not recorded
    cost = {"episodes": 50, "env_steps": 2500, "optimizer_steps": 10}
    rows = [
        row.model_copy(update=cost) if row.evaluation == "teacher" else row
        for row in table().episodes
    ]
    publish(tmp_path, Table(tuple(rows), table().updates))
    study_page.run(tmp_path, "speed")
    text = (tmp_path / "report/speed/index.html").read_text()
    assert "teacher 100.0%; making the teacher took 2,500." in text
    assert "50 demonstrations, 2,500 environment steps, 10 optimizer steps" in text
    assert (
        json.loads((tmp_path / "report/speed/results.json").read_text())["teacher_cost"][
            "env_steps"
        ]
        == 2500
    )


def test_the_page_has_no_external_resources(page: str) -> None:
    assert not re.search(r"https?:|@import|<script|<link|<img| src=", page)
    assert not re.search(r"#0000[01]\d", page)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_the_page_is_an_artifact_made_from_the_table(root: Path) -> None:
    report = open_artifact(root / "report/speed", "report")
    assert report.parents == {"study": open_artifact(root / "studies/speed", "study").digest}


def test_same_table_same_bytes(root: Path, tmp_path: Path) -> None:
    publish(tmp_path / "again", table())
    study_page.run(tmp_path / "again", "speed")
    for name in ("index.html", "results.json", "manifest.json"):
        assert (tmp_path / "again/report/speed" / name).read_bytes() == (
            root / "report/speed" / name
        ).read_bytes()


def test_a_study_without_finished_members_has_no_page(tmp_path: Path) -> None:
    shared = tuple(row for row in table().episodes if row.arm is None)
    publish(tmp_path, Table(shared, ()))
    with pytest.raises(
        ValueError, match=r"no member is done; expected one at least \(opd study speed\)"
    ):
        study_page.run(tmp_path, "speed")


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, table())
    with (tmp_path / "studies/speed/episodes.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"episodes\.parquet.*it is corrupt"):
        study_page.run(tmp_path, "speed")


def test_sixteen_arms_can_be_told_apart() -> None:
    styles = [arm_style(number) for number in range(16)]
    assert len({str(style) for style in styles}) == 16
    assert [
        len({style["color"] for style in styles[:8]}),
        len({style["marker"] for style in styles[:8]}),
    ] == [8, 8]
