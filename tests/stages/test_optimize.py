"""The update: where it stands on the schedule, what it refuses to put together, and that it makes the student more like the teacher."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from stages.optimize import Labelled, _budget, _depth, _loss, _probe, _require_alignment, _token_batch
from tests.vla_opd import small
from tests.vla_opd.test_checkpoint import publish
from vla_opd.artifacts import draft
from vla_opd.checkpoint import open_checkpoint
from vla_opd.objectives import OBJECTIVES, TokenBatch, masked_mean, tempered
from vla_opd.params import CheckpointParams, DemonstrationSet, OptimizeParams, Params, RunParams
from vla_opd.policies import build_policy
from vla_opd.training import train

RECIPE = CheckpointParams(demonstrations="main", steps=3, learning_rate=1e-3)
OPTIMIZE = OptimizeParams(steps=10, batch_size=4, learning_rate=1.0, schedule_iterations=3, final_fraction=0.1, warmup_fraction=0.1)


def params(optimize: OptimizeParams = OPTIMIZE, **iterations: str) -> Params:
    return Params(
        run=RunParams(name="test"),
        environment=small.ENVIRONMENT,
        optimize=optimize,
        demonstrations={"main": DemonstrationSet(episodes=1)},
        teacher=RECIPE,
        student=RECIPE,
        iterations=iterations,
        evaluations={},
    )


def labelled(rows: int = 6) -> Labelled:
    random = np.random.default_rng(0)
    mask = random.random((rows, small.TOKENS)) < 0.7
    mask[0], mask[1] = False, True
    logits = torch.from_numpy(random.normal(size=(rows, small.TOKENS, small.BINS)))
    return Labelled(small.observations(rows), mask, logits.log_softmax(-1).numpy().astype(np.float16))


def test_depth_counts_the_iterations_before() -> None:
    run = params(it001="student", it002="it001", it003="it002", branch="it001", fresh="teacher")
    assert {name: _depth(run, name) for name in run.iterations} == {"it001": 0, "it002": 1, "it003": 2, "branch": 1, "fresh": 0}


@pytest.mark.parametrize(
    ("iterations", "start", "circle"),
    [({"a": "a"}, "a", "a -> a"), ({"a": "b", "b": "a"}, "a", "a -> b -> a"), ({"a": "b", "b": "c", "c": "b"}, "a", "a -> b -> c -> b")],
)
def test_a_chain_that_bites_its_tail_is_refused(iterations: dict[str, str], start: str, circle: str) -> None:
    with pytest.raises(ValueError, match=f"iterations: {circle} is a circle; expected a chain"):
        _depth(params(**iterations), start)


def test_iterations_follow_each_other_on_one_schedule() -> None:
    run = params()
    rates = [_budget(run, depth).schedule.at(_budget(run, depth).first + step) for depth in range(4) for step in range(OPTIMIZE.steps)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])  # 3 of the 30 steps warm up
    assert all(ours >= theirs for ours, theirs in pairwise(rates[3:]))
    assert rates[30:] == pytest.approx([0.1] * 10)


def store(folder: Path, kind: str, parents: dict[str, str], facts: dict[str, object]) -> str:
    with draft(folder, kind, parents, {}) as work:
        return work.publish(facts).digest


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, str]:
    """A student, its trajectories, and their labels."""
    publish(tmp_path / "student", {"a": torch.ones(1)}, {"checkpoint": small.FACTS.model_dump()})
    student = open_checkpoint(tmp_path / "student").digest
    trajectories = store(tmp_path / "trajectories", "trajectories", {"student": student}, {})
    logits = store(tmp_path / "logits", "logits", {"trajectories": trajectories}, {"action_space": small.SPACE.model_dump()})
    return {"student": student, "trajectories": trajectories, "logits": logits}


def align(root: Path) -> dict[str, str]:
    return _require_alignment(open_checkpoint(root / "student"), root / "trajectories", root / "logits")


def test_what_belongs_together_is_accepted(tmp_path: Path, stored: dict[str, str]) -> None:
    assert align(tmp_path) == stored


def test_labels_of_other_trajectories_are_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    other = store(tmp_path / "trajectories", "trajectories", {"student": stored["student"]}, {"episodes": 3})
    with pytest.raises(ValueError, match=f"logits: labels trajectories {stored['trajectories'][:12]}; expected {other[:12]}"):
        align(tmp_path)


def test_trajectories_of_another_student_are_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    publish(tmp_path / "student", {"a": torch.zeros(1)}, {"checkpoint": small.FACTS.model_dump()})
    other = open_checkpoint(tmp_path / "student").digest
    with pytest.raises(ValueError, match=f"trajectories: sampled by {stored['student'][:12]}; expected {other[:12]}"):
        align(tmp_path)


def test_a_teacher_of_other_actions_is_refused(tmp_path: Path, stored: dict[str, str]) -> None:
    space = small.SPACE.model_copy(update={"q99": (0.5, 2.5, 0.0)})
    store(tmp_path / "logits", "logits", {"trajectories": stored["trajectories"]}, {"action_space": space.model_dump()})
    with pytest.raises(
        ValueError, match=r"logits: action_space\.q99 is \(0\.5, 2\.5, 0\.0\) for the teacher; expected the student's \(0\.5, 2\.0, 0\.0\)"
    ):
        align(tmp_path)


def test_both_are_scored_at_one_temperature_on_a_fresh_draw() -> None:
    policy, data, rows = build_policy(small.FACTS).eval(), labelled(), np.array([4, 1, 2])
    with torch.no_grad():
        batch, mask = _token_batch(policy, data, rows, 0.7, seed=3)
        expected = tempered(policy.logits(data.observations.at(rows)), 0.7)
        again, _ = _token_batch(policy, data, rows, 0.7, seed=3)
        other, _ = _token_batch(policy, data, rows, 0.7, seed=4)
    torch.testing.assert_close(batch.student, expected)
    torch.testing.assert_close(batch.teacher, tempered(torch.from_numpy(data.teacher[rows]).float(), 0.7))
    np.testing.assert_array_equal(mask.numpy(), data.mask[rows])
    assert torch.equal(batch.draw(), again.draw())
    assert not torch.equal(batch.draw(), other.draw())


def test_draws_follow_the_student() -> None:
    data, logits = labelled(2), torch.randn(2, small.TOKENS, small.BINS, generator=torch.Generator().manual_seed(0))
    policy = cast("torch.nn.Module", SimpleNamespace(logits=lambda _: logits))
    draws = torch.stack([_token_batch(policy, data, np.arange(2), 0.5, seed)[0].draw() for seed in range(600)])
    wanted = tempered(logits, 0.5).exp()
    found = torch.nn.functional.one_hot(draws, small.BINS).float().mean(0)
    assert (found - wanted).abs().max() < 5 * (0.25 / 600) ** 0.5  # five standard deviations of a frequency


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_objectives_mean_over_valid_tokens(name: str) -> None:
    opt = OptimizeParams(objective=name, batch_size=5, temperature=0.8)
    policy, data = build_policy(small.FACTS).eval(), labelled(6)
    value, row = _loss(policy, data, params(opt), seed=1)(0)
    with torch.no_grad():
        student = tempered(policy.logits(data.observations.at(np.arange(1, 6))), 0.8)  # state 0 has no valid token
    teacher = tempered(torch.from_numpy(data.teacher[1:]).float(), 0.8)
    mask = torch.from_numpy(data.mask[1:])
    if name != "reverse_kl_sampled":  # its draws depend on the order of the rows
        expected = masked_mean(OBJECTIVES[name](TokenBatch(student, teacher, lambda: torch.zeros_like(mask).long())), mask)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert row["student_entropy"] == pytest.approx(masked_mean(-(student.exp() * student).sum(-1), mask).item(), rel=1e-4)
    assert ("reverse_kl" in row) == (name != "reverse_kl")


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optimize\.objective is 'mse'; expected one of \['forward_kl', 'hard_ce', 'reverse_kl', 'reverse_kl_sampled'\]"
    ):
        _loss(build_policy(small.FACTS), labelled(), params(OptimizeParams(objective="mse")), seed=0)


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_kl_sampled", "forward_kl"])
def test_the_student_becomes_more_like_the_teacher(tmp_path: Path, name: str) -> None:
    opt = OptimizeParams(objective=name, steps=12, batch_size=8, learning_rate=5e-3, schedule_iterations=1, temperature=1.0)
    torch.manual_seed(0)
    policy, data = build_policy(small.FACTS).eval(), labelled(8)
    before = _probe(policy, data, 1.0)
    train(policy, _loss(policy, data, params(opt), seed=1), _budget(params(opt), 0), tmp_path, None, "it001")
    after = _probe(policy, data, 1.0)
    assert after["reverse_kl"] < 0.8 * before["reverse_kl"]
    assert after["teacher_entropy"] == before["teacher_entropy"]
    assert _probe(policy, data, 1.0) == after
