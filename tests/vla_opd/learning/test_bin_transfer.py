"""From a teacher's bins to a student's: row-stochastic, the identity for equal statistics, exact where it can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vla_opd import small
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.learning.bin_transfer import FLOOR, between, edges, overlap, require_comparable


def space(*ranges: tuple[float, float], bins: int = 5, chunk: int = 1) -> ActionSpace:
    """One dimension a range; all normalised."""
    low, high = zip(*ranges, strict=True)
    return ActionSpace(q01=low, q99=high, normalised=(True,) * len(low), chunk=chunk, bins=bins)


def matrix(teacher: ActionSpace, student: ActionSpace) -> np.ndarray:
    (found,) = (overlap(t, s) for t, s in zip(edges(teacher), edges(student), strict=True))
    return found


WIDE = st.tuples(st.floats(-2, 2), st.floats(0.01, 3)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)  # decoded actions are float32
RANGES = st.tuples(st.floats(-2, 2), st.floats(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(RANGES, RANGES, st.integers(2, 40), st.integers(2, 40))
def test_every_bin_gives_all_that_it_has(
    teacher: tuple[float, float], student: tuple[float, float], bins: int, others: int
) -> None:
    found = matrix(space(teacher, bins=bins), space(student, bins=others))
    assert found.shape == (bins, others)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-12)


@given(RANGES, st.integers(2, 256))
def test_equal_statistics_are_the_identity_to_the_last_bit(
    both: tuple[float, float], bins: int
) -> None:
    np.testing.assert_array_equal(
        matrix(space(both, bins=bins), space(both, bins=bins)), np.eye(bins)
    )
    assert between(space(both), space(both)) is None


def test_half_the_range_is_worked_out_by_hand() -> None:
    """Teacher: bins of 1 from 0 to 4, and the point 4. Student: bins of 2 from 0 to 8, and the point 8."""
    found = matrix(space((0.0, 4.0)), space((0.0, 8.0)))
    expected = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_a_range_that_is_shifted_and_wider_is_worked_out_by_hand() -> None:
    """Teacher: bins of 2 from -1 to 7, and the point 7. Student: bins of 1 from 0 to 4, and all from 4 on."""
    found = matrix(space((-1.0, 7.0)), space((0.0, 4.0)))
    expected = [
        [1, 0, 0, 0, 0],
        [0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0.5, 0.5],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_a_dimension_that_passes_through_can_meet_one_that_is_normalised() -> None:
    plain = ActionSpace(
        q01=(5.0,), q99=(6.0,), normalised=(False,), chunk=1, bins=5
    )  # -1 ... 1, whatever its statistics
    found = matrix(plain, space((-1.0, 1.0)))
    np.testing.assert_allclose(found[:4], np.eye(5)[:4], rtol=0, atol=1e-7)
    assert found[4].tolist() == [
        0,
        0,
        0,
        1,
        0,
    ]  # statistics are widened by 1e-8, so that 1 isn't the largest action


@given(st.floats(-0.99, 0.99), WIDE, WIDE)
def test_an_action_lands_where_the_student_would_put_it(
    x: float, teacher: tuple[float, float], student: tuple[float, float]
) -> None:
    """Of teacher bins far narrower than the student's, the student's own bin of an action's decoded value gets the mass."""
    ours, theirs = space(student, bins=9), space(teacher, bins=256)
    low, high = teacher
    token = theirs.encode(np.array([[[low + (x + 1) / 2 * (high - low)]]]))
    value = theirs.decode(token).astype(np.float64)
    assert matrix(theirs, ours)[int(token[0, 0]), int(ours.encode(value)[0, 0])] > 0


def test_tokens_are_moved_dimension_by_dimension_and_stay_finite() -> None:
    teacher, student = (
        space((0.0, 4.0), (0.0, 1.0), chunk=2),
        space((0.0, 8.0), (0.0, 1.0), chunk=2),
    )
    transfer = between(teacher, student)
    assert transfer is not None
    shares = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4))
    moved = transfer(np.log(shares).astype(np.float16))
    assert moved.dtype == np.float32
    assert np.isfinite(moved).all()
    np.testing.assert_allclose(np.exp(moved).sum(-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(moved[:, 1::2]), shares[:, 1::2], rtol=0, atol=2e-3)
    halved = np.stack(
        [shares[..., 0] + shares[..., 1], shares[..., 2] + shares[..., 3], shares[..., 4]], axis=-1
    )
    np.testing.assert_allclose(np.exp(moved[:, 0::2])[..., :3], halved[:, 0::2], rtol=0, atol=2e-3)
    np.testing.assert_allclose(
        moved[:, 0::2, 3:], np.log(FLOOR / 5), rtol=1e-3
    )  # no action of the teacher's is there


@pytest.mark.parametrize(("field", "wanted"), [("chunk", 2), ("action_dim", 1)])
def test_only_bins_can_be_transferred(field: str, wanted: int) -> None:
    student = space((0.0, 1.0), chunk=wanted) if field == "chunk" else space((0.0, 1.0))
    teacher = space((0.0, 1.0)) if field == "chunk" else space((0.0, 1.0), (0.0, 1.0))
    with pytest.raises(
        ValueError,
        match=rf"action_space\.{field} is \d for the teacher; expected the student's {wanted}, for only bins can move",
    ):
        between(teacher, student)


def test_other_statistics_are_refused_unless_the_labels_are_to_be_transferred() -> None:
    other = small.SPACE.model_copy(update={"q99": tuple(q + 1 for q in small.SPACE.q99)})

    def labels(*, transfer: bool) -> Manifest:
        facts = {"action_space": other.model_dump()}
        return Manifest.model_construct(
            kind="logits", parents={}, params={"label": {"transfer": transfer}}, facts=facts
        )

    require_comparable(small.FACTS, labels(transfer=True), "it001")
    with pytest.raises(
        ValueError, match=r"it001: action_space\.q99 is .* for the teacher; expected the student's"
    ):
        require_comparable(small.FACTS, labels(transfer=False), "it001")


def test_a_dimension_that_never_varies_for_the_student_gets_everything_in_its_middle_bin() -> None:
    teacher, student = space((-1.0, 1.0), (0.0, 1.0)), space((0.25, 0.25), (0.0, 1.0))
    moved = between(teacher, student)
    assert moved is not None
    np.testing.assert_array_equal(moved.overlaps[0], np.eye(5)[[2] * 5])
    np.testing.assert_array_equal(moved.overlaps[1], np.eye(5))
    assert student.encode(np.array([[[-1.0, 0.0]]]))[0, 0] == 2
