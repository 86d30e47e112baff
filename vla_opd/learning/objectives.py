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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_opd.learning.kl import kl
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
    return kl(batch.student, batch.teacher)


def reverse_kl_sampled(batch: TokenBatch[RewardParams]) -> Float[Tensor, "N K"]:
    """The paper's score-function form: -log p_S(a) sg[r(a)], one a ~ p_S; eqs. (6)-(7).

    r = log p_T - log p_S. Its gradient equals that of `reverse_kl` in expectation over a, with a
    far higher variance; its value has no meaning. `a` is drawn from the student being updated: with
    draws from an older student the expectation differs, and a few steps on them collapse the
    policy.
    """
    tokens = batch.draw()
    log_prob = select_token(batch.student, tokens)
    return -log_prob * reward(batch, tokens)


def reverse_kl_rollout(batch: DecisionBatch[RolloutParams]) -> Float[Tensor, "N K"]:
    """The same on the rollout's own tokens: -w sg[r(a) + R], a ~ p_old.

    R = `rewards_to_go`, zero unless `discount` is set. w = log p_S(a), as published: correct for
    the first step on a batch only, and scored at the temperature at which a was sampled. With
    `ratio`, w = p_S(a) / p_old(a), whose expected gradient stays that of `reverse_kl` at every step
    (for R = 0 and `reward: fresh`). r is log p_T(a) - log p_S(a) with the current student, or as
    the rollout recorded it (`reward: rollout`).
    """
    weight = select_token(batch.student, batch.tokens)
    if batch.options.ratio:
        log_ratio = weight - batch.sampled.then
        weight = log_ratio.exp()
    recorded = recorded_log_probs(batch)
    immediate = reward(batch, batch.tokens, recorded)
    later = batch.to_go.unsqueeze(-1)
    return -weight * (immediate + later)


def forward_kl(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)) on student states, in nats.

    The mass-covering contrast.
    """
    return kl(batch.teacher, batch.student)


def hard_ce(batch: TokenBatch) -> Float[Tensor, "N K"]:
    """-log p_S(argmax_v p_T(v)): the teacher's greedy label, as in classic DAgger, in nats."""
    greedy = batch.teacher.argmax(-1)
    return -select_token(batch.student, greedy)


def jsd(batch: TokenBatch[JsdParams]) -> Float[Tensor, "N K"]:
    """Return beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S, in nats.

    The generalised Jensen-Shannon divergence. Divided by beta it tends to the forward KL as beta
    goes to 0; divided by 1 - beta, to the reverse KL as beta goes to 1. Source: GKD, arXiv
    2306.13649.
    """
    teacher = batch.teacher
    student = batch.student
    teacher_weight = torch.tensor(batch.options.beta, dtype=student.dtype, device=student.device)
    student_weight = 1 - teacher_weight
    teacher_part = teacher_weight.log() + teacher
    student_part = student_weight.log() + student
    mixture = torch.logaddexp(teacher_part, student_part)
    teacher_kl = kl(teacher, mixture)
    student_kl = kl(student, mixture)
    return teacher_weight * teacher_kl + student_weight * student_kl


def grpo(sampled: SampledTokens, clip: ClipParams) -> Float[Tensor, "N K"]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = p_S(a) / p_old(a) per token.

    Eq. (2). No KL term, no entropy bonus. The mean over an episode's tokens, then over episodes, is
    `episode_weight`. Source: SimpleVLA-RL, arXiv 2509.09674.
    """
    log_ratio = sampled.now - sampled.then
    ratio = log_ratio.exp()
    lowest = 1 - clip.clip_low
    highest = 1 + clip.clip_high
    clipped_ratio = ratio.clamp(lowest, highest)
    advantage = sampled.advantage.unsqueeze(-1)
    unclipped = ratio * advantage
    clipped = clipped_ratio * advantage
    return -torch.minimum(unclipped, clipped)


def mixed(batch: DecisionBatch[MixedParams]) -> Float[Tensor, "N K"]:
    """`grpo` + `distill` times `reverse_kl`: the task reward, with the teacher as a dense guide."""
    options = batch.options
    task = grpo(batch.sampled, options)
    guide = options.distill * reverse_kl(batch)
    return task + guide


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
    if batch.options.reward != "rollout":
        return None
    return batch.sampled.then


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
    log_ratio = batch.teacher - batch.student
    per_bin = log_ratio.detach()
    if log_probs is None:
        chosen = select_token(per_bin, tokens)
    else:
        teacher = select_token(batch.teacher, tokens)
        chosen = teacher - log_probs
    limit = batch.options.clamp
    if limit is not None:
        per_bin = per_bin.clamp(-limit, limit)
        chosen = chosen.clamp(-limit, limit)
    if not batch.options.centre:
        return chosen
    student = batch.student.detach()
    terms = student.exp() * per_bin
    baseline = terms.sum(-1)
    return chosen - baseline


def select_token(
    log_probs: Float[Tensor, "N K V"], tokens: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Select one bin's log-probability per token."""
    index = tokens.unsqueeze(-1)
    selected = log_probs.gather(-1, index)
    return selected.squeeze(-1)


def is_clamped(
    batch: TokenBatch[RewardParams],
    tokens: Int[Tensor, "N K"],
    log_probs: Float[Tensor, "N K"] | None = None,
) -> Bool[Tensor, "N K"]:
    """Tell for which tokens `clamp` changes the `reward` of the same arguments."""
    limit = batch.options.clamp
    if limit is None:
        limit = math.inf
    if log_probs is None:
        student = batch.student.detach()
        log_probs = select_token(student, tokens)
    teacher = select_token(batch.teacher, tokens)
    unclamped = teacher - log_probs
    return unclamped.abs() > limit


def is_clipped(sampled: SampledTokens, clip: ClipParams) -> Bool[Tensor, "N K"]:
    """Tell for which tokens `grpo` has no gradient because the ratio is beyond its bound."""
    now = sampled.now.detach()
    log_ratio = now - sampled.then
    ratio = log_ratio.exp()
    highest = 1 + clip.clip_high
    lowest = 1 - clip.clip_low
    is_above = ratio > highest
    is_below = ratio < lowest
    advantage = sampled.advantage.unsqueeze(-1)
    return torch.where(advantage > 0, is_above, is_below)


def confidence_weight(teacher: Float[Tensor, "N K V"], power: float) -> Float[Tensor, "N K"]:
    """(1 - H(p_T) / log V)^power: the weight of a token.

    1 where the teacher is certain, 0 where it is uniform; 1 everywhere for power 0.
    """
    bins = teacher.shape[-1]
    uncertainty = entropy(teacher) / math.log(bins)
    certainty = 1 - uncertainty
    return certainty.clamp(0, 1) ** power


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
    deviation = rewards - rewards.mean()
    spread = rewards.std() + 1e-6
    return deviation / spread


def rewards_to_go(rewards: Float[Tensor, " T"], discount: float) -> Float[Tensor, " T"]:
    """R_t = sum_{s > t} discount^(s - t) r_s over the T decisions of one episode.

    r_s is the sum over the decision's valid tokens.
    """
    to_go = torch.zeros_like(rewards)
    last = len(rewards) - 1
    for t in reversed(range(last)):
        later = rewards[t + 1] + to_go[t + 1]
        to_go[t] = discount * later
    return to_go


def episode_weight(mask: Bool[Tensor, "N K"], episode: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return a weight per state, whose mean over valid tokens is 1.

    With it, the mean over all tokens is the mean over episodes of each episode's mean over tokens.
    """
    tokens = mask.sum(1)
    _, index = episode.unique(return_inverse=True)
    episodes = int(index.max()) + 1
    lengths = torch.zeros(episodes)
    lengths = lengths.index_add(0, index, tokens.float())
    episode_tokens = lengths[index]
    return tokens.sum() / (episodes * episode_tokens)


def sample_tokens(log_probs: Float[Tensor, "N K V"], seed: int) -> Int[Tensor, "N K"]:
    """Sample one bin per token from normalised log-probabilities.

    On the CPU, so that a seed gives the same sample wherever the log-probabilities are.
    """
    random = torch.Generator().manual_seed(seed)
    probabilities = log_probs.detach().exp()
    rows = probabilities.flatten(0, 1).cpu()
    tokens = torch.multinomial(rows, 1, generator=random)
    tokens = tokens.view(log_probs.shape[:2])
    return tokens.to(log_probs.device)


def masked_mean(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Float[Tensor, ""]:
    """sum(values * mask) / sum(mask): the mean over valid tokens. ValueError if none is valid."""
    if not mask.any():
        raise ValueError("mask: no valid token in the batch; expected at least one")
    valid = torch.where(mask, values, 0.0)
    return valid.sum() / mask.sum()


def masked_means(
    values: Mapping[str, Float[Tensor, "N K"]], mask: Bool[Tensor, "N K"]
) -> dict[str, float]:
    """Return the `masked_mean` of each value, by name."""
    means: dict[str, float] = {}
    for name, tensor in values.items():
        means[name] = masked_mean(tensor, mask).item()
    return means


def at_temperature(log_probs: Float[Tensor, "*B V"], temperature: float) -> Float[Tensor, "*B V"]:
    """Log-softmax of log p / T: the distribution at a temperature, from logits or log p alike."""
    scaled = log_probs / temperature
    return torch.log_softmax(scaled, -1)


def entropy(log_probs: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """-sum_v p(v) log p(v), in nats."""
    probabilities = log_probs.exp()
    terms = probabilities * log_probs
    return -terms.sum(-1)
