"""Episodes, and the Zarr shards that hold them.

A shard holds episodes of one task: for `sample`, one prompt's group of G episodes. Its arrays are
concatenations over the episodes, in member order: states (N rows: `frames`, `proprio`, `step`,
`mask`), control steps (`actions`, `clean`), decisions (`tokens`, `log_probs`) and one row per
episode (`index`, `member`, `steps`, `success`, `states`, `decisions`).
"""

import math
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
STATE_COLUMNS = ("frames", "proprio", "step")
STEP_COLUMNS = ("actions", "clean")
DECISION_COLUMNS = ("tokens", "log_probs")
EPISODE_COLUMNS = [
    ("index", np.int64),
    ("member", np.int32),
    ("steps", np.int32),
    ("success", np.bool_),
    ("states", np.int32),
    ("decisions", np.int32),
]


@dataclass(frozen=True)
class Observations:
    """A batch of B observations: C upright RGB frames, P proprioceptive numbers, an instruction."""

    frames: UInt8[np.ndarray, "B C H W 3"]
    proprio: Float32[np.ndarray, "B P"]
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def at(self, rows: Int[np.ndarray, " R"]) -> "Observations":
        """Select rows."""
        instructions = [self.instructions[row] for row in rows]
        return Observations(
            frames=self.frames[rows],
            proprio=self.proprio[rows],
            instructions=tuple(instructions),
        )

    @staticmethod
    def concatenate(parts: "Sequence[Observations]") -> "Observations":
        """Concatenate batches in the order given."""
        instructions: list[str] = []
        for part in parts:
            instructions += part.instructions
        return Observations(
            frames=np.concatenate([part.frames for part in parts]),
            proprio=np.concatenate([part.proprio for part in parts]),
            instructions=tuple(instructions),
        )


@dataclass(frozen=True)
class Episode:
    """One episode: L control steps, N kept states, T decisions of K tokens.

    placement: where it started.
    member:    its number among its group's G episodes.
    steps:     L, control steps executed; the step of the first success if there was one.
    step:      the control step of each kept state (0: after the reset).
    actions:   executed actions, in the environment's units. In demonstrations: the expert's own
               actions, without the noise.
    clean:     False where a burst of random actions was executed in place of the expert's
               (demonstrations only).
    tokens:    the bins sampled at each decision.
    log_probs: their log-probabilities under the sampler, in nats, at its temperature.
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
    """Mask the valid tokens of a chunk predicted at each kept state.

    Token (i, a) at a state of step s is valid iff action s + i was executed (s + i < L) and no
    random burst came in between (`clean` on s ... s + i - 1: the expert's label at the first random
    step still belongs to a state that the chunk leads to).
    """
    index = np.add.outer(episode.step, np.arange(chunk))
    executed = index < episode.steps
    clean = np.pad(episode.clean, (0, chunk))
    earlier = index[:, :-1]
    clean_before = np.ones(index.shape, dtype=bool)
    clean_before[:, 1:] = clean[earlier]
    undisturbed = np.logical_and.accumulate(clean_before, axis=1)
    dims = episode.actions.shape[1]
    return np.repeat(
        executed & undisturbed,
        dims,
        axis=1,
    )


@dataclass(frozen=True)
class States:
    """The kept states of many episodes, flat, in canonical order: shards by name, episodes by
    member, states by step.

    mask:    which of the K tokens are valid at each state; every mean is taken over these.
    labels:  the S actions executed (or, in demonstrations, intended by the expert) from each state
             on; rows past the end repeat the last action.
    episode: the number of the episode to which each state belongs.
    """

    observations: Observations
    mask: Bool[np.ndarray, "N K"]
    labels: Float32[np.ndarray, "N S A"]
    episode: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.observations)


def write_shard(path: Path, episodes: Sequence[Episode], chunk: int) -> None:
    """Write episodes of one task and split as one Zarr group in a file: same episodes, same bytes.

    ValueError for episodes of several tasks, splits or instructions.
    """
    kinds: set[tuple[str, str, str]] = set()
    for episode in episodes:
        placement = episode.placement
        kinds.add((placement.task, placement.split, episode.instruction))
    if len(kinds) != 1:
        raise ValueError(
            f"episodes of a shard: {sorted(kinds)};"
            " expected one task, split and instruction per shard"
        )
    task, split, instruction = kinds.pop()
    attributes = {
        "format": SHARD_FORMAT,
        "task": task,
        "split": split,
        "instruction": instruction,
        "chunk": chunk,
    }
    columns = _concatenate_episodes(episodes, chunk)
    columns.update(_list_episodes(episodes))
    zarr_zip.write(path, columns, attributes)


def _concatenate_episodes(episodes: Sequence[Episode], chunk: int) -> dict[str, np.ndarray]:
    """Concatenate the arrays of episodes."""
    columns: dict[str, np.ndarray] = {}
    for name in (*STATE_COLUMNS, *STEP_COLUMNS, *DECISION_COLUMNS):
        parts = [getattr(episode, name) for episode in episodes]
        columns[name] = np.concatenate(parts)
    masks = [valid_tokens(episode, chunk) for episode in episodes]
    columns["mask"] = np.concatenate(masks)
    return columns


def _list_episodes(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Make the columns that have one row per episode."""
    table = np.zeros(len(episodes), EPISODE_COLUMNS)
    for row, episode in enumerate(episodes):
        table[row] = (
            episode.placement.index,
            episode.member,
            episode.steps,
            episode.success,
            len(episode.step),
            len(episode.tokens),
        )
    return {name: table[name] for name, _ in EPISODE_COLUMNS}


def read_shard(path: Path) -> tuple[Episode, ...]:
    """Read the episodes of a shard.

    ValueError names the shard and the array if bytes are missing or corrupt.
    """
    columns, attributes = zarr_zip.read(path)
    task = attributes["task"]
    split = attributes["split"]
    arrays = _split_columns(columns)
    episodes: list[Episode] = []
    for row, index in enumerate(columns["index"]):
        episode = Episode(
            placement=Placement(task, split, int(index)),
            member=int(columns["member"][row]),
            instruction=attributes["instruction"],
            success=bool(columns["success"][row]),
            steps=int(columns["steps"][row]),
            **{name: parts[row] for name, parts in arrays.items()},
        )
        episodes.append(episode)
    return tuple(episodes)


def _split_columns(columns: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Split the concatenated columns into one array per episode."""
    names_of = {
        "states": STATE_COLUMNS,
        "steps": STEP_COLUMNS,
        "decisions": DECISION_COLUMNS,
    }
    arrays: dict[str, list[np.ndarray]] = {}
    for length, names in names_of.items():
        ends = np.cumsum(columns[length])[:-1]
        for name in names:
            arrays[name] = np.split(columns[name], ends)
    return arrays


def shard_name(task: int, first: int) -> str:
    """Name the file of the shard that begins with prompt or demonstration `first` of a task.

    Both are counted from zero.
    """
    return f"shard-{task:03d}-{first:05d}{zarr_zip.SUFFIX}"


def shards(folder: Path) -> list[Path]:
    """List the shards of an artifact in canonical order. ValueError if it has none."""
    paths = sorted(folder.glob(f"shard-*{zarr_zip.SUFFIX}"))
    if not paths:
        raise ValueError(
            f"{folder}: no shards; expected shard-*{zarr_zip.SUFFIX}"
            " (folders are of an earlier version: make them again)"
        )
    return paths


def read_states(paths: Sequence[Path], per_task: int | None = None) -> States:
    """Read the kept states of some shards, with their stored masks.

    per_task: read only that many episodes of each task, the first ones. ValueError if a task has
    fewer, or if there is no episode at all.
    """
    parts: list[States] = []
    counts: Counter[str] = Counter()
    for path in paths:
        columns, attributes = zarr_zip.read(path)
        task = attributes["task"]
        episodes = len(columns["member"])
        if per_task is not None:
            episodes = min(episodes, per_task - counts[task])
        counts[task] += episodes
        if episodes > 0:
            states = _select_states(columns, attributes, episodes)
            parts.append(states)
    if per_task is not None:
        _require_episodes(counts, per_task)
    if not parts:
        names = ", ".join(map(str, paths))
        raise ValueError(f"no episodes in {names}; expected at least one shard with one episode")
    return concatenate(parts)


def _require_episodes(counts: Mapping[str, int], per_task: int) -> None:
    too_few = {task: count for task, count in counts.items() if count < per_task}
    if too_few:
        raise ValueError(
            f"per_task is {per_task}; expected at most the number of episodes of each task,"
            f" but there are {too_few}"
        )


def _select_states(
    columns: Mapping[str, np.ndarray], attributes: Mapping[str, Any], episodes: int
) -> States:
    """Select the states of a shard's first `episodes` episodes."""
    lengths = columns["states"][:episodes]
    rows = int(lengths.sum())
    numbers = np.arange(episodes, dtype=np.int32)
    episode = np.repeat(numbers, lengths)
    steps = columns["steps"]
    ends = np.cumsum(steps)
    starts = ends - steps
    first = starts[episode] + columns["step"][:rows]
    last = ends[episode] - 1
    offsets = np.arange(attributes["chunk"])
    index = np.add.outer(first, offsets)
    index = np.minimum(index, last[:, None])
    observations = Observations(
        frames=columns["frames"][:rows],
        proprio=columns["proprio"][:rows],
        instructions=(attributes["instruction"],) * rows,
    )
    return States(
        observations=observations,
        mask=columns["mask"][:rows],
        labels=columns["actions"][index],
        episode=episode,
    )


def concatenate(parts: Sequence[States]) -> States:
    """Concatenate the states of several shards in the order given."""
    episodes: list[np.ndarray] = []
    count = 0
    for part in parts:
        episode = part.episode + count
        episodes.append(episode)
        count = int(episode[-1]) + 1
    return States(
        observations=Observations.concatenate([part.observations for part in parts]),
        mask=np.concatenate([part.mask for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        episode=np.concatenate(episodes).astype(np.int32),
    )


def split_batches(rows: Int[np.ndarray, " R"], batch_size: int) -> list[Int[np.ndarray, " B"]]:
    """Split rows into batches as equal as possible, none of them larger than `batch_size`."""
    count = math.ceil(len(rows) / batch_size)
    return np.array_split(rows, max(1, count))
