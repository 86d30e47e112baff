"""Curves, host and wall time: to W&B, or to JSON lines. Never a prompt, never a failure, and never part of an artifact.

With an account (a key in the environment or in ~/.netrc) W&B is online, without one offline; `WANDB_MODE` decides where it is set. One W&B run per
execution of a stage, grouped by the name of the run: resuming an offline run is not supported by W&B, and runs that share an id overwrite each other.
"""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_opd.host import Host

Log = Callable[[Mapping[str, float], int], None]


@contextmanager
def track(host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]) -> Generator[Log]:
    """`log(metrics, step)` for one execution of a stage. Metrics are numbers by name; `step` counts what the stage repeats."""
    with _jsonl(host, run, stage, name) as lines:
        online = _wandb(host, run, stage, name, config) if host.tracking == "wandb" else None

        def log(metrics: Mapping[str, float], step: int) -> None:
            lines(metrics, step)
            if online is not None:
                online.log({f"{stage}/{key}": value for key, value in metrics.items()}, step=step)

        try:
            yield log
        finally:
            if online is not None:
                online.finish()


@contextmanager
def _jsonl(host: Host, run: str, stage: str, name: str) -> Generator[Log]:
    if host.tracking == "none":
        yield lambda _metrics, _step: None
        return
    path = host.metrics / run / f"{stage}-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:

        def log(metrics: Mapping[str, float], step: int) -> None:
            stream.write(json.dumps({"time": time.time(), "host": platform.node(), "step": step, **metrics}) + "\n")
            stream.flush()

        yield log


def _wandb(host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]) -> Any:  # a wandb.Run or None; imported lazily
    """A W&B run, or None with a warning if W&B cannot start at all."""
    import wandb  # slow to import, and not wanted with other trackers

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    try:
        return wandb.init(
            project="vla-opd",
            group=run,
            job_type=stage,
            name=f"{stage}-{name}",
            dir=host.metrics,
            config=dict(config),
            mode=mode,  # pyright: ignore[reportArgumentType] - WANDB_MODE is free text; wandb.init checks it
            settings=wandb.Settings(silent=True, init_timeout=20, console="off"),
        )
    except (wandb.Error, OSError, ValueError) as error:
        warnings.warn(f"W&B did not start ({error}); metrics go to {host.metrics} as JSON lines only", stacklevel=2)
        return None


def _has_key() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
