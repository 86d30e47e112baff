"""Time that a run takes in addition to its stages.

`python -m benchmarks.orchestration`, after the run that params.yaml describes.

The real flow, on a Prefect server and a DVC of its own, makes the run again in a scratch clone
whose stages only copy the finished run's artifacts. So nearly all of the time is that of the flow,
Prefect, DVC, hashing and linking. Then the flow runs again, unchanged. Code is the working tree's;
dvc.lock is the committed one, without the stages that `make run` added.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flows.prefect_server.server import free_port
from vla_opd.lineage.store import ROOT
from vla_opd.machine.tracking import run_git
from vla_opd.params.load import load

TIMES = "stage_seconds"
COPIER = """
import os, pathlib, shutil, sys, time

verb, key = sys.argv[1], (sys.argv[3:] or [""])[0]
folders = {{
    "demonstrate": "demonstrations",
    "finetune": "checkpoints",
    "sample": "trajectories",
    "label": "labels",
    "optimize": "checkpoints",
    "evaluate": "evaluations",
    "report": "report",
}}
out = pathlib.Path({run!r}) / folders[verb] / (key or "page")
shutil.rmtree(out, ignore_errors=True)
shutil.copytree(pathlib.Path({project!r}) / out, out)
print(f"{{verb}}: copied", flush=True)
stat = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
began = int(stat[19]) / os.sysconf("SC_CLK_TCK")
with open({times!r}, "a") as file:
    print(time.clock_gettime(time.CLOCK_BOOTTIME) - began, file=file)
"""


def main() -> None:
    """Print two lines per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as scratch:
            measure(Path(scratch) / "run")


def measure(clone: Path) -> None:
    """Make the run in a clone, then run it again unchanged; print the seconds of both."""
    make_clone(clone)
    environment = os.environ | {
        "PYTHONPATH": str(clone),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
    }

    with (clone.parent / "log").open("wb") as log, end_server(clone):

        def run(*words: str) -> None:
            command = [sys.executable, "-m", *words]
            subprocess.run(  # noqa: S603 - our own command
                command, cwd=clone, env=environment, check=True, stdout=log, stderr=log
            )

        run("prefect", "server", "database", "upgrade", "--yes")  # as `make setup` does
        for label in ("made", "unchanged"):
            began = time.monotonic()
            run("flows", "run")
            total = time.monotonic() - began
            stages = take_stage_seconds(clone)
            in_stages = sum(stages)
            print(
                f"{label}: {total:.1f} s, in {len(stages)} stages {in_stages:.1f} s, "
                f"else {total - in_stages:.1f} s",
                flush=True,
            )


def take_stage_seconds(clone: Path) -> list[float]:
    """Return the seconds of each stage's process since the last call."""
    times = clone.parent / TIMES
    lines = times.read_text().split() if times.exists() else []
    times.unlink(missing_ok=True)
    return [float(seconds) for seconds in lines]


def make_clone(clone: Path) -> None:
    """Clone the project with the working tree's files, but not its stages and dvc.lock."""
    run = ROOT / load().run.name
    if not (run / "report/page").is_dir():
        raise SystemExit(f"{run} has no report: make the run first")
    run_git("clone", "--quiet", "--shared", ".", str(clone))
    for name in list_source_files():
        copy = clone / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, copy)
    copier = COPIER.format(
        run=str(run),
        project=str(Path.cwd()),
        times=str(clone.parent / TIMES),
    )
    (clone / "stages/__main__.py").write_text(copier)


def list_source_files() -> list[str]:
    """Return the working tree's files that git has or would take, but artifacts and dvc.lock."""
    listed = run_git("ls-files", "--cached", "--others", "--exclude-standard", "-z").decode()
    names: list[str] = []
    for name in listed.strip("\0").split("\0"):
        is_made = name == "dvc.lock" or name.startswith("artifacts/")
        if Path(name).is_file() and not is_made:
            names.append(name)
    return names


@contextmanager
def end_server(clone: Path) -> Generator[None]:
    """End the clone's Prefect server with the context."""
    try:
        yield
    finally:
        pid = clone / ".prefect/server.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    main()
