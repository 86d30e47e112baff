"""Train a public policy's adapter for a few steps, by torchrun or alone: `CHECKPOINT OUT`.

In bfloat16, with activations recomputed. OUT gets the metrics, the adapter and its moments.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from vla_opd.data.trajectory import Observations
from vla_opd.learning import fsdp
from vla_opd.learning.optimizer import Budget, Schedule, Session, StepLoss, train, write_rows
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.model import from_public

STEPS = 4
BATCH = 4


class OneBinLoss:
    """-log p of one bin, at states of which some have more valid tokens than others."""

    def __init__(self) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (BATCH, 1, 256, 256, 3), np.uint8)
        proprio = np.zeros((BATCH, 8), np.float32)
        self._observations = Observations(frames, proprio, ("place it in the bowl",) * BATCH)

    def __call__(self, policy: Any, step: int) -> StepLoss:
        rows = fsdp.share(np.arange(BATCH))
        log_probs = policy.logits(self._observations.at(rows)).float().log_softmax(-1)
        mask = torch.from_numpy(np.arange(log_probs.shape[1]) < 8 * (rows[:, None] + 1))
        loss = -log_probs[..., 7][mask].mean()
        return StepLoss(loss, {"first": rows[0].item()}, int(mask.sum()))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        return {}


def main(checkpoint: Path, out: Path) -> None:
    budget = Budget(STEPS, Schedule(1e-3, 1e-3, 0, STEPS), 1.0, 0.0, save_every=3)
    with fsdp.together("cpu"):
        policy = from_public(checkpoint, dtype=torch.bfloat16)
        lora.prepare(policy, Lora(rank=4, alpha=8), 1, "optimize")
        with fsdp.sharded(policy) as shared, lora.recomputing(shared, enabled=True):
            rows, moments = train(shared, OneBinLoss(), budget, Session("together", out))
        if fsdp.rank() == 0:
            write_rows(out / "rows.jsonl", rows)
            tensors = dict(moments)
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    tensors[name] = parameter.detach()
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, out / "trained.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
