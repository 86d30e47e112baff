"""Drawings of a study: success against cost, divergence by iteration, forgetting."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from vla_opd.analysis.bootstrap import COSTS, SHARE, Curve, Estimate, Study
from vla_opd.analysis.study_results import StudyResults
from vla_opd.pages.drawing import (
    DASHED,
    INK,
    MUTED,
    PAPER,
    SERIES,
    SMALL,
    TEACHER,
    WHOLE,
    draw,
    show_percent,
)
from vla_opd.pages.html import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COST_NAMES = {
    "iterations": "iterations",
    "episodes": "rollouts",
    "optimizer_steps": "optimizer steps",
    "env_steps": "environment steps",
    "teacher_queries": "teacher queries",
    "seconds": "seconds",
}
DIAGNOSTICS = {
    "student_entropy_after": "student's entropy, nats per token",
    "reverse_kl_before": "reverse KL, nats per token",
}
MARKERS = "osD^vPX*"
LARGE = (920, 440)  # CSS pixels


def study_figures(study: Study, unseen: Study | None, results: StudyResults) -> dict[str, Markup]:
    """Return the drawings by name: those that the study has numbers for.

    unseen: the study of the tasks not trained on, if any.
    """
    figures: dict[str, Markup] = {}
    for cost in COSTS:
        curves = _select_curves(study, cost)
        if curves:
            figures[cost] = _success_against_cost(study, results, curves, cost)
    for quantity in DIAGNOSTICS:
        if any(curve.by_position(quantity) for curve in study.curves):
            figures[quantity] = _diagnostic(study, quantity)
    if unseen:
        figures["forgetting"] = _forgetting(study, unseen)
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
    cost_name = COST_NAMES[cost]
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
            xlabel=cost_name,
            ylabel="success rate",
            ylim=WHOLE,
            xlim=(0, None),
        )
        show_percent(axes.yaxis)
        axes.xaxis.set_major_formatter(_format_thousands)
        axes.locator_params(axis="x", nbins=6, integer=cost == "iterations")

    ends: list[str] = []
    for number, curve in curves.items():
        total = curve.cost(cost)[-1]
        success = successes[number][-1]
        ends.append(f"{curve.arm} {percent(success.value)} after {total:,.0f}")
    ends.append(f"teacher {percent(teacher)}")
    if teacher_cost:
        ends.append(f"making the teacher took {teacher_cost:,.0f}")
    values = "; ".join(ends)
    alt = f"Success against {cost_name}: {values}."
    return draw(f"by-{cost}", alt, SMALL, paint)


def _draw_levels(axes: "Axes", teacher: float) -> None:
    """Draw the teacher's success rate, and SHARE of it."""
    axes.axhline(teacher, color=TEACHER, linewidth=1.5)
    axes.axhline(
        SHARE * teacher,
        color=MUTED,
        linewidth=1,
        linestyle=DASHED,
    )


def _draw_curve(
    axes: "Axes", spent: Float[np.ndarray, " P"], success: Sequence[Estimate], number: int
) -> None:
    style = arm_style(number)
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


def arm_style(number: int) -> dict[str, Any]:
    """Return color and marker of an arm; dashed and hollow when the colors start again."""
    style: dict[str, Any] = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
    }
    if number >= len(SERIES):
        style["linestyle"] = (0, (3, 1.5))
        style["markerfacecolor"] = PAPER
    return style


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
                **arm_style(number),
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
        unseen_curve = unseen.find(curve.arm)
        if unseen_curve:
            path = _path(study.success(curve), unseen.success(unseen_curve))
            paths[number] = path
            ends.append(f"{curve.arm} {_format_pair(path[-1])}")
    alt = f"Success on seen tasks and on unseen ones: {'; '.join(ends)}."

    def paint(axes: "Axes") -> None:
        _draw_star(axes, *teacher)
        for number, path in paths.items():
            seen_rates, unseen_rates = zip(*path, strict=True)
            style = arm_style(number)
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
            xlabel="success rate on trained tasks",
            ylabel="success rate on unseen tasks",
            xlim=WHOLE,
            ylim=WHOLE,
        )
        show_percent(axes.xaxis)
        show_percent(axes.yaxis)

    return draw("forgetting", alt, LARGE, paint)


def _path(seen: Sequence[Estimate], unseen: Sequence[Estimate]) -> list[tuple[float, float]]:
    pairs = zip(seen, unseen, strict=True)
    return [(on_seen.value, on_unseen.value) for on_seen, on_unseen in pairs]


def _format_pair(rates: tuple[float, float]) -> str:
    return f"{percent(rates[0])} and {percent(rates[1])}"
