"""Drawings of a run's divergence from its teacher: by iteration, optimizer step, part of a chunk.

All quantities are in nats per token.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vla_opd.analysis.finished_run import Iteration, IterationResult, Run, StepMetrics
from vla_opd.data.divergence import Divergence, DivergenceProfile
from vla_opd.pages.drawing import GRID, PAPER, SMALL, STUDENT, TEACHER, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"position": "position in the chunk", "dimension": "action dimension"}
DIVERGENCES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL"}
UNIT = "nats per token"
KL_LABEL = f"reverse KL, {UNIT}"
ENTROPY_LABEL = f"entropy, {UNIT}"
NAMES = 8  # of iterations that fit below a drawing
ARROW = {
    "arrowstyle": "-|>",
    "color": STUDENT,
    "linewidth": 1.5,
    "shrinkA": 4,
    "shrinkB": 4,
}


def divergence_figures(run: Run) -> dict[str, Markup]:
    """Return the drawings by name: those that the run has numbers for."""
    figures: dict[str, Markup] = {}
    if run.iterations:
        figures["kl"] = kl_by_iteration(run)
        figures["entropy"] = entropy_by_iteration(run)
        last = run.iterations[-1]
        for axis in AXES:
            figures[f"entropy-{axis}"] = entropy_profile(last, axis)
            for divergence in DIVERGENCES:
                if getattr(last.after.by_position, divergence):
                    figures[f"{divergence}-{axis}"] = kl_profile(run, axis, divergence)
    if iterations_with_steps(run):
        figures["kl-steps"] = kl_by_step(run)
        figures["entropy-steps"] = entropy_by_step(run)
    return figures


# By iteration


def kl_by_iteration(run: Run) -> Markup:
    """Draw reverse KL on each iteration's states: an arrow from before its update to after it."""
    results = run.results.iterations
    before = [result.before.reverse_kl for result in results]
    after = [result.after.reverse_kl for result in results]

    def paint(axes: "Axes") -> None:
        for number in range(len(results)):
            tail = (number, before[number])
            head = (number, after[number])
            axes.annotate("", head, tail, arrowprops=ARROW)
        _draw_line(axes, before, "before the update", linestyle="none", hollow=True)
        _draw_line(axes, after, "after the update", linestyle="none")
        _name_iterations(axes, results)
        axes.set(ylabel=KL_LABEL, ylim=(0, None))
        axes.legend(loc="upper right")

    changes: list[str] = []
    for result in results:
        change = _change(result, "reverse_kl")
        changes.append(f"{result.name} {change}")
    values = "; ".join(changes)
    alt = f"Reverse KL in {UNIT}, before and after each iteration's update: {values}."
    return draw("kl", alt, SMALL, paint)


def entropy_by_iteration(run: Run) -> Markup:
    """Draw both entropies on each iteration's states, the student's before and after its update."""
    results = run.results.iterations
    before = [result.before.student_entropy for result in results]
    after = [result.after.student_entropy for result in results]
    teacher = [result.after.teacher_entropy for result in results]

    def paint(axes: "Axes") -> None:
        _draw_line(axes, before, "student, before", hollow=True)
        _draw_line(axes, after, "student, after")
        _draw_line(axes, teacher, "teacher", color=TEACHER, marker="s")
        _name_iterations(axes, results)
        axes.set(ylabel=ENTROPY_LABEL)
        axes.legend(loc="best")

    phrases: list[str] = []
    for result in results:
        change = _change(result, "student_entropy")
        entropy = result.after.teacher_entropy
        phrases.append(f"{result.name} student {change}, teacher {entropy:.3f}")
    values = "; ".join(phrases)
    alt = f"Entropy in {UNIT} on each iteration's states: {values}."
    return draw("entropy", alt, SMALL, paint)


def _change(result: IterationResult, quantity: str) -> str:
    before = getattr(result.before, quantity)
    after = getattr(result.after, quantity)
    return f"from {before:.3f} to {after:.3f}"


def _name_iterations(axes: "Axes", results: Sequence[IterationResult]) -> None:
    count = len(results)
    interval = math.ceil(count / NAMES)
    names = [result.name for result in results]
    ticks = range(0, count, interval)
    axes.set_xticks(ticks, names[::interval])
    axes.set_xlim(-0.5, count - 0.5)


# By part of a chunk


def kl_profile(run: Run, axis: str, divergence: str) -> Markup:
    """Draw a KL by position in the chunk or by action dimension.

    On the first iteration's states before its update, and on the last one's after its update.
    """
    first = run.iterations[0]
    last = run.iterations[-1]
    before_profile = _profile(first.before, axis)
    after_profile = _profile(last.after, axis)
    before = getattr(before_profile, divergence)
    after = getattr(after_profile, divergence)
    title = DIVERGENCES[divergence]
    axis_label = AXES[axis]

    def paint(axes: "Axes") -> None:
        _draw_profile(axes, before, f"before {first.result.name}", hollow=True)
        _draw_profile(axes, after, f"after {last.result.name}")
        axes.set(
            xlabel=axis_label,
            ylabel=f"{title}, {UNIT}",
            ylim=(0, None),
        )
        axes.legend(loc="best")

    values_before = _list(before)
    values_after = _list(after)
    alt = f"The {title} by {axis_label}, in {UNIT}: before {values_before}; after {values_after}."
    name = divergence.replace("_", "-")
    return draw(f"{name}-{axis}", alt, SMALL, paint)


def entropy_profile(iteration: Iteration, axis: str) -> Markup:
    """Draw both entropies by position or dimension, after an iteration's update."""
    profile = _profile(iteration.after, axis)
    student = profile.student_entropy
    teacher = profile.teacher_entropy
    axis_label = AXES[axis]

    def paint(axes: "Axes") -> None:
        _draw_profile(axes, student, "student")
        _draw_profile(axes, teacher, "teacher", color=TEACHER, marker="s")
        axes.set(xlabel=axis_label, ylabel=ENTROPY_LABEL)
        axes.legend(loc="best")

    student_values = _list(student)
    teacher_values = _list(teacher)
    alt = (
        f"Entropy by {axis_label} after the last update, in {UNIT}: "
        f"student {student_values}; "
        f"teacher {teacher_values}."
    )
    return draw(f"entropy-{axis}", alt, SMALL, paint)


def _profile(measured: Divergence, axis: str) -> DivergenceProfile:
    return measured.by_position if axis == "position" else measured.by_dimension


def _draw_profile(axes: "Axes", values: Sequence[float | None], label: str, **options: Any) -> None:
    heights = [math.nan if value is None else value for value in values]  # nan leaves a gap
    _draw_line(axes, heights, label, first=1, **options)
    axes.locator_params(axis="x", integer=True)


def _draw_line(
    axes: "Axes",
    heights: Sequence[float],
    label: str,
    *,
    first: int = 0,
    color: str = STUDENT,
    hollow: bool = False,
    **options: Any,
) -> None:
    """Draw values of consecutive items.

    first: the number of the first one. options: other options of a line in matplotlib.
    """
    style: dict[str, Any] = {"linestyle": "-", "marker": "o", **options}
    axes.plot(
        range(first, first + len(heights)),
        heights,
        color=color,
        linewidth=1 if hollow else 2,
        markerfacecolor=PAPER if hollow else color,
        label=label,
        **style,
    )


def _list(values: Sequence[float | None]) -> str:
    texts = ["none" if value is None else f"{value:.3f}" for value in values]
    return ", ".join(texts)


# By optimizer step


def kl_by_step(run: Run) -> Markup:
    """Draw the reverse KL of every optimizer step's batch."""

    def paint(axes: "Axes") -> None:
        for iteration in iterations_with_steps(run):
            numbers = step_numbers(run, iteration)
            values = [step.kl for step in iteration.steps]
            axes.plot(numbers, values, color=STUDENT, linewidth=1.2)
        axes.set(
            xlabel="optimizer step",
            ylabel=KL_LABEL,
            ylim=(0, None),
        )
        _mark_iterations(axes, run)

    change = _change_over_steps(run, lambda step: step.kl)
    alt = f"Reverse KL of every optimizer step's batch in {UNIT}: {change}."
    return draw("kl-steps", alt, SMALL, paint)


def entropy_by_step(run: Run) -> Markup:
    """Draw the student's entropy on every batch, and the teacher's on the iteration's states."""

    def paint(axes: "Axes") -> None:
        for iteration in iterations_with_steps(run):
            numbers = step_numbers(run, iteration)
            values = [step.student_entropy for step in iteration.steps]
            axes.plot(numbers, values, color=STUDENT, linewidth=1.2)
            teacher = iteration.result.before.teacher_entropy
            ends = [numbers.start, numbers.stop]
            axes.plot(ends, [teacher, teacher], color=TEACHER, linewidth=1.5)
        axes.set(xlabel="optimizer step", ylabel=ENTROPY_LABEL)
        _mark_iterations(axes, run)
        student_and_teacher = axes.get_lines()[:2]
        axes.legend(student_and_teacher, ("student", "teacher"), loc="best")

    change = _change_over_steps(run, lambda step: step.student_entropy)
    alt = f"The student's entropy on every optimizer step's batch in {UNIT}: {change}."
    return draw("entropy-steps", alt, SMALL, paint)


def iterations_with_steps(run: Run) -> list[Iteration]:
    """Return the iterations that made an optimizer step."""
    return [iteration for iteration in run.iterations if iteration.steps]


def step_numbers(run: Run, iteration: Iteration) -> range:
    """Return the numbers of an iteration's optimizer steps, counted over its chain."""
    _, *ancestors = run.params.chain(iteration.result.name)
    first = 0
    for earlier in run.iterations:
        if earlier.result.name in ancestors:
            first += len(earlier.steps)
    stop = first + len(iteration.steps)
    return range(first, stop)


def _mark_iterations(axes: "Axes", run: Run) -> None:
    axes.grid(visible=False, axis="x")
    for iteration in iterations_with_steps(run):
        start = step_numbers(run, iteration).start
        axes.axvline(start, color=GRID, linewidth=1.2, zorder=0)


def _change_over_steps(run: Run, quantity: Callable[[StepMetrics], float]) -> str:
    iterations = iterations_with_steps(run)
    first_step = iterations[0].steps[0]
    last_step = iterations[-1].steps[-1]
    first = quantity(first_step)
    last = quantity(last_step)
    return f"{first:.3f} at the first step, {last:.3f} at the last"
