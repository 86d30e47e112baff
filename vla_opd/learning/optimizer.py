"""The training loop of all stages that train: AdamW on a fixed budget, resumed bit by bit."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
        completed = step - self.warmup
        remaining = self.total - self.warmup
        fraction = completed / max(1, remaining)
        angle = math.pi * min(1.0, fraction)
        span = self.peak - self.final
        return self.final + 0.5 * span * (1 + math.cos(angle))


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
    """Names, seeds, saves and logs one training.

    label:   for messages and the progress bar, e.g. `optimize it003`.
    scratch: folder of resumable saves.
    log:     receives every row of metrics, with the number of its step on the schedule.
    dumps:   folder for the batch and weights of a step that is not finite; None keeps nothing.
    seed:    of an adapter's first weights.
    """

    label: str
    scratch: Path
    log: Log = lambda _row, _step: None
    dumps: Path | None = None
    seed: int = 0


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
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
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
        completed = len(rows)
        if completed % budget.save_every == 0 and completed < budget.steps:
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
    weighted = fsdp.weighted(result.loss, result.tokens)
    weighted.backward()
    total_norm = nn.utils.clip_grad_norm_(policy.parameters(), budget.gradient_clip)
    norm = fsdp.gather(total_norm).item()
    metrics = {**result.row, "loss": result.loss.item()}
    row = fsdp.mean(metrics, result.tokens)
    mean_loss = row["loss"]
    if not math.isfinite(mean_loss) or not math.isfinite(norm):
        message = (
            f"{session.label}: the loss is {mean_loss} and its gradient's norm {norm} "
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
    rank = fsdp.rank()
    label = session.label.replace(" ", "-")
    stem = f"{label}-step{step:05d}"
    if rank:
        stem += f"-rank{rank}"
    path = session.dumps / f"{stem}.safetensors"

    tensors: dict[str, Tensor] = {}
    for name, array in loss.arrays(step).items():
        contiguous = np.ascontiguousarray(array)
        tensors[f"batch/{name}"] = torch.from_numpy(contiguous)
    for name, value in _trained(policy).items():
        weights = fsdp.gather_on_first(value.detach())  # every process takes part
        if not rank:
            on_host = weights.cpu()
            tensors[f"weights/{name}"] = on_host.contiguous()
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
        last = first + batch_size - 1
        first_epoch = first // rows
        last_epoch = last // rows
        permutations: list[np.ndarray] = []
        for epoch in range(first_epoch, last_epoch + 1):
            random = np.random.default_rng([seed, epoch])
            permutation = random.permutation(rows)
            permutations.append(permutation)
        order = np.concatenate(permutations)
        start = first - first_epoch * rows
        return order[start : start + batch_size]

    return at


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()
    moments: dict[str, Tensor] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            moment = torch.as_tensor(value)
            moments[f"{index}/{name}"] = fsdp.gather_on_first(moment)
    return moments


def _set_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    parameters = optimizer.param_groups[0]["params"]
    values: dict[int, dict[str, Tensor]] = {}
    for name, moment in moments.items():
        number, _, key = name.partition("/")
        index = int(number)
        values.setdefault(index, {})
        values[index][key] = fsdp.shard_as(moment, parameters[index])
    state = optimizer.state_dict()
    state["state"] = values
    optimizer.load_state_dict(state)


def _trained(policy: nn.Module) -> dict[str, Tensor]:
    """Return the policy's state without frozen weights, by name."""
    state = policy.state_dict()
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            del state[name]
    return state


def _save(
    policy: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], scratch: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, value in _trained(policy).items():
        tensors[f"weights/{name}"] = fsdp.gather_on_first(value)
    for name, value in _moments(optimizer).items():
        tensors[f"moments/{name}"] = value
    if fsdp.rank():
        return
    for name, tensor in tensors.items():
        on_host = tensor.detach().cpu()
        tensors[name] = on_host.contiguous()
    temporary = scratch / "training.tmp"
    metadata = {"rows": canonical_json(rows)}
    safetensors.torch.save_file(tensors, temporary, metadata)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(scratch / "training.safetensors")


def _resume(policy: nn.Module, optimizer: torch.optim.Optimizer, session: Session) -> list[Row]:
    """Load the last save into policy and optimizer. Returns the rows of the steps already made."""
    label = session.label
    rows = _load(policy, optimizer, session.scratch / "training.safetensors")
    step = len(rows)
    fsdp.require_agreement(step, f"{label}: the step to resume from")
    if step and not fsdp.rank():
        print(f"{label}: resuming from step {step}", file=sys.stderr)
    return rows


def _load(policy: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> list[Row]:
    if not path.is_file():
        return []
    moments: dict[str, Tensor] = {}
    state = policy.state_dict()
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        for key in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(key)
            group, _, name = key.partition("/")
            if group == "moments":
                moments[name] = tensor
            else:
                state[name] = fsdp.shard_as(tensor, state[name])
    policy.load_state_dict(state)
    _set_moments(optimizer, moments)
    return json.loads(metadata["rows"])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per line, a line per step."""
    lines: list[str] = []
    for row in rows:
        line = json.dumps(row, sort_keys=True)
        lines.append(f"{line}\n")
    path.write_text("".join(lines))
