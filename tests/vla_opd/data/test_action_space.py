"""Actions and bins: against the outputs of the original tokenizer, and against the definition.

`data/*.npz` hold outputs of OpenVLA-OFT's `ActionTokenizer` (openvla-oft 213c5ff) and of
SimpleVLA-RL's decoding (SimpleVLA-RL 7c51662), which number the bins downwards: token id = 31999 -
bin.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from tests.vla_opd import small
from vla_opd.data.action_space import ActionSpace, fit_action_space

DATA = Path(__file__).parents[2] / "data"
FIRST_ID = 31999  # of bin 0


def plain(dims: int, chunk: int = 1, bins: int = 256) -> ActionSpace:
    """Return the space of actions that are normalised already."""
    return ActionSpace(
        q01=(-1.0,) * dims,
        q99=(1.0,) * dims,
        normalised=(False,) * dims,
        chunk=chunk,
        bins=bins,
    )


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "action_tokenizer.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("suffix", ["", "_float32"])
def test_bins_are_the_originals(golden: dict[str, np.ndarray], suffix: str) -> None:
    actions = golden[f"actions{suffix}"]
    ids = golden[f"token_ids{suffix}"]
    assert len(np.unique(ids)) > 200
    bins = plain(1).encode(actions[:, None, None])
    np.testing.assert_array_equal(bins[:, 0], FIRST_ID - ids)


def test_decoded_actions_are_the_originals(golden: dict[str, np.ndarray]) -> None:
    bins = plain(1).encode(golden["actions"][:, None, None])
    decoded = plain(1).decode(bins)
    np.testing.assert_array_equal(decoded[:, 0, 0], golden["decoded"].astype(np.float32))


def test_the_whole_table_is_the_originals_clipped_at_both_ends(
    golden: dict[str, np.ndarray],
) -> None:
    bins = FIRST_ID - golden["table_ids"]
    assert bins.min() < 0
    assert bins.max() > 255
    decoded = plain(1).decode(bins[:, None])
    np.testing.assert_array_equal(decoded[:, 0, 0], golden["table_decoded"].astype(np.float32))


def test_unnormalised_actions_are_the_originals() -> None:
    with np.load(DATA / "unnormalised_actions.npz") as arrays:
        golden = dict(arrays)
    mask = tuple(bool(m) for m in golden["mask"])
    assert mask == (True,) * 6 + (False,)
    space = ActionSpace(
        q01=tuple(golden["q01"]),
        q99=tuple(golden["q99"]),
        normalised=mask,
        chunk=8,
    )
    bins = FIRST_ID - golden["token_ids"]
    normalised = plain(7, chunk=8).decode(bins)
    np.testing.assert_allclose(normalised, golden["normalized"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(space.decode(bins), golden["unnormalized"], rtol=0, atol=1e-6)
    encoded = space.encode(golden["unnormalized"])
    np.testing.assert_array_equal(encoded, np.minimum(bins, 254))  # the last two decode alike


@settings(max_examples=60, deadline=None)
@given(bins=hnp.arrays(np.int16, (3, small.TOKENS), elements=st.integers(0, small.BINS - 1)))
def test_a_decoded_bin_is_encoded_as_itself(bins: np.ndarray) -> None:
    space = ActionSpace(
        q01=(-0.5, -1.0, 0.0),
        q99=(0.5, 2.0, 0.0),
        normalised=(True, True, False),
        chunk=small.CHUNK,
        bins=small.BINS,
    )
    actions = space.decode(bins)
    assert (actions.shape, actions.dtype) == ((3, small.CHUNK, small.DIMS), np.float32)
    encoded = space.encode(actions)
    assert encoded.dtype == np.int16
    np.testing.assert_array_equal(encoded, np.minimum(bins, small.BINS - 2))


@settings(max_examples=60, deadline=None)
@given(
    actions=hnp.arrays(np.float64, (4, 2, 3), elements=st.floats(-3, 3)), bins=st.integers(2, 256)
)
def test_decoding_is_off_by_half_a_bin_at_most(actions: np.ndarray, bins: int) -> None:
    q01 = np.array([-2.0, 0.0, -1.0])
    q99 = np.array([1.0, 0.5, 1.0])
    space = ActionSpace(
        q01=tuple(q01),
        q99=tuple(q99),
        normalised=(True, True, False),
        chunk=2,
        bins=bins,
    )
    decoded = space.decode(space.encode(actions))
    error = np.abs(decoded - np.clip(actions, q01, q99))
    half = (q99 - q01) / (bins - 1) / 2
    assert (error <= half + 1e-6).all()


def test_bins_ascend_with_the_action_and_are_row_major() -> None:
    space = plain(2, chunk=3, bins=5)
    actions = np.array([[-1.0, -0.4], [0.1, 0.6], [1.0, 7.0]])  # edges -1, -0.5, 0, 0.5, 1
    assert space.encode(actions).tolist() == [0, 1, 2, 3, 4, 4]
    decoded = space.decode(np.array([0, 1, 2, 3, 3, 4]))
    np.testing.assert_allclose(decoded, [[-0.75, -0.25], [0.25, 0.75], [0.75, 0.75]])
    assert space.encode(actions[None].repeat(4, 0)).shape == (4, 6)


def test_statistics_are_percentiles_and_leave_the_gripper() -> None:
    ramp = np.linspace(0, 1, 101)
    actions = np.stack([ramp, 10 * ramp - 5, np.sign(ramp - 0.5)], axis=1)
    space = fit_action_space(actions.astype(np.float32), chunk=4, bins=16)
    np.testing.assert_allclose(space.q01[:2], [0.01, -4.9], atol=1e-6)
    np.testing.assert_allclose(space.q99[:2], [0.99, 4.9], atol=1e-6)
    assert space.normalised == (True, True, False)
    assert (space.chunk, space.bins, space.action_dim, space.tokens) == (4, 16, 3, 12)


def test_a_dimension_that_never_moves_stays_finite() -> None:
    space = fit_action_space(np.full((10, 3), 0.25), chunk=1, bins=8)
    decoded = space.decode(space.encode(np.full((1, 3), 0.25)))
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[0, :2], 0.25, atol=1e-6)


def test_the_digest_is_of_everything_that_a_token_means() -> None:
    space = plain(2)
    changes = [
        {"q01": (-1.0, -0.9)},
        {"q99": (1.0, 1.1)},
        {"normalised": (True, False)},
        {"chunk": 2},
        {"bins": 255},
    ]
    changed = [space.model_copy(update=change) for change in changes]
    assert len({each.digest for each in [space, *changed]}) == 6
    stored = ActionSpace.model_validate_json(space.model_dump_json())
    assert space.digest == plain(2).digest == stored.digest


def test_statistics_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"have \[2, 1, 2\] entries; expected one per action"):
        ActionSpace(q01=(0, 0), q99=(1,), normalised=(True, True), chunk=1)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_dimension_is_in_the_middle_bin_as_in_the_data_of_public_checkpoints(
    value: float,
) -> None:
    space = ActionSpace(q01=(value, -1.0), q99=(value, 1.0), normalised=(True, True), chunk=1)
    noisy = np.float32(value) + np.array([0, 1e-9, -1e-9, 0.5], np.float32)
    actions = np.stack([noisy, np.zeros(4, np.float32)], axis=-1)
    bins = space.encode(actions[:, None])
    assert bins[:, 0].tolist() == [127] * 4
    assert space.decode(bins)[:, 0, 0] == pytest.approx([value] * 4, abs=1e-6)


def test_a_constant_dimension_that_passes_through_is_left_as_it_is() -> None:
    space = ActionSpace(q01=(1.0,), q99=(1.0,), normalised=(False,), chunk=1)
    assert space.encode(np.ones((1, 1, 1), np.float32)).tolist() == [[255]]
