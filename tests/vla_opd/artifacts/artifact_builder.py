"""Small artifacts for tests: complete, interrupted, resumed."""

from pathlib import Path

import pytest

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Kind, Manifest

PARENTS = {"student": "abc"}
PARAMS = {"steps": 3, "names": ("a", "b")}
PARTS = {"one": b"first", "two": b"second", "inner/three": b"third"}


def make(
    target: Path,
    parts: dict[str, bytes] | None = None,
    *,
    facts: dict[str, int] | None = None,
    made_with: dict[str, str] | None = None,
) -> Manifest:
    with draft(target, "labels", PARENTS, PARAMS) as work:
        for name, content in (PARTS if parts is None else parts).items():
            with work.part(name) as path:
                path.write_bytes(content)
        work.record_made_with(made_with or {})
        return work.publish(facts or {"rows": 1})


def interrupt(target: Path, done: int) -> None:
    """Finish `done` parts, and be interrupted while writing the next."""
    names = list(PARTS)
    with pytest.raises(KeyboardInterrupt), draft(target, "labels", PARENTS, PARAMS) as work:
        for name in names[:done]:
            with work.part(name) as path:
                path.write_bytes(PARTS[name])
        with work.part(names[done]) as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt


def finished(
    target: Path,
    kind: Kind = "labels",
    parents: dict[str, str] = PARENTS,
    params: dict[str, object] = PARAMS,
) -> list[str]:
    """Return the finished parts that a new attempt has."""
    with draft(target, kind, parents, params) as work:
        return [name for name in PARTS if work.has(name)]
