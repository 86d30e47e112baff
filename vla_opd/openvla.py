"""OpenVLA-OFT's public checkpoint layout: what its files say, and its tensors by the names of this package's module.

`config.json`, `model*.safetensors` (one, or shards with an index), `dataset_statistics.json`, `tokenizer.json`. Nothing else is opened: no `auto_map`
code, no pickles. Source of the layout: openvla-oft 213c5ff, transformers 4.40.1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vla_opd.tokens import ActionSpace

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
CHUNKS = {"libero": (8, 7)}  # actions, and dimensions of an action
WITHOUT = {"num_images_in_input": 1, "use_proprio": False, "use_film": False, "use_l1_regression": False, "use_diffusion": False}
"""What some checkpoints say in config.json of inputs and outputs that distillation of tokens can't use, and what it has to say."""
UNUSABLE = {  # what most of them don't say there: the original puts these weights into files of their own
    "action_head--*": "an L1 or diffusion head answers with actions, not with a distribution over action tokens, so there is nothing to distil",
    "noisy_action_projector--*": "a diffusion head answers with actions, not with a distribution over action tokens, so there is nothing to distil",
    "proprio_projector--*": "proprioception goes into its language model, by a projector that is stored as a pickle",
    "vision_backbone--*": "its vision towers are modulated by the instruction (FiLM), by weights that are stored as a pickle",
}


_DINO, _SIGLIP = r"vision_backbone\.featurizer\.", r"vision_backbone\.fused_featurizer\."
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_DINO + "cls_token", ("dino.embeddings.cls_token",)),
    (_DINO + "reg_token", ("dino.embeddings.register_tokens",)),
    (_DINO + "pos_embed", ("dino.embeddings.position_embeddings",)),
    (_DINO + r"patch_embed\.proj\.(\w+)", (r"dino.embeddings.patch_embeddings.projection.\1",)),
    (_DINO + r"blocks\.(\d+)\.attn\.qkv\.(\w+)", tuple(rf"dino.encoder.layer.\1.attention.{which}_proj.\2" for which in "qkv")),
    (_DINO + r"blocks\.(\d+)\.attn\.proj\.(\w+)", (r"dino.encoder.layer.\1.attention.o_proj.\2",)),
    (_DINO + r"blocks\.(\d+)\.ls(\d)\.scale_factor", (r"dino.encoder.layer.\1.layer_scale\2.lambda1",)),
    (_DINO + r"blocks\.(\d+)\.((?:norm\d|mlp\.fc\d)\.\w+)", (r"dino.encoder.layer.\1.\2",)),
    (_SIGLIP + "pos_embed", ("siglip.embeddings.position_embedding.weight",)),
    (_SIGLIP + r"patch_embed\.proj\.(\w+)", (r"siglip.embeddings.patch_embedding.\1",)),
    (_SIGLIP + r"blocks\.(\d+)\.attn\.qkv\.(\w+)", tuple(rf"siglip.encoder.layers.\1.self_attn.{which}_proj.\2" for which in "qkv")),
    (_SIGLIP + r"blocks\.(\d+)\.attn\.proj\.(\w+)", (r"siglip.encoder.layers.\1.self_attn.out_proj.\2",)),
    (_SIGLIP + r"blocks\.(\d+)\.norm(\d)\.(\w+)", (r"siglip.encoder.layers.\1.layer_norm\2.\3",)),
    (_SIGLIP + r"blocks\.(\d+)\.(mlp\.fc\d\.\w+)", (r"siglip.encoder.layers.\1.\2",)),
    (r"vision_backbone\.(?:fused_)?featurizer\.(?:norm|attn_pool)\..+", ()),
    (r"projector\.fc\d\.\w+", (r"\g<0>",)),
    (r"language_model\.lm_head\.weight", ("head.weight",)),
    (r"language_model\.model\.(.+)", (r"language_model.\1",)),
)
"""The public names of tensors, as patterns, and ours."""


class Tower(BaseModel):
    """A vision transformer's size."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    width: int = Field(ge=1)
    depth: int = Field(ge=2)
    heads: int = Field(ge=1)


class Architecture(BaseModel):
    """An OpenVLA-OFT policy with discrete tokens: sizes, and how a picture, a prompt and an action are put.

    dino, siglip:   the towers. Features are those of the last block but one.
    vocabulary:     ids of the language model; the V action tokens are the last of them, counted downwards (bin b is id vocabulary - 1 - b).
    rows:           of the word embedding and of the head, padding included.
    mean, std:      of DINOv2's half of the picture, per channel; SigLIP's is scaled to [-1, 1].
    crop:           share of the picture's area that is seen (centre); 1 for a checkpoint that was trained without random crops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    family: Literal["openvla_oft"] = "openvla_oft"
    dino: Tower = Tower(width=1024, depth=24, heads=16)
    siglip: Tower = Tower(width=1152, depth=27, heads=16)
    hidden: int = Field(default=4096, ge=1)
    intermediate: int = Field(default=11008, ge=1)
    layers: int = Field(default=32, ge=1)
    heads: int = Field(default=32, ge=1)
    key_value_heads: int = Field(default=32, ge=1)
    rms_epsilon: float = Field(default=1e-6, gt=0)  # transformers 4.40.1's default, which is what the checkpoints were trained with; Llama 2 has 1e-5
    rope_theta: float = Field(default=10000.0, gt=0)
    vocabulary: int = Field(default=32000, ge=1)
    rows: int = Field(default=32064, ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = Field(default=0.9, gt=0, le=1)


class Public(NamedTuple):
    """A public checkpoint's description: the policy's architecture and its action space."""

    architecture: Architecture
    space: ActionSpace


def read_public(folder: Path, unnorm_key: str | None, platform: str = "libero") -> Public:
    """What the files of a public checkpoint say, without its weights. ValueError for what isn't OpenVLA-OFT with discrete tokens.

    unnorm_key: whose statistics the actions have; it may be left out where there is only one.
    """
    for pattern, why in UNUSABLE.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            raise ValueError(f"{folder}: has {found[0]}: {why}; expected a checkpoint with discrete action tokens and one camera")
    config = _json(folder / "config.json")
    for field, wanted in {"model_type": "openvla", "use_fused_vision_backbone": True, "timm_model_ids": [DINO, SIGLIP], **WITHOUT}.items():
        if config.get(field, WITHOUT.get(field)) != wanted:
            raise ValueError(f"{folder / 'config.json'}: {field} is {config.get(field)!r}; expected {wanted!r}")
    try:
        architecture = Architecture.model_validate({**_sizes(config), **_colours(_json(folder / "preprocessor_config.json"))})
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its files don't describe an OpenVLA-OFT: {error}") from error
    space = _action_space(folder / "dataset_statistics.json", unnorm_key, CHUNKS[platform], int(config.get("n_action_bins", 256)))
    return Public(architecture, space)


def read_weights(folder: Path, architecture: Architecture, bins: int) -> dict[str, Tensor]:
    """The tensors of a public checkpoint, under the names of `policies.openvla_oft`, as stored. ValueError for what is missing, or isn't safetensors.

    What the policy never uses is left out: both towers' last blocks, final norms and pooling, and all rows of the head but the actions'.
    """
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not safetensors ({error}); no other kind of file is read") from error
        for name, tensor in tensors.items():
            found.update(zip(renamed(name, architecture), _parts(name, tensor, architecture, bins), strict=False))
    return found


def renamed(name: str, architecture: Architecture) -> tuple[str, ...]:
    """What a public tensor is called here: three names where queries, keys and values lie in one, none where the policy never reads it.

    ValueError for one that an OpenVLA-OFT doesn't have.
    """
    for pattern, names in NAMES:
        if found := re.fullmatch(pattern, name):
            tower = {"featurizer": architecture.dino, "fused_featurizer": architecture.siglip}.get(name.split(".")[1])
            last = ".blocks." in name and tower is not None and int(found[1]) == tower.depth - 1
            return () if last else tuple(found.expand(one) for one in names)
    raise ValueError(f"there is a tensor {name!r}; expected those of an OpenVLA-OFT with discrete action tokens")


def _parts(name: str, tensor: Tensor, architecture: Architecture, bins: int) -> tuple[Tensor, ...]:
    """A public tensor as it is here, name by name."""
    if ".qkv." in name:
        return tuple(part.clone() for part in tensor.chunk(3))
    if name == "language_model.lm_head.weight":
        return (tensor[architecture.vocabulary - bins : architecture.vocabulary].flip(0),)
    return (tensor[0] if name == "vision_backbone.fused_featurizer.pos_embed" else tensor,)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json; no other kind of weights is read")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: isn't there; expected the public layout of OpenVLA-OFT") from None
    except ValueError as error:
        raise ValueError(f"{path}: isn't JSON ({error})") from error


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of what config.json leaves out, transformers 4.40.1 and timm have the defaults, which are those of `Architecture`."""
    text = config.get("text_config", {})
    names = {
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "rms_epsilon": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "rows": "vocab_size",
    }
    sizes = {ours: text[theirs] for ours, theirs in names.items() if theirs in text}
    if "heads" in sizes:
        sizes.setdefault("key_value_heads", sizes["heads"])
    if "rows" in sizes:
        sizes["vocabulary"] = sizes["rows"] - config.get("pad_to_multiple_of", 64)
    small = config.get("golden_timm_overrides", {})  # only a checkpoint that was made small for tests says how small its towers are
    tower = {
        ours: {"width": said["embed_dim"], "depth": said["depth"], "heads": said["num_heads"]}
        for ours, name in (("dino", DINO), ("siglip", SIGLIP))
        if (said := small.get(name))
    }
    return {**sizes, **tower}


def _colours(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that the original image processor really uses: those it stored of its transforms, rounded to bfloat16, not `means` and `stds`."""
    dino, siglip = processor["tvf_normalize_params"]
    if siglip["mean"] != [0.5] * 3 or siglip["std"] != [0.5] * 3:
        raise ValueError(f"tvf_normalize_params[1] is {siglip}; expected 0.5 for every mean and std")
    return {"mean": dino["mean"], "std": dino["std"]}


def _action_space(path: Path, key: str | None, size: tuple[int, int], bins: int) -> ActionSpace:
    statistics, (chunk, dimensions) = _json(path), size
    key = next(iter(statistics)) if key is None and len(statistics) == 1 else key
    if key is None or key not in statistics:
        raise ValueError(f"{path}: --unnorm-key is {key!r}; expected one of {sorted(statistics)}")
    action = statistics[key]["action"]
    mask = action.get("mask", [True] * (dimensions - 1) + [False])
    if not len(action["q01"]) == len(action["q99"]) == len(mask) == dimensions:
        raise ValueError(f"{path}: {key} has {len(action['q01'])} action dimensions; expected {dimensions}")
    return ActionSpace(q01=tuple(action["q01"]), q99=tuple(action["q99"]), normalised=tuple(mask), chunk=chunk, bins=bins)
