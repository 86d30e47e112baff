"""`params.yaml`, changed by command: validated first, then written in place with its comments kept."""

import os
import shutil
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, Field, WithJsonSchema, create_model
from ruamel.yaml import YAML

from flows.prefect_server import liveness
from vla_opd.params.load import load, read_text, text
from vla_opd.params.run import Params
from vla_opd.params.section import Section


def _fields() -> Iterator[tuple[str, Any]]:
    """`section.key` for every key of every section of the schema that has fixed keys, with the key's own type and constraints."""
    for section, field in Params.model_fields.items():
        annotated = (
            ()
            if get_origin(field.annotation) is Mapping
            else (field.annotation, *get_args(field.annotation))
        )  # of a mapping the keys are free
        kinds = [kind for kind in annotated if isinstance(kind, type) and issubclass(kind, Section)]
        for key, info in kinds[0].model_fields.items() if kinds else ():
            kind = (
                Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            )
            yield (
                f"{section}__{key}",
                (
                    kind,
                    Field(
                        default=None,
                        alias=f"{section}.{key}",
                        title=f"{section}.{key}",
                        description=info.description,
                    ),
                ),
            )


_MODEL = create_model("Settings", __base__=Section, **dict(_fields()))


def _checked(changes: dict[str, Any]) -> dict[str, Any]:
    return _MODEL.model_validate(changes).model_dump(mode="json", by_alias=True, exclude_unset=True)


Settings = Annotated[
    dict[str, Any], WithJsonSchema(_MODEL.model_json_schema()), AfterValidator(_checked)
]
"""`{"section.key": value}`, as a type: its JSON schema is made from that of params.yaml, so a wrong one is refused before there is a run."""


def write(changes: Mapping[str, Any], path: Path | str = "params.yaml", run: str = "") -> None:
    """Write `{"section.key": value}` into `path`, which must be a valid run even without changes.

    Nothing is written, and it's a ValueError, if the result isn't a valid run; a RuntimeError, if another flow run than `run` is at work here: its
    later stages would be made with settings that are not its own.
    """
    source = Path(path)
    load(source, [f"{dotted}={text(value)}" for dotted, value in changes.items()])
    if not changes:
        return
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    before = read_text(source)
    tree: Any = yaml.load(before)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = yaml.load(text(value))
    new = StringIO()
    yaml.dump(tree, new)
    if new.getvalue() == before:
        return
    if others := liveness.others(run):
        raise RuntimeError(
            f"{path} is in use by flow run {', '.join(others)}; expected other settings once that has ended, or in another checkout"
        )
    _replace(source.resolve(), new.getvalue())


def _replace(path: Path, new: str) -> None:
    """Give the file a new text at once: whoever is killed meanwhile leaves the old one whole."""
    with NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
            shutil.copymode(path, file.name)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def extension(iterations: int, path: Path | str = "params.yaml") -> dict[str, str]:
    """The changes that give the run of `path` so many iterations: each goes on from the one before, the first from the checkpoint scored as final.

    What is there stays, so nothing is repeated. ValueError if the run has more already, or a name is taken.
    """
    run = load(path)
    there = len(run.iterations)
    if iterations < there:
        raise ValueError(
            f"iterations is {iterations}; expected at least the {there} that {path} has (take some out there)"
        )
    tip, changes = run.evaluations[run.report.final], dict[str, str]()
    for number in range(there + 1, iterations + 1):
        name = f"it{number:03d}"
        if name in run.iterations:
            raise ValueError(
                f"iterations: {name} is taken in {path}; expected iterations numbered it001 ... it{there:03d}"
            )
        changes[f"iterations.{name}"] = tip
        tip = name
    return changes | {f"evaluations.{run.report.final}": tip} if changes else {}
