"""One stage at a time on this machine's GPU, across flow runs.

It is a global concurrency limit in Prefect, named after the machine.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from stages.catalog import BEHIND, STAGES

LIMIT = f"opd-gpu-{platform.node()}"
DRIVER = Path("/proc/driver/nvidia/version")


def needs_gpu(verb: str) -> bool:
    """Return whether a stage will use a GPU, without importing torch.

    With `--device auto` it does if the machine has one.
    """
    if not STAGES[BEHIND[verb]].on_device:
        return False
    device = os.environ.get("OPD_DEVICE", "auto")
    return device.startswith("cuda") or (device == "auto" and DRIVER.is_file())


def visible_gpus() -> list[str]:
    """Return the GPUs that a stage may use, by their names in `CUDA_VISIBLE_DEVICES`.

    Torch is not imported for it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    count = len(list(DRIVER.with_name("gpus").glob("*")))
    return [str(number) for number in range(count)]


@contextmanager
def hold_gpu(verb: str) -> Generator[None]:
    """Wait for the GPU if the stage needs it, and hold it for the duration of the context.

    The lease of a process that dies expires by itself.
    """
    if not needs_gpu(verb):
        yield
        return
    from prefect.concurrency.sync import concurrency

    ensure_limit()
    with concurrency(LIMIT, occupy=1):
        yield


def ensure_limit() -> None:
    """Create the limit of one stage, unless it exists.

    For two GPUs, set it to 2 with `prefect gcl update NAME --limit 2`.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
