"""The teacher's log-probabilities over all V bins, at every kept state of a trajectory artifact, aligned shard by shard and row by row.

A shard of a logit store labels the shard of its name of the trajectories whose digest the manifest names. Full, not top-k: 32 of 256 bins hold only
81 % of a broad teacher's mass. In float16 a token's KL is off by up to 1e-3 nats, its mean over 64 states by less than 5e-6 (measured: docs/log.md).
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from vla_opd import arrays


def write_shard(path: Path, log_probs: Float[np.ndarray, "N K V"]) -> None:
    """Write normalised log-probabilities (nats, temperature 1) of one shard's N states."""
    arrays.write(path, {"log_probs": log_probs}, {"format": 1})


def read_shard(path: Path, states: int) -> Float[np.ndarray, "N K V"]:
    """Log-probabilities of a shard of `states` states. ValueError if it labels another number of states."""
    columns, _ = arrays.read(path)
    log_probs = columns["log_probs"]
    if len(log_probs) != states:
        raise ValueError(f"{path}: labels {len(log_probs)} states; expected the {states} of the trajectory shard of that name")
    return log_probs


def normalised(logits: Float[torch.Tensor, "N K V"], dtype: str) -> Float[np.ndarray, "N K V"]:
    """The log-softmax over the bins, as stored."""
    return torch.log_softmax(logits.float(), -1).cpu().numpy().astype(dtype)
