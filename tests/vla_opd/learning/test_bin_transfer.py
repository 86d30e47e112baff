"""From a teacher's bins to a student's: row-stochastic, exact where it can be computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vla_opd import small as tiny
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.action_space import ActionSpace
from vla_opd.learning.bin_transfer import FLOOR, between, edges, overlap, require_comparable

Range = tuple[float, float]


def make_space(*ranges: Range, bins: int = 5, chunk: int = 1) -> ActionSpace:
    """Make a space with one normalised dimension per range."""
    low, high = zip(*ranges, strict=True)
    return ActionSpace(q01=low, q99=high, normalised=(True,) * len(low), chunk=chunk, bins=bins)


def matrix(teacher: ActionSpace, student: ActionSpace) -> np.ndarray:
    """Return the transfer matrix of spaces of one dimension."""
    (teacher_edges,) = edges(teacher)
    (student_edges,) = edges(student)
    return overlap(teacher_edges, student_edges)


def ranges(smallest: float) -> st.SearchStrategy[Range]:
    starts_and_widths = st.tuples(st.floats(-2, 2), st.floats(smallest, 3))
    return starts_and_widths.map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(ranges(0), ranges(0), st.integers(2, 40), st.integers(2, 40))
def test_every_bin_gives_all_of_its_mass(
    teacher: Range, student: Range, teacher_bins: int, student_bins: int
) -> None:
    transfer = matrix(
        make_space(teacher, bins=teacher_bins), make_space(student, bins=student_bins)
    )
    assert transfer.shape == (teacher_bins, student_bins)
    assert (transfer >= 0).all()
    np.testing.assert_allclose(transfer.sum(1), 1, rtol=0, atol=1e-12)


@given(ranges(0), st.integers(2, 256))
def test_equal_statistics_are_the_identity_to_the_last_bit(both: Range, bins: int) -> None:
    space = make_space(both, bins=bins)
    np.testing.assert_array_equal(matrix(space, space), np.eye(bins))
    assert between(make_space(both), make_space(both)) is None


def test_half_the_range_by_hand() -> None:
    """Teacher: bins of 1 from 0 to 4, and the point 4. Student: of 2 from 0 to 8, and point 8."""
    transfer = matrix(make_space((0.0, 4.0)), make_space((0.0, 8.0)))
    expected = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    np.testing.assert_allclose(transfer, expected, rtol=0, atol=1e-7)


def test_a_shifted_and_wider_range_by_hand() -> None:
    """Teacher: bins of 2 from -1 to 7, and the point 7. Student: of 1 from 0 to 4, and above."""
    transfer = matrix(make_space((-1.0, 7.0)), make_space((0.0, 4.0)))
    expected = [
        [1, 0, 0, 0, 0],
        [0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0.5, 0.5],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_allclose(transfer, expected, rtol=0, atol=1e-7)


def test_a_dimension_that_passes_through_can_meet_one_that_is_normalised() -> None:
    # From -1 to 1, whatever its statistics.
    plain = ActionSpace(q01=(5.0,), q99=(6.0,), normalised=(False,), chunk=1, bins=5)
    transfer = matrix(plain, make_space((-1.0, 1.0)))
    np.testing.assert_allclose(transfer[:4], np.eye(5)[:4], rtol=0, atol=1e-7)
    # Statistics are widened by 1e-8, so that 1 is not the largest action.
    assert transfer[4].tolist() == [0, 0, 0, 1, 0]


@given(st.floats(-0.99, 0.99), ranges(0.01), ranges(0.01))
def test_an_action_lands_where_the_student_would_put_it(
    x: float, teacher: Range, student: Range
) -> None:
    """With far narrower bins of the teacher.

    The student's bin of an action's decoded value gets mass. Decoded actions are float32.
    """
    student_space = make_space(student, bins=9)
    teacher_space = make_space(teacher, bins=256)
    low, high = teacher
    token = teacher_space.encode(np.array([[[low + (x + 1) / 2 * (high - low)]]]))
    value = teacher_space.decode(token).astype(np.float64)
    student_token = student_space.encode(value)
    transfer = matrix(teacher_space, student_space)
    assert transfer[int(token[0, 0]), int(student_token[0, 0])] > 0


def test_tokens_are_moved_by_dimension_and_stay_finite() -> None:
    teacher = make_space((0.0, 4.0), (0.0, 1.0), chunk=2)
    student = make_space((0.0, 8.0), (0.0, 1.0), chunk=2)
    transfer = between(teacher, student)
    assert transfer is not None
    shares = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4))
    moved = transfer(np.log(shares).astype(np.float16))
    assert moved.dtype == np.float32
    assert np.isfinite(moved).all()
    np.testing.assert_allclose(np.exp(moved).sum(-1), 1, rtol=0, atol=1e-5)
    # The second dimension is the same for both.
    np.testing.assert_allclose(np.exp(moved[:, 1::2]), shares[:, 1::2], rtol=0, atol=2e-3)
    first = shares[:, 0::2]
    halved = np.stack(
        [first[..., 0] + first[..., 1], first[..., 2] + first[..., 3], first[..., 4]], axis=-1
    )
    np.testing.assert_allclose(np.exp(moved[:, 0::2])[..., :3], halved, rtol=0, atol=2e-3)
    # The teacher has no action there.
    np.testing.assert_allclose(moved[:, 0::2, 3:], np.log(FLOOR / 5), rtol=1e-3)


@pytest.mark.parametrize(
    ("field", "teacher", "student", "expected"),
    [
        ("chunk", make_space((0.0, 1.0)), make_space((0.0, 1.0), chunk=2), 2),
        ("action_dim", make_space((0.0, 1.0), (0.0, 1.0)), make_space((0.0, 1.0)), 1),
    ],
)
def test_only_bins_can_be_transferred(
    field: str, teacher: ActionSpace, student: ActionSpace, expected: int
) -> None:
    message = (
        rf"action_space\.{field} is \d for the teacher; expected the student's {expected}, "
        "for only bins can move"
    )
    with pytest.raises(ValueError, match=message):
        between(teacher, student)


def test_other_statistics_are_refused_unless_the_labels_are_to_be_transferred() -> None:
    shifted = tiny.SPACE.model_copy(update={"q99": tuple(q + 1 for q in tiny.SPACE.q99)})

    def labels(*, transfer: bool) -> Manifest:
        return Manifest.model_construct(
            kind="labels",
            parents={},
            params={"label": {"transfer": transfer}},
            facts={"action_space": shifted.model_dump()},
        )

    require_comparable(tiny.FACTS, labels(transfer=True), "it001")
    message = r"it001: action_space\.q99 is .* for the teacher; expected the student's"
    with pytest.raises(ValueError, match=message):
        require_comparable(tiny.FACTS, labels(transfer=False), "it001")


def test_a_dimension_that_never_varies_for_the_student_has_all_mass_in_its_middle_bin() -> None:
    teacher = make_space((-1.0, 1.0), (0.0, 1.0))
    student = make_space((0.25, 0.25), (0.0, 1.0))
    transfer = between(teacher, student)
    assert transfer is not None
    np.testing.assert_array_equal(transfer.overlaps[0], np.eye(5)[[2] * 5])
    np.testing.assert_array_equal(transfer.overlaps[1], np.eye(5))
    assert student.encode(np.array([[[-1.0, 0.0]]]))[0, 0] == 2
