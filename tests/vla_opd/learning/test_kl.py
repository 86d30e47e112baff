"""The KL divergence beside its definition, and its gradients beside finite differences."""

import pytest
import torch
from torch import Tensor

from vla_opd.learning import kl as module
from vla_opd.learning.kl import kl


def random_log_probs(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return torch.log_softmax(2 * logits, -1)


@pytest.mark.parametrize("cached", [1, 12, 10_000])  # numbers: a row, two rows of six, all rows
def test_value_and_gradients_of_both_arguments(
    monkeypatch: pytest.MonkeyPatch, cached: int
) -> None:
    monkeypatch.setattr(module, "CACHED", cached)
    log_p = random_log_probs(0, 3, 5, 6).requires_grad_()
    log_q = random_log_probs(1, 3, 5, 6).requires_grad_()
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl(log_p, log_q), expected)
    assert torch.autograd.gradcheck(kl, (log_p, log_q))
    assert torch.autograd.gradcheck(kl, (log_p, log_q.detach()))
    assert torch.autograd.gradcheck(kl, (log_p.detach(), log_q))


def test_arguments_need_not_be_contiguous() -> None:
    log_p = random_log_probs(0, 6, 4, 5).transpose(0, 1)
    log_q = random_log_probs(1, 4, 12, 5)[:, ::2]
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl(log_p, log_q), expected)


def test_nothing_but_the_arguments_is_kept_for_the_backward_pass() -> None:
    log_p = random_log_probs(0, 8, 4, 16).requires_grad_()
    log_q = random_log_probs(1, 8, 4, 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        kl(log_p, log_q)
    assert sorted(kept) == sorted([log_p.data_ptr(), log_q.data_ptr()])
