"""Read the small files of a public OpenVLA-OFT checkpoint: JSON, statistics, tokenizer."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer

from vla_opd.params.load import short_repr
from vla_opd.policies.openvla_oft.schema import (
    Action,
    Config,
    Dataset,
    Processor,
    ProcessorFile,
    Statistics,
    TokenizerConfig,
)

CONFIG = "config.json"
STATISTICS = "dataset_statistics.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

LAYOUT = "the public layout of OpenVLA-OFT"
POINTERS = {  # how the pointer files of large-file stores begin
    b"version https://git-lfs": "git-lfs",
    b"# xet version": "Xet",
}

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, model: type[Model]) -> Model:
    """Read a JSON file as a model.

    ValueError names the file, the setting, its value and what was expected.
    """
    require_file(path)
    return _validate(path.read_bytes(), model, path)


def _validate(text: str | bytes, model: type[Model], path: Path, *outer: str) -> Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, *outer)}") from error


def exists(path: Path) -> bool:
    """Return whether a folder has this entry.

    A dangling link counts: it is a download that failed, not a file that was never written.
    """
    return os.path.lexists(path)


def require_file(path: Path, expected: str = LAYOUT) -> None:
    """ValueError unless this is a readable file, and not the pointer of a large-file store."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: missing; expected {expected}") from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); expected a readable file"
        ) from error
    for beginning, store in POINTERS.items():
        if start.startswith(beginning):
            raise ValueError(
                f"{path}: is a {store} pointer; "
                "expected the file it points to (download it, e.g. with `git lfs pull`)"
            )


def read_image_processor(folder: Path) -> Processor:
    """Read the image processor from either of the files that may hold it.

    ValueError if both do and they disagree.
    """
    old = folder / PREPROCESSOR
    new = folder / PROCESSOR
    settings = None
    if exists(new):
        settings = read_json(new, ProcessorFile).image_processor
    if settings is None:
        return read_json(old, Processor)
    # As JSON, because a strict model takes no list for a tuple.
    processor = _validate(json.dumps(settings), Processor, new, "image_processor")
    if exists(old) and _known_settings(read_json(old, Processor)) != _known_settings(processor):
        raise ValueError(
            f"{new}: image_processor differs from {old.name}; "
            "expected the same settings in both files, or only one of them"
        )
    return processor


def _known_settings(processor: Processor) -> dict[str, Any]:
    return processor.model_dump(include=set(Processor.model_fields))


class ActionStatistics(NamedTuple):
    """Action statistics, and their file and setting, for messages."""

    place: str
    action: Action


def read_statistics(folder: Path, config: Config, key: str | None) -> ActionStatistics:
    """Read the action statistics of the data set `key`, which may be None if there is only one.

    A file beside the weights takes precedence over `config.json`, as in the original: in a
    fine-tuned checkpoint the latter mostly holds the statistics of the pretraining.
    """
    path = folder / STATISTICS
    if exists(path) or not config.norm_stats:
        statistics = read_json(path, Statistics).root
    else:
        path = folder / CONFIG
        statistics = config.norm_stats
    if key is None and len(statistics) == 1:
        key = next(iter(statistics))
    if key is None or key not in statistics:
        names = sorted(statistics)
        raise ValueError(f"{path}: unnorm_key is {key!r}; expected one of {names}")
    text = json.dumps(statistics[key])
    dataset = _validate(text, Dataset, path, key)
    return ActionStatistics(f"{path}: {key}.action", dataset.action)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the checkpoint's tokenizer as transformers would, without truncation or padding.

    Return None if it has none.
    """
    path = folder / TOKENIZER
    if not exists(path):
        return None
    require_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no more specific exception
        raise ValueError(
            f"{path}: not a tokenizer ({error}); expected a file of the library `tokenizers`"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _require_same_encoding(folder / TOKENIZER_CONFIG, tokenizer)
    return tokenizer


def _require_same_encoding(path: Path, tokenizer: Tokenizer) -> None:
    """ValueError for settings with which transformers would not encode as `tokenizer.json` does."""
    if not exists(path):
        return
    for token_id, token in read_json(path, TokenizerConfig).added_tokens_decoder.items():
        expected_id = tokenizer.token_to_id(token.content)
        if str(expected_id) != token_id:
            raise ValueError(
                f"{path}: added_tokens_decoder.{token_id} is {token.content!r}; "
                f"expected the id that it has in {TOKENIZER}, {expected_id}"
            )


def explain(error: ValidationError, *outer: str) -> str:
    """Name setting, value and what was expected, for each mistake.

    outer: the path of settings to the validated value.
    """
    mistakes = [_explain_mistake(mistake, outer) for mistake in error.errors()]
    return "; ".join(mistakes)


def _explain_mistake(mistake: Any, outer: tuple[str, ...]) -> str:
    kind = mistake["type"]
    context = mistake.get("ctx", {})
    path = [*outer, *map(str, mistake["loc"])]
    value = short_repr(mistake["input"])
    if kind == "json_invalid":
        return f"is not JSON ({context['error']}); expected a JSON object"
    if kind == "unknown_setting":
        path.append(context["name"])
        value = context["value"]
    setting = ".".join(path)
    if kind == "missing":
        return f"{setting} is missing; expected a value"
    message = mistake["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return f"{setting or 'the content'} is {value}; {message}"
