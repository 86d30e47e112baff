"""Low-rank adapters by peft (E. J. Hu et al., "LoRA", 2021), on every linear layer but the head.

W x becomes W x + (alpha / r) B A x. W is unchanged, in the precision that it is stored in;
A [r, in] and B [out, r] are float32, and B is zero at first, so that a new adapter changes nothing.
A checkpoint with an adapter has its base's weights, byte for byte, and peft's own two files, by
which any peft attaches it to that base. peft is imported where it is needed: that takes seconds,
and most runs have no adapters.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from vla_opd.params.training import Lora

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAME = "default"  # peft's, of a model's first adapter
PREFIX = "base_model.model."  # of the names in peft's files
HEAD = "head"
RECOMPUTE = "activation_checkpointing_enable"  # a method of transformers' models, and of `Llama`


class Config(BaseModel):
    """The part of `adapter_config.json` that an adapter depends on, under peft's names.

    A file with any other setting of peft is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    peft_type: Literal["LORA"] = "LORA"
    r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    target_modules: tuple[str, ...] = Field(min_length=1)


def prepare(policy: nn.Module, lora: Lora | None, seed: int, where: str) -> None:
    """Make an adapter, new or present, the only part that is trained; or, for None, all weights.

    None merges a present adapter into the weights.
    where: the section of the settings, for messages. ValueError as for `require_trainable`.
    """
    present = attached(policy)
    dtypes = [parameter.dtype for parameter in policy.parameters()]
    require_trainable(lora, present, dtypes, where)
    if lora is None and present is not None:
        merge(policy)
    elif lora is not None and present is None:
        attach(policy, lora, seed)


def require_trainable(
    lora: Lora | None, present: Lora | None, dtypes: Iterable[torch.dtype], where: str
) -> None:
    """ValueError for weights that cannot be trained as set.

    lora:    the adapter to train; it has to be the present one, if there is one.
    present: the adapter that the weights have.
    dtypes:  of the weights. Without an adapter they have to be float32.
    """
    if lora is not None and present is not None and lora != present:
        raise ValueError(
            f"{where}.lora_rank and lora_alpha are {[*lora]}; expected the checkpoint's "
            f"{[*present]}, or null, by which its adapter is merged"
        )
    coarse = {str(dtype) for dtype in dtypes if dtype != torch.float32}
    if lora is None and coarse:
        raise ValueError(
            f"{where}.lora_rank is null, and the weights are {', '.join(sorted(coarse))}, "
            "too coarse for small steps; expected an adapter, or float32"
        )


def attached(policy: nn.Module) -> Lora | None:
    """Return the adapter that a policy has, if it has one."""
    config = _peft_config(policy)
    if config is None:
        return None
    return Lora(config.r, config.lora_alpha)


def attach(policy: nn.Module, lora: Lora, seed: int) -> None:
    """Give a policy a new adapter, drawn by the seed, and freeze everything else."""
    layers: set[str] = set()
    for name, module in policy.named_modules():
        if isinstance(module, nn.Linear):
            layers.add(name.rpartition(".")[2])
    targets = tuple(sorted(layers - {HEAD}))
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        _inject(policy, Config(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))


def read(policy: nn.Module, folder: Path) -> None:
    """Give a policy the adapter beside its weights, if there is one.

    ValueError for one that does not fit.
    """
    config = _read_config(folder)
    if config is None:
        return
    from peft import set_peft_model_state_dict

    _inject(policy, config)
    path = folder / ADAPTER
    stored = safetensors.torch.load_file(path)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    try:
        result = set_peft_model_state_dict(policy, tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; expected an adapter of this policy") from error
    expected = {name for name, value in policy.named_parameters() if value.requires_grad}
    missing = sorted(expected.intersection(result.missing_keys))
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path}: has no {missing}, and unknown tensors {result.unexpected_keys}; "
            "expected an adapter of this policy"
        )


def find(folder: Path) -> Lora | None:
    """Return the adapter that a checkpoint's folder has, if it has one."""
    config = _read_config(folder)
    if config is None:
        return None
    return Lora(config.r, config.lora_alpha)


def _read_config(folder: Path) -> Config | None:
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        return Config.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path}: not the description of an adapter as they are written here: {error}"
        ) from error


def write(policy: nn.Module, adapter: Path, config: Path) -> None:
    """Write a policy's adapter as peft's two files."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in get_peft_model_state_dict(policy, save_embedding_layers=False).items():
        tensors[PREFIX + name] = tensor.detach().cpu().contiguous()
    safetensors.torch.save_file(tensors, adapter)
    attributes = _peft_config(policy)
    described = Config(
        r=attributes.r,
        lora_alpha=attributes.lora_alpha,
        target_modules=tuple(sorted(attributes.target_modules)),
    )
    config.write_text(described.model_dump_json(indent=2) + "\n", encoding="utf-8")


def merge(policy: nn.Module) -> None:
    """Replace W by W + (alpha / r) B A, remove the adapter, and let all weights be trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            policy.set_submodule(name, module.get_base_layer())
    del policy.peft_config
    policy.requires_grad_()


@contextmanager
def recomputing(policy: nn.Module, *, enabled: bool) -> Generator[None]:
    """Let transformer blocks keep their inputs only, and recompute the rest in the backward pass.

    The gradient is the same. Without `enabled` nothing changes.
    """
    models: list[Any] = []
    if enabled:
        models = [module for module in policy.modules() if hasattr(module, RECOMPUTE)]
    for model in models:
        model.activation_checkpointing_enable()
        model.train()
    yield
    for model in models:
        model.activation_checkpointing_disable()
        model.eval()


def _peft_config(policy: nn.Module) -> Any:
    """Return peft's own settings of an adapter, None without one."""
    return getattr(policy, "peft_config", {}).get(NAME)


def _inject(policy: nn.Module, config: Config) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.target_modules),
    )
    inject_adapter_in_model(settings, policy)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
