"""What a stage leaves on the page of its Prefect run: a table of what it made; of the report also a link to the page, and its pictures.

A view for whoever looks at the run. The record is the manifest, and nothing is read back from here.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

from flows.pipeline import Step
from vla_opd.artifacts.manifest import MANIFEST, flat
from vla_opd.lineage.store import SHORT, Artifact, read_artifact

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'  # which a drawing inside a page can do without
PICTURE = re.compile(r"<figure.*?<svg(.*?</svg>).*?</figure>", re.DOTALL)
COLOURS = re.compile(r":root \{.*?\}", re.DOTALL)  # the drawings name colours that the page decides


def post(step: Step) -> None:
    """Post what the stage's outs hold. A folder without a manifest posts nothing."""
    key = _key(step.name)
    for folder in [Path(out) for out in step.outs if (Path(out) / MANIFEST).is_file()]:
        artifact = read_artifact(folder, folder.as_posix())
        create_table_artifact(rows(artifact), key=key, description=f"{folder}, made by {step.name}")
        if artifact.manifest.kind == "report":
            page = folder / "index.html"
            create_link_artifact(
                page.resolve().as_uri(), link_text=str(page.resolve()), key=f"{key}-page"
            )
            for number, picture in enumerate(pictures(page.read_text(encoding="utf-8")), 1):
                create_image_artifact(picture, key=f"{key}-picture-{number}")


def rows(artifact: Artifact) -> list[dict[str, Any]]:
    """Digest, parents, and every number that the manifest's facts have, one a row."""
    manifest = artifact.manifest
    told: list[tuple[str, Any]] = [("digest", manifest.digest[:SHORT])]
    told += [(f"parent: {role}", digest[:SHORT]) for role, digest in manifest.parents.items()]
    told += [
        (key, round(value, 4))
        for key, value in flat(manifest.facts).items()
        if isinstance(value, int | float) and not key.startswith("checkpoint.")
    ]
    told.append(("megabytes", round(artifact.size / 1e6, 2)))
    return [{"what": what, "value": value} for what, value in told]


def pictures(page: str) -> Iterator[str]:
    """The drawings of a report as addresses that hold the picture itself, so that nothing needs to be served."""
    colours = COLOURS.search(page)
    for drawing in PICTURE.findall(page):
        attributes, _, shapes = drawing.partition(">")
        style = (
            f"<style>{colours[0] if colours else ''} svg {{ background: var(--paper); }}</style>"
        )
        svg = f"<svg {NAMESPACES}{attributes}>{style}{shapes}"
        yield f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _key(text: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
