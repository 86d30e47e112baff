"""`report/summary.json`: the results of a run and their cost.

The time that it took depends on the machine, so the file is in no DVC out.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla_opd.artifacts.manifest import MANIFEST, open_artifact, read_manifest

SECONDS = "seconds.jsonl"


def record_seconds(metrics: Path, stage: str, seconds: float) -> None:
    """Append how long a stage took to a file in the folder of the run's metrics."""
    metrics.mkdir(parents=True, exist_ok=True)
    row = {"stage": stage, "seconds": round(seconds, 1)}
    with (metrics / SECONDS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _read_seconds(metrics: Path) -> dict[str, float]:
    """Return how long each stage took in its last execution."""
    path = metrics / SECONDS
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["stage"]: row["seconds"] for row in rows}


def read(run: Path) -> dict[str, Any] | None:
    """Return the summary in a run's folder; None if there is none of the present report."""
    page = run / "report" / "page"
    path = run / "report" / "summary.json"
    if not path.is_file() or not (page / MANIFEST).is_file():
        return None
    summary = json.loads(path.read_text())
    digest = read_manifest(page, "report").digest
    return summary if summary["report"] == digest else None


def write(run: Path, metrics: Path, stages: Iterable[str]) -> dict[str, Any]:
    """Write the results of `report/page`, and the seconds that the run's stages took.

    A stage counts with its last execution, so interruptions make no difference. Return `{teacher,
    start, final: {success, low, high, episodes}, env_steps, teacher_queries, seconds, ...}`.
    """
    page = run / "report" / "page"
    path = run / "report" / "summary.json"
    digest = open_artifact(page, "report").digest
    recorded = _read_seconds(metrics)
    seconds = sum(recorded.get(stage, 0.0) for stage in stages)
    summary = json.loads((page / "results.json").read_text())
    summary["seconds"] = round(seconds, 1)
    summary["report"] = digest
    temporary = path.with_name(".summary.json.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.rename(path)
    return summary
