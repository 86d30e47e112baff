"""The training loop: an interruption leaves no trace, the schedule is its equation, and batches."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    Row,
    Schedule,
    Session,
    StepLoss,
    batches,
    train,
    write_rows,
)

STEPS = 9
BUDGET = Budget(
    STEPS, Schedule(0.05, 0.01, 2, STEPS), gradient_clip=1.0, weight_decay=0.1, save_every=3
)


class InterruptionError(Exception):
    """As if the process had been killed."""


def make_policy() -> nn.Module:
    """Make a network with a buffer, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


@dataclass
class Regression:
    """A loss that depends on the step. first: added to the step. calls: the steps so far."""

    fail_at: int | None = None
    first: int = 0
    calls: list[int] = field(default_factory=list)

    def __call__(self, policy: nn.Module, step: int) -> StepLoss:
        self.calls.append(step)
        if step == self.fail_at:
            raise InterruptionError
        seed = self.first + step
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        value = (policy(x) - x[:, :2] ** 2).square().mean()
        return StepLoss(value, {"twice": 2 * value.item()}, 32)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        return {"states": np.arange(step)}


@dataclass(frozen=True)
class Training:
    """The result of a training."""

    rows: list[Row]
    moments: dict[str, Tensor]
    weights: dict[str, Tensor]


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Training:
    (tmp_path / "whole").mkdir()
    policy = make_policy()
    rows, moments = train(policy, Regression(), BUDGET, Session("whole", tmp_path / "whole"))
    return Training(rows, moments, policy.state_dict())


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_row_is_logged_as_it_is_made(tmp_path: Path) -> None:
    logged: list[tuple[int, float]] = []

    def log(row: Row, step: int) -> None:
        logged.append((step, row["loss"]))

    budget = replace(BUDGET, save_every=100, first=20)
    with pytest.raises(InterruptionError):
        train(make_policy(), Regression(fail_at=6), budget, Session("it001", tmp_path, log))
    assert [step for step, _ in logged] == list(range(20, 26))
    assert len({loss for _, loss in logged}) == 6


@pytest.mark.parametrize("fail_at", range(STEPS))
def test_an_interruption_leaves_no_trace(
    tmp_path: Path, uninterrupted: Training, fail_at: int
) -> None:
    session = Session("it001", tmp_path)
    with pytest.raises(InterruptionError):
        train(make_policy(), Regression(fail_at), BUDGET, session)
    policy = make_policy()
    loss = Regression()
    rows, moments = train(policy, loss, BUDGET, session)
    assert loss.calls == list(range(fail_at // 3 * 3, STEPS))  # from the last save
    assert rows == uninterrupted.rows
    assert are_equal(moments, uninterrupted.moments)
    assert are_equal(policy.state_dict(), uninterrupted.weights)


def test_rows_have_the_metrics_of_their_steps(uninterrupted: Training) -> None:
    rows = uninterrupted.rows
    assert len(rows) == STEPS
    assert all(row["twice"] == 2 * row["loss"] for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows)
    rates = [BUDGET.schedule.at(step) for step in range(STEPS)]
    assert [row["learning_rate"] for row in rows] == rates
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert uninterrupted.moments["0/step"] == STEPS


FIRST_HALF = replace(BUDGET, steps=4, save_every=100)
SECOND_HALF = replace(BUDGET, steps=5, save_every=100, first=4)


def test_two_iterations_are_one_long_one_if_the_moments_are_passed_on(
    tmp_path: Path, uninterrupted: Training
) -> None:
    policy = make_policy()
    session = Session("it001", tmp_path)
    first, moments = train(policy, Regression(), FIRST_HALF, session)
    second, moments = train(policy, Regression(first=4), SECOND_HALF, session, moments)
    assert first + second == uninterrupted.rows
    assert are_equal(moments, uninterrupted.moments)
    assert are_equal(policy.state_dict(), uninterrupted.weights)


def test_without_the_moments_the_second_iteration_differs(
    tmp_path: Path, uninterrupted: Training
) -> None:
    policy = make_policy()
    session = Session("it001", tmp_path)
    train(policy, Regression(), FIRST_HALF, session)
    train(policy, Regression(first=4), SECOND_HALF, session)
    assert not are_equal(policy.state_dict(), uninterrupted.weights)


class SumOfWeights:
    """A loss with gradient 40 for every weight."""

    def __call__(self, policy: nn.Linear, _: int) -> StepLoss:
        return StepLoss(40 * policy.weight.sum(), {}, 1)

    def arrays(self, _: int) -> dict[str, np.ndarray]:
        return {}


def test_a_step_is_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    policy = nn.Linear(1, 1, bias=False)
    nn.init.constant_(policy.weight, 2.0)
    budget = Budget(1, Schedule(0.1, 0.1, 0, 1), gradient_clip=0.5, weight_decay=0.3, save_every=10)
    (row,), moments = train(policy, SumOfWeights(), budget, Session("it001", tmp_path))
    assert row["gradient_norm"] == pytest.approx(40)  # before clipping
    assert moments["0/exp_avg"].item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    # Decay, then the first step of Adam: -lr sign(g).
    assert policy.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.3) - 0.1, rel=1e-5)


@dataclass
class BrokenAtStep5(Regression):
    """A loss that is changed at step 5. before: the policy's state before every step."""

    change: Callable[[Tensor], Tensor] = torch.clone
    before: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, policy: nn.Module, step: int) -> StepLoss:
        state = policy.state_dict()
        self.before.append({name: tensor.clone() for name, tensor in state.items()})
        result = super().__call__(policy, step)
        return replace(result, loss=self.change(result.loss)) if step == 5 else result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * math.nan, "loss is nan"),
        (lambda x: (x - x.detach()).sqrt(), "norm (inf|nan)"),
    ],
)
def test_a_step_that_is_not_finite_is_not_made_and_its_batch_is_kept(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """The loss itself, or the gradient of a finite loss (0); the next run resumes from a save."""
    policy = make_policy()
    loss = BrokenAtStep5(change=change)
    session = Session("optimize it007", tmp_path, dumps=tmp_path / "dumps")
    message = rf"optimize it007: the .*{message}.* at step 5; expected finite"
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(policy, loss, BUDGET, session)
    path = tmp_path / "dumps/optimize-it007-step00005.safetensors"
    assert str(path) in str(caught.value)
    tensors = safetensors.torch.load_file(path)
    assert tensors.pop("batch/states").tolist() == [0, 1, 2, 3, 4]
    # Not the statistics of batch norm, which the forward pass changes.
    trained = [name for name, _ in policy.named_parameters()]
    assert all(torch.equal(tensors[f"weights/{name}"], loss.before[-1][name]) for name in trained)
    resumed = Regression()
    train(make_policy(), resumed, BUDGET, session)
    assert resumed.calls == list(range(3, STEPS))


def test_the_schedule_at_points_computed_by_hand() -> None:
    schedule = Schedule(peak=1.0, final=0.2, warmup=4, total=12)
    assert [schedule.at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(4) == 1.0
    # A quarter of the way: cos(pi / 4).
    assert schedule.at(6) == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert schedule.at(8) == pytest.approx(0.6)
    assert schedule.at(12) == pytest.approx(0.2)
    assert schedule.at(50) == pytest.approx(0.2)
    assert Schedule(3.0, 1.0, 0, 1).at(0) == 3.0
    assert Schedule(3.0, 1.0, 2, 2).at(1) == 3.0


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_every_row_is_drawn_once_per_epoch_whatever_the_batch_size(
    rows: int, size: int, seed: int
) -> None:
    at = batches(rows, size, seed)
    drawn = [at(step) for step in range(3 * rows)]
    assert all(batch.shape == (size,) for batch in drawn)
    order = np.concatenate(drawn)
    for epoch in range(3 * size):
        epoch_rows = order[epoch * rows : (epoch + 1) * rows].tolist()
        assert Counter(epoch_rows) == Counter(range(rows))


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    at = batches(20, 8, 3)
    repeated = batches(20, 8, 3)
    for step in (9, 2, 5):
        assert repeated(step).tolist() == at(step).tolist()
    epochs = np.concatenate([at(step) for step in range(5)]).reshape(2, 20)
    assert epochs[0].tolist() != epochs[1].tolist() != list(range(20))
    assert batches(20, 8, 4)(0).tolist() != at(0).tolist()


def test_rows_are_json_lines(tmp_path: Path) -> None:
    rows = [{"loss": 0.1 + 0.2, "b": 1.0}, {"loss": 2.0, "b": 3.0}]
    path = tmp_path / "metrics.jsonl"
    write_rows(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
