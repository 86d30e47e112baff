"""report: the artifact of a small run whose artifacts are made by hand, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from stages import report
from tests.made_run import ITERATIONS, params, publish_evaluation, publish_run, score
from vla_opd.artifacts.manifest import Manifest, open_artifact, read_manifest
from vla_opd.machine.host import Host
from vla_opd.params.run import Params


def run_report(root: Path, settings: Params | None = None, out: Path | None = None) -> Manifest:
    return report.run(
        run="small",
        params=settings or params(),
        root=root,
        out=out or root / "report/page",
        host=Host(),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    publish_run(folder)
    run_report(folder)
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "small")
    return tmp_path / "small"


# The artifact


def test_results_add_up(root: Path) -> None:
    results = json.loads((root / "report/page/results.json").read_text())
    assert results["start"] == pytest.approx(score([True] * 4 + [False] * 16))
    assert results["final"]["success"] == pytest.approx(0.8)
    assert results["teacher"] == pytest.approx(score([True] * 20))
    assert results["env_steps"] == 1100 + 1000 + 900
    assert results["teacher_queries"] == 550 + 551 + 552
    assert [row["name"] for row in results["iterations"]] == list(ITERATIONS)
    assert results["iterations"][1]["before"]["reverse_kl"] == pytest.approx(0.95)
    assert results["iterations"][2]["success"] == pytest.approx(0.75)


def test_its_parents_are_all_artifacts_that_it_shows(root: Path) -> None:
    manifest = open_artifact(root / "report/page", "report")
    assert set(manifest.files) == {"index.html", "results.json"}
    assert len(manifest.parents) == 2 + 3 * 3 + 4
    labels = read_manifest(root / "labels/it002", "labels")
    assert manifest.parents["labels/it002"] == labels.digest


def test_same_inputs_same_bytes(root: Path, tmp_path: Path) -> None:
    publish_run(tmp_path / "elsewhere")
    run_report(tmp_path / "elsewhere", out=tmp_path / "page")
    for name in ("index.html", "results.json", "manifest.json"):
        expected = (root / "report/page" / name).read_bytes()
        assert (tmp_path / "page" / name).read_bytes() == expected


# Refusals


@pytest.mark.parametrize("field", ["start", "final", "teacher"])
def test_report_names_evaluations_that_exist(field: str, tmp_path: Path) -> None:
    message = rf"report\.{field} is 'x'; expected one of \['final', 'it002', 'start', 'teacher'\]"
    with pytest.raises(ValueError, match=message):
        run_report(tmp_path, params(report={field: "x"}))


@pytest.mark.parametrize(
    "missing",
    [
        "evaluations/it002",
        "checkpoints/it003",
        "checkpoints/teacher",
        "trajectories/it001",
        "labels/it002",
    ],
)
def test_a_missing_artifact_is_named(missing: str, copy: Path) -> None:
    shutil.rmtree(copy / missing)
    with pytest.raises(ValueError, match=rf"{missing}: no manifest\.json"):
        run_report(copy)


def test_a_score_of_another_checkpoint_is_refused(copy: Path) -> None:
    student = read_manifest(copy / "checkpoints/student", "checkpoint")
    publish_evaluation(copy / "evaluations/final", student, (8, 8))
    message = r"evaluations/final: made from checkpoint \w{12}; expected \w{12}"
    with pytest.raises(ValueError, match=message):
        run_report(copy)


def test_corrupt_records_are_refused(copy: Path) -> None:
    path = copy / "evaluations/start/episodes.jsonl"
    path.write_text(path.read_text().replace("false", "true "))
    with pytest.raises(ValueError, match="corrupt"):
        run_report(copy)
