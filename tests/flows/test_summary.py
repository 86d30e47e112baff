"""The summary holds the report's results and what they cost, and survives a run that had nothing to do."""

import json
from pathlib import Path

from flows import summary
from vla_opd.artifacts import draft

SCORE = {"success": 0.5, "low": 0.4, "high": 0.6, "episodes": 10}


def _report(run: Path, env_steps: int) -> None:
    with draft(run / "report/page", "report", {}, {"env_steps": env_steps}) as work:
        with work.part("results.json") as path:
            path.write_text(json.dumps({"teacher": SCORE, "start": SCORE, "final": SCORE, "env_steps": env_steps, "teacher_queries": 3}))
        work.publish({})


def test_the_summary_is_the_results_and_the_seconds(tmp_path: Path) -> None:
    _report(tmp_path, 7)
    summary.write(tmp_path, 12.34)
    written = json.loads((tmp_path / "report/summary.json").read_text())
    assert written["final"] == SCORE
    assert (written["env_steps"], written["teacher_queries"], written["seconds"]) == (7, 3, 12.3)


def test_a_run_that_reused_the_report_keeps_what_it_cost(tmp_path: Path) -> None:
    _report(tmp_path, 7)
    summary.write(tmp_path, 12.3)
    assert summary.write(tmp_path, 0.5)["seconds"] == 12.3
    _report(tmp_path, 8)
    assert summary.write(tmp_path, 0.5)["seconds"] == 0.5
