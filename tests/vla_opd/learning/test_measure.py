"""Distances between student and teacher, against what they are by definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_opd.learning.measure import distance
from vla_opd.learning.objectives import TokenBatch, forward_kl, masked_mean, reverse_kl

CHUNK, DIMS, V = 3, 2, 7


def batch(student: Tensor, teacher: Tensor) -> TokenBatch:
    return TokenBatch(
        student.log_softmax(-1),
        teacher.log_softmax(-1),
        lambda: torch.zeros(student.shape[:2], dtype=torch.long),
    )


def logits(seed: int, rows: int = 4) -> Tensor:
    return 2 * torch.randn(rows, CHUNK * DIMS, V, generator=torch.Generator().manual_seed(seed))


def mask(rows: int = 4) -> Tensor:
    return torch.arange(rows * CHUNK * DIMS).view(rows, -1) % 5 > 0


def test_a_student_that_is_the_teacher_is_at_no_distance() -> None:
    one = logits(0)
    found = distance(batch(one, one), mask(), CHUNK)
    assert (found.reverse_kl, found.forward_kl) == pytest.approx((0, 0), abs=1e-6)
    assert found.student_entropy == found.teacher_entropy
    assert found.top_overlap == 1


def test_both_divergences_are_means_over_valid_tokens() -> None:
    it, valid = batch(logits(1), logits(2)), mask()
    found = distance(it, valid, CHUNK)
    assert found.reverse_kl == pytest.approx(masked_mean(reverse_kl(it), valid).item())
    assert found.forward_kl == pytest.approx(masked_mean(forward_kl(it), valid).item())


def test_the_rank_is_where_the_students_tokens_are_on_the_teachers_list() -> None:
    teacher = torch.arange(V, 0, -1).float().expand(1, CHUNK * DIMS, V)  # its list is 0, 1, 2, ...
    for token in (0, 3, V - 1):
        student = torch.full((1, CHUNK * DIMS, V), -50.0)
        student[..., token] = 50
        assert distance(batch(student, teacher), mask(1), CHUNK).teacher_rank == pytest.approx(
            token, abs=1e-5
        )
    uniform = torch.zeros(1, CHUNK * DIMS, V)
    assert distance(batch(uniform, teacher), mask(1), CHUNK).teacher_rank == pytest.approx(
        (V - 1) / 2
    )


def test_the_overlap_is_of_the_five_most_likely() -> None:
    teacher, student = (
        torch.arange(V).float().expand(1, CHUNK * DIMS, V),
        torch.arange(V, 0, -1).float().expand(1, CHUNK * DIMS, V),
    )
    assert distance(batch(student, teacher), mask(1), CHUNK).top_overlap == pytest.approx(
        3 / 5
    )  # 0 ... 4 and 2 ... 6


def test_profiles_are_means_of_an_action_and_of_a_dimension() -> None:
    it, valid = batch(logits(3), logits(4)), mask()
    valid[:, 0] = False
    found, kl = distance(it, valid, CHUNK), reverse_kl(it).numpy()
    position, dimension = np.repeat(np.arange(CHUNK), DIMS), np.tile(np.arange(DIMS), CHUNK)
    for index in range(CHUNK):
        wanted = kl[:, position == index][valid.numpy()[:, position == index]].mean()
        assert found.by_position.reverse_kl[index] == pytest.approx(wanted, rel=1e-5)
    for index in range(DIMS):
        wanted = kl[:, dimension == index][valid.numpy()[:, dimension == index]].mean()
        assert found.by_dimension.reverse_kl[index] == pytest.approx(wanted, rel=1e-5)
    valid[:, -DIMS:] = False
    assert distance(it, valid, CHUNK).by_position.student_entropy[-1] is None
