"""Objectives against mathematics, in float64.

Gradients are compared with enumerations of all bins, closed forms and finite differences.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vla_opd import small as tiny
from vla_opd.learning.objectives import (
    OBJECTIVES,
    ON_DECISIONS,
    DecisionBatch,
    Objective,
    SampledTokens,
    TokenBatch,
    at_temperature,
    confidence_weight,
    entropy,
    episode_weight,
    forward_kl,
    group_advantage,
    grpo,
    hard_ce,
    is_clamped,
    is_clipped,
    jsd,
    masked_mean,
    mixed,
    reverse_kl,
    reverse_kl_rollout,
    reverse_kl_sampled,
    rewards_to_go,
    select_token,
)
from vla_opd.params.objective import ClipParams, OptimizeParams
from vla_opd.policies.load import build_policy
from vla_opd.simulation.rollout import choose_tokens

V = 5
# Those whose gradient is that of their value.
EXACT = {name: OBJECTIVES[name] for name in ("reverse_kl", "forward_kl", "hard_ce", "jsd")}
WIDTH = 1e-6  # of finite differences


def assert_close(found: Tensor, expected: Tensor, atol: float, message: str | None = None) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=message)


def random_logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def cycle_tokens(*shape: int) -> Tensor:
    """Return tokens 0, 1, ... V - 1, 0, ... in order."""
    return torch.arange(int(np.prod(shape))).view(shape) % V


def make_batch(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    objective: str = "reverse_kl",
    **options: Any,
) -> TokenBatch[Any]:
    """Make a batch from logits. tokens: the sample; token 0 everywhere by default."""
    sample = torch.zeros(student.shape[:2], dtype=torch.long) if tokens is None else tokens
    settings = OptimizeParams.model_validate({"objective": {"name": objective, **options}})
    return TokenBatch(
        student.log_softmax(-1), teacher.log_softmax(-1), lambda: sample, settings.objective
    )


def make_decision_batch(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    sampler: Tensor,
    objective: str = "reverse_kl_rollout",
    **options: Any,
) -> DecisionBatch[Any]:
    """Make a batch of states at which a rollout with the logits `sampler` sampled `tokens`.

    Every other episode succeeded.
    """
    batch = make_batch(student, teacher, tokens, objective, **options)
    advantage = torch.where(torch.arange(len(student)) % 2 == 0, 0.8, -1.2).to(student.dtype)
    sampled = SampledTokens(
        select_token(batch.student, tokens),
        select_token(sampler.log_softmax(-1), tokens),
        advantage,
    )
    return DecisionBatch(
        batch.student,
        batch.teacher,
        batch.draw,
        batch.options,
        tokens=tokens,
        sampled=sampled,
        to_go=torch.zeros_like(advantage),
    )


def differentiate(losses: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """Return the gradient of the sum of a function of the student's logits."""
    leaf = student.clone().requires_grad_()
    losses(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def gradient(
    objective: Callable[[TokenBatch], Tensor],
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return the gradient of the sum of all tokens' losses by the student's logits."""
    name = objective.__name__
    return differentiate(
        lambda leaf: objective(make_batch(leaf, teacher, tokens, name, **options)), student
    )


def expected_gradient(student: Tensor, teacher: Tensor, sampler: Tensor | None = None) -> Tensor:
    """Return the sum over a of p(a) times the gradient of the sampled loss with token a.

    p is the student, or the logits `sampler`. Shapes [N, K, V].
    """
    probabilities = (student if sampler is None else sampler).softmax(-1)
    total = torch.zeros_like(student)
    for token in range(V):
        tokens = torch.full(student.shape[:2], token)
        of_token = gradient(reverse_kl_sampled, student, teacher, tokens)
        total += probabilities[..., token : token + 1] * of_token
    return total


# The divergences and their sampled form


@pytest.mark.parametrize("seed", range(5))
def test_exact_and_sampled_reverse_kl_have_the_same_expected_gradient(seed: int) -> None:
    student = random_logits(seed, 2, 3, V)
    teacher = random_logits(seed + 100, 2, 3, V)
    exact = gradient(reverse_kl, student, teacher)
    assert_close(expected_gradient(student, teacher), exact, atol=1e-10)
    assert exact.abs().max() > 0.1


def test_a_single_sample_is_not_the_exact_gradient() -> None:
    student = random_logits(0, 1, 1, V)
    teacher = random_logits(1, 1, 1, V)
    exact = gradient(reverse_kl, student, teacher)
    samples = [
        gradient(reverse_kl_sampled, student, teacher, torch.tensor([[token]]))
        for token in range(V)
    ]
    squares = (torch.stack(samples) - exact).flatten(1) ** 2
    variance = (student.softmax(-1).flatten()[:, None] * squares).sum()
    assert variance > exact.square().sum()


def test_samples_of_an_older_student_have_another_expectation() -> None:
    student, teacher, older = (random_logits(seed, 1, 1, V) for seed in range(3))
    exact = gradient(reverse_kl, student, teacher)
    assert (expected_gradient(student, teacher, older) - exact).abs().max() > 0.05


def test_gradients_against_their_closed_forms() -> None:
    student = random_logits(3, 4, 2, V)
    teacher = random_logits(4, 4, 2, V)
    p = student.softmax(-1)
    q = teacher.softmax(-1)
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
        assert_close(gradient(objective, student, teacher), expected[name], 1e-12, name)


def test_the_sampled_gradient_against_its_closed_form() -> None:
    student = random_logits(3, 4, 2, V)
    teacher = random_logits(4, 4, 2, V)
    tokens = cycle_tokens(4, 2)
    p = student.softmax(-1)
    q = teacher.softmax(-1)
    sample = torch.nn.functional.one_hot(tokens, V)
    reward = ((q.log() - p.log()) * sample).sum(-1, keepdim=True)
    analytic = gradient(reverse_kl_sampled, student, teacher, tokens)
    assert_close(analytic, -reward * (sample - p), atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_against_finite_differences(name: str) -> None:
    student = random_logits(5, 2, 2, V)
    teacher = random_logits(6, 2, 2, V)
    analytic = gradient(EXACT[name], student, teacher)

    def total(logits: Tensor) -> Tensor:
        return EXACT[name](make_batch(logits, teacher, objective=name)).sum()

    for index in np.ndindex(*student.shape):
        step = torch.zeros_like(student)
        step[index] = WIDTH
        numeric = (total(student + step) - total(student - step)) / (2 * WIDTH)
        assert numeric.item() == pytest.approx(analytic[index].item(), abs=1e-8)


def test_values_against_numpy() -> None:
    student = random_logits(7, 1, 1, V)
    teacher = random_logits(8, 1, 1, V)
    p = student.softmax(-1).numpy().ravel()
    q = teacher.softmax(-1).numpy().ravel()
    m = 0.3 * q + 0.7 * p
    divergence = 0.3 * np.sum(q * np.log(q / m)) + 0.7 * np.sum(p * np.log(p / m))
    batch = make_batch(student, teacher, objective="jsd", beta=0.3)

    def approximately(value: float) -> Any:
        return pytest.approx(value, abs=1e-12)

    assert reverse_kl(batch).item() == approximately(np.sum(p * np.log(p / q)))
    assert forward_kl(batch).item() == approximately(np.sum(q * np.log(q / p)))
    assert hard_ce(batch).item() == approximately(-np.log(p[q.argmax()]))
    assert jsd(batch).item() == approximately(divergence)
    assert entropy(batch.student).item() == approximately(-np.sum(p * np.log(p)))


def join_tokens(logits: Tensor) -> Tensor:
    """Return the distribution over pairs of two independent tokens."""
    log_probs = logits.log_softmax(-1)
    joint = log_probs[0, 0, :, None] + log_probs[0, 1, None, :]
    return joint.flatten()[None, None]


def test_the_kl_of_a_chunk_is_the_sum_of_its_tokens() -> None:
    student = random_logits(9, 1, 2, V)
    teacher = random_logits(10, 1, 2, V)
    joint = make_batch(join_tokens(student), join_tokens(teacher))
    for objective in (reverse_kl, forward_kl):
        total = objective(make_batch(student, teacher)).sum().item()
        assert total == pytest.approx(objective(joint).item(), abs=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    logits = random_logits(11, 3, 2, V)
    zero = torch.zeros(3, 2, dtype=torch.float64)
    assert_close(reverse_kl(make_batch(logits, logits)), zero, atol=1e-15)
    # The sampled reward is zero for every token, so the gradient of every sample is.
    for objective in (reverse_kl, forward_kl, jsd, reverse_kl_sampled):
        assert gradient(objective, logits, logits).abs().max() < 1e-15
    assert expected_gradient(logits, logits).abs().max() < 1e-15
    assert gradient(hard_ce, logits, logits).abs().max() > 0.01  # the mode is not the distribution


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_shuffled_teacher_changes_the_gradient(name: str) -> None:
    student = random_logits(12, 3, 2, V)
    teacher = random_logits(13, 3, 2, V)
    unshuffled = gradient(OBJECTIVES[name], student, teacher)
    for shuffled in (teacher.roll(1, 0), teacher.roll(1, -1)):
        changed = gradient(OBJECTIVES[name], student, shuffled)
        assert (changed - unshuffled).abs().max() > 0.05


def test_no_gradient_reaches_the_reward() -> None:
    student = random_logits(14, 1, 1, V).requires_grad_()
    teacher = random_logits(15, 1, 1, V)
    loss = reverse_kl_sampled(make_batch(student, teacher, None, "reverse_kl_sampled")).sum()
    score = student.log_softmax(-1)[0, 0, 0]
    reward = teacher.log_softmax(-1)[0, 0, 0] - score
    assert loss.item() == pytest.approx((-score * reward.detach()).item(), abs=1e-15)
    (stopped,) = torch.autograd.grad(loss, student, retain_graph=True)
    (through_reward,) = torch.autograd.grad(-score * reward, student)
    assert (stopped - through_reward).abs().max() > 0.01


def minimise(objective: Objective, teacher: Tensor) -> Tensor:
    """Return the student's probabilities after a descent from the uniform distribution."""
    student = torch.zeros_like(teacher)
    optimizer = torch.optim.LBFGS(
        [student], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        student.grad = gradient(objective, student.detach(), teacher)
        batch = make_batch(student.detach(), teacher, None, objective.__name__)
        return objective(batch).sum().item()

    optimizer.step(closure)
    return student.softmax(-1)


@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, jsd])
def test_divergences_are_least_at_the_teacher(objective: Objective) -> None:
    teacher = random_logits(16, 1, 2, V)
    assert_close(minimise(objective, teacher), teacher.softmax(-1), atol=1e-6)


def test_hard_cross_entropy_goes_to_the_mode() -> None:
    teacher = random_logits(17, 1, 2, V)
    student = minimise(hard_ce, teacher)
    assert (student.max(-1).values > 0.99).all()
    assert torch.equal(student.argmax(-1), teacher.argmax(-1))


# The mean


def test_masked_mean_is_over_all_valid_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    mean = masked_mean(values, mask)
    assert mean.item() == pytest.approx(16 / 4)  # the mean of the rows' means would be 6
    mean.backward()
    torch.testing.assert_close(values.grad, mask / 4)


def test_invalid_tokens_have_no_effect() -> None:
    mask = torch.tensor([[True, False]])
    assert masked_mean(torch.tensor([[2.0, float("nan")]]), mask).item() == 2.0
    assert masked_mean(torch.tensor([[2.0, float("inf")]]), mask).item() == 2.0


def test_a_batch_without_valid_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no valid token in the batch; expected at least one"):
        masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


# The temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.6])
def test_a_temperature_applies_to_logits_and_log_probabilities_alike(temperature: float) -> None:
    logits = random_logits(18, 3, V) + 7
    expected = logits.softmax(-1) ** (1 / temperature)
    expected /= expected.sum(-1, keepdim=True)
    from_logits = at_temperature(logits, temperature)
    torch.testing.assert_close(from_logits.exp(), expected, rtol=1e-10, atol=0)
    from_log_probs = at_temperature(logits.log_softmax(-1), temperature)
    assert_close(from_log_probs, from_logits, atol=1e-12)


def select_row(log_probs: Tensor, tokens: np.ndarray) -> np.ndarray:
    """Select the log-probabilities of one state's tokens."""
    return select_token(log_probs[None], torch.from_numpy(tokens).long()[None])[0].numpy()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.6])
def test_the_samplers_log_probability_is_the_trainers(temperature: float) -> None:
    logits = random_logits(19, 20, 6, 256).float()
    for row, trainer in zip(logits, at_temperature(logits, temperature), strict=True):
        tokens, log_probs = choose_tokens(row, temperature, np.random.default_rng(0))
        np.testing.assert_array_equal(log_probs, select_row(trainer, tokens))


def test_the_samplers_log_probability_is_the_trainers_through_a_policy() -> None:
    policy = build_policy(tiny.FACTS).eval()
    observations = tiny.observations(6)
    temperature = 0.7
    with torch.inference_mode():
        trainer = at_temperature(policy.logits(observations), temperature)
        for row in range(len(observations)):
            logits = policy.logits(observations.at(np.array([row])))[0]
            tokens, log_probs = choose_tokens(logits, temperature, np.random.default_rng(row))
            np.testing.assert_allclose(log_probs, select_row(trainer[row], tokens), atol=1e-5)


# Between the two divergences


def test_jsd_goes_from_the_forward_to_the_reverse_kl() -> None:
    student = random_logits(20, 2, 3, V)
    teacher = random_logits(21, 2, 3, V)
    beta = 1e-6
    near_zero = jsd(make_batch(student, teacher, None, "jsd", beta=beta)) / beta
    near_one = jsd(make_batch(student, teacher, None, "jsd", beta=1 - beta)) / beta
    batch = make_batch(student, teacher, None, "jsd", beta=0.5)
    torch.testing.assert_close(near_zero, forward_kl(batch), rtol=1e-4, atol=0)
    torch.testing.assert_close(near_one, reverse_kl(batch), rtol=1e-4, atol=0)
    swapped = make_batch(teacher, student, None, "jsd", beta=0.5)
    assert_close(jsd(batch), jsd(swapped), atol=1e-12)
    assert (jsd(batch) < np.log(2)).all()  # it is bounded, unlike the KLs


# On the rollout's own tokens


def expected_rollout_gradient(
    student: Tensor, teacher: Tensor, sampler: Tensor, **options: Any
) -> Tensor:
    """Return the sum over a of p_old(a) times the gradient of the loss with token a."""
    total = torch.zeros_like(student)
    for token in range(V):
        tokens = torch.full(student.shape[:2], token)

        def losses(leaf: Tensor, tokens: Tensor = tokens) -> Tensor:
            batch = make_decision_batch(leaf, teacher, tokens, sampler, **options)
            return reverse_kl_rollout(batch)

        probability = sampler.softmax(-1)[..., token : token + 1]
        total += probability * differentiate(losses, student)
    return total


def test_with_a_ratio_an_older_rollout_has_the_exact_expectation() -> None:
    student, teacher, older = (random_logits(seed, 2, 3, V) for seed in (22, 23, 24))
    exact = gradient(reverse_kl, student, teacher)
    with_ratio = expected_rollout_gradient(student, teacher, older, ratio=True)
    assert_close(with_ratio, exact, atol=1e-10)
    # As published, it is correct on fresh samples only.
    published = expected_rollout_gradient(student, teacher, older)
    assert (published - exact).abs().max() > 0.05
    for ratio in (True, False):
        fresh = expected_rollout_gradient(student, teacher, student, ratio=ratio)
        assert_close(fresh, exact, atol=1e-10)


def test_with_the_rollouts_reward_the_divergence_is_the_rollouts() -> None:
    """With the ratio: the gradient of sum_a p_S(a) (log p_old(a) - log p_T(a))."""
    student, teacher, older = (random_logits(seed, 2, 3, V) for seed in (25, 26, 27))
    recorded = (older.log_softmax(-1) - teacher.log_softmax(-1)).detach()
    expected = differentiate(lambda leaf: leaf.softmax(-1) * recorded, student)
    found = expected_rollout_gradient(student, teacher, older, ratio=True, reward="rollout")
    assert_close(found, expected, atol=1e-10)
    assert (expected - gradient(reverse_kl, student, teacher)).abs().max() > 0.05


def test_centring_keeps_the_expectation_and_lowers_the_variance() -> None:
    student = random_logits(28, 1, 1, V)
    teacher = random_logits(29, 1, 1, V) + torch.arange(V)
    exact = gradient(reverse_kl, student, teacher).flatten()
    p = student.softmax(-1).flatten()[:, None]

    def mean_and_variance(*, centre: bool) -> tuple[Tensor, Tensor]:
        samples = [
            gradient(reverse_kl_sampled, student, teacher, torch.tensor([[token]]), centre=centre)
            for token in range(V)
        ]
        gradients = torch.stack(samples).flatten(1)
        mean = (p * gradients).sum(0)
        return mean, (p * (gradients - mean) ** 2).sum()

    mean, variance = mean_and_variance(centre=False)
    centred_mean, centred_variance = mean_and_variance(centre=True)
    assert_close(mean, exact, atol=1e-10)
    assert_close(centred_mean, exact, atol=1e-10)
    assert centred_variance < 0.9 * variance


@pytest.mark.parametrize("centre", [False, True])
def test_the_clamp_bounds_the_reward_on_both_sides(centre: bool) -> None:
    student = random_logits(30, 3, 4, V)
    teacher = random_logits(31, 3, 4, V)
    tokens = cycle_tokens(3, 4)
    p = student.softmax(-1)
    unbounded = teacher.log_softmax(-1) - student.log_softmax(-1)
    per_bin = unbounded.clamp(-1, 1)
    reward = select_token(per_bin, tokens) - (p * per_bin).sum(-1) * centre
    sample = torch.nn.functional.one_hot(tokens, V)
    found = gradient(reverse_kl_sampled, student, teacher, tokens, clamp=1.0, centre=centre)
    assert_close(found, -reward.unsqueeze(-1) * (sample - p), atol=1e-12)
    name = "reverse_kl_sampled"
    clamped = is_clamped(make_batch(student, teacher, None, name, clamp=1.0), tokens)
    assert torch.equal(clamped, select_token(unbounded, tokens).abs() > 1)
    assert clamped.any()
    assert not clamped.all()
    assert not is_clamped(make_batch(student, teacher, None, name), tokens).any()


def test_rewards_to_go_are_the_discounted_later_ones() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = [0.5 * 2 + 0.25 * 4 + 0.125 * 8, 0.5 * 4 + 0.25 * 8, 0.5 * 8, 0.0]
    assert rewards_to_go(rewards, 0.5).tolist() == expected
    assert rewards_to_go(rewards, 0.0).tolist() == [0.0] * 4
    assert rewards_to_go(rewards[:1], 1.0).tolist() == [0.0]


def test_with_rewards_to_go_the_gradient_is_that_of_the_trajectorys_divergence() -> None:
    """Two decisions; the second state is the first action.

    Without discount it is the gradient of sum_t E[KL(p_S || p_T)], through the visited states, too.
    """
    # Row 0 is the first state, row 1 + a the second.
    student = random_logits(32, 1 + V, 1, V)
    teacher = random_logits(33, 1 + V, 1, V)

    def divergence(leaf: Tensor) -> Tensor:
        kl = reverse_kl(make_batch(leaf, teacher)).squeeze(1)
        return kl[0] + (leaf[0, 0].softmax(-1) * kl[1:]).sum()

    rewards = (teacher.log_softmax(-1) - student.log_softmax(-1)).squeeze(1)
    expected = torch.zeros_like(student)
    for first, second in product(range(V), range(V)):
        rows = torch.tensor([0, 1 + first])
        tokens = torch.tensor([[first], [second]])
        of_decisions = torch.stack([rewards[0, first], rewards[1 + first, second]])
        to_go = rewards_to_go(of_decisions, 1.0)

        def losses(
            leaf: Tensor, rows: Tensor = rows, tokens: Tensor = tokens, to_go: Tensor = to_go
        ) -> Tensor:
            batch = make_decision_batch(leaf[rows], teacher[rows], tokens, student[rows])
            return reverse_kl_rollout(replace(batch, to_go=to_go))

        of_first = student[0, 0].softmax(-1)[first]
        of_second = student[1 + first, 0].softmax(-1)[second]
        expected += of_first * of_second * differentiate(losses, student)
    assert_close(expected, differentiate(divergence, student), atol=1e-10)


# GRPO


CLIP = ClipParams()


def make_sampled(
    student: Tensor, sampler: Tensor, tokens: Tensor, advantage: Tensor
) -> SampledTokens:
    now = select_token(student.log_softmax(-1), tokens)
    then = select_token(sampler.log_softmax(-1), tokens)
    return SampledTokens(now, then, advantage)


def test_grpo_at_the_rollouts_student_is_the_policy_gradient() -> None:
    student = random_logits(34, 4, 3, V)
    tokens = cycle_tokens(4, 3)
    advantage = torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64)
    found = differentiate(
        lambda leaf: grpo(make_sampled(leaf, student, tokens, advantage), CLIP), student
    )
    score = torch.nn.functional.one_hot(tokens, V) - student.softmax(-1)
    assert_close(found, -advantage[:, None, None] * score, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "sign", "trains"),
    [
        (1.27, 1, True),
        (1.29, 1, False),
        (0.5, 1, True),
        (0.81, -1, True),
        (0.79, -1, False),
        (1.5, -1, True),
    ],
)
def test_grpo_has_no_gradient_where_the_ratio_is_beyond_its_bound(
    ratio: float, sign: int, trains: bool
) -> None:
    """Elsewhere the gradient is -A rho (onehot - p)."""
    sampler = torch.zeros(1, 1, 2, dtype=torch.float64)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    p = ratio / 2
    student = torch.tensor([[[np.log(p), np.log(1 - p)]]])
    advantage = torch.tensor([0.7 * sign], dtype=torch.float64)
    found = differentiate(
        lambda leaf: grpo(make_sampled(leaf, sampler, tokens, advantage), CLIP), student
    )
    score = torch.tensor([1 - p, p - 1], dtype=torch.float64)
    assert_close(found.flatten(), -advantage * ratio * score * trains, atol=1e-12)
    sampled = make_sampled(student, sampler, tokens, advantage)
    assert is_clipped(sampled, CLIP).item() != trains
    assert not is_clipped(sampled, ClipParams(clip_high=0.6, clip_low=0.6)).item()


def test_grpo_against_finite_differences() -> None:
    student = random_logits(35, 2, 2, V)
    sampler = random_logits(36, 2, 2, V)
    tokens = torch.tensor([[0, 1], [2, 3]])
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def total(logits: Tensor) -> Tensor:
        return grpo(make_sampled(logits, sampler, tokens, advantage), CLIP).sum()

    analytic = differentiate(total, student)
    for index in np.ndindex(*student.shape):
        step = torch.zeros_like(student)
        step[index] = WIDTH
        numeric = (total(student + step) - total(student - step)) / (2 * WIDTH)
        assert numeric.item() == pytest.approx(analytic[index].item(), rel=1e-7, abs=1e-8)


def test_an_advantage_is_relative_to_the_group() -> None:
    advantage = group_advantage(torch.tensor([True, False, False, False]))
    deviation = np.std([1, 0, 0, 0], ddof=1) + 1e-6
    expected = [0.75 / deviation, *[-0.25 / deviation] * 3]
    assert advantage.tolist() == pytest.approx(expected)
    assert advantage.sum().item() == pytest.approx(0, abs=1e-6)
    assert group_advantage(torch.tensor([True, True])).tolist() == [0, 0]
    with pytest.raises(ValueError, match="group is 1; expected at least 2 episodes"):
        group_advantage(torch.tensor([True]))


def test_weighted_so_the_mean_over_tokens_is_one_over_episodes() -> None:
    values = torch.arange(12.0).view(4, 3)
    mask = torch.tensor(
        [[True, True, True], [True, True, True], [True, False, False], [True, True, False]]
    )
    weight = episode_weight(mask, torch.tensor([4, 4, 7, 2])).unsqueeze(-1)
    mean = masked_mean(values * weight, mask).item()
    assert mean == pytest.approx(np.mean([2.5, 6.0, 9.5]))
    assert (weight * mask).sum() / mask.sum() == pytest.approx(1)
    assert masked_mean(values, mask).item() != pytest.approx(mean)


def test_mixed_is_grpo_and_a_share_of_the_reverse_kl() -> None:
    student, teacher, sampler = (random_logits(seed, 2, 2, V) for seed in (37, 38, 39))
    tokens = torch.tensor([[0, 1], [2, 3]])
    batch = make_decision_batch(student, teacher, tokens, sampler, "mixed", distill=0.25)
    expected = grpo(batch.sampled, CLIP) + 0.25 * reverse_kl(make_batch(student, teacher))
    torch.testing.assert_close(mixed(batch), expected)


# All of them


@pytest.mark.parametrize("name", [*OBJECTIVES, *ON_DECISIONS])
def test_a_batch_cut_in_two_is_the_same_batch(name: str) -> None:
    student, teacher, sampler = (random_logits(seed, 6, 3, V) for seed in (40, 41, 42))
    tokens = cycle_tokens(6, 3)
    mask = torch.arange(18).view(6, 3) % 4 > 0
    objective: Any = {**OBJECTIVES, **ON_DECISIONS}[name]

    def total(rows: slice, leaf: Tensor) -> Tensor:
        part = make_decision_batch(leaf[rows], teacher[rows], tokens[rows], sampler[rows], name)
        return masked_mean(objective(part), mask[rows]) * mask[rows].sum() / mask.sum()

    def in_two_parts(leaf: Tensor) -> Tensor:
        return total(slice(0, 4), leaf) + total(slice(4, 6), leaf)

    whole = differentiate(lambda leaf: total(slice(None), leaf), student)
    assert_close(differentiate(in_two_parts, student), whole, atol=1e-12)
    assert whole.abs().max() > 0.005


def test_a_confident_teacher_weighs_more() -> None:
    certain = torch.tensor([20.0, 0, 0, 0, 0])
    uniform = torch.zeros(V)
    log_probs = torch.stack([certain, uniform]).log_softmax(-1).unsqueeze(0)
    assert confidence_weight(log_probs, 1.0).flatten().tolist() == pytest.approx([1, 0], abs=1e-5)
    assert confidence_weight(log_probs, 0.0).flatten().tolist() == [1, 1]
    random = random_logits(43, 1, 1, V).log_softmax(-1)
    expected = (1 - entropy(random).item() / np.log(V)) ** 2
    assert confidence_weight(random, 2.0).item() == pytest.approx(expected)
