"""Episodes and their shards: the store returns what it was given, the mask is the rule in words, the labels are the actions."""

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


def assert_equal_episodes(found: Episode, expected: Episode) -> None:
    for field in fields(Episode):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
            assert ours.dtype == theirs.dtype, field.name
            assert ours.shape == theirs.shape, field.name
        else:
            assert ours == theirs, field.name


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
def test_the_store_returns_what_it_was_given(episodes: list[Episode]) -> None:
    with tempfile.TemporaryDirectory() as root:
        write_shard(Path(root) / "shard-0", episodes, small.CHUNK)
        found = read_shard(Path(root) / "shard-0")
        states = read_states([Path(root) / "shard-0"])
    for ours, theirs in zip(found, episodes, strict=True):
        assert_equal_episodes(ours, theirs)
    np.testing.assert_array_equal(
        states.mask, np.concatenate([valid_tokens(e, small.CHUNK) for e in episodes])
    )
    np.testing.assert_array_equal(
        states.labels, np.concatenate([labels_in_words(e, small.CHUNK) for e in episodes])
    )
    np.testing.assert_array_equal(
        states.observations.frames, np.concatenate([e.frames for e in episodes])
    )
    np.testing.assert_array_equal(
        states.episode, np.repeat(np.arange(len(episodes)), [len(e.step) for e in episodes])
    )


def labels_in_words(episode: Episode, chunk: int) -> np.ndarray:
    """The next S actions from each kept state on; where the episode is over, its last."""
    return np.array(
        [
            [episode.actions[min(s + i, episode.steps - 1)] for i in range(chunk)]
            for s in episode.step
        ]
    )


def mask_in_words(episode: Episode, chunk: int) -> np.ndarray:
    """Step i of a chunk counts if it was executed, and no burst lies between the state and it."""
    rows = [
        [s + i < episode.steps and all(episode.clean[s : s + i]) for i in range(chunk)]
        for s in episode.step
    ]
    return np.repeat(np.array(rows), episode.actions.shape[1], axis=1)


def test_the_mask_of_a_burst_and_of_the_end() -> None:
    episode = small.episode(steps=6, every=2, clean=(True, True, True, False, False, True))
    by_step = valid_tokens(episode, 3)[:, :: small.DIMS]
    assert (
        by_step.tolist()
        == [
            [True, True, True],  # from step 0: 0, 1, 2 executed as the expert meant
            [
                True,
                True,
                False,
            ],  # from step 2: the label at 3 (burst) still answers to this state's chunk; what follows it does not
            [
                True,
                False,
                False,
            ],  # from step 4: itself in the burst; its own label counts, the next does not
        ]
    )
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
    assert mask[
        :, : small.DIMS
    ].all()  # the first action from a kept state was always executed there


def test_labels_repeat_the_last_action(tmp_path: Path) -> None:
    episode = small.episode(steps=4, every=3)
    write_shard(tmp_path / "shard-0", [episode, small.episode(1, steps=7, member=1)], chunk=3)
    labels = read_states([tmp_path / "shard-0"]).labels
    np.testing.assert_array_equal(labels[0], episode.actions[0:3])
    np.testing.assert_array_equal(
        labels[1], episode.actions[[3, 3, 3]]
    )  # not the next episode's actions


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, two shards each, of two and three episodes."""
    root = tmp_path_factory.mktemp("several")
    for task, name in enumerate(["reach-v3", "push-v3"]):
        for number, count in enumerate([2, 3]):
            members = [
                small.episode(100 * task + 10 * number + m, steps=4 + m, member=m, task=name)
                for m in range(count)
            ]
            write_shard(root / shard_name(task, number), members, small.CHUNK)
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
    np.testing.assert_array_equal(states.episode, np.repeat(np.arange(len(lengths)), lengths))
    assert (
        len(states)
        == sum(lengths)
        == len(states.mask)
        == len(states.labels)
        == len(states.observations.proprio)
    )
    tasks = [
        states.observations.instructions[list(states.episode).index(e)] for e in range(len(lengths))
    ]
    assert tasks == ["solve reach-v3"] * (len(lengths) // 2) + ["solve push-v3"] * (
        len(lengths) // 2
    )
    everything = read_states(paths)
    wanted = [row for row, e in enumerate(everything.episode) if e % 5 < (per_task or 5)]
    np.testing.assert_array_equal(states.labels, everything.labels[wanted])
    np.testing.assert_array_equal(
        states.observations.frames, everything.observations.frames[wanted]
    )


def test_more_episodes_of_a_task_than_there_are_are_refused(several: Path) -> None:
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


def test_no_shards_no_states() -> None:
    with pytest.raises(ValueError, match="expected at least one shard"):
        read_states([])


def test_rows_of_observations() -> None:
    seen = small.observations(5)
    some = seen.at(np.array([3, 0]))
    assert len(some) == 2
    np.testing.assert_array_equal(some.frames, seen.frames[[3, 0]])
    np.testing.assert_array_equal(some.proprio, seen.proprio[[3, 0]])
