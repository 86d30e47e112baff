"""Description of a public OpenVLA-OFT checkpoint: architecture and action space.

Source of the layout: openvla-oft 213c5ff, transformers 4.40.1. Only the files that `files` and
`weights` name are opened: no `auto_map` code, no pickles.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vla_opd.data.action_space import ActionSpace
from vla_opd.policies.openvla_oft.files import (
    CONFIG,
    LAYOUT,
    ActionStatistics,
    explain,
    read_image_processor,
    read_json,
    read_statistics,
)
from vla_opd.policies.openvla_oft.schema import DINO, SIGLIP, Config, Normalization

# Of LIBERO's checkpoints.
CHUNK = 8
ACTION_DIM = 7
QUESTION = "In: What action should the robot take to {instruction}?\nOut:"

# Parts with files of their own, since config.json mostly does not mention them.
UNSUPPORTED = {
    "action_head--*": (
        "an L1 or diffusion head, which predicts actions and no distribution over action tokens, "
        "so there is nothing to distill"
    ),
    "noisy_action_projector--*": (
        "a diffusion head, which predicts actions and no distribution over action tokens, "
        "so there is nothing to distill"
    ),
    "proprio_projector--*": "a projector of proprioception, stored as a pickle",
    "vision_backbone--*": (
        "vision towers modulated by the instruction (FiLM), with weights stored as a pickle"
    ),
}


class Tower(BaseModel):
    """Size of a vision transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    width: int = Field(ge=1, le=4096)
    depth: int = Field(ge=2, le=64)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Tower":
        if self.width % self.heads:
            raise ValueError(
                f"width and heads are {self.width} and {self.heads}; "
                "expected width to be a multiple of heads"
            )
        return self


TOWERS = {
    DINO: Tower(width=1024, depth=24, heads=16),
    SIGLIP: Tower(width=1152, depth=27, heads=16),
}


class Architecture(BaseModel):
    """Sizes and image preprocessing of an OpenVLA-OFT policy with discrete action tokens.

    Defaults are those of transformers 4.40.1 and timm.

    dino, siglip:   the vision towers.
    vocabulary:     number of token ids. The V action tokens are the last of them, counted down:
                    bin b is id vocabulary - 1 - b.
    rows:           of the word embedding and of the head, padding included.
    rms_epsilon:    what the checkpoints were trained with; Llama 2's is 1e-5.
    mean, std:      of DINOv2's image, per channel; SigLIP's is scaled to [-1, 1].
    crop:           fraction of the image area that is kept, around the center; 1 for a checkpoint
                    trained without random crops.
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
    def _is_consistent(self) -> "Architecture":
        if self.hidden % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError(
                "hidden, heads and key_value_heads are "
                f"{self.hidden}, {self.heads}, {self.key_value_heads}; "
                "expected hidden to be a multiple of 2 heads, and heads of key_value_heads"
            )
        if self.vocabulary > self.rows:
            raise ValueError(
                f"vocabulary and rows are {self.vocabulary}, {self.rows}; "
                "expected at least one row per id"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected numbers above 0")
        return self


class Public(NamedTuple):
    """Description of a public checkpoint."""

    architecture: Architecture
    space: ActionSpace


def read_public(folder: Path, unnorm_key: str | None, crop: float = 0.9) -> Public:
    """Read the description of a public checkpoint, without its weights.

    unnorm_key: data set of the action statistics; may be None if there is only one.
    crop:       see `Architecture`; no file states it.

    ValueError for anything but OpenVLA-OFT with discrete action tokens.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; expected a checkpoint in {LAYOUT}")
    _require_supported(folder)
    config = read_json(folder / CONFIG, Config)
    normalization = read_image_processor(folder).tvf_normalize_params[0]
    try:
        architecture = _architecture(config, normalization, crop)
    except ValidationError as error:
        raise ValueError(f"{folder}: {explain(error)}") from error
    statistics = read_statistics(folder, config, unnorm_key)
    return Public(architecture, _action_space(statistics, config.n_action_bins))


def _require_supported(folder: Path) -> None:
    for pattern, reason in UNSUPPORTED.items():
        files = sorted(path.name for path in folder.glob(pattern))
        if files:
            raise ValueError(
                f"{folder}: has {files[0]}: {reason}; "
                "expected a checkpoint with discrete action tokens and one camera"
            )


def _architecture(config: Config, normalization: Normalization, crop: float) -> Architecture:
    text = config.text_config
    return Architecture(
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
        mean=normalization.mean,
        std=normalization.std,
        crop=crop,
    )


def _tower(config: Config, name: str) -> Tower:
    size = config.golden_timm_overrides.get(name)
    if size is None:
        return TOWERS[name]
    return Tower(width=size.embed_dim, depth=size.depth, heads=size.num_heads)


def _action_space(statistics: ActionStatistics, bins: int) -> ActionSpace:
    place, action = statistics
    mask = action.mask
    if mask is None:
        mask = (True,) * ACTION_DIM
    for name, values in {"q01": action.q01, "q99": action.q99, "mask": mask}.items():
        if len(values) != ACTION_DIM:
            raise ValueError(
                f"{place}.{name} has {len(values)} entries; "
                f"expected {ACTION_DIM}, one per action dimension"
            )
    try:
        return ActionSpace(q01=action.q01, q99=action.q99, normalised=mask, chunk=CHUNK, bins=bins)
    except ValidationError as error:
        raise ValueError(f"{place}: {explain(error)}") from error
