"""The run of `params.yaml` with several seeds, and its success before, after and of the teacher over all of them.

`python -m benchmarks.seeds --seeds 0 1 2 [--set section.key=value]`

Base, teacher and demonstrations are the run's own (make them first); each seed fine-tunes its own student, samples and optimises with its own seed in
`artifacts/<run>-seed<k>`, and is scored on `evaluate.episodes` initial states of its own, as far as there are enough: the seeds' windows are spread
evenly over the states 0 ... 49. The teacher is scored on the same. The stages are those of `python -m stages`, in one process; artifacts that are
there already are kept.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stages.__main__ import main as stage
from stages.evaluate import Record, success
from vla_opd.params import Params, load

STATES = 50  # fixed initial states of a task, in both families


def main() -> None:
    """Run what is missing, seed after seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a setting of params.yaml")
    arguments = parser.parse_args()
    params = load("params.yaml", arguments.set)
    firsts = np.linspace(0, max(0, STATES - params.evaluate.episodes), len(arguments.seeds)).astype(int)
    runs = [_run(params, int(first), seed, arguments.set) for first, seed in zip(firsts, arguments.seeds, strict=True)]
    print("\n".join(table(params, runs)))


def table(params: Params, runs: Sequence[Path]) -> Iterator[str]:
    """Lines of Markdown: per evaluation the success of every seed, their mean, the Wilson interval of all episodes together, and success per task."""
    yield "| | per seed | mean | interval of all episodes | episodes | per task |"
    yield "|---|---|---|---|---|---|"
    for name in _scored(params):
        seeds = [_records(run / "evaluations" / name) for run in runs]
        each = [success(records, params.evaluate.confidence)["success"] for records in seeds]
        everything = [record for records in seeds for record in records]
        whole = success(everything, params.evaluate.confidence)
        tasks = {task: [r.success for r in everything if r.task == task] for task in params.environment.tasks}
        yield (
            f"| {name} | {' '.join(f'{100 * s:.1f}' for s in each)} | {100 * statistics.mean(each):.1f} % "
            f"| {100 * whole['low']:.1f} - {100 * whole['high']:.1f} | {len(everything)} "
            f"| {' '.join(f'{sum(outcomes)}/{len(outcomes)}' for outcomes in tasks.values())} |"
        )


def _records(evaluation: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in (evaluation / "episodes.jsonl").read_text().splitlines()]


def _scored(params: Params) -> tuple[str, ...]:
    return params.report.start, params.report.final, params.report.teacher


def _run(params: Params, first: int, seed: int, overrides: list[str]) -> Path:
    source, run = Path("artifacts") / params.run.name, Path("artifacts") / f"{params.run.name}-seed{seed}"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for shared in ("demonstrations", "checkpoints/base", "checkpoints/teacher"):
        if not (run / shared).is_symlink():
            (run / shared).symlink_to((source / shared).resolve(), target_is_directory=True)
    common = [f"--set={s}" for s in (*overrides, f"run.name={run.name}", f"run.seed={seed}", f"evaluate.first_state={first}")]
    for folder, *command in _stages(params):
        if not (run / folder / "manifest.json").is_file() and stage([*command, "--tracking=none", *common]):
            raise SystemExit(f"seed {seed}: {' '.join(command)} failed")
    return run


def _stages(params: Params) -> Iterator[tuple[str, ...]]:
    """The folder that a stage makes, and its command line."""
    yield "checkpoints/student", "finetune", "--name=student"
    for iteration in params.iterations:
        yield f"trajectories/{iteration}", "sample", f"--iteration={iteration}"
        yield f"logits/{iteration}", "label", f"--iteration={iteration}"
        yield f"checkpoints/{iteration}", "optimize", f"--iteration={iteration}"
    for name in _scored(params):
        yield f"evaluations/{name}", "evaluate", f"--name={name}"


if __name__ == "__main__":
    main()
