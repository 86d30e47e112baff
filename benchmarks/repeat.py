"""Whether a stage makes the same bytes again and again while the machine is busy: `python -m benchmarks.repeat label@it001 --times 100`.

Each repetition is the stage's own command in a folder of its own, on the run's own inputs, beside processes that keep every core busy.
A folder that differs from the first is kept, and the arrays, settings and facts that differ in it are listed: where, and by how much.
Exit code 1 if any repetition differed or failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from flows import pipeline
from stages.__main__ import VERBS
from vla_opd.artifacts.manifest import MANIFEST, Manifest, flat
from vla_opd.data import zarr_zip

SPIN = "while True: pass"
LINKED = ("flows", "stages", "vla_opd", "tests", "params.yaml")
FINETUNED = ("pretrain", "finetune")  # in dvc.yaml two stages, in `stages` one


@dataclass(frozen=True)
class Trial:
    """What to repeat: the stage's command, the folder that it makes, relative to the project, and where repetitions run."""

    command: tuple[str, ...]
    out: Path
    scratch: Path


def main() -> None:
    """Repeat the stage and print what differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", help="as DVC names it, e.g. label@it001")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="busy processes beside it")
    parser.add_argument("--parallel", type=int, default=1, help="repetitions at the same time")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "opd-repeat",
        help="where the repetitions run",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="for a shorter stage",
    )
    arguments = parser.parse_args()

    trial = Trial(
        command(arguments.stage, arguments.set), made_by(arguments.stage), arguments.scratch
    )
    with busy(arguments.load):
        digests, failures = repeat(trial, arguments.times, arguments.parallel)
    same = digests.count(digests[0]) if digests else 0
    print(
        f"{arguments.stage}: {same} of {arguments.times} have the digest of the first, {failures} failed"
    )
    raise SystemExit(same != arguments.times)


def command(stage: str, settings: Sequence[str]) -> tuple[str, ...]:
    """The stage's own command line."""
    name, _, key = stage.partition("@")
    verb = "finetune" if name in FINETUNED else name
    option = VERBS[verb]
    chosen = (option, key) if option else ()
    overrides = [word for setting in settings for word in ("--set", setting)]
    return (sys.executable, "-m", "stages", verb, *chosen, *overrides, "--tracking", "none")


def made_by(stage: str) -> Path:
    """The folder that the stage makes, by dvc.yaml."""
    plan = pipeline.plan([stage])
    step = next(step for step in plan if step.name == stage)
    return Path(step.outs[0])


@contextmanager
def busy(processes: int) -> Generator[None]:
    """Keep that many processes busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]  # noqa: S603 - our own text
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def repeat(trial: Trial, times: int, parallel: int) -> tuple[list[str], int]:
    """The digests of the repetitions that ended well, and how many did not."""
    digests: list[str] = []
    failures = 0
    first: Path | None = None
    with ThreadPoolExecutor(parallel) as pool:
        for number, folder in enumerate(
            pool.map(lambda number: attempt(trial, number), range(times)), 1
        ):
            if folder is None:
                failures += 1
                continue
            digests.append(read(folder / trial.out).digest)
            first = first or folder
            if digests[-1] != digests[0]:
                print(f"repetition {number} differs, kept in {folder}")
                for line in differences(first / trial.out, folder / trial.out):
                    print(f"  {line}")
            elif folder != first:
                shutil.rmtree(folder)
            print(f"{number}: {digests[-1][:12]}", flush=True)
    return digests, failures


def attempt(trial: Trial, number: int) -> Path | None:
    """The folder of one repetition; None, with its last words printed, if the stage failed."""
    folder = trial.scratch / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(folder, trial.out)
    began = time.monotonic()
    stage = subprocess.run(trial.command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    if stage.returncode == 0:
        return folder
    print(
        f"repetition {number + 1} failed after {time.monotonic() - began:.0f} s:\n{stage.stderr[-2000:]}",
        flush=True,
    )
    return None


def lay_out(folder: Path, out: Path) -> None:
    """Link the project's code and all artifacts of the run but `out` into a new folder."""
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(Path(name).resolve())
    run = Path(*out.parts[:2])
    for artifact in run.glob("*/[!.]*"):
        link = folder / artifact
        link.parent.mkdir(parents=True, exist_ok=True)
        if artifact != out:
            link.symlink_to(artifact.resolve())


def read(artifact: Path) -> Manifest:
    """An artifact's manifest."""
    return Manifest.model_validate_json((artifact / MANIFEST).read_text())


def differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two artifacts, a line each: parents, settings and facts by name, files by their arrays."""
    ours, theirs = (
        read(artifact).model_dump(include={"parents", "params", "facts"})
        for artifact in (first, second)
    )
    yield from differing_values("manifest", flat(ours), flat(theirs))
    before = read(first).files
    after = read(second).files
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            yield f"{name}: only in one of them"
        elif before[name] != after[name]:
            yield from differing_file(first / name, second / name)


def differing_file(first: Path, second: Path) -> Iterator[str]:
    """What differs between two files: arrays of shards and weights, values of JSON."""
    match first.suffix:
        case ".zip":
            yield from differing_arrays(
                first.name, zarr_zip.read(first)[0], zarr_zip.read(second)[0]
            )
        case ".safetensors":
            yield from differing_arrays(
                first.name, safetensors.numpy.load_file(first), safetensors.numpy.load_file(second)
            )
        case ".json":
            values = [flat({"": json.loads(path.read_text())}) for path in (first, second)]
            yield from differing_values(first.name, *values)
        case _:
            lines = [path.read_bytes().splitlines() for path in (first, second)]
            number = next(
                (i for i, pair in enumerate(zip(*lines, strict=False)) if pair[0] != pair[1]),
                "the last",
            )
            yield f"{first.name}: differs from line {number} on"


def differing_values(
    where: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[str]:
    """Names whose values differ, with both."""
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            yield f"{where}: {name} is {first.get(name)} and {second.get(name)}"


def differing_arrays(
    where: str, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Arrays that differ: how many of their values, the first row, and the largest difference."""
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second or first[name].shape != second[name].shape:
            yield f"{where}: {name} is of another shape or only in one of them"
            continue
        differing = first[name] != second[name]
        if not differing.any():
            continue
        places = np.argwhere(differing)
        rows = len(np.unique(places[:, 0])) if differing.ndim else 1
        largest = np.abs(first[name].astype(np.float64) - second[name].astype(np.float64)).max()
        yield f"{where}: {name} {list(differing.shape)}: {len(places)} values in {rows} rows, by at most {largest:.3g}, first at {places[0].tolist()}"


if __name__ == "__main__":
    main()
