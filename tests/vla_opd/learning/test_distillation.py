"""Distillation: which artifacts belong together, the loss and its options, rollout decisions."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.small_run import call_stage
from tests.vla_opd import small as tiny
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.artifacts.draft import draft
from vla_opd.learning.decisions import Decisions
from vla_opd.learning.distillation import (
    DistillationBatch,
    DistillationLoss,
    decision_rewards_to_go,
    measure_student,
    read_batch,
    require_alignment,
    require_parents,
    score_states,
    select_states,
    token_batch,
    with_decisions,
)
from vla_opd.learning.objectives import (
    OBJECTIVES,
    DecisionBatch,
    TokenBatch,
    at_temperature,
    confidence_weight,
    group_advantage,
    grpo,
    masked_mean,
    reverse_kl,
    select_token,
)
from vla_opd.learning.optimizer import Session, train
from vla_opd.learning.update import plan_budget
from vla_opd.params.load import load
from vla_opd.params.objective import (
    ClipParams,
    MixedParams,
    OptimizeParams,
    RolloutParams,
)
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy, load_policy


def labeled_batch(rows: int = 6) -> DistillationBatch:
    """Random states and labels; state 0 has no valid token, state 1 only valid ones."""
    random = np.random.default_rng(0)
    mask = random.random((rows, tiny.TOKENS)) < 0.7
    mask[0] = False
    mask[1] = True
    logits = torch.from_numpy(random.normal(size=(rows, tiny.TOKENS, tiny.BINS)))
    labels = logits.log_softmax(-1).numpy().astype(np.float16)
    return DistillationBatch(tiny.observations(rows), mask, labels)


# Alignment


def store(folder: Path, kind: str, parents: dict[str, str], facts: dict[str, object]) -> str:
    with draft(folder, kind, parents, {}) as work:
        return work.publish(facts).digest


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, str]:
    """A student, its trajectories, and their labels."""
    publish(tmp_path / "student", {"a": torch.ones(1)}, {"checkpoint": tiny.FACTS.model_dump()})
    student = open_checkpoint(tmp_path / "student").digest
    trajectories = store(tmp_path / "trajectories", "trajectories", {"student": student}, {})
    labels = store(
        tmp_path / "labels",
        "labels",
        {"trajectories": trajectories},
        {"action_space": tiny.SPACE.model_dump()},
    )
    return {"student": student, "trajectories": trajectories, "labels": labels}


def test_a_checkpoint_of_an_earlier_version_is_no_source_of_earlier_states(
    tmp_path: Path, stored: dict[str, str]
) -> None:
    """Earlier versions called the labels logits."""
    parents = {"trajectories": stored["trajectories"], "logits": stored["labels"]}
    facts = {"checkpoint": tiny.FACTS.model_dump()}
    with draft(tmp_path / "it001", "checkpoint", parents, {}) as work:
        work.publish(facts)
    message = r"it001: names no labels among its parents \['logits', 'trajectories'\]"
    with pytest.raises(ValueError, match=message):
        require_parents(tmp_path / "it001", [("labels", tmp_path / "labels")])


def align(root: Path) -> dict[str, str]:
    student = open_checkpoint(root / "student")
    return require_alignment(student, root / "trajectories", root / "labels")


def test_what_belongs_together_is_accepted(tmp_path: Path, stored: dict[str, str]) -> None:
    assert align(tmp_path) == stored


def test_labels_of_other_trajectories_are_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    digest = store(
        tmp_path / "trajectories", "trajectories", {"student": stored["student"]}, {"episodes": 3}
    )
    message = f"labels: labels trajectories {stored['trajectories'][:12]}; expected {digest[:12]}"
    with pytest.raises(ValueError, match=message):
        align(tmp_path)


def test_trajectories_of_another_student_are_refused(
    tmp_path: Path, stored: dict[str, str]
) -> None:
    publish(tmp_path / "student", {"a": torch.zeros(1)}, {"checkpoint": tiny.FACTS.model_dump()})
    digest = open_checkpoint(tmp_path / "student").digest
    message = f"trajectories: sampled by {stored['student'][:12]}; expected {digest[:12]}"
    with pytest.raises(ValueError, match=message):
        align(tmp_path)


def test_a_teacher_of_other_actions_is_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    space = tiny.SPACE.model_copy(update={"q99": (0.5, 2.5, 0.0)})
    store(
        tmp_path / "labels",
        "labels",
        {"trajectories": stored["trajectories"]},
        {"action_space": space.model_dump()},
    )
    message = (
        r"labels: action_space\.q99 is \(0\.5, 2\.5, 0\.0\) for the teacher; "
        r"expected the student's \(0\.5, 2\.0, 0\.0\)"
    )
    with pytest.raises(ValueError, match=message):
        align(tmp_path)


# The loss


def test_both_are_scored_at_one_temperature_on_a_fresh_sample() -> None:
    policy = build_policy(tiny.FACTS).eval()
    batch = labeled_batch()
    rows = np.array([4, 1, 2])
    settings = OptimizeParams(temperature=0.7)
    with torch.no_grad():
        scored, mask = token_batch(policy, batch, rows, settings, seed=3)
        student = at_temperature(policy.logits(batch.observations.at(rows)), 0.7)
        same_seed, _ = token_batch(policy, batch, rows, settings, seed=3)
        next_seed, _ = token_batch(policy, batch, rows, settings, seed=4)
    torch.testing.assert_close(scored.student, student)
    teacher = at_temperature(torch.from_numpy(batch.teacher[rows]).float(), 0.7)
    torch.testing.assert_close(scored.teacher, teacher)
    np.testing.assert_array_equal(mask.numpy(), batch.mask[rows])
    assert torch.equal(scored.draw(), same_seed.draw())
    assert not torch.equal(scored.draw(), next_seed.draw())


def test_samples_follow_the_student() -> None:
    batch = labeled_batch(2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tiny.TOKENS, tiny.BINS, generator=generator)
    policy = cast("Any", SimpleNamespace(logits=lambda _: logits))
    settings = OptimizeParams(temperature=0.5)
    samples: list[torch.Tensor] = []
    for seed in range(600):
        scored, _ = token_batch(policy, batch, np.arange(2), settings, seed)
        samples.append(scored.draw())
    frequencies = torch.nn.functional.one_hot(torch.stack(samples), tiny.BINS).float().mean(0)
    probabilities = at_temperature(logits, 0.5).exp()
    deviation = (0.25 / 600) ** 0.5  # at most, of a frequency
    assert (frequencies - probabilities).abs().max() < 5 * deviation


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_objectives_mean_over_valid_tokens(name: str) -> None:
    settings = OptimizeParams.model_validate(
        {"objective": name, "batch_size": 5, "temperature": 0.8}
    )
    policy = build_policy(tiny.FACTS).eval()
    batch = labeled_batch(6)
    result = DistillationLoss(batch, settings, seed=1)(policy, 0)
    with torch.no_grad():  # state 0 has no valid token
        student = at_temperature(policy.logits(batch.observations.at(np.arange(1, 6))), 0.8)
    teacher = at_temperature(torch.from_numpy(batch.teacher[1:]).float(), 0.8)
    mask = torch.from_numpy(batch.mask[1:])
    if name != "reverse_kl_sampled":  # its samples depend on the order of the rows
        sample = torch.zeros_like(mask).long()
        tokens = TokenBatch(student, teacher, lambda: sample, settings.objective)
        expected = masked_mean(OBJECTIVES[name](tokens), mask)
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    entropy = masked_mean(-(student.exp() * student).sum(-1), mask)
    assert result.row["student_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert ("reverse_kl" in result.row) == (name != "reverse_kl")


def test_a_function_that_does_not_exist_is_refused() -> None:
    settings = OptimizeParams.model_validate({"objective": "nowhere:nothing"})
    with pytest.raises(ValueError, match=r"optimize\.objective is 'nowhere:nothing'"):
        DistillationLoss(labeled_batch(), settings, seed=0)


def scaled_kl(batch: TokenBatch[Any]) -> torch.Tensor:
    """An objective from outside the package, with an option of its own."""
    return batch.options.factor * reverse_kl(batch)


def test_an_objective_from_outside_the_package_reads_its_own_options() -> None:
    custom = {"name": f"{__name__}:scaled_kl", "factor": 2.0}
    policy = build_policy(tiny.FACTS).eval()
    losses = [
        DistillationLoss(labeled_batch(), OptimizeParams.model_validate(settings), seed=1)
        for settings in ({}, {"objective": custom})
    ]
    exact, doubled = (loss(policy, 0).loss.item() for loss in losses)
    assert doubled == pytest.approx(2 * exact)


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_kl_sampled", "forward_kl"])
def test_the_student_becomes_more_like_the_teacher(tmp_path: Path, name: str) -> None:
    settings = OptimizeParams(
        objective=OptimizeParams.model_validate({"objective": name}).objective,
        steps=12,
        batch_size=8,
        learning_rate=5e-3,
        schedule_iterations=1,
        temperature=1.0,
    )
    torch.manual_seed(0)
    policy = build_policy(tiny.FACTS).eval()
    batch = labeled_batch(8)
    before = measure_student(policy, batch, settings)
    loss = DistillationLoss(batch, settings, seed=1)
    budget = plan_budget(settings, 0, len(batch.usable))
    train(policy, loss, budget, Session("it001", tmp_path))
    after = measure_student(policy, batch, settings)
    assert after.reverse_kl < 0.8 * before.reverse_kl
    assert after.teacher_entropy == before.teacher_entropy
    assert measure_student(policy, batch, settings) == after


def test_the_anchor_and_the_teachers_confidence_are_in_the_loss_and_in_the_metrics() -> None:
    settings = OptimizeParams(batch_size=5, anchor=0.3, confidence=1.0, teacher_temperature=0.5)
    policy = build_policy(tiny.FACTS).eval()
    batch = labeled_batch()
    torch.manual_seed(1)
    initial = build_policy(tiny.FACTS).eval()
    with torch.no_grad():
        for value in initial.parameters():
            value.mul_(1.5)
    batch = replace(batch, initial=score_states(initial, batch, settings))
    result = DistillationLoss(batch, settings, seed=1)(policy, 0)

    observations = batch.observations.at(np.arange(1, 6))
    with torch.no_grad():
        student = at_temperature(policy.logits(observations), 1.0)
        anchor = at_temperature(initial.logits(observations), 1.0)
    teacher = at_temperature(torch.from_numpy(batch.teacher[1:]).float(), 0.5)
    mask = torch.from_numpy(batch.mask[1:])
    weight = confidence_weight(teacher, 1.0)
    divergence = (student.exp() * (student - teacher)).sum(-1)
    anchor_kl = masked_mean((student.exp() * (student - anchor)).sum(-1), mask).item()
    weighted_kl = masked_mean(divergence * weight, mask).item()
    mean_weight = masked_mean(weight, mask).item()
    assert result.loss.item() == pytest.approx(weighted_kl + 0.3 * anchor_kl, rel=1e-4)
    assert anchor_kl > 1e-3
    mean_kl = masked_mean(divergence, mask).item()
    assert result.row["reverse_kl"] == pytest.approx(mean_kl, rel=1e-4)
    assert result.row["anchor_kl"] == pytest.approx(anchor_kl, rel=1e-4)
    assert result.row["confidence"] == pytest.approx(mean_weight, rel=1e-4)


def test_selected_states_are_usable_ones() -> None:
    batch = labeled_batch(30)
    selection = select_states(batch, 12, seed=1)
    selected = selection.selected
    assert selected is not None
    assert selected.sum() == 12
    assert set(np.flatnonzero(selected)) < set(batch.usable)
    assert selection.usable.tolist() == np.flatnonzero(selected).tolist()
    assert not (selection.trained_tokens & ~selected[:, None]).any()
    next_seed = select_states(batch, 12, seed=2).selected
    assert next_seed is not None
    assert selected.tolist() != next_seed.tolist()
    narrowed = select_states(replace(batch, selected=batch.mask[:, 0]), 3, seed=1).selected
    assert narrowed is not None
    assert not (narrowed & ~batch.mask[:, 0]).any()


# The rollout's decisions


def batch_with_decisions(
    objective: str, **options: object
) -> tuple[DistillationBatch, OptimizeParams]:
    """Two groups of three episodes of one state each, of which all but the last have a decision.

    In the first group one of three succeeded, in the second none.
    """
    batch = labeled_batch()
    params = OptimizeParams.model_validate(
        {"batch_size": 6, "objective": {"name": objective, **options}}
    )
    random = np.random.default_rng(1)
    rows = len(batch.mask)
    decisions = Decisions(
        decided=np.arange(rows) < rows - 1,
        tokens=random.integers(0, tiny.BINS, batch.mask.shape),
        log_probs=random.normal(-2, 0.3, batch.mask.shape).astype(np.float32),
        episode=np.arange(rows),
        group=np.arange(rows) // 3,
        success=np.array([True, False, False, False, False, False]),
    )
    return with_decisions(batch, decisions, params, 0.7), params


def test_mixed_learns_from_the_teacher_everywhere_and_from_the_rewards_of_useful_groups() -> None:
    batch, settings = batch_with_decisions("mixed", distill=0.5)
    assert batch.decisions is not None
    # State 0 has no valid token; the second group, of 3 and 4, has no success.
    assert batch.usable.tolist() == [1, 2, 3, 4]
    without_teacher, _ = batch_with_decisions("mixed", distill=0.0)
    assert without_teacher.usable.tolist() == [1, 2]
    policy = build_policy(tiny.FACTS).eval()
    settings = settings.model_copy(update={"batch_size": 4})
    result = DistillationLoss(batch, settings, seed=1)(policy, 0)
    rows = batch.usable
    with torch.no_grad():
        tokens, mask = token_batch(policy, batch, rows, settings, 0)
        assert isinstance(tokens, DecisionBatch)
        # At the rollout's temperature, whatever the objective's.
        log_probs = at_temperature(policy.logits(batch.observations.at(rows)), 0.7)
        sampled = torch.from_numpy(batch.decisions.decisions.tokens[rows])
        now = log_probs.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(tokens.sampled.now, now)
        assert tokens.sampled.advantage[2:].tolist() == [0, 0]
        advantage = group_advantage(torch.tensor([True, False, False]))[1:]
        advantages = torch.cat([advantage, torch.zeros(2)])
        losses = grpo(replace(tokens.sampled, advantage=advantages), ClipParams())
        per_episode = torch.stack([losses[i][mask[i]].mean() for i in range(2)])  # one state each
        expected = per_episode.mean() + 0.5 * masked_mean(reverse_kl(tokens), mask)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(result.row) == {"student_entropy", "reverse_kl", "clip_fraction"}


def test_the_published_form_learns_from_every_decision() -> None:
    batch, settings = batch_with_decisions("reverse_kl_rollout", discount=0.5)
    assert batch.decisions is not None
    to_go = np.linspace(1, 2, len(batch.mask), dtype=np.float32)
    batch = replace(batch, decisions=replace(batch.decisions, to_go=to_go))
    assert batch.usable.tolist() == [1, 2, 3, 4]
    policy = build_policy(tiny.FACTS).eval()
    settings = settings.model_copy(update={"batch_size": 4})
    result = DistillationLoss(batch, settings, seed=1)(policy, 0)
    with torch.no_grad():
        tokens, mask = token_batch(policy, batch, batch.usable, settings, 0)
        assert isinstance(tokens, DecisionBatch)
        later = torch.from_numpy(to_go[batch.usable]).unsqueeze(-1)
        student = select_token(tokens.student, tokens.tokens)
        teacher = select_token(tokens.teacher, tokens.tokens)
        expected = masked_mean(-student * (teacher - student + later), mask)
    assert later[:-1].abs().min() > 0
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(result.row) == {"student_entropy", "reverse_kl"}


def test_a_decisions_reward_to_go_is_that_of_its_episode_at_its_valid_tokens() -> None:
    batch = labeled_batch(4)
    rollout = RolloutParams(name="reverse_kl_rollout", discount=0.5)
    random = np.random.default_rng(1)
    decisions = Decisions(
        decided=np.array([True, False, True, True]),
        tokens=random.integers(0, tiny.BINS, batch.mask.shape),
        log_probs=random.normal(-2, 0.3, batch.mask.shape).astype(np.float32),
        episode=np.array([0, 0, 0, 1]),
        group=np.zeros(4, np.int64),
        success=np.zeros(4, np.bool_),
    )

    def to_go(**options: object) -> np.ndarray:
        objective = rollout.model_copy(update=options)
        settings = OptimizeParams(objective=objective, teacher_temperature=0.9)
        return decision_rewards_to_go(batch, decisions, settings)

    teacher = at_temperature(torch.from_numpy(batch.teacher).float(), 0.9).numpy()
    scores = np.take_along_axis(teacher, decisions.tokens[..., None], -1)[..., 0]
    reward = scores - decisions.log_probs
    later = (reward[2] * batch.mask[2]).sum()
    assert to_go() == pytest.approx([0.5 * later, 0, 0, 0], rel=1e-5)
    clamped = (np.clip(reward[2], -0.4, 0.4) * batch.mask[2]).sum()
    assert to_go(clamp=0.4) == pytest.approx([0.5 * clamped, 0, 0, 0], rel=1e-5)
    assert not to_go(discount=0.0).any()


# On a real run


def read_it001(root: Path, settings: OptimizeParams) -> DistillationBatch:
    """Read what the small run's `optimize` reads."""
    space = open_checkpoint(root / "checkpoints/student").facts.action_space
    return read_batch(root / "trajectories/it001", root / "labels/it001", space, settings)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "mixed", "distill": 0.5, "keep_low": 0, "keep_high": 1},
        {"name": "reverse_kl_rollout", "ratio": True, "centre": True, "clamp": 0.001},
    ],
)
def test_the_trainers_log_probabilities_are_the_rollouts(
    small: Path, objective: dict[str, object]
) -> None:
    """Before the first step a ratio differs from 1 by the arithmetic of the batch size only."""
    settings = load("params.yaml", [f"optimize.objective={json.dumps(objective)}"]).optimize
    batch = read_it001(small, settings)
    assert len(batch.usable) > 50
    policy = load_policy(open_checkpoint(small / "checkpoints/student"), "cpu")
    tokens, _ = token_batch(policy, batch, batch.usable, settings, 0)
    assert isinstance(tokens, DecisionBatch)
    torch.testing.assert_close(tokens.sampled.now, tokens.sampled.then, rtol=0, atol=1e-4)


def test_grpo_weighs_every_episode_alike_however_many_of_its_states_are_selected(
    small: Path,
) -> None:
    assert call_stage(["label", "--iteration", "it001"], "label.recover_every=2") == 0
    mixed = MixedParams(name="mixed", keep_low=0, keep_high=1)
    settings = OptimizeParams(objective=mixed, recoverable=True)
    batch = read_it001(small, settings)
    assert batch.decisions is not None
    assert batch.selected is not None
    decisions = batch.decisions.decisions
    episode = decisions.episode
    advantage = decisions.advantages(batch.trained_tokens, mixed).advantage
    rows = batch.usable[advantage[batch.usable] != 0]  # in groups with both outcomes
    weight = batch.decisions.advantage[rows] / advantage[rows] * batch.mask[rows].sum(1)
    weights = [weight[episode[rows] == number].sum() for number in np.unique(episode[rows])]
    assert len(weights) > 3
    np.testing.assert_allclose(weights, weights[0], rtol=1e-4)
    selected = [batch.selected[episode == number].mean() for number in np.unique(episode)]
    assert any(0 < share < 1 for share in selected), "no episode is selected in part"
    assert len(rows) < (decisions.decided & batch.mask.any(1)).sum()  # some are left out
