"""A run's page: its evaluations, iterations and settings as HTML.

No network, no scripts, no clock: the same run gives the same bytes.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

from ruamel.yaml import YAML

from vla_opd.analysis.evaluation import Score
from vla_opd.analysis.finished_run import Evaluation, Run
from vla_opd.pages import html
from vla_opd.pages.divergence_figures import AXES, DIVERGENCES, divergence_figures
from vla_opd.pages.html import percent
from vla_opd.pages.success_figures import success_by_horizon, success_by_iteration

TEMPLATE = "report.html.jinja"
# Control steps: OpenVLA-OFT's for LIBERO Spatial, Object, Goal and Long; SimpleVLA-RL's for all.
HORIZONS = (220, 280, 300, 520, 512)


def render(run: Run) -> str:
    """Render the page of a finished run."""
    figures = {
        "success": success_by_iteration(run),
        "horizon": success_by_horizon(run),
        **divergence_figures(run),
    }
    evaluations = run.evaluations.values()
    settings: dict[str, str] = {}
    for name, manifest in run.checkpoints.items():
        settings[name] = _to_yaml(manifest.params)
    return html.render(
        "vla_opd.pages",
        TEMPLATE,
        run=run,
        results=run.results,
        headline=_headline(run),
        share_of_teacher=lambda score: share(score, run.results.teacher),
        confidence=_confidences(evaluations),
        tasks=_tasks(run),
        instructions=_instructions(evaluations),
        horizons=horizons(evaluations),
        figures=figures,
        axes=AXES,
        divergences=DIVERGENCES,
        parameters=_to_yaml(run.params.model_dump(mode="json", exclude={"studies"})),
        settings=settings,
    )


def _headline(run: Run) -> dict[str, Evaluation]:
    names = run.params.report
    return {
        "Before": run.evaluations[names.start],
        "After": run.evaluations[names.final],
        "Teacher": run.evaluations[names.teacher],
    }


def share(score: Score, teacher: Score) -> str:
    """Format a success rate as a fraction of the teacher's."""
    return percent(score.success / teacher.success) if teacher.success else "n/a"


def _confidences(evaluations: Iterable[Evaluation]) -> str:
    levels = {evaluation.confidence for evaluation in evaluations}
    texts = [f"{level:.0%}" for level in sorted(levels)]
    return " / ".join(texts)


def _tasks(run: Run) -> list[str]:
    """Return the evaluated tasks, those that the run trains on first."""
    evaluated: list[str] = []
    for evaluation in run.evaluations.values():
        evaluated += evaluation.facts.tasks
    trained = [task for task in run.params.environment.tasks if task in evaluated]
    distinct = dict.fromkeys([*trained, *evaluated])
    return list(distinct)


def _instructions(evaluations: Iterable[Evaluation]) -> dict[str, str]:
    """Return the instruction of every task."""
    instructions: dict[str, str] = {}
    for evaluation in evaluations:
        for record in (*evaluation.records, *evaluation.unseen):
            instructions[record.task] = record.instruction
    return instructions


def horizons(evaluations: Iterable[Evaluation]) -> list[int]:
    """Return the horizons of the evaluations, and the published ones that are no longer."""
    selected = {evaluation.facts.horizon for evaluation in evaluations}
    longest = max(selected)
    for horizon in HORIZONS:
        if horizon <= longest:
            selected.add(horizon)
    return sorted(selected)


def _to_yaml(tree: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    YAML().dump(dict(tree), stream)
    return stream.getvalue()
