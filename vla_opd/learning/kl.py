"""The KL divergence over all bins, with its analytic gradient.

Autograd would keep p and log p - log q for the backward pass, and read whole arrays from memory
several times. Here only the two arguments are kept, and a few rows at a time, which fit into a
core's cache, go through all operations.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED = 2**17
"""Numbers of one array that are worked on at a time; on a GPU, all of them."""


def kl(log_p: Float[Tensor, "*B V"], log_q: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats.

    Its gradients are p (log p - log q + 1) for the first argument and -p for the second.
    """
    return _Kl.apply(log_p, log_q)


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        ctx.save_for_backward(log_p, log_q)
        p_rows, q_rows = _rows(log_p), _rows(log_q)
        divergence = p_rows.new_empty(len(p_rows))
        for rows in _slices(log_p):
            log_ratio = p_rows[rows] - q_rows[rows]
            terms = log_ratio.mul_(p_rows[rows].exp())
            torch.sum(terms, -1, out=divergence[rows])
        return divergence.view(log_p.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        log_p, log_q = ctx.saved_tensors
        scale = _rows(gradient.unsqueeze(-1))
        p_rows, q_rows = _rows(log_p), _rows(log_q)
        of_p = torch.empty_like(p_rows) if ctx.needs_input_grad[0] else None
        of_q = torch.empty_like(q_rows) if ctx.needs_input_grad[1] else None
        for rows in _slices(log_p):
            weight = p_rows[rows].exp().mul_(scale[rows])
            if of_p is not None:
                log_ratio = torch.sub(p_rows[rows], q_rows[rows], out=of_p[rows])
                log_ratio.add_(1).mul_(weight)
            if of_q is not None:
                torch.neg(weight, out=of_q[rows])
        return _as(of_p, log_p), _as(of_q, log_q)


def _rows(array: Tensor) -> Tensor:
    return array.reshape(-1, array.shape[-1])


def _as(rows: Tensor | None, array: Tensor) -> Tensor | None:
    return None if rows is None else rows.view(array.shape)


def _slices(array: Tensor) -> Iterator[slice]:
    width = array.shape[-1]
    count = array.numel() // width
    step = max(1, CACHED // width) if array.device.type == "cpu" else count
    for first in range(0, count, step):
        yield slice(first, first + step)
