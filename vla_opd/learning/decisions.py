"""What a rollout decided: the tokens that it took, how likely they were to it, and what came of them; aligned row by row with `read_states`.

Objectives that learn from the rollout's own tokens (`vla_opd.learning.objectives.ON_DECISIONS`, `grpo`) are asked at these states only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64

from vla_opd.data import zarr_zip
from vla_opd.learning.objectives import episode_weight, group_advantage
from vla_opd.params.objective import GroupParams


@dataclass(frozen=True)
class Decisions:
    """Of N kept states, what the rollout decided there, or, inside a chunk, at the chunk's beginning.

    decided:   whether the state is one at which it decided.
    tokens:    the bins that it took; log_probs: their log-probabilities then, in nats, at its temperature.
    episode:   which episode each state belongs to, and group: which group; both counted over all shards.
    success:   of the episode.
    """

    decided: Bool[np.ndarray, " N"]
    tokens: Int64[np.ndarray, "N K"]
    log_probs: Float32[np.ndarray, "N K"]
    episode: Int[np.ndarray, " N"]
    group: Int[np.ndarray, " N"]
    success: Bool[np.ndarray, " N"]

    def graded(self, mask: Bool[np.ndarray, "N K"], settings: GroupParams) -> "Graded":
        """What GRPO makes of their outcomes. ValueError for groups of one.

        mask: the tokens that count.
        """
        advantage, usable = np.zeros(len(mask), np.float32), self.decided & mask.any(1)
        for group in np.unique(self.group):
            rows = np.flatnonzero(self.group == group)
            _, first, which = np.unique(self.episode[rows], return_index=True, return_inverse=True)
            success = self.success[rows[first]]
            advantage[rows] = group_advantage(torch.from_numpy(success)).numpy()[which]
            usable[rows] &= settings.keeps(success.mean().item())
        weight = np.zeros(len(mask), np.float32)
        if usable.any():
            weight[usable] = episode_weight(
                torch.from_numpy(mask[usable]), torch.from_numpy(self.episode[usable])
            ).numpy()
        return Graded(advantage, usable, weight)


@dataclass(frozen=True)
class Graded:
    """Of N states: the advantage of the episode, whether the state is one to learn from, and its weight among those, see `episode_weight`."""

    advantage: Float32[np.ndarray, " N"]
    usable: Bool[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]


def read_decisions(paths: Sequence[Path], chunk: int) -> Decisions:
    """The decisions behind the states that `read_states` gives of the same shards, each of which is a group."""
    groups = [_group(path, number, chunk) for number, path in enumerate(paths)]
    episodes = np.cumsum([0] + [group.episode[-1] + 1 for group in groups])
    whole = {
        field.name: np.concatenate([getattr(group, field.name) for group in groups])
        for field in fields(Decisions)
        if field.name != "episode"
    }
    return Decisions(
        **whole,
        episode=np.concatenate(
            [group.episode + before for group, before in zip(groups, episodes, strict=False)]
        ),
    )


def _group(path: Path, number: int, chunk: int) -> Decisions:
    columns, _ = zarr_zip.read(
        path, ("step", "states", "decisions", "tokens", "log_probs", "success")
    )  # not the frames
    episode = np.repeat(np.arange(len(columns["states"])), columns["states"])
    decision = (np.cumsum(columns["decisions"]) - columns["decisions"])[episode] + columns[
        "step"
    ] // chunk
    return Decisions(
        decided=columns["step"] % chunk == 0,
        tokens=columns["tokens"][decision].astype(np.int64),
        log_probs=columns["log_probs"][decision],
        episode=episode,
        group=np.full(len(episode), number),
        success=columns["success"][episode],
    )


def failed_share(paths: Sequence[Path], mask: Bool[np.ndarray, "N K"]) -> float:
    """The share of the valid tokens of all states of some shards, and so of the labels' say, that lies in episodes that failed; 0 of none."""
    columns = [zarr_zip.read(path, ("states", "success"))[0] for path in paths]
    failed = np.concatenate([np.repeat(~one["success"], one["states"]) for one in columns])
    return float(mask[failed].sum() / max(1, mask.sum()))
