"""Objectives compared on one recorded batch: their gradients, and one step of equal length.

`python -m benchmarks.directions it001`, after the stages `sample` and `label` of that iteration;
with a `sample.group` of 2 or more, GRPO is compared too.

All objectives see the states at which the rollout decided, with student and teacher at the
rollout's temperature. GRPO learns from those of groups with enough of both outcomes; the column
`states` has their number. A direction is the mean gradient, divided by its length. The columns:

* halves agree: the cosine between two halves of the batch, i.e. how much of a direction is signal.
  A half is a random half of the groups (an advantage is relative to the other episodes of its
  group): the mean of 1,000 such splits, and the range of the middle 90 %.
* with reverse KL: the cosine with the direction of the exact reverse KL over all the states, with
  a 95 % bootstrap interval over groups.
* reverse KL, forward KL, hard CE, entropy: their changes, in nats per token, after a step along the
  direction of one half (every second group), measured on the other half; the mean of both ways.
  The step's length is `--length` times that of the weights.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from vla_opd.artifacts.layout import Layout
from vla_opd.data.trajectory import split_batches
from vla_opd.learning import distillation
from vla_opd.learning.distillation import DistillationBatch, DistillationLoss
from vla_opd.learning.objectives import OBJECTIVES, ON_DECISIONS, entropy
from vla_opd.params.load import load
from vla_opd.params.objective import OptimizeParams, RolloutParams
from vla_opd.params.run import Params
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.policy import Policy

ARMS: dict[str, dict[str, Any]] = {
    "reverse_kl": {"name": "reverse_kl"},
    "reverse_kl_sampled": {"name": "reverse_kl_sampled"},
    "reverse_kl_sampled, centred": {"name": "reverse_kl_sampled", "centre": True},
    "reverse_kl_rollout": {"name": "reverse_kl_rollout"},
    "forward_kl": {"name": "forward_kl"},
    "jsd 0.5": {"name": "jsd", "beta": 0.5},
    "hard_ce": {"name": "hard_ce"},
    "grpo": {"name": "mixed", "distill": 0.0},
}
CHUNK = 64  # states of one forward pass without gradients
SPLITS = 1000
MEASURED = ("reverse_kl", "forward_kl", "hard_ce", "student_entropy")
COLUMNS = (
    "objective",
    "states",
    "halves agree",
    "with reverse KL",
    "reverse KL",
    "forward KL",
    "hard CE",
    "entropy",
)


@dataclass(frozen=True)
class RecordedBatch:
    """A recorded batch as the stage `optimize` reads it, and the rows of every group in it.

    groups: only states at which the rollout decided.
    """

    policy: Policy
    data: DistillationBatch
    groups: list[np.ndarray]
    temperature: float

    def select_objective(self, arm: str) -> tuple[OptimizeParams, DistillationBatch]:
        """Return an objective's settings, and the batch as it sees it."""
        settings = OptimizeParams.model_validate(
            {"temperature": self.temperature, "objective": ARMS[arm]}
        )
        assert self.data.decisions is not None
        decisions = self.data.decisions.decisions
        mask = self.data.mask & decisions.decided[:, None]
        data = replace(self.data, decisions=None, mask=mask)
        if settings.objective.name in ON_DECISIONS:
            data = distillation.with_decisions(data, decisions, settings, self.temperature)
        return settings, data


@dataclass(frozen=True)
class Direction:
    """An objective's descent direction.

    by_group: the negative gradient of its sum over each group's tokens, [G, P].
    states:   how many states it is learned from.
    """

    by_group: Tensor
    states: int

    def average(self, groups: Sequence[int]) -> Tensor:
        """Return the mean over some groups, scaled to length 1."""
        selected = self.by_group[list(groups)]
        total = selected.sum(0).double()
        return total / total.norm()


@dataclass(frozen=True)
class Reference:
    """What every objective is compared with.

    halves: the groups of either half. before: `MEASURED` on either half, before a step.
    exact:  the direction of the exact reverse KL. length: of a step.
    """

    halves: tuple[list[int], list[int]]
    before: tuple[dict[str, float], dict[str, float]]
    exact: Direction
    length: Tensor


def main() -> None:
    """Print the table, and write the numbers as JSON if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("iteration")
    parser.add_argument(
        "--length", type=float, default=1e-4, help="length of the step, relative to all weights'"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = read_recorded_batch(load("params.yaml"), arguments.iteration)
    rows = list(compare_objectives(batch, arguments.length))
    if arguments.json:
        with arguments.json.open("w") as stream:
            for row in rows:
                print(json.dumps(row), file=stream)
    header = " | ".join(COLUMNS)
    print(f"| {header} |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print(format_row(row))


def format_row(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    states = row["states"]
    cells = [row["objective"], f"{states:,}"]
    for name in ("agreement", "cosine"):
        value, low, high = row[name]
        cells.append(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
    for name in MEASURED:
        change = row[name]
        cell = "" if change is None else f"{change:+.4f}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


def read_recorded_batch(params: Params, iteration: str) -> RecordedBatch:
    """Read the states and labels of an iteration, and the student that sampled them."""
    layout = Layout.of_run(params.run.name)
    student = open_checkpoint(layout.checkpoint(params.iterations[iteration]))
    temperature = params.sample.temperature
    rollout = RolloutParams(name="reverse_kl_rollout")
    settings = OptimizeParams(objective=rollout, temperature=temperature)
    data = distillation.read_batch(
        layout.trajectories(iteration),
        layout.labels(iteration),
        student.facts.action_space,
        settings,
    )
    assert data.decisions is not None
    usable = data.decisions.usable
    group_of = data.decisions.decisions.group
    groups: list[np.ndarray] = []
    for group in np.unique(group_of):
        members = group_of == group
        groups.append(np.flatnonzero(members & usable))
    policy = load_policy(student, "cpu")
    return RecordedBatch(policy, data, groups, temperature)


def compare_objectives(batch: RecordedBatch, length: float) -> Iterator[dict[str, Any]]:
    """Yield a row per objective that has enough states to learn from."""
    groups = list(range(len(batch.groups)))
    even = groups[::2]
    odd = groups[1::2]
    weights = parameters_to_vector(batch.policy.parameters()).detach()
    reference = Reference(
        halves=(even, odd),
        before=(
            measure(batch, batch.policy, even),
            measure(batch, batch.policy, odd),
        ),
        exact=compute_direction(batch, "reverse_kl"),
        length=length * weights.norm(),
    )
    for arm in ARMS:
        try:
            direction = compute_direction(batch, arm)
        except ValueError as error:  # for GRPO, no group with both outcomes
            print(f"{arm}: {error}")
            continue
        yield {
            "objective": arm,
            "states": direction.states,
            "agreement": agreement_of_halves(direction),
            "cosine": cosine_with_exact(direction, reference.exact),
            **changes_by_step(batch, direction, reference),
        }


def changes_by_step(
    batch: RecordedBatch, direction: Direction, reference: Reference
) -> dict[str, float | None]:
    """Return how a step along one half's direction changes `MEASURED` on the other half.

    The mean of both ways; None if a half has no group to learn from.
    """
    if not all(direction.by_group[half].any() for half in reference.halves):
        return dict.fromkeys(MEASURED)
    changes: dict[str, list[float]] = {name: [] for name in MEASURED}
    for trained, tested in ((0, 1), (1, 0)):
        unit = direction.average(reference.halves[trained])
        step = unit * reference.length
        policy = move_weights(batch.policy, step)
        before = reference.before[tested]
        after = measure(batch, policy, reference.halves[tested])
        for name in MEASURED:
            change = after[name] - before[name]
            changes[name].append(change)
    return {name: fmean(values) for name, values in changes.items()}


def compute_direction(batch: RecordedBatch, arm: str) -> Direction:
    """Compute an objective's direction. ValueError if it has too few states to learn from."""
    settings, data = batch.select_objective(arm)
    usable = data.usable
    if len(usable) < CHUNK:
        raise ValueError(f"{len(usable)} states to learn from; expected at least {CHUNK}")
    gradients: list[Tensor] = []
    for seed, group in enumerate(batch.groups):
        rows = np.intersect1d(group, usable)
        gradient = sum_gradient(batch.policy, settings, data, rows, seed)
        gradients.append(gradient)
    return Direction(-torch.stack(gradients), len(usable))


def sum_gradient(
    policy: Policy, settings: OptimizeParams, data: DistillationBatch, rows: np.ndarray, seed: int
) -> Tensor:
    """Return the gradient of an objective's sum over the tokens of some states; zero of none."""
    policy.zero_grad()
    if len(rows):
        selected = np.zeros(len(data.mask), np.bool_)
        selected[rows] = True
        single_batch = settings.model_copy(update={"batch_size": len(rows)})
        selection = replace(data, selected=selected)
        loss = DistillationLoss(selection, single_batch, seed)
        means = loss(policy, 0)
        total = means.loss * means.tokens
        total.backward()
    gradients: list[Tensor] = []
    for parameter in policy.parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients.append(gradient.flatten())
    return torch.cat(gradients)


def agreement_of_halves(direction: Direction) -> tuple[float, float, float]:
    """Return the cosine between two random halves of the groups: mean, 5 % and 95 % quantiles."""
    gram = inner_products(direction, direction)
    count = len(gram)
    random = np.random.default_rng(0)
    cosines: list[float] = []
    for _ in range(SPLITS):
        order = random.permutation(count)
        half = order[: count // 2]
        first = np.zeros(count)
        first[half] = 1
        second = 1 - first
        first_squared = first @ gram @ first
        second_squared = second @ gram @ second
        lengths = first_squared * second_squared
        if lengths > 0:  # zero if a half has no group to learn from
            product = first @ gram @ second
            cosine = product / lengths**0.5
            cosines.append(float(cosine))
    low, high = np.quantile(cosines, [0.05, 0.95])
    return fmean(cosines), float(low), float(high)


def inner_products(first: Direction, second: Direction) -> np.ndarray:
    """Return the inner products of two directions' gradients, group by group, [G, G]."""
    products = first.by_group.double() @ second.by_group.double().T
    return products.numpy()


def cosine_with_exact(direction: Direction, exact: Direction) -> tuple[float, float, float]:
    """Return the cosine with the exact reverse KL's direction, and its 95 % interval."""
    gram = inner_products(direction, direction)
    exact_gram = inner_products(exact, exact)
    cross = inner_products(direction, exact)
    count = len(gram)
    probabilities = np.full(count, 1 / count)
    random = np.random.default_rng(0)
    resamples = random.multinomial(count, probabilities, SPLITS)

    def cosine(counts: np.ndarray) -> float:
        squared = counts @ gram @ counts
        exact_squared = counts @ exact_gram @ counts
        product = counts @ cross @ counts
        return float(product / (squared * exact_squared) ** 0.5)

    # A resample without a group to learn from has no direction.
    cosines = [cosine(counts) for counts in resamples if counts @ gram @ counts > 0]
    low, high = np.quantile(cosines, [0.025, 0.975])
    value = cosine(np.ones(count))
    return value, float(low), float(high)


def move_weights(policy: Policy, step: Tensor) -> Policy:
    """Return a copy of the policy, moved by a step in the space of all weights."""
    moved = copy.deepcopy(policy)
    weights = parameters_to_vector(policy.parameters()).detach()
    vector_to_parameters(weights + step.float(), moved.parameters())
    return moved


def measure(batch: RecordedBatch, policy: Policy, groups: Sequence[int]) -> dict[str, float]:
    """Return `MEASURED` over the states of some groups, in nats per token."""
    settings, data = batch.select_objective("reverse_kl")
    rows = np.concatenate([batch.groups[group] for group in groups])
    sums: dict[str, float] = dict.fromkeys(MEASURED, 0.0)
    count = 0
    with torch.inference_mode():
        for part in split_batches(rows, CHUNK):
            tokens, mask = distillation.token_batch(policy, data, part, settings, 0)
            values = {"student_entropy": entropy(tokens.student)}
            for name in ("reverse_kl", "forward_kl", "hard_ce"):
                values[name] = OBJECTIVES[name](tokens)
            for name, value in values.items():
                total = value[mask].sum()
                sums[name] += total.item()
            count += int(mask.sum())
    return {name: total / count for name, total in sums.items()}


if __name__ == "__main__":
    main()
