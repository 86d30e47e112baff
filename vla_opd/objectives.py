"""Objectives: per-token losses on student-visited states. Each function is its equation; `masked_mean` is the only mean.

Notation: p_S, p_T are the student's and teacher's categoricals over the V bins of one action token at one state, both at the same temperature.
Given the observation the K tokens of a chunk are independent, so the KL between chunk distributions is the sum of the tokens' KLs; the losses
below are per token and `masked_mean` averages over the valid ones. Source: VLA-OPD, arXiv 2603.26666, eqs. (4)-(7).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """What an objective sees of N states: normalised log-probabilities over V bins of K tokens.

    student: log p_S, with gradients. teacher: log p_T, without.
    draw: one bin a token, sampled from the student as it is now; only the objectives that need a sample pay for it.
    """

    student: Float[Tensor, "N K V"]
    teacher: Float[Tensor, "N K V"]
    draw: Callable[[], Int[Tensor, "N K"]]


def reverse_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_S || p_T) = sum_v p_S(v) (log p_S(v) - log p_T(v)), exactly, over all V bins; eq. (5), in nats."""
    return (batch.student.exp() * (batch.student - batch.teacher)).sum(-1)


def reverse_kl_sampled(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """The paper's score-function form: -log p_S(a) sg[r], r = log p_T(a) - log p_S(a), one a ~ p_S; eqs. (6)-(7).

    Its gradient is that of `reverse_kl` in expectation over a, with a far higher variance; its value means nothing. `a` must come from the
    student being updated: on the draws of an older student the expectation is another one, and a few steps on them collapse the policy.
    """
    drawn = batch.draw().unsqueeze(-1)
    student, teacher = batch.student.gather(-1, drawn).squeeze(-1), batch.teacher.gather(-1, drawn).squeeze(-1)
    return -student * (teacher - student).detach()


def forward_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)) on student states: the mass-covering contrast, in nats."""
    return (batch.teacher.exp() * (batch.teacher - batch.student)).sum(-1)


def hard_ce(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """-log p_S(argmax_v p_T(v)): the teacher's greedy label, as in classic DAgger, in nats."""
    return -batch.student.gather(-1, batch.teacher.argmax(-1, keepdim=True)).squeeze(-1)


def drawn(log_probs: Float[Tensor, "N K V"], seed: int) -> Int[Tensor, "N K"]:
    """One bin a token from normalised log-probabilities; on the CPU, so that a seed gives the same draw wherever they are."""
    probabilities = log_probs.detach().exp().flatten(0, 1).cpu()
    tokens = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
    return tokens.view(log_probs.shape[:2]).to(log_probs.device)


Objective = Callable[[TokenBatch], Float[Tensor, "N K"]]

OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": reverse_kl,
    "reverse_kl_sampled": reverse_kl_sampled,
    "forward_kl": forward_kl,
    "hard_ce": hard_ce,
}


def masked_mean(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Float[Tensor, ""]:
    """The mean over valid tokens: sum(values * mask) / sum(mask). ValueError if none is valid."""
    if not mask.any():
        raise ValueError("mask: no valid token in the batch; expected at least one")
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def tempered(log_probs: Float[Tensor, "*B V"], temperature: float) -> Float[Tensor, "*B V"]:
    """Log-softmax of log p / T: the same distribution at another temperature, from logits or from log-probabilities alike."""
    return torch.log_softmax(log_probs / temperature, -1)


def entropy(log_probs: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """-sum_v p(v) log p(v), in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)
