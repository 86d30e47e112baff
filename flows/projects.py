"""A study's members: for each arm and seed a project of its own, with this project's reference.

A member lies in `artifacts/.studies/<study>/<arm>/<seed>`, with its own params.yaml, dvc.lock and
artifacts, and this project's code. Every command on a run works in its folder: `dvc repro`,
`opd run`, `opd lineage`.
"""

import os
import shutil
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vla_opd.analysis.finished_run import DISCARDED
from vla_opd.analysis.study_table import read
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import MANIFEST, canonical_json, read_manifest, sha256
from vla_opd.lineage.store import ROOT
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import INITIAL_STUDENT
from vla_opd.params.study import StudyParams

STUDIES = ROOT / ".studies"
COPIED = ("dvc.yaml", ".dvcignore")
LOCK = "dvc.lock"
PARAMS = "params.yaml"
DONE = (
    ".done"  # in a member's folder once it has finished: the fingerprint of what it was made from
)
ORIGINS = ("demonstrations", "pretrained", "finetuned", "adopt")  # sections of the reference
TABLE = "table"  # in a member's folder: its rows of the study's table
DVC_CONFIG = "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"


@dataclass(frozen=True)
class Member:
    """One arm with one seed of a study of this folder's run."""

    study: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return STUDIES / self.study / self.arm / str(self.seed)

    def predecessor(self, study: StudyParams) -> "Member | None":
        """Return the member that this one continues, if any."""
        after = study.arms[self.arm].after
        if after is None:
            return None
        return Member(self.study, after, self.seed)

    def lineage(self, study: StudyParams) -> "list[Member]":
        """Return the member and all that it continues, the latest first."""
        predecessor = self.predecessor(study)
        return [self, *(predecessor.lineage(study) if predecessor else [])]

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def select_members(
    study: str, run: Params, arms: Iterable[str] = (), seeds: Iterable[int] = ()
) -> tuple[Member, ...]:
    """Return a study's members (of all arms and seeds if none are named), seed by seed.

    So a study that is stopped early has all arms of some seeds. ValueError names an unknown study,
    arm or seed, or a setting that a study does not allow.
    """
    _require_study(study, run)
    all_arms = list(run.studies[study].arms)
    all_seeds = list(run.studies[study].seeds)
    chosen_arms = list(arms) or all_arms
    chosen_seeds = list(seeds) or all_seeds
    _require_known(f"studies.{study}.arms", chosen_arms, all_arms)
    _require_known(f"studies.{study}.seeds", chosen_seeds, all_seeds)
    members: list[Member] = []
    for seed in chosen_seeds:
        members += [Member(study, arm, seed) for arm in chosen_arms]
    return tuple(members)


def _require_study(study: str, run: Params) -> None:
    if study not in run.studies:
        raise ValueError(f"studies has no {study!r}; expected one of {sorted(run.studies)}")
    if run.evaluate.decide is not None:
        raise ValueError(
            f"evaluate.decide is {list(run.evaluate.decide)}; expected null in a study: "
            "its evaluations are compared episode by episode"
        )
    if run.label.teacher not in run.origins:
        raise ValueError(
            f"label.teacher is {run.label.teacher!r}; expected one of {sorted(run.origins)}: "
            "members share no checkpoint that an iteration made"
        )


def _require_known(field: str, chosen: Sequence[object], available: Sequence[object]) -> None:
    for name in chosen:
        if name not in available:
            raise ValueError(f"{field} has no {name!r}; expected some of {available}")


def reference_stages(run: Params) -> list[str]:
    """Return the stages that all members share: the origins, and the evaluations of those."""
    stages = list(run.origins.values())
    stages += [f"evaluate@{name}" for name in run.reference_evaluations]
    return stages


def prepare(member: Member, run: Params) -> Path:
    """Lay out a member's folder, or bring it up to this project's settings; return the folder.

    Artifacts that the member has made stay. ValueError if the arm's settings make no valid run.
    """
    folder = member.folder
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    (folder / ".dvc/config").write_text(DVC_CONFIG)
    for name in COPIED:
        shutil.copyfile(name, folder / name)
    for package in _code_folders():
        link_to_code = folder / package
        link_to_code.unlink(missing_ok=True)  # this project may have been moved since
        link_to_code.symlink_to(Path(package).resolve(), target_is_directory=True)
    _write_params(member, run)
    return folder


def share_reference(member: Member, run: Params) -> None:
    """Give a prepared member the reference: its artifacts, and their entries of dvc.lock."""
    study = run.studies[member.study]
    stages = _shared_stages(run)
    _copy_stages(Path(), member.folder, stages, demonstrations=study.own_student(member.arm))


def _shared_stages(run: Params) -> set[str]:
    demonstrations = {f"demonstrate@{name}" for name in run.demonstrations}
    return demonstrations.union(reference_stages(run))


def continue_predecessor(member: Member, run: Params) -> None:
    """Give a prepared member all that its predecessor, if any, has made.

    That includes the manifests of rollouts that were discarded. ValueError if the arm switches at
    a success rate of the predecessor, and that one is not done.
    """
    study = run.studies[member.study]
    predecessor = member.predecessor(study)
    if predecessor is None:
        return
    if study.arms[member.arm].switch is not None:
        if not is_done(predecessor, run):
            raise ValueError(
                f"{member} switches at a success rate of {predecessor}, which is not done; "
                f"expected {predecessor} to be done first"
            )
        _write_params(member, run)  # where to switch is known now
    source = predecessor.folder
    target = member.folder
    _copy_stages(source, target, _own_stages(source, target, run), demonstrations=True)
    discarded = ROOT / run.run.name / DISCARDED
    if (source / discarded).is_dir():
        shutil.copytree(source / discarded, target / discarded, dirs_exist_ok=True)


def _own_stages(source: Path, target: Path, run: Params) -> set[str]:
    """Return the stages of a predecessor's dvc.lock that it doesn't have from the reference."""
    locked = _read_lock(source)
    settings = _read_yaml(target / PARAMS)
    shared = _shared_stages(run)
    reference = {name: entry for name, entry in locked.items() if name in shared}
    reference = _select_valid(reference, settings)
    return locked.keys() - reference.keys()


def fingerprint(member: Member, run: Params) -> str:
    """Return a hash of a member's settings and of the reference's checkpoints."""
    checkpoints = [ROOT / run.run.name / "checkpoints" / name for name in run.origins]
    digests = [
        read_manifest(folder, "checkpoint").digest
        for folder in checkpoints
        if (folder / MANIFEST).is_file()
    ]
    return sha256(canonical_json([_to_yaml(member_settings(member, run)), digests]))


def process_environment(member: Member, run: Params, parallel: int) -> dict[str, str | None]:
    """Return the variables of a member's process: its workers, this folder's modules, W&B's group.

    parallel: the members that share this machine's cores.
    """
    cores = len(os.sched_getaffinity(0))
    modules = [str(Path.cwd())]
    if os.environ.get("PYTHONPATH"):
        modules.append(os.environ["PYTHONPATH"])
    return {
        "OPD_WORKERS": os.environ.get("OPD_WORKERS") or str(max(1, cores // parallel)),
        "PYTHONPATH": os.pathsep.join(modules),
        "WANDB_RUN_GROUP": f"{run.run.name}/{member.study}/{member.arm}/{member.seed}",
    }


def oversubscription_warning(run: Params, parallel: int) -> str | None:
    """Return a warning if members side by side need more cores than there are, else None.

    Results depend on the number of threads, so threads are a setting and not divided by members.
    """
    cores = len(os.sched_getaffinity(0))
    threads = {
        "label.threads": run.label.threads,
        "optimize.threads": run.optimize.threads,
        "reinforce.threads": run.reinforce.threads,
    }
    if parallel == 1 or max(threads.values()) * parallel <= cores:
        return None
    settings = ", ".join(f"{field} is {count}" for field, count in threads.items())
    return (
        f"{parallel} members at the same time on {cores} cores, but {settings}: "
        "this oversubscribes the CPU and will be slower than --parallel 1"
    )


def is_done(member: Member, run: Params) -> bool:
    """Return whether a member has finished, from the settings and checkpoints of today."""
    mark = member.folder / DONE
    return mark.is_file() and mark.read_text() == fingerprint(member, run)


def _code_folders() -> set[str]:
    """Return the top-level folders of the code that dvc.yaml names."""
    folders: set[str] = set()
    stages = _read_yaml(Path("dvc.yaml"))["stages"]
    for stage in stages.values():
        template = stage.get("do", stage)
        for dep in template["deps"]:
            if not dep.startswith("${"):
                folders.add(Path(dep).parts[0])
    return folders - {ROOT.name}


def _write_params(member: Member, run: Params) -> None:
    """Write the member's params.yaml if it differs; under a temporary name until it is valid."""
    path = member.folder / PARAMS
    text = _to_yaml(member_settings(member, run))
    if path.is_file() and path.read_text() == text:
        return
    temporary = path.with_name(f".{PARAMS}")
    temporary.write_text(text)
    try:
        load(temporary)
    except ValueError as error:
        raise ValueError(f"studies.{member.study}.arms.{member.arm}: {error}") from error
    temporary.rename(path)


def has_same_recipe(member: Member, run: Params, earlier: Params) -> bool:
    """Return whether an earlier run made this member with the same settings as this run would.

    Seeds, arms and checkpoints that this run has in addition make no difference, nor do the report
    and the folders of adopted files. Whether the checkpoints are the same is for the caller to
    check.
    """
    if member.study not in earlier.studies:
        return False
    if member not in select_members(member.study, earlier):
        return False
    recipe = _recipe(member, run)
    earlier_recipe = _recipe(member, earlier)
    for section in ORIGINS:
        items = recipe[section]
        recipe[section] = {name: items.get(name) for name in earlier_recipe[section]}
    return recipe == earlier_recipe


def _recipe(member: Member, run: Params) -> dict[str, Any]:
    """Return all settings that a member's rows depend on."""
    study = run.studies[member.study]
    params = Params.model_validate(member_settings(member, run))
    recipe = params.model_dump(exclude={"report": True, "adopt": {"__all__": {"folder"}}})
    own_student = study.own_student(member.arm)
    evaluations: dict[str, str] = {}
    for name, checkpoint in params.evaluations.items():
        retrained = own_student and checkpoint == INITIAL_STUDENT
        if retrained or name not in run.reference_evaluations:
            evaluations[name] = checkpoint
    recipe["evaluations"] = evaluations
    recipe["switch"] = [arm.switch for arm in study.lineage(member.arm)]
    return recipe


def member_settings(member: Member, run: Params) -> dict[str, Any]:
    """Return the contents of a member's params.yaml.

    They are the run's, with the arm's settings, its chain of iterations, the seed, and the
    checkpoints to score.
    """
    settings = run.model_dump(mode="json", exclude={"studies"}, exclude_unset=True)
    study = run.studies[member.study]
    fine_tuned_only = False
    for arm in study.lineage(member.arm):
        if arm.distill + arm.reinforce == 0:
            fine_tuned_only = True
        for dotted, value in arm.settings.items():
            _assign(settings, dotted, value)
    _assign(settings, "run.learning_seed", member.seed)
    if fine_tuned_only and member.seed != run.run.seed:  # run.seed is the default
        _assign(settings, f"finetuned.{INITIAL_STUDENT}.seed", member.seed)

    names, scored = plan_iterations(member, study)
    settings["iterations"] = _starts(names, "it")
    settings["reinforcements"] = _starts(names, "rl")
    evaluations = dict(run.reference_evaluations)
    evaluations.update((name, name) for name in scored)
    settings["evaluations"] = evaluations
    _assign(settings, "report.final", list(evaluations)[-1])
    return settings


def _assign(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `settings["section"]["key"]` for `section.key`."""
    *sections, key = dotted.split(".")
    node = settings
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value


def _starts(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Return for every iteration of one kind the checkpoint that it starts from."""
    starts: dict[str, str] = {}
    checkpoint = INITIAL_STUDENT
    for name in names:
        if name.startswith(prefix):
            starts[name] = checkpoint
        checkpoint = name
    return starts


def plan_iterations(member: Member, study: StudyParams) -> tuple[list[str], list[str]]:
    """Return the names of a member's iterations in order, and of those that are scored.

    Of each stretch of one kind, every `every`-th iteration is scored, and the last.
    """
    arm = study.arms[member.arm]
    names, scored = _plan_predecessor(member, study)
    for prefix, count in (("it", arm.distill), ("rl", arm.reinforce)):
        done = sum(name.startswith(prefix) for name in names)
        for number in range(1, count + 1):
            name = f"{prefix}{done + number:03d}"
            is_last = number == count
            names.append(name)
            if is_last or number % study.every == 0:
                scored.append(name)
    return names, scored


def _plan_predecessor(member: Member, study: StudyParams) -> tuple[list[str], list[str]]:
    """Return the predecessor's iterations up to the switch; the one at the switch is scored."""
    predecessor = member.predecessor(study)
    if predecessor is None:
        return [], []
    names, scored = plan_iterations(predecessor, study)
    success = study.arms[member.arm].switch
    if success is None:
        return names, scored
    names = names[: _switch_position(predecessor, success)]
    before_last = names[:-1]
    scored = [name for name in scored if name in before_last]
    return names, scored + names[-1:]


def _switch_position(predecessor: Member, success: float) -> int | None:
    """Return how many iterations were made when the rollouts of one first had that success rate.

    None if they never had, or none was made yet.
    """
    table = predecessor.folder / TABLE
    if not table.is_dir():
        return None
    updates = read(table).updates
    positions = [row.position for row in updates if row.success >= success]
    return min(positions, default=None)


def _copy_stages(
    source: Path, target: Path, stages: Container[str], *, demonstrations: bool
) -> None:
    """Copy some stages' artifacts and entries of dvc.lock from one project to another.

    Stages that the target's settings would make otherwise are left out. Checkpoints and
    demonstrations, which are large and never written to, are linked.

    demonstrations: copy those too; their entries of dvc.lock are copied in any case.
    """
    settings = _read_yaml(target / PARAMS)
    locked = _read_lock(source)
    chosen = {name: entry for name, entry in locked.items() if name in stages}
    valid = _select_valid(chosen, settings)
    for entry in valid.values():
        for out in _paths(entry, "outs"):
            if demonstrations or "demonstrations" not in Path(out).parts:
                _copy_artifact(source / out, target / out)
    _add_to_lock(target, valid)


def _add_to_lock(project: Path, entries: dict[str, Any]) -> None:
    """Add entries to a project's dvc.lock, or replace them there; at once."""
    locked = _read_lock(project)
    if all(locked.get(name) == entry for name, entry in entries.items()):
        return
    stages = locked | entries
    temporary = project / f".{LOCK}"
    temporary.write_text(_to_yaml({"schema": "2.0", "stages": stages}))
    temporary.rename(project / LOCK)


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


def _select_valid(entries: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Select the entries of dvc.lock that hold under these settings, as do all they depend on."""
    valid = {name: entry for name, entry in entries.items() if _matches(entry, settings)}
    stale = entries.keys() - valid.keys()
    while stale:
        outs = {path for name in stale for path in _paths(entries[name], "outs")}
        stale = {name for name, entry in valid.items() if outs.intersection(_paths(entry, "deps"))}
        for name in stale:
            del valid[name]
    return valid


def _matches(entry: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether these settings have the values that an entry of dvc.lock was made with."""
    params = entry.get("params", {}).get(PARAMS, {})
    return all(_look_up(settings, dotted) == value for dotted, value in params.items())


def _paths(entry: dict[str, Any], role: str) -> list[str]:
    """Return the paths of an entry's `outs` or `deps`."""
    return [file["path"] for file in entry.get(role, ())]


def _look_up(settings: Any, dotted: str) -> Any:
    """Return `settings["section"]["key"]` for `section.key`; None if it is missing."""
    for key in dotted.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _to_yaml(tree: dict[str, Any]) -> str:
    stream = StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(tree, stream)
    return stream.getvalue()


def _read_lock(project: Path) -> dict[str, Any]:
    path = project / LOCK
    return _read_yaml(path)["stages"] if path.is_file() else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())
