"""The run of `params.yaml` with several seeds: success before, after and of the teacher.

`python -m benchmarks.seeds --seeds 0 1 2 [--set section.key=value]`

Base, teacher and demonstrations are the run's own (make them first). Each seed fine-tunes its own
student, samples and optimizes with its own seed in `artifacts/<run>-seed<k>`, and is scored on
`evaluate.episodes` initial states; the seeds' windows are spread evenly over the states 0 ... 49,
so they overlap only if there are too few. The teacher is scored on the same states. The stages are
those of `python -m stages`, in one process; artifacts that exist are kept.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.stats import t

from stages.__main__ import main as stage
from vla_opd.analysis.evaluation import Score, score
from vla_opd.artifacts.manifest import MANIFEST, canonical_json, read_manifest
from vla_opd.data.records import Record, read_records
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.section import EVALUATION_STATES


def main() -> None:
    """Make missing artifacts, seed after seed, and print the table."""
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
    last = max(0, EVALUATION_STATES - params.evaluate.episodes)
    windows = np.linspace(0, last, len(arguments.seeds)).astype(int)
    runs: list[Path] = []
    for first_state, seed in zip(windows, arguments.seeds, strict=True):
        run = make_run(params, int(first_state), seed, arguments.set)
        runs.append(run)
    for line in table(params, runs):
        print(line)


HEAD = (
    "",
    "per seed",
    "mean over seeds (t interval)",
    "Wilson interval of all episodes",
    "episodes",
    "per task",
)


def table(params: Params, runs: Sequence[Path]) -> Iterator[str]:
    """Yield lines of Markdown, one per evaluation."""
    header = " | ".join(HEAD)
    yield f"| {header} |"
    yield "|---" * len(HEAD) + "|"
    for name in scored_evaluations(params):
        seeds = [read_records(run / "evaluations" / name) for run in runs]
        episodes = list(chain.from_iterable(seeds))
        if name == params.report.teacher:
            episodes = drop_repetitions(episodes)
        confidence = params.evaluate.confidence
        total = score_records(episodes, confidence)
        cells = [
            name,
            format_seeds(seeds, confidence),
            f"{100 * total.low:.1f} - {100 * total.high:.1f}",
            str(len(episodes)),
            format_tasks(episodes, params.environment.tasks),
        ]
        row = " | ".join(cells)
        yield f"| {row} |"


def drop_repetitions(records: Sequence[Record]) -> list[Record]:
    """Keep one episode per initial state: one greedy policy repeats itself in windows' overlap."""
    distinct: dict[tuple[str, int], Record] = {}
    for record in records:
        distinct[record.task, record.state] = record
    return list(distinct.values())


def score_records(records: Sequence[Record], confidence: float) -> Score:
    """Return the success of some episodes, with its Wilson interval."""
    return score((record.success for record in records), confidence)


def format_seeds(seeds: Sequence[Sequence[Record]], confidence: float) -> str:
    """Format the success per seed, and their mean with its interval by Student's t, in percent.

    The interval is that of another seed's mean.
    """
    percent = [100 * score_records(records, confidence).success for records in seeds]
    count = len(percent)
    mean = f"{statistics.mean(percent):.1f} %"
    if count > 1:
        quantile = t.ppf((1 + confidence) / 2, count - 1)
        standard_error = statistics.stdev(percent) / math.sqrt(count)
        mean += f" +- {quantile * standard_error:.1f}"
    per_seed = " ".join(f"{success:.1f}" for success in percent)
    return f"{per_seed} | {mean}"


def format_tasks(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Format successes and episodes per task."""
    cells: list[str] = []
    for task in tasks:
        outcomes = [record.success for record in records if record.task == task]
        successes = sum(outcomes)
        cells.append(f"{successes}/{len(outcomes)}")
    return " ".join(cells)


def scored_evaluations(params: Params) -> tuple[str, ...]:
    """Return the names of the evaluations before, after and of the teacher."""
    return params.report.start, params.report.final, params.report.teacher


def make_run(params: Params, first_state: int, seed: int, overrides: list[str]) -> Path:
    """Make the missing artifacts of one seed; return the run's folder.

    SystemExit if those that exist come from other settings or another teacher.
    """
    source = Path("artifacts") / params.run.name
    run = Path("artifacts") / f"{params.run.name}-seed{seed}"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for shared in ("demonstrations", "checkpoints/base", "checkpoints/teacher"):
        link = run / shared
        original = source / shared
        if not link.is_symlink():
            link.symlink_to(original.resolve(), target_is_directory=True)
    require_same_origin(run, source, params)
    settings = (
        *overrides,
        f"run.name={run.name}",
        f"run.seed={seed}",
        f"run.learning_seed={seed}",
        f"evaluate.first_state={first_state}",
    )
    options = ["--tracking=none", *(f"--set={setting}" for setting in settings)]
    for folder, *command in stages_of_a_seed(params):
        manifest = run / folder / MANIFEST
        if manifest.is_file():
            continue
        if stage([*command, *options]):
            raise SystemExit(f"seed {seed}: {' '.join(command)} failed")
    return run


def require_same_origin(run: Path, source: Path, params: Params) -> None:
    """Note the settings and checkpoints that a run is made from. SystemExit if they differ."""
    base = read_manifest(source / "checkpoints/base", "checkpoint")
    teacher = read_manifest(source / "checkpoints/teacher", "checkpoint")
    settings = params.model_dump(mode="json")
    origin = canonical_json([settings, [base.digest, teacher.digest]])
    note = run / "made_from.json"
    if note.is_file() and note.read_text() != origin:
        raise SystemExit(
            f"{run} was made with other settings, or from another base or teacher: remove it"
        )
    note.write_text(origin)


def stages_of_a_seed(params: Params) -> Iterator[tuple[str, ...]]:
    """Yield the folder that a stage makes, and its command line, in order."""
    yield "checkpoints/student", "finetune", "--name=student"
    depths = {name: len(params.chain(name)) for name in params.updates}
    for iteration in sorted(depths, key=depths.__getitem__):
        folders = {"explore": "trajectories", "reinforce": "checkpoints"}
        if iteration in params.iterations:
            folders = {"sample": "trajectories", "label": "labels", "optimize": "checkpoints"}
        for verb, folder in folders.items():
            yield f"{folder}/{iteration}", verb, f"--iteration={iteration}"
    for name in scored_evaluations(params):
        yield f"evaluations/{name}", "evaluate", f"--name={name}"


if __name__ == "__main__":
    main()
