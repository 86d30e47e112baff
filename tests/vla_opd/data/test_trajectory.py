"""Episodes and their shards.

A shard is read as it was written, the mask is the rule in words, the labels are the actions.
"""

import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vla_opd import small
from vla_opd.data.trajectory import (
    Episode,
    read_shard,
    read_states,
    shard_name,
    shards,
    valid_tokens,
    write_shard,
)


def assert_equal_episodes(actual: Episode, expected: Episode) -> None:
    for field in fields(Episode):
        value = getattr(actual, field.name)
        reference = getattr(expected, field.name)
        if isinstance(reference, np.ndarray):
            np.testing.assert_array_equal(value, reference, err_msg=field.name)
            assert value.dtype == reference.dtype, field.name
            assert value.shape == reference.shape, field.name
        else:
            assert value == reference, field.name


EPISODES = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(1, 4)),
    min_size=1,
    max_size=4,
).map(
    lambda rows: [
        small.episode(seed, steps=steps, every=every, member=member)
        for member, (seed, steps, every) in enumerate(rows)
    ]
)


@settings(max_examples=6, deadline=None)
@given(episodes=EPISODES)
def test_a_shard_is_read_as_it_was_written(episodes: list[Episode]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "shard-0"
        write_shard(path, episodes, small.CHUNK)
        stored = read_shard(path)
        states = read_states([path])
    for actual, expected in zip(stored, episodes, strict=True):
        assert_equal_episodes(actual, expected)
    frames = np.concatenate([episode.frames for episode in episodes])
    mask = np.concatenate([valid_tokens(episode, small.CHUNK) for episode in episodes])
    labels = np.concatenate([labels_in_words(episode, small.CHUNK) for episode in episodes])
    lengths = [len(episode.step) for episode in episodes]
    np.testing.assert_array_equal(states.observations.frames, frames)
    np.testing.assert_array_equal(states.mask, mask)
    np.testing.assert_array_equal(states.labels, labels)
    np.testing.assert_array_equal(states.episode, np.repeat(np.arange(len(episodes)), lengths))


def labels_in_words(episode: Episode, chunk: int) -> np.ndarray:
    """Return the next S actions from each kept state on; after the episode's end, its last."""
    last = episode.steps - 1
    rows: list[np.ndarray] = []
    for step in episode.step:
        indices = [min(step + offset, last) for offset in range(chunk)]
        rows.append(episode.actions[indices])
    return np.array(rows)


def mask_in_words(episode: Episode, chunk: int) -> np.ndarray:
    """Step i of a chunk counts if it was executed, and no burst lies between the state and it."""
    rows: list[list[bool]] = []
    for step in episode.step:
        row: list[bool] = []
        for offset in range(chunk):
            executed = step + offset < episode.steps
            before = episode.clean[step : step + offset]
            row.append(executed and all(before))
        rows.append(row)
    return np.repeat(np.array(rows), episode.actions.shape[1], axis=1)


def test_the_mask_of_a_burst_and_of_the_end() -> None:
    episode = small.episode(steps=6, every=2, clean=(True, True, True, False, False, True))
    by_step = valid_tokens(episode, 3)[:, :: small.DIMS]
    assert by_step.tolist() == [
        # From step 0: steps 0, 1 and 2 were executed as the expert meant.
        [True, True, True],
        # From step 2: the label at 3, where the burst begins, still belongs to this state's chunk.
        [True, True, False],
        # From step 4, inside the burst: the state's label counts, the next does not.
        [True, False, False],
    ]
    ended = replace(episode, clean=np.ones(6, np.bool_))
    assert valid_tokens(ended, 3)[:, :: small.DIMS].tolist() == [
        [True, True, True],
        [True, True, True],
        [True, True, False],
    ]
    assert valid_tokens(ended, 3).shape == (3, 3 * small.DIMS)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 25),
    every=st.integers(1, 5),
    chunk=st.integers(1, 9),
)
def test_the_mask_is_the_rule_in_words(seed: int, steps: int, every: int, chunk: int) -> None:
    episode = small.episode(seed, steps=steps, every=every)
    mask = valid_tokens(episode, chunk)
    np.testing.assert_array_equal(mask, mask_in_words(episode, chunk))
    first = mask[:, : small.DIMS]
    assert first.all()  # the first action from a kept state was always executed


def test_labels_repeat_the_last_action(tmp_path: Path) -> None:
    episode = small.episode(steps=4, every=3)
    write_shard(tmp_path / "shard-0", [episode, small.episode(1, steps=7, member=1)], chunk=3)
    labels = read_states([tmp_path / "shard-0"]).labels
    np.testing.assert_array_equal(labels[0], episode.actions[0:3])
    # Not the next episode's actions:
    np.testing.assert_array_equal(labels[1], episode.actions[[3, 3, 3]])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, two shards each, of two and three episodes."""
    root = tmp_path_factory.mktemp("several")
    for task, name in enumerate(["reach-v3", "push-v3"]):
        for number, count in enumerate([2, 3]):
            episodes: list[Episode] = []
            for member in range(count):
                seed = 100 * task + 10 * number + member
                episode = small.episode(seed, steps=4 + member, member=member, task=name)
                episodes.append(episode)
            write_shard(root / shard_name(task, number), episodes, small.CHUNK)
    (root / "manifest.json").touch()
    return root


@pytest.mark.parametrize(
    ("per_task", "lengths"),
    [
        (1, [4, 4]),
        (2, [4, 5, 4, 5]),
        (3, [4, 5, 4, 4, 5, 4]),
        (5, [4, 5, 4, 5, 6] * 2),
        (None, [4, 5, 4, 5, 6] * 2),
    ],
)
def test_per_task_takes_the_first_episodes_of_every_task(
    several: Path, per_task: int | None, lengths: list[int]
) -> None:
    paths = shards(several)
    states = read_states(paths, per_task)
    count = len(lengths)
    np.testing.assert_array_equal(states.episode, np.repeat(np.arange(count), lengths))
    assert len(states) == sum(lengths)
    assert len(states) == len(states.mask) == len(states.labels)
    starts = np.searchsorted(states.episode, np.arange(count))
    instructions = [states.observations.instructions[row] for row in starts]
    half = count // 2
    assert instructions == ["solve reach-v3"] * half + ["solve push-v3"] * half
    everything = read_states(paths)
    rows = np.flatnonzero(everything.episode % 5 < (per_task or 5))
    expected = everything.observations.at(rows)
    np.testing.assert_array_equal(states.labels, everything.labels[rows])
    np.testing.assert_array_equal(states.observations.frames, expected.frames)
    np.testing.assert_array_equal(states.observations.proprio, expected.proprio)


def test_too_few_episodes_of_a_task_are_refused(several: Path) -> None:
    with pytest.raises(ValueError, match=r"per_task is 6; .* \{'reach-v3': 5, 'push-v3': 5\}"):
        read_states(shards(several), 6)


def test_an_artifact_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shard-000-00000").mkdir()  # as an earlier version wrote them
    with pytest.raises(
        ValueError,
        match=r"no shards; expected shard-\*\.zarr\.zip \(folders are of an earlier version",
    ):
        shards(tmp_path)


def test_shards_are_in_canonical_order(several: Path) -> None:
    assert [path.name for path in shards(several)] == [
        "shard-000-00000.zarr.zip",
        "shard-000-00001.zarr.zip",
        "shard-001-00000.zarr.zip",
        "shard-001-00001.zarr.zip",
    ]


def test_same_episodes_same_bytes(tmp_path: Path) -> None:
    episodes = [small.episode(m, steps=30, member=m) for m in range(3)]
    for name in "ab":
        write_shard(tmp_path / name, episodes, small.CHUNK)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_of_two_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one task, split and instruction per shard"):
        write_shard(tmp_path / "a", [small.episode(), small.episode(task="push-v3")], small.CHUNK)


def test_states_of_no_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one shard"):
        read_states([])


def test_observations_are_selected_by_row() -> None:
    batch = small.observations(5)
    selected = batch.at(np.array([3, 0]))
    assert len(selected) == 2
    np.testing.assert_array_equal(selected.frames, batch.frames[[3, 0]])
    np.testing.assert_array_equal(selected.proprio, batch.proprio[[3, 0]])
