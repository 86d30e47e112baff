"""Curves, host and wall time, in W&B or as JSON lines; never a reason to fail, never an artifact.

A record of executions is kept next to the curves: which stage made which artifact, by whom, where,
when and from which commit.

With an account (a key in the environment or in ~/.netrc) W&B runs online; without one, or while
its server does not answer, offline. `WANDB_MODE` overrides that. Each execution of a stage is one
W&B run, grouped by the name of the run or by `WANDB_RUN_GROUP`: W&B can't resume an offline run,
and runs with the same id overwrite each other.
"""

import getpass
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vla_opd.machine.host import Host

Log = Callable[[Mapping[str, float], int], None]
EXECUTIONS = "executions.jsonl"
# While this file is younger than an hour, W&B stays offline: each attempt would cost a stage up to
# INIT_TIMEOUT_S, or UPLOAD_TIMEOUT_S if the server stops answering during the stage.
UNREACHABLE = "wandb-unreachable"
UNREACHABLE_FOR_S = 3600.0
INIT_TIMEOUT_S = 20.0
UPLOAD_TIMEOUT_S = 60.0  # curves that W&B has not taken by then stay on this machine
CODE = ("flows", "stages", "vla_opd")
PIPELINE = "dvc.yaml"  # identifies the project's repository where its code is installed elsewhere
GIT_REDIRECTIONS = (  # git's variables that select another repository than this folder's
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_CEILING_DIRECTORIES",
    "GIT_SHALLOW_FILE",
    "GIT_GRAFT_FILE",
    "GIT_REPLACE_REF_BASE",
)


class Execution(BaseModel):
    """One completed run of a stage.

    id:       its name here and in W&B. task_run: its Prefect task run, if any.
    digest:   of the artifact `name` that it published.
    began, ended: in UTC.
    commit:   git's HEAD when it began, empty outside a repository. edited: the code in the working
              tree differed from it.
    """

    model_config = ConfigDict(frozen=True)
    id: str
    stage: str
    name: str
    digest: str
    began: datetime
    ended: datetime
    host: str
    user: str
    commit: str
    edited: bool
    device: str
    task_run: str = ""


def start_execution(host: Host, run: str, stage: str, name: str) -> Callable[[str], None]:
    """Begin a run of a stage; return `finish(digest)`, which adds it to the record of executions.

    Nothing is recorded without tracking. A failure to record is a warning.
    """
    if host.tracking == "none":
        return lambda _digest: None
    began = datetime.now(UTC)
    commit, edited = _head()

    def finish(digest: str) -> None:
        record = Execution(
            id=host.execution,
            stage=stage,
            name=name,
            digest=digest,
            began=began,
            ended=datetime.now(UTC),
            host=platform.node(),
            user=_user(),
            commit=commit,
            edited=edited,
            device=host.device,
            task_run=host.task_run,
        )
        path = host.metrics / run / EXECUTIONS
        try:
            _append_line(path, record.model_dump_json())
        except OSError as error:
            warnings.warn(
                f"{path}: {error}; who made {name} and when is not recorded", stacklevel=2
            )

    return finish


def _append_line(path: Path, line: str) -> None:
    """Append a line; after one that a kill cut short, start a new line first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.is_file() else ""
    separator = "\n" if text and not text.endswith("\n") else ""
    with path.open("a") as stream:
        stream.write(separator + line + "\n")


def read_executions(folder: Path) -> tuple[Execution, ...]:
    """Read the executions in a run's folder of metrics, oldest first; skip incomplete lines."""
    path = folder / EXECUTIONS
    executions: list[Execution] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValidationError):
            executions.append(Execution.model_validate_json(line))
    return tuple(executions)


def _head() -> tuple[str, bool]:
    """Return the commit that is checked out, and whether its code was edited since.

    Empty, with a warning, where git can't tell.
    """
    # Paths are resolved because the project of a study's member links to the code.
    code = [str(Path(name).resolve()) for name in CODE if Path(name).exists()]
    try:
        _require_tracked(code or [PIPELINE])
        commit = run_git("rev-parse", "HEAD").decode().strip()
        return commit, bool(run_git("status", "--porcelain", "--", *code).strip())
    except OSError as error:
        warnings.warn(f"no commit is recorded: {error}", stacklevel=2)
        return "", False


def _require_tracked(files: Sequence[str]) -> None:
    """Check that the repository around this folder is this project's. OSError otherwise."""
    if not run_git("ls-files", "--", *files):
        raise OSError("the repository around this folder doesn't hold this project's code")


def run_git(*arguments: str) -> bytes:
    """Return git's output for this folder. OSError with git's own message if it fails.

    Variables such as GIT_DIR are ignored: a hook or script sets them for another repository.
    """
    environment = dict(os.environ)
    for name in GIT_REDIRECTIONS:
        environment.pop(name, None)
    try:
        result = subprocess.run(  # noqa: S603 - the user's own git
            ["git", *arguments],  # noqa: S607
            env=environment,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise OSError("git isn't installed") from None
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise OSError(message or f"git ended with {result.returncode}")
    return result.stdout


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


@contextmanager
def track(host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]) -> Generator[Log]:
    """Yield `log(metrics, step)` for one execution of a stage; `step` counts what it repeats.

    Each share has its own JSON lines and its own W&B run.
    """
    if not host.share.whole:
        name = f"{name}-share{host.share.number}of{host.share.count}"
    with _open_json_lines(host, run, stage, name) as log_line:
        wandb_run = None
        if host.tracking == "wandb":
            wandb_run = _start_wandb(host, run, stage, name, config)
        online = _FaultTolerantRun(wandb_run, host.metrics)

        def log(metrics: Mapping[str, float], step: int) -> None:
            log_line(metrics, step)
            prefixed = {f"{stage}/{key}": value for key, value in metrics.items()}
            online.call("log", prefixed, step=step)

        try:
            yield log
        finally:
            online.finish()


class _FaultTolerantRun:
    """A W&B run, or None, that is given up with a warning when W&B's process stops answering."""

    def __init__(self, run: Any, metrics: Path) -> None:
        self._run = run
        self._metrics = metrics

    def call(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call a method of the run, if there still is one."""
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - whatever it is, the JSON lines have the metrics
            self._run = None
            with suppress(Exception):
                import wandb

                wandb.teardown()  # now, without a traceback when the process ends
            warnings.warn(
                f"W&B was lost ({error or type(error).__name__}); metrics go to {self._metrics} as "
                "JSON lines only",
                stacklevel=3,
            )

    def finish(self) -> None:
        """End the run. A long wait shows that the server has stopped answering."""
        began = time.monotonic()
        self.call("finish")
        if time.monotonic() - began >= UPLOAD_TIMEOUT_S:
            _mark_unreachable(
                self._metrics, f"did not take a run's curves within {UPLOAD_TIMEOUT_S:.0f} s"
            )


@contextmanager
def _open_json_lines(host: Host, run: str, stage: str, name: str) -> Generator[Log]:
    if host.tracking == "none":
        yield lambda _metrics, _step: None
        return
    path = host.metrics / run / f"{stage}-{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror}; the curves of {name} are not kept", stacklevel=2)
        yield lambda _metrics, _step: None
        return
    with stream:

        def log(metrics: Mapping[str, float], step: int) -> None:
            row = {"time": time.time(), "host": platform.node(), "step": step, **metrics}
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        yield log


def _start_wandb(host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]) -> Any:
    """Start a W&B run. If it fails online, warn and stay offline for an hour.

    None, with a warning, if it fails offline too.
    """
    # Its telemetry would contact W&B's server even offline.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    _keep_wandb_out_of_home(host.metrics)
    mode = _wandb_mode(host.metrics)
    if host.task_run:
        config = {**config, "prefect_task_run": host.task_run}
    try:
        import wandb  # slow to import, and not needed by other trackers

        return wandb.init(
            project="vla-opd",
            group=os.environ.get("WANDB_RUN_GROUP") or run,
            job_type=stage,
            name=f"{stage}-{name}",
            id=host.execution or None,
            dir=host.metrics,
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=UPLOAD_TIMEOUT_S,
                console="off",
            ),
        )
    except Exception as error:  # noqa: BLE001 - W&B's own errors, and any of its parts
        if mode != "online":
            warnings.warn(
                f"W&B did not start ({error}); metrics go to {host.metrics} as JSON lines only",
                stacklevel=2,
            )
            return None
        _mark_unreachable(host.metrics, f"did not start ({error})")
        return _start_wandb(host, run, stage, name, config)


def _wandb_mode(metrics: Path) -> Any:  # WANDB_MODE is free text, which wandb.init checks
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode == "online" and _is_marked_unreachable(metrics):
        return "offline"
    return mode


def _is_marked_unreachable(metrics: Path) -> bool:
    mark = metrics / UNREACHABLE
    return mark.is_file() and time.time() - mark.stat().st_mtime < UNREACHABLE_FOR_S


def _mark_unreachable(metrics: Path, reason: str) -> None:
    mark = metrics / UNREACHABLE
    with suppress(OSError):  # then the next stage tries again
        mark.write_text(reason)
    warnings.warn(
        f"W&B {reason}; its runs stay in {metrics / 'wandb'} for the next hour "
        f"(`wandb sync` uploads them; remove {mark} to try again now)",
        stacklevel=2,
    )


def _keep_wandb_out_of_home(metrics: Path) -> None:
    """Put W&B's files next to its runs if there is no writable home, without which it fails."""
    try:
        home = Path.home()
        usable = os.access(home, os.R_OK | os.W_OK | os.X_OK)
    except RuntimeError:
        usable = False
    if not usable:
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(name, str(metrics.resolve() / "wandb-home"))


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    except (OSError, RuntimeError):  # no home, or one that this user can't read
        return False
