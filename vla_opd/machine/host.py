"""The machine that a stage runs on. It is no part of a result, and so not in `params.yaml`."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vla_opd.artifacts.draft import ALL, Share

TrackingMode = Literal["wandb", "jsonl", "none"]
METRICS = Path("artifacts/.metrics")  # one folder per run: curves and executions

# Environment variables that a flow sets for the stages that it runs.
LAUNCH = "OPD_LAUNCH"  # shared by the shares of a stage and the process that publishes them
TASK_RUN = "OPD_TASK_RUN"  # the stage's Prefect task run


@dataclass(frozen=True)
class Host:
    """The machine, and this process's role on it.

    workers:   number of simulator processes.
    device:    torch device.
    metrics:   the folder for curves and executions.
    timeout_s: seconds after which a silent simulator counts as hung.
    share:     the shards of the stage that this process makes. Other processes make the rest, and
               one of them publishes the artifact.
    execution: the id of this run of a stage, in the record of executions and in W&B.
    task_run:  the id of its Prefect task run; empty without Prefect.
    graphs:    capture the forward passes of rollouts as CUDA graphs.
    """

    workers: int = 1
    device: str = "cpu"
    tracking: TrackingMode = "none"
    metrics: Path = METRICS
    timeout_s: float = 300.0
    share: Share = ALL
    execution: str = ""
    task_run: str = ""
    graphs: bool = False

    @property
    def compute_params(self) -> dict[str, str | bool]:
        """What the last bits of a rollout may depend on, for the manifest."""
        if self.graphs:
            return {"device": self.device, "graphs": True}
        return {"device": self.device}

    def dump_folder(self, run: str) -> Path:
        """Return the folder that keeps a run's optimiser steps with non-finite numbers."""
        return self.metrics / run / "not_finite"


def parse_processes(text: str) -> int:
    """Parse the number of processes that train together. ValueError unless it is at least 1."""
    return parse_count("OPD_PROCESSES, or --processes,", text, "processes")


def parse_flag(field: str, text: str) -> bool:
    """Parse a flag of the environment or the command line. ValueError unless 0, 1 or empty."""
    if text not in ("", "0", "1"):
        raise ValueError(f"{field} is {text!r}; expected 0 or 1")
    return text == "1"


def parse_count(field: str, text: str, unit: str) -> int:
    """Parse a number of the environment or the command line. ValueError unless at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{field} is {text!r}; expected a number of {unit}, at least 1")
    return int(text)


def require_equal_shares(batch_sizes: Mapping[str, int], count: int) -> None:
    """Check that batches can be divided equally among `count` processes that train together.

    ValueError names the first setting whose batch can't.
    """
    for setting, size in batch_sizes.items():
        if size % count:
            raise ValueError(
                f"{setting} is {size}; expected a multiple of the {count} processes that are to "
                "train together"
            )


def require_equal_bits() -> None:
    """Make MKL sum in the same order in every process of this machine, before its first use.

    Otherwise the order may depend on the alignment of memory and on the timing of threads.
    STRICT: for any number of threads. Source: oneMKL Developer Guide, "Obtaining Numerically
    Reproducible Results".
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def let_waiting_threads_sleep() -> None:
    """Make OpenMP's threads sleep, not spin, where they wait for each other.

    Spinning is as fast on idle cores. Beside another process it takes the time that the thread
    waited for needs: an optimizer step took 2.5 times as long. Call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def resolve_host(
    workers: int | None, device: str, tracking: TrackingMode, metrics: Path, *, graphs: bool = False
) -> Host:
    """Return the host with `auto` resolved: one worker per core, the GPU if there is one.

    ValueError names what this machine does not have.
    """
    import torch  # slow to import, and `python -m stages --help` should be fast

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_cuda = device.startswith("cuda")
    is_known = device.partition(":")[0] in ("cpu", "cuda")
    if not is_known or (is_cuda and not torch.cuda.is_available()):
        raise ValueError(
            f"device is {device!r}; expected 'auto', 'cpu' or, where torch sees one, 'cuda'"
        )
    modes = get_args(TrackingMode)
    if tracking not in modes:  # argparse doesn't check a default from the environment
        raise ValueError(f"tracking is {tracking!r}; expected one of {list(modes)}")
    if graphs and not is_cuda:
        raise ValueError(
            f"OPD_GRAPHS, or --graphs, with the device {device!r}; expected a GPU for CUDA graphs"
        )
    return Host(
        workers or len(os.sched_getaffinity(0)),
        device,
        tracking,
        metrics,
        execution=secrets.token_hex(4),
        task_run=os.environ.get(TASK_RUN, ""),
        graphs=graphs,
    )
