"""The manifest of an artifact: its kind, parents, settings, facts and files, under one digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "demonstrations", "checkpoint", "trajectories", "labels", "evaluation", "report", "study"
]
MANIFEST = "manifest.json"
FORMAT = 1


class FileEntry(BaseModel):
    """One file of an artifact. size: in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """The description of an artifact for its readers.

    digest:    sha256 of all fields except `made_with` and `seal`. Equal digests mean equal
               contents from equal inputs.
    parents:   the digest of every artifact that this one was made from, by role.
    params:    the settings that it was made with.
    facts:     what a reader needs to know about an artifact of its kind.
    made_with: package versions, graphics backend, device: provenance, not identity.
    seal:      sha256 of all other fields, including `made_with` and the digest, which reveals
               later damage and edits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    format: int
    digest: str
    parents: dict[str, str]
    params: dict[str, Any]
    facts: dict[str, Any]
    files: dict[str, FileEntry]
    made_with: dict[str, str]
    seal: str

    def with_seal(self) -> "Manifest":
        """Return a copy whose digest and seal match the contents."""
        identity = self.model_dump(exclude={"digest", "made_with", "seal"})
        digest = sha256(canonical_json(identity))
        named = self.model_copy(update={"digest": digest})
        sealed_fields = named.model_dump(exclude={"seal"})
        seal = sha256(canonical_json(sealed_fields))
        return named.model_copy(update={"seal": seal})

    def to_json(self) -> str:
        """Return the text of the manifest's file: equal manifests have equal texts."""
        return self.model_dump_json(indent=2) + "\n"


def canonical_json(value: object) -> str:
    """Return JSON that is unique for the value: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str) -> str:
    """Return the hexadecimal sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """Read a manifest without checking the artifact's files.

    ValueError if it is missing, of another kind or format, or edited since it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}; expected a complete artifact of kind {kind!r} "
            "(run the stage that makes it)"
        )
    try:
        text = path.read_text()
        manifest = Manifest.model_validate_json(text)
    except ValueError as error:  # also pydantic's and the decoder's errors
        raise ValueError(f"{path}: not a manifest of format {FORMAT}: {error}") from error
    _require_intact(manifest, kind, path)
    if text != manifest.to_json():
        raise ValueError(
            f"{path}: differs from how it was written; expected the same characters "
            "(restore the file, or make the artifact again)"
        )
    return manifest


def _require_intact(manifest: Manifest, kind: Kind, path: Path) -> None:
    original = manifest.with_seal()
    expected_values = {
        "kind": kind,
        "format": FORMAT,
        "digest": original.digest,
        "seal": original.seal,
    }
    for field, expected in expected_values.items():
        value = getattr(manifest, field)
        if value != expected:
            raise ValueError(f"{path}: {field} is {value!r}; expected {expected!r}")


def open_artifact(folder: Path, kind: Kind) -> Manifest:
    """Read a manifest and check that the folder holds exactly its files, with their sha256.

    ValueError names the first file that is wrong.
    """
    manifest = read_manifest(folder, kind)
    _require_no_stray_files(folder, manifest)
    for name, entry in manifest.files.items():
        _require_file(folder, name, entry)
    return manifest


def _require_no_stray_files(folder: Path, manifest: Manifest) -> None:
    published = {*manifest.files, MANIFEST}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in published:
            raise ValueError(
                f"{path}: not in {MANIFEST}; expected only the {len(manifest.files)} files "
                f"that were published (remove {name})"
            )


def _require_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        raise ValueError(
            f"{folder / MANIFEST}: files has {name!r}; expected a path inside the artifact"
        )
    if not path.is_file():
        raise ValueError(
            f"{path}: missing; expected {entry.size} bytes with sha256 {entry.sha256[:12]} "
            f"(see {MANIFEST})"
        )
    actual = file_entry(path)
    if actual != entry:
        raise ValueError(
            f"{path}: {actual.size} bytes with sha256 {actual.sha256[:12]}; "
            f"expected {entry.size} bytes with {entry.sha256[:12]}: it is corrupt"
        )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ; a missing key counts as None."""
    keys = dict.fromkeys([*first, *second])
    return [key for key in keys if first.get(key) != second.get(key)]


def file_entry(path: Path) -> FileEntry:
    """Measure and hash a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(size=path.stat().st_size, sha256=digest)
