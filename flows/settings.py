"""Changes of `params.yaml` by command: validated, then written in place; comments are kept."""

import os
import shutil
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from ruamel.yaml import YAML

from flows.prefect_server import liveness
from vla_opd.params.load import assign, format_value, load, read_text


def write(changes: Mapping[str, Any], path: Path | str = "params.yaml", run: str = "") -> None:
    """Write `{"section.key": value}` into `path`, which must be a valid run even without changes.

    run: the flow run that asks for it, if any. Nothing is written when an error is raised:
    ValueError if the result is no valid run; RuntimeError if another flow run is at work in this
    folder, whose later stages would use the new settings.
    """
    source = Path(path)
    settings = [f"{dotted}={format_value(value)}" for dotted, value in changes.items()]
    load(source, settings)
    if not changes:
        return
    before = read_text(source)
    after = apply(changes, before)
    if after == before:
        return
    others_at_work = liveness.other_living_runs(run)
    if others_at_work:
        names = ", ".join(others_at_work)
        raise RuntimeError(
            f"{path} is in use by flow run {names}; "
            "change settings after it has ended, or in another checkout"
        )
    _replace(source.resolve(), after)


def apply(changes: Mapping[str, Any], before: str) -> str:
    """Return the text of a params.yaml with changes, its comments and quotes kept."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    tree: Any = yaml.load(before)
    for dotted, value in changes.items():
        assign(tree, dotted, yaml.load(format_value(value)))
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def look_up(tree: Any, dotted: str) -> Any:
    """Return `tree["section"]["key"]` for `section.key`; None if it is missing."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _replace(path: Path, new: str) -> None:
    """Replace a file's text atomically: a kill leaves the old file whole."""
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
    """Return the changes that give the run of `path` that many iterations.

    Each new one starts from the one before; the first from the checkpoint scored as final.
    Iterations that exist stay, so nothing is repeated. ValueError if the run has more already, or
    a name is taken.
    """
    run = load(path)
    present = len(run.iterations)
    if iterations < present:
        raise ValueError(
            f"iterations is {iterations}; expected at least the {present} that {path} has "
            "(remove some there)"
        )
    if iterations == present:
        return {}
    start = run.evaluations[run.report.final]
    changes: dict[str, str] = {}
    for number in range(present + 1, iterations + 1):
        name = f"it{number:03d}"
        if name in run.iterations:
            raise ValueError(
                f"iterations: {name} is taken in {path}; "
                f"expected iterations numbered it001 ... it{present:03d}"
            )
        changes[f"iterations.{name}"] = start
        start = name
    changes[f"evaluations.{run.report.final}"] = start
    return changes
