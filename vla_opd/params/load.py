"""Load `params.yaml` into frozen models, one class per section. Nothing is edited afterwards.

Overrides are `section.key=value` on the same schema, so there is no second one:
`load("params.yaml", ["optimize.learning_rate=1e-4"])`.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vla_opd.params.rules import find_contradictions
from vla_opd.params.run import Params

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_SHORT.maxother = 200
_SHORT.maxlevel = 2


def load(path: Path | str = "params.yaml", overrides: Iterable[str] = ()) -> Params:
    """Load `params.yaml` with `section.key=value` overrides.

    ValueError lists all mistakes: the field, its value and what was expected.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(
            f"params: {source} does not exist; expected the run's params.yaml "
            "(are you in the project's folder?)"
        )
    yaml = YAML(typ="safe")
    tree = _parse(yaml, read_text(source), str(source))
    if not isinstance(tree, dict):
        raise ValueError(
            f"params: {source} holds {type(tree).__name__}; expected one mapping of sections"
        )
    for override in overrides:
        _apply(override, tree, yaml)
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        mistakes = [_describe(item) for item in error.errors()]
        raise ValueError(_list_mistakes(source, mistakes)) from None
    mistakes = list(find_contradictions(params))
    if mistakes:
        raise ValueError(_list_mistakes(source, mistakes))
    return params


def read_text(path: Path) -> str:
    """Read a text file as UTF-8, whatever this machine's own encoding is.

    ValueError names the file, the line and the first byte that is not UTF-8.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(
            f"{path}: line {line} has the byte 0x{byte:02x}; "
            "expected UTF-8 text (save the file in that encoding)"
        ) from None


def format_value(value: Any) -> str:
    """Format a value as YAML; a string is returned as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def short_repr(value: Any) -> str:
    """Return a value's repr, cut short: a few lines of YAML can name billions of values."""
    return _SHORT.repr(value)


def _apply(override: str, tree: dict[str, Any], yaml: YAML) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.split(".")
    if not equals or not sections:
        raise ValueError(
            f"override {override!r}: expected section.key=value, as in optimize.learning_rate=1e-4"
        )
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {section} is not a section")
    node[key] = _parse(yaml, text, f"override {override!r}")


def _parse(yaml: YAML, text: str, where: str) -> Any:
    try:
        return yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _describe(item: Mapping[str, Any]) -> str:
    """Describe one error of pydantic's: the field, its value and what was expected."""
    field = ".".join(map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # raised by our own validators: names its fields
        return f"{field}: {message}" if field else message
    if item["type"] == "missing":
        return f"{field}: {message}"
    hint = " (no such key)" if item["type"] == "extra_forbidden" else ""
    return f"{field} is {short_repr(item['input'])}{hint}: {message}"


def _list_mistakes(source: Path, mistakes: list[str]) -> str:
    lines = [f"{source}: {len(mistakes)} mistake(s)"]
    lines += [f"  {mistake}" for mistake in mistakes]
    return "\n".join(lines)
