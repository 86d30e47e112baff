"""report: evaluations, checkpoints -> one HTML page and `results.json`. No network, no scripts, no clock: the same inputs give the same bytes."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from vla_opd.artifacts import Manifest, draft, open_artifact, read_manifest
from vla_opd.evaluation import Record, Score, read_records, score
from vla_opd.host import Host
from vla_opd.params import Params
from vla_opd.tracking import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "report.html.jinja"
DRAWN_WITH = ("jinja2", "matplotlib")
AXES = {"position": "action of the chunk", "dimension": "action dimension"}
HORIZONS = (220, 280, 300, 512, 520)  # control steps: OpenVLA-OFT's of Spatial, Object, Goal and Long; SimpleVLA-RL's 512 of every suite

# Colours that the drawings name and the page's style sheet decides, so that one drawing serves light and dark: each becomes a CSS variable.
INK, MUTED, GRID, STUDENT, TEACHER, PAPER = (f"#00000{digit}" for digit in range(1, 7))
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", STUDENT: "student", TEACHER: "teacher", PAPER: "paper"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vla-opd",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Read(BaseModel):
    """What is read from an artifact, as far as the page needs it."""

    model_config = ConfigDict(frozen=True)


class Evaluated(Read):
    """The facts of an evaluation."""

    overall: Score
    tasks: dict[str, Score]
    horizon: int


class Profile(Read):
    """Means in nats a token for each action of a chunk, or for each action dimension; None where no token is valid."""

    reverse_kl: tuple[float | None, ...]
    student_entropy: tuple[float | None, ...]
    teacher_entropy: tuple[float | None, ...]


class Probe(Read):
    """Means over valid tokens; what they are says `vla_opd.diagnostics.Distance`."""

    reverse_kl: float
    forward_kl: float
    student_entropy: float
    teacher_entropy: float
    teacher_rank: float
    top_overlap: float


class Profiles(Read):
    """Where in a chunk, and in which action dimension, student and teacher differ."""

    by_position: Profile
    by_dimension: Profile


class Step(Read):
    """A line of `metrics.jsonl`. Where the objective is the reverse KL itself, the loss is it."""

    loss: float
    student_entropy: float
    reverse_kl: float | None = None

    @property
    def kl(self) -> float:
        return self.loss if self.reverse_kl is None else self.reverse_kl


class IterationResult(Read):
    """What an iteration did and cost. `success` is that of its rollouts: sampled, and before its update. depth: iterations before it, of either kind.

    failed_share: the share of valid tokens, and so of the labels' say, that lies in rollouts that failed.
    """

    name: str
    depth: int
    success: float
    episodes: int
    states: int
    env_steps: int
    teacher_queries: int
    failed_share: float
    before: Probe
    after: Probe


class Entropy(Read):
    """The mean over valid tokens, in nats a token, at the rollout's temperature."""

    student_entropy: float


class ReinforcementResult(Read):
    """What an iteration of GRPO did and cost. `success` is that of its rollouts; useful_groups: of its `groups`, those to learn from."""

    name: str
    success: float
    episodes: int
    env_steps: int
    groups: int
    useful_groups: int
    before: Entropy
    after: Entropy


class Results(Read):
    """`results.json`. Steps and queries are totals over all iterations, of either kind."""

    teacher: Score
    start: Score
    final: Score
    env_steps: int
    teacher_queries: int
    iterations: tuple[IterationResult, ...]
    reinforcements: tuple[ReinforcementResult, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, whose checkpoint has `position` iterations behind it; None if no iteration starts from it or made it."""

    name: str
    checkpoint: str
    position: int | None
    manifest: Manifest
    facts: Evaluated
    records: tuple[Record, ...]

    @property
    def confidence(self) -> float:
        return self.manifest.params["evaluate"]["confidence"]

    def scored_at(self, horizon: int) -> Score | None:
        """The score if episodes had ended after `horizon` control steps; None beyond the horizon that was run."""
        if horizon > self.facts.horizon:
            return None
        return score((r.success and r.steps <= horizon for r in self.records), self.confidence)


@dataclass(frozen=True)
class Iteration:
    """An iteration, its artifacts by their folder's name, a row of metrics for every optimiser step, and in what the student was off."""

    result: IterationResult
    made: Mapping[str, Manifest]
    steps: tuple[Step, ...]
    before: Profiles
    after: Profiles


@dataclass(frozen=True)
class Reinforcement:
    """An iteration of GRPO, its artifacts by their folder's name, and how many optimiser steps it made."""

    result: ReinforcementResult
    made: Mapping[str, Manifest]
    steps: int


@dataclass(frozen=True)
class Run:
    """All that the page shows. Evaluations in the order of their columns; iterations in the order of their depth, of GRPO too."""

    params: Params
    checkpoints: Mapping[str, Manifest]
    iterations: tuple[Iteration, ...]
    reinforcements: tuple[Reinforcement, ...]
    evaluations: Mapping[str, Evaluation]

    @property
    def updates(self) -> tuple[Iteration | Reinforcement, ...]:
        """Iterations of either kind."""
        return self.iterations + self.reinforcements

    @property
    def parents(self) -> dict[str, str]:
        """The digest of everything that was read."""
        read = {f"checkpoints/{name}": manifest.digest for name, manifest in self.checkpoints.items()}
        read |= {f"{kind}/{one.result.name}": manifest.digest for one in self.updates for kind, manifest in one.made.items()}
        return read | {f"evaluations/{name}": one.manifest.digest for name, one in self.evaluations.items()}

    @property
    def versions(self) -> dict[str, str]:
        """What the artifacts were made with; several values where they differ."""
        manifests = [*self.checkpoints.values(), *(one.manifest for one in self.evaluations.values())]
        manifests += [manifest for one in self.updates for manifest in one.made.values()]
        names = sorted({name for manifest in manifests for name in manifest.made_with})
        return {name: ", ".join(sorted({m.made_with[name] for m in manifests if name in m.made_with})) for name in names}

    @property
    def optimizer_steps(self) -> int:
        return sum(len(one.steps) for one in self.iterations) + sum(one.steps for one in self.reinforcements)

    @property
    def results(self) -> Results:
        named, rows = self.params.report, [one.result for one in self.iterations]
        return Results(
            teacher=self.evaluations[named.teacher].facts.overall,
            start=self.evaluations[named.start].facts.overall,
            final=self.evaluations[named.final].facts.overall,
            env_steps=sum(one.result.env_steps for one in self.updates),
            teacher_queries=sum(row.teacher_queries for row in rows),
            iterations=tuple(rows),
            reinforcements=tuple(one.result for one in self.reinforcements),
        )


def run(params: Params, root: Path, out: Path, host: Host) -> Manifest:
    """Write `index.html` and `results.json` of the run in `root`.

    ValueError names an artifact that is missing or does not belong to the others, or an evaluation that `report` names and that does not exist.
    """
    _require_names(params)
    found = read_run(params, root)
    results = found.results
    settings = {"parameters": params.model_dump(mode="json")}
    with draft(out, "report", found.parents, settings) as work, track(host, params.run.name, "report", out.name, settings) as log:
        log({role: getattr(results, role).success for role in ("start", "final", "teacher")}, 0)
        with work.part("results.json") as path:
            path.write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(render(found), encoding="utf-8")
        work.remember({name: version(name) for name in DRAWN_WITH})
        return work.publish(results.model_dump(mode="json"))


def _require_names(params: Params) -> None:
    names = sorted(params.evaluations)
    for field, name in params.report.model_dump().items():
        if name not in names:
            raise ValueError(f"report.{field} is {name!r}; expected one of {names}")


# Reading. The data of trajectories and logits need not be there; their manifests must.


def read_run(params: Params, root: Path) -> Run:
    """Everything that the page shows, once it is proved that it belongs together. ValueError names what is missing or does not."""
    checkpoints = {name: read_manifest(root / "checkpoints" / name, "checkpoint") for name in params.finetuned}
    positions = {name: len(params.chain(name)) - 1 for name in {*params.updates, *params.updates.values()}}
    iterations = tuple(_iteration(name, root, positions[name] - 1) for name in sorted(params.iterations, key=positions.__getitem__))
    reinforcements = tuple(_reinforcement(name, root) for name in sorted(params.reinforcements, key=positions.__getitem__))
    checkpoints |= {one.result.name: one.made["checkpoints"] for one in iterations + reinforcements}
    evaluations = [_evaluation(name, params, root, checkpoints, positions) for name in params.evaluations]
    evaluations.sort(key=lambda one: (one.name == params.report.teacher, -1 if one.position is None else one.position))
    return Run(params, checkpoints, iterations, reinforcements, {one.name: one for one in evaluations})


def _iteration(name: str, root: Path, depth: int) -> Iteration:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories = read_manifest(root / "trajectories" / name, "trajectories")
    logits = read_manifest(root / "logits" / name, "logits")
    for role, manifest in {"trajectories": trajectories, "logits": logits}.items():
        _require_parent(folder, checkpoint, role, manifest)
    facts = {**checkpoint.facts, **trajectories.facts, "teacher_queries": logits.facts["teacher_queries"], "name": name, "depth": depth}
    steps = tuple(Step.model_validate_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    made = {"checkpoints": checkpoint, "trajectories": trajectories, "logits": logits}
    before, after = (Profiles.model_validate(facts[when]) for when in ("before", "after"))
    return Iteration(IterationResult.model_validate(facts), made, steps, before, after)


def _reinforcement(name: str, root: Path) -> Reinforcement:
    folder = root / "checkpoints" / name
    checkpoint = open_artifact(folder, "checkpoint")
    trajectories = read_manifest(root / "trajectories" / name, "trajectories")
    _require_parent(folder, checkpoint, "trajectories", trajectories)
    result = ReinforcementResult.model_validate({**checkpoint.facts, **trajectories.facts, "name": name})
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    return Reinforcement(result, {"checkpoints": checkpoint, "trajectories": trajectories}, steps)


def _evaluation(name: str, params: Params, root: Path, checkpoints: Mapping[str, Manifest], positions: Mapping[str, int]) -> Evaluation:
    folder, checkpoint = root / "evaluations" / name, params.evaluations[name]
    manifest = open_artifact(folder, "evaluation")
    _require_parent(folder, manifest, "checkpoint", checkpoints[checkpoint])
    return Evaluation(name, checkpoint, positions.get(checkpoint), manifest, Evaluated.model_validate(manifest.facts), read_records(folder))


def _require_parent(folder: Path, child: Manifest, role: str, parent: Manifest) -> None:
    if child.parents.get(role) != parent.digest:
        made = str(child.parents.get(role))[:12]
        raise ValueError(f"{folder}: made from {role} {made}; expected {parent.digest[:12]}, which is there now (run the stage that makes it)")


# The page.


def render(run: Run) -> str:
    """The page, whole."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"percent": _percent, "interval": _interval, "brief": _brief}
    template = environment.from_string((files("stages") / TEMPLATE).read_text(encoding="utf-8"))
    named, seen = run.params.report, run.evaluations
    return template.render(
        run=run,
        results=run.results,
        headline=[("Before", seen[named.start]), ("After", seen[named.final]), ("Teacher", seen[named.teacher])],
        share=lambda score: _share(score, run.results.teacher),
        confidence=" / ".join(f"{value:.0%}" for value in sorted({one.confidence for one in seen.values()})),
        tasks=_tasks(run),
        instructions={record.task: record.instruction for one in seen.values() for record in one.records},
        horizons=_horizons(list(seen.values())),
        figures=_figures(run),
        axes=AXES,
        parameters=_yaml(run.params.model_dump(mode="json")),
        settings={name: _yaml(manifest.params) for name, manifest in run.checkpoints.items()},
    )


def _tasks(run: Run) -> list[str]:
    """The run's tasks, then whatever else was evaluated."""
    named = [*run.params.environment.tasks, *(task for one in run.evaluations.values() for task in one.facts.tasks)]
    return [task for task in dict.fromkeys(named) if any(task in one.facts.tasks for one in run.evaluations.values())]


def _horizons(evaluations: Sequence[Evaluation]) -> list[int]:
    own = {one.facts.horizon for one in evaluations}
    return sorted(own | {horizon for horizon in HORIZONS if horizon <= max(own)})


def _share(score: Score, teacher: Score) -> str:
    return _percent(score.success / teacher.success) if teacher.success else "n/a"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _interval(score: Score) -> str:
    return f"{score.low:.1%} – {score.high:.1%}"  # noqa: RUF001 - an interval is written with an en dash


def _brief(score: Score) -> str:
    return f"{score.low:.0%} – {score.high:.0%}"  # noqa: RUF001 - as above


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
            figures |= {f"kl-{axis}": _kl_along(run, axis), f"entropy-{axis}": _entropy_along(run, axis)}
    if _stepped(run):
        figures |= {"kl-steps": _kl_steps(run), "entropy-steps": _entropy_steps(run)}
    return figures


def _draw(name: str, alt: str, size: tuple[int, int], paint: Callable[["Axes"], None]) -> Markup:
    """An SVG element of `size` CSS pixels with a text alternative, fit to stand in a page among others."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")  # an SVG of matplotlib's has 72 units an inch
        paint(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_inline(buffer.getvalue(), name, alt))  # noqa: S704 - drawn here; the alternative text is escaped


def _inline(svg: str, name: str, alt: str) -> str:
    """A stand-alone SVG file as an element of an HTML page: ids of its own, the page's colours and font, no namespaces."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg class="plot" role="img" aria-label="{escape(alt)}" \1>', body, count=1)
    body = re.sub(r'id="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub(r"'DejaVu Sans'", "var(--sans)", body)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var(--{variable})")
    return body.strip()


def _success(run: Run) -> Markup:
    """Success against iterations: evaluations with their intervals, the teacher as a band, each iteration's own rollouts as a thin line."""
    teacher, placed = run.evaluations[run.params.report.teacher], _placed(run)
    chain = run.params.chain(run.params.evaluations[run.params.report.final])
    told = "; ".join(f"{one.name} after {one.position} iterations {_percent(one.facts.overall.success)}" for one in placed)
    alt = f"Success against iterations. {told}; teacher {_percent(teacher.facts.overall.success)}."

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
        _points(axes, [one for one in placed if one.checkpoint in chain], "student, greedy", line="-")
        _points(axes, [one for one in placed if one.checkpoint not in chain], "other branches, greedy", line="none")
        axes.set(xlabel="iterations", ylabel="success", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4)

    return _draw("success", alt, (920, 340), paint)


def _placed(run: Run) -> list[Evaluation]:
    return [one for one in run.evaluations.values() if one.position is not None and one.name != run.params.report.teacher]


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
    shown = {"before": (named.start, MUTED), "after": (named.final, STUDENT), "teacher": (named.teacher, TEACHER)}
    alt = "Fraction of episodes that had succeeded by each control step, before, after, and for the teacher: the numbers are in the table below."

    def paint(axes: "Axes") -> None:
        for label, (name, colour) in shown.items():
            one = run.evaluations[name]
            steps = sorted(record.steps for record in one.records if record.success)
            heights = [count / len(one.records) for count in range(len(steps) + 1)]
            axes.step([0, *steps, one.facts.horizon], [*heights, heights[-1]], where="post", color=colour, linewidth=2, label=label)
        axes.set(xlabel="control steps", ylabel="episodes that succeeded", ylim=(-0.03, 1.03), xlim=(0, None))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(loc="upper left")

    return _draw("horizon", alt, (920, 300), paint)


def _kl(run: Run) -> Markup:
    """Reverse KL on an iteration's states: an arrow from before its update to after it."""
    rows = [one.result for one in run.iterations]
    told = "; ".join(f"{row.name} {_change(row, 'reverse_kl')}" for row in rows)

    def paint(axes: "Axes") -> None:
        for x, row in enumerate(rows):
            arrow = {"arrowstyle": "-|>", "color": STUDENT, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", (x, row.after.reverse_kl), (x, row.before.reverse_kl), arrowprops=arrow)
        axes.plot([r.before.reverse_kl for r in rows], "o", color=STUDENT, markerfacecolor=PAPER, label="before the update")
        axes.plot([r.after.reverse_kl for r in rows], "o", color=STUDENT, label="after")
        _name_iterations(axes, rows)
        axes.set(ylabel="reverse KL, nats a token", ylim=(0, None))
        axes.legend(loc="upper right")

    return _draw("kl", f"Reverse KL to the teacher in nats a token, before and after each iteration's update: {told}.", (450, 300), paint)


def _entropy(run: Run) -> Markup:
    """Both entropies on each iteration's states, the student's before and after its update."""
    rows = [one.result for one in run.iterations]
    told = "; ".join(f"{row.name} student {_change(row, 'student_entropy')}, teacher {row.after.teacher_entropy:.3f}" for row in rows)

    def paint(axes: "Axes") -> None:
        axes.plot([r.before.student_entropy for r in rows], "o-", color=STUDENT, markerfacecolor=PAPER, linewidth=1, label="student, before")
        axes.plot([r.after.student_entropy for r in rows], "o-", color=STUDENT, linewidth=2, label="student, after")
        axes.plot([r.after.teacher_entropy for r in rows], "s-", color=TEACHER, linewidth=1.5, label="teacher")
        _name_iterations(axes, rows)
        axes.set(ylabel="entropy, nats a token")
        axes.legend(loc="best")

    return _draw("entropy", f"Entropy in nats a token on each iteration's states: {told}.", (450, 300), paint)


def _kl_along(run: Run, axis: str) -> Markup:
    """Reverse KL by position or dimension: on the first iteration's states before its update, on the last one's after."""
    first, last = (getattr(one, f"by_{axis}").reverse_kl for one in (run.iterations[0].before, run.iterations[-1].after))

    def paint(axes: "Axes") -> None:
        _profile(axes, first, color=STUDENT, markerfacecolor=PAPER, linewidth=1, label=f"before {run.iterations[0].result.name}")
        _profile(axes, last, color=STUDENT, linewidth=2, label=f"after {run.iterations[-1].result.name}")
        axes.set(xlabel=AXES[axis], ylabel="reverse KL, nats a token", ylim=(0, None))
        axes.legend(loc="best")

    return _draw(f"kl-{axis}", f"Reverse KL by {AXES[axis]}: before {_listed(first)}; after {_listed(last)}.", (450, 280), paint)


def _entropy_along(run: Run, axis: str) -> Markup:
    """Both entropies by position or dimension, on the last iteration's states after its update."""
    last = getattr(run.iterations[-1].after, f"by_{axis}")

    def paint(axes: "Axes") -> None:
        _profile(axes, last.student_entropy, color=STUDENT, linewidth=2, label="student")
        _profile(axes, last.teacher_entropy, color=TEACHER, linewidth=1.5, label="teacher")
        axes.set(xlabel=AXES[axis], ylabel="entropy, nats a token")
        axes.legend(loc="best")

    told = f"student {_listed(last.student_entropy)}; teacher {_listed(last.teacher_entropy)}"
    return _draw(f"entropy-{axis}", f"Entropy by {AXES[axis]} after the last iteration: {told}.", (450, 280), paint)


def _profile(axes: "Axes", values: Sequence[float | None], **style: Any) -> None:
    axes.plot(range(1, len(values) + 1), [math.nan if value is None else value for value in values], "o-", **style)
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
            axes.plot(_numbers(run, one), [step.kl for step in one.steps], color=STUDENT, linewidth=1.2)
        axes.set(xlabel="optimiser step", ylabel="reverse KL, nats a token", ylim=(0, None))
        _mark_iterations(axes, run)

    return _draw("kl-steps", f"Reverse KL of every optimiser step's batch in nats a token: {_ends(run, lambda step: step.kl)}.", (450, 280), paint)


def _entropy_steps(run: Run) -> Markup:
    """The student's entropy on every optimiser step's batch, and the teacher's on the iteration's states."""

    def paint(axes: "Axes") -> None:
        for one in _stepped(run):
            numbers, teacher = _numbers(run, one), one.result.before.teacher_entropy
            axes.plot(numbers, [step.student_entropy for step in one.steps], color=STUDENT, linewidth=1.2)
            axes.plot([numbers[0], numbers[-1] + 1], [teacher, teacher], color=TEACHER, linewidth=1.5)
        axes.set(xlabel="optimiser step", ylabel="entropy, nats a token")
        _mark_iterations(axes, run)
        axes.legend(axes.get_lines()[:2], ("student", "teacher"), loc="best")

    told = _ends(run, lambda step: step.student_entropy)
    return _draw("entropy-steps", f"The student's entropy on every optimiser step's batch in nats a token: {told}.", (450, 280), paint)


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


def _ends(run: Run, value: Callable[[Step], float]) -> str:
    steps = [step for one in run.iterations for step in one.steps]
    first, last = steps[0], steps[-1]
    return f"{value(first):.3f} at the first step, {value(last):.3f} at the last"
