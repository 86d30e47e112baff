"""Tensors of a public OpenVLA-OFT checkpoint: their files, their names, and back.

They are in `model.safetensors`, or in shards that `model.safetensors.index.json` lists. No other
kind of file is opened.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vla_opd.policies.openvla_oft.files import (
    CONFIG,
    PREPROCESSOR,
    PROCESSOR,
    STATISTICS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    exists,
    read_json,
    require_file,
)
from vla_opd.policies.openvla_oft.layout import Architecture
from vla_opd.policies.openvla_oft.schema import Index

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "language_model.lm_head.weight"
SIGLIP_POSITIONS = "vision_backbone.fused_featurizer.pos_embed"

_DINO = r"vision_backbone\.featurizer\."
_SIGLIP = r"vision_backbone\.fused_featurizer\."
_DINO_LAYER = r"dino.encoder.layer.\1"
_SIGLIP_LAYER = r"siglip.encoder.layers.\1"
# Patterns of public names, and the parameter names here.
NAMES: dict[str, tuple[str, ...]] = {
    _DINO + r"cls_token": ("dino.embeddings.cls_token",),
    _DINO + r"reg_token": ("dino.embeddings.register_tokens",),
    _DINO + r"pos_embed": ("dino.embeddings.position_embeddings",),
    _DINO + r"patch_embed\.proj\.(\w+)": (r"dino.embeddings.patch_embeddings.projection.\1",),
    _DINO + r"blocks\.(\d+)\.attn\.qkv\.(\w+)": (
        _DINO_LAYER + r".attention.q_proj.\2",
        _DINO_LAYER + r".attention.k_proj.\2",
        _DINO_LAYER + r".attention.v_proj.\2",
    ),
    _DINO + r"blocks\.(\d+)\.attn\.proj\.(\w+)": (_DINO_LAYER + r".attention.o_proj.\2",),
    _DINO + r"blocks\.(\d+)\.ls(\d)\.scale_factor": (_DINO_LAYER + r".layer_scale\2.lambda1",),
    _DINO + r"blocks\.(\d+)\.((?:norm\d|mlp\.fc\d)\.\w+)": (_DINO_LAYER + r".\2",),
    _SIGLIP + r"pos_embed": ("siglip.embeddings.position_embedding.weight",),
    _SIGLIP + r"patch_embed\.proj\.(\w+)": (r"siglip.embeddings.patch_embedding.\1",),
    _SIGLIP + r"blocks\.(\d+)\.attn\.qkv\.(\w+)": (
        _SIGLIP_LAYER + r".self_attn.q_proj.\2",
        _SIGLIP_LAYER + r".self_attn.k_proj.\2",
        _SIGLIP_LAYER + r".self_attn.v_proj.\2",
    ),
    _SIGLIP + r"blocks\.(\d+)\.attn\.proj\.(\w+)": (_SIGLIP_LAYER + r".self_attn.out_proj.\2",),
    _SIGLIP + r"blocks\.(\d+)\.norm(\d)\.(\w+)": (_SIGLIP_LAYER + r".layer_norm\2.\3",),
    _SIGLIP + r"blocks\.(\d+)\.(mlp\.fc\d\.\w+)": (_SIGLIP_LAYER + r".\2",),
    r"vision_backbone\.(?:fused_)?featurizer\.(?:norm|attn_pool)\..+": (),
    r"projector\.fc\d\.\w+": (r"\g<0>",),
    r"language_model\.lm_head\.weight": ("head.weight",),
    r"language_model\.model\.(.+)": (r"language_model.\1",),
}


def source_files(folder: Path) -> list[Path]:
    """List the files of a public checkpoint that are read. ValueError for an unreadable one."""
    weights = list(weight_files(folder))
    names = [CONFIG, PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER, TOKENIZER_CONFIG]
    if weights != [folder / WEIGHTS]:
        names.append(INDEX)
    small = [folder / name for name in names if exists(folder / name)]
    for path in small:
        require_file(path)
    return small + weights


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the files of weights, each in `folder`: the single one, or else the index's shards."""
    single = folder / WEIGHTS
    index = folder / INDEX
    if exists(single):
        require_file(single)
        yield single
        return
    if not exists(index):
        raise ValueError(_describe_missing_weights(folder))
    for name in sorted(set(read_json(index, Index).weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names {name!r}; "
                "expected names of .safetensors files in the same folder"
            )
        require_file(folder / name, f"every file that {INDEX} names: the download is incomplete")
        yield folder / name


def _describe_missing_weights(folder: Path) -> str:
    message = f"{folder}: has no weights; expected {WEIGHTS} or {INDEX}"
    if any(folder.glob("**/adapter_config.json")):
        message += " (it holds an adapter: merge it into its base first)"
    return message


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of weights. ValueError if it is not safetensors."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: not safetensors ({error}); expected the only format that is read"
        ) from error


def read_weights(folder: Path, architecture: Architecture, bins: int) -> dict[str, Tensor]:
    """Read the tensors of a public checkpoint under the policy's parameter names, as stored.

    Tensors that the policy never uses are left out: the last block, final norm and pooling of the
    towers, and all rows of the head except those of the action tokens.

    ValueError for a file that is missing or not safetensors, for an unknown tensor, and for
    integers and numbers that are not finite.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            _require_finite(path, name, tensor)
            try:
                names = parameter_names(name, architecture)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            parts = _split(name, tensor, architecture, bins)
            weights.update(zip(names, parts, strict=False))
    return weights


def _require_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} is {tensor.dtype}; expected floating-point numbers")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} has NaN or infinite values; expected finite numbers")


def parameter_names(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Return the parameters that a public tensor holds.

    There are three for joint queries, keys and values, and none for a tensor that the policy never
    uses. ValueError for one that an OpenVLA-OFT does not have.
    """
    for pattern, templates in NAMES.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if _is_in_last_block(name, architecture):
            return ()
        return tuple(match.expand(template) for template in templates)
    raise ValueError(
        f"has a tensor {name!r}; expected those of an OpenVLA-OFT with discrete action tokens"
    )


def _is_in_last_block(name: str, architecture: Architecture) -> bool:
    match = re.match(r"vision_backbone\.(fused_)?featurizer\.blocks\.(\d+)\.", name)
    if match is None:
        return False
    tower = architecture.siglip if match[1] else architecture.dino
    return int(match[2]) == tower.depth - 1


def _action_rows(architecture: Architecture, bins: int) -> slice:
    """Return the head's rows of action tokens, which descend in action value."""
    return slice(architecture.vocabulary - bins, architecture.vocabulary)


def _split(name: str, tensor: Tensor, architecture: Architecture, bins: int) -> tuple[Tensor, ...]:
    """Convert a public tensor to the values of its parameters."""
    if ".qkv." in name:
        return tuple(part.clone() for part in tensor.chunk(3))
    if name == HEAD:
        return (tensor[_action_rows(architecture, bins)].flip(0),)
    if name == SIGLIP_POSITIONS:
        return (tensor[0],)
    return (tensor,)


def restore(
    name: str,
    public: Tensor,
    parameters: Mapping[str, Tensor],
    architecture: Architecture,
    bins: int,
) -> Tensor:
    """Return a public tensor with the values of its parameters, in its precision.

    This is the reverse of `read_weights`. Values that the policy never uses are kept.
    """
    names = parameter_names(name, architecture)
    if not names:
        return public
    parts = [parameters[parameter].to(public.dtype) for parameter in names]
    if name == HEAD:
        head = public.clone()
        head[_action_rows(architecture, bins)] = parts[0].flip(0)
        return head
    return torch.cat(parts).view_as(public)
