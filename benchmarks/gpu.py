"""How well a device is used by an OpenVLA-OFT of seven and a half billion random weights: rollouts' decisions, labels and optimiser steps.

`python -m benchmarks.gpu --batch 16` (`--tiny` for a look at a CPU)

For a forward pass, as rollouts and labels make it, for an optimiser's step on an adapter, and for a pass of one row alone, as it is and as a captured
graph (`OPD_GRAPHS`): sequence tokens a second, model FLOPs utilisation (the
products of one forward and one backward pass, nothing counted twice for what is computed again), the share of the time in which the device waits for
pictures, and the peak of its memory beside what `opd plan --memory` says.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vla_opd.data.action_space import ActionSpace
from vla_opd.data.trajectory import Observations
from vla_opd.learning import memory_estimate
from vla_opd.learning.memory_estimate import Described, Need
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.stages import EnvironmentParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import CheckpointFacts
from vla_opd.policies.openvla_oft.files import TOKENIZER, read_tokenizer
from vla_opd.policies.openvla_oft.layout import QUESTION, Architecture, Tower
from vla_opd.policies.openvla_oft.model import LONGEST, PATCHES, SIZE, OpenVLAOFT, of_facts

DENSE = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}  # bfloat16 products a second, by their data sheets
SPACE = ActionSpace(q01=(-1.0,) * 7, q99=(1.0,) * 7, normalised=(True,) * 6 + (False,), chunk=8)
ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",), image_size=256, render="exact", wording="benchmark"
)
COLOURS = {"mean": (0.484, 0.455, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = {"dino": Tower(width=32, depth=2, heads=4), "siglip": Tower(width=48, depth=2, heads=4)}
Answer = Callable[[], Float[Tensor, "B K V"]]
SEQUENCE = PATCHES + LONGEST + SPACE.tokens + 1


@dataclass(frozen=True)
class Measured:
    """Seconds of a pass, whole and without its pictures, and the most memory in bytes."""

    whole: float
    device: float
    peak: int


def main() -> None:
    """Measure, and print a line for each kind of pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, batch {options.batch}, sequences of {SEQUENCE}, {dtype}"
    )
    with TemporaryDirectory() as folder:
        checkpoint = described(Path(folder), tiny=options.tiny, dtype=dtype)
        for name, line in lines(checkpoint, options.batch, options.repeats, device).items():
            print(f"  {name:<8} {line}")


def described(folder: Path, *, tiny: bool, dtype: torch.dtype) -> Described:
    """The policy, by its sizes, and in `folder` a tokenizer that knows no words."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))  # noqa: S106 - no password
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(folder / TOKENIZER))
    small = (
        {**SMALL, "hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "key_value_heads": 4}
        if tiny
        else {}
    )
    facts = CheckpointFacts(
        policy=Architecture.model_validate({**COLOURS, **small}),
        action_space=SPACE,
        environment=ENVIRONMENT,
        prompt=QUESTION,
    )
    return Described(facts, dtype, folder)


def lines(checkpoint: Described, batch: int, repeats: int, device: torch.device) -> dict[str, str]:
    """What is said of each kind of pass."""
    return _asked(checkpoint, batch, repeats, device) | _trained(checkpoint, batch, repeats, device)


def _asked(checkpoint: Described, batch: int, repeats: int, device: torch.device) -> dict[str, str]:
    policy, said = built(checkpoint, device), dict[str, str]()
    for name, rows in {
        "forward": batch,
        "alone": 1,
        **({"graphs": 1} if device.type == "cuda" else {}),
    }.items():
        if name == "graphs":
            policy.capture()
        its = measured(policy, _black(rows), _ask, repeats)
        said[name] = _line(
            its,
            checkpoint,
            rows,
            memory_estimate.inference(name, checkpoint, rows),
            products(checkpoint, rows),
        )
    return said


def _trained(
    checkpoint: Described, batch: int, repeats: int, device: torch.device
) -> dict[str, str]:
    gc.collect()  # a captured policy refers to itself
    settings = OptimizeParams(lora_rank=32, gradient_checkpointing=True, batch_size=batch)
    policy = built(checkpoint, device)
    lora.prepare(policy, settings.lora, 0, "optimize")
    optimizer = torch.optim.AdamW([one for one in policy.parameters() if one.requires_grad])
    with lora.recomputing(policy, wanted=True):
        step = measured(policy, _black(batch), lambda answer: _step(answer, optimizer), repeats)
    return {
        "step": _line(
            step,
            checkpoint,
            batch,
            memory_estimate.update("step", checkpoint, settings),
            products(checkpoint, batch, settings),
        )
    }


def _black(rows: int) -> Observations:
    return Observations(
        np.zeros((rows, 1, 256, 256, 3), np.uint8), np.zeros((rows, 8), np.float32), ("",) * rows
    )


def built(checkpoint: Described, device: torch.device) -> OpenVLAOFT:
    """Random weights, drawn on the device."""
    with device:
        policy = of_facts(checkpoint.facts).to(checkpoint.dtype).eval()
    policy.tokenizer = read_tokenizer(checkpoint.source)
    return policy


def measured(
    policy: OpenVLAOFT, seen: Observations, work: Callable[[Answer], None], repeats: int
) -> Measured:
    """`work` on observations, and on pixels that are on the device already; the first two times are not counted."""
    pixels = policy.pixels(seen.frames[:, 0])
    _seconds(lambda: work(lambda: policy.logits(seen)), 2)
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = _seconds(lambda: work(lambda: policy.logits(seen)), repeats)
    peak = torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else 0
    return Measured(
        whole,
        _seconds(lambda: work(lambda: policy.answers(pixels, seen.instructions)), repeats),
        peak,
    )


def products(checkpoint: Described, batch: int, settings: OptimizeParams | None = None) -> int:
    """Floating-point operations of a forward pass, and of a backward pass for what is trained; on torch's meta device, where nothing is computed."""
    with torch.device("meta"):
        policy = of_facts(checkpoint.facts).to(checkpoint.dtype).eval()
        if settings is not None:
            lora.prepare(policy, settings.lora, 0, "optimize")
        prompts, lengths = (
            torch.ones(batch, LONGEST, dtype=torch.long),
            torch.full((batch,), LONGEST),
        )
        pixels = torch.zeros(batch, 6, SIZE, SIZE, dtype=checkpoint.dtype)
    with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(settings is not None):
        logits = policy(pixels, prompts, lengths)
        if settings is not None:
            logits.log_softmax(-1).mean().backward()
    return counted.get_total_flops()


def _ask(answer: Answer) -> None:
    with torch.inference_mode():
        answer().argmax(-1).cpu()


def _step(answer: Answer, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    answer().log_softmax(-1)[..., 0].mean().neg().backward()
    optimizer.step()


def _seconds(work: Callable[[], None], repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def _line(its: Measured, checkpoint: Described, batch: int, planned: Need, operations: int) -> str:
    speed = next(
        (
            speed
            for name, speed in DENSE.items()
            if torch.cuda.is_available() and name in torch.cuda.get_device_name()
        ),
        None,
    )
    used = (
        "unknown"
        if speed is None or checkpoint.dtype != torch.bfloat16
        else f"{operations / its.whole / speed:.1%}"
    )
    peak = f"{its.peak / 1e9:.2f} GB" if its.peak else "not measured"
    waits = max(0.0, 1 - its.device / its.whole)
    fast = f"{batch * SEQUENCE / its.whole:,.0f} tokens/s, utilisation {used} ({operations / 1e12:.3f} TFLOP), waits {waits:.0%}"
    return f"{fast}, peak {peak}, planned {planned.total / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
