"""A study's members: for each arm and seed a project of its own, with this project's reference.

A member is the project `artifacts/.studies/<study>/<arm>/<seed>`.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import projects
from flows.projects import Project
from vla_opd.analysis.finished_run import DISCARDED
from vla_opd.analysis.study_table import read
from vla_opd.artifacts.layout import ROOT
from vla_opd.artifacts.manifest import MANIFEST, canonical_json, read_manifest, sha256
from vla_opd.params.load import assign
from vla_opd.params.run import Params
from vla_opd.params.stages import INITIAL_STUDENT
from vla_opd.params.study import StudyParams

STUDIES = ROOT / ".studies"
DONE = (
    ".done"  # in a member's folder once it has finished: the fingerprint of what it was made from
)
ORIGINS = ("demonstrations", "pretrained", "finetuned", "adopt")  # sections of the reference
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

    @property
    def project(self) -> Project:
        return Project(self.folder)

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
        members.extend(Member(study, arm, seed) for arm in chosen_arms)
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
    member.project.lay_out()
    _write_params(member, run)
    return member.folder


def share_reference(member: Member, run: Params) -> None:
    """Give a prepared member the reference: its artifacts, and their entries of dvc.lock."""
    study = run.studies[member.study]
    stages = shared_stages(run)
    demonstrations = study.own_student(member.arm)
    member.project.take_stages(Project(), stages, demonstrations=demonstrations)


def shared_stages(run: Params) -> set[str]:
    """Return the stages whose outputs members take from this project, if they are there."""
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
    stages = _own_stages(predecessor, member, run)
    member.project.take_stages(predecessor.project, stages, demonstrations=True)
    discarded = ROOT / run.run.name / DISCARDED
    source = predecessor.folder / discarded
    if source.is_dir():
        shutil.copytree(source, member.folder / discarded, dirs_exist_ok=True)


def _own_stages(predecessor: Member, member: Member, run: Params) -> set[str]:
    """Return the stages of a predecessor's dvc.lock that it doesn't have from the reference."""
    locked = predecessor.project.read_lock()
    shared = shared_stages(run)
    reference = {name: entry for name, entry in locked.items() if name in shared}
    taken = member.project.select_valid(reference)
    return locked.keys() - taken.keys()


def fingerprint(member: Member, run: Params) -> str:
    """Return a hash of a member's settings and of the reference's checkpoints."""
    checkpoints = [ROOT / run.run.name / "checkpoints" / name for name in run.origins]
    digests = [
        read_manifest(folder, "checkpoint").digest
        for folder in checkpoints
        if (folder / MANIFEST).is_file()
    ]
    return sha256(canonical_json([projects.to_yaml(member_settings(member, run)), digests]))


def process_environment(member: Member, run: Params, parallel: int) -> dict[str, str | None]:
    """Return the variables of a member's process: its workers, this folder's modules, W&B's group.

    parallel: the members that share this machine's cores.
    """
    cores = len(os.sched_getaffinity(0))
    return {
        "OPD_WORKERS": os.environ.get("OPD_WORKERS") or str(max(1, cores // parallel)),
        "PYTHONPATH": projects.module_path(Path.cwd()),
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


def _write_params(member: Member, run: Params) -> None:
    try:
        member.project.write_params(projects.to_yaml(member_settings(member, run)))
    except ValueError as error:
        raise ValueError(f"studies.{member.study}.arms.{member.arm}: {error}") from error


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
    settings = member_settings(member, run)
    params = Params.model_validate(settings)
    no_folders = {"__all__": {"folder"}}
    recipe = params.model_dump(exclude={"report": True, "adopt": no_folders})
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
            assign(settings, dotted, deepcopy(value))
    assign(settings, "run.learning_seed", member.seed)
    if fine_tuned_only and member.seed != run.run.seed:  # run.seed is the default
        assign(settings, f"finetuned.{INITIAL_STUDENT}.seed", member.seed)

    names, scored = plan_iterations(member, study)
    settings["iterations"] = _starts(names, "it")
    settings["reinforcements"] = _starts(names, "rl")
    evaluations = dict(run.reference_evaluations)
    evaluations.update((name, name) for name in scored)
    settings["evaluations"] = evaluations
    assign(settings, "report.final", list(evaluations)[-1])
    return settings


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
            names.append(name)
            is_last = number == count
            is_due = number % study.every == 0
            if is_last or is_due:
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
