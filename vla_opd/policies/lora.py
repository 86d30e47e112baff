"""Low-rank adapters (E. J. Hu et al., "LoRA", 2021), by peft: W x becomes W x + (alpha / r) B A x on every linear layer but the head.

W stays as it is, in the precision that it is stored in; A [r, in] and B [out, r] are float32, B zero at first, so that a new adapter changes nothing.
A checkpoint with an adapter has its base's weights beside it, byte for byte, and peft's own two files, by which any peft attaches it to that base.
peft is imported where it is needed: that takes seconds, and most runs have no adapters.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import PreTrainedModel

from vla_opd.params.training import Lora

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"  # peft's, of a model's first adapter
PREFIX = "base_model.model."  # of the names in peft's files
HEAD = "head"


class Config(BaseModel):
    """What of `adapter_config.json` an adapter depends on, under peft's names. Whatever else peft knows has to be as if it weren't there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    peft_type: Literal["LORA"] = "LORA"
    r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    target_modules: tuple[str, ...] = Field(min_length=1)


def prepare(policy: nn.Module, lora: Lora | None, seed: int, where: str) -> None:
    """Leave to be trained what is to be trained: an adapter, the one that is there or a new one; or all weights, with an adapter merged into them.

    where: the section that says so. ValueError as `require_trainable`'s.
    """
    there = attached(policy)
    require_trainable(lora, there, [one.dtype for one in policy.parameters()], where)
    if lora is None and there is not None:
        merge(policy)
    elif lora is not None and there is None:
        attach(policy, lora, seed)


def require_trainable(
    lora: Lora | None, there: Lora | None, stored: Iterable[torch.dtype], where: str
) -> None:
    """ValueError for another adapter than the one that is there, and, without one, for weights that are too coarse to train."""
    if lora is not None and there is not None and lora != there:
        ours, theirs = ([one.rank, one.alpha] for one in (lora, there))
        raise ValueError(
            f"{where}.lora_rank and lora_alpha are {ours}; expected the checkpoint's {theirs}, or null, by which its adapter is merged"
        )
    if lora is None and (coarse := {str(one) for one in stored if one != torch.float32}):
        told = ", ".join(sorted(coarse))
        raise ValueError(
            f"{where}.lora_rank is null, and the weights are {told}, too coarse for small steps; expected an adapter, or float32"
        )


def attached(policy: nn.Module) -> Lora | None:
    """The adapter that a policy has, if it has one."""
    config = getattr(policy, "peft_config", {}).get(NAME)
    return None if config is None else Lora(rank=config.r, alpha=config.lora_alpha)


def attach(policy: nn.Module, lora: Lora, seed: int) -> None:
    """Give a policy a new adapter, drawn by the seed, and freeze everything else."""
    linear = {
        name.rpartition(".")[2]
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
    }
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        _inject(
            policy,
            Config(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=tuple(sorted(linear - {HEAD}))
            ),
        )


def read(policy: nn.Module, folder: Path) -> None:
    """Give a policy the adapter beside its weights, if there is one. ValueError for one that doesn't fit."""
    if (config := _config(folder)) is None:
        return
    from peft import set_peft_model_state_dict

    _inject(policy, config)
    tensors = safetensors.torch.load_file(folder / ADAPTER)
    try:
        found = set_peft_model_state_dict(
            policy, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        )
    except RuntimeError as error:
        raise ValueError(
            f"{folder / ADAPTER}: {error}; expected an adapter of this policy"
        ) from error
    lost = [
        name
        for name, one in policy.named_parameters()
        if one.requires_grad and name in found.missing_keys
    ]
    if lost or found.unexpected_keys:
        raise ValueError(
            f"{folder / ADAPTER}: lacks {lost}, and has {found.unexpected_keys} besides; expected an adapter of this policy"
        )


def beside(folder: Path) -> Lora | None:
    """What adapter lies in a folder, if there is one."""
    config = _config(folder)
    return None if config is None else Lora(config.r, config.lora_alpha)


def _config(folder: Path) -> Config | None:
    if not (folder / CONFIG).is_file():
        return None
    try:
        return Config.model_validate_json((folder / CONFIG).read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{folder / CONFIG}: not the description of an adapter as they are written here: {error}"
        ) from error


def write(policy: Any, adapter: Path, config: Path) -> None:
    """The adapter of a policy, as peft's two files."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(policy, save_embedding_layers=False)
    safetensors.torch.save_file(
        {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        adapter,
    )
    its = policy.peft_config[NAME]
    told = Config(
        r=its.r, lora_alpha=its.lora_alpha, target_modules=tuple(sorted(its.target_modules))
    )
    config.write_text(told.model_dump_json(indent=2) + "\n", encoding="utf-8")


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
    parts = (
        [module for module in policy.modules() if isinstance(module, PreTrainedModel)]
        if wanted
        else []
    )
    for part in parts:
        part.activation_checkpointing_enable()
        part.train()
    yield
    for part in parts:
        part.activation_checkpointing_disable()
        part.eval()


def _inject(policy: nn.Module, config: Config) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=list(config.target_modules)
        ),
        policy,
    )
    for one in policy.parameters():
        if one.requires_grad:
            one.data = one.data.float()
