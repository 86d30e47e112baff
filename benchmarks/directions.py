"""Several objectives on one recorded batch: where each would move the student, and what one step of equal length does.

`python -m benchmarks.directions it001`, after the stages `sample` and `label` of that iteration; with a `sample.group` of 2 or more,
GRPO is compared too.

All objectives are asked at the states at which the rollout decided, with student and teacher at the rollout's temperature; GRPO learns from those of
groups with enough of both outcomes, and `states` says how many these are. A direction is the mean gradient, divided by its length. Printed are

* how well two halves agree (cosine): how much of a direction is signal. A half is every second group, or a random half of the groups, whole, since an
  advantage is one over the others of its group: the mean over 1,000 such splits, and between which values 90 % of them lie;
* the cosine with the exact reverse KL's direction, over all the states, with an interval of 95 % by a bootstrap over groups;
* after a step of `--length` times the length of the weights along one half's direction, measured on the other half, in nats a token: the change of
  the reverse KL, of the forward KL, of the hard cross-entropy, and of the student's entropy; the mean of both ways round.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from stages.optimize import Labelled, _loss, _on_policy, _read, _token_batch
from vla_opd.learning.objectives import OBJECTIVES, ON_DECISIONS, entropy
from vla_opd.params.load import load
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import Policy, load_policy

ARMS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "reverse_kl_sampled": {"objective": "reverse_kl_sampled"},
    "reverse_kl_sampled, centred": {"objective": "reverse_kl_sampled", "centre": True},
    "reverse_kl_rollout": {"objective": "reverse_kl_rollout"},
    "forward_kl": {"objective": "forward_kl"},
    "jsd 0.5": {"objective": "jsd"},
    "hard_ce": {"objective": "hard_ce"},
    "grpo": {"objective": "mixed", "distill": 0.0},
}
CHUNK = 64  # states of one forward pass, where nothing is learnt
SPLITS = 1000
MEASURED = ("reverse_kl", "forward_kl", "hard_ce", "student_entropy")


@dataclass(frozen=True)
class Batch:
    """The recorded batch: what the stage `optimize` reads of it, the run's settings, and the rows of every group that decided something."""

    params: Params
    policy: Policy
    data: Labelled
    groups: list[np.ndarray]

    def of(self, arm: str) -> tuple[Params, Labelled]:
        """As an objective sees it."""
        temperature = self.params.sample.temperature
        opt = OptimizeParams.model_validate({"temperature": temperature, **ARMS[arm]})
        assert self.data.on_policy is not None
        decisions = self.data.on_policy.decisions
        data = replace(self.data, on_policy=None, mask=self.data.mask & decisions.decided[:, None])
        if opt.objective in ON_DECISIONS:
            data = replace(data, on_policy=_on_policy(data, decisions, opt, temperature))
        return self.params.model_copy(update={"optimize": opt}), data


@dataclass(frozen=True)
class Direction:
    """Of an objective: the gradient of its sum over each group's tokens, downhill [G, P], and how many states it is learnt from."""

    by_group: Tensor
    states: int

    def along(self, groups: Sequence[int]) -> Tensor:
        """Of the mean over some groups, of length 1."""
        whole = self.by_group[list(groups)].sum(0).double()
        return whole / whole.norm()


def main() -> None:
    """Print the table, and write the numbers as JSON if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("iteration")
    parser.add_argument(
        "--length", type=float, default=1e-4, help="of the step, in lengths of all weights together"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = _recorded(load("params.yaml"), arguments.iteration)
    rows = list(_compared(batch, arguments.length))
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(
        "| objective | states | halves agree | with reverse KL | reverse KL | forward KL | hard CE | entropy |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        moved = " | ".join("" if row[name] is None else f"{row[name]:+.4f}" for name in MEASURED)
        agreement, cosine = (
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[name]) for name in ("agreement", "cosine")
        )
        print(f"| {row['objective']} | {row['states']:,} | {agreement} | {cosine} | {moved} |")


def _recorded(params: Params, iteration: str) -> Batch:
    root = Path("artifacts") / params.run.name
    student = open_checkpoint(root / "checkpoints" / params.iterations[iteration])
    trajectories, logits = root / "trajectories" / iteration, root / "logits" / iteration
    opt = OptimizeParams(objective="reverse_kl_rollout", temperature=params.sample.temperature)
    data = _read(opt, trajectories, logits, student.facts.action_space)
    assert data.on_policy is not None
    of = data.on_policy.decisions.group
    return Batch(
        params,
        load_policy(student, "cpu"),
        data,
        [np.flatnonzero((of == group) & data.on_policy.there) for group in np.unique(of)],
    )


def _compared(batch: Batch, length: float) -> Iterator[dict[str, Any]]:
    halves = [list(range(half, len(batch.groups), 2)) for half in (0, 1)]
    before = [_measured(batch, batch.policy, half) for half in halves]
    size = length * parameters_to_vector(batch.policy.parameters()).detach().norm()
    exact = _direction(batch, "reverse_kl")
    for arm in ARMS:
        try:
            its = _direction(batch, arm)
        except ValueError as error:  # for GRPO nothing to prefer
            print(f"{arm}: {error}")
            continue
        yield {
            "objective": arm,
            "states": its.states,
            "agreement": _agreement(its),
            "cosine": _cosine(its, exact),
            **_stepped(batch, its, size, halves, before),
        }


def _stepped(
    batch: Batch,
    its: Direction,
    size: Tensor,
    halves: Sequence[list[int]],
    before: Sequence[dict[str, float]],
) -> dict[str, float | None]:
    """What a step along one half's direction changes on the other, both ways round; None if a half has no group to learn from."""
    if not all(its.by_group[half].any() for half in halves):
        return dict.fromkeys(MEASURED)
    moved = [_moved(batch.policy, (its.along(half) * size).float()) for half in halves]
    after = [_measured(batch, one, half) for one, half in zip(moved, reversed(halves), strict=True)]
    return {
        name: float(
            np.mean([a[name] - b[name] for a, b in zip(after, reversed(before), strict=True)])
        )
        for name in MEASURED
    }


def _direction(batch: Batch, arm: str) -> Direction:
    params, data = batch.of(arm)
    if len(data.usable) < CHUNK:
        raise ValueError(f"{len(data.usable)} states to learn from; expected at least {CHUNK}")
    found = [
        _summed(batch.policy, params, data, rows[np.isin(rows, data.usable)], seed)
        for seed, rows in enumerate(batch.groups)
    ]
    return Direction(-torch.stack(found), len(data.usable))


def _summed(policy: Policy, params: Params, data: Labelled, rows: np.ndarray, seed: int) -> Tensor:
    """The gradient of the sum of an objective over the tokens of some states, in one pass; zero of none."""
    policy.zero_grad()
    if len(rows):
        kept = np.zeros(len(data.mask), np.bool_)
        kept[rows] = True
        opt = params.optimize.model_copy(update={"batch_size": len(rows)})
        means = _loss(replace(data, kept=kept), params.model_copy(update={"optimize": opt}), seed)(
            policy, 0
        )
        (means.loss * means.tokens).backward()
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in policy.parameters()
        ]
    )


def _agreement(its: Direction) -> tuple[float, float, float]:
    """The cosine between the directions of two random halves of the groups: its mean over `SPLITS` of them, and the middle 90 %."""
    gram, count, random = (
        (its.by_group.double() @ its.by_group.double().T).numpy(),
        len(its.by_group),
        np.random.default_rng(0),
    )
    found = []
    for _ in range(SPLITS):
        one = np.zeros(count)
        one[random.permutation(count)[: count // 2]] = 1
        other = 1 - one
        if (
            lengths := (one @ gram @ one) * (other @ gram @ other)
        ) > 0:  # a half may have no group to learn from
            found.append(one @ gram @ other / lengths**0.5)
    return float(np.mean(found)), *(float(value) for value in np.quantile(found, [0.05, 0.95]))


def _cosine(its: Direction, exact: Direction) -> tuple[float, float, float]:
    """With the exact reverse KL's direction, and its interval of 95 %."""
    one, other = its.by_group.double(), exact.by_group.double()
    own, theirs, cross = ((a @ b.T).numpy() for a, b in ((one, one), (other, other), (one, other)))
    count = len(one)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), SPLITS)

    def cosine(w: np.ndarray) -> float:
        return float(w @ cross @ w / ((w @ own @ w) * (w @ theirs @ w)) ** 0.5)

    low, high = np.quantile(
        [cosine(w) for w in drawn if w @ own @ w > 0], [0.025, 0.975]
    )  # without a group to learn from there is no direction
    return cosine(np.ones(count)), float(low), float(high)


def _moved(policy: Policy, step: Tensor) -> Policy:
    moved = copy.deepcopy(policy)
    vector_to_parameters(
        parameters_to_vector(policy.parameters()).detach() + step, moved.parameters()
    )
    return moved


def _measured(batch: Batch, policy: Policy, half: Sequence[int]) -> dict[str, float]:
    """Distance to the teacher over the states of some groups."""
    (params, data), rows = (
        batch.of("reverse_kl"),
        np.concatenate([batch.groups[group] for group in half]),
    )
    sums, tokens = dict.fromkeys(MEASURED, 0.0), 0
    with torch.inference_mode():
        for some in np.array_split(rows, -(-len(rows) // CHUNK)):
            seen, mask = _token_batch(policy, data, some, params.optimize, 0)
            values = {name: OBJECTIVES[name](seen) for name in MEASURED[:-1]} | {
                "student_entropy": entropy(seen.student)
            }
            sums = {name: total + float(values[name][mask].sum()) for name, total in sums.items()}
            tokens += int(mask.sum())
    return {name: total / tokens for name, total in sums.items()}


if __name__ == "__main__":
    main()
