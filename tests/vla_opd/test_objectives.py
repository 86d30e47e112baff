"""Mathematics against mathematics: gradients by enumeration over all V bins and by finite differences, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vla_opd import small
from vla_opd.objectives import OBJECTIVES, Objective, TokenBatch, entropy, forward_kl, hard_ce, masked_mean, reverse_kl, reverse_kl_sampled, tempered
from vla_opd.policies import build_policy
from vla_opd.rollout import choose

V = 5
EXACT = {name: OBJECTIVES[name] for name in ("reverse_kl", "forward_kl", "hard_ce")}  # those whose value is what their gradient is of


def random_logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> TokenBatch:
    """From logits. Without tokens: token 0 everywhere."""
    drawn = torch.zeros(student.shape[:2], dtype=torch.long) if tokens is None else tokens
    return TokenBatch(student.log_softmax(-1), teacher.log_softmax(-1), lambda: drawn)


def gradient(objective: Objective, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Of the sum of all tokens' losses, by the student's logits."""
    leaf = student.clone().requires_grad_()
    objective(batch(leaf, teacher, tokens)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def expected_gradient(student: Tensor, teacher: Tensor, sampler: Tensor | None = None) -> Tensor:
    """Sum over a of p(a) times the gradient of the sampled loss with token a, p the student itself if no sampler is given. Shapes [N, K, V]."""
    probabilities = (student if sampler is None else sampler).softmax(-1)
    total = torch.zeros_like(student)
    for a in range(V):
        tokens = torch.full(student.shape[:2], a)
        total += probabilities[..., a : a + 1] * gradient(reverse_kl_sampled, student, teacher, tokens)
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
    draws = torch.stack([gradient(reverse_kl_sampled, student, teacher, torch.tensor([[a]])) for a in range(V)])
    variance = (probabilities[:, None] * (draws - exact).flatten(1) ** 2).sum()
    assert variance > exact.square().sum()


def test_draws_of_an_older_student_have_another_expectation() -> None:
    student, teacher, older = (random_logits(seed, 1, 1, V) for seed in range(3))
    assert (expected_gradient(student, teacher, older) - gradient(reverse_kl, student, teacher)).abs().max() > 0.05


def test_gradients_against_their_closed_forms() -> None:
    student, teacher = random_logits(3, 4, 2, V), random_logits(4, 4, 2, V)
    p, q = student.softmax(-1), teacher.softmax(-1)
    ratio = p.log() - q.log()
    kl = (p * ratio).sum(-1, keepdim=True)
    greedy = torch.nn.functional.one_hot(q.argmax(-1), V)
    expected = {"reverse_kl": p * (ratio - kl), "forward_kl": p - q, "hard_ce": p - greedy}
    for name, objective in EXACT.items():
        torch.testing.assert_close(gradient(objective, student, teacher), expected[name], rtol=0, atol=1e-12, msg=name)


def test_the_sampled_gradient_against_its_closed_form() -> None:
    student, teacher, tokens = random_logits(3, 4, 2, V), random_logits(4, 4, 2, V), torch.arange(8).view(4, 2) % V
    p, q = student.softmax(-1), teacher.softmax(-1)
    drawn = torch.nn.functional.one_hot(tokens, V)
    reward = ((q.log() - p.log()) * drawn).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient(reverse_kl_sampled, student, teacher, tokens), -reward * (drawn - p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_against_finite_differences(name: str) -> None:
    student, teacher = random_logits(5, 2, 2, V), random_logits(6, 2, 2, V)
    analytic, width = gradient(EXACT[name], student, teacher), 1e-6
    for index in np.ndindex(*student.shape):
        ahead, behind = student.clone(), student.clone()
        ahead[index] += width
        behind[index] -= width
        numeric = (EXACT[name](batch(ahead, teacher)).sum() - EXACT[name](batch(behind, teacher)).sum()) / (2 * width)
        assert numeric.item() == pytest.approx(analytic[index].item(), abs=1e-8)


def test_values_against_numpy() -> None:
    student, teacher = random_logits(7, 1, 1, V), random_logits(8, 1, 1, V)
    p, q = student.softmax(-1).numpy().ravel(), teacher.softmax(-1).numpy().ravel()
    assert reverse_kl(batch(student, teacher)).item() == pytest.approx(np.sum(p * np.log(p / q)), abs=1e-12)
    assert forward_kl(batch(student, teacher)).item() == pytest.approx(np.sum(q * np.log(q / p)), abs=1e-12)
    assert hard_ce(batch(student, teacher)).item() == pytest.approx(-np.log(p[q.argmax()]), abs=1e-12)
    assert entropy(student.log_softmax(-1)).item() == pytest.approx(-np.sum(p * np.log(p)), abs=1e-12)


def test_the_kl_of_a_chunk_is_the_sum_of_its_tokens() -> None:
    student, teacher = random_logits(9, 1, 2, V).log_softmax(-1), random_logits(10, 1, 2, V).log_softmax(-1)
    joint = [(logits[0, 0, :, None] + logits[0, 1, None, :]).flatten()[None, None] for logits in (student, teacher)]
    for objective in (reverse_kl, forward_kl):
        assert objective(batch(student, teacher)).sum().item() == pytest.approx(objective(batch(*joint)).item(), abs=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    logits = random_logits(11, 3, 2, V)
    torch.testing.assert_close(reverse_kl(batch(logits, logits)), torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=1e-15)
    for objective in (reverse_kl, forward_kl, reverse_kl_sampled):  # the sampled reward is zero for every token, so every draw's gradient is
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
    optimiser = torch.optim.LBFGS([student], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> float:
        student.grad = gradient(objective, student.detach(), teacher)
        return objective(batch(student.detach(), teacher)).sum().item()

    optimiser.step(closure)
    return student.softmax(-1)


@pytest.mark.parametrize("objective", [reverse_kl, forward_kl])
def test_both_divergences_are_least_at_the_teacher(objective: Objective) -> None:
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
    torch.testing.assert_close(tempered(logits.log_softmax(-1), temperature), tempered(logits, temperature), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.6])
def test_the_samplers_log_probability_is_the_trainers(temperature: float) -> None:
    logits = random_logits(19, 20, 6, 256).float()
    trainer = tempered(logits, temperature)
    for row, ours in zip(logits, trainer, strict=True):
        tokens, log_probs = choose(row, temperature, np.random.default_rng(0))
        np.testing.assert_array_equal(log_probs, ours.gather(-1, torch.from_numpy(tokens).long()[:, None]).squeeze(-1).numpy())


def test_the_samplers_log_probability_is_the_trainers_through_a_policy() -> None:
    policy, seen, temperature = build_policy(small.FACTS).eval(), small.observations(6), 0.7
    with torch.inference_mode():
        trainer = tempered(policy.logits(seen), temperature)
        for row in range(len(seen)):
            tokens, log_probs = choose(policy.logits(seen.at(np.array([row])))[0], temperature, np.random.default_rng(row))
            ours = trainer[row].gather(-1, torch.from_numpy(tokens).long()[:, None]).squeeze(-1)
            np.testing.assert_allclose(log_probs, ours.numpy(), atol=1e-5)
