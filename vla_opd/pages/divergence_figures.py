"""Drawings of a run's divergence from its teacher: by iteration, optimizer step, part of a chunk.

All quantities are in nats per token.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vla_opd.analysis.finished_run import Iteration, IterationResult, Run, StepMetrics
from vla_opd.pages.drawing import GRID, PAPER, SMALL, STUDENT, TEACHER, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"position": "position in the chunk", "dimension": "action dimension"}
DIVERGENCES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL"}
KL_LABEL = "reverse KL, nats per token"
ENTROPY_LABEL = "entropy, nats per token"
NAMES = 8  # of iterations that fit below a drawing


def divergence_figures(run: Run) -> dict[str, Markup]:
    """Return the drawings by name: those that the run has numbers for."""
    figures: dict[str, Markup] = {}
    if run.iterations:
        figures["kl"] = kl_by_iteration(run)
        figures["entropy"] = entropy_by_iteration(run)
        figures |= _profile_figures(run)
    if iterations_with_steps(run):
        figures["kl-steps"] = kl_by_step(run)
        figures["entropy-steps"] = entropy_by_step(run)
    return figures


# By iteration


def kl_by_iteration(run: Run) -> Markup:
    """Draw reverse KL on each iteration's states: an arrow from before its update to after it."""
    results = [iteration.result for iteration in run.iterations]
    before = [result.before.reverse_kl for result in results]
    after = [result.after.reverse_kl for result in results]
    arrow = {"arrowstyle": "-|>", "color": STUDENT, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4}

    def paint(axes: "Axes") -> None:
        for number in range(len(results)):
            tail = (number, before[number])
            head = (number, after[number])
            axes.annotate("", head, tail, arrowprops=arrow)
        axes.plot(before, "o", color=STUDENT, markerfacecolor=PAPER, label="before the update")
        axes.plot(after, "o", color=STUDENT, label="after the update")
        _name_iterations(axes, results)
        axes.set(ylabel=KL_LABEL, ylim=(0, None))
        axes.legend(loc="upper right")

    changes = [f"{result.name} {_change(result, 'reverse_kl')}" for result in results]
    alt = (
        "Reverse KL to the teacher in nats per token, before and after each iteration's update: "
        f"{'; '.join(changes)}."
    )
    return draw("kl", alt, SMALL, paint)


def entropy_by_iteration(run: Run) -> Markup:
    """Draw both entropies on each iteration's states, the student's before and after its update."""
    results = [iteration.result for iteration in run.iterations]
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
    alt = f"Entropy in nats per token on each iteration's states: {'; '.join(phrases)}."
    return draw("entropy", alt, SMALL, paint)


def _change(result: IterationResult, quantity: str) -> str:
    before = getattr(result.before, quantity)
    after = getattr(result.after, quantity)
    return f"from {before:.3f} to {after:.3f}"


def _name_iterations(axes: "Axes", results: Sequence[IterationResult]) -> None:
    interval = math.ceil(len(results) / NAMES)
    names = [result.name for result in results]
    axes.set_xticks(range(0, len(names), interval), names[::interval])
    axes.set_xlim(-0.5, len(names) - 0.5)


# By part of a chunk


def _profile_figures(run: Run) -> dict[str, Markup]:
    figures: dict[str, Markup] = {}
    last = run.iterations[-1].after
    for axis in AXES:
        for divergence in DIVERGENCES:
            if getattr(last.by_position, divergence):
                figures[f"{divergence}-{axis}"] = kl_profile(run, axis, divergence)
        figures[f"entropy-{axis}"] = entropy_profile(run, axis)
    return figures


def kl_profile(run: Run, axis: str, divergence: str) -> Markup:
    """Draw a KL by position in the chunk or by action dimension.

    On the first iteration's states before its update, and on the last one's after its update.
    """
    first = run.iterations[0]
    last = run.iterations[-1]
    before = getattr(getattr(first.before, f"by_{axis}"), divergence)
    after = getattr(getattr(last.after, f"by_{axis}"), divergence)
    title = DIVERGENCES[divergence]

    def paint(axes: "Axes") -> None:
        _draw_profile(axes, before, f"before {first.result.name}", hollow=True)
        _draw_profile(axes, after, f"after {last.result.name}")
        axes.set(xlabel=AXES[axis], ylabel=f"{title}, nats per token", ylim=(0, None))
        axes.legend(loc="best")

    name = f"{divergence.replace('_', '-')}-{axis}"
    alt = (
        f"{title[0].upper()}{title[1:]} by {AXES[axis]}, in nats per token: "
        f"before {_list(before)}; after {_list(after)}."
    )
    return draw(name, alt, SMALL, paint)


def entropy_profile(run: Run, axis: str) -> Markup:
    """Draw both entropies by position or dimension, on the last iteration's states."""
    profile = getattr(run.iterations[-1].after, f"by_{axis}")
    student = profile.student_entropy
    teacher = profile.teacher_entropy

    def paint(axes: "Axes") -> None:
        _draw_profile(axes, student, "student")
        _draw_profile(axes, teacher, "teacher", color=TEACHER, marker="s")
        axes.set(xlabel=AXES[axis], ylabel=ENTROPY_LABEL)
        axes.legend(loc="best")

    alt = (
        f"Entropy by {AXES[axis]} after the last iteration, in nats per token: "
        f"student {_list(student)}; teacher {_list(teacher)}."
    )
    return draw(f"entropy-{axis}", alt, SMALL, paint)


def _draw_profile(axes: "Axes", values: Sequence[float | None], label: str, **options: Any) -> None:
    heights = [math.nan if value is None else value for value in values]
    _draw_line(axes, heights, label, first=1, **options)
    axes.locator_params(axis="x", integer=True)


def _draw_line(
    axes: "Axes",
    heights: Sequence[float],
    label: str,
    *,
    first: int = 0,
    color: str = STUDENT,
    marker: str = "o",
    hollow: bool = False,
) -> None:
    """Draw values of consecutive items. first: the number of the first one."""
    axes.plot(
        range(first, first + len(heights)),
        heights,
        linestyle="-",
        marker=marker,
        color=color,
        linewidth=1 if hollow else 2,
        markerfacecolor=PAPER if hollow else color,
        label=label,
    )


def _list(values: Sequence[float | None]) -> str:
    return ", ".join("none" if value is None else f"{value:.3f}" for value in values)


# By optimizer step


def kl_by_step(run: Run) -> Markup:
    """Draw the reverse KL of every optimizer step's batch."""

    def paint(axes: "Axes") -> None:
        for iteration in iterations_with_steps(run):
            values = [step.kl for step in iteration.steps]
            axes.plot(step_numbers(run, iteration), values, color=STUDENT, linewidth=1.2)
        axes.set(xlabel="optimizer step", ylabel=KL_LABEL, ylim=(0, None))
        _mark_iterations(axes, run)

    ends = _ends(run, lambda step: step.kl)
    alt = f"Reverse KL of every optimizer step's batch in nats per token: {ends}."
    return draw("kl-steps", alt, SMALL, paint)


def entropy_by_step(run: Run) -> Markup:
    """Draw the student's entropy on every batch, and the teacher's on the iteration's states."""

    def paint(axes: "Axes") -> None:
        for iteration in iterations_with_steps(run):
            numbers = step_numbers(run, iteration)
            values = [step.student_entropy for step in iteration.steps]
            axes.plot(numbers, values, color=STUDENT, linewidth=1.2)
            teacher = iteration.result.before.teacher_entropy
            axes.hlines(teacher, numbers.start, numbers.stop, color=TEACHER, linewidth=1.5)
        axes.set(xlabel="optimizer step", ylabel=ENTROPY_LABEL)
        _mark_iterations(axes, run)
        axes.legend([*axes.get_lines()[:1], *axes.collections[:1]], ("student", "teacher"))

    ends = _ends(run, lambda step: step.student_entropy)
    alt = f"The student's entropy on every optimizer step's batch in nats per token: {ends}."
    return draw("entropy-steps", alt, SMALL, paint)


def iterations_with_steps(run: Run) -> list[Iteration]:
    """Return the iterations that made an optimizer step."""
    return [iteration for iteration in run.iterations if iteration.steps]


def step_numbers(run: Run, iteration: Iteration) -> range:
    """Return the numbers of an iteration's optimizer steps, counted over its chain."""
    chain = run.params.chain(iteration.result.name)[1:]
    first = 0
    for earlier in run.iterations:
        if earlier.result.name in chain:
            first += len(earlier.steps)
    return range(first, first + len(iteration.steps))


def _mark_iterations(axes: "Axes", run: Run) -> None:
    axes.grid(visible=False, axis="x")
    for iteration in iterations_with_steps(run):
        start = step_numbers(run, iteration).start
        axes.axvline(start, color=GRID, linewidth=1.2, zorder=0)


def _ends(run: Run, value: Callable[[StepMetrics], float]) -> str:
    steps = [step for iteration in iterations_with_steps(run) for step in iteration.steps]
    first = value(steps[0])
    last = value(steps[-1])
    return f"{first:.3f} at the first step, {last:.3f} at the last"
