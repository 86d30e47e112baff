"""The optimiser's loop: an interruption leaves no trace, the schedule is its equation, and every row has its turn."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_opd.learning.optimizer import (
    Budget,
    Evidence,
    Loss,
    Means,
    Row,
    Schedule,
    batches,
    train,
    write_rows,
)

Trained = tuple[list[Row], dict[str, Tensor], dict[str, Tensor]]  # rows, moments, weights
STEPS = 9
BUDGET = Budget(
    STEPS, Schedule(0.05, 0.01, 2, STEPS), gradient_clip=1.0, weight_decay=0.1, save_every=3
)


class InterruptionError(Exception):
    """As if the process had been killed."""


def regression(
    fail_at: int | None = None, calls: list[int] | None = None
) -> tuple[nn.Module, Loss]:
    """A network with a buffer, and a loss that depends on the step."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    def loss(policy: nn.Module, step: int) -> Means:
        if calls is not None:
            calls.append(step)
        if step == fail_at:
            raise InterruptionError
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        value = (policy(x) - x[:, :2] ** 2).square().mean()
        return Means(value, {"twice": 2 * value.item()}, 32)

    return policy, loss


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Trained:
    (tmp_path / "whole").mkdir()
    policy, loss = regression()
    rows, moments = train(policy, loss, BUDGET, tmp_path / "whole", None, "whole")
    return rows, moments, policy.state_dict()


def test_every_row_is_logged_as_it_is_made(tmp_path: Path) -> None:
    policy, loss = regression(fail_at=6)
    seen: list[tuple[int, float]] = []
    with pytest.raises(InterruptionError):
        train(
            policy,
            loss,
            Budget(9, BUDGET.schedule, 1.0, 0.1, 100, first=20),
            tmp_path,
            None,
            "one",
            lambda row, step: seen.append((step, row["loss"])),
        )
    assert [step for step, _ in seen] == list(range(20, 26))
    assert len({value for _, value in seen}) == 6


@pytest.mark.parametrize("fail_at", range(STEPS))
def test_an_interruption_leaves_no_trace(
    tmp_path: Path, uninterrupted: Trained, fail_at: int
) -> None:
    policy, loss = regression(fail_at)
    with pytest.raises(InterruptionError):
        train(policy, loss, BUDGET, tmp_path, None, "interrupted")
    calls: list[int] = []
    policy, loss = regression(calls=calls)
    rows, moments = train(policy, loss, BUDGET, tmp_path, None, "resumed")
    assert calls == list(
        range(fail_at // 3 * 3, STEPS)
    )  # from the last save on, not from the start
    expected_rows, expected_moments, expected_weights = uninterrupted
    assert rows == expected_rows
    assert same(moments, expected_moments)
    assert same(policy.state_dict(), expected_weights)


def test_rows_say_what_happened(uninterrupted: Trained) -> None:
    rows, moments, _ = uninterrupted
    assert len(rows) == STEPS
    assert all(row["twice"] == 2 * row["loss"] and row["gradient_norm"] > 0 for row in rows)
    assert [row["learning_rate"] for row in rows] == [
        BUDGET.schedule.at(step) for step in range(STEPS)
    ]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert moments["0/step"] == STEPS


def test_two_iterations_are_one_long_one_if_the_moments_are_handed_on(
    tmp_path: Path, uninterrupted: Trained
) -> None:
    policy, loss = regression()
    first, moments = train(
        policy, loss, Budget(4, BUDGET.schedule, 1.0, 0.1, 100), tmp_path, None, "one"
    )
    later = Budget(5, BUDGET.schedule, 1.0, 0.1, 100, first=4)
    second, moments = train(
        policy, lambda policy, step: loss(policy, 4 + step), later, tmp_path, moments, "two"
    )
    expected_rows, expected_moments, expected_weights = uninterrupted
    assert first + second == expected_rows
    assert same(moments, expected_moments)
    assert same(policy.state_dict(), expected_weights)


def test_without_the_moments_the_second_iteration_is_another(
    tmp_path: Path, uninterrupted: Trained
) -> None:
    policy, loss = regression()
    train(policy, loss, Budget(4, BUDGET.schedule, 1.0, 0.1, 100), tmp_path, None, "one")
    train(
        policy,
        lambda policy, step: loss(policy, 4 + step),
        Budget(5, BUDGET.schedule, 1.0, 0.1, 100, first=4),
        tmp_path,
        None,
        "two",
    )
    assert not same(policy.state_dict(), uninterrupted[2])


def test_a_step_is_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    policy = nn.Linear(1, 1, bias=False)
    nn.init.constant_(policy.weight, 2.0)
    budget = Budget(1, Schedule(0.1, 0.1, 0, 1), gradient_clip=0.5, weight_decay=0.3, save_every=10)
    (row,), moments = train(
        policy,
        lambda policy, _: Means(40 * policy.weight.sum(), {}, 1),
        budget,
        tmp_path,
        None,
        "one",
    )
    assert row["gradient_norm"] == pytest.approx(40)  # before clipping
    assert moments["0/exp_avg"].item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert policy.weight.item() == pytest.approx(
        2.0 * (1 - 0.1 * 0.3) - 0.1, rel=1e-5
    )  # decay, then the first step of Adam: -lr sign(g)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda x: x * math.nan, "loss is nan"),
        (lambda x: (x - x.detach()).sqrt(), "norm (inf|nan)"),
    ],
)
def test_a_step_that_is_not_finite_is_not_made_and_its_batch_is_kept(
    tmp_path: Path, spoil: Callable[[Tensor], Tensor], found: str
) -> None:
    """The loss itself, or a loss that is finite (0) with a gradient that is not; after it, the run goes on from its last save."""
    policy, loss = regression()
    before: list[dict[str, Tensor]] = []

    def spoilt(policy: nn.Module, step: int) -> Means:
        before.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        found = loss(policy, step)
        return replace(found, loss=spoil(found.loss)) if step == 5 else found

    evidence = Evidence(tmp_path / "kept", lambda step: {"states": np.arange(step)})
    with pytest.raises(
        FloatingPointError, match=rf"optimize it007: the .*{found}.* at step 5; expected finite"
    ) as caught:
        train(policy, spoilt, BUDGET, tmp_path, None, "optimize it007", evidence=evidence)
    kept = tmp_path / "kept/optimize-it007-step00005.safetensors"
    assert str(kept) in str(caught.value)
    tensors = safetensors.torch.load_file(kept)
    assert tensors.pop("batch/states").tolist() == [0, 1, 2, 3, 4]
    learned = [
        name for name, _ in policy.named_parameters()
    ]  # batch norm's statistics are the forward pass's
    assert all(torch.equal(tensors[f"weights/{name}"], before[-1][name]) for name in learned)
    calls: list[int] = []
    policy, loss = regression(calls=calls)
    train(policy, loss, BUDGET, tmp_path, None, "again")
    assert calls == list(range(3, STEPS))


def test_the_schedule_at_points_computed_by_hand() -> None:
    schedule = Schedule(peak=1.0, final=0.2, warmup=4, total=12)
    assert [schedule.at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(4) == 1.0
    assert schedule.at(6) == pytest.approx(
        0.2 + 0.4 * (1 + math.sqrt(0.5))
    )  # a quarter of the way: cos(pi / 4)
    assert schedule.at(8) == pytest.approx(0.6)
    assert schedule.at(12) == pytest.approx(0.2)
    assert schedule.at(50) == pytest.approx(0.2)
    assert Schedule(3.0, 1.0, 0, 1).at(0) == 3.0
    assert Schedule(3.0, 1.0, 2, 2).at(1) == 3.0


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_every_row_has_its_turn_once_an_epoch_whatever_the_batch_size(
    rows: int, size: int, seed: int
) -> None:
    at = batches(rows, size, seed)
    drawn = [at(step) for step in range(3 * rows)]
    assert all(batch.shape == (size,) for batch in drawn)
    flat = np.concatenate(drawn)
    for epoch in range(3 * size):
        assert Counter(flat[epoch * rows : (epoch + 1) * rows].tolist()) == Counter(range(rows))


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    at, again = batches(20, 8, 3), batches(20, 8, 3)
    assert [again(step).tolist() for step in (9, 2, 5)] == [at(step).tolist() for step in (9, 2, 5)]
    epochs = np.concatenate([at(step) for step in range(5)]).reshape(2, 20)
    assert epochs[0].tolist() != epochs[1].tolist() != list(range(20))
    assert batches(20, 8, 4)(0).tolist() != at(0).tolist()


def test_rows_are_json_lines(tmp_path: Path) -> None:
    rows = [{"loss": 0.1 + 0.2, "b": 1.0}, {"loss": 2.0, "b": 3.0}]
    write_rows(tmp_path / "metrics.jsonl", rows)
    assert [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == rows
