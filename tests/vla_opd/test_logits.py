"""The store of the teacher's log-probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_opd.logits import normalised, read_shard, write_shard


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_stored_is_normalised_and_read_back(tmp_path: Path, dtype: str) -> None:
    logits = 5 * torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(0))
    stored = normalised(logits, dtype)
    write_shard(tmp_path / "shard-0", stored)
    found = read_shard(tmp_path / "shard-0", 20)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, stored)
    np.testing.assert_allclose(found, torch.log_softmax(logits.double(), -1).numpy(), rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("states", [19, 21])
def test_another_number_of_states_is_refused(tmp_path: Path, states: int) -> None:
    write_shard(tmp_path / "shard-7", np.zeros((20, 6, 8), np.float16))
    with pytest.raises(ValueError, match=f"shard-7: labels 20 states; expected the {states} of the trajectory shard"):
        read_shard(tmp_path / "shard-7", states)
