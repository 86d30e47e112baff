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
    log_probs = read_shard(tmp_path / "shard-0", 20).log_probs
    assert log_probs.dtype == dtype
    np.testing.assert_array_equal(log_probs, stored)
    exact = torch.log_softmax(logits.double(), -1).numpy()
    rtol = {"float16": 1e-3, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(log_probs, exact, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("states", [19, 21])
def test_another_number_of_states_is_refused(tmp_path: Path, states: int) -> None:
    write_shard(tmp_path / "shard-7", Labels(np.zeros((20, 6, 8), np.float16)))
    with pytest.raises(
        ValueError,
        match=f"shard-7: labels 20 states; expected the {states} of the trajectory shard",
    ):
        read_shard(tmp_path / "shard-7", states)


def test_the_cost_and_the_outcome_of_simulations_are_kept(tmp_path: Path) -> None:
    log_probs = np.zeros((3, 6, 8), np.float16)
    recoverable = np.array([True, True, False])
    path = tmp_path / "shard-0"
    write_shard(path, Labels(log_probs, recoverable, cost=LabelCost(env_steps=40, decisions=10)))
    cost, outcome = read_outcome(path)
    assert cost == read_shard(path, 3).cost == LabelCost(40, 10)
    assert outcome is not None
    assert outcome.tolist() == recoverable.tolist()
    write_shard(path, Labels(log_probs))
    assert read_outcome(path) == (LabelCost(0, 0), None)


def test_a_mask_is_restricted_to_the_labelled_actions(tmp_path: Path) -> None:
    log_probs = np.zeros((3, 6, 8), np.float16)
    path = tmp_path / "shard-0"
    mask = np.ones((3, 6), np.bool_)
    write_shard(path, Labels(log_probs))
    assert read_shard(path, 3).restrict(mask) is mask
    given = np.array([[True, True, True], [True, False, False], [True, True, False]])
    write_shard(path, Labels(log_probs, given=given))
    labels = read_shard(path, 3)
    # Two dimensions per action.
    assert labels.restrict(mask)[1].tolist() == [True, True, False, False, False, False]
    mask[2, 3] = False
    assert labels.restrict(mask)[2].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [
        ({"given": (3, 2)}, "has no log_probs"),
        ({"log_probs": (3, 4, 8), "given": (2, 2)}, "labels 2 states"),
        ({"log_probs": (0, 4, 8)}, "labels 0 states"),
    ],
)
def test_a_shard_without_labels_of_every_state_is_refused(
    tmp_path: Path, columns: dict[str, tuple[int, ...]], wrong: str
) -> None:
    arrays = {name: np.zeros(shape, np.float16) for name, shape in columns.items()}
    zarr_zip.write(tmp_path / "shard-0", arrays, {})
    with pytest.raises(ValueError, match=f"shard-0: {wrong}"):
        read_shard(tmp_path / "shard-0", 3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sigma", [0.01, 1.5])
def test_an_experts_bin_is_spread_over_its_neighbours(dtype: str, sigma: float) -> None:
    bins = np.array([[0, 100, 255]])
    log_probs = smooth_bins(bins, 256, sigma, dtype)
    assert log_probs.dtype == dtype
    assert np.isfinite(log_probs).all()
    np.testing.assert_array_equal(log_probs.argmax(-1), bins)
    distance = np.arange(256) - bins[..., None]
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    exact = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs.astype(np.float64)), exact, atol=1e-3)
