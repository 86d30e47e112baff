"""OpenVLA-OFT's public checkpoint layout: what its files say, and its tensors by the names of this package's module.

`config.json`, `preprocessor_config.json`, `dataset_statistics.json`, `model*.safetensors` (one file, or shards with an index) and `tokenizer.json`.
Nothing else is opened: no `auto_map` code, no pickles. Source of the layout: openvla-oft 213c5ff, transformers 4.40.1.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator
from tokenizers import Tokenizer
from torch import Tensor

from vla_opd.params import SHORTER
from vla_opd.tokens import ActionSpace

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
CHUNK, ACTION_DIM = 8, 7  # of LIBERO's checkpoints
QUESTION = "In: What action should the robot take to {instruction}?\nOut:"
TOKENIZER, WHOLE, INDEX = "tokenizer.json", "model.safetensors", "model.safetensors.index.json"
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
    width: int = Field(ge=1, le=4096)
    depth: int = Field(ge=2, le=64)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Tower":
        if self.width % self.heads:
            raise ValueError(f"width is {self.width} and heads is {self.heads}; expected a multiple of it")
        return self


TOWERS = {DINO: Tower(width=1024, depth=24, heads=16), SIGLIP: Tower(width=1152, depth=27, heads=16)}


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
            raise ValueError(f"hidden, heads and key_value_heads are {self.hidden}, {self.heads}, {self.key_value_heads}; expected each to divide")
        if self.vocabulary > self.rows or min(self.std) <= 0:
            raise ValueError(f"vocabulary, rows and std are {self.vocabulary}, {self.rows}, {self.std}; expected enough rows, and std above 0")
        return self


class Public(NamedTuple):
    """A public checkpoint's description: the policy's architecture and its action space."""

    architecture: Architecture
    space: ActionSpace


class _File(BaseModel):
    """What is read of a JSON file; other keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)


class _Text(_File):
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: None = None
    hidden_act: Literal["silu"] = "silu"
    vocab_size: int = 32064


class _Size(_File):
    embed_dim: int
    depth: int
    num_heads: int

    @property
    def tower(self) -> Tower:
        return Tower(width=self.embed_dim, depth=self.depth, heads=self.num_heads)


class _Config(_File):
    """golden_timm_overrides: of a checkpoint that was made small for tests; only that says how large its towers are."""

    model_type: Literal["openvla"]
    use_fused_vision_backbone: Literal[True]
    timm_model_ids: tuple[Literal["vit_large_patch14_reg4_dinov2.lvd142m"], Literal["vit_so400m_patch14_siglip_224"]]
    arch_specifier: Literal["no-align+fused-gelu-mlp"] = "no-align+fused-gelu-mlp"
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    image_sizes: tuple[Literal[224], Literal[224]] = (224, 224)
    n_action_bins: int = Field(default=256, ge=2, le=256)
    pad_to_multiple_of: int = Field(default=64, ge=0)
    text_config: _Text = _Text()
    golden_timm_overrides: dict[str, _Size] = Field(default_factory=dict)
    num_images_in_input: Literal[1] = 1
    use_proprio: Literal[False] = False
    use_film: Literal[False] = False
    use_l1_regression: Literal[False] = False
    use_diffusion: Literal[False] = False


class _Normalisation(_File):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _Half(_File):
    mean: tuple[Literal[0.5], Literal[0.5], Literal[0.5]]  # pyright: ignore[reportInvalidTypeForm]
    std: tuple[Literal[0.5], Literal[0.5], Literal[0.5]]  # pyright: ignore[reportInvalidTypeForm]


class _Processor(_File):
    """The constants that the original image processor really uses: those it stored of its transforms, rounded to bfloat16, not `means` and `stds`."""

    tvf_normalize_params: tuple[_Normalisation, _Half]


class _Action(_File):
    """mask: which dimensions are normalised; all of them, as in the original, if it isn't there."""

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...] | None = None


class _Dataset(_File):
    action: _Action


class _Index(_File):
    weight_map: dict[str, str]


def read_public(folder: Path, unnorm_key: str | None, crop: float = 0.9) -> Public:
    """What the files of a public checkpoint say, without its weights. ValueError for what isn't OpenVLA-OFT with discrete tokens.

    unnorm_key: whose statistics the actions have; it may be left out where there is only one. crop: see `Architecture`; no file says it.
    """
    for pattern, why in UNUSABLE.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            raise ValueError(f"{folder}: has {found[0]}: {why}; expected a checkpoint with discrete action tokens and one camera")
    config, colours = _read(folder / "config.json", _Config), _read(folder / "preprocessor_config.json", _Processor).tvf_normalize_params[0]
    text, towers = config.text_config, {**TOWERS, **{name: size.tower for name, size in config.golden_timm_overrides.items()}}
    try:
        architecture = Architecture(
            dino=towers[DINO],
            siglip=towers[SIGLIP],
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads or text.num_attention_heads,
            rms_epsilon=text.rms_norm_eps,
            rope_theta=text.rope_theta,
            vocabulary=text.vocab_size - config.pad_to_multiple_of,
            rows=text.vocab_size,
            mean=colours.mean,
            std=colours.std,
            crop=crop,
        )
    except ValidationError as error:
        raise ValueError(f"{folder}: {_told(error)}") from error
    return Public(architecture, _action_space(folder / "dataset_statistics.json", unnorm_key, config.n_action_bins))


def read_weights(folder: Path, architecture: Architecture, bins: int) -> dict[str, Tensor]:
    """The tensors of a public checkpoint, under the names of `policies.openvla_oft`, as stored. ValueError for what is missing, or isn't safetensors.

    What the policy never uses is left out: both towers' last blocks, final norms and pooling, and all rows of the head but the actions'.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: not safetensors ({error}); no other kind of file is read") from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} is {tensor.dtype}; expected floating-point numbers")
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} is not finite everywhere; expected finite numbers")
            try:
                found.update(zip(renamed(name, architecture), _parts(name, tensor, architecture, bins), strict=False))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    return found


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, if there is one. Of the files that it may come in, only `tokenizer.json` is read."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other
        raise ValueError(f"{path}: not a tokenizer ({error}); expected what the library `tokenizers` writes") from error


def sources(folder: Path) -> list[Path]:
    """The files of which something is read."""
    weights = list(weight_files(folder))
    beside = ["config.json", "preprocessor_config.json", "dataset_statistics.json", TOKENIZER, *([] if weights == [folder / WHOLE] else [INDEX])]
    return [*(folder / name for name in beside if (folder / name).exists()), *weights]


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


def restored(name: str, public: Tensor, ours: Mapping[str, Tensor], architecture: Architecture, bins: int) -> Tensor:
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
    if not whole.exists() and not index.exists():
        merge = "; it holds an adapter, to be merged into its base first" if list(folder.glob("**/adapter_config.json")) else ""
        raise ValueError(f"{folder}: has neither {whole.name} nor {index.name}; no other kind of weights is read{merge}")
    for name in [whole.name] if whole.exists() else sorted(set(_read(index, _Index).weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map names {name!r}; expected names of .safetensors files beside it")
        yield folder / name


Model = TypeVar("Model", bound=BaseModel)


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: isn't there; expected the public layout of OpenVLA-OFT") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {_told(error)}") from error


def _told(error: ValidationError) -> str:
    """Field, value and what was expected, of each mistake."""
    found: list[str] = []
    for one in error.errors():
        field = ".".join(map(str, one["loc"])) or "it"
        value = "missing" if one["type"] == "missing" else SHORTER.repr(one["input"])
        found.append(f"{field} is {value}; {one['msg'].replace('Input should be', 'expected').removeprefix('Value error, ')}")
    return "; ".join(found)


def _action_space(path: Path, key: str | None, bins: int) -> ActionSpace:
    statistics = _read(path, RootModel[dict[str, _Dataset]]).root
    key = next(iter(statistics)) if key is None and len(statistics) == 1 else key
    if key is None or key not in statistics:
        raise ValueError(f"{path}: unnorm_key is {key!r}; expected one of {sorted(statistics)}")
    action = statistics[key].action
    mask = (True,) * ACTION_DIM if action.mask is None else action.mask
    for name, values in {"q01": action.q01, "q99": action.q99, "mask": mask}.items():
        if len(values) != ACTION_DIM:
            raise ValueError(f"{path}: {key}.action.{name} has {len(values)} entries; expected {ACTION_DIM}, one an action dimension")
    try:
        return ActionSpace(q01=action.q01, q99=action.q99, normalised=mask, chunk=CHUNK, bins=bins)
    except ValidationError as error:
        raise ValueError(f"{path}: {key}.action: {_told(error)}") from error
