"""Shares of a stage's shards, made side by side before DVC runs the stage, which combines them.

`OPD_SHARES` is how many; `OPD_CLUSTER` where: `ray` or `dask` start a cluster on this machine,
`ray:ADDRESS` and `dask:ADDRESS` use an existing one; by default they are processes of this machine.
The result does not depend on any of it: a shard's bytes depend on its seed. Every node needs this
folder under the same path, the same packages and code (a share by others is refused), and an
address of Prefect's server that it can reach.
"""

import os
import platform
import secrets
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from operator import floordiv
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import pipeline
from flows.dvc_runner.process import Line, LineHandler, ThrottledLog, read_lines
from flows.pipeline import StageFailed, Step
from flows.prefect_server import gpu_limit
from stages.catalog import BEHIND, STAGES
from vla_opd.machine import proxies
from vla_opd.machine.host import LAUNCH, parse_count
from vla_opd.machine.parent_death import STARTED_BY

CLUSTERS = {"ray": "prefect_ray", "dask": "prefect_dask"}
_RUNNING = set["subprocess.Popen[bytes]"]()  # the shares of this process, of all runs
FORWARDED = ("OPD_", "WANDB_", "MUJOCO_", "PYTHONPATH")  # prefixes of environment variables


@dataclass(frozen=True)
class Spread:
    """How many shares a stage is cut into, and where they are made.

    cluster: `ray`, `dask`, or empty for this machine. address: None to start the cluster.
    """

    count: int
    cluster: str = ""
    address: str | None = None


def wanted() -> Spread | None:
    """Read the environment variables. None for no shares; ValueError for invalid values."""
    location = os.environ.get("OPD_CLUSTER", "")
    count = parse_count("OPD_SHARES", os.environ.get("OPD_SHARES", "1"), "shares")
    workers = os.environ.get("OPD_WORKERS", "0")
    if not workers.isdecimal():
        raise ValueError(
            f"OPD_WORKERS is {workers!r}; expected a number of simulator processes, "
            "or 0 for one per core"
        )
    cluster, _, address = location.partition(":")
    if cluster and cluster not in CLUSTERS:
        raise ValueError(
            f"OPD_CLUSTER is {location!r}; expected ray, ray:ADDRESS, dask or dask:ADDRESS "
            "(or nothing: processes of this machine)"
        )
    if cluster and find_spec(CLUSTERS[cluster]) is None:
        package = CLUSTERS[cluster].replace("_", "-")
        raise ValueError(
            f"OPD_CLUSTER is {location!r}; expected {package} to be installed "
            "(pip install 'vla-opd[cluster]')"
        )
    return Spread(count, cluster, address or None) if count > 1 else None


def make(step: Step, tell: LineHandler) -> str:
    """Make the shares of a stage, if shares are wanted and DVC would run the stage now.

    Returns their launch, which the stage needs to combine them; empty without shares. The stage
    makes what a failed share leaves undone. StageFailed with the last lines of the first share if
    all of them failed.
    """
    spread = wanted()
    if spread is None or not STAGES[BEHIND[step.verb]].shares or not pipeline.would_run(step.name):
        return ""
    launch = secrets.token_hex(4)
    side_by_side = shares.with_options(
        flow_run_name=f"{step.name} in {spread.count} shares", task_runner=_runner(spread)
    )
    outputs = side_by_side(step.name, spread, str(Path.cwd()), launch)
    failures = [output for output in outputs if output]
    for output in failures:
        tell(Line(output))
    successes = spread.count - len(failures)
    if successes == 0:
        raise StageFailed(step.name, failures[0].splitlines())
    tell(Line(f"{successes} of {spread.count} shares are made"))
    return launch


@flow(name="shares", validate_parameters=False)
def shares(stage: str, spread: Spread, folder: str, launch: str) -> list[str]:
    """Make every share of a stage as a task. Returns each one's last output if it failed, or ``."""
    with _placement(spread) as workers:
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(FORWARDED)
        }
        environment |= {**workers, LAUNCH: launch}
        futures = [
            share.with_options(task_run_name=f"{stage}, {number} of {spread.count}").submit(
                stage, f"{number}/{spread.count}", folder, environment | _gpu(number, spread)
            )
            for number in range(1, spread.count + 1)
        ]
        try:
            return [_outcome(future) for future in futures]
        except BaseException:  # the run ends; the threads that wait for these would not
            for process in list(_RUNNING):
                process.terminate()
            raise


def _outcome(future: PrefectFuture[str]) -> str:
    try:
        outcome = future.result(raise_on_failure=False)
    except Exception as error:  # noqa: BLE001 - Ray's own, of a node or worker that is gone
        outcome = error
    return outcome if isinstance(outcome, str) else f"a share was lost: {outcome}"


@task(cache_policy=NO_CACHE)
def share(stage: str, part: str, folder: str, environment: Mapping[str, str]) -> str:
    """Make one share of a stage in a process on this task's machine.

    Returns its last output if it failed, an empty string otherwise.
    """
    verb, _, key = stage.partition("@")
    if not Path(folder).is_dir():
        return (
            f"{platform.node()}: no {folder} here; expected the folder of the run, "
            "on a file system that every node sees"
        )
    option = STAGES[verb].option
    assert option is not None, f"{verb} makes one artifact, which has no shares"
    command = [sys.executable, "-m", "stages", verb, option, key, "--share", part]
    log = ThrottledLog(get_run_logger())
    output: deque[str] = deque(maxlen=15)
    variables = proxies.restore(os.environ | dict(environment))
    variables[STARTED_BY] = str(os.getpid())
    with subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        _RUNNING.add(process)
        for line in read_lines(process.stdout):
            log.write(line)
            if not line.passing:
                output.append(line.text)
    _RUNNING.discard(process)
    if process.returncode == 0:
        return ""
    end = f"share {part} on {platform.node()} ended with {process.returncode}"
    return "\n".join([end, *output])


def _gpu(number: int, spread: Spread) -> dict[str, str]:
    """On this machine, one of its GPUs for each share in turn; elsewhere the cluster decides."""
    devices = gpu_limit.visible_gpus()
    elsewhere = spread.cluster == "ray" or spread.address is not None
    named = ":" in os.environ.get("OPD_DEVICE", "")
    if elsewhere or named or len(devices) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": devices[(number - 1) % len(devices)]}


def _runner(spread: Spread) -> TaskRunner[Any]:
    if spread.cluster == "ray":
        from prefect_ray import RayTaskRunner

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        settings: dict[str, Any] = {
            "log_to_driver": False,
            "runtime_env": {"env_vars": {"PREFECT_API_URL": PREFECT_API_URL.value()}},
        }
        if not spread.address:
            settings["include_dashboard"] = False
        return RayTaskRunner(spread.address, settings)
    if spread.cluster == "dask":
        from prefect_dask import DaskTaskRunner

        return DaskTaskRunner(address=spread.address)
    return ThreadPoolTaskRunner(max_workers=spread.count)


@contextmanager
def _placement(spread: Spread) -> Generator[dict[str, str]]:
    """Set how many simulators a share has, unless `OPD_WORKERS` does, and reserve them on Ray.

    On this machine: the share's part of the cores. On a Ray node: that of one of its GPUs. Ray
    spreads the shares over its nodes, as many at a time as fit; it hides GPUs from tasks that do
    not request one.
    """
    requested = int(os.environ.get("OPD_WORKERS", "0"))
    part = max(1, len(os.sched_getaffinity(0)) // spread.count)
    if spread.cluster != "ray":
        yield {} if requested or spread.address else {"OPD_WORKERS": str(part)}
        return
    from prefect_ray.context import remote_options

    nodes = _ray_nodes()
    gpu = _gpus_per_share(nodes)
    cores = [node["CPU"] for node in nodes]
    if spread.address:
        gpus = [max(1, node.get("GPU", 0)) for node in nodes]
        part = int(min(map(floordiv, cores, gpus)))
    workers = max(1, min(requested or part, int(min(cores))))
    with remote_options(scheduling_strategy="SPREAD", num_cpus=workers, num_gpus=gpu):
        yield {"OPD_WORKERS": str(requested or workers)}


def _gpus_per_share(nodes: Sequence[Mapping[str, float]]) -> int:
    """Return 1 if shares are to have a GPU each, else 0. ValueError if only some nodes have any."""
    if os.environ.get("OPD_DEVICE") == "cpu":
        return 0
    with_gpus = [node for node in nodes if node.get("GPU")]
    if with_gpus and len(with_gpus) < len(nodes):
        raise ValueError(
            f"OPD_CLUSTER: {len(with_gpus)} of {len(nodes)} nodes have GPUs; expected all or none "
            "(a head without CPUs, OPD_DEVICE=cpu)"
        )
    return 1 if with_gpus else 0


def _ray_nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that have CPUs."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [resources for resources in alive if resources.get("CPU")]
