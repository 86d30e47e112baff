"""Draw the README's picture from a finished run: `python -m benchmarks.front_picture`.

Left: the student before and after, on the same initial state of a task; the rollouts are repeated,
and their actions replayed with LIBERO's stock renderer. Right: the success of each iteration's
rollouts, and the evaluations, with the teacher's 95 % interval.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vla_opd.data.records import read_records
from vla_opd.data.trajectory import Episode
from vla_opd.envs import make_env
from vla_opd.envs.graphics import use_backend
from vla_opd.envs.protocol import Placement
from vla_opd.lineage.store import ROOT
from vla_opd.params.load import load
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.seeds import derive
from vla_opd.simulation.jobs import Job
from vla_opd.simulation.rollout import RolloutSettings, rollout

FRAMES = 5  # per row
PIXELS = 384


def main() -> None:
    """Draw the picture of the run that params.yaml describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default=None, help="of environment.tasks; the first by default")
    parser.add_argument("--state", type=int, default=None, help="initial state of the task")
    parser.add_argument("--out", type=Path, default=Path("docs/images/front.png"))
    options = parser.parse_args()
    use_backend()
    params = load()
    run = ROOT / params.run.name
    results = json.loads((run / "report/page/results.json").read_text())
    task = options.task or params.environment.tasks[0]
    state = options.state
    if state is None:
        state = _first_gain(run, task)
    rows: dict[str, np.ndarray] = {}
    instruction = ""
    evaluations = {
        "before": params.report.start,
        "after": params.report.final,
    }
    for when, evaluation in evaluations.items():
        episode = _play(
            run / "checkpoints" / params.evaluations[evaluation],
            Placement(task, "evaluation", state),
            params.environment,
            params.evaluate.horizon,
        )
        instruction = episode.instruction
        print(f"{when}: {instruction}: success {episode.success}, {episode.steps} steps")
        rows[when] = _render(episode, params.environment)
    _draw(rows, instruction, results, options.out)
    print(options.out)


def _first_gain(run: Path, task: str) -> int:
    """Return the first initial state that `start` fails and `final` solves."""
    solved_by: dict[str, list[int]] = {}
    for name in ("start", "final"):
        records = read_records(run / "evaluations" / name)
        solved_by[name] = [
            record.state for record in records if record.success and record.task == task
        ]
    for state in solved_by["final"]:
        if state not in solved_by["start"]:
            return state
    raise ValueError(f"{task}: no state that start fails and final solves; expected --state")


def _play(
    folder: Path, placement: Placement, environment: EnvironmentParams, horizon: int
) -> Episode:
    """Play one episode as `evaluate` does."""
    policy = load_policy(open_checkpoint(folder))
    seed = derive(placement.task, placement.index)
    job = Job(placement, 0, seed)
    greedy = RolloutSettings(horizon, temperature=None)
    (episode,) = rollout(policy, [job], environment, greedy)
    return episode


def _render(episode: Episode, environment: EnvironmentParams) -> np.ndarray:
    """Replay the actions with the stock renderer. Returns `FRAMES` frames of the first camera."""
    stock = {
        "render": "exact",
        "image_size": PIXELS,
        "cameras": environment.cameras[:1],
    }
    env = make_env(environment.model_copy(update=stock))
    try:
        start = env.reset(episode.placement)
        advance = env.advance(episode.actions, 1)
        assert advance.success == episode.success, "a replay differs from its episode"
    finally:
        env.close()
    observations = [start, *advance.observations]
    last = len(observations) - 1
    chosen = np.linspace(0, last, FRAMES).round().astype(int)
    return np.stack([observations[index].frames[0] for index in chosen])


def _draw(rows: dict[str, np.ndarray], instruction: str, results: Any, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(14, 4.4), dpi=100)
    widths = [1] * FRAMES + [0.35, 2.6]
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths)
    grid.update(
        left=0.03,
        right=0.985,
        top=0.88,
        bottom=0.13,
        wspace=0.04,
        hspace=0.06,
    )
    for row, (when, frames) in enumerate(rows.items()):
        for column, frame in enumerate(frames):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(frame)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(when, fontsize=13)
    figure.text(0.03, 0.93, f'"{instruction}"', fontsize=13, style="italic")
    curve_axes = figure.add_subplot(grid[:, -1])
    _draw_curve(curve_axes, results)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})


def _draw_curve(axes: Any, results: Any) -> None:
    iterations = results["iterations"]
    depths = [iteration["depth"] for iteration in iterations]
    teacher = results["teacher"]
    axes.axhspan(
        100 * teacher["low"],
        100 * teacher["high"],
        color="#e8a33d",
        alpha=0.25,
        lw=0,
    )
    axes.axhline(
        100 * teacher["success"],
        color="#c77f12",
        lw=1.5,
        label="teacher, 95 % interval",
    )
    axes.plot(
        depths,
        [100 * iteration["success"] for iteration in iterations],
        "o-",
        color="#2f6fb2",
        lw=1.5,
        ms=4,
        label="student's rollouts",
    )
    _mark_evaluation(axes, 0, results["start"], lift=2)
    _mark_evaluation(axes, len(depths), results["final"], lift=-14)
    axes.plot([], [], "D", color="#15406f", label="evaluation, 50 episodes")
    axes.set_xlim(-0.5, len(depths) + 1.2)
    axes.set_ylim(0, 103)
    axes.set_xlabel("iteration")
    axes.set_ylabel("success (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=10)


def _mark_evaluation(axes: Any, depth: int, score: Any, lift: int) -> None:
    percent = 100 * score["success"]
    axes.plot(depth, percent, "D", color="#15406f", ms=8, zorder=3)
    axes.annotate(
        f"{percent:.0f} %",
        xy=(depth, percent),
        xytext=(8, lift),
        textcoords="offset points",
    )


if __name__ == "__main__":
    os.environ.setdefault("MPLCONFIGDIR", ".cache/matplotlib")
    main()
