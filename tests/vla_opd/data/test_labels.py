"""The store of the teacher's log-probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_opd.data import zarr_zip
from vla_opd.data.labels import (
    LabelCost,
    Labels,
    read_outcome,
    read_shard,
    smooth_bins,
    start_log_softmax,
    write_shard,
)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_stored_is_normalised_and_read_back(tmp_path: Path, dtype: str) -> None:
    logits = 5 * torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(0))
    stored = start_log_softmax(logits, dtype)()
    write_shard(tmp_path / "shard-0", Labels(stored))
    found = read_shard(tmp_path / "shard-0", 20).log_probs
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, stored)
    np.testing.assert_allclose(
        found,
        torch.log_softmax(logits.double(), -1).numpy(),
        rtol=1e-3 if dtype == "float16" else 1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("states", [19, 21])
def test_another_number_of_states_is_refused(tmp_path: Path, states: int) -> None:
    write_shard(tmp_path / "shard-7", Labels(np.zeros((20, 6, 8), np.float16)))
    with pytest.raises(
        ValueError,
        match=f"shard-7: labels 20 states; expected the {states} of the trajectory shard",
    ):
        read_shard(tmp_path / "shard-7", states)


def test_what_was_simulated_is_kept_beside_the_labels(tmp_path: Path) -> None:
    labels, recoverable = np.zeros((3, 6, 8), np.float16), np.array([True, True, False])
    write_shard(
        tmp_path / "shard-0",
        Labels(labels, recoverable, cost=LabelCost(env_steps=40, decisions=10)),
    )
    cost, tried = read_outcome(tmp_path / "shard-0")
    assert cost == read_shard(tmp_path / "shard-0", 3).cost == LabelCost(40, 10)
    assert tried is not None
    assert tried.tolist() == recoverable.tolist()
    mask = np.ones((3, 6), np.bool_)
    assert read_shard(tmp_path / "shard-0", 3).restrict(mask) is mask
    given = np.array([[True, True, True], [True, False, False], [True, True, False]])
    write_shard(tmp_path / "shard-2", Labels(labels, given=given))
    labelled = read_shard(tmp_path / "shard-2", 3).restrict
    assert labelled(mask)[1].tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]  # two dimensions an action
    mask[2, 3] = False
    assert labelled(mask)[2].tolist() == [True, True, True, False, False, False]
    write_shard(tmp_path / "shard-1", Labels(labels))
    assert read_outcome(tmp_path / "shard-1") == (LabelCost(0, 0), None)


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [
        ({"given": (3, 2)}, "has no log_probs"),
        ({"log_probs": (3, 4, 8), "given": (2, 2)}, "labels 2 states"),
        ({"log_probs": (0, 4, 8)}, "labels 0 states"),
    ],
)
def test_a_shard_whose_arrays_are_of_no_labels_is_refused(
    tmp_path: Path, columns: dict[str, tuple[int, ...]], wrong: str
) -> None:
    zarr_zip.write(
        tmp_path / "shard-0",
        {name: np.zeros(shape, np.float16) for name, shape in columns.items()},
        {},
    )
    with pytest.raises(ValueError, match=f"shard-0: {wrong}"):
        read_shard(tmp_path / "shard-0", 3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sigma", [0.01, 1.5])
def test_an_experts_bin_is_spread_over_its_neighbours(dtype: str, sigma: float) -> None:
    bins = np.array([[0, 100, 255]])
    found = smooth_bins(bins, 256, sigma, dtype)
    assert found.dtype == dtype
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found.argmax(-1), bins)
    exact = np.exp(-((np.arange(256) - bins[..., None]) ** 2) / (2 * sigma**2))
    np.testing.assert_allclose(
        np.exp(found.astype(np.float64)), exact / exact.sum(-1, keepdims=True), atol=1e-3
    )
