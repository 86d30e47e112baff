"""A study's table -> one HTML page and its numbers as JSON. No network, no scripts, no clock: the same table gives the same bytes."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from vla_opd.analysis import html
from vla_opd.analysis.bootstrap import (
    COSTS,
    SHARE,
    Curve,
    Estimate,
    Study,
    read_study,
    shared_seeds,
)
from vla_opd.analysis.html import DRAWN_WITH, INK, MUTED, PAPER, SERIES, TEACHER, draw, percent
from vla_opd.analysis.study_table import Cost, Table, read
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, open_artifact
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
TOWARDS = {
    "student_entropy_after": "student's entropy, nats a token",
    "reverse_kl_before": "reverse KL, nats a token",
}
MARKERS = "osD^vPX*"


class ArmResult(BaseModel):
    """One arm at its end. success: the mean over seeds; reach: what it cost to come to SHARE of the teacher's success, None if it never came so far.

    difference: of its success, to the first arm's, over the `compared` seeds that both have. ratios: of `reach`, to the first arm's; at least so much
                where `reach` is None.
    unseen:     the success on tasks that the run doesn't train on, if any were scored; forgotten: by how much that is less than the start's.
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
    """`results.json`: what the page says in numbers."""

    model_config = ConfigDict(frozen=True)
    start: Estimate
    teacher: Estimate
    teacher_cost: Cost
    unseen_start: Estimate | None
    unseen_teacher: Estimate | None
    share: float
    arms: tuple[ArmResult, ...]


def run(root: Path, name: str) -> Manifest:
    """Write `<root>/report/<name>` from the table `<root>/studies/<name>`. ValueError if that isn't there or isn't whole."""
    folder = root / "studies" / name
    table = open_artifact(folder, "study")
    params = Params.model_validate(table.params["parameters"])
    rows = read(folder)
    teacher = _teacher(params, name)
    study, unseen = (_study(rows, params, teacher, seen=seen) for seen in (True, False))
    if study is None or not study.curves:
        raise ValueError(f"{folder}: no member is done; expected one at least (opd study {name})")
    found = results(study, unseen)
    with draft(root / "report" / name, "report", {"study": table.digest}, {}) as work:
        with work.part("results.json") as path:
            path.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(
                render(name, params, table, params.evaluations[teacher], study, unseen, found),
                encoding="utf-8",
            )
        work.remember({package: version(package) for package in (*DRAWN_WITH, "duckdb", "numpy")})
        return work.publish(
            {
                "arms": [one.arm for one in found.arms],
                "success": {one.arm: one.success.value for one in found.arms},
            }
        )


def _study(rows: Table, params: Params, teacher: str, *, seen: bool) -> Study | None:
    """Of the tasks that the run trains on, or of those that it doesn't, if any were scored."""
    if not any(row.seen is seen for row in rows.episodes):
        return None
    return read_study(rows, params.report.start, teacher, seen=seen)


def _teacher(params: Params, name: str) -> str:
    """The evaluation of the teacher that all arms which distil ask; the report's, where they ask several, or theirs isn't scored."""
    its = params.studies[name]
    told = [
        {key: value for one in its.lineage(arm) for key, value in one.settings.items()}
        for arm, one in its.arms.items()
        if one.distill
    ]
    asked = {settings.get("label.teacher", params.label.teacher) for settings in told}
    scored = [
        evaluation for evaluation, checkpoint in params.reference.items() if {checkpoint} == asked
    ]
    return params.report.teacher if params.report.teacher in scored or not scored else scored[0]


def results(study: Study, unseen: Study | None) -> StudyResults:
    """Every number of the page."""
    return StudyResults(
        start=study.shared(study.start),
        teacher=study.shared(study.teacher),
        teacher_cost=study.teacher_cost,
        unseen_start=unseen.shared(unseen.start) if unseen else None,
        unseen_teacher=unseen.shared(unseen.teacher) if unseen else None,
        share=SHARE,
        arms=tuple(_arm(study, curve, unseen) for curve in study.curves),
    )


def _arm(study: Study, curve: Curve, unseen: Study | None) -> ArmResult:
    its = _of(unseen, curve.arm)
    first = study.curves[0]
    others = curve is not first
    reached = {name: study.reach(curve, name) for name in COSTS}
    return ArmResult(
        arm=curve.arm,
        seeds=curve.seeds,
        success=study.success(curve)[-1],
        per_seed=tuple(curve.per_seed.tolist()),
        by_task=study.task_success(curve.outcomes[:, -1]),
        costs={name: _finite(float(curve.cost(name)[-1])) for name in COSTS},
        student_entropy=curve.at_end("student_entropy_after"),
        teacher_entropy=curve.at_end("teacher_entropy_after"),
        reverse_kl=curve.at_end("reverse_kl_after"),
        reach={name: one if math.isfinite(one.value) else None for name, one in reached.items()},
        compared=len(shared_seeds(first, curve)),
        difference=study.difference(first, curve) if others else None,
        unseen=unseen.success(its)[-1] if unseen and its else None,
        forgotten=unseen.forgotten(its) if unseen and its else None,
        ratios={name: study.ratio(first, curve, name) if others else None for name in COSTS},
    )


def _of(study: Study | None, arm: str) -> Curve | None:
    return next((curve for curve in study.curves if curve.arm == arm), None) if study else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# The page.


def render(
    name: str,
    params: Params,
    table: Manifest,
    teacher: str,
    study: Study,
    unseen: Study | None,
    found: StudyResults,
) -> str:
    """The page, whole. teacher: the checkpoint."""
    return html.render(
        "vla_opd.analysis",
        TEMPLATE,
        name=name,
        params=params,
        table=table,
        teacher=teacher,
        found=found,
        arms=[
            (one, curve, _told(params.studies[name], one.arm))
            for one, curve in zip(found.arms, study.curves, strict=True)
        ],
        tasks=list(dict.fromkeys(study.tasks)),
        start_by_task=study.task_success(study.start),
        teacher_by_task=study.task_success(study.teacher),
        horizon=study.horizon,
        names=NAMES,
        figures=_figures(study, found)
        | ({"forgetting": _forgetting(study, unseen)} if unseen else {}),
        unseen_tasks=list(dict.fromkeys(unseen.tasks)) if unseen else [],
        towards=TOWARDS,
    )


def _told(study: StudyParams, arm: str) -> str:
    """An arm's recipe, in words."""
    if arm not in study.arms:
        return ""
    its = study.arms[arm]
    said = [f"after {its.after}"] if its.after else []
    said += [f"from where its rollouts had {percent(its.switch)}"] if its.switch is not None else []
    said += ["a student of its own"] if its.own_student else []
    said += [f"{its.distill} iterations of distillation"] if its.distill else []
    said += [f"{its.reinforce} of GRPO"] if its.reinforce else []
    return ", ".join([*said, *(f"{key} {value}" for key, value in its.settings.items())])


def _figures(study: Study, found: StudyResults) -> dict[str, Markup]:
    figures = {cost: _success(study, found, cost) for cost in COSTS if _shown(study, cost)}
    return figures | {
        quantity: _towards(study, quantity)
        for quantity in TOWARDS
        if any(c.by_position(quantity) for c in study.curves)
    }


def _shown(study: Study, cost: str) -> list[tuple[int, Curve]]:
    """The arms that a cost says something of, and their number: GRPO asks no teacher."""
    return [
        (number, one)
        for number, one in enumerate(study.curves)
        if math.isfinite(one.cost(cost)[-1]) and one.cost(cost)[-1] > 0
    ]


def _success(study: Study, found: StudyResults, cost: str) -> Markup:
    """Success against a cost: the mean over seeds with its interval; the teacher as a line, and as a star by what its own making cost."""
    shown = _shown(study, cost)
    told = "; ".join(
        f"{c.arm} {percent(study.success(c)[-1].value)} after {c.cost(cost)[-1]:,.0f}"
        for _, c in shown
    )
    own = getattr(found.teacher_cost, cost)
    alt = f"Success against {NAMES[cost]}: {told}; teacher {percent(found.teacher.value)}{f', itself made with {own:,.0f}' if own else ''}."

    def paint(axes: "Axes") -> None:
        axes.axhline(found.teacher.value, color=TEACHER, linewidth=1.5)
        axes.axhline(SHARE * found.teacher.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if own:
            axes.plot(
                own, found.teacher.value, marker="*", markersize=13, color=TEACHER, linestyle="none"
            )
        for number, curve in reversed(shown):  # the first on top: another may begin as it does
            spent, means, look = curve.cost(cost), study.success(curve), _look(number)
            axes.fill_between(
                spent,
                [m.low for m in means],
                [m.high for m in means],
                color=look["color"],
                alpha=0.13,
                linewidth=0,
            )
            axes.plot(spent, [m.value for m in means], linewidth=2, markersize=5, **look)
        axes.set(xlabel=NAMES[cost], ylabel="success", ylim=(-0.03, 1.03), xlim=(0, None))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.xaxis.set_major_formatter(lambda value, _: _thousands(value))
        axes.locator_params(axis="x", nbins=6, integer=cost == "iterations")

    return draw(f"by-{cost}", alt, (450, 300), paint)


def _look(number: int) -> dict[str, Any]:
    """The colour and the marker of an arm, the same in every drawing; dashed and hollow where the colours begin anew."""
    again = {"linestyle": (0, (3, 1.5)), "markerfacecolor": PAPER} if number >= len(SERIES) else {}
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        **again,
    }


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _towards(study: Study, quantity: str) -> Markup:
    """A diagnostic of every iteration, the mean over seeds."""
    shown = [(number, one, one.by_position(quantity)) for number, one in enumerate(study.curves)]
    told = "; ".join(
        f"{one.arm} {list(values.values())[-1]:.2f}" for _, one, values in shown if values
    )
    alt = f"The {TOWARDS[quantity]}, of every iteration; at the last one: {told}."

    def paint(axes: "Axes") -> None:
        if quantity == "student_entropy_after" and (teacher := _teacher_entropy(study.curves)):
            axes.plot(list(teacher), list(teacher.values()), color=TEACHER, linewidth=1.5)
        for number, _, values in shown:
            axes.plot(
                list(values), list(values.values()), linewidth=2, markersize=5, **_look(number)
            )
        axes.set(xlabel="iteration", ylabel=TOWARDS[quantity], xlim=(0.5, None))
        axes.set_ylim(bottom=0 if quantity.startswith("reverse_kl") else None)
        axes.locator_params(axis="x", nbins=8, integer=True)

    return draw(quantity.replace("_", "-"), alt, (450, 300), paint)


def _forgetting(study: Study, unseen: Study) -> Markup:
    """A point for each checkpoint of each arm, the means over seeds: success on the tasks that it is trained on, and on those that it isn't."""
    start, teacher = (
        (float(one.mean()), float(other.mean()))
        for one, other in ((study.start, unseen.start), (study.teacher, unseen.teacher))
    )
    paths = {
        one.arm: _path(study, one, unseen, other)
        for one in study.curves
        if (other := _of(unseen, one.arm))
    }
    told = "; ".join(
        f"{arm} {percent(path[-1][0])} and {percent(path[-1][1])}" for arm, path in paths.items()
    )
    alt = f"Success on seen tasks and on unseen ones: start {percent(start[0])} and {percent(start[1])}; {told}."

    def paint(axes: "Axes") -> None:
        axes.plot(*teacher, marker="*", markersize=13, color=TEACHER, linestyle="none")
        for number, curve in enumerate(study.curves):
            if path := paths.get(curve.arm):
                axes.plot(*zip(*path, strict=True), linewidth=1.5, markersize=6, **_look(number))
        axes.plot(*start, marker="o", markersize=10, color=INK, fillstyle="none", linestyle="none")
        axes.set(
            xlabel="success on the tasks that are trained",
            ylabel="success on unseen tasks",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return draw("forgetting", alt, (920, 440), paint)


def _path(study: Study, curve: Curve, unseen: Study, other: Curve) -> list[tuple[float, float]]:
    return [
        (one.value, two.value)
        for one, two in zip(study.success(curve), unseen.success(other), strict=True)
    ]


def _teacher_entropy(curves: Sequence[Curve]) -> Mapping[int, float]:
    """On the states of the first arm that has labels."""
    return next(
        (values for curve in curves if (values := curve.by_position("teacher_entropy_after"))), {}
    )
