"""`params.yaml`, changed by command: validated first, then written in place with its comments kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vla_opd import params


def write(changes: Mapping[str, Any], path: Path | str = "params.yaml") -> None:
    """Write `{"section.key": value}` into `path`, which must be a valid run even without changes.

    ValueError, and nothing is written, if the result isn't a valid run.
    """
    source = Path(path)
    params.load(source, [f"{dotted}={_text(value)}" for dotted, value in changes.items()])
    if not changes:
        return
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    tree: Any = yaml.load(source.read_text())
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = yaml.load(_text(value))
    with source.open("w") as file:
        yaml.dump(tree, file)


def _text(value: Any) -> str:
    """A value as YAML reads it; text is taken as it was typed."""
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
