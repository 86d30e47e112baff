"""The manifest of an artifact: its kind, parents, settings, facts and files, named by one digest; read and checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "demonstrations", "checkpoint", "trajectories", "logits", "evaluation", "report", "study"
]
MANIFEST = "manifest.json"
FORMAT = 1


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, to its reader.

    digest:  sha256 of everything below but `made_with` and `seal`: equal digests mean equal contents from equal inputs.
    parents: the digest of every artifact that it was made from, by role.
    params:  the settings that it was made under. facts: what a reader needs to know of its kind.
    made_with: package versions, graphics backend, device: provenance, not identity.
    seal:    sha256 of all the above, `made_with` and the digest included: what was damaged or edited since is not believed.
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

    def sealed(self) -> "Manifest":
        """The same with the digest and the seal that its contents have."""
        named = self.model_copy(
            update={
                "digest": sha256(
                    canonical(self.model_dump(exclude={"digest", "made_with", "seal"}))
                )
            }
        )
        return named.model_copy(
            update={"seal": sha256(canonical(named.model_dump(exclude={"seal"})))}
        )

    def text(self) -> str:
        """The contents of its file: a manifest has one spelling."""
        return self.model_dump_json(indent=2) + "\n"


def canonical(value: object) -> str:
    """JSON with one spelling: keys sorted, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str) -> str:
    """The hexadecimal sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """The manifest alone, without checking the files. ValueError if there is none, or it is of another kind or format, or not as it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}; expected a complete artifact of kind {kind!r} (run the stage that makes it)"
        )
    try:
        text = path.read_text()
        manifest = Manifest.model_validate_json(text)
    except ValueError as error:  # pydantic's and the decoder's are ValueErrors
        raise ValueError(f"{path}: not a manifest of format {FORMAT}: {error}") from error
    written = manifest.sealed()
    for field, expected in (
        ("kind", kind),
        ("format", FORMAT),
        ("digest", written.digest),
        ("seal", written.seal),
    ):
        if (found := getattr(manifest, field)) != expected:
            raise ValueError(f"{path}: {field} is {found!r}; expected {expected!r}")
    if text != manifest.text():
        raise ValueError(
            f"{path}: spelled otherwise than it was written; expected the same characters"
        )
    return manifest


def open_artifact(folder: Path, kind: Kind) -> Manifest:
    """The manifest, after checking that exactly its files are there, each with the sha256 that it says. ValueError names the first that is wrong."""
    manifest = read_manifest(folder, kind)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (name := str(path.relative_to(folder))) not in (
            *manifest.files,
            MANIFEST,
        ):
            raise ValueError(
                f"{path}: not in {MANIFEST}; expected only the {len(manifest.files)} files that were published (remove {name})"
            )
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{folder / MANIFEST}: files has {name!r}; expected a path inside the artifact"
            )
        if not path.is_file():
            raise ValueError(
                f"{path}: missing; expected {entry.size} bytes with sha256 {entry.sha256[:12]} (see {MANIFEST})"
            )
        found = file_entry(path)
        if found != entry:
            raise ValueError(
                f"{path}: {found.size} bytes with sha256 {found.sha256[:12]}; expected {entry.size} bytes with {entry.sha256[:12]}: it is corrupt"
            )
    return manifest


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return result


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the settings that differ."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with path.open("rb") as stream:
        return FileEntry(
            size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest()
        )
