"""Objectives: per-token losses on student-visited states. Each function is its equation.

Notation: p_S and p_T are the categorical distributions of student and teacher over the V bins of
one action token at one state; both at the same temperature unless the settings say otherwise. Given
the observation, the K tokens of a chunk are independent, so the KL between chunk distributions is
the sum of the tokens' KLs; the losses below are per token and `masked_mean` averages over the valid
ones. sg[.] stops gradients. Source: VLA-OPD, arXiv 2603.26666, eqs. (2), (4)-(7); other sources are
named where they apply.

`OBJECTIVES` are defined at any state. `ON_DECISIONS` need a token that the rollout sampled, and so
the states at which it decided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.params.objective import (
    ClipParams,
    JsdParams,
    MixedParams,
    RewardParams,
    RolloutParams,
)

Options_co = TypeVar("Options_co", covariant=True)
"""An objective's model in `vla_opd.params.objective`."""


@dataclass(frozen=True)
class TokenBatch(Generic[Options_co]):
    """Normalised log-probabilities over V bins of the K tokens of N states.

    student: log p_S, with gradients. teacher: log p_T, without.
    draw: returns one bin per token, sampled from the current student; only the objectives that need
          a sample pay for it.
    options: `optimize.objective`: name and options of the objective.
    """

    student: Float[Tensor, "N K V"]
    teacher: Float[Tensor, "N K V"]
    draw: Callable[[], Int[Tensor, "N K"]]
    options: Options_co


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that the rollout sampled at N states at which it decided.

    now:  log p_S(a) of the current student, with gradients, at the rollout's temperature.
    then: log p_old(a) as the rollout recorded it, without gradients.
    advantage: A of the episode, see `group_advantage`.
    """

    now: Float[Tensor, "N K"]
    then: Float[Tensor, "N K"]
    advantage: Float[Tensor, " N"]


@dataclass(frozen=True)
class DecisionBatch(TokenBatch[Options_co]):
    """States at which the rollout decided.

    tokens:  a, the bins that it sampled; sampled: their log-probabilities and advantages.
    to_go:   discounted sum of the rewards of the episode's later decisions, see `rewards_to_go`.
    """

    tokens: Int[Tensor, "N K"] = field(kw_only=True)
    sampled: SampledTokens = field(kw_only=True)
    to_go: Float[Tensor, " N"] = field(kw_only=True)


def reverse_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_S || p_T) = sum_v p_S(v) (log p_S(v) - log p_T(v)), exact over all V bins, in nats.

    Eq. (5).
    """
    return (batch.student.exp() * (batch.student - batch.teacher)).sum(-1)


def reverse_kl_sampled(batch: TokenBatch[RewardParams]) -> Float[Tensor, "N K"]:
    """The paper's score-function form: -log p_S(a) sg[r(a)], one a ~ p_S; eqs. (6)-(7).

    r = log p_T - log p_S. Its gradient equals that of `reverse_kl` in expectation over a, with a
    far higher variance; its value has no meaning. `a` is drawn from the student being updated: with
    draws from an older student the expectation differs, and a few steps on them collapse the policy.
    """
    tokens = batch.draw()
    return -select_token(batch.student, tokens) * reward(batch, tokens)


def reverse_kl_rollout(batch: DecisionBatch[RolloutParams]) -> Float[Tensor, "N K"]:
    """The same on the rollout's own tokens: -w sg[r(a) + R], a ~ p_old.

    R = `rewards_to_go`, zero unless `discount` is set. w = log p_S(a), as published: correct for
    the first step on a batch only, and scored at the temperature at which a was sampled. With
    `ratio`, w = p_S(a) / p_old(a), whose expected gradient stays that of `reverse_kl` at every step
    (for R = 0 and `reward: fresh`). r is log p_T(a) - log p_S(a) with the current student, or as the
    rollout recorded it (`reward: rollout`).
    """
    student = select_token(batch.student, batch.tokens)
    weight = (student - batch.sampled.then).exp() if batch.options.ratio else student
    immediate = reward(batch, batch.tokens, recorded_log_probs(batch))
    return -weight * (immediate + batch.to_go.unsqueeze(-1))


def forward_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)) on student states, in nats.

    The mass-covering contrast.
    """
    return (batch.teacher.exp() * (batch.teacher - batch.student)).sum(-1)


def hard_ce(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """-log p_S(argmax_v p_T(v)): the teacher's greedy label, as in classic DAgger, in nats."""
    return -select_token(batch.student, batch.teacher.argmax(-1))


def jsd(batch: TokenBatch[JsdParams]) -> Float[Tensor, "N K"]:
    """Return beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S, in nats.

    The generalised Jensen-Shannon divergence. Divided by beta it tends to the forward KL as beta
    goes to 0; divided by 1 - beta, to the reverse KL as beta goes to 1. Source: GKD, arXiv
    2306.13649.
    """
    beta = torch.tensor(batch.options.beta, dtype=batch.student.dtype, device=batch.student.device)
    mixture = torch.logaddexp(beta.log() + batch.teacher, (1 - beta).log() + batch.student)
    from_teacher = (batch.teacher.exp() * (batch.teacher - mixture)).sum(-1)
    from_student = (batch.student.exp() * (batch.student - mixture)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def grpo(sampled: SampledTokens, clip: ClipParams) -> Float[Tensor, "N K"]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = p_S(a) / p_old(a) per token.

    Eq. (2). No KL term, no entropy bonus. The mean over an episode's tokens, then over episodes, is
    `episode_weight`. Source: SimpleVLA-RL, arXiv 2509.09674.
    """
    ratio = (sampled.now - sampled.then).exp()
    advantage = sampled.advantage.unsqueeze(-1)
    bounded = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def mixed(batch: DecisionBatch[MixedParams]) -> Float[Tensor, "N K"]:
    """`grpo` + `distill` times `reverse_kl`: the task reward, with the teacher as a dense guide."""
    return grpo(batch.sampled, batch.options) + batch.options.distill * reverse_kl(batch)


Objective = Callable[[TokenBatch], Float[Tensor, "N K"]]
OnDecisions = Callable[[DecisionBatch], Float[Tensor, "N K"]]

OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": reverse_kl,
    "reverse_kl_sampled": reverse_kl_sampled,
    "forward_kl": forward_kl,
    "hard_ce": hard_ce,
    "jsd": jsd,
}

ON_DECISIONS: dict[str, OnDecisions] = {
    "reverse_kl_rollout": reverse_kl_rollout,
    "mixed": mixed,
}


def recorded_log_probs(batch: DecisionBatch[RolloutParams]) -> Float[Tensor, "N K"] | None:
    """Log p_old(a) for the reward, with `reward: rollout`; otherwise None."""
    return batch.sampled.then if batch.options.reward == "rollout" else None


def reward(
    batch: TokenBatch[RewardParams],
    tokens: Int[Tensor, "N K"],
    log_probs: Float[Tensor, "N K"] | None = None,
) -> Float[Tensor, "N K"]:
    """sg[r(a)], r = log p_T - log p_S over all bins; eq. (6).

    log_probs: of a under an older student, in place of log p_S(a).
    `clamp` bounds r on both sides. `centre` subtracts its mean under the student: the same expected
    gradient, with less variance.
    """
    per_bin = (batch.teacher - batch.student).detach()
    if log_probs is None:
        chosen = select_token(per_bin, tokens)
    else:
        chosen = select_token(batch.teacher, tokens) - log_probs
    limit = batch.options.clamp
    if limit is not None:
        per_bin = per_bin.clamp(-limit, limit)
        chosen = chosen.clamp(-limit, limit)
    if not batch.options.centre:
        return chosen
    return chosen - (batch.student.detach().exp() * per_bin).sum(-1)


def select_token(
    log_probs: Float[Tensor, "N K V"], tokens: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Select one bin's log-probability per token."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def is_clamped(
    batch: TokenBatch[RewardParams],
    tokens: Int[Tensor, "N K"],
    log_probs: Float[Tensor, "N K"] | None = None,
) -> Bool[Tensor, "N K"]:
    """Tell for which tokens `clamp` changes the `reward` of the same arguments."""
    limit = math.inf if batch.options.clamp is None else batch.options.clamp
    student = select_token(batch.student.detach(), tokens) if log_probs is None else log_probs
    return (select_token(batch.teacher, tokens) - student).abs() > limit


def is_clipped(sampled: SampledTokens, clip: ClipParams) -> Bool[Tensor, "N K"]:
    """Tell for which tokens `grpo` has no gradient because the ratio is beyond its bound."""
    ratio = (sampled.now.detach() - sampled.then).exp()
    above = ratio > 1 + clip.clip_high
    below = ratio < 1 - clip.clip_low
    return torch.where(sampled.advantage.unsqueeze(-1) > 0, above, below)


def confidence_weight(teacher: Float[Tensor, "N K V"], power: float) -> Float[Tensor, "N K"]:
    """(1 - H(p_T) / log V)^power: the weight of a token.

    1 where the teacher is certain, 0 where it is uniform; 1 everywhere for power 0.
    """
    return (1 - entropy(teacher) / math.log(teacher.shape[-1])).clamp(0, 1) ** power


def group_advantage(success: Bool[Tensor, " G"]) -> Float[Tensor, " G"]:
    """A_i = (R_i - mean R) / (std R + 1e-6), R in {0, 1}, of the G episodes of a group; eq. (2).

    std is the sample standard deviation (G - 1). ValueError for a group of one.
    """
    if len(success) < 2:
        raise ValueError(
            f"group is {len(success)}; expected at least 2 episodes per placement: "
            "an advantage compares an episode with the others of its group"
        )
    rewards = success.float()
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def rewards_to_go(rewards: Float[Tensor, " T"], discount: float) -> Float[Tensor, " T"]:
    """R_t = sum_{s > t} discount^(s - t) r_s over the T decisions of one episode.

    r_s is the sum over the decision's valid tokens.
    """
    to_go = torch.zeros_like(rewards)
    for t in range(len(rewards) - 2, -1, -1):
        to_go[t] = discount * (rewards[t + 1] + to_go[t + 1])
    return to_go


def episode_weight(mask: Bool[Tensor, "N K"], episode: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return a weight per state, whose mean over valid tokens is 1.

    With it, the mean over all tokens is the mean over episodes of each episode's mean over tokens.
    """
    tokens = mask.sum(1)
    _, index = episode.unique(return_inverse=True)
    lengths = torch.zeros(int(index.max()) + 1).index_add(0, index, tokens.float())
    return tokens.sum() / (len(lengths) * lengths[index])


def sample_tokens(log_probs: Float[Tensor, "N K V"], seed: int) -> Int[Tensor, "N K"]:
    """Sample one bin per token from normalised log-probabilities.

    On the CPU, so that a seed gives the same sample wherever the log-probabilities are.
    """
    probabilities = log_probs.detach().exp().flatten(0, 1).cpu()
    tokens = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
    return tokens.view(log_probs.shape[:2]).to(log_probs.device)


def masked_mean(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Float[Tensor, ""]:
    """sum(values * mask) / sum(mask): the mean over valid tokens. ValueError if none is valid."""
    if not mask.any():
        raise ValueError("mask: no valid token in the batch; expected at least one")
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def at_temperature(log_probs: Float[Tensor, "*B V"], temperature: float) -> Float[Tensor, "*B V"]:
    """Log-softmax of log p / T: the distribution at a temperature, from logits or log p alike."""
    return torch.log_softmax(log_probs / temperature, -1)


def entropy(log_probs: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """-sum_v p(v) log p(v), in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)
