"""Drawings of a run's success rates: against iterations, and by control step."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vla_opd.analysis.evaluation import Score
from vla_opd.analysis.finished_run import Evaluation, Run
from vla_opd.pages.drawing import DASHED, MUTED, PAPER, STUDENT, TEACHER, WHOLE, draw, show_percent
from vla_opd.pages.html import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def success_by_iteration(run: Run) -> Markup:
    """Draw success against the number of iterations.

    Evaluations have their intervals, the teacher's is a band. A thin line is the success of the
    rollouts of each iteration of distillation.
    """
    names = run.params.report
    teacher = run.results.teacher
    final = run.params.evaluations[names.final]
    chain = run.params.chain(final)
    placed = _placed_evaluations(run)
    on_chain: list[Evaluation] = []
    branches: list[Evaluation] = []
    for evaluation in placed:
        group = on_chain if evaluation.checkpoint in chain else branches
        group.append(evaluation)

    def paint(axes: "Axes") -> None:
        _draw_teacher(axes, teacher)
        _draw_rollouts(axes, run, chain)
        if on_chain:
            _draw_evaluations(axes, on_chain, "student, greedy", "-", STUDENT)
        if branches:
            _draw_evaluations(axes, branches, "other branches, greedy", "none", PAPER)
        axes.set(
            xlabel="iterations",
            ylabel="success rate",
            ylim=WHOLE,
        )
        show_percent(axes.yaxis)
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4)

    phrases = [_describe(evaluation) for evaluation in placed]
    phrases.append(f"teacher {percent(teacher.success)}")
    values = "; ".join(phrases)
    return draw("success", f"Success rate by iteration: {values}.", (920, 340), paint)


def _placed_evaluations(run: Run) -> list[Evaluation]:
    """Return the evaluations of checkpoints that have a number of iterations, but the teacher's."""
    placed: list[Evaluation] = []
    teacher = run.params.report.teacher
    for name, evaluation in run.evaluations.items():
        if name != teacher and evaluation.position is not None:
            placed.append(evaluation)
    return placed


def _describe(evaluation: Evaluation) -> str:
    success = percent(evaluation.facts.overall.success)
    return f"{evaluation.name} after {evaluation.position} iterations {success}"


def _draw_teacher(axes: "Axes", score: Score) -> None:
    axes.axhspan(
        score.low,
        score.high,
        color=TEACHER,
        alpha=0.14,
        linewidth=0,
    )
    axes.axhline(
        score.success,
        color=TEACHER,
        linewidth=1.5,
        label="teacher",
    )


def _draw_rollouts(axes: "Axes", run: Run, chain: Collection[str]) -> None:
    depths: list[int] = []
    rates: list[float] = []
    for result in run.results.iterations:
        if result.name in chain:
            depths.append(result.depth)
            rates.append(result.success)
    axes.plot(
        depths,
        rates,
        ".-",
        color=MUTED,
        linewidth=1,
        label=f"{run.params.sample.visited_by}'s rollouts, sampled",
    )


def _draw_evaluations(
    axes: "Axes", evaluations: Sequence[Evaluation], label: str, line: str, fill: str
) -> None:
    rates: list[float] = []
    below: list[float] = []
    above: list[float] = []
    for evaluation in evaluations:
        score = evaluation.facts.overall
        rates.append(score.success)
        below.append(score.success - score.low)
        above.append(score.high - score.success)
    axes.errorbar(
        [evaluation.position or 0 for evaluation in evaluations],
        rates,
        yerr=[below, above],
        color=STUDENT,
        linestyle=line,
        linewidth=2,
        elinewidth=1.2,
        capsize=4,
        marker="o",
        markerfacecolor=fill,
        label=label,
    )


def success_by_horizon(run: Run) -> Markup:
    """Draw the fraction of episodes that had succeeded by each control step.

    That is the success rate if episodes ended there.
    """
    names = run.params.report
    curves = {
        "before": (names.start, MUTED, "solid"),
        "after": (names.final, STUDENT, "solid"),
        "teacher": (names.teacher, TEACHER, DASHED),
    }

    def paint(axes: "Axes") -> None:
        for label, (name, color, line) in curves.items():
            style = {"label": label, "color": color, "linestyle": line}
            _draw_successes(axes, run.evaluations[name], style)
        axes.set(
            xlabel="control step",
            ylabel="success rate so far",
            ylim=WHOLE,
            xlim=(0, None),
        )
        show_percent(axes.yaxis)
        axes.legend(loc="upper left")

    alt = (
        "Fraction of episodes that had succeeded by each control step, for the student before and "
        "after training and for the teacher. The table below has the numbers."
    )
    return draw("horizon", alt, (920, 300), paint)


def _draw_successes(axes: "Axes", evaluation: Evaluation, style: Mapping[str, Any]) -> None:
    steps = sorted(record.steps for record in evaluation.records if record.success)
    fractions = [count / len(evaluation.records) for count in range(len(steps) + 1)]
    axes.step(
        [0, *steps, evaluation.facts.horizon],
        [*fractions, fractions[-1]],
        where="post",
        linewidth=2,
        **style,
    )
