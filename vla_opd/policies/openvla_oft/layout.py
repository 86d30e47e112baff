"""OpenVLA-OFT's public checkpoint layout: what its files say, and its tensors by the names of this package's module.

The small files are read by `files`; beside them `model*.safetensors`, one file, or shards with an index.
Nothing else is opened: no `auto_map` code, no pickles. Source of the layout: openvla-oft 213c5ff, transformers 4.40.1.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from vla_opd.data.action_space import ActionSpace
from vla_opd.policies.openvla_oft.files import (
    CONFIG,
    DINO,
    LAYOUT,
    PREPROCESSOR,
    PROCESSOR,
    SIGLIP,
    STATISTICS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Action,
    Config,
    Index,
    explain,
    is_there,
    read_image_processor,
    read_json,
    read_statistics,
    require_file,
)

CHUNK, ACTION_DIM = 8, 7  # of LIBERO's checkpoints
QUESTION = "In: What action should the robot take to {instruction}?\nOut:"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNUSABLE = {  # what config.json mostly doesn't say: the original puts these weights into files of their own
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
    (
        _DINO + r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"dino.encoder.layer.\1.attention.{which}_proj.\2" for which in "qkv"),
    ),
    (_DINO + r"blocks\.(\d+)\.attn\.proj\.(\w+)", (r"dino.encoder.layer.\1.attention.o_proj.\2",)),
    (
        _DINO + r"blocks\.(\d+)\.ls(\d)\.scale_factor",
        (r"dino.encoder.layer.\1.layer_scale\2.lambda1",),
    ),
    (_DINO + r"blocks\.(\d+)\.((?:norm\d|mlp\.fc\d)\.\w+)", (r"dino.encoder.layer.\1.\2",)),
    (_SIGLIP + "pos_embed", ("siglip.embeddings.position_embedding.weight",)),
    (_SIGLIP + r"patch_embed\.proj\.(\w+)", (r"siglip.embeddings.patch_embedding.\1",)),
    (
        _SIGLIP + r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"siglip.encoder.layers.\1.self_attn.{which}_proj.\2" for which in "qkv"),
    ),
    (
        _SIGLIP + r"blocks\.(\d+)\.attn\.proj\.(\w+)",
        (r"siglip.encoder.layers.\1.self_attn.out_proj.\2",),
    ),
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
    width: int = Field(ge=1, le=4096)
    depth: int = Field(ge=2, le=64)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Tower":
        if self.width % self.heads:
            raise ValueError(
                f"width is {self.width} and heads is {self.heads}; expected a multiple of it"
            )
        return self


TOWERS = {
    DINO: Tower(width=1024, depth=24, heads=16),
    SIGLIP: Tower(width=1152, depth=27, heads=16),
}


class Architecture(BaseModel):
    """An OpenVLA-OFT policy with discrete tokens: sizes, and how a picture is put. Defaults are those of transformers 4.40.1 and timm.

    dino, siglip:   the towers. Features are those of the last block but one.
    vocabulary:     ids of the language model; the V action tokens are the last of them, counted downwards (bin b is id vocabulary - 1 - b).
    rows:           of the word embedding and of the head, padding included.
    rms_epsilon:    what the checkpoints were trained with; Llama 2's own is 1e-5.
    mean, std:      of DINOv2's half of the picture, per channel; SigLIP's is scaled to [-1, 1].
    crop:           share of the picture's area that is seen, from the centre; 1 for a checkpoint that was trained without random crops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    family: Literal["openvla_oft"] = "openvla_oft"
    dino: Tower = TOWERS[DINO]
    siglip: Tower = TOWERS[SIGLIP]
    hidden: int = Field(default=4096, ge=2, le=32768)
    intermediate: int = Field(default=11008, ge=1, le=131072)
    layers: int = Field(default=32, ge=1, le=256)
    heads: int = Field(default=32, ge=1)
    key_value_heads: int = Field(default=32, ge=1)
    rms_epsilon: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    vocabulary: int = Field(default=32000, ge=256, le=1 << 20)
    rows: int = Field(default=32064, ge=256, le=1 << 20)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = Field(default=0.9, gt=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Architecture":
        if self.hidden % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError(
                f"hidden, heads and key_value_heads are {self.hidden}, {self.heads}, {self.key_value_heads}; expected each to divide"
            )
        if self.vocabulary > self.rows or min(self.std) <= 0:
            raise ValueError(
                f"vocabulary, rows and std are {self.vocabulary}, {self.rows}, {self.std}; expected enough rows, and std above 0"
            )
        return self


class Public(NamedTuple):
    """A public checkpoint's description: the policy's architecture and its action space."""

    architecture: Architecture
    space: ActionSpace


def read_public(folder: Path, unnorm_key: str | None, crop: float = 0.9) -> Public:
    """What the files of a public checkpoint say, without its weights. ValueError for what isn't OpenVLA-OFT with discrete tokens.

    unnorm_key: whose statistics the actions have; it may be left out where there is only one. crop: see `Architecture`; no file says it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: is no folder; expected the folder of a checkpoint, {LAYOUT.removeprefix('expected ')}"
        )
    for pattern, why in UNUSABLE.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            raise ValueError(
                f"{folder}: has {found[0]}: {why}; expected a checkpoint with discrete action tokens and one camera"
            )
    config = read_json(folder / CONFIG, Config)
    colours = read_image_processor(folder).tvf_normalize_params[0]
    text = config.text_config
    try:
        architecture = Architecture(
            dino=_tower(config, DINO),
            siglip=_tower(config, SIGLIP),
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads or text.num_attention_heads,
            rms_epsilon=text.rms_norm_eps,
            rope_theta=text.theta,
            vocabulary=text.vocab_size - config.pad_to_multiple_of,
            rows=text.vocab_size,
            mean=colours.mean,
            std=colours.std,
            crop=crop,
        )
    except ValidationError as error:
        raise ValueError(f"{folder}: {explain(error)}") from error
    where, action = read_statistics(folder, config, unnorm_key)
    return Public(architecture, _action_space(where, action, config.n_action_bins))


def _tower(config: Config, name: str) -> Tower:
    size = config.golden_timm_overrides.get(name)
    return (
        TOWERS[name]
        if size is None
        else Tower(width=size.embed_dim, depth=size.depth, heads=size.num_heads)
    )


def read_weights(folder: Path, architecture: Architecture, bins: int) -> dict[str, Tensor]:
    """The tensors of a public checkpoint, under the names of `policies.openvla_oft`, as stored. ValueError for what is missing, or isn't safetensors.

    What the policy never uses is left out: both towers' last blocks, final norms and pooling, and all rows of the head but the actions'.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path}: not safetensors ({error}); no other kind of file is read"
            ) from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype}; expected floating-point numbers"
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{path}: {name} is not finite everywhere; expected finite numbers"
                )
            try:
                found.update(
                    zip(
                        renamed(name, architecture),
                        _parts(name, tensor, architecture, bins),
                        strict=False,
                    )
                )
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    return found


def sources(folder: Path) -> list[Path]:
    """The files of which something is read. ValueError for one that can't be."""
    weights = list(weight_files(folder))
    small = [CONFIG, PREPROCESSOR, PROCESSOR, STATISTICS, TOKENIZER, TOKENIZER_CONFIG]
    if weights != [folder / WHOLE]:
        small.append(INDEX)
    found = [folder / name for name in small if is_there(folder / name)] + weights
    for path in found:
        require_file(path)
    return found


def renamed(name: str, architecture: Architecture) -> tuple[str, ...]:
    """What a public tensor is called here: three names where queries, keys and values lie in one, none where the policy never reads it.

    ValueError for one that an OpenVLA-OFT doesn't have.
    """
    for pattern, names in NAMES:
        if found := re.fullmatch(pattern, name):
            tower = {"featurizer": architecture.dino, "fused_featurizer": architecture.siglip}.get(
                name.split(".")[1]
            )
            last = ".blocks." in name and tower is not None and int(found[1]) == tower.depth - 1
            return () if last else tuple(found.expand(one) for one in names)
    raise ValueError(
        f"there is a tensor {name!r}; expected those of an OpenVLA-OFT with discrete action tokens"
    )


def _parts(name: str, tensor: Tensor, architecture: Architecture, bins: int) -> tuple[Tensor, ...]:
    """A public tensor as it is here, name by name."""
    if ".qkv." in name:
        return tuple(part.clone() for part in tensor.chunk(3))
    if name == "language_model.lm_head.weight":
        return (tensor[architecture.vocabulary - bins : architecture.vocabulary].flip(0),)
    return (tensor[0] if name == "vision_backbone.fused_featurizer.pos_embed" else tensor,)


def restored(
    name: str, public: Tensor, ours: Mapping[str, Tensor], architecture: Architecture, bins: int
) -> Tensor:
    """The reverse of `read_weights`: the public tensor, with the values of those of ours that were made of it. In its own precision."""
    parts = [ours[one].to(public.dtype) for one in renamed(name, architecture)]
    if not parts:
        return public
    if name == "language_model.lm_head.weight":
        rows = public.clone()
        rows[architecture.vocabulary - bins : architecture.vocabulary] = parts[0].flip(0)
        return rows
    return torch.cat(parts).view_as(public)


def weight_files(folder: Path) -> Iterator[Path]:
    """The whole file, or else the index's shards, none of which lies elsewhere."""
    whole, index = folder / WHOLE, folder / INDEX
    if not is_there(whole) and not is_there(index):
        merge = (
            "; it holds an adapter, to be merged into its base first"
            if list(folder.glob("**/adapter_config.json"))
            else ""
        )
        raise ValueError(
            f"{folder}: has neither {whole.name} nor {index.name}; no other kind of weights is read{merge}"
        )
    if is_there(whole):
        require_file(whole)
        yield whole
        return
    for name in sorted(set(read_json(index, Index).weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names {name!r}; expected names of .safetensors files beside it"
            )
        require_file(
            folder / name, f"expected every file that {INDEX} names: the download isn't complete"
        )
        yield folder / name


def _action_space(where: str, action: Action, bins: int) -> ActionSpace:
    mask = (True,) * ACTION_DIM if action.mask is None else action.mask
    for name, values in {"q01": action.q01, "q99": action.q99, "mask": mask}.items():
        if len(values) != ACTION_DIM:
            raise ValueError(
                f"{where}.{name} has {len(values)} entries; expected {ACTION_DIM}, one per action dimension"
            )
    try:
        return ActionSpace(q01=action.q01, q99=action.q99, normalised=mask, chunk=CHUNK, bins=bins)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from error
