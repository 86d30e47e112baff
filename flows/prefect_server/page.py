"""A stage's artifact on the page of its Prefect run: a table; for the report also link and images.

It is only a view: the record is the manifest, and nothing is read back from here.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

from flows.pipeline import Step
from vla_opd.artifacts.manifest import MANIFEST, flatten
from vla_opd.lineage.store import SHORT, Artifact, read_artifact

# A drawing needs them outside of a page.
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FIGURE = re.compile(r"<figure.*?<svg(.*?</svg>).*?</figure>", re.DOTALL)
COLOURS = re.compile(r":root \{.*?\}", re.DOTALL)  # the page defines the drawings' colours


def post_outputs(step: Step) -> None:
    """Post the artifacts in a stage's outputs. A folder without a manifest posts nothing."""
    key = _key(step.name)
    for folder in map(Path, step.outs):
        if not (folder / MANIFEST).is_file():
            continue
        artifact = read_artifact(folder, folder.as_posix())
        description = f"{folder}, made by {step.name}"
        create_table_artifact(table_rows(artifact), key=key, description=description)
        if artifact.manifest.kind == "report":
            _post_report(folder / "index.html", key)


def _post_report(page: Path, key: str) -> None:
    address = page.resolve()
    create_link_artifact(address.as_uri(), link_text=str(address), key=f"{key}-page")
    text = page.read_text(encoding="utf-8")
    drawings = extract_drawings(text)
    for number, drawing in enumerate(drawings, 1):
        create_image_artifact(drawing, key=f"{key}-picture-{number}")


def table_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """Return one row for the digest, for each parent, and for each number in the facts."""
    manifest = artifact.manifest
    values: dict[str, Any] = {"digest": manifest.digest[:SHORT]}
    for role, digest in manifest.parents.items():
        values[f"parent: {role}"] = digest[:SHORT]
    facts = flatten(manifest.facts)
    for key, value in facts.items():
        is_number = isinstance(value, int | float)
        describes_policy = key.startswith("checkpoint.")
        if is_number and not describes_policy:
            values[key] = round(value, 4)
    megabytes = artifact.size / 1e6
    values["megabytes"] = round(megabytes, 2)
    return [{"what": name, "value": value} for name, value in values.items()]


def extract_drawings(page: str) -> Iterator[str]:
    """Yield a report's drawings as data URIs, so that nothing needs to be served."""
    colours = COLOURS.search(page)
    rules = colours[0] if colours else ""
    style = f"<style>{rules} svg {{ background: var(--paper); }}</style>"
    for drawing in FIGURE.findall(page):
        attributes, _, shapes = drawing.partition(">")
        svg = f"<svg {NAMESPACES}{attributes}>{style}{shapes}"
        encoded = base64.b64encode(svg.encode()).decode()
        yield f"data:image/svg+xml;base64,{encoded}"


def _key(text: str) -> str:
    """Return a key of Prefect's, which has lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
