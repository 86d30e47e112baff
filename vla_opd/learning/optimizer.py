"""The training loop of all stages that train: AdamW on a fixed budget, resumed bit by bit."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_opd.artifacts.manifest import canonical_json
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.learning import fsdp
from vla_opd.machine.tracking import Log
from vla_opd.policies.policy import Policy

Row = dict[str, float]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step and its metrics: means over this process's `tokens` valid tokens."""

    loss: Float[Tensor, ""]
    row: Row
    tokens: int


class Loss(Protocol):
    """A loss as a function of the policy and the step."""

    def __call__(self, policy: Policy, step: int, /) -> StepLoss:
        """Return the loss of this step's batch."""
        ...

    def arrays(self, step: int, /) -> Mapping[str, np.ndarray]:
        """Return this step's batch, by name: what is kept if its loss is not finite."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine to `final` at step `total`."""

    peak: float
    final: float
    warmup: int
    total: int

    def at(self, step: int) -> float:
        """Return the learning rate of a step.

        peak (t + 1) / warmup while t < warmup; then final + (peak - final) (1 + cos(pi u)) / 2,
        where u is the completed fraction of the remaining steps.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        fraction = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.final + 0.5 * (self.peak - self.final) * (1 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class Budget:
    """steps: optimizer steps to make. first: number of the first step on the schedule.

    save_every: steps between resumable saves.
    """

    steps: int
    schedule: Schedule
    gradient_clip: float
    weight_decay: float
    save_every: int
    first: int = 0

    @property
    def end(self) -> int:
        """The number of the step after the last."""
        return self.first + self.steps


@dataclass(frozen=True)
class Session:
    """Names, saves and logs one training.

    label:   for messages and the progress bar, e.g. `optimize it003`.
    scratch: folder of resumable saves.
    log:     receives every row of metrics, with the number of its step on the schedule.
    dumps:   folder for the batch and weights of a step that is not finite; None keeps nothing.
    """

    label: str
    scratch: Path
    log: Log = lambda _row, _step: None
    dumps: Path | None = None


def train(
    policy: Policy,
    loss: Loss,
    budget: Budget,
    session: Session,
    moments: Mapping[str, Tensor] | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Make `budget.steps` AdamW steps, resuming from the last save in `session.scratch`.

    moments: initial state of the optimizer, in the form that this function returns.
    Parameters with `requires_grad=False` are left unchanged. Returns one row of metrics per step,
    and the moments at the end (complete in the first process, see `fsdp`).
    FloatingPointError at the first loss or gradient that is not finite, before it reaches the
    weights.
    """
    optimizer = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=budget.schedule.peak,
        weight_decay=budget.weight_decay,
    )
    if moments:
        _set_moments(optimizer, moments)
    rows = _resume(policy, optimizer, session)
    for step in _progress(session, len(rows), budget.steps):
        row = _step(policy, loss, optimizer, budget, session, step)
        rows.append(row)
        session.log(row, budget.first + step)
        if (step + 1) % budget.save_every == 0 and step + 1 < budget.steps:
            _save(policy, optimizer, rows, session.scratch)
    return rows, _moments(optimizer)


def _progress(session: Session, first: int, steps: int) -> ProgressBar:
    return ProgressBar(
        range(first, steps),
        session.label,
        scratch=session.scratch,
        total=steps,
        initial=first,
        unit="step",
        disable=fsdp.rank() > 0,
    )


def _step(
    policy: Policy,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    budget: Budget,
    session: Session,
    step: int,
) -> Row:
    """Make one optimizer step. Returns its metrics."""
    rate = budget.schedule.at(budget.first + step)
    optimizer.param_groups[0]["lr"] = rate
    result = loss(policy, step)
    optimizer.zero_grad()
    fsdp.weighted(result.loss, result.tokens).backward()
    norm = fsdp.gather(nn.utils.clip_grad_norm_(policy.parameters(), budget.gradient_clip)).item()
    row = fsdp.mean({**result.row, "loss": result.loss.item()}, result.tokens)
    if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
        message = (
            f"{session.label}: the loss is {row['loss']} and its gradient's norm {norm} "
            f"at step {step}; expected finite numbers (lower the learning rate?)"
        )
        if session.dumps is not None:
            path = _dump(policy, loss, session, step)
            message += f". The batch, and the weights before it, are kept in {path}"
        raise FloatingPointError(message)
    optimizer.step()
    return {**row, "gradient_norm": norm, "learning_rate": rate}


def _dump(policy: nn.Module, loss: Loss, session: Session, step: int) -> Path:
    """Write this process's batch and, in the first process, the weights to `session.dumps`."""
    assert session.dumps is not None
    suffix = f"-rank{fsdp.rank()}" if fsdp.rank() else ""
    path = session.dumps / f"{session.label.replace(' ', '-')}-step{step:05d}{suffix}.safetensors"
    tensors = {
        f"batch/{name}": torch.from_numpy(np.ascontiguousarray(array))
        for name, array in loss.arrays(step).items()
    }
    for name, value in _trained(policy).items():
        weights = fsdp.gather_on_first(value.detach())  # every process takes part
        if not fsdp.rank():
            tensors[f"weights/{name}"] = weights.cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    fsdp.wait()  # the first process to fail ends the others
    return path


def batches(rows: int, batch_size: int, seed: int) -> Callable[[int], Int[np.ndarray, " B"]]:
    """Return a function from a step to the rows of its batch.

    Epochs of independent permutations, cut into batches across their borders. A pure function of
    its arguments.
    """

    def at(step: int) -> Int[np.ndarray, " B"]:
        first = step * batch_size
        epochs = range(first // rows, (first + batch_size - 1) // rows + 1)
        order = np.concatenate(
            [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in epochs]
        )
        return order[first - epochs[0] * rows :][:batch_size]

    return at


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    moments: dict[str, Tensor] = {}
    for index, values in state.items():
        for name, value in values.items():
            moments[f"{index}/{name}"] = fsdp.gather_on_first(torch.as_tensor(value))
    return moments


def _set_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    parameters = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = fsdp.shard_as(value, parameters[int(index)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _trained(policy: nn.Module) -> dict[str, Tensor]:
    """Return the policy's state without frozen weights, by name."""
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in policy.state_dict().items() if name not in frozen}


def _save(
    policy: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], scratch: Path
) -> None:
    tensors = {
        f"weights/{name}": fsdp.gather_on_first(value) for name, value in _trained(policy).items()
    }
    tensors |= {f"moments/{name}": value for name, value in _moments(optimizer).items()}
    if fsdp.rank():
        return
    temporary = scratch / "training.tmp"
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
        {"rows": canonical_json(rows)},
    )
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(scratch / "training.safetensors")


def _resume(policy: nn.Module, optimizer: torch.optim.Optimizer, session: Session) -> list[Row]:
    """Load the last save into policy and optimizer. Returns the rows of the steps already made."""
    rows = _load(policy, optimizer, session.scratch / "training.safetensors")
    fsdp.require_agreement(len(rows), f"{session.label}: the step to resume from")
    if rows and not fsdp.rank():
        print(f"{session.label}: resuming from step {len(rows)}", file=sys.stderr)
    return rows


def _load(policy: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> list[Row]:
    if not path.is_file():
        return []
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
    with safetensors.safe_open(path, "pt") as file:
        rows = json.loads(file.metadata()["rows"])
        for key in file.keys():  # noqa: SIM118 - not a mapping
            group, _, name = key.partition("/")
            groups[group][name] = file.get_tensor(key)
    state = policy.state_dict()
    for name, value in groups["weights"].items():
        state[name] = fsdp.shard_as(value, state[name])
    policy.load_state_dict(state)
    _set_moments(optimizer, groups["moments"])
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per line, a line per step."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
