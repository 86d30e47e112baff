"""The small files of a public OpenVLA-OFT checkpoint, read by one rule: a setting that changes the numbers is honoured or refused by its name.

Each model below names every setting that the original's numbers depend on, with the values that are computed here; `HARMLESS` names those that
they don't depend on. What is in neither is refused, since nobody knows. Spellings are those of transformers 4 and 5.
Source: openvla-oft 213c5ff; transformers 4.40.1 and 5.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from tokenizers import Tokenizer

from vla_opd.params.load import short_repr

CONFIG, STATISTICS = "config.json", "dataset_statistics.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"

POINTERS = {
    b"version https://git-lfs": "git-lfs",
    b"# xet version": "Xet",
}  # how a pointer file begins, and whose it is
LAYOUT = "expected the public layout of OpenVLA-OFT"
UNKNOWN = "unknown here; expected only settings whose effect on the policy's numbers is known (remove it if they don't depend on it)"

LABELS = frozenset(
    {
        *(
            "_name_or_path",
            "architectures",
            "auto_map",
            "transformers_version",
            "hf_llm_id",
            "id2label",
            "label2id",
            "problem_type",
        ),
        *(
            "finetuning_task",
            "task_specific_params",
            "processor_class",
            "tokenizer_class",
            "image_processor_type",
            "_processor_class",
        ),
        *("feature_extractor_type", "_commit_hash"),
    }
)
"""Settings that name something."""

PRECISION = frozenset({"torch_dtype", "dtype", "use_bfloat16"})
"""Settings of precision: here `adopt.NAME.dtype` decides."""

GENERATION = frozenset(
    {
        *(
            "use_cache",
            "return_dict",
            "return_dict_in_generate",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
        ),
        *(
            "output_projector_states",
            "max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
        ),
        *(
            "diversity_penalty",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "length_penalty",
        ),
        *(
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "num_return_sequences",
            "begin_suppress_tokens",
        ),
        *(
            "suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "remove_invalid_values",
            "exponential_decay_length_penalty",
        ),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "prefix",
        ),
    }
)
"""Settings of text generation: all action tokens are answered in one pass, and padding is masked."""

UNUSED = frozenset(
    {
        *(
            "is_encoder_decoder",
            "is_decoder",
            "add_cross_attention",
            "cross_attention_hidden_size",
            "tie_encoder_decoder",
        ),
        *(
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "attn_implementation",
        ),
        *(
            "gradient_checkpointing",
            "output_past",
            "torchscript",
            "pruned_heads",
            "chunk_size_feed_forward",
            "tf_legacy_loss",
            "initializer_range",
        ),
        *("max_position_embeddings", "llm_max_length"),  # sequences are far shorter
    }
)
"""Settings that this architecture doesn't use."""


class PublicFile(BaseModel):
    """A JSON object whose settings are the fields of the model. Beside them there may be `HARMLESS` ones; any other is an error."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    HARMLESS: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.HARMLESS:
                raise PydanticCustomError(
                    "unknown_setting", UNKNOWN, {"name": name, "value": short_repr(value)}
                )
        return self


Half = tuple[Literal[0.5], Literal[0.5], Literal[0.5]]
Side = tuple[Literal[224], Literal[224]]
Square = Side | Literal[224]
Zero = Annotated[float, Field(ge=0, le=0)]


class Rope(PublicFile):
    """Rotary positions. Scaled ones are another policy."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"  # as transformers 4 spelled it
    rope_theta: float | None = Field(default=None, gt=0)


class Text(PublicFile):
    """`text_config`: the Llama. Defaults are those of transformers 4.40.1."""

    HARMLESS = LABELS | PRECISION | GENERATION | UNUSED
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
    def _agrees_with_itself(self) -> "Text":
        thetas = {*self._thetas()}
        if len(thetas) > 1:
            raise ValueError(f"rope_theta is {sorted(thetas)} in one file; expected one value")
        width = self.hidden_size // max(1, self.num_attention_heads)
        if self.head_dim not in (None, width):
            raise ValueError(
                f"head_dim is {self.head_dim}; expected {width}, which is hidden_size / num_attention_heads"
            )
        return self

    def _thetas(self) -> list[float]:
        told = [
            self.rope_theta,
            *(
                rope.rope_theta
                for rope in (self.rope_scaling, self.rope_parameters)
                if rope is not None
            ),
        ]
        return [theta for theta in told if theta is not None]

    @property
    def theta(self) -> float:
        """The base of the rotary positions, wherever the file says it."""
        return next(iter(self._thetas()), 10000.0)


class Size(PublicFile):
    """How large a vision tower is."""

    embed_dim: int
    depth: int
    num_heads: int


class Config(PublicFile):
    """`config.json`. golden_timm_overrides: of a checkpoint that was made small for tests; only that says how large its towers are."""

    HARMLESS = (
        LABELS | PRECISION | GENERATION | UNUSED | {"tie_word_embeddings"}
    )  # the language model's own setting decides
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
    golden_timm_overrides: dict[str, Size] = Field(default_factory=dict)
    norm_stats: dict[str, Any] | None = None
    num_images_in_input: Literal[1] = 1
    use_proprio: Literal[False] = False
    use_film: Literal[False] = False
    use_l1_regression: Literal[False] = False
    use_diffusion: Literal[False] = False


class Normalisation(PublicFile):
    """Mean and standard deviation per channel."""

    HARMLESS = frozenset({"inplace"})
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class HalfNormalisation(PublicFile):
    """SigLIP's: to [-1, 1]."""

    HARMLESS = frozenset({"inplace"})
    mean: Half  # pyright: ignore[reportInvalidTypeForm]
    std: Half  # pyright: ignore[reportInvalidTypeForm]


class Resize(PublicFile):
    """To the size that pictures have already, so that the interpolation does nothing."""

    HARMLESS = frozenset({"interpolation", "antialias"})
    size: Square
    max_size: None = None


class Crop(PublicFile):
    """The whole picture."""

    output_size: Square


class Processor(PublicFile):
    """The image processor. The original uses the constants that it stored of its transforms, rounded to bfloat16, not `means` and `stds`."""

    HARMLESS = LABELS | {"means", "stds", "interpolations", "tvf_letterbox_fill"}
    use_fused_vision_backbone: Literal[True] = True
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    input_sizes: tuple[tuple[Literal[3], Literal[224], Literal[224]], ...] = ()
    tvf_resize_params: tuple[Resize, ...] = ()
    tvf_crop_params: tuple[Crop, ...] = ()
    tvf_do_letterbox: Literal[False] = False
    tvf_normalize_params: tuple[Normalisation, HalfNormalisation]


class ProcessorFile(BaseModel):
    """`processor_config.json`, in which newer versions of transformers keep the image processor."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    image_processor: Any = None


class AddedToken(BaseModel):
    """A token that is in no model of the tokenizer."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    content: str


class TokenizerConfig(PublicFile):
    """`tokenizer_config.json`: what transformers changes of `tokenizer.json` as it loads it."""

    HARMLESS = LABELS | {
        *(
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "sep_token",
            "cls_token",
            "mask_token",
            "additional_special_tokens",
        ),
        *(
            "extra_special_tokens",
            "chat_template",
            "model_max_length",
            "padding_side",
            "truncation_side",
            "model_input_names",
        ),
        *(
            "clean_up_tokenization_spaces",
            "spaces_between_special_tokens",
            "use_default_system_prompt",
            "sp_model_kwargs",
            "legacy",
        ),
        *(
            "local_files_only",
            "verbose",
            "errors",
            "added_tokens_file",
            "model_specific_special_tokens",
        ),
        *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id"),
        *(
            "name_or_path",
            "special_tokens_map_file",
            "tokenizer_file",
            "vocab_file",
            "use_fast",
            "backend",
            "is_local",
            "device_map",
        ),
    }
    add_bos_token: Literal[True] | None = None
    add_eos_token: Literal[False] | None = None
    add_prefix_space: Literal[True] | None = None
    do_lower_case: Literal[False] | None = None
    split_special_tokens: Literal[False] | None = None
    from_slow: Literal[False] | None = None
    added_tokens_decoder: dict[str, AddedToken] = Field(default_factory=dict)


class Action(BaseModel):
    """A data set's action statistics. mask: which dimensions are normalised; all of them, as in the original, if it isn't there."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, strict=True
    )  # the original reads no more of it
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...] | None = None


class Dataset(BaseModel):
    """A data set's statistics, of which only those of its actions are used."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    action: Action


class Statistics(RootModel[dict[str, Any]]):
    """`dataset_statistics.json`: of each data set, by its name. Only the one that is asked for is looked into."""


class Index(BaseModel):
    """Which file holds which tensor."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    weight_map: dict[str, str]


Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, model: type[Model]) -> Model:
    """A JSON file as a model. ValueError names the file, the setting, its value and what was expected."""
    require_file(path)
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error


def validate(found: Any, model: type[Model], file: str, setting: str) -> Model:
    """The value of a setting in a JSON file as a model. ValueError as of `read_json`."""
    try:
        return model.model_validate_json(json.dumps(found))  # as JSON: a list is a tuple there
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error, setting)}") from error


def is_there(path: Path) -> bool:
    """Whether a folder has such an entry, be it a link to nowhere: that is a download that failed, not a file that nobody wrote."""
    return os.path.lexists(path)


def require_file(path: Path, why: str = LAYOUT) -> None:
    """ValueError for what isn't a file that can be read, or stands for one that wasn't downloaded."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: missing; {why}") from None
    except OSError as error:
        raise ValueError(
            f"{path}: can't be read ({error.strerror}); expected a file that you may read"
        ) from error
    for beginning, kind in POINTERS.items():
        if start.startswith(beginning):
            raise ValueError(
                f"{path}: is a {kind} pointer, not the file; expected the file that it stands for (download it, e.g. `git lfs pull`)"
            )


def read_image_processor(folder: Path) -> Processor:
    """The image processor, from whichever of the two files holds it. ValueError if they disagree."""
    own, shared = folder / PREPROCESSOR, folder / PROCESSOR
    found = read_json(shared, ProcessorFile).image_processor if is_there(shared) else None
    if found is None:
        return read_json(own, Processor)
    processor = validate(found, Processor, str(shared), "image_processor")
    if is_there(own) and _settings(read_json(own, Processor)) != _settings(processor):
        raise ValueError(
            f"{shared}: its image_processor says other things than {own.name}; expected one of them, or the same in both"
        )
    return processor


def _settings(processor: Processor) -> dict[str, Any]:
    return processor.model_dump(include=set(Processor.model_fields))


def read_statistics(folder: Path, config: Config, key: str | None) -> tuple[str, Action]:
    """Where the statistics of the actions stand, and what they are. They lie beside the weights, or else in `config.json`.

    What `config.json` holds of a fine-tuned checkpoint is mostly the pretraining's: as in the original, a file beside the weights replaces it.
    """
    path = folder / STATISTICS
    if is_there(path) or not config.norm_stats:
        statistics = read_json(path, Statistics).root
    else:
        path, statistics = folder / CONFIG, config.norm_stats
    if key is None and len(statistics) == 1:
        key = next(iter(statistics))
    if key is None or key not in statistics:
        raise ValueError(f"{path}: unnorm_key is {key!r}; expected one of {sorted(statistics)}")
    return f"{path}: {key}.action", validate(statistics[key], Dataset, str(path), key).action


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, if there is one, as transformers would load it: never truncating, never padding."""
    path = folder / TOKENIZER
    if not is_there(path):
        return None
    require_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other
        raise ValueError(
            f"{path}: not a tokenizer ({error}); expected what the library `tokenizers` writes"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _require_no_changes(folder / TOKENIZER_CONFIG, tokenizer)
    return tokenizer


def _require_no_changes(path: Path, tokenizer: Tokenizer) -> None:
    """ValueError for settings by which transformers would encode otherwise than `tokenizer.json` says."""
    if not is_there(path):
        return
    for token_id, token in read_json(path, TokenizerConfig).added_tokens_decoder.items():
        here = tokenizer.token_to_id(token.content)
        if str(here) != token_id:
            known = (
                f"its id in {TOKENIZER} is {here}"
                if here is not None
                else f"it isn't in {TOKENIZER}"
            )
            raise ValueError(
                f"{path}: added_tokens_decoder.{token_id} is {token.content!r}; expected the same id in both files, but {known}"
            )


def explain(error: ValidationError, *outer: str) -> str:
    """Setting, value and what was expected, of each mistake. outer: the settings that what was validated is the value of."""
    return "; ".join(_mistake(one, outer) for one in error.errors())


def _mistake(one: Any, outer: tuple[str, ...]) -> str:
    place = [*outer, *map(str, one["loc"])]
    value = short_repr(one["input"])
    if one["type"] == "json_invalid":
        return f"isn't JSON ({one['ctx']['error']}); expected a JSON object"
    if one["type"] == "missing":
        return f"{'.'.join(place)} is missing; expected a value"
    if one["type"] == "unknown_setting":
        place.append(one["ctx"]["name"])
        value = one["ctx"]["value"]
    expected = one["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return f"{'.'.join(place) or 'it'} is {value}; {expected}"
