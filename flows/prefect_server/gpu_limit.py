"""One stage at a time on this machine's GPU, whichever flow run it belongs to: a concurrency limit of Prefect's, named after the machine."""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LIMIT = f"opd-gpu-{platform.node()}"
STAGES = (
    "pretrain",
    "finetune",
    "sample",
    "label",
    "optimize",
    "explore",
    "reinforce",
    "evaluate",
)  # of dvc.yaml, those that run a policy
DRIVER = Path("/proc/driver/nvidia/version")


def needed(verb: str) -> bool:
    """Whether a stage will use a GPU: `--device auto` takes one where there is one. Found out without importing torch."""
    device = os.environ.get("OPD_DEVICE", "auto")
    return verb in STAGES and (device.startswith("cuda") or (device == "auto" and DRIVER.is_file()))


def devices() -> list[str]:
    """The GPUs of this machine that a stage may see, as `CUDA_VISIBLE_DEVICES` names them. Found out without importing torch."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one for one in told.split(",") if one]
    return [str(number) for number, _ in enumerate(sorted(DRIVER.with_name("gpus").glob("*")))]


@contextmanager
def held(verb: str) -> Generator[None]:
    """Wait for the GPU if the stage needs it, and keep it for as long as the context lasts. The lease of a holder that dies runs out by itself."""
    if not needed(verb):
        yield
        return
    from prefect.concurrency.sync import concurrency

    ensure_limit()
    with concurrency(LIMIT, occupy=1):
        yield


def ensure_limit() -> None:
    """Make the limit, of one stage, unless there is one: whoever has two GPUs sets it to 2 (`prefect gcl update NAME --limit 2`)."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
