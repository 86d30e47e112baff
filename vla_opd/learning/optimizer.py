"""The optimiser's loop, shared by `finetune` and `optimize`: AdamW on a fixed budget of steps, saved and resumed bit by bit."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from vla_opd.artifacts.manifest import canonical
from vla_opd.learning import fsdp
from vla_opd.machine.tracking import Log

Row = dict[str, float]


@dataclass(frozen=True)
class Means:
    """What one step minimises, and what is kept of it: means over the `tokens` valid tokens of this process's states."""

    loss: Float[Tensor, ""]
    row: Row
    tokens: int


Loss = Callable[[Any, int], Means]  # of a policy, at a step


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine down to `final` at step `total`."""

    peak: float
    final: float
    warmup: int
    total: int

    def at(self, step: int) -> float:
        """lr(t) = peak (t + 1) / warmup while t < warmup; then final + (peak - final) (1 + cos(pi u)) / 2, u the done fraction of the rest."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.final + 0.5 * (self.peak - self.final) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Budget:
    """steps: optimiser steps to make; first: the number of the first on the schedule; save_every: steps between resumable saves."""

    steps: int
    schedule: Schedule
    gradient_clip: float
    weight_decay: float
    save_every: int
    first: int = 0

    @property
    def end(self) -> int:
        """The number of the step that would come next."""
        return self.first + self.steps


@dataclass(frozen=True)
class Evidence:
    """What is kept of a step whose loss or gradient is not finite: `batch(step)`, as a file in `folder`; of each process's states one."""

    folder: Path
    batch: Callable[[int], Mapping[str, np.ndarray]]


def train(
    policy: nn.Module,
    loss: Loss,
    budget: Budget,
    scratch: Path,
    moments: Mapping[str, Tensor] | None,
    label: str,
    log: Log = lambda _row, _step: None,
    evidence: Evidence | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Make `budget.steps` AdamW steps on `loss(policy, step)`, going on from the last save in `scratch` if there is one.

    moments: the optimiser's state to begin with, in the form that this function returns, or none.
    log:     gets every row as it is made, with the number of its step on the schedule.
    What asks for no gradient stays as it is. Returns one row of metrics a step, and the moments at the end: whole in the first process (`ranks`).
    FloatingPointError at the first loss or gradient that is not finite, before it reaches the weights; `evidence` is kept then.
    """
    optimizer = torch.optim.AdamW(
        [one for one in policy.parameters() if one.requires_grad],
        lr=budget.schedule.peak,
        weight_decay=budget.weight_decay,
    )
    if moments:
        _set_moments(optimizer, moments)
    rows = _resume(policy, optimizer, scratch)
    fsdp.require_agreement(len(rows), f"{label}: the step to go on from")
    quiet = fsdp.rank() > 0
    if rows and not quiet:
        print(f"{label}: going on from step {len(rows)}", file=sys.stderr)
    for step in tqdm(
        range(len(rows), budget.steps),
        label,
        budget.steps,
        initial=len(rows),
        unit="step",
        mininterval=5,
        disable=quiet,
    ):
        rate = optimizer.param_groups[0]["lr"] = budget.schedule.at(budget.first + step)
        found = loss(policy, step)
        optimizer.zero_grad()
        fsdp.weighted(found.loss, found.tokens).backward()
        norm = fsdp.entire(
            nn.utils.clip_grad_norm_(policy.parameters(), budget.gradient_clip)
        ).item()
        row = fsdp.mean({**found.row, "loss": found.loss.item()}, found.tokens)
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            kept = (
                ""
                if evidence is None
                else f". The batch, and the weights before it, are kept in {_keep(evidence, policy, step, label)}"
            )
            raise FloatingPointError(
                f"{label}: the loss is {row['loss']} and its gradient's norm {norm} at step {step}; "
                f"expected finite numbers (lower the learning rate?){kept}"
            )
        optimizer.step()
        rows.append({**row, "gradient_norm": norm, "learning_rate": rate})
        log(rows[-1], budget.first + step)
        if (step + 1) % budget.save_every == 0 and step + 1 < budget.steps:
            _save(policy, optimizer, rows, scratch)
    return rows, _moments(optimizer)


def _keep(evidence: Evidence, policy: nn.Module, step: int, label: str) -> Path:
    which = f"-rank{fsdp.rank()}" if fsdp.rank() else ""
    path = evidence.folder / f"{label.replace(' ', '-')}-step{step:05d}{which}.safetensors"
    tensors = {
        f"batch/{name}": torch.from_numpy(np.ascontiguousarray(array))
        for name, array in evidence.batch(step).items()
    }
    weights = {
        f"weights/{name}": fsdp.whole(value.detach()) for name, value in _changing(policy).items()
    }
    tensors |= {name: value.cpu().contiguous() for name, value in weights.items() if not which}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    fsdp.wait()  # the first to fail ends the others
    return path


def batches(rows: int, batch_size: int, seed: int) -> Callable[[int], Int[np.ndarray, " B"]]:
    """Step -> the rows of its batch: epochs of independent permutations, cut into batches across their borders. A pure function of its arguments."""

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
    return {
        f"{index}/{name}": fsdp.whole(torch.as_tensor(value))
        for index, moments in state.items()
        for name, value in moments.items()
    }


def _set_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = fsdp.cut(
            value, optimizer.param_groups[0]["params"][int(index)]
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _changing(policy: nn.Module) -> dict[str, Tensor]:
    """What of its state training changes, by name: all but frozen weights."""
    frozen = {name for name, one in policy.named_parameters() if not one.requires_grad}
    return {name: value for name, value in policy.state_dict().items() if name not in frozen}


def _save(
    policy: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], scratch: Path
) -> None:
    tensors = {f"weights/{name}": fsdp.whole(value) for name, value in _changing(policy).items()}
    tensors |= {f"moments/{name}": value for name, value in _moments(optimizer).items()}
    if fsdp.rank():
        return
    temporary = scratch / "training.tmp"
    safetensors.torch.save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        temporary,
        {"rows": canonical(rows)},
    )
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(scratch / "training.safetensors")


def _resume(policy: nn.Module, optimizer: torch.optim.Optimizer, scratch: Path) -> list[Row]:
    path = scratch / "training.safetensors"
    if not path.is_file():
        return []
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        rows = json.loads(file.metadata()["rows"])
    now = policy.state_dict()
    weights = {
        name.removeprefix("weights/"): value
        for name, value in tensors.items()
        if name.startswith("weights/")
    }
    policy.load_state_dict(
        now | {name: fsdp.cut(value, now[name]) for name, value in weights.items()}
    )
    _set_moments(
        optimizer,
        {
            name.removeprefix("moments/"): value
            for name, value in tensors.items()
            if name.startswith("moments/")
        },
    )
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, a line a step."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
