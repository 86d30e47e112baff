"""The summary holds the report's results and their cost, and a run that did nothing keeps it."""

import json
from pathlib import Path

from flows import summary
from vla_opd.artifacts.draft import draft

SCORE = {"success": 0.5, "low": 0.4, "high": 0.6, "episodes": 10}


def _report(run: Path, env_steps: int) -> None:
    with draft(run / "report/page", "report", {}, {"env_steps": env_steps}) as work:
        with work.part("results.json") as path:
            path.write_text(
                json.dumps(
                    {
                        "teacher": SCORE,
                        "start": SCORE,
                        "final": SCORE,
                        "env_steps": env_steps,
                        "teacher_queries": 3,
                    }
                )
            )
        work.publish({})


def test_the_summary_is_the_results_and_the_seconds(tmp_path: Path) -> None:
    _report(tmp_path, 7)
    summary.write(tmp_path, tmp_path / "metrics", ["report"])
    written = json.loads((tmp_path / "report/summary.json").read_text())
    assert written["final"] == SCORE
    assert (written["env_steps"], written["teacher_queries"], written["seconds"]) == (7, 3, 0)


def test_what_is_read_is_of_the_report_that_is_there(tmp_path: Path) -> None:
    assert summary.read(tmp_path) is None
    _report(tmp_path, 7)
    assert summary.read(tmp_path) is None
    written = summary.write(tmp_path, tmp_path / "metrics", ["report"])
    assert summary.read(tmp_path) == written
    _report(tmp_path, 8)
    assert summary.read(tmp_path) is None, "the report was made again since"


def test_the_cost_is_of_all_stages_of_the_run_however_often_it_was_interrupted(
    tmp_path: Path,
) -> None:
    _report(tmp_path, 7)
    metrics = tmp_path / "metrics"
    for stage, seconds in [("sample@it001", 30.0), ("label@it001", 8.25), ("sample@it009", 99.0)]:
        summary.record_seconds(metrics, stage, seconds)
    stages = ["sample@it001", "label@it001", "report"]
    assert summary.write(tmp_path, metrics, stages)["seconds"] == 38.2
    summary.record_seconds(metrics, "sample@it001", 20.0)  # once more, with another setting
    summary.record_seconds(metrics, "report", 1.0)
    assert summary.write(tmp_path, metrics, stages)["seconds"] == 29.2
