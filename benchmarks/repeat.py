"""Check that a stage makes the same bytes every time while the machine is busy.

`python -m benchmarks.repeat label@it001 --times 100`

Each repetition is the stage's own command in a folder of its own, on the run's own inputs, beside
processes that keep every core busy. A folder that differs from the first is kept, and the arrays,
settings and facts that differ in it are listed with place and size of the difference. Exit code 1
if any repetition differed or failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from flows import pipeline
from stages.catalog import BEHIND, STAGES
from vla_opd.artifacts.manifest import MANIFEST, Manifest, differing_keys, flatten
from vla_opd.data import zarr_zip

BUSY_LOOP = """
import sys
from vla_opd.machine.parent_death import die_with_parent
die_with_parent(parent=int(sys.argv[1]))
while True:
    pass
"""
ARRAYS: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
    ".zip": lambda path: zarr_zip.read(path)[0],
    ".safetensors": safetensors.numpy.load_file,
}
LINKED = ("flows", "stages", "vla_opd", "tests", "params.yaml")


@dataclass(frozen=True)
class Trial:
    """What to repeat.

    command: the stage's. out: the folder that it makes, relative to the project.
    scratch: where repetitions run.
    """

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
        command=stage_command(arguments.stage, arguments.set),
        out=stage_output(arguments.stage),
        scratch=arguments.scratch,
    )
    with keep_busy(arguments.load):
        digests, failures = repeat(trial, arguments.times, arguments.parallel)
    same = digests.count(digests[0]) if digests else 0
    print(
        f"{arguments.stage}: {same} of {arguments.times} have the digest of the first, "
        f"{failures} failed"
    )
    raise SystemExit(same != arguments.times)


def stage_command(stage: str, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the stage's own command line."""
    name, _, key = stage.partition("@")
    verb = BEHIND[name]
    option = STAGES[verb].option
    item = (option, key) if option else ()
    overrides = [word for setting in settings for word in ("--set", setting)]
    return (sys.executable, "-m", "stages", verb, *item, *overrides, "--tracking", "none")


def stage_output(stage: str) -> Path:
    """Return the folder that the stage makes, by dvc.yaml."""
    plan = pipeline.plan([stage])
    step = next(step for step in plan if step.name == stage)
    return Path(step.outs[0])


@contextmanager
def keep_busy(count: int) -> Generator[None]:
    """Keep that many processes busy while the context and this thread last."""
    command = [sys.executable, "-c", BUSY_LOOP, str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]  # noqa: S603 - our own loop
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def repeat(trial: Trial, times: int, parallel: int) -> tuple[list[str], int]:
    """Return the digests of the repetitions that succeeded, and how many failed."""
    digests: list[str] = []
    failures = 0
    first: Path | None = None
    with ThreadPoolExecutor(parallel) as pool:
        folders = pool.map(lambda number: attempt(trial, number), range(times))
        for number, folder in enumerate(folders, 1):
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
    """Run one repetition and return its folder; None, with its last output printed, if it fails."""
    folder = trial.scratch / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(folder, trial.out)
    began = time.monotonic()
    stage = subprocess.run(  # noqa: S603 - the stage's own command
        trial.command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if stage.returncode == 0:
        return folder
    seconds = time.monotonic() - began
    print(f"repetition {number + 1} failed after {seconds:.0f} s:", flush=True)
    print(stage.stderr[-2000:], flush=True)
    return None


def lay_out(folder: Path, out: Path) -> None:
    """Link the project's code and all artifacts of the run but `out` into a new folder."""
    folder.mkdir(parents=True)
    for name in LINKED:
        link = folder / name
        link.symlink_to(Path(name).resolve())
    run = Path(*out.parts[:2])
    for artifact in run.glob("*/[!.]*"):
        link = folder / artifact
        link.parent.mkdir(parents=True, exist_ok=True)
        if artifact != out:
            link.symlink_to(artifact.resolve())


def read(artifact: Path) -> Manifest:
    """Read an artifact's manifest."""
    return Manifest.model_validate_json((artifact / MANIFEST).read_text())


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yield a line per difference: parents, settings and facts by name, files by their arrays."""
    described = {"parents", "params", "facts"}
    before = read(first)
    after = read(second)
    yield from differing_values(
        "manifest",
        before.model_dump(include=described),
        after.model_dump(include=described),
    )
    for name in before.files | after.files:
        if name not in before.files or name not in after.files:
            yield f"{name}: only in one of them"
        elif before.files[name] != after.files[name]:
            yield from differing_file(first / name, second / name)


def differing_file(first: Path, second: Path) -> Iterator[str]:
    """Yield a line per difference of two files: arrays of shards and weights, values of JSON."""
    read_arrays = ARRAYS.get(first.suffix)
    if read_arrays is not None:
        yield from differing_arrays(first.name, read_arrays(first), read_arrays(second))
    elif first.suffix == ".json":
        before = json.loads(first.read_text())
        after = json.loads(second.read_text())
        yield from differing_values(first.name, {"": before}, {"": after})
    else:
        line = first_differing_line(first.read_bytes(), second.read_bytes())
        yield f"{first.name}: differs from line {line} on"


def first_differing_line(first: bytes, second: bytes) -> int:
    """Return the number of the first line that differs, counted from 1."""
    before = first.splitlines()
    after = second.splitlines()
    for number, lines in enumerate(zip(before, after, strict=False), 1):
        if len(set(lines)) > 1:
            return number
    return min(len(before), len(after)) + 1


def differing_values(
    where: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line per dotted name whose values differ."""
    before = flatten(first)
    after = flatten(second)
    for name in differing_keys(before, after):
        yield f"{where}: {name} is {before.get(name)} and {after.get(name)}"


def differing_arrays(
    where: str, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Yield a line per array that differs: in how many values, by how much, and where first."""
    for name in dict.fromkeys([*first, *second]):
        before = first.get(name)
        after = second.get(name)
        if before is None or after is None or before.shape != after.shape:
            yield f"{where}: {name} is of another shape or only in one of them"
        elif not np.array_equal(before, after):
            yield f"{where}: {name} {list(before.shape)}: {describe_difference(before, after)}"


def describe_difference(first: np.ndarray, second: np.ndarray) -> str:
    """Describe how two arrays of one shape differ."""
    places = np.argwhere(first != second)
    rows = 1
    if first.ndim:
        rows = len(np.unique(places[:, 0]))
    distance = first.astype(np.float64) - second.astype(np.float64)
    largest = np.abs(distance).max()
    return (
        f"{len(places)} values in {rows} rows, "
        f"by at most {largest:.3g}, first at {places[0].tolist()}"
    )


if __name__ == "__main__":
    main()
