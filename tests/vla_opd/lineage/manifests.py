"""Artifacts that are hardly more than a manifest."""

from collections.abc import Mapping
from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Kind


def publish(folder: Path, kind: Kind, parents: Mapping[str, str], **params: object) -> str:
    """An artifact with one small file. Returns its digest."""
    with draft(folder, kind, parents, params) as work:
        with work.part("file") as path:
            path.write_text(folder.name)
        return work.publish({}).digest
