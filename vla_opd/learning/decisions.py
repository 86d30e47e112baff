"""Decisions of a rollout: its tokens, their log-probabilities, and the outcome of the episode.

Rows are aligned with those of `read_states`. Objectives that learn from the rollout's own tokens
(`objectives.ON_DECISIONS`, `grpo`) use only the states at which the rollout decided.
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

COLUMNS = ("step", "states", "decisions", "tokens", "log_probs", "success")  # not the frames


@dataclass(frozen=True)
class Decisions:
    """The decision behind each of N kept states: at the state, or at the beginning of its chunk.

    decided:   True at states at which the rollout decided.
    tokens:    the sampled bins. log_probs: their recorded log-probabilities, in nats, at the
               rollout's temperature.
    episode:   index of the episode; group: index of the group; both counted over all shards.
    success:   of the episode.
    """

    decided: Bool[np.ndarray, " N"]
    tokens: Int64[np.ndarray, "N K"]
    log_probs: Float32[np.ndarray, "N K"]
    episode: Int[np.ndarray, " N"]
    group: Int[np.ndarray, " N"]
    success: Bool[np.ndarray, " N"]

    def advantages(self, mask: Bool[np.ndarray, "N K"], settings: GroupParams) -> "GrpoAdvantages":
        """Compare each episode with the others of its group. ValueError for groups of one.

        mask: valid tokens.
        """
        states = len(mask)
        advantage = np.zeros(states, np.float32)
        usable = self.decided & mask.any(1)
        for group in np.unique(self.group):
            rows = np.flatnonzero(self.group == group)
            success, index = self._outcomes(rows)
            success_rate = success.mean()
            usable[rows] &= settings.keeps(success_rate.item())
            advantages = group_advantage(torch.from_numpy(success))
            advantage[rows] = advantages.numpy()[index]

        weight = np.zeros(states, np.float32)
        if usable.any():
            weights = episode_weight(
                torch.from_numpy(mask[usable]),
                torch.from_numpy(self.episode[usable]),
            )
            weight[usable] = weights.numpy()
        return GrpoAdvantages(advantage, usable, weight)

    def _outcomes(
        self, rows: Int[np.ndarray, " R"]
    ) -> tuple[Bool[np.ndarray, " G"], Int[np.ndarray, " R"]]:
        """Return the success of each of a group's G episodes, and each row's episode among them."""
        episodes = self.episode[rows]
        _, first, index = np.unique(episodes, return_index=True, return_inverse=True)
        first_rows = rows[first]
        return self.success[first_rows], index


@dataclass(frozen=True)
class GrpoAdvantages:
    """Advantages of N states.

    advantage: of the state's episode. usable: states to learn from. weight: of each of those, see
    `episode_weight`.
    """

    advantage: Float32[np.ndarray, " N"]
    usable: Bool[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]


def read_decisions(paths: Sequence[Path], chunk: int) -> Decisions:
    """Read the decisions behind the states that `read_states` returns for the same shards.

    Each shard is a group.
    """
    groups: list[Decisions] = []
    episodes = 0
    for number, path in enumerate(paths):
        group = _read_group(path, number, episodes, chunk)
        groups.append(group)
        episodes = int(group.episode[-1]) + 1
    columns: dict[str, np.ndarray] = {}
    for field in fields(Decisions):
        parts = [getattr(group, field.name) for group in groups]
        columns[field.name] = np.concatenate(parts)
    return Decisions(**columns)


def _read_group(path: Path, number: int, first_episode: int, chunk: int) -> Decisions:
    columns, _ = zarr_zip.read(path, COLUMNS)
    states = columns["states"]
    decisions = columns["decisions"]
    step = columns["step"]

    numbers = np.arange(len(states))
    episode = np.repeat(numbers, states)
    first_decisions = np.cumsum(decisions) - decisions
    decision = first_decisions[episode] + step // chunk
    tokens = columns["tokens"][decision]
    return Decisions(
        decided=step % chunk == 0,
        tokens=tokens.astype(np.int64),
        log_probs=columns["log_probs"][decision],
        episode=first_episode + episode,
        group=np.full(len(episode), number),
        success=columns["success"][episode],
    )


def failed_share(paths: Sequence[Path], mask: Bool[np.ndarray, "N K"]) -> float:
    """Return the share of the valid tokens that lie in failed episodes; 0 if no token is valid.

    mask: valid tokens of all states of the shards.
    """
    parts: list[np.ndarray] = []
    for path in paths:
        columns, _ = zarr_zip.read(path, ("states", "success"))
        failed = ~columns["success"]
        failed_states = np.repeat(failed, columns["states"])
        parts.append(failed_states)
    is_failed = np.concatenate(parts)
    failed_tokens = mask[is_failed].sum()
    tokens = max(1, mask.sum())
    return float(failed_tokens / tokens)
