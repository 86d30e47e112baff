"""Several objectives on one recorded batch: where each would move the student, and what one step of equal length does.

`python -m benchmarks.directions it001`, after the stages `sample` and `label` of that iteration; with a `sample.group` of 2 or more,
GRPO is compared too.

All objectives see the same states: those at which the rollout decided, with student and teacher at the rollout's temperature. The states are cut in
two halves, episode by episode. A direction is the mean gradient over a half, divided by its length. Printed are

* how well the two halves agree (cosine): how much of a direction is signal. For objectives that draw, each half has draws of its own;
* the cosine with the exact reverse KL's direction, over all the states;
* after a step of `--length` times the length of the weights along the first half's direction, measured on the second half, in nats a token: the
  change of the reverse KL, of the forward KL, and of the student's entropy.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from stages.optimize import Labelled, _loss, _on_policy, _read, _token_batch
from vla_opd.checkpoint import open_checkpoint
from vla_opd.diagnostics import distance
from vla_opd.objectives import ON_DECISIONS
from vla_opd.params import OptimizeParams, Params, load
from vla_opd.policies import Policy, load_policy

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
CHUNK = 64  # states of one forward pass


@dataclass(frozen=True)
class Batch:
    """The recorded batch: what the stage `optimize` reads of it, and the run's settings."""

    params: Params
    policy: Policy
    data: Labelled

    def of(self, arm: str, rows: np.ndarray) -> tuple[Params, Labelled]:
        """As an objective sees some of the states: only in those do tokens count."""
        temperature = self.params.sample.temperature
        opt = OptimizeParams.model_validate({"temperature": temperature, "batch_size": CHUNK, **ARMS[arm]})
        mask = np.zeros_like(self.data.mask)
        mask[rows] = self.data.mask[rows]
        data = replace(self.data, mask=mask, on_policy=None)
        assert self.data.on_policy is not None
        if opt.objective in ON_DECISIONS:
            data = replace(data, on_policy=_on_policy(data, self.data.on_policy.decisions, opt, temperature))
        return self.params.model_copy(update={"optimize": opt}), data


def main() -> None:
    """Print the table, and write the numbers as JSON if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("iteration")
    parser.add_argument("--length", type=float, default=1e-4, help="of the step, in lengths of all weights together")
    parser.add_argument("--states", type=int, default=1024, help="at most so many decisions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = _recorded(load("params.yaml"), arguments.iteration)
    rows = list(_compared(batch, _halves(batch, arguments.states), arguments.length))
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("| objective | halves agree | with reverse KL | reverse KL | forward KL | entropy |\n|---|---|---|---|---|---|")
    for row in rows:
        moved = " | ".join(f"{row[name]:+.4f}" for name in ("reverse_kl", "forward_kl", "student_entropy"))
        print(f"| {row['objective']} | {row['agreement']:.3f} | {row['cosine']:+.3f} | {moved} |")


def _recorded(params: Params, iteration: str) -> Batch:
    root = Path("artifacts") / params.run.name
    student = open_checkpoint(root / "checkpoints" / params.iterations[iteration])
    trajectories, logits = root / "trajectories" / iteration, root / "logits" / iteration
    opt = OptimizeParams(objective="reverse_kl_rollout", temperature=params.sample.temperature)
    return Batch(params, load_policy(student, "cpu"), _read(opt, trajectories, logits, student.facts.action_space))


def _halves(batch: Batch, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Decisions of every second episode, and of the others: at most so many, drawn from all."""
    assert batch.data.on_policy is not None
    decisions = batch.data.on_policy.decisions
    usable, random = decisions.decided & batch.data.mask.any(1), np.random.default_rng(0)
    one, other = (random.permutation(np.flatnonzero(usable & (decisions.episode % 2 == half)))[: most // 2] for half in (0, 1))
    return np.sort(one), np.sort(other)


def _compared(batch: Batch, halves: tuple[np.ndarray, np.ndarray], length: float) -> Iterator[dict[str, Any]]:
    before = _measured(batch, batch.policy, halves[1])
    size = length * parameters_to_vector(batch.policy.parameters()).detach().norm()
    exact = None
    for arm in ARMS:
        try:
            first, second = (_direction(batch, arm, half, seed) for seed, half in enumerate(halves))
        except ValueError as error:  # for GRPO nothing to prefer
            print(f"{arm}: {error}")
            continue
        whole = _unit(first + second)
        exact = whole if exact is None else exact
        after = _measured(batch, _moved(batch.policy, (first * size).float()), halves[1])
        yield {
            "objective": arm,
            "agreement": float(first @ second),
            "cosine": float(whole @ exact),
            **{name: after[name] - value for name, value in before.items()},
        }


def _direction(batch: Batch, arm: str, rows: np.ndarray, seed: int) -> Tensor:
    """The downhill direction of an objective's mean over some states, of length 1."""
    params, data = batch.of(arm, rows)
    loss, usable = _loss(data, params, seed), len(data.usable)
    if usable < CHUNK:
        raise ValueError(f"{usable} states to learn from; expected at least {CHUNK}")
    batch.policy.zero_grad()
    for step in range(usable // CHUNK):
        loss(batch.policy, step).loss.backward()
    return _unit(-torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in batch.policy.parameters()]))


def _unit(direction: Tensor) -> Tensor:
    return direction.double() / direction.double().norm()


def _moved(policy: Policy, step: Tensor) -> Policy:
    moved = copy.deepcopy(policy)
    vector_to_parameters(parameters_to_vector(policy.parameters()).detach() + step, moved.parameters())
    return moved


def _measured(batch: Batch, policy: Policy, rows: np.ndarray) -> dict[str, float]:
    """Distance to the teacher over some states."""
    params, data = batch.of("reverse_kl", rows)
    with torch.inference_mode():
        parts = [
            distance(*_token_batch(policy, data, some, params.optimize, 0), policy.chunk) for some in np.array_split(rows, -(-len(rows) // CHUNK))
        ]
    return {name: float(np.mean([getattr(part, name) for part in parts])) for name in ("reverse_kl", "forward_kl", "student_entropy")}


if __name__ == "__main__":
    main()
