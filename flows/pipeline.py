"""The plan of dvc.yaml and dvc.lock in DVC's order, with what is stale; one stage reproduced.

DVC decides; nothing here keeps a second opinion. The plan is read through DVC's internal API
(pinned below 4, and by a test).
"""

import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.dvc_runner import process, stale_locks
from flows.dvc_runner.process import Line, LineHandler
from flows.settings import look_up
from stages.catalog import BEHIND, STAGES
from vla_opd.artifacts.layout import ROOT
from vla_opd.machine.checkout import require_no_links
from vla_opd.machine.host import LAUNCH, TASK_RUN
from vla_opd.params.load import load

PARAMS = Path("params.yaml")
PER_ITERATION = {name for name, verb in BEHIND.items() if STAGES[verb].option == "--iteration"}
UPDATES = tuple(f"{name}@" for name in PER_ITERATION if STAGES[BEHIND[name]].trains)
ABSENT = re.compile(r"Could not find '([\w.]+)'")
LOCKED = re.compile(
    r"is busy, it is being blocked|Unable to acquire lock|another process is writing it"
)


class Busy(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """Another process, DVC's or a stage's, holds what this one needs; ask again later."""


class StageFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A stage's command failed. output: the last lines that it wrote."""

    def __init__(self, name: str, output: Iterable[str]) -> None:
        super().__init__(f"stage {name} failed")
        self.name = name
        self.output = tuple(output)


@dataclass(frozen=True)
class Step:
    """One stage of the plan.

    name:    as DVC addresses it, e.g. `label@it001`.
    parents: the stages whose outs it depends on, by name.
    stale:   its command, a parameter or a dependency differs from dvc.lock.
    missing: one of its outs does not exist.
    due:     it may have to run. A step that is not due needs no call of DVC.
    at_work: a process is making it now; `mark_at_work` sets it.
    outs:    the folders that it makes.
    run:     the name of the run.
    settings: the digest of all settings at the time of the plan.
    """

    name: str
    parents: tuple[str, ...] = ()
    stale: bool = True
    missing: bool = True
    due: bool = True
    at_work: bool = False
    outs: tuple[str, ...] = ()
    run: str = ""
    settings: str = ""

    @property
    def verb(self) -> str:
        return self.name.partition("@")[0]

    @property
    def iteration(self) -> str | None:
        """The iteration that this step belongs to, as does the evaluation of its checkpoint."""
        verb, _, item = self.name.partition("@")
        if verb in PER_ITERATION:
            return item
        if verb == "evaluate":
            for parent in self.parents:
                if parent.startswith(UPDATES):
                    return parent.partition("@")[2]
        return None


def plan(targets: Iterable[str] = (), patience: float = 60.0) -> tuple[Step, ...]:
    """Return the stages that lead to `targets` (all without targets), in the order of `dvc repro`.

    ValueError for a target that dvc.yaml does not have, invalid settings, or a project that DVC
    cannot read. Waits up to `patience` seconds for another DVC's lock; then raises Busy.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo

    targets = tuple(targets)
    stale_locks.drop_stale_locks()
    deadline = time.monotonic() + patience
    while True:
        settings = _settings()  # checked before DVC reads the file, which trusts it
        try:
            with _dvc_mistakes(), Repo() as repo, repo.lock:
                return _survey(repo, targets, settings, _changed)
        except LockError as error:
            if time.monotonic() > deadline:
                raise Busy(
                    "another process (a run or DVC) is at work in this folder; "
                    "wait until it ends, or end it"
                ) from error
            time.sleep(0.5)


def inspect(targets: Iterable[str] = ()) -> tuple[Step, ...]:
    """Return the plan without taking a lock or writing anything.

    So it answers while a run is at work, and in a read-only checkout. Errors as of `plan`, except
    Busy.
    """
    from dvc.fs import LocalFileSystem
    from dvc.repo import Repo

    class ReadOnly(LocalFileSystem):
        """DVC's file system, which tolerates a missing folder of temporary files."""

        def makedirs(self, path: Any, exist_ok: bool = True, **options: Any) -> None:
            with suppress(OSError):
                super().makedirs(path, exist_ok=exist_ok, **options)

    targets = tuple(targets)

    def look() -> tuple[Step, ...]:
        settings = _settings()
        with _dvc_mistakes(), Repo(fs=ReadOnly()) as repo:
            return _survey(repo, targets, settings, _seems_changed)

    try:
        steps = look()
    except ValueError:  # a run may have been writing dvc.lock just then
        time.sleep(0.5)
        steps = look()
    return mark_at_work(steps)


def mark_at_work(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Mark the steps whose outs a process of DVC's is making now."""
    written = stale_locks.outputs_being_written()
    marked: list[Step] = []
    for step in steps:
        outs = [Path(out).resolve() for out in step.outs]
        marked.append(replace(step, at_work=not written.isdisjoint(outs)))
    return tuple(marked)


@contextmanager
def _dvc_mistakes() -> Generator[None]:
    """Turn DVC's errors, except those of its locks, into a ValueError that says what to do."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.scm import SCMError

    try:
        yield
    except LockError:
        raise
    except SCMError as error:
        raise ValueError(
            f"{error}; DVC expects a git repository: run `git init` here, "
            "or `dvc config --local core.no_scm true`"
        ) from error
    except DvcException as error:
        absent = ABSENT.search(str(error))
        if absent:
            raise ValueError(
                f"params.yaml: missing {absent[1]}, which dvc.yaml reads "
                f"(add `{absent[1]}: {{}}`, or its default)"
            ) from error
        raise ValueError(f"dvc.yaml: {error}") from error


def _survey(
    repo: Any, targets: tuple[str, ...], settings: str, changed: Callable[[Any, list[Any]], bool]
) -> tuple[Step, ...]:
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repo.index.graph)
    goals = collect_stages(repo, targets) if targets else repo.index.stages
    stages: list[Any] = plan_repro(graph, goals)
    _require_sections(stages)
    run = load().run.name
    require_no_links(ROOT / run)
    steps: list[Step] = []
    for stage in stages:
        upstream = list(graph.successors(stage))
        is_stale = changed(stage, upstream)
        step = _step(stage, upstream, is_stale)
        steps.append(replace(step, run=run, settings=settings))
    return mark_due(tuple(steps))


def _settings() -> str:
    text = PARAMS.read_bytes() if PARAMS.is_file() else b""
    return _digest(text)


@lru_cache(maxsize=1)
def _digest(_text: bytes) -> str:
    """Return the digest of all settings; params.yaml is parsed only if its text has changed."""
    return hashlib.sha256(load().model_dump_json().encode()).hexdigest()


def require_same_settings(step: Step) -> None:
    """ValueError if params.yaml has changed since the step was planned.

    The rest of the run would have other settings than its beginning.
    """
    if step.settings != _settings():
        raise ValueError(
            f"params.yaml was edited while the run was at work, before {step.name}; "
            "what is done is kept, and a new run continues with the new settings"
        )


def _require_sections(stages: Iterable[Any]) -> None:
    """ValueError names sections that a stage depends on and params.yaml does not have.

    DVC would say so only when it is the stage's turn.
    """
    from dvc.dependency.param import ParamsDependency

    tree = YAML(typ="safe").load(PARAMS.read_text())
    for stage in stages:
        for dep in stage.deps:
            if not isinstance(dep, ParamsDependency):
                continue
            absent = sorted(name for name in dep.params if look_up(tree, name) is None)
            if absent:
                raise ValueError(
                    f"params.yaml: stage {stage.addressing} depends on {absent}; "
                    f"expected these sections ({absent[0]}: {{}} for the defaults)"
                )


def _step(stage: Any, upstream: list[Any], stale: bool) -> Step:
    return Step(
        name=stage.addressing,
        parents=tuple(parent.addressing for parent in upstream),
        stale=stale,
        missing=not all(out.exists for out in stage.outs),
        outs=tuple(out.def_path for out in stage.outs),
    )


def _changed(stage: Any, upstream: list[Any]) -> bool:
    """Return whether DVC would run the stage; what is missing counts as unchanged."""
    return stage.changed(allow_missing=True, upstream=upstream)


def _seems_changed(stage: Any, upstream: list[Any]) -> bool:
    """Return the same without DVC's locks, by the functions that DVC 3.67 wraps in them."""
    changed_deps = type(stage)._changed_deps.__wrapped__  # noqa: SLF001
    changed_outs = type(stage).changed_outs.__wrapped__
    return (
        stage.changed_stage()
        or changed_deps(stage, allow_missing=True, upstream=upstream)
        or changed_outs(stage, allow_missing=True)
    )


def mark_due(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Mark the steps that may have to run: stale ones, those after them, and missing ones needed.

    A missing out is needed if it is a goal of the plan (nothing depends on it) or if a step that is
    due depends on it. So a fresh clone, which has the reference checkpoints but not the
    demonstrations behind them, does not make these again; with a new teacher setting it does.
    """
    children: dict[str, set[str]] = {step.name: set() for step in steps}
    for step in steps:
        for parent in step.parents:
            children.setdefault(parent, set()).add(step.name)
    due: set[str] = set()
    count = -1
    while len(due) > count:
        count = len(due)
        for step in steps:
            users = children[step.name]
            is_goal = not users
            is_needed = is_goal or not due.isdisjoint(users)
            follows = not due.isdisjoint(step.parents)
            if step.stale or follows or (step.missing and is_needed):
                due.add(step.name)
    return tuple(replace(step, due=step.name in due) for step in steps)


def would_run(name: str) -> bool:
    """Return whether DVC would run a stage's command now.

    It would if the stage is not up to date and what the command makes is in no cache. Errors as of
    `reproduce`.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            (stage,) = repo.stage.collect(name)
            if not stage.changed() or (
                not stage.changed(allow_missing=True) and stage.outs_cached()
            ):
                return False
            stage.save_deps()
            # `restore(stage, dry=True)` looks for the run in dvc.lock, not for this one.
            runs: Any = repo.stage_cache
            recorded = runs._load(stage)  # noqa: SLF001
            if not recorded:
                return True
            return not runs._create_stage(recorded, wdir=stage.wdir).outs_cached()  # noqa: SLF001
    except LockError as error:
        raise Busy(str(error)) from error


def reproduce(name: str, tell: LineHandler, task_run: str = "", launch: str = "") -> bool:
    """Run `dvc repro --single-item` on a stage. True if it ran, False if nothing had changed.

    In the context's DVC process (`process.shared_dvc`), or in one for this stage only.
    tell:     receives each line of output.
    task_run: of Prefect, for the record of executions. launch: of the shares that the stage puts
              together, if there are any.
    Raises Busy if another DVC process is in the way, StageFailed with the last lines if the command
    fails.
    """
    stale_locks.drop_stale_locks()
    output: deque[str] = deque(maxlen=30)
    ran = False

    def hear(line: Line) -> None:
        nonlocal ran
        tell(line)
        ran = ran or line.text.startswith("Running stage ")
        if not line.passing:
            output.append(line.text)

    with process.shared_dvc() as dvc:
        code = dvc.repro(name, hear, {TASK_RUN: task_run, LAUNCH: launch})
    if code == 0:
        return ran
    if LOCKED.search("\n".join(output)):
        raise Busy(f"{name}: another process is at work on it, or another DVC in this folder")
    raise StageFailed(name, output)


def accept(names: Iterable[str]) -> tuple[str, ...]:
    """Declare that edits of code did not change what these stages made.

    dvc.lock gets the new hashes of their code and keeps everything else. `dvc commit` does the same
    if every dependency exists; this works without the demonstrations, too. Outs of other stages and
    parameters are never accepted: those are lineage.
    Returns the stages. ValueError for a stage that dvc.yaml does not have.
    """
    from dvc.dependency.param import ParamsDependency
    from dvc.fs import localfs
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages

    with _dvc_mistakes(), Repo() as repo, repo.lock:
        outs = [out.fs_path for out in repo.index.outs]
        stages = collect_stages(repo, list(names))
        for stage in stages:
            for dep in stage.deps:
                is_out = any(localfs.overlaps(dep.fs_path, path) for path in outs)
                if not isinstance(dep, ParamsDependency) and not is_out:
                    dep.save()
            stage.dump(update_pipeline=False)
        return tuple(stage.addressing for stage in stages)
