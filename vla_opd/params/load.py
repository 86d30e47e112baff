"""Load `params.yaml` into frozen models, one class per section. Nothing is edited afterwards.

Overrides are `section.key=value` on the same schema, so there is no second one:
`load("params.yaml", ["optimize.learning_rate=1e-4"])`.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vla_opd.params.recorded import show_new_spelling
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


def assign(tree: MutableMapping[str, Any], dotted: str, value: Any) -> None:
    """Set `tree[section][key]` for `section.key`; sections that are missing are added.

    An objective given by its name alone becomes a mapping, so that its options can be set.
    ValueError names a part that has no keys.
    """
    *sections, key = dotted.split(".")
    node = tree
    for section in sections:
        content = node.setdefault(section, {})
        if section == "objective" and isinstance(content, str):
            node[section] = {"name": content}
        node = node[section]
        if not isinstance(node, MutableMapping):
            raise ValueError(f"{dotted}: {section} is not a section")
    node[key] = value


def _apply(override: str, tree: dict[str, Any], yaml: YAML) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or "." not in dotted:
        raise ValueError(
            f"override {override!r}: expected section.key=value, as in optimize.learning_rate=1e-4"
        )
    assign(tree, dotted, _parse(yaml, text, f"override {override!r}"))


def _parse(yaml: YAML, text: str, where: str) -> Any:
    try:
        return yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _describe(item: Mapping[str, Any]) -> str:
    """Describe one error of pydantic's: the field, its value and what was expected."""
    location = list(map(str, item["loc"]))
    objective = None
    if location[:2] == ["optimize", "objective"] and len(location) > 2:
        objective = location.pop(2)  # whose model pydantic chose
    field = ".".join(location)
    value = item["input"]
    message = item["msg"].removeprefix("Value error, ")
    match item["type"]:
        case "value_error":  # raised by our own validators: names its fields
            return f"{field}: {message}" if field else message
        case "missing":
            return f"{field}: {message}"
        case "union_tag_invalid":
            context = item["ctx"]
            return f"{field} is {context['tag']!r}; expected one of {context['expected_tags']}"
        case "extra_forbidden":
            return _describe_unknown_key(field, value, objective)
        case _:
            return f"{field} is {short_repr(value)}: {message}"


def _describe_unknown_key(field: str, value: Any, objective: str | None) -> str:
    spelling = show_new_spelling(field, value)
    if spelling is not None:
        return f"{field} moved: write `{spelling}`"
    if objective is not None:
        return (
            f"{field} is {short_repr(value)}, but {objective} has no such option "
            f"(remove it, or write `objective: {objective}`, which replaces name and options)"
        )
    return f"{field} is {short_repr(value)} (no such key): Extra inputs are not permitted"


def _list_mistakes(source: Path, mistakes: list[str]) -> str:
    lines = [f"{source}: {len(mistakes)} mistake(s)"]
    lines += [f"  {mistake}" for mistake in mistakes]
    return "\n".join(lines)
