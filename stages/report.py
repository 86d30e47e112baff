"""report: evaluations, checkpoints -> one HTML page and `results.json`. No network, no scripts, no clock: the same inputs give the same bytes."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from ruamel.yaml import YAML

from vla_opd.analysis import html
from vla_opd.analysis.evaluation import Score
from vla_opd.analysis.finished_run import (
    Evaluation,
    Iteration,
    IterationResult,
    Run,
    StepMetrics,
    read_run,
)
from vla_opd.analysis.html import DRAWN_WITH, GRID, MUTED, PAPER, STUDENT, TEACHER, draw, percent
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "report.html.jinja"
AXES = {"position": "action of the chunk", "dimension": "action dimension"}
HORIZONS = (
    220,
    280,
    300,
    512,
    520,
)  # control steps: OpenVLA-OFT's of Spatial, Object, Goal and Long; SimpleVLA-RL's 512 of every suite


def run(*, run: str, params: Params, root: Path, out: Path, host: Host) -> Manifest:
    """Write `index.html` and `results.json` of the run in `root`.

    ValueError names an artifact that is missing or does not belong to the others, or an evaluation
    that `report` names and that does not exist.
    """
    _require_names(params)
    finished = read_run(params, root)
    results = finished.results
    recorded = {"parameters": params.model_dump(mode="json", exclude={"studies"})}
    with (
        draft(out, "report", finished.parents, recorded) as work,
        track(host, run, "report", out.name, recorded) as log,
    ):
        log({role: getattr(results, role).success for role in ("start", "final", "teacher")}, 0)
        with work.part("results.json") as path:
            path.write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(render(finished), encoding="utf-8")
        work.record_made_with({name: version(name) for name in DRAWN_WITH})
        return work.publish(results.model_dump(mode="json"))


def _require_names(params: Params) -> None:
    names = sorted(params.evaluations)
    for field, name in params.report.model_dump().items():
        if name not in names:
            raise ValueError(f"report.{field} is {name!r}; expected one of {names}")


# The page.


def render(run: Run) -> str:
    """The page, whole."""
    named, seen = run.params.report, run.evaluations
    return html.render(
        "stages",
        TEMPLATE,
        run=run,
        results=run.results,
        headline=[
            ("Before", seen[named.start]),
            ("After", seen[named.final]),
            ("Teacher", seen[named.teacher]),
        ],
        share=lambda score: _share(score, run.results.teacher),
        confidence=" / ".join(
            f"{value:.0%}" for value in sorted({one.confidence for one in seen.values()})
        ),
        tasks=_tasks(run),
        instructions={
            record.task: record.instruction
            for one in seen.values()
            for record in (*one.records, *one.unseen)
        },
        horizons=_horizons(list(seen.values())),
        figures=_figures(run),
        axes=AXES,
        parameters=_yaml(run.params.model_dump(mode="json", exclude={"studies"})),
        settings={name: _yaml(manifest.params) for name, manifest in run.checkpoints.items()},
    )


def _tasks(run: Run) -> list[str]:
    """The run's tasks, then whatever else was evaluated."""
    named = [
        *run.params.environment.tasks,
        *(task for one in run.evaluations.values() for task in one.facts.tasks),
    ]
    return [
        task
        for task in dict.fromkeys(named)
        if any(task in one.facts.tasks for one in run.evaluations.values())
    ]


def _horizons(evaluations: Sequence[Evaluation]) -> list[int]:
    own = {one.facts.horizon for one in evaluations}
    return sorted(own | {horizon for horizon in HORIZONS if horizon <= max(own)})


def _share(score: Score, teacher: Score) -> str:
    return percent(score.success / teacher.success) if teacher.success else "n/a"


def _yaml(tree: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    YAML().dump(dict(tree), stream)
    return stream.getvalue()


# The drawings.


def _figures(run: Run) -> dict[str, Markup]:
    """Every drawing of the page, by name."""
    figures = {"success": _success(run), "horizon": _by_horizon(run)}
    if run.iterations:
        figures |= {"kl": _kl(run), "entropy": _entropy(run)}
        for axis in ("position", "dimension"):
            said = [
                name
                for name in ("reverse_kl", "forward_kl")
                if getattr(run.iterations[-1].after.by_position, name)
            ]
            figures |= {f"{name}-{axis}": _kl_along(run, axis, name) for name in said} | {
                f"entropy-{axis}": _entropy_along(run, axis)
            }
    if _stepped(run):
        figures |= {"kl-steps": _kl_steps(run), "entropy-steps": _entropy_steps(run)}
    return figures


def _success(run: Run) -> Markup:
    """Success against iterations: evaluations with their intervals, the teacher as a band, each iteration's own rollouts as a thin line."""
    teacher, placed = run.evaluations[run.params.report.teacher], _placed(run)
    chain = run.params.chain(run.params.evaluations[run.params.report.final])
    told = "; ".join(
        f"{one.name} after {one.position} iterations {percent(one.facts.overall.success)}"
        for one in placed
    )
    alt = f"Success against iterations. {told}; teacher {percent(teacher.facts.overall.success)}."

    def paint(axes: "Axes") -> None:
        band = teacher.facts.overall
        axes.axhspan(band.low, band.high, color=TEACHER, alpha=0.14, linewidth=0)
        axes.axhline(band.success, color=TEACHER, linewidth=1.5, label="teacher")
        sampled = [one.result for one in run.iterations if one.result.name in chain]
        axes.plot(
            [r.depth for r in sampled],
            [r.success for r in sampled],
            ".-",
            color=MUTED,
            linewidth=1,
            label=f"{run.params.sample.visited_by}'s rollouts, sampled",
        )
        _points(
            axes, [one for one in placed if one.checkpoint in chain], "student, greedy", line="-"
        )
        _points(
            axes,
            [one for one in placed if one.checkpoint not in chain],
            "other branches, greedy",
            line="none",
        )
        axes.set(xlabel="iterations", ylabel="success", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4)

    return draw("success", alt, (920, 340), paint)


def _placed(run: Run) -> list[Evaluation]:
    return [
        one
        for one in run.evaluations.values()
        if one.position is not None and one.name != run.params.report.teacher
    ]


def _points(axes: "Axes", evaluations: Sequence[Evaluation], label: str, line: str) -> None:
    if not evaluations:
        return
    scores = [one.facts.overall for one in evaluations]
    errors = [[s.success - s.low for s in scores], [s.high - s.success for s in scores]]
    fill = STUDENT if line == "-" else PAPER
    axes.errorbar(
        [one.position or 0 for one in evaluations],
        [s.success for s in scores],
        yerr=errors,
        color=STUDENT,
        linestyle=line,
        linewidth=2,
        elinewidth=1.2,
        capsize=4,
        marker="o",
        markerfacecolor=fill,
        label=label,
    )


def _by_horizon(run: Run) -> Markup:
    """Which fraction of the episodes had succeeded by a control step: read at a shorter horizon, the score at it."""
    named = run.params.report
    shown = {
        "before": (named.start, MUTED),
        "after": (named.final, STUDENT),
        "teacher": (named.teacher, TEACHER),
    }
    alt = "Fraction of episodes that had succeeded by each control step, before, after, and for the teacher: the numbers are in the table below."

    def paint(axes: "Axes") -> None:
        for label, (name, colour) in shown.items():
            one = run.evaluations[name]
            steps = sorted(record.steps for record in one.records if record.success)
            heights = [count / len(one.records) for count in range(len(steps) + 1)]
            axes.step(
                [0, *steps, one.facts.horizon],
                [*heights, heights[-1]],
                where="post",
                color=colour,
                linewidth=2,
                label=label,
            )
        axes.set(
            xlabel="control steps",
            ylabel="episodes that succeeded",
            ylim=(-0.03, 1.03),
            xlim=(0, None),
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(loc="upper left")

    return draw("horizon", alt, (920, 300), paint)


def _kl(run: Run) -> Markup:
    """Reverse KL on an iteration's states: an arrow from before its update to after it."""
    rows = [one.result for one in run.iterations]
    told = "; ".join(f"{row.name} {_change(row, 'reverse_kl')}" for row in rows)

    def paint(axes: "Axes") -> None:
        for x, row in enumerate(rows):
            arrow = {
                "arrowstyle": "-|>",
                "color": STUDENT,
                "linewidth": 1.5,
                "shrinkA": 4,
                "shrinkB": 4,
            }
            axes.annotate(
                "", (x, row.after.reverse_kl), (x, row.before.reverse_kl), arrowprops=arrow
            )
        axes.plot(
            [r.before.reverse_kl for r in rows],
            "o",
            color=STUDENT,
            markerfacecolor=PAPER,
            label="before the update",
        )
        axes.plot([r.after.reverse_kl for r in rows], "o", color=STUDENT, label="after")
        _name_iterations(axes, rows)
        axes.set(ylabel="reverse KL, nats a token", ylim=(0, None))
        axes.legend(loc="upper right")

    return draw(
        "kl",
        f"Reverse KL to the teacher in nats a token, before and after each iteration's update: {told}.",
        (450, 300),
        paint,
    )


def _entropy(run: Run) -> Markup:
    """Both entropies on each iteration's states, the student's before and after its update."""
    rows = [one.result for one in run.iterations]
    told = "; ".join(
        f"{row.name} student {_change(row, 'student_entropy')}, teacher {row.after.teacher_entropy:.3f}"
        for row in rows
    )

    def paint(axes: "Axes") -> None:
        axes.plot(
            [r.before.student_entropy for r in rows],
            "o-",
            color=STUDENT,
            markerfacecolor=PAPER,
            linewidth=1,
            label="student, before",
        )
        axes.plot(
            [r.after.student_entropy for r in rows],
            "o-",
            color=STUDENT,
            linewidth=2,
            label="student, after",
        )
        axes.plot(
            [r.after.teacher_entropy for r in rows],
            "s-",
            color=TEACHER,
            linewidth=1.5,
            label="teacher",
        )
        _name_iterations(axes, rows)
        axes.set(ylabel="entropy, nats a token")
        axes.legend(loc="best")

    return draw(
        "entropy", f"Entropy in nats a token on each iteration's states: {told}.", (450, 300), paint
    )


def _kl_along(run: Run, axis: str, which: str) -> Markup:
    """A KL by position or dimension: on the first iteration's states before its update, on the last one's after."""
    first, last = (
        getattr(getattr(one, f"by_{axis}"), which)
        for one in (run.iterations[0].before, run.iterations[-1].after)
    )
    name = which.replace("_kl", " KL")

    def paint(axes: "Axes") -> None:
        _profile(
            axes,
            first,
            color=STUDENT,
            markerfacecolor=PAPER,
            linewidth=1,
            label=f"before {run.iterations[0].result.name}",
        )
        _profile(
            axes, last, color=STUDENT, linewidth=2, label=f"after {run.iterations[-1].result.name}"
        )
        axes.set(xlabel=AXES[axis], ylabel=f"{name}, nats a token", ylim=(0, None))
        axes.legend(loc="best")

    told = f"{name[0].upper()}{name[1:]} by {AXES[axis]}: before {_listed(first)}; after {_listed(last)}."
    return draw(f"{which.replace('_', '-')}-{axis}", told, (450, 280), paint)


def _entropy_along(run: Run, axis: str) -> Markup:
    """Both entropies by position or dimension, on the last iteration's states after its update."""
    last = getattr(run.iterations[-1].after, f"by_{axis}")

    def paint(axes: "Axes") -> None:
        _profile(axes, last.student_entropy, color=STUDENT, linewidth=2, label="student")
        _profile(axes, last.teacher_entropy, color=TEACHER, linewidth=1.5, label="teacher")
        axes.set(xlabel=AXES[axis], ylabel="entropy, nats a token")
        axes.legend(loc="best")

    told = f"student {_listed(last.student_entropy)}; teacher {_listed(last.teacher_entropy)}"
    return draw(
        f"entropy-{axis}",
        f"Entropy by {AXES[axis]} after the last iteration: {told}.",
        (450, 280),
        paint,
    )


def _profile(axes: "Axes", values: Sequence[float | None], **style: Any) -> None:
    axes.plot(
        range(1, len(values) + 1),
        [math.nan if value is None else value for value in values],
        "o-",
        **style,
    )
    axes.locator_params(axis="x", integer=True)


def _listed(values: Sequence[float | None]) -> str:
    return ", ".join("none" if value is None else f"{value:.3f}" for value in values)


def _change(row: IterationResult, quantity: str) -> str:
    return f"from {getattr(row.before, quantity):.3f} to {getattr(row.after, quantity):.3f}"


def _name_iterations(axes: "Axes", rows: Sequence[IterationResult]) -> None:
    every = -(-len(rows) // 8)  # at most eight names fit
    axes.set_xticks(range(0, len(rows), every), [row.name for row in rows[::every]])
    axes.set_xlim(-0.5, len(rows) - 0.5)


def _kl_steps(run: Run) -> Markup:
    """Reverse KL of every optimiser step's batch."""

    def paint(axes: "Axes") -> None:
        for one in _stepped(run):
            axes.plot(
                _numbers(run, one), [step.kl for step in one.steps], color=STUDENT, linewidth=1.2
            )
        axes.set(xlabel="optimiser step", ylabel="reverse KL, nats a token", ylim=(0, None))
        _mark_iterations(axes, run)

    return draw(
        "kl-steps",
        f"Reverse KL of every optimiser step's batch in nats a token: {_ends(run, lambda step: step.kl)}.",
        (450, 280),
        paint,
    )


def _entropy_steps(run: Run) -> Markup:
    """The student's entropy on every optimiser step's batch, and the teacher's on the iteration's states."""

    def paint(axes: "Axes") -> None:
        for one in _stepped(run):
            numbers, teacher = _numbers(run, one), one.result.before.teacher_entropy
            axes.plot(
                numbers, [step.student_entropy for step in one.steps], color=STUDENT, linewidth=1.2
            )
            axes.plot(
                [numbers[0], numbers[-1] + 1], [teacher, teacher], color=TEACHER, linewidth=1.5
            )
        axes.set(xlabel="optimiser step", ylabel="entropy, nats a token")
        _mark_iterations(axes, run)
        axes.legend(axes.get_lines()[:2], ("student", "teacher"), loc="best")

    told = _ends(run, lambda step: step.student_entropy)
    return draw(
        "entropy-steps",
        f"The student's entropy on every optimiser step's batch in nats a token: {told}.",
        (450, 280),
        paint,
    )


def _numbers(run: Run, iteration: Iteration) -> range:
    """The numbers of an iteration's optimiser steps, counted over the iterations of its chain."""
    chain = run.params.chain(iteration.result.name)[1:]
    first = sum(len(one.steps) for one in run.iterations if one.result.name in chain)
    return range(first, first + len(iteration.steps))


def _mark_iterations(axes: "Axes", run: Run) -> None:
    axes.grid(visible=False, axis="x")
    for one in _stepped(run):
        axes.axvline(_numbers(run, one)[0], color=GRID, linewidth=1.2, zorder=0)


def _stepped(run: Run) -> list[Iteration]:
    """The iterations that made a step."""
    return [one for one in run.iterations if one.steps]


def _ends(run: Run, value: Callable[[StepMetrics], float]) -> str:
    steps = [step for one in run.iterations for step in one.steps]
    first, last = steps[0], steps[-1]
    return f"{value(first):.3f} at the first step, {value(last):.3f} at the last"
