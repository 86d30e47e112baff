"""The table of `opd plan --memory`: what a run needs of device and host memory and disk."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from flows.cli.answers import table
from vla_opd.learning import memory_estimate
from vla_opd.lineage.store import ROOT
from vla_opd.machine.host import resolve_host
from vla_opd.params.run import Params
from vla_opd.params.stages import INITIAL_STUDENT

USABLE = 0.9  # fraction of device memory; driver, libraries and fragmentation take the remainder
COLUMNS = ["weights", "gradients", "moments", "activations", "together"]
REMEDIES = {
    "label": "a smaller label.batch_size",
    "anchor": "optimize.anchor 0, or a smaller optimize.batch_size",
    "optimize": (
        "optimize.gradient_checkpointing, a smaller optimize.batch_size, "
        "an adapter (optimize.lora_rank)"
    ),
    "reinforce": (
        "reinforce.gradient_checkpointing, a smaller reinforce.batch_size, "
        "an adapter (reinforce.lora_rank)"
    ),
}


def plan(run: Params, capacity_gb: float | None, processes: int = 1) -> tuple[str, list[str]]:
    """Return the tables of memory, and messages about what does not fit.

    capacity_gb: the device's memory; by default that of this machine's device.
    processes:   how many train together, each on a device of its own.
    ValueError for a checkpoint that is not described anywhere yet.
    """
    root = ROOT / run.run.name
    device, capacity = _device(capacity_gb)
    needs = memory_estimate.device_needs(run, root, processes)
    start = memory_estimate.describe(run, root, INITIAL_STUDENT)
    data = memory_estimate.iteration_data(run, start.facts)
    held = data.held
    if processes > 1:  # every process holds the whole policy, and again while it is sharded
        held = processes * (data.held + 2 * needs[0].weights)
    text = "\n".join(
        [
            _device_table(needs, processes),
            f"  of {device} at most {USABLE:.0%} can be used",
            "",
            _host_table(data, held, processes),
            f"  the host has {_format_size(psutil.virtual_memory().total)}",
        ]
    )
    return text, _list_excesses(needs, capacity, held)


def _device(capacity_gb: float | None) -> tuple[str, int]:
    """Return a description of the device, and its memory in bytes."""
    name = resolve_host(1, os.environ.get("OPD_DEVICE", "auto"), "none", Path()).device
    if capacity_gb is not None:
        capacity = round(capacity_gb * 1e9)
        return _format_size(capacity), capacity
    capacity = psutil.virtual_memory().total
    if name.startswith("cuda"):
        capacity = torch.cuda.get_device_properties(name).total_memory
    return f"{name}: {_format_size(capacity)}", capacity


def _device_table(needs: Sequence[memory_estimate.Need], processes: int) -> str:
    title = "on the device" if processes == 1 else f"on each of {processes} devices"
    rows: list[tuple[str, ...]] = []
    for need in needs:
        parts = [need.weights, need.gradients, need.moments, need.activations, need.total]
        sizes = map(_format_size, parts)
        rows.append((need.stage, *sizes))
    return table([title, *COLUMNS], rows)


def _host_table(data: memory_estimate.IterationData, held: int, processes: int) -> str:
    memory = "in the host's memory"
    if processes > 1:
        memory = f"in the memory of a host of all {processes}, with the policy twice for each"
    sizes = {"frames": data.frames, "labels": data.labels, memory: held}
    rows = [(name, _format_size(size)) for name, size in sizes.items()]
    title = f"of an iteration, {data.states} states at most"
    return table([title, "before compression"], rows)


def _list_excesses(needs: Sequence[memory_estimate.Need], capacity: int, held: int) -> list[str]:
    usable = round(USABLE * capacity)
    host = psutil.virtual_memory().total
    messages: list[str] = []
    for need in needs:
        if need.total > usable:
            default = f"a smaller {need.stage}.inference_batch"
            messages.append(
                f"{need.stage} needs {_format_size(need.total)} on the device; expected at most "
                f"{_format_size(usable)} ({REMEDIES.get(need.stage, default)})"
            )
    if held > host:
        messages.append(
            f"optimize needs {_format_size(held)} of the host's memory; expected at most "
            f"{_format_size(host)} (fewer sample.prompts, a larger sample.observe_every)"
        )
    return messages


def _format_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
