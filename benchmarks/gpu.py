"""How well a GPU is used by an OpenVLA-OFT of 7.5 B random weights: rollouts, labels, updates.

`python -m benchmarks.gpu --batch 16` (`--tiny` to try it on a CPU)

Passes: `forward` as in rollouts and labels; `alone`, of one row; `graphs`, the same as a captured
CUDA graph (`OPD_GRAPHS`); `step`, an optimizer's step on an adapter. Columns: sequence tokens per
second; model FLOPs utilization (one forward and one backward pass; recomputed activations count
once); the share of time in which the device waits for image preprocessing; the peak of its memory,
and what `opd plan --memory` expects.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
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
from vla_opd.policies.openvla_oft.model import LONGEST, OpenVLAOFT, of_facts
from vla_opd.policies.openvla_oft.towers import PATCHES, SIZE

# Dense bfloat16 operations per second, from the data sheets.
DENSE = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SPACE = ActionSpace(q01=(-1.0,) * 7, q99=(1.0,) * 7, normalised=(True,) * 6 + (False,), chunk=8)
ENVIRONMENT = EnvironmentParams(
    tasks=("libero_object/0",), image_size=256, render="exact", wording="benchmark"
)
COLOURS = {"mean": (0.484, 0.455, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = {
    "dino": Tower(width=32, depth=2, heads=4),
    "siglip": Tower(width=48, depth=2, heads=4),
    "hidden": 64,
    "intermediate": 128,
    "layers": 2,
    "heads": 4,
    "key_value_heads": 4,
}
SEQUENCE = PATCHES + LONGEST + SPACE.tokens + 1
Forward = Callable[[], Float[Tensor, "B K V"]]


@dataclass(frozen=True)
class Timing:
    """Seconds of a pass, in total and without image preprocessing, and its peak memory in bytes.

    peak: 0 on a CPU.
    """

    total: float
    device: float
    peak: int


def main() -> None:
    """Measure, and print a line per kind of pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu")
    dtype = torch.float32
    name = "CPU"
    if torch.cuda.is_available():
        device = torch.device("cuda")
        dtype = torch.bfloat16
        name = torch.cuda.get_device_name()
    print(f"{name}, batch {options.batch}, sequences of {SEQUENCE}, {dtype}")
    with TemporaryDirectory() as folder:
        checkpoint = describe(Path(folder), tiny=options.tiny, dtype=dtype)
        for kind, line in measure_passes(checkpoint, options.batch, options.repeats, device):
            print(f"  {kind:<8} {line}")


def describe(folder: Path, *, tiny: bool, dtype: torch.dtype) -> Described:
    """Describe a policy by its sizes, and write to `folder` a tokenizer that knows no words."""
    vocabulary = {"<unk>": 0, "<s>": 1}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no password
    words.post_processor = TemplateProcessing(
        single="<s> $A",
        special_tokens=[("<s>", 1)],
    )
    words.save(str(folder / TOKENIZER))
    sizes = SMALL if tiny else {}
    facts = CheckpointFacts(
        policy=Architecture.model_validate({**COLOURS, **sizes}),
        action_space=SPACE,
        environment=ENVIRONMENT,
        prompt=QUESTION,
    )
    return Described(facts, dtype, folder)


def measure_passes(
    checkpoint: Described, batch: int, repeats: int, device: torch.device
) -> Iterator[tuple[str, str]]:
    """Yield the name of each kind of pass, and a line about it."""
    policy = build(checkpoint, device)
    passes = {"forward": batch, "alone": 1}
    if device.type == "cuda":
        passes["graphs"] = 1
    for name, rows in passes.items():
        if name == "graphs":
            policy.capture()
        frames = _black_frames(rows)
        timing = measure(policy, frames, _infer, repeats)
        planned = memory_estimate.inference(name, checkpoint, rows)
        operations = count_operations(checkpoint, rows)
        yield name, _format_line(timing, checkpoint, rows, planned, operations)
    del policy
    yield "step", _measure_step(checkpoint, batch, repeats, device)


def _measure_step(checkpoint: Described, batch: int, repeats: int, device: torch.device) -> str:
    gc.collect()  # a captured policy refers to itself
    settings = OptimizeParams(
        lora_rank=32,
        gradient_checkpointing=True,
        batch_size=batch,
    )
    policy = build(checkpoint, device)
    lora.prepare(policy, settings.lora, 0, "optimize")
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step(forward: Forward) -> None:
        optimizer.zero_grad()
        log_probs = forward().log_softmax(-1)
        loss = -log_probs[..., 0].mean()
        loss.backward()
        optimizer.step()

    with lora.recomputing(policy, enabled=True):
        frames = _black_frames(batch)
        timing = measure(policy, frames, step, repeats)
    planned = memory_estimate.update("step", checkpoint, settings)
    operations = count_operations(checkpoint, batch, settings)
    return _format_line(timing, checkpoint, batch, planned, operations)


def _infer(forward: Forward) -> None:
    with torch.inference_mode():
        tokens = forward().argmax(-1)
        tokens.cpu()


def _black_frames(rows: int) -> Observations:
    frames = np.zeros((rows, 1, 256, 256, 3), np.uint8)
    proprio = np.zeros((rows, 8), np.float32)
    return Observations(frames, proprio, ("",) * rows)


def build(checkpoint: Described, device: torch.device) -> OpenVLAOFT:
    """Build the policy with random weights, drawn on the device."""
    with device:
        policy = of_facts(checkpoint.facts)
        policy = policy.to(checkpoint.dtype).eval()
    policy.tokenizer = read_tokenizer(checkpoint.source)
    return policy


def measure(
    policy: OpenVLAOFT, batch: Observations, work: Callable[[Forward], None], repeats: int
) -> Timing:
    """Time `work` with forward passes on observations, and on pixels already on the device.

    The first two runs are not counted.
    """
    pixels = policy.pixels(batch.frames[:, 0])

    def run() -> None:
        work(lambda: policy.logits(batch))

    def run_on_device() -> None:
        work(lambda: policy.logits_of_pixels(pixels, batch.instructions))

    _seconds(run, 2)
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    total = _seconds(run, repeats)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    on_device = _seconds(run_on_device, repeats)
    return Timing(total, on_device, peak)


def count_operations(
    checkpoint: Described, batch: int, settings: OptimizeParams | None = None
) -> int:
    """Count floating-point operations of a forward pass, and of a backward pass with settings.

    They are counted on torch's meta device, where nothing is computed.
    """
    learning = settings is not None
    with torch.device("meta"):
        policy = of_facts(checkpoint.facts)
        policy = policy.to(checkpoint.dtype).eval()
        if learning:
            lora.prepare(policy, settings.lora, 0, "optimize")
        prompts = torch.ones(batch, LONGEST, dtype=torch.long)
        lengths = torch.full((batch,), LONGEST)
        pixels = torch.zeros(batch, 6, SIZE, SIZE, dtype=checkpoint.dtype)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learning):
        logits = policy(pixels, prompts, lengths)
        if learning:
            loss = logits.log_softmax(-1).mean()
            loss.backward()
    return counter.get_total_flops()


def _seconds(work: Callable[[], None], repeats: int) -> float:
    _wait_for_gpu()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait_for_gpu()
    elapsed = time.perf_counter() - began
    return elapsed / repeats


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _format_line(
    timing: Timing, checkpoint: Described, batch: int, planned: Need, operations: int
) -> str:
    total = timing.total
    speed = _data_sheet_speed()
    utilization = "unknown"
    if speed is not None and checkpoint.dtype == torch.bfloat16:
        share = operations / total / speed
        utilization = f"{share:.1%}"
    tokens = batch * SEQUENCE
    waits = max(0.0, 1 - timing.device / total)
    peak = "not measured"
    if timing.peak:
        peak = f"{timing.peak / 1e9:.2f} GB"
    return (
        f"{tokens / total:,.0f} tokens/s, utilization {utilization} "
        f"({operations / 1e12:.3f} TFLOP), waits {waits:.0%}, "
        f"peak {peak}, planned {planned.total / 1e9:.2f} GB"
    )


def _data_sheet_speed() -> float | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    for name, speed in DENSE.items():
        if name in device:
            return speed
    return None


if __name__ == "__main__":
    main()
