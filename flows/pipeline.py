"""What dvc.yaml and dvc.lock say: the plan in DVC's order, what of it is stale, and one stage brought up to date.

DVC decides; nothing here keeps a second opinion. The plan is read through DVC's internal API (pinned below 4, and by a test).
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

from flows.dvc_runner import process, stale_locks
from flows.dvc_runner.process import Line, Tell
from vla_opd.lineage.store import ROOT
from vla_opd.machine.checkout import require_no_links
from vla_opd.machine.host import LAUNCH, TASK_RUN
from vla_opd.params.load import load

PARAMS = Path("params.yaml")
PER_ITERATION = (
    "sample",
    "label",
    "optimize",
    "explore",
    "reinforce",
)  # the stages that dvc.yaml repeats for each iteration, of either kind
UPDATES = ("optimize@", "reinforce@")  # those that end one
ABSENT = re.compile(r"Could not find '([\w.]+)'")
LOCKED = re.compile(
    r"is busy, it is being blocked|Unable to acquire lock|another process is writing it"
)


class Busy(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """Another process, DVC's or a stage's, holds what this one needs; ask again later."""


class StageFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A stage's command failed. `said` are the last lines that it wrote."""

    def __init__(self, name: str, said: Iterable[str]) -> None:
        super().__init__(f"stage {name} failed")
        self.name = name
        self.said = tuple(said)


@dataclass(frozen=True)
class Step:
    """One stage of the plan.

    name:    as DVC addresses it, e.g. `label@it001`.
    parents: the stages whose outs it depends on, by name.
    stale:   DVC holds it changed whatever is missing, i.e. its command, a parameter or a dependency differs from dvc.lock.
    missing: one of its outs isn't there.
    due:     it may have to run. A step that isn't due needs no DVC call at all.
    at_work: a process is making it now; only `inspect` says so.
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
        """The iteration that this step belongs to; scoring an iteration's checkpoint belongs to it."""
        verb, _, item = self.name.partition("@")
        if verb in PER_ITERATION:
            return item
        made_by = [
            parent.partition("@")[2] for parent in self.parents if parent.startswith(UPDATES)
        ]
        return made_by[0] if verb == "evaluate" and made_by else None


def plan(targets: Iterable[str] = (), patience: float = 60.0) -> tuple[Step, ...]:
    """The stages that lead to `targets` (all of dvc.yaml if none), in the order in which `dvc repro` visits them.

    ValueError for a target that dvc.yaml doesn't have, settings that make no valid run, or a project that DVC can't read.
    Waits up to `patience` seconds for another DVC's lock.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo

    wanted = tuple(targets)
    stale_locks.heal()
    deadline = time.monotonic() + patience
    while True:
        settings = (
            _settings()
        )  # before DVC reads the file, which has no mind for what a hostile one asks of it
        try:
            with _told_as_mistakes(), Repo() as repo, repo.lock:
                return _survey(repo, wanted, settings, _changed)
        except LockError as error:
            if time.monotonic() > deadline:
                raise Busy(
                    "another process is at work in this folder, a run or DVC; expected it to end, or to be ended"
                ) from error
            time.sleep(0.5)


def inspect(targets: Iterable[str] = ()) -> tuple[Step, ...]:
    """The same plan for a question: no lock is taken and nothing is written, so it answers while a run is at work, and in a read-only checkout.

    Errors as of `plan`, but for `Busy`.
    """
    from dvc.fs import LocalFileSystem
    from dvc.repo import Repo

    class ReadOnly(LocalFileSystem):
        """DVC's own, content without the folder of its temporary files."""

        def makedirs(self, path: Any, exist_ok: bool = True, **named: Any) -> None:
            with suppress(OSError):
                super().makedirs(path, exist_ok=exist_ok, **named)

    wanted = tuple(targets)

    def look() -> tuple[Step, ...]:
        settings = _settings()
        with _told_as_mistakes(), Repo(fs=ReadOnly()) as repo:
            return _survey(repo, wanted, settings, _seems_changed)

    try:
        steps = look()
    except ValueError:  # a run may have been writing dvc.lock just then
        time.sleep(0.5)
        steps = look()
    written = stale_locks.written()
    return tuple(
        replace(step, at_work=any(Path(out).resolve() in written for out in step.outs))
        for step in steps
    )


@contextmanager
def _told_as_mistakes() -> Generator[None]:
    """DVC's errors, but for its locks', as a ValueError that says what to do."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.scm import SCMError

    try:
        yield
    except LockError:
        raise
    except SCMError as error:
        raise ValueError(
            f"{error}; expected a git repository, in which DVC works: run `git init` here, or `dvc config --local core.no_scm true`"
        ) from error
    except DvcException as error:
        if absent := ABSENT.search(str(error)):
            raise ValueError(
                f"params.yaml: missing {absent[1]}, which dvc.yaml reads (add it, if only as {{}} or its default)"
            ) from error
        raise ValueError(f"dvc.yaml: {error}") from error


def _survey(
    repo: Any, targets: tuple[str, ...], settings: str, changed: Callable[[Any, list[Any]], bool]
) -> tuple[Step, ...]:
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repo.index.graph)
    stages: list[Any] = plan_repro(graph, collect_stages(repo, targets or ("dvc.yaml",)))
    _require_sections(stages)
    run = load().run.name
    require_no_links(ROOT / run)
    steps: list[Step] = []
    for stage in stages:
        upstream = list(graph.successors(stage))
        steps.append(_step(stage, upstream, changed(stage, upstream)))
    return mark_due(tuple(replace(step, run=run, settings=settings) for step in steps))


def _settings() -> str:
    return _digest(PARAMS.read_bytes() if PARAMS.is_file() else b"")


@lru_cache(maxsize=1)
def _digest(_text: bytes) -> str:
    """Of what params.yaml says. It is asked before every stage, and read, checked and dumped for it only if the text is another."""
    return hashlib.sha256(load().model_dump_json().encode()).hexdigest()


def require_same_settings(step: Step) -> None:
    """ValueError if params.yaml is another than when the step was planned: the rest of the run would be of other settings than its beginning."""
    if step.settings != _settings():
        raise ValueError(
            f"params.yaml was edited while the run was at work, before {step.name}; what is done stays, and a new run goes on as it says now"
        )


def _require_sections(stages: Iterable[Any]) -> None:
    """ValueError names what a stage depends on and params.yaml doesn't have: DVC would say so only when the stage's turn comes."""
    from dvc.dependency.param import ParamsDependency

    for stage in stages:
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency) and (
                absent := sorted(set(dep.params) - set(dep.read_params()))
            ):
                raise ValueError(
                    f"params.yaml: stage {stage.addressing} depends on {absent}; expected these sections ({absent[0]}: {{}} for the defaults)"
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
    """Whether DVC would run the stage: hashes of what is there are compared, and dvc.lock's word is taken for what isn't."""
    return stage.changed(allow_missing=True, upstream=upstream)


def _seems_changed(stage: Any, upstream: list[Any]) -> bool:
    """The same without DVC's locks, by the functions that it wraps in them (of DVC 3.67; a test tells when they are elsewhere)."""
    deps, outs = (
        getattr(type(stage), name).__wrapped__ for name in ("_changed_deps", "changed_outs")
    )
    return (
        stage.changed_stage()
        or deps(stage, allow_missing=True, upstream=upstream)
        or outs(stage, allow_missing=True)
    )


def mark_due(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Mark the steps that may have to run: the stale, what comes after them, and what is missing where it is needed.

    A missing out is needed if it is a goal of the plan (nothing depends on it) or if a step that is due depends on it. So a fresh clone, with the
    reference checkpoints but not the demonstrations behind them, doesn't make the demonstrations again; with a new setting of the teacher it does.
    """
    children = {
        step.name: [child.name for child in steps if step.name in child.parents] for step in steps
    }
    due: set[str] = set()
    while True:
        before = len(due)
        for step in steps:
            after_due = any(parent in due for parent in step.parents)
            needed = not children[step.name] or any(child in due for child in children[step.name])
            if step.stale or after_due or (step.missing and needed):
                due.add(step.name)
        if len(due) == before:
            return tuple(replace(step, due=step.name in due) for step in steps)


def would_run(name: str) -> bool:
    """Whether DVC would run a stage's command now: it isn't up to date, and what the command would make is in no cache. Errors as of `bring`."""
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
            runs: Any = repo.stage_cache  # `restore(stage, dry=True)` looks for the run that dvc.lock tells of, not for this one
            known = runs._load(stage)  # noqa: SLF001
            return not (known and runs._create_stage(known, wdir=stage.wdir).outs_cached())  # noqa: SLF001
    except LockError as error:
        raise Busy(str(error)) from error


def bring(name: str, tell: Tell, task_run: str = "", launch: str = "") -> bool:
    """Bring stage `name` up to date by `dvc repro --single-item`, and hand on each line as it is said. True if it ran, False if nothing had changed.

    In the context's DVC process (`process.staying`), or in one for this stage only.
    task_run: of Prefect, for the record of who ran the stage. launch: of the shares that the stage puts together, if it has any.
    Raises Busy if another DVC process is in the way, StageFailed with the last lines if the command fails.
    """
    stale_locks.heal()
    said: deque[str] = deque(maxlen=30)
    ran = False

    def hear(line: Line) -> None:
        nonlocal ran
        tell(line)
        ran = ran or line.text.startswith("Running stage ")
        if not line.passing:
            said.append(line.text)

    with process.staying() as dvc:
        code = dvc.repro(name, hear, {TASK_RUN: task_run, LAUNCH: launch})
    if code == 0:
        return ran
    if LOCKED.search("\n".join(said)):
        raise Busy(f"{name}: another process is at work on it, or another DVC in this folder")
    raise StageFailed(name, said)


def accept(names: Iterable[str]) -> tuple[str, ...]:
    """Declare that edits of code didn't change what these stages made: dvc.lock gets the new hashes of their code, and keeps everything else.

    `dvc commit` does the same where every dependency is there; this works without the demonstrations too. Outs of other stages and parameters
    are never accepted: those are lineage. Returns the stages. ValueError for a stage that dvc.yaml doesn't have.
    """
    from dvc.dependency.param import ParamsDependency
    from dvc.fs import localfs
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages

    with _told_as_mistakes(), Repo() as repo, repo.lock:
        made = [out.fs_path for out in repo.index.outs]
        stages = collect_stages(repo, list(names))
        for stage in stages:
            for dep in stage.deps:
                if not isinstance(dep, ParamsDependency) and not any(
                    localfs.overlaps(dep.fs_path, path) for path in made
                ):
                    dep.save()
            stage.dump(update_pipeline=False)
        return tuple(stage.addressing for stage in stages)
