"""Memory that a run will take, estimated before it starts.

The policies run on torch's `meta` device, where tensors have sizes and no data. Each pass is made
as its stage makes it, and the sizes of all storages that are alive at the same time are added up.
Attention counts as a fused kernel, which keeps no B x H x N x N probabilities. Memory that a
device's driver and allocator take is not included.
"""

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers.initialization import no_init_weights

from vla_opd.artifacts.manifest import MANIFEST
from vla_opd.data.trajectory import Observations
from vla_opd.learning import fsdp
from vla_opd.machine.host import require_equal_shares
from vla_opd.params.run import Params
from vla_opd.params.stages import INITIAL_STUDENT
from vla_opd.params.training import UpdateParams
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import CheckpointFacts, open_unverified, public_facts
from vla_opd.policies.load import build_policy
from vla_opd.policies.openvla_oft.files import read_tokenizer
from vla_opd.policies.policy import Policy

BYTES = {"float16": 2, "float32": 4}
FLOAT32 = BYTES["float32"]


@dataclass(frozen=True)
class Described:
    """A checkpoint without its weights. source: folder of its tokenizer, if it has one."""

    facts: CheckpointFacts
    dtype: torch.dtype
    source: Path


@dataclass(frozen=True)
class Need:
    """The most that a stage holds on its device, in bytes."""

    stage: str
    weights: int
    gradients: int = 0
    moments: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum: activations have their peak in the backward pass, when gradients exist."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class IterationData:
    """The most data that an iteration makes: a number of states, and bytes before compression.

    held: bytes in the host's memory while the student learns, earlier iterations' data included.
    """

    states: int
    frames: int
    labels: int
    held: int


def device_needs(params: Params, root: Path, processes: int = 1) -> list[Need]:
    """Return the needs of the stages that run a policy: student, teacher or anchor, never two.

    processes: how many train together, each on a device of its own; the need is of one device.
    ValueError for a checkpoint that is not described anywhere yet.
    """
    label = params.label
    optimize = params.optimize
    student = describe(params, root, INITIAL_STUDENT)
    needs = [inference("evaluate", student, params.evaluate.inference_batch)]
    if params.iterations:
        teacher = describe(params, root, label.teacher)
        needs += [
            inference("sample", student, params.sample.inference_batch),
            inference("label", teacher, label.batch_size),
        ]
        if optimize.anchor:
            needs.append(inference("anchor", student, optimize.batch_size))
        needs.append(update("optimize", student, optimize, processes))
    if params.reinforcements:
        needs += [
            inference("explore", student, params.explore.inference_batch),
            update("reinforce", student, params.reinforce, processes),
        ]
    return needs


def describe(params: Params, root: Path, name: str) -> Described:
    """Describe a checkpoint by the public files that it is adopted from, or by its manifest.

    ValueError if there is neither.
    """
    folder = root / "checkpoints" / name
    manifest = folder / MANIFEST
    adopted = params.adopt.get(name)
    has_public_files = adopted is not None and Path(adopted.folder).is_dir()
    if manifest.is_file() and not has_public_files:
        checkpoint = open_unverified(folder)
        return Described(checkpoint.facts, checkpoint.dtypes[0], folder)
    if adopted is None:
        raise ValueError(
            f"{folder}: does not exist yet, and its size is not known before; "
            "expected a checkpoint, or an entry of `adopt`"
        )
    facts = public_facts(adopted, params.environment)
    dtype = getattr(torch, adopted.dtype)
    return Described(facts, dtype, Path(adopted.folder))


def inference(stage: str, checkpoint: Described, batch: int) -> Need:
    """Return the need of a forward pass without gradients."""
    held, peak = _infer(checkpoint, batch)
    return Need(stage, held, activations=peak - held)


@lru_cache(maxsize=4)
def _infer(checkpoint: Described, batch: int) -> tuple[int, int]:
    """Return the bytes before a forward pass, and the most during it."""
    policy = _build(checkpoint)
    observations = _observations(checkpoint.facts, batch)
    with torch.inference_mode(), _counting(policy) as counter:
        policy.logits(observations)
    return counter.held, counter.peak


def update(stage: str, checkpoint: Described, settings: UpdateParams, processes: int = 1) -> Need:
    """Return the need of an optimizer step: both passes, gradients and AdamW's moments.

    Each of several processes has its share of states, weights, gradients and moments. Its
    activations include what is gathered: weights that are in no block, two blocks (the one that
    computes and the next one), and the gradients of all these.
    """
    require_equal_shares({f"{stage}.batch_size": settings.batch_size}, processes)
    policy = _build(checkpoint)
    with torch.device("meta"):
        lora.prepare(policy, settings.lora, 0, stage)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    all_gradients = FLOAT32 * sum(parameter.numel() for parameter in trained)
    observations = _observations(checkpoint.facts, settings.batch_size // processes)
    with (
        lora.recomputing(policy, enabled=settings.gradient_checkpointing),
        _counting(policy) as counter,
    ):
        loss = policy.logits(observations).log_softmax(-1).mean()
        forward_peak = counter.peak
        loss.backward()
    activations = counter.peak - counter.held - all_gradients
    if processes > 1:
        # Sharding shrinks gradients, but at the end of the forward pass there are none yet.
        activations = max(activations, forward_peak - counter.held) + _gathered(policy)
    gradients = _divide_up(all_gradients, processes)
    return Need(
        stage,
        weights=_divide_up(counter.held, processes),
        gradients=gradients,
        moments=2 * gradients,
        activations=max(activations, gradients),  # AdamW's step copies the trained weights
    )


def _divide_up(size: int, parts: int) -> int:
    return -(-size // parts)


def _gathered(policy: nn.Module) -> int:
    """Return the bytes of weights and gradients that are gathered in the middle of a pass."""
    sizes = [_weights_and_gradients(block) for block in fsdp.blocks(policy)]
    sizes.sort(reverse=True)
    sharded = sum(sizes[2:])
    return _weights_and_gradients(policy) - sharded


def _weights_and_gradients(module: nn.Module) -> int:
    size = 0
    for parameter in module.parameters():
        copies = 2 if parameter.requires_grad else 1
        size += copies * parameter.nbytes
    return size


def iteration_data(params: Params, facts: CheckpointFacts) -> IterationData:
    """Return the data of an iteration in which every episode lasts to its horizon."""
    sample = params.sample
    optimize = params.optimize
    environment = params.environment
    space = facts.action_space

    tasks = len(environment.tasks)
    episodes = tasks * sample.prompts * sample.group
    decisions = _divide_up(sample.horizon, sample.observe_every)
    states = episodes * decisions

    cameras = len(environment.cameras)
    pixels = environment.image_size**2
    frames = states * cameras * pixels * 3
    log_probs = states * space.tokens * space.bins
    labels = log_probs * BYTES[params.label.dtype]
    held = frames + labels
    if optimize.anchor:
        held += log_probs * FLOAT32
    iterations = 1 + optimize.earlier
    return IterationData(states, frames, labels, held * iterations)


def _build(checkpoint: Described) -> Policy:
    with torch.device("meta"), no_init_weights():
        policy = build_policy(checkpoint.facts).to(checkpoint.dtype).eval()
        adapter = lora.find(checkpoint.source)
        if adapter is not None:
            lora.attach(policy, adapter, 0)
    tokenizer = read_tokenizer(checkpoint.source)
    if tokenizer is not None:
        policy.tokenizer = tokenizer
    return policy


def _observations(facts: CheckpointFacts, batch: int) -> Observations:
    environment = facts.environment
    cameras = len(environment.cameras)
    size = environment.image_size
    sensors = len(facts.proprio_mean)
    frames = np.zeros((batch, cameras, size, size, 3), np.uint8)
    proprio = np.zeros((batch, sensors), np.float32)
    instructions = ("",) * batch
    return Observations(frames, proprio, instructions)


class _Counter(TorchDispatchMode):
    """Count the bytes of the living storages on a policy's device.

    now: at this moment. peak: the most so far. held: at the start.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._device = next(policy.parameters()).device.type
        self._alive = WeakIdKeyDictionary()
        self.now = 0
        self.peak = 0
        for tensor in (*policy.parameters(), *policy.buffers()):
            self._count(tensor)
        self.held = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        values = results
        if not isinstance(results, tuple | list):
            values = (results,)
        for value in values:
            if isinstance(value, Tensor) and value.device.type == self._device:
                self._count(value)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._alive:
            return
        self._alive[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _counting(policy: nn.Module) -> Generator[_Counter]:
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused_attention
    try:
        with _Counter(policy) as counter:
            yield counter
    finally:
        nn.functional.scaled_dot_product_attention = original


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    """Return attention's output by a fused kernel.

    torch has none for the meta device: it would compute and keep the probabilities. Of its fused
    kernels only this one takes a mask and is in every build.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    return kernel(
        query,
        key,
        value,
        dropout_p,
        options.get("is_causal", False),
        attn_mask=attn_mask,
        scale=options.get("scale"),
    )[0]
