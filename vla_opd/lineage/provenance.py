"""Where an artifact's bytes came from beyond its parents: the stage and its code by dvc.lock, the commit that has this code, who ran it and when."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vla_opd.lineage.store import ROOT, Artifact
from vla_opd.machine.host import METRICS
from vla_opd.machine.tracking import CODE, Execution, ask_git, executions

LOCK = Path("dvc.lock")
COMMITS = 2000  # of the history, the newest so many are searched for an artifact's code


@dataclass(frozen=True)
class Origin:
    """How an artifact was made, as far as anyone knows.

    stage:      as DVC addresses it, e.g. `label@it003`; empty unless dvc.lock holds these very bytes at this place.
    command:    what DVC ran for it.
    code:       file or folder: md5, as dvc.lock has it.
    commit:     the commit that brought the files to exactly that; empty if no commit in the history has them.
    executions: who ran it, where and when, the last one last; those that gave this very digest.
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
    """The stages of dvc.lock by the folder that they make: each its lock entry, with its `name` and the folder's `md5`."""
    if not lock.is_file():
        return {}
    stages = YAML(typ="safe").load(lock.read_text())["stages"]
    return {
        out["path"]: entry | {"name": name, "md5": out["md5"]}
        for name, entry in stages.items()
        for out in entry["outs"]
    }


def origin(artifact: Artifact, metrics: Path = METRICS) -> Origin:
    """What dvc.lock, git and the record of executions say of an artifact."""
    ran = tuple(e for e in executions(metrics / artifact.run) if e.digest == artifact.digest)
    entry = locked_stages().get((ROOT / artifact.name).as_posix())
    if entry is None or folder_md5(artifact.folder) != entry["md5"]:
        return Origin(executions=ran)
    code = {
        dep["path"]: dep["md5"] for dep in entry["deps"] if not dep["path"].startswith(f"{ROOT}/")
    }
    return Origin(
        entry["name"],
        entry["cmd"].removeprefix("exec "),
        code,
        commit_with(tuple(sorted(code.items()))),
        ran,
    )


@cache
def commit_with(code: tuple[tuple[str, str], ...]) -> str:
    """The commit since which the files had these md5s, in the newest stretch of history where they did. Empty if the code was never committed."""
    since = ""
    try:
        commits = (
            ask_git("rev-list", "--first-parent", f"--max-count={COMMITS}", "HEAD").decode().split()
        )
    except OSError:  # no repository, or none that git lets us read
        return since
    for commit in commits:
        files = _tree(commit)
        if all(_committed_md5(files, path) == md5 for path, md5 in code):
            since = commit
        elif since:
            break
    return since


def folder_md5(folder: Path) -> str:
    """What DVC calls a folder of these bytes: the md5 of the JSON list of its files' paths and md5s."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return _listed_md5({path.relative_to(folder).as_posix(): _file_md5(path) for path in files})


def _listed_md5(files: Mapping[str, str]) -> str:
    rows = [{"md5": md5, "relpath": path} for path, md5 in sorted(files.items())]
    return f"{hashlib.md5(json.dumps(rows, sort_keys=True).encode(), usedforsecurity=False).hexdigest()}.dir"


def _committed_md5(files: Mapping[str, str], path: str) -> str:
    """Of a file or a folder of a commit, whose files are blobs by path. Empty if it isn't there."""
    if path in files:
        return _md5(files[path])
    inside = {
        file.removeprefix(f"{path}/"): _md5(blob)
        for file, blob in files.items()
        if file.startswith(f"{path}/")
    }
    return _listed_md5(inside) if inside else ""


def _file_md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


@cache
def _tree(commit: str) -> dict[str, str]:
    """File: blob."""
    lines = ask_git("ls-tree", "-r", "-z", commit, "--", *CODE).decode().split("\0")
    return {
        path: entry.split()[2]
        for entry, _, path in (line.partition("\t") for line in lines)
        if path
    }


@cache
def _md5(blob: str) -> str:
    return hashlib.md5(
        ask_git("cat-file", "blob", blob), usedforsecurity=False
    ).hexdigest()  # as DVC hashes files
