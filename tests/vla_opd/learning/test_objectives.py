"""Mathematics against mathematics: gradients by enumeration over all V bins and by finite differences, in float64."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vla_opd import small
from vla_opd.learning.objectives import (
    OBJECTIVES,
    ON_DECISIONS,
    DecisionBatch,
    Objective,
    Taken,
    TokenBatch,
    clamped,
    clipped,
    confidence,
    entropy,
    episode_weight,
    forward_kl,
    group_advantage,
    grpo,
    hard_ce,
    jsd,
    masked_mean,
    mixed,
    of,
    reverse_kl,
    reverse_kl_rollout,
    reverse_kl_sampled,
    rewards_to_go,
    tempered,
)
from vla_opd.params.objective import ClipParams, OptimizeParams
from vla_opd.policies.load import build_policy
from vla_opd.simulation.rollout import choose

V = 5
EXACT = {
    name: OBJECTIVES[name] for name in ("reverse_kl", "forward_kl", "hard_ce", "jsd")
}  # those whose value is what their gradient is of


def random_logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def batch(
    student: Tensor, teacher: Tensor, tokens: Tensor | None = None, **settings: Any
) -> TokenBatch:
    """From logits. Without tokens: token 0 everywhere."""
    drawn = torch.zeros(student.shape[:2], dtype=torch.long) if tokens is None else tokens
    return TokenBatch(
        student.log_softmax(-1), teacher.log_softmax(-1), lambda: drawn, OptimizeParams(**settings)
    )


def decided(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    older: Tensor,
    to_go: float = 0.0,
    **settings: Any,
) -> DecisionBatch:
    """States at which a rollout by `older` (logits) took `tokens`; every other episode succeeded."""
    plain = batch(student, teacher, tokens, **settings)
    advantage = torch.where(torch.arange(len(student)) % 2 == 0, 0.8, -1.2).to(student.dtype)
    taken = Taken(
        of(plain.student, tokens), of(older.log_softmax(-1), tokens), advantage, plain.settings
    )
    return DecisionBatch(
        plain.student,
        plain.teacher,
        plain.draw,
        plain.settings,
        tokens=tokens,
        taken=taken,
        to_go=torch.full_like(advantage, to_go),
    )


def gradient(
    objective: Callable[[TokenBatch], Tensor],
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Of the sum of all tokens' losses, by the student's logits."""
    return slope(lambda leaf: objective(batch(leaf, teacher, tokens, **settings)), student)


def slope(losses: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """The gradient of the sum of what a function says of the student's logits."""
    leaf = student.clone().requires_grad_()
    losses(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def expected_gradient(student: Tensor, teacher: Tensor, sampler: Tensor | None = None) -> Tensor:
    """Sum over a of p(a) times the gradient of the sampled loss with token a, p the student itself if no sampler is given. Shapes [N, K, V]."""
    probabilities = (student if sampler is None else sampler).softmax(-1)
    total = torch.zeros_like(student)
    for a in range(V):
        tokens = torch.full(student.shape[:2], a)
        total += probabilities[..., a : a + 1] * gradient(
            reverse_kl_sampled, student, teacher, tokens
        )
    return total


@pytest.mark.parametrize("seed", range(5))
def test_exact_and_sampled_reverse_kl_have_the_same_expected_gradient(seed: int) -> None:
    student, teacher = random_logits(seed, 2, 3, V), random_logits(seed + 100, 2, 3, V)
    exact = gradient(reverse_kl, student, teacher)
    torch.testing.assert_close(expected_gradient(student, teacher), exact, rtol=0, atol=1e-10)
    assert exact.abs().max() > 0.1


def test_a_single_draw_is_not_the_exact_gradient() -> None:
    student, teacher = random_logits(0, 1, 1, V), random_logits(1, 1, 1, V)
    exact, probabilities = gradient(reverse_kl, student, teacher), student.softmax(-1).flatten()
    draws = torch.stack(
        [gradient(reverse_kl_sampled, student, teacher, torch.tensor([[a]])) for a in range(V)]
    )
    variance = (probabilities[:, None] * (draws - exact).flatten(1) ** 2).sum()
    assert variance > exact.square().sum()


def test_draws_of_an_older_student_have_another_expectation() -> None:
    student, teacher, older = (random_logits(seed, 1, 1, V) for seed in range(3))
    assert (
        expected_gradient(student, teacher, older) - gradient(reverse_kl, student, teacher)
    ).abs().max() > 0.05


def test_gradients_against_their_closed_forms() -> None:
    student, teacher = random_logits(3, 4, 2, V), random_logits(4, 4, 2, V)
    p, q = student.softmax(-1), teacher.softmax(-1)
    ratio = p.log() - q.log()
    kl = (p * ratio).sum(-1, keepdim=True)
    greedy = torch.nn.functional.one_hot(q.argmax(-1), V)
    halfway = 0.5 * (p.log() - ((p + q) / 2).log())
    expected = {
        "reverse_kl": p * (ratio - kl),
        "forward_kl": p - q,
        "hard_ce": p - greedy,
        "jsd": p * (halfway - (p * halfway).sum(-1, keepdim=True)),  # beta 0.5
    }
    for name, objective in EXACT.items():
        torch.testing.assert_close(
            gradient(objective, student, teacher), expected[name], rtol=0, atol=1e-12, msg=name
        )


def test_the_sampled_gradient_against_its_closed_form() -> None:
    student, teacher, tokens = (
        random_logits(3, 4, 2, V),
        random_logits(4, 4, 2, V),
        torch.arange(8).view(4, 2) % V,
    )
    p, q = student.softmax(-1), teacher.softmax(-1)
    drawn = torch.nn.functional.one_hot(tokens, V)
    reward = ((q.log() - p.log()) * drawn).sum(-1, keepdim=True)
    torch.testing.assert_close(
        gradient(reverse_kl_sampled, student, teacher, tokens),
        -reward * (drawn - p),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", EXACT)
def test_gradients_against_finite_differences(name: str) -> None:
    student, teacher = random_logits(5, 2, 2, V), random_logits(6, 2, 2, V)
    analytic, width = gradient(EXACT[name], student, teacher), 1e-6
    for index in np.ndindex(*student.shape):
        ahead, behind = student.clone(), student.clone()
        ahead[index] += width
        behind[index] -= width
        numeric = (
            EXACT[name](batch(ahead, teacher)).sum() - EXACT[name](batch(behind, teacher)).sum()
        ) / (2 * width)
        assert numeric.item() == pytest.approx(analytic[index].item(), abs=1e-8)


def test_values_against_numpy() -> None:
    student, teacher = random_logits(7, 1, 1, V), random_logits(8, 1, 1, V)
    p, q = student.softmax(-1).numpy().ravel(), teacher.softmax(-1).numpy().ravel()
    assert reverse_kl(batch(student, teacher)).item() == pytest.approx(
        np.sum(p * np.log(p / q)), abs=1e-12
    )
    assert forward_kl(batch(student, teacher)).item() == pytest.approx(
        np.sum(q * np.log(q / p)), abs=1e-12
    )
    assert hard_ce(batch(student, teacher)).item() == pytest.approx(
        -np.log(p[q.argmax()]), abs=1e-12
    )
    m = 0.3 * q + 0.7 * p
    divergence = 0.3 * np.sum(q * np.log(q / m)) + 0.7 * np.sum(p * np.log(p / m))
    assert jsd(batch(student, teacher, beta=0.3)).item() == pytest.approx(divergence, abs=1e-12)
    assert entropy(student.log_softmax(-1)).item() == pytest.approx(
        -np.sum(p * np.log(p)), abs=1e-12
    )


def test_the_kl_of_a_chunk_is_the_sum_of_its_tokens() -> None:
    student, teacher = (
        random_logits(9, 1, 2, V).log_softmax(-1),
        random_logits(10, 1, 2, V).log_softmax(-1),
    )
    joint = [
        (logits[0, 0, :, None] + logits[0, 1, None, :]).flatten()[None, None]
        for logits in (student, teacher)
    ]
    for objective in (reverse_kl, forward_kl):
        assert objective(batch(student, teacher)).sum().item() == pytest.approx(
            objective(batch(*joint)).item(), abs=1e-12
        )


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    logits = random_logits(11, 3, 2, V)
    torch.testing.assert_close(
        reverse_kl(batch(logits, logits)),
        torch.zeros(3, 2, dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    for objective in (
        reverse_kl,
        forward_kl,
        jsd,
        reverse_kl_sampled,
    ):  # the sampled reward is zero for every token, so every draw's gradient is
        assert gradient(objective, logits, logits).abs().max() < 1e-15
    assert expected_gradient(logits, logits).abs().max() < 1e-15
    assert gradient(hard_ce, logits, logits).abs().max() > 0.01  # the mode is not the distribution


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_shuffled_teacher_changes_the_gradient(name: str) -> None:
    student, teacher = random_logits(12, 3, 2, V), random_logits(13, 3, 2, V)
    ours = gradient(OBJECTIVES[name], student, teacher)
    for shuffled in (teacher.roll(1, 0), teacher.roll(1, -1)):
        assert (gradient(OBJECTIVES[name], student, shuffled) - ours).abs().max() > 0.05


def test_no_gradient_reaches_the_reward() -> None:
    student = random_logits(14, 1, 1, V).requires_grad_()
    teacher = random_logits(15, 1, 1, V)
    loss = reverse_kl_sampled(batch(student, teacher)).sum()
    score = student.log_softmax(-1)[0, 0, 0]
    reward = (teacher.log_softmax(-1)[0, 0, 0] - score).detach()
    assert loss.item() == pytest.approx((-score * reward).item(), abs=1e-15)
    (ours,) = torch.autograd.grad(loss, student, retain_graph=True)
    (whole,) = torch.autograd.grad(-score * (teacher.log_softmax(-1)[0, 0, 0] - score), student)
    assert (ours - whole).abs().max() > 0.01


def minimise(objective: Objective, teacher: Tensor) -> Tensor:
    """The student's probabilities at the end of a descent from the uniform distribution."""
    student = torch.zeros_like(teacher)
    optimiser = torch.optim.LBFGS(
        [student], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        student.grad = gradient(objective, student.detach(), teacher)
        return objective(batch(student.detach(), teacher)).sum().item()

    optimiser.step(closure)
    return student.softmax(-1)


@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, jsd])
def test_divergences_are_least_at_the_teacher(objective: Objective) -> None:
    teacher = random_logits(16, 1, 2, V)
    torch.testing.assert_close(minimise(objective, teacher), teacher.softmax(-1), rtol=0, atol=1e-6)


def test_hard_cross_entropy_goes_to_the_mode() -> None:
    teacher = random_logits(17, 1, 2, V)
    found = minimise(hard_ce, teacher)
    assert (found.max(-1).values > 0.99).all()
    assert torch.equal(found.argmax(-1), teacher.argmax(-1))


def test_masked_mean_is_over_all_valid_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    mean = masked_mean(values, mask)
    assert mean.item() == pytest.approx(16 / 4)  # the mean of the rows' means would be 6
    mean.backward()
    torch.testing.assert_close(values.grad, mask / 4)


def test_what_is_masked_out_has_no_say() -> None:
    mask = torch.tensor([[True, False]])
    assert masked_mean(torch.tensor([[2.0, float("nan")]]), mask).item() == 2.0
    assert masked_mean(torch.tensor([[2.0, float("inf")]]), mask).item() == 2.0


def test_a_batch_without_valid_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no valid token in the batch; expected at least one"):
        masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.6])
def test_tempering_takes_logits_and_log_probabilities_alike(temperature: float) -> None:
    logits = random_logits(18, 3, V) + 7
    expected = logits.softmax(-1) ** (1 / temperature)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(tempered(logits, temperature).exp(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        tempered(logits.log_softmax(-1), temperature),
        tempered(logits, temperature),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.6])
def test_the_samplers_log_probability_is_the_trainers(temperature: float) -> None:
    logits = random_logits(19, 20, 6, 256).float()
    trainer = tempered(logits, temperature)
    for row, ours in zip(logits, trainer, strict=True):
        tokens, log_probs = choose(row, temperature, np.random.default_rng(0))
        np.testing.assert_array_equal(
            log_probs, ours.gather(-1, torch.from_numpy(tokens).long()[:, None]).squeeze(-1).numpy()
        )


def test_the_samplers_log_probability_is_the_trainers_through_a_policy() -> None:
    policy, seen, temperature = build_policy(small.FACTS).eval(), small.observations(6), 0.7
    with torch.inference_mode():
        trainer = tempered(policy.logits(seen), temperature)
        for row in range(len(seen)):
            tokens, log_probs = choose(
                policy.logits(seen.at(np.array([row])))[0], temperature, np.random.default_rng(row)
            )
            ours = trainer[row].gather(-1, torch.from_numpy(tokens).long()[:, None]).squeeze(-1)
            np.testing.assert_allclose(log_probs, ours.numpy(), atol=1e-5)


# Between the two divergences


def test_jsd_goes_from_the_forward_to_the_reverse_kl() -> None:
    student, teacher, small_beta = random_logits(20, 2, 3, V), random_logits(21, 2, 3, V), 1e-6
    near_zero = jsd(batch(student, teacher, beta=small_beta)) / small_beta
    near_one = jsd(batch(student, teacher, beta=1 - small_beta)) / small_beta
    torch.testing.assert_close(near_zero, forward_kl(batch(student, teacher)), rtol=1e-4, atol=0)
    torch.testing.assert_close(near_one, reverse_kl(batch(student, teacher)), rtol=1e-4, atol=0)
    half = jsd(batch(student, teacher, beta=0.5))
    torch.testing.assert_close(half, jsd(batch(teacher, student, beta=0.5)), rtol=0, atol=1e-12)
    assert (half < np.log(2)).all()  # it is bounded, as the KLs aren't


# On the rollout's own tokens


def expected_on_rollout(student: Tensor, teacher: Tensor, older: Tensor, **settings: Any) -> Tensor:
    """Sum over a of p_old(a) times the gradient of the loss with token a."""
    total = torch.zeros_like(student)
    for a in range(V):
        tokens = torch.full(student.shape[:2], a)
        one = slope(
            lambda leaf, tokens=tokens: reverse_kl_rollout(
                decided(leaf, teacher, tokens, older, **settings)
            ),
            student,
        )
        total += older.softmax(-1)[..., a : a + 1] * one
    return total


def test_with_a_ratio_an_older_rollout_has_the_exact_expectation() -> None:
    student, teacher, older = (random_logits(seed, 2, 3, V) for seed in (22, 23, 24))
    exact = gradient(reverse_kl, student, teacher)
    torch.testing.assert_close(
        expected_on_rollout(student, teacher, older, ratio=True), exact, rtol=0, atol=1e-10
    )
    assert (
        expected_on_rollout(student, teacher, older) - exact
    ).abs().max() > 0.05  # as published: right on fresh draws only
    for ratio in (True, False):
        torch.testing.assert_close(
            expected_on_rollout(student, teacher, student, ratio=ratio), exact, rtol=0, atol=1e-10
        )


def test_a_reward_of_the_rollouts_student_is_anothers_divergence() -> None:
    """With the ratio: the gradient of sum_a p_S(a) (log p_old(a) - log p_T(a))."""
    student, teacher, older = (random_logits(seed, 2, 3, V) for seed in (25, 26, 27))
    stale = (older.log_softmax(-1) - teacher.log_softmax(-1)).detach()
    expected = slope(lambda leaf: leaf.softmax(-1) * stale, student)
    torch.testing.assert_close(
        expected_on_rollout(student, teacher, older, ratio=True, reward="rollout"),
        expected,
        rtol=0,
        atol=1e-10,
    )
    assert (expected - gradient(reverse_kl, student, teacher)).abs().max() > 0.05


def test_centring_keeps_the_expectation_and_takes_variance() -> None:
    student, teacher = random_logits(28, 1, 1, V), random_logits(29, 1, 1, V) + torch.arange(V)
    exact, p = gradient(reverse_kl, student, teacher), student.softmax(-1).flatten()

    def moments(*, centre: bool) -> tuple[Tensor, Tensor]:
        draws = torch.stack(
            [
                gradient(reverse_kl_sampled, student, teacher, torch.tensor([[a]]), centre=centre)
                for a in range(V)
            ]
        ).flatten(1)
        mean = (p[:, None] * draws).sum(0)
        return mean, (p[:, None] * (draws - mean) ** 2).sum()

    (plain, wide), (centred, narrow) = moments(centre=False), moments(centre=True)
    torch.testing.assert_close(plain, exact.flatten(), rtol=0, atol=1e-10)
    torch.testing.assert_close(centred, exact.flatten(), rtol=0, atol=1e-10)
    assert narrow < 0.9 * wide


@pytest.mark.parametrize("centre", [False, True])
def test_the_clamp_cuts_the_reward_at_both_ends(centre: bool) -> None:
    student, teacher, tokens = (
        random_logits(30, 3, 4, V),
        random_logits(31, 3, 4, V),
        torch.arange(12).view(3, 4) % V,
    )
    p, every = student.softmax(-1), (teacher.log_softmax(-1) - student.log_softmax(-1)).clamp(-1, 1)
    r = of(every, tokens) - (p * every).sum(-1) * centre
    onehot = torch.nn.functional.one_hot(tokens, V)
    found = gradient(reverse_kl_sampled, student, teacher, tokens, clamp=1.0, centre=centre)
    torch.testing.assert_close(found, -r.unsqueeze(-1) * (onehot - p), rtol=0, atol=1e-12)
    cut = clamped(batch(student, teacher, clamp=1.0), tokens)
    assert torch.equal(cut, of(teacher.log_softmax(-1) - student.log_softmax(-1), tokens).abs() > 1)
    assert cut.any()
    assert not cut.all()
    assert not clamped(batch(student, teacher), tokens).any()


def test_rewards_to_go_are_the_discounted_rest() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert rewards_to_go(rewards, 0.5).tolist() == [
        0.5 * 2 + 0.25 * 4 + 0.125 * 8,
        0.5 * 4 + 0.25 * 8,
        0.5 * 8,
        0.0,
    ]
    assert rewards_to_go(rewards, 0.0).tolist() == [0.0] * 4
    assert rewards_to_go(rewards[:1], 1.0).tolist() == [0.0]


def test_with_rewards_to_go_the_gradient_is_that_of_the_trajectorys_divergence() -> None:
    """Two decisions; the second state is the first action. Undiscounted: the gradient of sum_t E[KL(p_S || p_T)], through the states visited, too."""
    student, teacher = (
        random_logits(32, 1 + V, 1, V),
        random_logits(33, 1 + V, 1, V),
    )  # row 0: the first state; row 1 + a: the second

    def whole(leaf: Tensor) -> Tensor:
        kl = reverse_kl(batch(leaf, teacher)).squeeze(1)
        return kl[0] + (leaf[0, 0].softmax(-1) * kl[1:]).sum()

    r, expected = (
        (teacher.log_softmax(-1) - student.log_softmax(-1)).squeeze(1),
        torch.zeros_like(student),
    )
    for first, second in product(range(V), range(V)):
        rows, tokens = torch.tensor([0, 1 + first]), torch.tensor([[first], [second]])
        to_go = rewards_to_go(torch.stack([r[0, first], r[1 + first, second]]), 1.0)

        def one(
            leaf: Tensor, rows: Tensor = rows, tokens: Tensor = tokens, to_go: Tensor = to_go
        ) -> Tensor:
            return reverse_kl_rollout(
                replace(decided(leaf[rows], teacher[rows], tokens, student[rows]), to_go=to_go)
            )

        chance = student[0, 0].softmax(-1)[first] * student[1 + first, 0].softmax(-1)[second]
        expected += chance * slope(one, student)
    torch.testing.assert_close(expected, slope(whole, student), rtol=0, atol=1e-10)


# GRPO


def taken(
    student: Tensor, older: Tensor, tokens: Tensor, advantage: Tensor, **settings: Any
) -> Taken:
    now, then = (of(logits.log_softmax(-1), tokens) for logits in (student, older))
    return Taken(now, then, advantage, ClipParams(**settings))


def test_grpo_at_the_rollouts_student_is_the_policy_gradient() -> None:
    student, tokens = random_logits(34, 4, 3, V), torch.arange(12).view(4, 3) % V
    advantage = torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64)
    found = slope(lambda leaf: grpo(taken(leaf, student, tokens, advantage)), student)
    onehot = torch.nn.functional.one_hot(tokens, V)
    torch.testing.assert_close(
        found, -advantage[:, None, None] * (onehot - student.softmax(-1)), rtol=0, atol=1e-12
    )


def test_grpo_stops_where_the_ratio_has_gone_far_enough() -> None:
    """By cases of (ratio, sign of the advantage); the gradient, where there is one, is -A rho (onehot - p)."""
    then, tokens = torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    for ratio, sign, goes_on in [
        (1.27, 1, True),
        (1.29, 1, False),
        (0.5, 1, True),
        (0.81, -1, True),
        (0.79, -1, False),
        (1.5, -1, True),
    ]:
        p = ratio / 2
        student = torch.tensor([[[np.log(p), np.log(1 - p)]]])
        advantage = torch.tensor([0.7 * sign], dtype=torch.float64)
        found = slope(
            lambda leaf, advantage=advantage: grpo(taken(leaf, then, tokens, advantage)), student
        )
        expected = -advantage * ratio * torch.tensor([1 - p, p - 1], dtype=torch.float64) * goes_on
        torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-12)
        assert clipped(taken(student, then, tokens, advantage)).item() != goes_on
        one_sided = clipped(taken(student, then, tokens, advantage, clip_high=0.6, clip_low=0.6))
        assert not one_sided.item()


def test_grpo_against_finite_differences() -> None:
    student, older, tokens = (
        random_logits(35, 2, 2, V),
        random_logits(36, 2, 2, V),
        torch.tensor([[0, 1], [2, 3]]),
    )
    advantage, width = torch.tensor([1.0, -1.0], dtype=torch.float64), 1e-6
    analytic = slope(lambda leaf: grpo(taken(leaf, older, tokens, advantage)), student)
    for index in np.ndindex(*student.shape):
        step = torch.zeros_like(student)
        step[index] = width
        ahead, behind = (
            grpo(taken(student + sign * step, older, tokens, advantage)).sum() for sign in (1, -1)
        )
        assert ((ahead - behind) / (2 * width)).item() == pytest.approx(
            analytic[index].item(), rel=1e-7, abs=1e-8
        )


def test_an_advantage_is_one_over_the_group() -> None:
    found = group_advantage(torch.tensor([True, False, False, False]))
    deviation = np.std([1, 0, 0, 0], ddof=1)
    assert found.tolist() == pytest.approx(
        [0.75 / (deviation + 1e-6), *[-0.25 / (deviation + 1e-6)] * 3]
    )
    assert found.sum().item() == pytest.approx(0, abs=1e-6)
    assert group_advantage(torch.tensor([True, True])).tolist() == [0, 0]
    with pytest.raises(ValueError, match="group is 1; expected at least 2 episodes"):
        group_advantage(torch.tensor([True]))


def test_weighted_so_the_mean_over_tokens_is_one_over_episodes() -> None:
    values = torch.arange(12.0).view(4, 3)
    mask = torch.tensor(
        [[True, True, True], [True, True, True], [True, False, False], [True, True, False]]
    )
    episode = torch.tensor([4, 4, 7, 2])
    found = masked_mean(values * episode_weight(mask, episode).unsqueeze(-1), mask)
    assert found.item() == pytest.approx(np.mean([2.5, 6.0, 9.5]))
    assert (episode_weight(mask, episode).unsqueeze(-1) * mask).sum() / mask.sum() == pytest.approx(
        1
    )
    assert masked_mean(values, mask).item() != pytest.approx(found.item())


def test_mixed_is_grpo_and_a_share_of_the_reverse_kl() -> None:
    student, teacher, older, tokens = (
        random_logits(37, 2, 2, V),
        random_logits(38, 2, 2, V),
        random_logits(39, 2, 2, V),
        torch.tensor([[0, 1], [2, 3]]),
    )
    whole = decided(student, teacher, tokens, older, objective="mixed", distill=0.25)
    torch.testing.assert_close(
        mixed(whole), grpo(whole.taken) + 0.25 * reverse_kl(batch(student, teacher))
    )


# All of them


@pytest.mark.parametrize("name", [*OBJECTIVES, *ON_DECISIONS])
def test_a_batch_cut_in_two_is_the_same_batch(name: str) -> None:
    student, teacher, older = (random_logits(seed, 6, 3, V) for seed in (40, 41, 42))
    tokens, mask = torch.arange(18).view(6, 3) % V, torch.arange(18).view(6, 3) % 4 > 0
    objective = {**OBJECTIVES, **ON_DECISIONS}[name]

    def total(rows: slice, leaf: Tensor) -> Tensor:
        part: Any = decided(leaf[rows], teacher[rows], tokens[rows], older[rows])
        return masked_mean(objective(part), mask[rows]) * mask[rows].sum() / mask.sum()

    whole = slope(lambda leaf: total(slice(None), leaf), student)
    halves = slope(lambda leaf: total(slice(0, 4), leaf) + total(slice(4, 6), leaf), student)
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-12)
    assert whole.abs().max() > 0.005


def test_a_confident_teacher_weighs_more() -> None:
    certain, unsure = torch.tensor([20.0, 0, 0, 0, 0]), torch.zeros(V)
    log_probs = torch.stack([certain, unsure]).log_softmax(-1).unsqueeze(0)
    assert confidence(log_probs, 1.0).flatten().tolist() == pytest.approx([1, 0], abs=1e-5)
    assert confidence(log_probs, 0.0).flatten().tolist() == [1, 1]
    some = random_logits(43, 1, 1, V).log_softmax(-1)
    assert confidence(some, 2.0).item() == pytest.approx(
        (1 - entropy(some).item() / np.log(V)) ** 2
    )
