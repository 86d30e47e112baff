"""The teacher's answers: log-probabilities over all V bins at every kept state of a trajectory
artifact and, if that was tried, from which of the states the teacher still succeeds.

A shard of labels belongs to the trajectory shard of the same name, shard by shard and row by row;
the manifest names the digest of the trajectories. All bins are stored, not the top k: 32 of 256
bins hold only 81 % of a broad teacher's mass. In float16 a token's KL is off by up to 1e-3 nats,
its mean over 64 states by less than 5e-6 (measured: docs/log.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vla_opd.data import zarr_zip
from vla_opd.data.action_space import gaussian_logits


class LabelCost(NamedTuple):
    """Simulation that labelling took: control steps, and the teacher's decisions in them.

    Steps that replay an episode up to a labelled state do not count.
    """

    env_steps: int = 0
    decisions: int = 0


@dataclass(frozen=True)
class Labels:
    """Labels of N states: normalised log-probabilities (nats, temperature 1), and their cost.

    recoverable: whether the teacher still succeeds from each state; None if that was not tried.
    given:       which of the chunk's S actions were labelled; None if all were.
    """

    log_probs: Float[np.ndarray, "N K V"]
    recoverable: Bool[np.ndarray, " N"] | None = None
    given: Bool[np.ndarray, "N S"] | None = None
    cost: LabelCost = field(default_factory=LabelCost)

    def restrict(self, mask: Bool[np.ndarray, "N K"]) -> Bool[np.ndarray, "N K"]:
        """Restrict a mask of valid tokens to those that were labelled."""
        if self.given is None:
            return mask
        chunk = self.given.shape[1]
        dims = mask.shape[1] // chunk
        given_tokens = np.repeat(self.given, dims, axis=1)
        return mask & given_tokens


def write_shard(path: Path, labels: Labels) -> None:
    """Write the labels of one shard."""
    columns = {"log_probs": labels.log_probs}
    if labels.recoverable is not None:
        columns["recoverable"] = labels.recoverable
    if labels.given is not None:
        columns["given"] = labels.given
    attributes = {"format": 1}
    if any(labels.cost):
        attributes |= labels.cost._asdict()
    zarr_zip.write(path, columns, attributes)


def read_shard(path: Path, states: int) -> Labels:
    """Read the labels of a shard of `states` states. ValueError if their numbers differ."""
    columns, attributes = zarr_zip.read(path, ("log_probs", "recoverable", "given"))
    if "log_probs" not in columns:
        raise ValueError(f"{path}: has no log_probs; expected the labels of {states} states")
    for values in columns.values():
        count = len(values)
        if count != states:
            raise ValueError(
                f"{path}: labels {count} states;"
                f" expected the {states} of the trajectory shard of that name"
            )
    cost = _read_cost(attributes)
    return Labels(**columns, cost=cost)


def read_outcome(path: Path) -> tuple[LabelCost, Bool[np.ndarray, " N"] | None]:
    """Read a shard's cost and `recoverable` without reading the log-probabilities."""
    columns, attributes = zarr_zip.read(path, ("recoverable",))
    return _read_cost(attributes), columns.get("recoverable")


def summarize_outcomes(paths: Sequence[Path], states: int) -> dict[str, int | float]:
    """Return the labels' cost and, if it was tried, the share of states the teacher recovers."""
    queries = states
    env_steps = 0
    recoverable: list[np.ndarray] = []
    for path in paths:
        cost, recovered = read_outcome(path)
        queries += cost.decisions
        env_steps += cost.env_steps
        if recovered is not None:
            recoverable.append(recovered)
    facts: dict[str, int | float] = {"teacher_queries": queries, "env_steps": env_steps}
    if recoverable:
        facts["recoverable"] = float(np.concatenate(recoverable).mean())
    return facts


def _read_cost(attributes: Mapping[str, Any]) -> LabelCost:
    return LabelCost(
        env_steps=int(attributes.get("env_steps", 0)),
        decisions=int(attributes.get("decisions", 0)),
    )


def smooth_bins(
    bins: Int[np.ndarray, "N K"], width: int, sigma: float, dtype: str
) -> Float[np.ndarray, "N K V"]:
    """Spread each bin over its neighbours, V = `width` in all, by a Gaussian.

    log p(v) = -(v - bin)^2 / (2 sigma^2) - log Z, in the stored precision; finite everywhere.
    """
    logits = torch.from_numpy(gaussian_logits(width, sigma))
    log_probs = torch.log_softmax(logits, -1).numpy()
    smallest = np.finfo(dtype).min
    finite = log_probs.clip(min=smallest).astype(dtype)
    return finite[bins]


def start_log_softmax(
    logits: Float[torch.Tensor, "N K V"], dtype: str
) -> Callable[[], Float[np.ndarray, "N K V"]]:
    """Start to compute log-probabilities over the bins; the returned function waits for them.

    Until it is called, a GPU can go on with other work while the values are copied to the host.
    """
    log_probs = logits.float().log_softmax(-1)
    copied = None
    if log_probs.device.type == "cuda":
        stream = torch.cuda.current_stream(log_probs.device)
        copied = torch.cuda.Event()
        pinned = torch.empty_like(
            log_probs,
            device="cpu",
            pin_memory=True,
        )
        log_probs = pinned.copy_(log_probs, non_blocking=True)
        copied.record(stream)

    def wait() -> Float[np.ndarray, "N K V"]:
        if copied is not None:
            copied.synchronize()
        return log_probs.numpy().astype(dtype)

    return wait
