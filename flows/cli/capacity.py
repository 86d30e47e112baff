"""What a run will take of a device's memory, of the host's and of the disk, as the person at the terminal sees it, and whether it fits."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from flows.cli.answers import rows
from vla_opd.learning import memory_estimate
from vla_opd.lineage.store import ROOT
from vla_opd.machine.host import this_host
from vla_opd.params.run import Params
from vla_opd.params.stages import START

USABLE = 0.9  # of a device's memory: its driver, its libraries and what lies between the allocator's blocks take the rest


def plan(run: Params, capacity_gb: float | None, processes: int = 1) -> tuple[str, list[str]]:
    """The table, and what doesn't fit. capacity_gb: of the device; that of the one that is here, if none is given.

    processes: that train together, each on such a device.
    ValueError for a checkpoint of which nothing is known yet.
    """
    here, root = (
        this_host(1, os.environ.get("OPD_DEVICE", "auto"), "none", Path()).device,
        ROOT / run.run.name,
    )
    capacity = _capacity(here) if capacity_gb is None else round(capacity_gb * 1e9)
    needs = memory_estimate.device(run, root, processes)
    table = rows(
        [
            "on the device" if processes == 1 else f"on each of {processes} devices",
            "weights",
            "gradients",
            "moments",
            "activations",
            "together",
        ],
        [_row(need) for need in needs],
    )
    device = f"{here}: {_size(capacity)}" if capacity_gb is None else _size(capacity)
    left = memory_estimate.stored(run, memory_estimate.described(run, root, START).facts)
    held = (
        left.held if processes == 1 else processes * (left.held + 2 * needs[0].weights)
    )  # the policy whole, and what is cut up
    where = (
        "in the host's memory"
        if processes == 1
        else f"in the memory of a host of all {processes}, with the policy twice for each"
    )
    host = [("frames", _size(left.frames)), ("labels", _size(left.labels)), (where, _size(held))]
    return "\n".join(
        [
            table,
            f"  of {device} at most {USABLE:.0%} are to be had",
            "",
            rows([f"of an iteration, {left.states} states at most", "before compression"], host),
            f"  the host has {_size(psutil.virtual_memory().total)}",
        ]
    ), _too_much(needs, capacity, held)


def _too_much(needs: Sequence[memory_estimate.Need], capacity: int, held: int) -> list[str]:
    usable, host = round(USABLE * capacity), psutil.virtual_memory().total
    found = [
        f"{one.stage} needs {_size(one.total)} on the device; expected at most {_size(usable)} ({_less(one.stage)})"
        for one in needs
        if one.total > usable
    ]
    if held > host:
        less = "fewer sample.prompts, a larger sample.observe_every"
        found.append(
            f"optimize needs {_size(held)} of the host's memory; expected at most {_size(host)} ({less})"
        )
    return found


def _less(stage: str) -> str:
    return {
        "label": "a smaller label.batch_size",
        "anchor": "optimize.anchor 0, or a smaller optimize.batch_size",
        "optimize": "optimize.gradient_checkpointing, a smaller optimize.batch_size, an adapter (optimize.lora_rank)",
        "reinforce": "reinforce.gradient_checkpointing, a smaller reinforce.batch_size, an adapter (reinforce.lora_rank)",
    }.get(stage, f"a smaller {stage}.inference_batch")


def _capacity(device: str) -> int:
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.startswith("cuda")
        else psutil.virtual_memory().total
    )


def _row(need: memory_estimate.Need) -> tuple[str, ...]:
    return need.stage, *(
        _size(part)
        for part in (need.weights, need.gradients, need.moments, need.activations, need.total)
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
