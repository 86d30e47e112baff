"""The teacher's log-probabilities over all V bins, at every kept state of a trajectory artifact, aligned shard by shard and row by row; and, where it
was asked, from which of the states it still succeeds.

A shard of a logit store labels the shard of its name of the trajectories whose digest the manifest names. Full, not top-k: 32 of 256 bins hold only
81 % of a broad teacher's mass. In float16 a token's KL is off by up to 1e-3 nats, its mean over 64 states by less than 5e-6 (measured: docs/log.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vla_opd.data import zarr_zip
from vla_opd.data.action_space import gaussian


class Cost(NamedTuple):
    """What was simulated to label: control steps, without those that led to the labelled states again, and the teacher's decisions in them."""

    env_steps: int = 0
    decisions: int = 0


@dataclass(frozen=True)
class Labels:
    """Of N states: normalised log-probabilities (nats, temperature 1), and what they cost.

    recoverable: whether the teacher still succeeds from there, if that was tried.
    given:       which of the chunk's S actions were labelled at all, if not every one.
    """

    log_probs: Float[np.ndarray, "N K V"]
    recoverable: Bool[np.ndarray, " N"] | None = None
    given: Bool[np.ndarray, "N S"] | None = None
    cost: Cost = field(default_factory=Cost)

    def labelled(self, mask: Bool[np.ndarray, "N K"]) -> Bool[np.ndarray, "N K"]:
        """Of the valid tokens of the states, those that were labelled."""
        return (
            mask
            if self.given is None
            else mask & np.repeat(self.given, mask.shape[1] // self.given.shape[1], axis=1)
        )


def write_shard(path: Path, labels: Labels) -> None:
    """Write the labels of one shard."""
    columns = {
        "log_probs": labels.log_probs,
        "recoverable": labels.recoverable,
        "given": labels.given,
    }
    there = {name: values for name, values in columns.items() if values is not None}
    zarr_zip.write(path, there, {"format": 1} | (labels.cost._asdict() if any(labels.cost) else {}))


def read_shard(path: Path, states: int) -> Labels:
    """The labels of a shard of `states` states. ValueError if it labels another number of states."""
    columns, attributes = zarr_zip.read(path, ("log_probs", "recoverable", "given"))
    if "log_probs" not in columns:
        raise ValueError(f"{path}: has no log_probs; expected the labels of {states} states")
    if (
        odd := next((len(values) for values in columns.values() if len(values) != states), None)
    ) is not None:
        raise ValueError(
            f"{path}: labels {odd} states; expected the {states} of the trajectory shard of that name"
        )
    return Labels(**columns, cost=_cost(attributes))


def read_outcome(path: Path) -> tuple[Cost, Bool[np.ndarray, " N"] | None]:
    """What a shard cost, and from which of its states the teacher still succeeds, if that was tried; without reading the log-probabilities."""
    columns, attributes = zarr_zip.read(path, ("recoverable",))
    return _cost(attributes), columns.get("recoverable")


def _cost(attributes: Mapping[str, Any]) -> Cost:
    return Cost(*(int(attributes.get(name, 0)) for name in Cost._fields))


def spread(
    bins: Int[np.ndarray, "N K"], width: int, sigma: float, dtype: str
) -> Float[np.ndarray, "N K V"]:
    """Around one of V = `width` bins a token: log p(v) = -(v - bin)^2 / (2 sigma^2) - log Z, as stored; finite everywhere."""
    log_probs = torch.from_numpy(gaussian(width, sigma)).log_softmax(-1).numpy()
    return log_probs.clip(min=np.finfo(dtype).min).astype(dtype)[bins]


def normalised(
    logits: Float[torch.Tensor, "N K V"], dtype: str
) -> Callable[[], Float[np.ndarray, "N K V"]]:
    """The log-softmax over the bins, as stored: on its way to the host, and there once it is called for. Till then a GPU may be asked for more."""
    found, arrived = torch.log_softmax(logits.float(), -1), None
    if found.device.type == "cuda":
        stream, arrived = torch.cuda.current_stream(found.device), torch.cuda.Event()
        found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(
            found, non_blocking=True
        )
        arrived.record(stream)

    def call() -> Float[np.ndarray, "N K V"]:
        if arrived is not None:
            arrived.synchronize()
        return found.numpy().astype(dtype)

    return call
