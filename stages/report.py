"""report: evaluations, checkpoints -> one HTML page and `results.json`.

No network, no scripts, no clock: the same inputs give the same bytes.
"""

from importlib.metadata import version
from pathlib import Path

from vla_opd.analysis.finished_run import read_run
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.pages import html, report_page
from vla_opd.params.run import Params


def run(*, run: str, params: Params, root: Path, out: Path, host: Host) -> Manifest:
    """Write `index.html` and `results.json` of the run in `root`.

    ValueError names an artifact that is missing or does not belong to the others, or an evaluation
    that `report` names and that does not exist.
    """
    _require_evaluations(params)
    finished = read_run(params, root)
    results = finished.results
    recorded = {"parameters": params.model_dump(mode="json", exclude={"studies"})}
    with (
        draft(out, "report", finished.parents, recorded) as work,
        track(host, run, "report", out.name, recorded) as log,
    ):
        success = {
            "start": results.start.success,
            "final": results.final.success,
            "teacher": results.teacher.success,
        }
        log(success, 0)
        with work.part("results.json") as path:
            numbers = results.model_dump_json(indent=2)
            path.write_text(f"{numbers}\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(report_page.render(finished), encoding="utf-8")
        work.record_made_with({package: version(package) for package in html.PACKAGES})
        return work.publish(results.model_dump(mode="json"))


def _require_evaluations(params: Params) -> None:
    """ValueError unless the evaluations that `report` names exist."""
    names = sorted(params.evaluations)
    for field, name in params.report.model_dump().items():
        if name not in names:
            raise ValueError(f"report.{field} is {name!r}; expected one of {names}")
