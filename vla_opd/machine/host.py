"""The machine that a stage happens to run on. None of it is part of a result, so none of it is in `params.yaml`."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vla_opd.artifacts.draft import ALL, Share

TrackingMode = Literal["wandb", "jsonl", "none"]
METRICS = Path("artifacts/.metrics")  # a folder a run: curves, how long stages took, who ran them
LAUNCH = "OPD_LAUNCH"  # the environment variable by which shares of a stage, and the stage, know that they belong together
TASK_RUN = "OPD_TASK_RUN"  # the environment variable by which a flow tells a stage which of its task runs it is


@dataclass(frozen=True)
class Host:
    """workers: simulator processes. device: torch device. metrics: where curves go. timeout_s: a simulator silent for longer is hung.

    share:     what of the stage's shards this process makes; others make the rest, and one puts them together then.
    execution: names this run of a stage, in the record of executions and as its id in W&B.
    task_run:  the Prefect task run that it is, if it is one.
    graphs:    forward passes of rollouts are captured as CUDA graphs.
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
    def computes(self) -> dict[str, str | bool]:
        """What of it a rollout's last bits may depend on, for the manifest."""
        return {"device": self.device} | ({"graphs": True} if self.graphs else {})

    def not_finite(self, run: str) -> Path:
        """Where a run's optimiser steps that went wrong are kept."""
        return self.metrics / run / "not_finite"


def processes(said: str) -> int:
    """How many processes train together. ValueError for what is no such number."""
    return at_least_one("OPD_PROCESSES, or --processes,", said, "processes")


def on_or_off(field: str, said: str) -> bool:
    """What a field of the environment or the command line says. ValueError for what is neither 0 nor 1."""
    if said not in ("", "0", "1"):
        raise ValueError(f"{field} is {said!r}; expected 0 or 1")
    return said == "1"


def at_least_one(field: str, said: str, what: str) -> int:
    """The number that a field of the environment or the command line says. ValueError for what is none, and for less than 1."""
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"{field} is {said!r}; expected a number of {what}, at least 1")
    return int(said)


def require_equal_shares(batch_sizes: Mapping[str, int], count: int) -> None:
    """ValueError for a batch, by its setting, that can't be shared out among the processes that are to train together."""
    for setting, size in batch_sizes.items():
        if size % count:
            raise ValueError(
                f"{setting} is {size}; expected a multiple of the {count} processes that are to train together"
            )


def require_equal_bits() -> None:
    """Ask MKL, before its first use in this process, for sums whose order is the same in every process on this machine.

    Otherwise it may take another order where memory is aligned otherwise or threads come in another sequence, as they do on a busy machine. STRICT:
    whatever the number of threads. Source: oneMKL Developer Guide, "Obtaining Numerically Reproducible Results".
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def this_host(
    workers: int | None, device: str, tracking: TrackingMode, metrics: Path, *, graphs: bool = False
) -> Host:
    """The host with `auto` resolved: one worker a core, the GPU if there is one. ValueError names what is not there."""
    import torch  # slow to import, and `python -m stages --help` should not be

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda") or (
        device.startswith("cuda") and not torch.cuda.is_available()
    ):
        raise ValueError(
            f"device is {device!r}; expected 'auto', 'cpu' or, where torch sees one, 'cuda'"
        )
    if tracking not in get_args(
        TrackingMode
    ):  # argparse checks the option, but not its default from the environment
        raise ValueError(
            f"tracking is {tracking!r}; expected one of {list(get_args(TrackingMode))}"
        )
    if graphs and not device.startswith("cuda"):
        raise ValueError(
            f"OPD_GRAPHS, or --graphs, with the device {device!r}; expected a GPU, whose graphs they are"
        )
    workers, task_run = workers or len(os.sched_getaffinity(0)), os.environ.get(TASK_RUN, "")
    return Host(
        workers,
        device,
        tracking,
        metrics,
        execution=secrets.token_hex(4),
        task_run=task_run,
        graphs=graphs,
    )
