"""Benchmarks that need machines which a test hasn't: that they run, and count right."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from vla_opd.params.objective import OptimizeParams


def test_what_a_device_does_is_counted_and_said(tmp_path: Path) -> None:
    checkpoint = gpu.described(tmp_path, tiny=True, dtype=torch.float32)
    said = gpu.lines(checkpoint, 1, 1, torch.device("cpu"))
    assert list(said) == ["forward", "alone", "step"]
    assert all(
        "tokens/s, utilisation unknown" in line and "peak not measured, planned 0.0" in line
        for line in said.values()
    )


def test_products_are_two_for_each_weight_and_token(tmp_path: Path) -> None:
    """Of seven billion, forward: the towers' weights meet patches, the language model's everything. Backward, with frozen weights, as many again."""
    checkpoint = gpu.described(tmp_path, tiny=False, dtype=torch.bfloat16)
    with torch.device("meta"):
        policy = gpu.of_facts(checkpoint.facts)

    def weights(module: torch.nn.Module) -> int:
        return sum(
            one.weight.numel() for one in module.modules() if isinstance(one, torch.nn.Linear)
        )

    towers = weights(policy.dino) + weights(policy.siglip) + weights(policy.projector)
    expected = 2 * (
        towers * gpu.PATCHES
        + weights(policy.language_model) * gpu.SEQUENCE
        + weights(policy.head) * 56
    )
    forward = gpu.products(checkpoint, 1)
    assert forward == pytest.approx(
        expected, rel=0.03
    )  # and attention, and the pictures' first convolution
    assert gpu.products(checkpoint, 1, OptimizeParams(lora_rank=32)) == pytest.approx(
        2 * forward, rel=0.1
    )
