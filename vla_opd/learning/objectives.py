"""Objectives: per-token losses on student-visited states. Each function is its equation; `masked_mean` is the only mean.

Notation: p_S, p_T are the student's and teacher's categoricals over the V bins of one action token at one state; unless the settings say otherwise
both at the same temperature. Given the observation the K tokens of a chunk are independent, so the KL between chunk distributions is the sum of the
tokens' KLs; the losses below are per token and `masked_mean` averages over the valid ones. sg[.] stops gradients. Source: VLA-OPD, arXiv 2603.26666,
eqs. (2), (4)-(7); others are named where they stand.

`OBJECTIVES` can be asked at any state. `ON_DECISIONS` need a token that the rollout took, and so the states at which it decided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.params.objective import ClipParams, OptimizeParams


@dataclass(frozen=True)
class TokenBatch:
    """What an objective sees of N states: normalised log-probabilities over V bins of K tokens.

    student: log p_S, with gradients. teacher: log p_T, without.
    draw: one bin a token, sampled from the student as it is now; only the objectives that need a sample pay for it.
    """

    student: Float[Tensor, "N K V"]
    teacher: Float[Tensor, "N K V"]
    draw: Callable[[], Int[Tensor, "N K"]]
    settings: OptimizeParams = field(default_factory=OptimizeParams)


@dataclass(frozen=True)
class Taken:
    """The tokens that the rollout took at N states at which it decided.

    now: log p_S(a), with gradients, at the rollout's temperature. then: the same as the rollout recorded it, without.
    advantage: A of the episode, see `group_advantage`.
    """

    now: Float[Tensor, "N K"]
    then: Float[Tensor, "N K"]
    advantage: Float[Tensor, " N"]
    settings: ClipParams


@dataclass(frozen=True)
class DecisionBatch(TokenBatch):
    """States at which the rollout decided.

    tokens: a, the bins that it took; taken: what `grpo` sees of them.
    to_go: discounted sum of the rewards of the episode's later decisions, see `rewards_to_go`.
    """

    tokens: Int[Tensor, "N K"] = field(kw_only=True)
    taken: Taken = field(kw_only=True)
    to_go: Float[Tensor, " N"] = field(kw_only=True)

    @property
    def stale(self) -> Float[Tensor, "N K"] | None:
        """Log p_S(a) in the reward, where it is to be as the rollout recorded it."""
        return self.taken.then if self.settings.reward == "rollout" else None


def reverse_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_S || p_T) = sum_v p_S(v) (log p_S(v) - log p_T(v)), exactly, over all V bins; eq. (5), in nats."""
    return (batch.student.exp() * (batch.student - batch.teacher)).sum(-1)


def reverse_kl_sampled(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """The paper's score-function form: -log p_S(a) sg[r(a)], r = log p_T - log p_S, one a ~ p_S; eqs. (6)-(7).

    Its gradient is that of `reverse_kl` in expectation over a, with a far higher variance; its value means nothing. `a` is drawn from the
    student being updated: on the draws of an older student the expectation is another one, and a few steps on them collapse the policy.
    """
    tokens = batch.draw()
    return -of(batch.student, tokens) * reward(batch, tokens)


def reverse_kl_rollout(batch: DecisionBatch) -> Float[Tensor, "N K"]:
    """The same on the rollout's own tokens, -w sg[r(a) + R], a ~ p_old; R = `rewards_to_go`, zero unless `discount` is set.

    w = log p_S(a), as published: right for the first step on a batch only, and scored at the temperature at which a was drawn. Or, with `ratio`,
    w = p_S(a) / p_old(a), whose expected gradient stays that of `reverse_kl` at every step (with R = 0 and r `fresh`). r is log p_T(a) - log p_S(a)
    with the student as it is now, or as the rollout recorded it (`reward: rollout`).
    """
    student = of(batch.student, batch.tokens)
    weight = (student - batch.taken.then).exp() if batch.settings.ratio else student
    return -weight * (reward(batch, batch.tokens, batch.stale) + batch.to_go.unsqueeze(-1))


def forward_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)) on student states: the mass-covering contrast, in nats."""
    return (batch.teacher.exp() * (batch.teacher - batch.student)).sum(-1)


def hard_ce(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """-log p_S(argmax_v p_T(v)): the teacher's greedy label, as in classic DAgger, in nats."""
    return -of(batch.student, batch.teacher.argmax(-1))


def jsd(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """Generalised Jensen-Shannon divergence: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S, in nats.

    Divided by beta it tends to the forward KL as beta goes to 0; by 1 - beta, to the reverse KL as beta goes to 1. Source: GKD, arXiv 2306.13649.
    """
    beta = torch.tensor(batch.settings.beta, dtype=batch.student.dtype, device=batch.student.device)
    mixture = torch.logaddexp(beta.log() + batch.teacher, (1 - beta).log() + batch.student)
    from_teacher = (batch.teacher.exp() * (batch.teacher - mixture)).sum(-1)
    from_student = (batch.student.exp() * (batch.student - mixture)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def grpo(taken: Taken) -> Float[Tensor, "N K"]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = p_S(a) / p_old(a) token by token; eq. (2). No KL term, no entropy bonus.

    The mean over an episode's tokens, then over episodes, is `episode_weight`. Source: SimpleVLA-RL, arXiv 2509.09674.
    """
    ratio, advantage = (taken.now - taken.then).exp(), taken.advantage.unsqueeze(-1)
    clipped = ratio.clamp(1 - taken.settings.clip_low, 1 + taken.settings.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def mixed(batch: DecisionBatch) -> Float[Tensor, "N K"]:
    """`grpo` + `distill` times `reverse_kl`: the environment's reward, with the teacher as a dense guide."""
    return grpo(batch.taken) + batch.settings.distill * reverse_kl(batch)


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


def reward(
    batch: TokenBatch, tokens: Int[Tensor, "N K"], log_probs: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N K"]:
    """sg[r(a)], r = log p_T - log p_S over all bins, or with an older student's `log_probs` of a; eq. (6).

    `clamp` cuts r at both ends. `centre` takes off its mean under the student: the same expected gradient, with less variance.
    """
    every = (batch.teacher - batch.student).detach()
    one = of(every, tokens) if log_probs is None else of(batch.teacher, tokens) - log_probs
    limit = batch.settings.clamp
    if limit is not None:
        every, one = every.clamp(-limit, limit), one.clamp(-limit, limit)
    return one - (batch.student.detach().exp() * every).sum(-1) if batch.settings.centre else one


def of(log_probs: Float[Tensor, "N K V"], tokens: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """What is said of one bin a token."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def clamped(
    batch: TokenBatch, tokens: Int[Tensor, "N K"], log_probs: Float[Tensor, "N K"] | None = None
) -> Bool[Tensor, "N K"]:
    """Where `clamp` cuts the `reward` of the same arguments."""
    limit = math.inf if batch.settings.clamp is None else batch.settings.clamp
    student = of(batch.student.detach(), tokens) if log_probs is None else log_probs
    return (of(batch.teacher, tokens) - student).abs() > limit


def clipped(taken: Taken) -> Bool[Tensor, "N K"]:
    """Where `grpo` has no gradient, because the ratio has gone as far as it may."""
    ratio = (taken.now.detach() - taken.then).exp()
    up, down = ratio > 1 + taken.settings.clip_high, ratio < 1 - taken.settings.clip_low
    return torch.where(taken.advantage.unsqueeze(-1) > 0, up, down)


def confidence(teacher: Float[Tensor, "N K V"], power: float) -> Float[Tensor, "N K"]:
    """(1 - H(p_T) / log V)^power: a token's weight, from 1 where the teacher is certain to 0 where it has no opinion. 1 if power is 0."""
    return (1 - entropy(teacher) / math.log(teacher.shape[-1])).clamp(0, 1) ** power


def group_advantage(success: Bool[Tensor, " G"]) -> Float[Tensor, " G"]:
    """A_i = (R_i - mean R) / (std R + 1e-6), R in {0, 1}, of the G episodes of one group, std with G - 1; eq. (2). ValueError for a single one."""
    if len(success) < 2:
        raise ValueError(
            f"group is {len(success)}; expected at least 2 episodes of one placement: an advantage is one over the others"
        )
    rewards = success.float()
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def rewards_to_go(rewards: Float[Tensor, " T"], discount: float) -> Float[Tensor, " T"]:
    """R_t = sum_{s > t} discount^(s - t) r_s, of the T decisions of one episode; r_s is the sum over the decision's valid tokens."""
    to_go = torch.zeros_like(rewards)
    for t in range(len(rewards) - 2, -1, -1):
        to_go[t] = discount * (rewards[t + 1] + to_go[t + 1])
    return to_go


def episode_weight(mask: Bool[Tensor, "N K"], episode: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """A weight a state, which averages to 1 over tokens: with it the mean over all tokens is that over episodes of each one's mean over its own."""
    tokens = mask.sum(1)
    _, which = episode.unique(return_inverse=True)
    lengths = torch.zeros(int(which.max()) + 1).index_add(0, which, tokens.float())
    return tokens.sum() / (len(lengths) * lengths[which])


def drawn(log_probs: Float[Tensor, "N K V"], seed: int) -> Int[Tensor, "N K"]:
    """One bin a token from normalised log-probabilities; on the CPU, so that a seed gives the same draw wherever they are."""
    probabilities = log_probs.detach().exp().flatten(0, 1).cpu()
    tokens = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
    return tokens.view(log_probs.shape[:2]).to(log_probs.device)


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
