"""How an artifact was made: by which stage, with which code and commit, by whom and when.

Sources: dvc.lock, the history of git and the record of executions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vla_opd.lineage.store import ROOT, Artifact
from vla_opd.machine.host import METRICS
from vla_opd.machine.tracking import CODE, Execution, read_executions, run_git

LOCK = Path("dvc.lock")
COMMITS = 2000  # how many of the newest commits are searched for an artifact's code


@dataclass(frozen=True)
class Origin:
    """How an artifact was made, as far as that is recorded.

    stage:      its name in DVC, e.g. `label@it003`; empty unless dvc.lock has the artifact's bytes.
    command:    the command that DVC ran.
    code:       the md5 of every file or folder of code, from dvc.lock.
    commit:     the commit that gave the code these md5s; empty if no commit in the history did.
    executions: the executions that published this digest, in order.
    """

    stage: str = ""
    command: str = ""
    code: Mapping[str, str] | None = None
    commit: str = ""
    executions: tuple[Execution, ...] = ()

    @property
    def last(self) -> Execution | None:
        return self.executions[-1] if self.executions else None


@cache
def locked_stages(lock: Path = LOCK) -> dict[str, dict[str, Any]]:
    """Return the entries of dvc.lock by output folder, each with its `name` and the `md5`."""
    if not lock.is_file():
        return {}
    stages = YAML(typ="safe").load(lock.read_text())["stages"]
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in stages.items():
        for out in entry["outs"]:
            path = out["path"]
            identity = {"name": name, "md5": out["md5"]}
            entries[path] = {**entry, **identity}
    return entries


def find_origin(artifact: Artifact, metrics: Path = METRICS) -> Origin:
    """Look an artifact up in dvc.lock, git and the record of executions."""
    recorded = read_executions(metrics / artifact.run)
    published = [item for item in recorded if item.digest == artifact.digest]
    origin = Origin(executions=tuple(published))
    folder = ROOT / artifact.name
    entry = locked_stages().get(folder.as_posix())
    if entry is None or hash_folder(artifact.folder) != entry["md5"]:
        return origin
    code: dict[str, str] = {}
    for dependency in entry["deps"]:
        path = dependency["path"]
        if not path.startswith(f"{ROOT}/"):
            code[path] = dependency["md5"]
    items = tuple(sorted(code.items()))
    return replace(
        origin,
        stage=entry["name"],
        command=entry["cmd"].removeprefix("exec "),
        code=code,
        commit=find_commit(items),
    )


@cache
def find_commit(code: tuple[tuple[str, str], ...]) -> str:
    """Return the commit that gave the files these md5s, the latest time that one did.

    Empty if no commit of the first-parent history has them.
    """
    arguments = ("rev-list", "--first-parent", f"--max-count={COMMITS}", "HEAD")
    try:
        commits = run_git(*arguments).decode().split()
    except OSError:  # no repository, or none that git may read
        return ""
    earliest = ""
    for commit in commits:  # from the newest to the oldest
        blobs = _list_blobs(commit)
        if all(_hash_committed(blobs, path) == md5 for path, md5 in code):
            earliest = commit
        elif earliest:
            break
    return earliest


def hash_folder(folder: Path) -> str:
    """Return DVC's hash of a folder: the md5 of the JSON list of its files' paths and md5s."""
    hashes: dict[str, str] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            hashes[name] = _hash_file(path)
    return _hash_listing(hashes)


def _hash_listing(hashes: Mapping[str, str]) -> str:
    rows = [{"md5": hashes[path], "relpath": path} for path in sorted(hashes)]
    listing = json.dumps(rows, sort_keys=True)
    md5 = hashlib.md5(listing.encode(), usedforsecurity=False)
    return f"{md5.hexdigest()}.dir"


def _hash_file(path: Path) -> str:
    md5 = partial(hashlib.md5, usedforsecurity=False)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, md5).hexdigest()


def _hash_committed(blobs: Mapping[str, str], path: str) -> str:
    """Hash a file or folder of a commit as DVC does. Empty if the commit does not have it."""
    if path in blobs:
        return _hash_blob(blobs[path])
    prefix = f"{path}/"
    hashes: dict[str, str] = {}
    for file, blob in blobs.items():
        if file.startswith(prefix):
            hashes[file.removeprefix(prefix)] = _hash_blob(blob)
    return _hash_listing(hashes) if hashes else ""


@cache
def _list_blobs(commit: str) -> dict[str, str]:
    """Return git's blob of every file of code in a commit."""
    blobs: dict[str, str] = {}
    listing = run_git("ls-tree", "-r", "-z", commit, "--", *CODE).decode()
    for line in listing.split("\0"):
        entry, _, path = line.partition("\t")
        if path:
            _mode, _type, blob = entry.split()
            blobs[path] = blob
    return blobs


@cache
def _hash_blob(blob: str) -> str:
    content = run_git("cat-file", "blob", blob)
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
