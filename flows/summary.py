"""`report/summary.json`: the results of a run and what they cost. The cost is of this machine, so the file is in no DVC out."""

import json
from pathlib import Path
from typing import Any

from vla_opd.artifacts import open_artifact


def write(run: Path, seconds: float) -> dict[str, Any]:
    """Write the results of `report/page` with the wall time of the run that made them, unless that very report is summed up already.

    Returns `{teacher, start, final: {success, low, high, episodes}, env_steps, teacher_queries, seconds, ...}`.
    """
    page, path = run / "report" / "page", run / "report" / "summary.json"
    digest = open_artifact(page, "report").digest
    if path.is_file() and (known := json.loads(path.read_text())).get("report") == digest:
        return known
    summary = json.loads((page / "results.json").read_text()) | {"seconds": round(seconds, 1), "report": digest}
    temporary = path.with_name(".summary.json.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.rename(path)
    return summary
