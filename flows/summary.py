"""`report/summary.json`: the results of a run and what they cost. The cost is of this machine, so the file is in no DVC out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla_opd.artifacts.manifest import MANIFEST, open_artifact, read_manifest

SECONDS = "seconds.jsonl"


def note(metrics: Path, stage: str, seconds: float) -> None:
    """Remember how long a stage took, in a folder of the run's metrics."""
    metrics.mkdir(parents=True, exist_ok=True)
    with (metrics / SECONDS).open("a") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 1)}) + "\n")


def read(run: Path) -> dict[str, Any] | None:
    """The summary of a run, if it has one and it is of the report that is there."""
    page, path = run / "report" / "page", run / "report" / "summary.json"
    if not path.is_file() or not (page / MANIFEST).is_file():
        return None
    summary = json.loads(path.read_text())
    return summary if summary["report"] == read_manifest(page, "report").digest else None


def write(run: Path, metrics: Path, stages: Iterable[str]) -> dict[str, Any]:
    """Write the results of `report/page` and the seconds that the run's stages took, each in its last execution, however often it was interrupted.

    Returns `{teacher, start, final: {success, low, high, episodes}, env_steps, teacher_queries, seconds, ...}`.
    """
    page, path = run / "report" / "page", run / "report" / "summary.json"
    digest = open_artifact(page, "report").digest
    noted = (metrics / SECONDS).read_text().splitlines() if (metrics / SECONDS).is_file() else []
    took = {row["stage"]: row["seconds"] for row in map(json.loads, noted)}
    seconds = sum(took.get(stage, 0.0) for stage in stages)
    summary = json.loads((page / "results.json").read_text()) | {
        "seconds": round(seconds, 1),
        "report": digest,
    }
    temporary = path.with_name(".summary.json.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.rename(path)
    return summary
