"""`params.yaml` as frozen models: one class per section. Parsed once, never edited afterwards.

Overrides are `section.key=value` on the same schema (`load("params.yaml", ["optimize.learning_rate=1e-4"])`); there is no second schema.
"""

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vla_opd.params.rules import contradictions
from vla_opd.params.run import Params

SHORTER = reprlib.Repr()  # a few lines of YAML can name billions of values
SHORTER.maxstring = SHORTER.maxother = 200
SHORTER.maxlevel = 2


def load(path: Path | str = "params.yaml", overrides: Iterable[str] = ()) -> Params:
    """Parse `params.yaml` with `section.key=value` overrides. ValueError names the field, the value and what was expected."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(
            f"params: {source} does not exist; expected the run's params.yaml (are you in the project's folder?)"
        )
    yaml = YAML(typ="safe")
    tree = _parsed(yaml, read_text(source), str(source))
    if not isinstance(tree, dict):
        raise ValueError(
            f"params: {source} holds {type(tree).__name__}; expected one mapping of sections"
        )
    for override in overrides:
        _override(tree, override, yaml)
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error, source)) from None
    if mistakes := [f"  {mistake}" for mistake in contradictions(params)]:
        raise ValueError("\n".join([f"{source}: {len(mistakes)} mistake(s)", *mistakes]))
    return params


def read_text(path: Path) -> str:
    """A text file of a project, whatever this machine's own encoding is. ValueError names the file, the line and the byte that isn't UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} has the byte 0x{content[error.start]:02x}; expected a text in UTF-8 (save it in that encoding)"
        ) from None


def _override(tree: dict[str, Any], override: str, yaml: YAML) -> None:
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
    node[key] = _parsed(yaml, text, f"override {override!r}")


def _parsed(yaml: YAML, text: str, where: str) -> Any:
    try:
        return yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _explain(error: ValidationError, source: Path) -> str:
    lines = [f"{source}: {error.error_count()} mistake(s)"]
    for item in error.errors():
        where = ".".join(map(str, item["loc"]))
        value = (
            ""
            if item["type"] in ("missing", "value_error")
            else f" is {SHORTER.repr(item['input'])}"
        )
        hint = " (no such key)" if item["type"] == "extra_forbidden" else ""
        lines.append(f"  {where}{value}{hint}: {item['msg']}".replace("  : ", "  "))
    return "\n".join(lines)


def text(value: Any) -> str:
    """Spell a value as YAML reads it; a string is taken as it was typed."""
    return value if isinstance(value, str) else json.dumps(value)
