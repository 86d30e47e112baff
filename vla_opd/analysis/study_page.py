"""A study's page: its table as HTML, and its numbers as JSON.

No network, no scripts, no clock: the same table gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from vla_opd.analysis import html
from vla_opd.analysis.bootstrap import (
    COSTS,
    SHARE,
    Curve,
    Estimate,
    Study,
    common_seeds,
    read_study,
)
from vla_opd.analysis.html import DRAWN_WITH, INK, MUTED, PAPER, SERIES, TEACHER, draw, percent
from vla_opd.analysis.study_table import Cost, Table, read
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.params.recorded import read_recorded
from vla_opd.params.run import Params
from vla_opd.params.study import StudyParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "study.html.jinja"
NAMES = {
    "iterations": "iterations",
    "episodes": "rollouts",
    "optimizer_steps": "optimiser steps",
    "env_steps": "environment steps",
    "teacher_queries": "teacher queries",
    "seconds": "seconds",
}
DIAGNOSTICS = {
    "student_entropy_after": "student's entropy, nats per token",
    "reverse_kl_before": "reverse KL, nats per token",
}
MARKERS = "osD^vPX*"
SMALL = (450, 300)  # CSS pixels
LARGE = (920, 440)
WHOLE = (-0.03, 1.03)  # the limits of an axis of success rates


class ArmResult(BaseModel):
    """One arm at its end.

    success:    the success rate, averaged over seeds.
    reach:      the costs at which it reaches SHARE of the teacher's success rate; None if never.
    difference: its success rate minus that of the first arm, over the `compared` seeds of both.
    ratios:     `reach` over that of the first arm; a lower bound where `reach` is None.
    unseen:     the success rate on tasks that the run does not train on, if any were evaluated.
    forgotten:  by how much that is below the start's.
    """

    model_config = ConfigDict(frozen=True)
    arm: str
    seeds: tuple[int, ...]
    success: Estimate
    per_seed: tuple[float, ...]
    by_task: dict[str, float]
    costs: dict[str, float | None]
    student_entropy: float | None
    teacher_entropy: float | None
    reverse_kl: float | None
    reach: dict[str, Estimate | None]
    compared: int
    difference: Estimate | None
    unseen: Estimate | None
    forgotten: Estimate | None
    ratios: dict[str, Estimate | None]


class StudyResults(BaseModel):
    """`results.json`: the numbers of the page."""

    model_config = ConfigDict(frozen=True)
    start: Estimate
    teacher: Estimate
    teacher_cost: Cost
    unseen_start: Estimate | None
    unseen_teacher: Estimate | None
    share: float
    arms: tuple[ArmResult, ...]


def run(root: Path, name: str) -> Manifest:
    """Write `<root>/report/<name>` from the table `<root>/studies/<name>`.

    ValueError if the table is missing or damaged, or has no finished member.
    """
    folder = root / "studies" / name
    table = open_artifact(folder, "study")
    params = read_recorded(table.params["parameters"])
    rows = read(folder)
    teacher = _teacher_evaluation(params, name)
    study = _read_study(rows, params, teacher, seen=True)
    unseen = _read_study(rows, params, teacher, seen=False)
    if study is None or not study.curves:
        raise ValueError(f"{folder}: no member is done; expected one at least (opd study {name})")
    results = compute_results(study, unseen)
    numbers = results.model_dump_json(indent=2)
    page = render(
        name,
        params,
        table,
        params.evaluations[teacher],
        study,
        unseen,
        results,
    )
    target = root / "report" / name
    parents = {"study": table.digest}
    with draft(target, "report", parents, {}) as work:
        with work.part("results.json") as path:
            path.write_text(f"{numbers}\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(page, encoding="utf-8")
        packages = (*DRAWN_WITH, "duckdb", "numpy")
        work.record_made_with({package: version(package) for package in packages})
        success = {result.arm: result.success.value for result in results.arms}
        facts = {
            "arms": list(success),
            "success": success,
        }
        return work.publish(facts)


def _read_study(rows: Table, params: Params, teacher: str, *, seen: bool) -> Study | None:
    """Return the study of the tasks that the run trains on, or of the others, if there are any."""
    if not any(row.seen is seen for row in rows.episodes):
        return None
    return read_study(rows, params.report.start, teacher, seen=seen)


def _teacher_evaluation(params: Params, name: str) -> str:
    """Return the evaluation of the teacher of all arms that distil.

    That of the report if the arms have several teachers, or if theirs is not evaluated.
    """
    study = params.studies[name]
    teachers: set[str] = set()
    for arm, settings in study.arms.items():
        if settings.distill:
            teachers.add(_teacher_checkpoint(study, arm, params.label.teacher))
    scored = [
        evaluation
        for evaluation, checkpoint in params.reference_evaluations.items()
        if teachers == {checkpoint}
    ]
    if params.report.teacher in scored or not scored:
        return params.report.teacher
    return scored[0]


def _teacher_checkpoint(study: StudyParams, arm: str, default: str) -> str:
    teacher = default
    for settings in study.lineage(arm):
        teacher = settings.settings.get("label.teacher", teacher)
    return teacher


def compute_results(study: Study, unseen: Study | None) -> StudyResults:
    """Return the numbers of the page. unseen: the study of the tasks not trained on, if any."""
    unseen_start = None
    unseen_teacher = None
    if unseen:
        unseen_start = unseen.checkpoint_success(unseen.start)
        unseen_teacher = unseen.checkpoint_success(unseen.teacher)
    return StudyResults(
        start=study.checkpoint_success(study.start),
        teacher=study.checkpoint_success(study.teacher),
        teacher_cost=study.teacher_cost,
        unseen_start=unseen_start,
        unseen_teacher=unseen_teacher,
        share=SHARE,
        arms=tuple(_arm_result(study, curve, unseen) for curve in study.curves),
    )


def _arm_result(study: Study, curve: Curve, unseen: Study | None) -> ArmResult:
    first = study.curves[0]
    difference = None
    ratios: dict[str, Estimate | None] = dict.fromkeys(COSTS)
    if curve is not first:
        difference = study.difference(first, curve)
        ratios = {name: study.ratio(first, curve, name) for name in COSTS}
    unseen_success = None
    forgotten = None
    unseen_curve = _find_curve(unseen, curve.arm)
    if unseen and unseen_curve:
        unseen_success = unseen.success(unseen_curve)[-1]
        forgotten = unseen.forgetting(unseen_curve)
    return ArmResult(
        arm=curve.arm,
        seeds=curve.seeds,
        success=study.success(curve)[-1],
        per_seed=tuple(curve.per_seed.tolist()),
        by_task=study.task_success(curve.outcomes[:, -1]),
        costs={name: _total_cost(curve, name) for name in COSTS},
        student_entropy=curve.at_end("student_entropy_after"),
        teacher_entropy=curve.at_end("teacher_entropy_after"),
        reverse_kl=curve.at_end("reverse_kl_after"),
        reach={name: _finite_reach(study, curve, name) for name in COSTS},
        compared=len(common_seeds(first, curve)),
        difference=difference,
        unseen=unseen_success,
        forgotten=forgotten,
        ratios=ratios,
    )


def _find_curve(study: Study | None, arm: str) -> Curve | None:
    for curve in study.curves if study else ():
        if curve.arm == arm:
            return curve
    return None


def _total_cost(curve: Curve, name: str) -> float | None:
    total = float(curve.cost(name)[-1])
    return total if math.isfinite(total) else None


def _finite_reach(study: Study, curve: Curve, name: str) -> Estimate | None:
    reach = study.reach(curve, name)
    return reach if math.isfinite(reach.value) else None


# The page


def render(
    name: str,
    params: Params,
    table: Manifest,
    teacher: str,
    study: Study,
    unseen: Study | None,
    results: StudyResults,
) -> str:
    """Render the page. teacher: the checkpoint."""
    figures = _figures(study, results)
    if unseen:
        figures["forgetting"] = _forgetting(study, unseen)
    recipes = [_recipe(params.studies[name], result.arm) for result in results.arms]
    return html.render(
        "vla_opd.analysis",
        TEMPLATE,
        name=name,
        params=params,
        table=table,
        teacher=teacher,
        results=results,
        arms=list(zip(results.arms, recipes, strict=True)),
        tasks=list(dict.fromkeys(study.tasks)),
        start_by_task=study.task_success(study.start),
        teacher_by_task=study.task_success(study.teacher),
        horizon=study.horizon,
        names=NAMES,
        figures=figures,
        unseen_tasks=list(dict.fromkeys(unseen.tasks)) if unseen else [],
        diagnostics=DIAGNOSTICS,
    )


def _recipe(study: StudyParams, arm: str) -> str:
    """Describe an arm in words."""
    if arm not in study.arms:
        return ""
    settings = study.arms[arm]
    phrases: list[str] = []
    if settings.after:
        phrases.append(f"after {settings.after}")
    if settings.switch is not None:
        phrases.append(f"from where its rollouts had {percent(settings.switch)}")
    if settings.own_student:
        phrases.append("a student of its own")
    if settings.distill:
        phrases.append(f"{settings.distill} iterations of distillation")
    if settings.reinforce:
        phrases.append(f"{settings.reinforce} of GRPO")
    phrases += [f"{key} {value}" for key, value in settings.settings.items()]
    return ", ".join(phrases)


def _figures(study: Study, results: StudyResults) -> dict[str, Markup]:
    figures: dict[str, Markup] = {}
    for cost in COSTS:
        curves = _select_curves(study, cost)
        if curves:
            figures[cost] = _success_against_cost(study, results, curves, cost)
    for quantity in DIAGNOSTICS:
        if any(curve.by_position(quantity) for curve in study.curves):
            figures[quantity] = _diagnostic(study, quantity)
    return figures


def _select_curves(study: Study, cost: str) -> dict[int, Curve]:
    """Return the arms that have this cost, by number; GRPO has no teacher queries, for example."""
    curves: dict[int, Curve] = {}
    for number, curve in enumerate(study.curves):
        total = curve.cost(cost)[-1]
        if math.isfinite(total) and total > 0:
            curves[number] = curve
    return curves


def _success_against_cost(
    study: Study, results: StudyResults, curves: Mapping[int, Curve], cost: str
) -> Markup:
    """Draw the mean success rate over seeds with its interval against a cost.

    The teacher is a line, and a star at the cost of making it.
    """
    teacher = results.teacher.value
    teacher_cost = getattr(results.teacher_cost, cost)
    successes = {number: study.success(curve) for number, curve in curves.items()}

    def paint(axes: "Axes") -> None:
        _draw_levels(axes, teacher)
        if teacher_cost:
            _draw_star(axes, teacher_cost, teacher)
        for number in reversed(list(curves)):  # the first arm is drawn on top
            spent = curves[number].cost(cost)
            _draw_curve(axes, spent, successes[number], number)
        axes.set(
            xlabel=NAMES[cost],
            ylabel="success",
            ylim=WHOLE,
            xlim=(0, None),
        )
        axes.yaxis.set_major_formatter(_format_percent)
        axes.xaxis.set_major_formatter(_format_thousands)
        axes.locator_params(axis="x", nbins=6, integer=cost == "iterations")

    ends: list[str] = []
    for number, curve in curves.items():
        total = curve.cost(cost)[-1]
        success = successes[number][-1]
        ends.append(f"{curve.arm} {percent(success.value)} after {total:,.0f}")
    ends.append(f"teacher {percent(teacher)}")
    made_with = f", itself made with {teacher_cost:,.0f}" if teacher_cost else ""
    alt = f"Success against {NAMES[cost]}: {'; '.join(ends)}{made_with}."
    return draw(f"by-{cost}", alt, SMALL, paint)


def _draw_levels(axes: "Axes", teacher: float) -> None:
    """Draw the teacher's success rate, and SHARE of it."""
    dashed = (0, (4, 3))
    axes.axhline(teacher, color=TEACHER, linewidth=1.5)
    axes.axhline(SHARE * teacher, color=MUTED, linewidth=1, linestyle=dashed)


def _draw_curve(
    axes: "Axes", spent: Float[np.ndarray, " P"], success: Sequence[Estimate], number: int
) -> None:
    style = _style(number)
    axes.fill_between(
        spent,
        [point.low for point in success],
        [point.high for point in success],
        color=style["color"],
        alpha=0.13,
        linewidth=0,
    )
    means = [point.value for point in success]
    axes.plot(spent, means, linewidth=2, markersize=5, **style)


def _draw_star(axes: "Axes", x: float, y: float) -> None:
    axes.plot(x, y, marker="*", markersize=13, color=TEACHER, linestyle="none")


def _style(number: int) -> dict[str, Any]:
    """Return colour and marker of an arm; dashed and hollow when the colours start again."""
    style: dict[str, Any] = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
    }
    if number >= len(SERIES):
        style["linestyle"] = (0, (3, 1.5))
        style["markerfacecolor"] = PAPER
    return style


def _format_percent(value: float, _: object) -> str:
    return f"{value:.0%}"


def _format_thousands(value: float, _: object) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def _diagnostic(study: Study, quantity: str) -> Markup:
    """Draw a quantity of every iteration, the mean over seeds."""
    title = DIAGNOSTICS[quantity]
    series: dict[int, dict[int, float]] = {}
    ends: list[str] = []
    for number, curve in enumerate(study.curves):
        values = curve.by_position(quantity)
        series[number] = values
        if values:
            last = max(values)
            ends.append(f"{curve.arm} {values[last]:.2f}")
    alt = f"The {title}, of every iteration; at the last one: {'; '.join(ends)}."

    def paint(axes: "Axes") -> None:
        if quantity == "student_entropy_after":
            _draw_teacher_entropy(axes, study.curves)
        for number, values in series.items():
            axes.plot(
                list(values.keys()),
                list(values.values()),
                linewidth=2,
                markersize=5,
                **_style(number),
            )
        axes.set(xlabel="iteration", ylabel=title, xlim=(0.5, None))
        axes.set_ylim(bottom=0 if quantity.startswith("reverse_kl") else None)
        axes.locator_params(axis="x", nbins=8, integer=True)

    return draw(quantity.replace("_", "-"), alt, SMALL, paint)


def _draw_teacher_entropy(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Draw the teacher's entropy on the states of the first arm that has labels."""
    for curve in curves:
        entropy = curve.by_position("teacher_entropy_after")
        if entropy:
            positions = list(entropy.keys())
            axes.plot(positions, list(entropy.values()), color=TEACHER, linewidth=1.5)
            return


def _forgetting(study: Study, unseen: Study) -> Markup:
    """Draw every checkpoint at its mean success rates on trained tasks and on the others."""
    start = (float(study.start.mean()), float(unseen.start.mean()))
    teacher = (float(study.teacher.mean()), float(unseen.teacher.mean()))
    ends = [f"start {_format_pair(start)}"]
    paths: dict[int, list[tuple[float, float]]] = {}
    for number, curve in enumerate(study.curves):
        unseen_curve = _find_curve(unseen, curve.arm)
        if unseen_curve:
            path = _path(study.success(curve), unseen.success(unseen_curve))
            paths[number] = path
            ends.append(f"{curve.arm} {_format_pair(path[-1])}")
    alt = f"Success on seen tasks and on unseen ones: {'; '.join(ends)}."

    def paint(axes: "Axes") -> None:
        _draw_star(axes, *teacher)
        for number, path in paths.items():
            seen_rates, unseen_rates = zip(*path, strict=True)
            style = _style(number)
            axes.plot(seen_rates, unseen_rates, linewidth=1.5, markersize=6, **style)
        axes.plot(
            *start,
            marker="o",
            markersize=10,
            color=INK,
            fillstyle="none",
            linestyle="none",
        )
        axes.set(
            xlabel="success on the tasks that are trained",
            ylabel="success on unseen tasks",
            xlim=WHOLE,
            ylim=WHOLE,
        )
        axes.xaxis.set_major_formatter(_format_percent)
        axes.yaxis.set_major_formatter(_format_percent)

    return draw("forgetting", alt, LARGE, paint)


def _path(seen: Sequence[Estimate], unseen: Sequence[Estimate]) -> list[tuple[float, float]]:
    pairs = zip(seen, unseen, strict=True)
    return [(on_seen.value, on_unseen.value) for on_seen, on_unseen in pairs]


def _format_pair(rates: tuple[float, float]) -> str:
    return f"{percent(rates[0])} and {percent(rates[1])}"
