"""The benchmark of a GPU: here only that it runs and counts operations right."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from vla_opd.params.objective import OptimizeParams


def test_every_kind_of_pass_is_measured(tmp_path: Path) -> None:
    checkpoint = gpu.describe(tmp_path, tiny=True, dtype=torch.float32)
    lines = dict(gpu.measure_passes(checkpoint, 1, 1, torch.device("cpu")))
    assert list(lines) == ["forward", "alone", "step"]
    for line in lines.values():
        assert "tokens/s, utilization unknown" in line
        assert "peak not measured, planned 0.0" in line


def test_operations_are_two_per_weight_and_token(tmp_path: Path) -> None:
    """Forward, with 7.5 B weights: the towers' meet patches, the language model's all tokens.

    Backward, with frozen weights, as many again.
    """
    checkpoint = gpu.describe(tmp_path, tiny=False, dtype=torch.bfloat16)
    with torch.device("meta"):
        policy = gpu.of_facts(checkpoint.facts)

    def weights(module: torch.nn.Module) -> int:
        layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
        return sum(layer.weight.numel() for layer in layers)

    towers = weights(policy.dino) + weights(policy.siglip) + weights(policy.projector)
    products = towers * gpu.PATCHES
    products += weights(policy.language_model) * gpu.SEQUENCE
    products += weights(policy.head) * 56
    forward = gpu.count_operations(checkpoint, 1)
    # Attention and the first convolution are not counted here.
    assert forward == pytest.approx(2 * products, rel=0.03)
    step = gpu.count_operations(checkpoint, 1, OptimizeParams(lora_rank=32))
    assert step == pytest.approx(2 * forward, rel=0.1)
