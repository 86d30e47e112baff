"""Low-rank adapters (E. J. Hu et al., "LoRA", 2021), by peft: W x becomes W x + (alpha / r) B A x on every linear layer but the head.

W stays as it is, in the precision that it is stored in; A [r, in] and B [out, r] are float32, B zero at first, so that a new adapter changes nothing.
A checkpoint with an adapter has its base's weights beside it, byte for byte, and peft's own two files, by which any peft attaches it to that base.
peft is imported where it is needed: that takes seconds, and most runs have no adapters.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from vla_opd.params import Lora

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"  # peft's, of a model's first adapter
PREFIX = "base_model.model."  # of the names in peft's files
HEAD = "head"


def prepare(policy: nn.Module, lora: Lora | None, seed: int, where: str) -> None:
    """Leave to be trained what is to be trained: an adapter, the one that is there or a new one; or all weights, with an adapter merged into them.

    where: the section that says so. ValueError for another adapter than the one that is there, and for weights that are too coarse to train.
    """
    there = attached(policy)
    if lora is None and there is not None:
        merge(policy)
    elif lora is not None and there is None:
        attach(policy, lora, seed)
    elif lora is not None and there is not None and lora != there:
        ours, theirs = ([one.rank, one.alpha] for one in (lora, there))
        raise ValueError(f"{where}.lora_rank and lora_alpha are {ours}; expected the checkpoint's {theirs}, or null, by which its adapter is merged")
    if coarse := {str(one.dtype) for one in policy.parameters() if one.requires_grad and one.dtype != torch.float32}:
        raise ValueError(
            f"{where}.lora_rank is null, and the weights are {', '.join(coarse)}, too coarse for small steps; expected an adapter, or float32"
        )


def attached(policy: nn.Module) -> Lora | None:
    """The adapter that a policy has, if it has one."""
    config = getattr(policy, "peft_config", {}).get(NAME)
    return None if config is None else Lora(rank=config.r, alpha=config.lora_alpha)


def attach(policy: nn.Module, lora: Lora, seed: int) -> None:
    """Give a policy a new adapter, drawn by the seed, and freeze everything else."""
    from peft import LoraConfig

    linear = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        _inject(policy, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=sorted(linear - {HEAD})))


def read(policy: nn.Module, folder: Path) -> None:
    """Give a policy the adapter beside its weights, if there is one. ValueError for one that doesn't fit."""
    if beside(folder) is None:
        return
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False  # it may be trained on
    _inject(policy, config)
    tensors = safetensors.torch.load_file(folder / ADAPTER)
    found = set_peft_model_state_dict(policy, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    lost = [name for name, one in policy.named_parameters() if one.requires_grad and name in found.missing_keys]
    if lost or found.unexpected_keys:
        raise ValueError(f"{folder / ADAPTER}: lacks {lost}, and has {found.unexpected_keys} besides; expected an adapter of this policy")


def beside(folder: Path) -> Lora | None:
    """What adapter lies in a folder, if there is one."""
    if not (folder / CONFIG).is_file():
        return None
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return Lora(told["r"], told["lora_alpha"])


def write(policy: Any, adapter: Path, config: Path) -> None:
    """The adapter of a policy, as peft's two files."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(policy, save_embedding_layers=False)
    safetensors.torch.save_file({PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, adapter)
    told: dict[str, Any] = policy.peft_config[NAME].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}
    config.write_text(json.dumps(plain | {"inference_mode": True}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merge(policy: nn.Module) -> None:
    """W + (alpha / r) B A in W's place, and no adapter any more; all weights are to be trained again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            policy.set_submodule(name, module.get_base_layer())
    del policy.peft_config
    policy.requires_grad_()


@contextmanager
def recomputing(policy: nn.Module, *, wanted: bool) -> Generator[None]:
    """While it lasts, transformer blocks keep their inputs only, and compute the rest again for the gradient, which is the same."""
    parts = [module for module in policy.modules() if isinstance(module, PreTrainedModel)] if wanted else []
    for part in parts:
        part.activation_checkpointing_enable()
        part.train()
    yield
    for part in parts:
        part.activation_checkpointing_disable()
        part.eval()


def _inject(policy: nn.Module, config: Any) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, policy)
    for one in policy.parameters():
        if one.requires_grad:
            one.data = one.data.float()
