"""The run of `params.yaml` with several seeds, and its success before, after and of the teacher over all of them.

`python -m benchmarks.seeds --seeds 0 1 2 [--set section.key=value]`

Base, teacher and demonstrations are the run's own (make them first); each seed fine-tunes its own student, samples and optimises with its own seed in
`artifacts/<run>-seed<k>`, and is scored on `evaluate.episodes` initial states of its own, as far as there are enough: the seeds' windows are spread
evenly over the states 0 ... 49. The teacher is scored on the same. The stages are those of `python -m stages`, in one process; artifacts that are
there already are kept.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t

from stages.__main__ import main as stage
from vla_opd.analysis.evaluation import Record, read_records, score
from vla_opd.artifacts.manifest import canonical, read_manifest
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.section import EVALUATION_STATES


def main() -> None:
    """Run what is missing, seed after seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting of params.yaml",
    )
    arguments = parser.parse_args()
    params = load("params.yaml", arguments.set)
    firsts = np.linspace(
        0, max(0, EVALUATION_STATES - params.evaluate.episodes), len(arguments.seeds)
    ).astype(int)
    runs = [
        _run(params, int(first), seed, arguments.set)
        for first, seed in zip(firsts, arguments.seeds, strict=True)
    ]
    print("\n".join(table(params, runs)))


def table(params: Params, runs: Sequence[Path]) -> Iterator[str]:
    """Lines of Markdown: per evaluation the success of every seed, their mean, all episodes together, and success per task."""
    yield "| | per seed | mean over seeds (t interval) | Wilson interval of all episodes | episodes | per task |"
    yield "|---|---|---|---|---|---|"
    for name in _scored(params):
        seeds = [read_records(run / "evaluations" / name) for run in runs]
        everything = [record for records in seeds for record in records]
        if (
            name == params.report.teacher
        ):  # one policy, greedy: where windows overlap it has repeated itself
            everything = list(
                {(record.task, record.state): record for record in everything}.values()
            )
        whole = score((record.success for record in everything), params.evaluate.confidence)
        tasks = [
            [r.success for r in everything if r.task == task] for task in params.environment.tasks
        ]
        yield (
            f"| {name} | {_each(params, seeds)} | {100 * whole.low:.1f} - {100 * whole.high:.1f} | {len(everything)} "
            f"| {' '.join(f'{sum(outcomes)}/{len(outcomes)}' for outcomes in tasks)} |"
        )


def _each(params: Params, seeds: Sequence[Sequence[Record]]) -> str:
    """Every seed's success, their mean, and its interval by Student's t: what another seed may change."""
    each = [
        100 * score((record.success for record in records), params.evaluate.confidence).success
        for records in seeds
    ]
    spread = ""
    if len(each) > 1:
        factor = t.ppf((1 + params.evaluate.confidence) / 2, len(each) - 1)
        spread = f" +- {factor * statistics.stdev(each) / math.sqrt(len(each)):.1f}"
    return f"{' '.join(f'{one:.1f}' for one in each)} | {statistics.mean(each):.1f} %{spread}"


def _scored(params: Params) -> tuple[str, ...]:
    return params.report.start, params.report.final, params.report.teacher


def _run(params: Params, first: int, seed: int, overrides: list[str]) -> Path:
    """Make the artifacts of one seed that are missing. SystemExit if those that are there come from other settings or another teacher."""
    source, run = (
        Path("artifacts") / params.run.name,
        Path("artifacts") / f"{params.run.name}-seed{seed}",
    )
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for shared in ("demonstrations", "checkpoints/base", "checkpoints/teacher"):
        if not (run / shared).is_symlink():
            (run / shared).symlink_to((source / shared).resolve(), target_is_directory=True)
    made_from = canonical(
        [
            params.model_dump(mode="json"),
            [
                read_manifest(source / "checkpoints" / n, "checkpoint").digest
                for n in ("base", "teacher")
            ],
        ]
    )
    note = run / "made_from.json"
    if note.is_file() and note.read_text() != made_from:
        raise SystemExit(
            f"{run} was made with other settings, or from another base or teacher: remove it"
        )
    note.write_text(made_from)
    own = (
        f"run.name={run.name}",
        f"run.seed={seed}",
        f"run.learning_seed={seed}",
        f"evaluate.first_state={first}",
    )
    common = [f"--set={s}" for s in (*overrides, *own)]
    for folder, *command in _stages(params):
        if not (run / folder / "manifest.json").is_file() and stage(
            [*command, "--tracking=none", *common]
        ):
            raise SystemExit(f"seed {seed}: {' '.join(command)} failed")
    return run


def _stages(params: Params) -> Iterator[tuple[str, ...]]:
    """The folder that a stage makes, and its command line."""
    yield "checkpoints/student", "finetune", "--name=student"
    for iteration in sorted(params.updates, key=lambda name: len(params.chain(name))):
        if iteration in params.iterations:
            made = {"sample": "trajectories", "label": "logits", "optimize": "checkpoints"}
        else:
            made = {"explore": "trajectories", "reinforce": "checkpoints"}
        for verb, folder in made.items():
            yield f"{folder}/{iteration}", verb, f"--iteration={iteration}"
    for name in _scored(params):
        yield f"evaluations/{name}", "evaluate", f"--name={name}"


if __name__ == "__main__":
    main()
