"""The divergence of student and teacher, against its definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_opd.learning.measure import measure_divergence
from vla_opd.learning.objectives import TokenBatch, forward_kl, masked_mean, reverse_kl

CHUNK = 3
DIMS = 2
BINS = 7


def make_batch(student: Tensor, teacher: Tensor) -> TokenBatch[None]:
    return TokenBatch(
        student.log_softmax(-1),
        teacher.log_softmax(-1),
        lambda: torch.zeros(student.shape[:2], dtype=torch.long),
        None,
    )


def random_logits(seed: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, CHUNK * DIMS, BINS, generator=generator)


def make_mask(rows: int = 4) -> Tensor:
    return torch.arange(rows * CHUNK * DIMS).view(rows, -1) % 5 > 0


def test_a_student_that_is_the_teacher_has_no_divergence() -> None:
    logits = random_logits(0)
    divergence = measure_divergence(make_batch(logits, logits), make_mask(), CHUNK)
    assert (divergence.reverse_kl, divergence.forward_kl) == pytest.approx((0, 0), abs=1e-6)
    assert divergence.student_entropy == divergence.teacher_entropy
    assert divergence.top_overlap == 1


def test_both_kls_are_means_over_valid_tokens() -> None:
    batch = make_batch(random_logits(1), random_logits(2))
    mask = make_mask()
    divergence = measure_divergence(batch, mask, CHUNK)
    assert divergence.reverse_kl == pytest.approx(masked_mean(reverse_kl(batch), mask).item())
    assert divergence.forward_kl == pytest.approx(masked_mean(forward_kl(batch), mask).item())


def test_the_rank_is_that_of_the_students_tokens_for_the_teacher() -> None:
    shape = (1, CHUNK * DIMS, BINS)
    teacher = torch.arange(BINS, 0, -1).float().expand(shape)  # ranks bins 0, 1, 2, ...

    def rank(student: Tensor) -> float:
        return measure_divergence(make_batch(student, teacher), make_mask(1), CHUNK).teacher_rank

    for token in (0, 3, BINS - 1):
        student = torch.full(shape, -50.0)
        student[..., token] = 50
        assert rank(student) == pytest.approx(token, abs=1e-5)
    assert rank(torch.zeros(shape)) == pytest.approx((BINS - 1) / 2)


def test_the_overlap_is_of_the_five_most_likely_bins() -> None:
    shape = (1, CHUNK * DIMS, BINS)
    teacher = torch.arange(BINS).float().expand(shape)
    student = torch.arange(BINS, 0, -1).float().expand(shape)
    divergence = measure_divergence(make_batch(student, teacher), make_mask(1), CHUNK)
    assert divergence.top_overlap == pytest.approx(3 / 5)  # 0 ... 4 and 2 ... 6


def test_profiles_are_means_per_action_and_per_dimension() -> None:
    batch = make_batch(random_logits(3), random_logits(4))
    mask = make_mask()
    mask[:, 0] = False
    divergence = measure_divergence(batch, mask, CHUNK)
    kl = reverse_kl(batch).numpy()
    valid = mask.numpy()
    position = np.repeat(np.arange(CHUNK), DIMS)
    for index, value in enumerate(divergence.by_position.reverse_kl):
        columns = position == index
        assert value == pytest.approx(kl[:, columns][valid[:, columns]].mean(), rel=1e-5)
    assert len(divergence.by_position.reverse_kl) == CHUNK
    dimension = np.tile(np.arange(DIMS), CHUNK)
    for index, value in enumerate(divergence.by_dimension.reverse_kl):
        columns = dimension == index
        assert value == pytest.approx(kl[:, columns][valid[:, columns]].mean(), rel=1e-5)
    assert len(divergence.by_dimension.reverse_kl) == DIMS
    mask[:, -DIMS:] = False
    assert measure_divergence(batch, mask, CHUNK).by_position.student_entropy[-1] is None
