"""A run in a folder of its own, beside the run of the checkout.

A project has its own params.yaml, dvc.lock and artifacts. The checkout's code and Prefect server
are there by links. `opd new` makes a project in `runs`; the members of a study are projects, too.
"""

import os
import re
import shutil
from collections.abc import Container, Generator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows import settings
from vla_opd.artifacts.files import link
from vla_opd.artifacts.layout import ROOT
from vla_opd.artifacts.manifest import MANIFEST
from vla_opd.params.load import format_value, load, read_text

RUNS = Path("runs")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
COPIED = ("dvc.yaml", ".dvcignore")
LOCK = "dvc.lock"
PARAMS = "params.yaml"
SERVER = ".prefect"
DVC_CONFIG = "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
TRACKED = "/*\n!/.gitignore\n!/params.yaml\n!/dvc.lock\n"


@dataclass(frozen=True)
class Project:
    """A run in a folder; by default the one of this folder."""

    folder: Path = Path()

    def lay_out(self) -> None:
        """Make the project's pipeline, and its links to the code, those of this folder."""
        _write_changed(self.folder / ".dvc/config", DVC_CONFIG)
        for name in COPIED:
            _write_changed(self.folder / name, Path(name).read_text())
        Path(SERVER).mkdir(exist_ok=True)
        for name in (*code_folders(), SERVER):
            self._link(name)

    def _link(self, name: str) -> None:
        target = Path(name).resolve()
        link = self.folder / name
        if link.is_symlink() and link.resolve() != target:
            link.unlink()  # the checkout has been moved
        if not link.exists():
            link.symlink_to(target, target_is_directory=True)

    def write_params(self, text: str) -> None:
        """Write params.yaml if it differs; under a temporary name until it is valid."""
        path = self.folder / PARAMS
        if path.is_file() and path.read_text() == text:
            return
        temporary = path.with_name(f".{PARAMS}")
        temporary.write_text(text)
        load(temporary)
        temporary.rename(path)

    def read_lock(self) -> dict[str, Any]:
        """Return the entries of dvc.lock by stage; none if there is no such file."""
        path = self.folder / LOCK
        return _read_yaml(path)["stages"] if path.is_file() else {}

    def take_stages(
        self, source: "Project", stages: Container[str], *, demonstrations: bool
    ) -> None:
        """Copy some stages' artifacts and entries of dvc.lock from another project.

        Stages that this project's settings would make otherwise are left out. Files of artifacts,
        which are never written to, are linked.

        demonstrations: copy those too; their entries of dvc.lock are copied in any case.
        """
        locked = source.read_lock()
        chosen = {name: entry for name, entry in locked.items() if name in stages}
        valid = self.select_valid(chosen)
        for entry in valid.values():
            for out in _paths(entry, "outs"):
                if demonstrations or "demonstrations" not in Path(out).parts:
                    _copy_artifact(source.folder / out, self.folder / out)
        self._add_to_lock(valid)

    def _add_to_lock(self, entries: dict[str, Any]) -> None:
        """Add entries to dvc.lock, or replace them there; at once."""
        locked = self.read_lock()
        stages = {**locked, **entries}
        if stages == locked:
            return
        temporary = self.folder / f".{LOCK}"
        temporary.write_text(to_yaml({"schema": "2.0", "stages": stages}))
        temporary.rename(self.folder / LOCK)

    def select_valid(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Select entries of a dvc.lock that hold under this project's settings.

        All that they depend on has to hold, too.
        """
        tree = _read_yaml(self.folder / PARAMS)
        valid = {name: entry for name, entry in entries.items() if _matches(entry, tree)}
        stale = entries.keys() - valid.keys()
        while stale:
            outs: set[str] = set()
            for name in stale:
                outs.update(_paths(entries[name], "outs"))
            stale = set()
            for name, entry in valid.items():
                if not outs.isdisjoint(_paths(entry, "deps")):
                    stale.add(name)
            for name in stale:
                del valid[name]
        return valid


def create(name: str, source: Path, changes: Mapping[str, str]) -> Project:
    """Make the project `runs/<name>` from a file of settings, with some of them changed.

    What this folder's run has made by the same settings is linked, so it isn't made again. So are
    the tables of studies of that run, which are added to.
    ValueError for a name that is taken or is no folder's name, and for settings that are invalid.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a project; expected letters, digits, '_', '-' and '.'"
        )
    project = Project(RUNS / name)
    if (project.folder / PARAMS).exists():
        raise ValueError(
            f"{project.folder} exists; expected a new name "
            f"(to work on that project: opd run -p {project.folder})"
        )
    if not source.is_file():
        raise ValueError(f"--from {source}: no such file; expected settings, as in params.yaml")
    run = load(source, [f"{dotted}={format_value(value)}" for dotted, value in changes.items()])
    project.lay_out()
    (project.folder / ".gitignore").write_text(TRACKED)
    project.write_params(settings.apply(changes, read_text(source)))
    made_here = Project()
    project.take_stages(made_here, made_here.read_lock(), demonstrations=True)
    for table in (ROOT / run.run.name / "studies").glob("[!.]*"):
        _copy_artifact(table, project.folder / table)
    return project


@contextmanager
def entered(folder: Path | None) -> Generator[None]:
    """Work in a project's folder for the duration of the context; in this folder if it is None.

    Modules of this folder can be imported by the project's stages. ValueError if the folder is no
    project.
    """
    if folder is None:
        yield
        return
    if not (folder / PARAMS).is_file():
        present = sorted(str(path.parent) for path in RUNS.glob(f"*/{PARAMS}"))
        raise ValueError(
            f"--project {folder}: has no {PARAMS}; expected a project, as `opd new NAME` makes it "
            f"(there are: {', '.join(present) or 'none'})"
        )
    checkout = Path.cwd()
    if Path("dvc.yaml").is_file():
        Project(folder).lay_out()
    os.environ["PYTHONPATH"] = module_path(checkout)
    with chdir(folder):
        yield


def module_path(folder: Path) -> str:
    """Return a PYTHONPATH that has a folder first."""
    present = os.environ.get("PYTHONPATH")
    return f"{folder}{os.pathsep}{present}" if present else str(folder)


def relative_folder() -> Path:
    """Return this folder, relative to the checkout that its code belongs to; `.` in a checkout."""
    links = [path for path in map(Path, ("stages", "vla_opd")) if path.is_symlink()]
    if not links:
        return Path()
    checkout = links[0].resolve().parent
    return Path(os.path.relpath(Path.cwd(), checkout))


def option() -> str:
    """Return what to add to a command called in the checkout for it to work on this folder."""
    folder = relative_folder()
    return "" if folder == Path() else f" -p {folder}"


def resume_command() -> str:
    """Return the command that continues this folder's run, as called in its checkout."""
    return f"opd run{option()}" if option() else "make run"


def code_folders() -> set[str]:
    """Return the top-level folders of the code that dvc.yaml names."""
    folders: set[str] = set()
    for stage in _read_yaml(Path("dvc.yaml"))["stages"].values():
        template = stage.get("do", stage)
        for dep in template["deps"]:
            if not dep.startswith("${"):
                folders.add(Path(dep).parts[0])
    return folders - {ROOT.name}


def to_yaml(tree: dict[str, Any]) -> str:
    """Return YAML, in the order of the mapping's keys."""
    stream = StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(tree, stream)
    return stream.getvalue()


def _read_yaml(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())


def _write_changed(path: Path, text: str) -> None:
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _copy_artifact(source: Path, target: Path) -> None:
    """Copy a published artifact, by links, unless it is there already.

    It has a hidden name until it is whole, so a kill leaves no partial artifact.
    """
    published = source / MANIFEST
    copied = target / MANIFEST
    if not published.is_file():
        return
    if copied.is_file() and copied.read_bytes() == published.read_bytes():
        return
    hidden = target.with_name(f".{target.name}.taken")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.copytree(source, hidden, copy_function=_link_file)
    shutil.rmtree(target, ignore_errors=True)
    hidden.rename(target)


def _link_file(source: str, target: str) -> None:
    link(Path(source), Path(target))


def _matches(entry: dict[str, Any], tree: dict[str, Any]) -> bool:
    """Return whether settings have the values that an entry of dvc.lock was made with."""
    params = entry.get("params", {}).get(PARAMS, {})
    present = {dotted: settings.look_up(tree, dotted) for dotted in params}
    return present == params


def _paths(entry: dict[str, Any], role: str) -> list[str]:
    """Return the paths of an entry's `outs` or `deps`."""
    return [file["path"] for file in entry.get(role, ())]
