"""Episodes, and the Zarr shards that hold them.

A shard holds episodes of one task: for `sample`, one prompt's group of G episodes. Its arrays are concatenations over the episodes, in
member order: states (N rows: `frames`, `proprio`, `step`, `mask`), control steps (`actions`, `clean`), decisions (`tokens`, `log_probs`) and
one row an episode (`index`, `member`, `steps`, `success`, `states`, `decisions`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int16, Int32, UInt8

from vla_opd.data import zarr_zip
from vla_opd.envs.protocol import Placement

SHARD_FORMAT = 1


@dataclass(frozen=True)
class Observations:
    """A batch of B observations: C upright RGB frames each, P proprioceptive numbers, one instruction."""

    frames: UInt8[np.ndarray, "B C H W 3"]
    proprio: Float32[np.ndarray, "B P"]
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def at(self, rows: Int[np.ndarray, " R"]) -> "Observations":
        """Some of the rows."""
        return Observations(
            self.frames[rows], self.proprio[rows], tuple(self.instructions[i] for i in rows)
        )

    @staticmethod
    def joined(parts: "Sequence[Observations]") -> "Observations":
        """Several batches as one, in the order given."""
        frames, proprio = (
            np.concatenate([p.frames for p in parts]),
            np.concatenate([p.proprio for p in parts]),
        )
        return Observations(frames, proprio, tuple(i for p in parts for i in p.instructions))


@dataclass(frozen=True)
class Episode:
    """One episode: L control steps, N kept states, T decisions of K tokens.

    placement: where it started; member: which of its group's G episodes it is.
    steps:     L, control steps executed; the step of the first success if there was one.
    step:      the control step of each kept state (0: after the reset).
    actions:   what was executed, in the environment's units. In demonstrations: the expert's own action, without the noise.
    clean:     False where a burst of random actions was executed in place of the expert's (demonstrations only).
    tokens:    the bins sampled at each decision; log_probs: their log-probabilities under the sampler, in nats, at its temperature.
    """

    placement: Placement
    member: int
    instruction: str
    success: bool
    steps: int
    frames: UInt8[np.ndarray, "N C H W 3"]
    proprio: Float32[np.ndarray, "N P"]
    step: Int32[np.ndarray, " N"]
    actions: Float32[np.ndarray, "L A"]
    clean: Bool[np.ndarray, " L"]
    tokens: Int16[np.ndarray, "T K"]
    log_probs: Float32[np.ndarray, "T K"]


def valid_tokens(episode: Episode, chunk: int) -> Bool[np.ndarray, "N K"]:
    """Which tokens of a chunk predicted at each kept state count.

    Token (i, a) at a state of step s counts iff action s + i was executed (s + i < L) and no random burst came between (`clean` on s ... s + i - 1:
    the expert's label at the first random step still answers to a state that the chunk leads to).
    """
    dims = episode.actions.shape[1]
    index = episode.step[:, None] + np.arange(chunk)
    clean = np.concatenate([episode.clean, np.zeros(chunk, dtype=bool)])
    before = np.concatenate([np.ones((len(index), 1), dtype=bool), clean[index[:, :-1]]], axis=1)
    return np.repeat(
        (index < episode.steps) & np.logical_and.accumulate(before, axis=1), dims, axis=1
    )


@dataclass(frozen=True)
class States:
    """The kept states of many episodes, flat, in canonical order: shards by name, episodes by member, states by step.

    mask:    which of the K tokens count at each state; every mean is taken over these.
    labels:  the S actions executed (or, in demonstrations, meant by the expert) from each state on; rows past the end repeat the last action.
    episode: which episode each state belongs to.
    """

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    labels: Float32[np.ndarray, "N S A"]
    episode: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.observations)


def write_shard(path: Path, episodes: Sequence[Episode], chunk: int) -> None:
    """Write episodes of one task and split as one Zarr group in a file. Same episodes, same bytes."""
    first = episodes[0]
    kinds = {(e.placement.task, e.placement.split, e.instruction) for e in episodes}
    if len(kinds) != 1:
        raise ValueError(
            f"episodes of a shard: {sorted(kinds)}; expected one task, split and instruction a shard"
        )
    columns = {
        "frames": np.concatenate([e.frames for e in episodes]),
        "proprio": np.concatenate([e.proprio for e in episodes]),
        "step": np.concatenate([e.step for e in episodes]),
        "mask": np.concatenate([valid_tokens(e, chunk) for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "clean": np.concatenate([e.clean for e in episodes]),
        "tokens": np.concatenate([e.tokens for e in episodes]),
        "log_probs": np.concatenate([e.log_probs for e in episodes]),
        "index": np.array([e.placement.index for e in episodes], dtype=np.int64),
        "member": np.array([e.member for e in episodes], dtype=np.int32),
        "steps": np.array([e.steps for e in episodes], dtype=np.int32),
        "success": np.array([e.success for e in episodes]),
        "states": np.array([len(e.step) for e in episodes], dtype=np.int32),
        "decisions": np.array([len(e.tokens) for e in episodes], dtype=np.int32),
    }
    attributes = {
        "format": SHARD_FORMAT,
        "task": first.placement.task,
        "split": first.placement.split,
        "instruction": first.instruction,
        "chunk": chunk,
    }
    zarr_zip.write(path, columns, attributes)


def read_shard(path: Path) -> tuple[Episode, ...]:
    """The episodes of a shard. ValueError names the shard and the array if bytes are missing or corrupt."""
    columns, attributes = zarr_zip.read(path)
    states = np.cumsum(columns["states"])[:-1]
    steps = np.cumsum(columns["steps"])[:-1]
    decisions = np.cumsum(columns["decisions"])[:-1]
    cut = {
        **{name: np.split(columns[name], states) for name in ("frames", "proprio", "step")},
        **{name: np.split(columns[name], steps) for name in ("actions", "clean")},
        **{name: np.split(columns[name], decisions) for name in ("tokens", "log_probs")},
    }
    return tuple(
        Episode(
            placement=Placement(attributes["task"], attributes["split"], int(columns["index"][b])),
            member=int(columns["member"][b]),
            instruction=attributes["instruction"],
            success=bool(columns["success"][b]),
            steps=int(columns["steps"][b]),
            **{name: pieces[b] for name, pieces in cut.items()},
        )
        for b in range(len(columns["member"]))
    )


def shard_name(task: int, first: int) -> str:
    """The file of the shard that begins with a task's prompt or demonstration `first`, both counted from zero."""
    return f"shard-{task:03d}-{first:05d}{zarr_zip.SUFFIX}"


def shards(folder: Path) -> list[Path]:
    """The shards of an artifact, in canonical order. ValueError if it has none."""
    found = sorted(folder.glob(f"shard-*{zarr_zip.SUFFIX}"))
    if not found:
        raise ValueError(
            f"{folder}: no shards; expected shard-*{zarr_zip.SUFFIX} (folders are of an earlier version: make them again)"
        )
    return found


def read_states(paths: Sequence[Path], per_task: int | None = None) -> States:
    """All kept states of some shards, with the masks that were stored; of the first `per_task` episodes of each task only, if given.

    ValueError if there is no episode, or a task has fewer.
    """
    parts: list[States] = []
    taken: Counter[str] = Counter()
    for path in paths:
        columns, attributes = zarr_zip.read(path)
        task = attributes["task"]
        wanted = (
            len(columns["member"])
            if per_task is None
            else min(len(columns["member"]), per_task - taken[task])
        )
        taken[task] += wanted
        if wanted > 0:
            parts.append(_states(columns, attributes, wanted))
    if per_task is not None and (
        few := {task: found for task, found in taken.items() if found < per_task}
    ):
        raise ValueError(
            f"per_task is {per_task}; expected at most as many as there are of each task, but of {few}"
        )
    if not parts:
        raise ValueError(
            f"no episodes in {[str(path) for path in paths]}; expected at least one shard with one episode"
        )
    return joined(parts)


def _states(
    columns: Mapping[str, np.ndarray], attributes: Mapping[str, Any], episodes: int
) -> States:
    """The states of a shard's first `episodes` episodes."""
    episode = np.repeat(np.arange(len(columns["states"]), dtype=np.int32), columns["states"])
    rows = int(columns["states"][:episodes].sum())
    episode = episode[:rows]
    ends = np.cumsum(columns["steps"])
    first = (ends - columns["steps"])[episode] + columns["step"][:rows]
    index = np.minimum(first[:, None] + np.arange(attributes["chunk"]), ends[episode, None] - 1)
    return States(
        observations=Observations(
            columns["frames"][:rows], columns["proprio"][:rows], (attributes["instruction"],) * rows
        ),
        mask=columns["mask"][:rows],
        labels=columns["actions"][index],
        episode=episode,
    )


def joined(parts: Sequence[States]) -> States:
    """The states of several shards as one, in the order given."""
    offsets = np.cumsum([0] + [int(p.episode[-1]) + 1 for p in parts])
    return States(
        observations=Observations.joined([p.observations for p in parts]),
        mask=np.concatenate([p.mask for p in parts]),
        labels=np.concatenate([p.labels for p in parts]),
        episode=np.concatenate(
            [p.episode + offset for p, offset in zip(parts, offsets, strict=False)]
        ).astype(np.int32),
    )


def in_batches(rows: Int[np.ndarray, " R"], batch_size: int) -> list[Int[np.ndarray, " B"]]:
    """Of as equal a size as can be, none of them larger than `batch_size`: a policy that has room for that many states has room for these."""
    return np.array_split(rows, max(1, -(-len(rows) // batch_size)))
