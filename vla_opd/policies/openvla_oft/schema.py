"""Schemas of the small files of a public OpenVLA-OFT checkpoint.

A model has every setting that the original's numbers depend on, restricted to the values that are
implemented here. `HARMLESS` names the settings that no number depends on. Any other setting is
refused, since its effect is unknown. Spellings are those of transformers 4 and 5.

Source: openvla-oft 213c5ff; transformers 4.40.1 and 5.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator
from pydantic_core import PydanticCustomError

from vla_opd.params.load import short_repr

DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP = "vit_so400m_patch14_siglip_224"
UNKNOWN = (
    "this setting is not known; expected only settings whose effect on the policy's outputs is "
    "known (remove it if it has none)"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NAMES = _words("""
    _name_or_path architectures auto_map transformers_version hf_llm_id id2label label2id
    problem_type finetuning_task task_specific_params processor_class tokenizer_class
    image_processor_type _processor_class feature_extractor_type _commit_hash
""")

# `adopt.NAME.dtype` decides.
PRECISION = _words("torch_dtype dtype use_bfloat16")

# Text generation: all action tokens are predicted in one pass, and padding is masked.
GENERATION = _words("""
    use_cache return_dict return_dict_in_generate output_attentions output_hidden_states
    output_scores output_projector_states max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences begin_suppress_tokens suppress_tokens forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix
""")

# Unused by this architecture. Sequences are far shorter than the two maximum lengths.
UNUSED = _words("""
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal attn_implementation gradient_checkpointing output_past torchscript
    pruned_heads chunk_size_feed_forward tf_legacy_loss initializer_range
    max_position_embeddings llm_max_length
""")

TOKENIZER_SETTINGS = _words("""
    bos_token eos_token unk_token pad_token sep_token cls_token mask_token additional_special_tokens
    extra_special_tokens chat_template model_max_length padding_side truncation_side
    model_input_names clean_up_tokenization_spaces spaces_between_special_tokens
    use_default_system_prompt sp_model_kwargs legacy local_files_only verbose errors
    added_tokens_file model_specific_special_tokens max_length stride truncation_strategy
    pad_to_multiple_of pad_token_type_id name_or_path special_tokens_map_file tokenizer_file
    vocab_file use_fast backend is_local device_map
""")


class PublicFile(BaseModel):
    """A JSON object with the fields of the model, and any of the `HARMLESS` settings."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    HARMLESS: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _has_no_unknown_setting(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.HARMLESS:
                context = {"name": name, "value": short_repr(value)}
                raise PydanticCustomError("unknown_setting", UNKNOWN, context)
        return self


Half = tuple[Literal[0.5], Literal[0.5], Literal[0.5]]
Side = tuple[Literal[224], Literal[224]]
Square = Side | Literal[224]
Zero = Annotated[float, Field(ge=0, le=0)]


class Rope(PublicFile):
    """Rotary positions without scaling."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"  # spelling of transformers 4
    rope_theta: float | None = Field(default=None, gt=0)


class Text(PublicFile):
    """`text_config`: the Llama. Defaults are those of transformers 4.40.1."""

    HARMLESS = NAMES | PRECISION | GENERATION | UNUSED
    model_type: Literal["llama"] = "llama"
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    hidden_act: Literal["silu"] = "silu"
    vocab_size: int = 32064
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    attention_dropout: Zero = 0.0
    pretraining_tp: Literal[1] = 1
    tie_word_embeddings: Literal[False] = False

    @model_validator(mode="after")
    def _is_consistent(self) -> "Text":
        thetas = self._thetas()
        if len(thetas) > 1:
            raise ValueError(f"rope_theta is {sorted(thetas)} in one file; expected one value")
        width = self.hidden_size // max(1, self.num_attention_heads)
        if self.head_dim not in (None, width):
            raise ValueError(
                f"head_dim is {self.head_dim}; "
                f"expected {width}, which is hidden_size / num_attention_heads"
            )
        return self

    def _thetas(self) -> set[float]:
        """Return the values of `rope_theta` at the three places that may state it."""
        thetas = {self.rope_theta}
        for rope in (self.rope_scaling, self.rope_parameters):
            if rope is not None:
                thetas.add(rope.rope_theta)
        return {theta for theta in thetas if theta is not None}

    @property
    def theta(self) -> float:
        """The base of the rotary positions."""
        return next(iter(self._thetas()), 10000.0)


class TowerSize(PublicFile):
    """Size of a vision tower."""

    embed_dim: int
    depth: int
    num_heads: int


class Config(PublicFile):
    """`config.json`.

    golden_timm_overrides: sizes of the towers, stated only by the small checkpoint of the tests.
    """

    # The language model's own `tie_word_embeddings` decides.
    HARMLESS = NAMES | PRECISION | GENERATION | UNUSED | {"tie_word_embeddings"}
    model_type: Literal["openvla"]
    use_fused_vision_backbone: Literal[True]
    vision_backbone_id: Literal["dinosiglip-vit-so-224px"] = "dinosiglip-vit-so-224px"
    timm_model_ids: tuple[
        Literal["vit_large_patch14_reg4_dinov2.lvd142m"], Literal["vit_so400m_patch14_siglip_224"]
    ]
    timm_override_act_layers: tuple[None, None] = (None, None)
    llm_backbone_id: Literal["llama2-7b-pure"] = "llama2-7b-pure"
    arch_specifier: Literal["no-align+fused-gelu-mlp"] = "no-align+fused-gelu-mlp"
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    image_sizes: Side = (224, 224)
    n_action_bins: int = Field(default=256, ge=2, le=256)
    pad_to_multiple_of: int = Field(default=64, ge=0)
    text_config: Text = Text()
    golden_timm_overrides: dict[str, TowerSize] = Field(default_factory=dict)
    norm_stats: dict[str, Any] | None = None
    num_images_in_input: Literal[1] = 1
    use_proprio: Literal[False] = False
    use_film: Literal[False] = False
    use_l1_regression: Literal[False] = False
    use_diffusion: Literal[False] = False


class Normalization(PublicFile):
    """Mean and standard deviation per channel."""

    HARMLESS = frozenset({"inplace"})
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class HalfNormalization(PublicFile):
    """SigLIP's normalization, to [-1, 1]."""

    HARMLESS = frozenset({"inplace"})
    mean: Half  # pyright: ignore[reportInvalidTypeForm]
    std: Half  # pyright: ignore[reportInvalidTypeForm]


class Resize(PublicFile):
    """A resize to the size that images have already, so that interpolation changes nothing."""

    HARMLESS = frozenset({"interpolation", "antialias"})
    size: Square
    max_size: None = None


class Crop(PublicFile):
    """A crop that keeps all of the image."""

    output_size: Square


class Processor(PublicFile):
    """The image processor.

    The original ignores `means` and `stds`. It uses the constants stored with its transforms, which
    are rounded to bfloat16.
    """

    HARMLESS = NAMES | {"means", "stds", "interpolations", "tvf_letterbox_fill"}
    use_fused_vision_backbone: Literal[True] = True
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    input_sizes: tuple[tuple[Literal[3], Literal[224], Literal[224]], ...] = ()
    tvf_resize_params: tuple[Resize, ...] = ()
    tvf_crop_params: tuple[Crop, ...] = ()
    tvf_do_letterbox: Literal[False] = False
    tvf_normalize_params: tuple[Normalization, HalfNormalization]


class ProcessorFile(BaseModel):
    """`processor_config.json`, where newer versions of transformers keep the image processor."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    image_processor: Any = None


class AddedToken(BaseModel):
    """A token beyond the vocabulary of the tokenizer's model."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    content: str


class TokenizerConfig(PublicFile):
    """`tokenizer_config.json`: changes that transformers makes when it loads `tokenizer.json`."""

    HARMLESS = NAMES | TOKENIZER_SETTINGS
    add_bos_token: Literal[True] | None = None
    add_eos_token: Literal[False] | None = None
    add_prefix_space: Literal[True] | None = None
    do_lower_case: Literal[False] | None = None
    split_special_tokens: Literal[False] | None = None
    from_slow: Literal[False] | None = None
    added_tokens_decoder: dict[str, AddedToken] = Field(default_factory=dict)


class Action(BaseModel):
    """Action statistics of a data set; the original reads no others.

    mask: dimensions that are normalized; all of them if it is missing, as in the original.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...] | None = None


class Dataset(BaseModel):
    """Statistics of a data set."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    action: Action


class Statistics(RootModel[dict[str, Any]]):
    """`dataset_statistics.json`: data sets by name. Only the selected one is validated."""


class Index(BaseModel):
    """`model.safetensors.index.json`: the file that holds each tensor."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    weight_map: dict[str, str]
