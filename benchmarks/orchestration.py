"""What a run costs besides its stages: `python -m benchmarks.orchestration`, after the run that params.yaml describes.

The real flow, on a Prefect server and a DVC of its own, makes the run once more in a scratch clone; but there each stage only copies what the
finished run has, so that what takes minutes takes seconds, and nearly all of them are those of the flow, Prefect, DVC, hashing and linking. Then the
flow looks at the run again, unchanged. The working tree's code; dvc.lock as it was committed, so without the stages that `make run` added.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flows.prefect_server.server import free_port
from vla_opd.lineage.store import ROOT
from vla_opd.machine.tracking import git
from vla_opd.params.load import load

TIMES = "stage_seconds"
COPIER = """
import os, pathlib, shutil, sys, time

verb, key = sys.argv[1], (sys.argv[3:] or [""])[0]
out = pathlib.Path({folder!r}) / {{
    "demonstrate": f"demonstrations/{{key}}", "finetune": f"checkpoints/{{key}}", "sample": f"trajectories/{{key}}", "label": f"logits/{{key}}",
    "optimize": f"checkpoints/{{key}}", "evaluate": f"evaluations/{{key}}", "report": "report/page",
}}[verb]
shutil.rmtree(out, ignore_errors=True)
shutil.copytree(pathlib.Path({made!r}) / out, out)
print(f"{{verb}}: copied", flush=True)
began = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
with open({times!r}, "a") as file:
    print(time.clock_gettime(time.CLOCK_BOOTTIME) - began, file=file)
"""


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as scratch:
            _measure(Path(scratch) / "run")


def _measure(clone: Path) -> None:
    _clone(clone)
    python = [sys.executable, "-m"]
    environment = os.environ | {
        "PYTHONPATH": str(clone),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
    }
    with (clone.parent / "log").open("wb") as log, _server_ended(clone):
        run = partial(
            subprocess.run, cwd=clone, env=environment, check=True, stdout=log, stderr=log
        )
        run([*python, "prefect", "server", "database", "upgrade", "--yes"])  # as `make setup` does
        for what in ("made", "unchanged"):
            began = time.monotonic()
            run([*python, "flows", "run"])
            whole = time.monotonic() - began
            stages = _stages(clone)
            print(
                f"{what}: {whole:.1f} s, in {len(stages)} stages {sum(stages):.1f} s, else {whole - sum(stages):.1f} s",
                flush=True,
            )


def _stages(clone: Path) -> list[float]:
    """Seconds of each stage's process since this was last asked."""
    times = clone.parent / TIMES
    said = times.read_text().split() if times.exists() else []
    times.unlink(missing_ok=True)
    return [float(seconds) for seconds in said]


def _clone(clone: Path) -> None:
    """The project as it is here, but for its stages and dvc.lock."""
    run = ROOT / load().run.name
    if not (run / "report/page").is_dir():
        raise SystemExit(f"{run} has no report: make the run first")
    git("clone", "--quiet", "--shared", ".", str(clone))
    for name in (
        git("ls-files", "--cached", "--others", "--exclude-standard", "-z").strip("\0").split("\0")
    ):
        if Path(name).is_file() and name != "dvc.lock" and not name.startswith("artifacts/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, clone / name)
    (clone / "stages/__main__.py").write_text(
        COPIER.format(folder=str(run), made=str(Path.cwd()), times=str(clone.parent / TIMES))
    )


@contextmanager
def _server_ended(clone: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if (number := clone / ".prefect/server.pid").exists():
            os.kill(int(number.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    main()
