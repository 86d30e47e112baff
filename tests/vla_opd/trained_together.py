"""By torchrun, or alone: some steps of a public policy's adapter, in bfloat16 and recomputing. `CHECKPOINT OUT`: OUT gets what was learnt."""

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from vla_opd.learning import fsdp
from vla_opd.learning.optimizer import Budget, Means, Schedule, train, write_rows
from vla_opd.params.training import Lora
from vla_opd.policies import lora
from vla_opd.policies.openvla_oft.model import from_public
from vla_opd.policies.policy import Observations

STEPS, BATCH = 4, 4


def main(checkpoint: Path, out: Path) -> None:
    """Towards one bin everywhere, in states of which some have more valid tokens than others."""
    random = np.random.default_rng(0)
    pictures, proprio = (
        random.integers(0, 256, (BATCH, 1, 256, 256, 3), np.uint8),
        np.zeros((BATCH, 8), np.float32),
    )
    seen = Observations(pictures, proprio, ("place it in the bowl",) * BATCH)

    def loss(policy: torch.nn.Module, _step: int) -> Means:
        rows = fsdp.share(np.arange(BATCH))
        log_probs = policy.logits(seen.at(rows)).float().log_softmax(-1)
        mask = torch.from_numpy(np.arange(log_probs.shape[1]) < 8 * (rows[:, None] + 1))
        return Means(-log_probs[..., 7][mask].mean(), {"first": rows[0].item()}, int(mask.sum()))

    budget = Budget(STEPS, Schedule(1e-3, 1e-3, 0, STEPS), 1.0, 0.0, save_every=3)
    with fsdp.together("cpu"):
        policy = from_public(checkpoint, dtype=torch.bfloat16)
        lora.prepare(policy, Lora(rank=4, alpha=8), 1, "optimize")
        with fsdp.sharded(policy) as shared, lora.recomputing(shared, wanted=True):
            rows, moments = train(shared, loss, budget, out, None, "together")
        if fsdp.rank() == 0:
            write_rows(out / "rows.jsonl", rows)
            learnt = {
                name: one.detach() for name, one in policy.named_parameters() if one.requires_grad
            }
            safetensors.torch.save_file(
                {name: one.contiguous() for name, one in {**learnt, **moments}.items()},
                out / "learnt.safetensors",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
