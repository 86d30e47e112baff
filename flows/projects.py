"""The members of a study: for each arm and seed a project of its own, cloned from this one at its reference.

A member lies in `artifacts/.studies/<study>/<arm>/<seed>`, with its own params.yaml, dvc.lock and artifacts, and this project's code. What can be
done with a run can be done with it, from its folder: `dvc repro`, `opd run`, `opd lineage`.
"""

import os
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vla_opd.analysis.finished_run import DISCARDED
from vla_opd.analysis.study_table import read
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import MANIFEST, canonical, read_manifest, sha256
from vla_opd.lineage.store import ROOT
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import START
from vla_opd.params.study import StudyParams

STUDIES = ROOT / ".studies"
COPIED = ("dvc.yaml", ".dvcignore")
LOCK = "dvc.lock"
DONE = ".done"  # in a member's folder, while its last process has come to its end: the fingerprint of what it is made from
MADE_BEFORE = (
    "demonstrations",
    "pretrained",
    "finetuned",
    "adopt",
)  # the sections of what is there before a member
TABLE = "table"  # in a member's folder: its rows of the study's table


@dataclass(frozen=True)
class Member:
    """One arm with one seed of a study of this folder's run."""

    study: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return STUDIES / self.study / self.arm / str(self.seed)

    def before(self, study: StudyParams) -> "Member | None":
        """The member that it goes on from."""
        after = study.arms[self.arm].after
        return None if after is None else Member(self.study, after, self.seed)

    def lineage(self, study: StudyParams) -> "list[Member]":
        """Itself, and all that it goes on from."""
        before = self.before(study)
        return [self, *(before.lineage(study) if before else [])]

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def members(
    study: str, run: Params, arms: Iterable[str] = (), seeds: Iterable[int] = ()
) -> tuple[Member, ...]:
    """The members, seed by seed, so that a study that was stopped has all arms of some seeds. ValueError names an unknown arm or seed."""
    if study not in run.studies:
        raise ValueError(f"studies has no {study!r}; expected one of {sorted(run.studies)}")
    if run.evaluate.decide is not None:
        raise ValueError(
            f"evaluate.decide is {list(run.evaluate.decide)}; expected null in a study: its evaluations are compared episode by episode"
        )
    if run.label.teacher not in run.origins:
        raise ValueError(
            f"label.teacher is {run.label.teacher!r}; expected one of {sorted(run.origins)}: what iterations make, members don't share"
        )
    its = run.studies[study]
    wanted_arms, wanted_seeds = list(arms) or list(its.arms), list(seeds) or list(its.seeds)
    for field, wanted, known in (
        ("arms", wanted_arms, list(its.arms)),
        ("seeds", wanted_seeds, list(its.seeds)),
    ):
        if unknown := [one for one in wanted if one not in known]:
            raise ValueError(
                f"studies.{study}.{field} has no {unknown[0]!r}; expected some of {known}"
            )
    return tuple(Member(study, arm, seed) for seed in wanted_seeds for arm in wanted_arms)


def reference(run: Params) -> list[str]:
    """The stages of the run that all members share: what no iteration makes, and the evaluations of it."""
    return [*run.origins.values(), *(f"evaluate@{name}" for name in run.reference)]


def prepare(member: Member, run: Params) -> Path:
    """Lay the member's folder out, or bring it up to this project's settings; what it has made stays. Returns the folder.

    ValueError if the arm's settings make no valid run.
    """
    folder = member.folder
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    (folder / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
    )
    for name in COPIED:
        shutil.copyfile(name, folder / name)
    for package in _code():
        (folder / package).unlink(missing_ok=True)  # it may lead to where this project was before
        (folder / package).symlink_to(Path(package).resolve(), target_is_directory=True)
    _settings(member, run)
    return folder


def hand_over(member: Member, run: Params) -> None:
    """Give a prepared member the reference: copies of what it made, and what dvc.lock says of how."""
    _take(
        Path(), member.folder, _handed(run), data=run.studies[member.study].own_student(member.arm)
    )


def _handed(run: Params) -> set[str]:
    return {*reference(run), *(f"demonstrate@{name}" for name in run.demonstrations)}


def go_on(member: Member, run: Params) -> None:
    """Give a prepared member all that the one before it, if there is one, has made, and what is known of discarded rollouts.

    ValueError if where to switch is a question of what that one made, and it isn't done.
    """
    study = run.studies[member.study]
    if (before := member.before(study)) is None:
        return
    if study.arms[member.arm].switch is not None:
        if not is_done(before, run):
            raise ValueError(
                f"{member} switches by the rollouts of {before}, which isn't done; expected it first"
            )
        _settings(member, run)  # where it switches is known by now
    source, target = before.folder, member.folder
    theirs = _locked(source / LOCK)
    own = (
        theirs.keys()
        - _holding(
            {name: entry for name, entry in theirs.items() if name in _handed(run)},
            _parsed(target / "params.yaml"),
        ).keys()
    )
    _take(source, target, own, data=True)
    known = ROOT / run.run.name / DISCARDED
    if (source / known).is_dir():
        shutil.copytree(source / known, target / known, dirs_exist_ok=True)


def fingerprint(member: Member, run: Params) -> str:
    """Of what a member is made from: its settings, and the checkpoints of the reference."""
    made = [ROOT / run.run.name / "checkpoints" / name for name in run.origins]
    digests = [
        read_manifest(folder, "checkpoint").digest
        for folder in made
        if (folder / MANIFEST).is_file()
    ]
    return sha256(canonical([_yaml(tree(member, run)), digests]))


def environment(member: Member, run: Params, parallel: int) -> dict[str, str | None]:
    """What a member's process is told: its share of the cores, where this folder's modules are, and what W&B is to call its runs."""
    cores = len(os.sched_getaffinity(0))
    return {
        "OPD_WORKERS": os.environ.get("OPD_WORKERS") or str(max(1, cores // parallel)),
        "PYTHONPATH": os.pathsep.join(
            [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "WANDB_RUN_GROUP": f"{run.run.name}/{member.study}/{member.arm}/{member.seed}",
    }


def crowded(run: Params, parallel: int) -> str | None:
    """What to say if members at the same time would fight for the cores: threads are a setting, for results depend on them, and aren't shared out."""
    cores, threads = (
        len(os.sched_getaffinity(0)),
        {
            f"{name}.threads": getattr(run, name).threads
            for name in ("label", "optimize", "reinforce")
        },
    )
    if parallel == 1 or max(threads.values()) * parallel <= cores:
        return None
    told = ", ".join(f"{field} is {count}" for field, count in threads.items())
    return f"{parallel} members at the same time on {cores} cores, but {told}: they get in each other's way. Expect less of it than of --parallel 1"


def is_done(member: Member, run: Params) -> bool:
    """Whether it has come to its end, made from what it would be made from now."""
    mark = member.folder / DONE
    return mark.is_file() and mark.read_text() == fingerprint(member, run)


def _code() -> set[str]:
    """The top-level folders of the code that dvc.yaml names."""
    stages = _parsed(Path("dvc.yaml"))["stages"].values()
    deps = {
        Path(dep).parts[0]
        for stage in stages
        for dep in stage.get("do", stage)["deps"]
        if not dep.startswith("${")
    }
    return deps - {ROOT.name}


def _settings(member: Member, run: Params) -> None:
    """The member's params.yaml; written only if it is another, under a temporary name until it is found valid."""
    path = member.folder / "params.yaml"
    text = _yaml(tree(member, run))
    if path.is_file() and path.read_text() == text:
        return
    new = path.with_name(".params.yaml")
    new.write_text(text)
    try:
        load(new)
    except ValueError as error:
        raise ValueError(f"studies.{member.study}.arms.{member.arm}: {error}") from error
    new.rename(path)


def made_alike(member: Member, run: Params, earlier: Params) -> bool:
    """Whether an earlier run made this member as this one would. What this one has besides, seeds, arms, checkpoints, makes no difference.

    Nor does where adopted files lie, or the report; that the checkpoints are the same is for who asks to know.
    """
    if member.study not in earlier.studies or member not in members(member.study, earlier):
        return False
    ours, theirs = _makings(member, run), _makings(member, earlier)
    return (
        ours | {name: {key: ours[name].get(key) for key in theirs[name]} for name in MADE_BEFORE}
        == theirs
    )


def _makings(member: Member, run: Params) -> dict[str, Any]:
    """All settings that say something of a member's rows."""
    study = run.studies[member.study]
    its = Params.model_validate(tree(member, run)).model_dump(
        exclude={"report": True, "adopt": {"__all__": {"folder"}}}
    )
    own = (
        {START} if study.own_student(member.arm) else set[str]()
    )  # its rows are its student's, too
    its["evaluations"] = {
        name: what
        for name, what in its["evaluations"].items()
        if name not in run.reference or what in own
    }
    return its | {"switch": [arm.switch for arm in study.lineage(member.arm)]}


def tree(member: Member, run: Params) -> dict[str, Any]:
    """What the member's params.yaml says: this run, with the arm's settings, its chain of iterations, the seed, and what is to be scored."""
    settings = run.model_dump(mode="json", exclude={"studies"}, exclude_unset=True)
    study = run.studies[member.study]
    arms = study.lineage(member.arm)
    for dotted, value in (one for arm in arms for one in arm.settings.items()):
        *sections, key = dotted.split(".")
        reduce(lambda node, section: node.setdefault(section, {}), sections, settings)[key] = value
    settings["run"]["learning_seed"] = member.seed
    names, scored = chain(member, study)
    if (
        any(not arm.distill + arm.reinforce for arm in arms) and member.seed != run.run.seed
    ):  # by which it is drawn if nothing is said
        settings["finetuned"][START]["seed"] = member.seed
    starts = dict(zip(names, [START, *names], strict=False))
    evaluations = run.reference | {name: name for name in scored}
    for section, prefix in (("iterations", "it"), ("reinforcements", "rl")):
        settings[section] = {
            name: start for name, start in starts.items() if name.startswith(prefix)
        }
    settings["evaluations"] = evaluations
    settings["report"] = {**settings.get("report", {}), "final": list(evaluations)[-1]}
    return settings


def chain(member: Member, study: StudyParams) -> tuple[list[str], list[str]]:
    """The names of its iterations, from the student on, and those of them that are scored: every so many of a stretch of one kind, and its last."""
    its, before = study.arms[member.arm], member.before(study)
    names, scored = chain(before, study) if before else ([], [])
    if before and its.switch is not None:
        names = names[: _switched(before, its.switch)]
        scored = [name for name in scored if name in names[:-1]] + names[-1:]
    for prefix, count in (("it", its.distill), ("rl", its.reinforce)):
        done = sum(name.startswith(prefix) for name in names)
        stretch = [f"{prefix}{number:03d}" for number in range(done + 1, done + count + 1)]
        names = names + stretch
        scored = scored + [
            name
            for number, name in enumerate(stretch, 1)
            if number in (*range(study.every, count, study.every), count)
        ]
    return names, scored


def _switched(before: Member, success: float) -> int | None:
    """How many iterations it had made when the rollouts of one first had that success; None if they never had, or it has made none yet."""
    if not (before.folder / TABLE).is_dir():
        return None
    updates = sorted(read(before.folder / TABLE).updates, key=lambda row: row.position)
    return next((row.position for row in updates if row.success >= success), None)


def _take(source: Path, target: Path, wanted: Container[str], *, data: bool = False) -> None:
    """Give one project the outs of some of another's stages, and what its dvc.lock says of how they were made; not what its settings make otherwise.

    data: the demonstrations too. What is large, they and checkpoints, is never written to, and linked.
    """
    theirs, ours = _locked(target / LOCK), _locked(source / LOCK)
    shared = _holding(
        {name: entry for name, entry in ours.items() if name in wanted},
        _parsed(target / "params.yaml"),
    )
    for out in (Path(out["path"]) for entry in shared.values() for out in entry["outs"]):
        if (
            (source / out / MANIFEST).is_file()
            and (data or "demonstrations" not in out.parts)
            and not _same(source / out, target / out)
        ):
            _copy(source / out, target / out)
    if any(theirs.get(name) != entry for name, entry in shared.items()):
        new = target / f".{LOCK}"
        new.write_text(_yaml({"schema": "2.0", "stages": theirs | shared}))
        new.rename(target / LOCK)


def _copy(source: Path, target: Path) -> None:
    """By links, and under a hidden name first: whoever is killed meanwhile leaves nothing that looks whole."""
    hidden = target.with_name(f".{target.name}.taken")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.copytree(source, hidden, copy_function=lambda one, other: link(Path(one), Path(other)))
    shutil.rmtree(target, ignore_errors=True)
    hidden.rename(target)


def _holding(entries: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Of dvc.lock's entries those that these settings would make too, and so would all that they depend on."""
    other = {
        name
        for name, entry in entries.items()
        if any(_at(settings, key) != value for key, value in _params(entry).items())
    }
    while True:
        made = {out["path"] for name in other for out in entries[name]["outs"]}
        more = {
            name
            for name, entry in entries.items()
            if any(dep["path"] in made for dep in entry.get("deps", ()))
        } - other
        if not more:
            return {name: entry for name, entry in entries.items() if name not in other}
        other |= more


def _params(entry: dict[str, Any]) -> dict[str, Any]:
    return entry.get("params", {}).get("params.yaml", {})


def _at(settings: Any, dotted: str) -> Any:
    """`settings["section"]["key"]` for `section.key`; None where there is nothing."""
    for key in dotted.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _yaml(tree: dict[str, Any]) -> str:
    stream, yaml = StringIO(), YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(tree, stream)
    return stream.getvalue()


def _same(one: Path, other: Path) -> bool:
    return (other / MANIFEST).is_file() and (one / MANIFEST).read_bytes() == (
        other / MANIFEST
    ).read_bytes()


def _locked(path: Path) -> dict[str, Any]:
    return _parsed(path)["stages"] if path.is_file() else {}


def _parsed(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())
