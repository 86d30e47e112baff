"""How much memory a run will take, before there is one: the policies are run on torch's `meta` device, where tensors have sizes and nothing else.

A pass is made as the stage makes it, and the sizes of all storages that are alive at a time are added up; attention counts as a fused kernel's, which
keeps no B x H x N x N probabilities. What a device's driver and allocator take besides isn't in it.
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
from vla_opd.policies.checkpoint import CheckpointFacts, glance, public_facts
from vla_opd.policies.load import build_policy
from vla_opd.policies.openvla_oft.files import read_tokenizer

FLOAT32 = 4


@dataclass(frozen=True)
class Described:
    """What is known of a checkpoint without its weights; `source` is where its tokenizer lies, if it has one."""

    facts: CheckpointFacts
    dtype: torch.dtype
    source: Path


@dataclass(frozen=True)
class Need:
    """What a stage holds on its device at most, in bytes."""

    stage: str
    weights: int
    gradients: int = 0
    moments: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it at once: the peak of activations is in the backward pass, when there are gradients."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Stored:
    """What an iteration leaves at most, uncompressed, in bytes; `held` is what the host holds of it and of earlier ones while the student learns."""

    states: int
    frames: int
    labels: int
    held: int


def device(params: Params, root: Path, processes: int = 1) -> list[Need]:
    """What the stages need that run a policy, one after the other: student, teacher and anchor are never there at the same time.

    processes: that train together, each on a device of its own; it is one such device's need.
    ValueError for a checkpoint of which nothing is known yet.
    """
    student = described(params, root, INITIAL_STUDENT)
    needs = [inference("evaluate", student, params.evaluate.inference_batch)]
    if params.iterations:
        teacher = described(params, root, params.label.teacher)
        needs += [
            inference("sample", student, params.sample.inference_batch),
            inference("label", teacher, params.label.batch_size),
        ]
        needs += (
            [inference("anchor", student, params.optimize.batch_size)]
            if params.optimize.anchor
            else []
        )
        needs += [update("optimize", student, params.optimize, processes)]
    if params.reinforcements:
        needs += [
            inference("explore", student, params.explore.inference_batch),
            update("reinforce", student, params.reinforce, processes),
        ]
    return needs


def described(params: Params, root: Path, name: str) -> Described:
    """A checkpoint by its public files, if it is one that is adopted and they are here; by its manifest otherwise."""
    folder, its = root / "checkpoints" / name, params.adopt.get(name)
    if (folder / MANIFEST).is_file() and not (its and Path(its.folder).is_dir()):
        there = glance(folder)
        return Described(there.facts, there.dtypes[0], folder)
    if its is None:
        raise ValueError(
            f"{folder}: isn't there yet, and what it will need isn't known before; expected it, or an entry of `adopt`"
        )
    return Described(
        public_facts(its, params.environment), getattr(torch, its.dtype), Path(its.folder)
    )


def inference(stage: str, checkpoint: Described, batch: int) -> Need:
    """A forward pass without gradients."""
    held, peak = _forward(checkpoint, batch)
    return Need(stage, held, activations=peak - held)


@lru_cache(maxsize=4)
def _forward(checkpoint: Described, batch: int) -> tuple[int, int]:
    policy = _policy(checkpoint)
    with torch.inference_mode(), _counting(policy) as counted:
        policy.logits(_observations(checkpoint.facts, batch))
    return counted.held, counted.peak


def update(stage: str, checkpoint: Described, settings: UpdateParams, processes: int = 1) -> Need:
    """An optimiser's step: forward and backward pass, the gradients, and the optimiser's moments.

    Of several processes (`ranks`) each has its share of states, weights, gradients and moments. It holds besides, as activations, what is gathered
    whole: of the weights what is in no block, and two blocks, the one that computes and the next; and those blocks' gradients.
    """
    require_equal_shares({f"{stage}.batch_size": settings.batch_size}, processes)
    policy = _policy(checkpoint)
    with torch.device("meta"):
        lora.prepare(policy, settings.lora, 0, stage)
    trained = FLOAT32 * sum(one.numel() for one in policy.parameters() if one.requires_grad)
    with (
        lora.recomputing(policy, wanted=settings.gradient_checkpointing),
        _counting(policy) as counted,
    ):
        value = (
            policy.logits(_observations(checkpoint.facts, settings.batch_size // processes))
            .log_softmax(-1)
            .mean()
        )
        forward = counted.peak
        value.backward()
    own, activations = -(-trained // processes), counted.peak - counted.held - trained
    if processes > 1:  # before the backward pass no gradient is there to be less of
        activations = max(activations, forward - counted.held) + _gathered(policy)
    return Need(
        stage, -(-counted.held // processes), own, 2 * own, max(activations, own)
    )  # AdamW's own step holds a copy of what it trains


def _gathered(policy: nn.Module) -> int:
    """Weights and gradients that are whole in the middle of a pass."""
    each = sorted((_whole(block) for block in fsdp.blocks(policy)), reverse=True)
    return _whole(policy) - sum(each) + sum(each[:2])


def _whole(module: nn.Module) -> int:
    """Its weights, and the gradients of what of it is trained."""
    return sum(
        one.numel() * one.element_size() * (1 + one.requires_grad) for one in module.parameters()
    )


def stored(params: Params, facts: CheckpointFacts) -> Stored:
    """If every episode lasts to its horizon."""
    its = params.sample
    states = (
        len(params.environment.tasks)
        * its.prompts
        * its.group
        * -(-its.horizon // its.observe_every)
    )
    frame = len(params.environment.cameras) * params.environment.image_size**2 * 3
    numbers = facts.action_space.tokens * facts.action_space.bins
    frames, labels = (
        states * frame,
        states * numbers * {"float16": 2, "float32": 4}[params.label.dtype],
    )
    anchor = states * numbers * FLOAT32 if params.optimize.anchor else 0
    return Stored(
        states, frames, labels, (frames + labels + anchor) * (1 + params.optimize.earlier)
    )


def _policy(checkpoint: Described) -> Any:
    with torch.device("meta"), no_init_weights():
        policy = build_policy(checkpoint.facts).to(checkpoint.dtype).eval()
        if (its := lora.beside(checkpoint.source)) is not None:
            lora.attach(policy, its, 0)
    if (tokenizer := read_tokenizer(checkpoint.source)) is not None:
        policy.tokenizer = tokenizer
    return policy


def _observations(facts: CheckpointFacts, batch: int) -> Observations:
    its = facts.environment
    frames = np.zeros((batch, len(its.cameras), its.image_size, its.image_size, 3), np.uint8)
    return Observations(
        frames, np.zeros((batch, len(facts.proprio_mean)), np.float32), ("",) * batch
    )


class _Counter(TorchDispatchMode):
    """Bytes in storages on a policy's device that are alive: now, at most, and before anything was done."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._device = next(policy.parameters()).device.type
        self.now = self.peak = 0
        self._alive = WeakIdKeyDictionary()
        for tensor in (*policy.parameters(), *policy.buffers()):
            self._take(tensor)
        self.held = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor) and result.device.type == self._device:
                self._take(result)
        return results

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._alive:
            self._alive[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _counting(policy: nn.Module) -> Generator[_Counter]:
    torchs = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused
    try:
        with _Counter(policy) as counter:
            yield counter
    finally:
        nn.functional.scaled_dot_product_attention = torchs


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **more: Any,
) -> Tensor:
    """What the meta device has no kernel for: it would take attention apart into products, and keep the probabilities."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the one of torch's that takes a mask, and is on all builds
    return fused(
        query,
        key,
        value,
        dropout_p,
        more.get("is_causal", False),
        attn_mask=attn_mask,
        scale=more.get("scale"),
    )[0]
