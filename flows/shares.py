"""Shares: the shards of a stage, made side by side by tasks on Ray, on Dask or on this machine, before DVC runs the stage, which puts them together.

`OPD_SHARES` says how many; `OPD_CLUSTER` where: `ray` or `dask` start a cluster on this machine, `ray:ADDRESS` and `dask:ADDRESS` use one that is
there, and without it they are processes of this machine. What is made depends on none of it: a shard's bytes are its seed's. Every node needs this
folder under the same path, the same packages and code (a share of others is refused), and an address of Prefect's server that it can reach.
"""

import os
import platform
import secrets
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import pipeline
from flows.dvc_runner.process import Kept, Line, Tell, lines
from flows.pipeline import StageFailed, Step
from flows.prefect_server import gpu_limit
from vla_opd.machine import proxies
from vla_opd.machine.host import LAUNCH, at_least_one
from vla_opd.machine.parent_death import STARTED_BY

SHARED = {
    "sample": "--iteration",
    "label": "--iteration",
    "explore": "--iteration",
    "evaluate": "--name",
}  # as the stages' own
CLUSTERS = {"ray": "prefect_ray", "dask": "prefect_dask"}
_RUNNING = set["subprocess.Popen[bytes]"]()  # the shares of this process, of whichever run
HANDED_ON = (
    "OPD_",
    "WANDB_",
    "MUJOCO_",
    "PYTHONPATH",
)  # beginnings of the environment variables that the nodes get


@dataclass(frozen=True)
class Spread:
    """How many shares a stage is cut into, and who makes them: `ray`, `dask` or this machine (``), at an address or started for it."""

    count: int
    cluster: str = ""
    address: str | None = None


def wanted() -> Spread | None:
    """What the environment says; None for no shares. ValueError for what it can't mean."""
    said, where = os.environ.get("OPD_SHARES", "1"), os.environ.get("OPD_CLUSTER", "")
    count = at_least_one("OPD_SHARES", said, "shares")
    if not (workers := os.environ.get("OPD_WORKERS", "0")).isdecimal():
        raise ValueError(
            f"OPD_WORKERS is {workers!r}; expected a number of simulator processes, or 0 for one a core"
        )
    cluster, _, address = where.partition(":")
    if cluster and cluster not in CLUSTERS:
        raise ValueError(
            f"OPD_CLUSTER is {where!r}; expected ray, ray:ADDRESS, dask or dask:ADDRESS (or nothing: processes of this machine)"
        )
    if cluster and find_spec(CLUSTERS[cluster]) is None:
        raise ValueError(
            f"OPD_CLUSTER is {where!r}; expected {CLUSTERS[cluster].replace('_', '-')} to be installed (pip install 'vla-opd[cluster]')"
        )
    return Spread(count, cluster, address or None) if count > 1 else None


def make(step: Step, tell: Tell) -> str:
    """The shares of a stage that DVC would run now, if there are to be any. Their launch, which the stage has to know when it puts them together.

    What a share leaves undone, the stage does. StageFailed with the last lines of the first, if none was made.
    """
    spread = wanted()
    if spread is None or step.verb not in SHARED or not pipeline.would_run(step.name):
        return ""
    launch = secrets.token_hex(4)
    side_by_side = shares.with_options(
        flow_run_name=f"{step.name} in {spread.count} shares", task_runner=_runner(spread)
    )
    told = side_by_side(step.name, spread, str(Path.cwd()), launch)
    failed = [said for said in told if said]
    for said in failed:
        tell(Line(said))
    if len(failed) == spread.count:
        raise StageFailed(step.name, failed[0].splitlines())
    tell(Line(f"{spread.count - len(failed)} of {spread.count} shares are made"))
    return launch


@flow(name="shares", validate_parameters=False)
def shares(stage: str, spread: Spread, folder: str, launch: str) -> list[str]:
    """Every share of a stage a task. What each that failed said; nothing of one that didn't."""
    with _placed(spread) as its:
        environment = (
            {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
            | its
            | {LAUNCH: launch}
        )
        futures = [
            share.with_options(task_run_name=f"{stage}, {number} of {spread.count}").submit(
                stage,
                f"{number}/{spread.count}",
                folder,
                environment | ({} if spread.cluster == "ray" or spread.address else _gpu(number)),
            )
            for number in range(1, spread.count + 1)
        ]
        try:
            return [_outcome(future) for future in futures]
        except (
            BaseException
        ):  # the run is ended; the threads that wait for these processes would wait on
            for process in list(_RUNNING):
                process.terminate()
            raise


def _outcome(future: PrefectFuture[str]) -> str:
    try:
        found = future.result(raise_on_failure=False)
    except Exception as error:  # noqa: BLE001 - Ray's own, of a node or a worker that is gone
        found = error
    return found if isinstance(found, str) else f"a share was lost: {found}"


@task(cache_policy=NO_CACHE)
def share(stage: str, part: str, folder: str, environment: Mapping[str, str]) -> str:
    """One share of a stage, in a process of its own on whatever machine this is. What it said last, if it failed."""
    verb, _, key = stage.partition("@")
    if not Path(folder).is_dir():
        return f"{platform.node()}: no {folder} here; expected the folder of the run, on a file system that every node sees"
    command = [sys.executable, "-m", "stages", verb, SHARED[verb], key, "--share", part]
    kept, said = Kept(get_run_logger()), deque[str](maxlen=15)
    its = proxies.restored(os.environ | dict(environment)) | {STARTED_BY: str(os.getpid())}
    with subprocess.Popen(
        command, cwd=folder, env=its, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        _RUNNING.add(process)
        for line in lines(process.stdout):
            kept.tell(line)
            if not line.passing:
                said.append(line.text)
    _RUNNING.discard(process)
    return (
        ""
        if process.returncode == 0
        else f"share {part} on {platform.node()} ended with {process.returncode}\n"
        + "\n".join(said)
    )


def _gpu(number: int) -> dict[str, str]:
    """On this machine, one of its GPUs for each share in turn."""
    devices = gpu_limit.devices()
    named = ":" in os.environ.get("OPD_DEVICE", "")
    return (
        {"CUDA_VISIBLE_DEVICES": devices[(number - 1) % len(devices)]}
        if len(devices) > 1 and not named
        else {}
    )


def _runner(spread: Spread) -> TaskRunner[Any]:
    if spread.cluster == "ray":
        from prefect_ray import RayTaskRunner

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        told = {
            "log_to_driver": False,
            "runtime_env": {"env_vars": {"PREFECT_API_URL": PREFECT_API_URL.value()}},
        }
        return RayTaskRunner(
            spread.address, told if spread.address else told | {"include_dashboard": False}
        )
    if spread.cluster == "dask":
        from prefect_dask import DaskTaskRunner

        return DaskTaskRunner(address=spread.address)
    return ThreadPoolTaskRunner(max_workers=spread.count)


@contextmanager
def _placed(spread: Spread) -> Generator[dict[str, str]]:
    """How many simulators a share has, where that isn't said: on this machine its part of the cores; on a node of Ray that of one of the node's GPUs.

    Ray spreads the shares over its nodes, as many at a time as have such a part; it hides GPUs from who doesn't ask for one.
    """
    said, here = (
        os.environ.get("OPD_WORKERS", "0"),
        str(max(1, len(os.sched_getaffinity(0)) // spread.count)),
    )
    if spread.cluster != "ray":
        yield {} if said != "0" or spread.address else {"OPD_WORKERS": here}
        return
    import ray
    from prefect_ray.context import remote_options

    nodes = [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
    ]
    with_gpu = (
        0 if os.environ.get("OPD_DEVICE") == "cpu" else sum(bool(node.get("GPU")) for node in nodes)
    )
    if with_gpu not in (0, len(nodes)):
        raise ValueError(
            f"OPD_CLUSTER: {with_gpu} of {len(nodes)} nodes have GPUs; expected all or none (a head without CPUs, OPD_DEVICE=cpu)"
        )
    part = (
        int(min(node["CPU"] // max(1, node.get("GPU", 0)) for node in nodes))
        if spread.address
        else int(here)
    )
    workers = max(1, min(int(said) or part, int(min(node["CPU"] for node in nodes))))
    with remote_options(
        scheduling_strategy="SPREAD", num_cpus=workers, num_gpus=1 if with_gpu else 0
    ):
        yield {"OPD_WORKERS": said if said != "0" else str(workers)}
