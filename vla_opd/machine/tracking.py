"""Curves, host and wall time: to W&B, or to JSON lines. Never a prompt, never a failure, and never part of an artifact.

Beside the curves stands a record of executions: which artifact which stage made, who ran it, where, when and from which commit.

With an account (a key in the environment or in ~/.netrc) W&B is online; offline without one, or while it does not answer. `WANDB_MODE` decides
where it is set. One W&B run per execution of a stage, grouped by the name of the run, or as `WANDB_RUN_GROUP` says: resuming an offline run is not
supported by W&B, and runs that share an id overwrite each other.
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
UNREACHABLE = "wandb-unreachable"  # says why W&B is not asked for an hour; each try costs a stage up to 20 s, and falling silent in the middle 60
UNREACHABLE_FOR = 3600.0  # seconds
ANSWERS_WITHIN = 20.0  # seconds; without an answer until then W&B is taken for unreachable
UPLOADS_WITHIN = 60.0  # seconds; what W&B has not taken at the end of a stage by then stays here
CODE = ("flows", "stages", "vla_opd")
PIPELINE = "dvc.yaml"  # whose repository it is where the code is installed elsewhere
ELSEWHERE = (  # git's own variables that lead it to another repository than the one around this folder
    *(
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
    ),
    *(
        "GIT_NAMESPACE",
        "GIT_PREFIX",
        "GIT_CEILING_DIRECTORIES",
        "GIT_SHALLOW_FILE",
        "GIT_GRAFT_FILE",
        "GIT_REPLACE_REF_BASE",
    ),
)


class Execution(BaseModel):
    """One run of a stage to its end.

    id:       its name here and in W&B. task_run: the Prefect task run that it was, if any.
    digest:   of the artifact `name` that it published.
    began, ended: UTC.
    commit:   git's HEAD at its start; `edited` if the code in the working tree differed from it then. Empty outside a repository.
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


def execution(host: Host, run: str, stage: str, name: str) -> Callable[[str], None]:
    """Begin one run of a stage: `finished(digest)` adds it to the record of executions. Without tracking nothing is; no failure fails a stage."""
    if host.tracking == "none":
        return lambda _digest: None
    began, (commit, edited) = datetime.now(UTC), _head()

    def finished(digest: str) -> None:
        one = Execution(
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
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = path.is_file() and not f"\n{path.read_text()}".endswith(
                "\n"
            )  # a kill's half line must not take this one with it
            with path.open("a") as stream:
                stream.write("\n" * cut + one.model_dump_json() + "\n")
        except OSError as error:
            warnings.warn(
                f"{path}: {error}; who made {name} and when is not recorded", stacklevel=2
            )

    return finished


def executions(folder: Path) -> tuple[Execution, ...]:
    """The executions recorded in a run's folder of metrics, the oldest first; a line that a kill cut short is passed over."""
    path = folder / EXECUTIONS
    found: list[Execution] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(Execution.model_validate_json(line))
        except ValidationError:
            continue
    return tuple(found)


def _head() -> tuple[str, bool]:
    """The commit that is checked out here, and whether its code was edited since. None, with a warning that says why, where git can't tell."""
    code = [
        str(Path(name).resolve()) for name in CODE if Path(name).exists()
    ]  # the member of a study has links to it
    try:
        _require_tracked(code or [PIPELINE])
        commit = ask_git("rev-parse", "HEAD").decode().strip()
        return commit, bool(ask_git("status", "--porcelain", "--", *code).strip())
    except OSError as error:
        warnings.warn(f"no commit is recorded: {error}", stacklevel=2)
        return "", False


def _require_tracked(files: Sequence[str]) -> None:
    """OSError if the repository around this folder is another project's."""
    if not ask_git("ls-files", "--", *files):
        raise OSError("the repository around this folder doesn't hold this project's code")


def ask_git(*words: str) -> bytes:
    """What git says of this folder. OSError with git's own words where it says nothing.

    What the environment says of repositories (GIT_DIR and the like) is of another one: where a hook or a script has set it, it isn't about us.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        done = subprocess.run(["git", *words], env=environment, capture_output=True, check=False)  # noqa: S603, S607 - the user's own git
    except FileNotFoundError:
        raise OSError("git isn't installed") from None
    if done.returncode != 0:
        raise OSError(
            done.stderr.decode(errors="replace").strip().partition("\n")[0]
            or f"git ended with {done.returncode}"
        )
    return done.stdout


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


@contextmanager
def track(host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]) -> Generator[Log]:
    """`log(metrics, step)` for one execution of a stage. Metrics are numbers by name; `step` counts what the stage repeats.

    What makes a share has its own lines and its own W&B run.
    """
    name = name if host.share.whole else f"{name}-share{host.share.number}of{host.share.count}"
    with _jsonl(host, run, stage, name) as lines:
        online = _Online(
            _wandb(host, run, stage, name, config) if host.tracking == "wandb" else None,
            host.metrics,
        )

        def log(metrics: Mapping[str, float], step: int) -> None:
            lines(metrics, step)
            online.call(
                "log", {f"{stage}/{key}": value for key, value in metrics.items()}, step=step
            )

        try:
            yield log
        finally:
            online.finish()


class _Online:
    """A W&B run that fails nothing: the first time that W&B's own process does not answer, it is given up with a warning."""

    def __init__(self, run: Any, metrics: Path) -> None:
        self._run, self._metrics = run, metrics

    def call(self, what: str, *arguments: Any, **named: Any) -> None:
        """A method of the run, while there is one."""
        if self._run is None:
            return
        try:
            getattr(self._run, what)(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - W&B's own process is gone, or whatever else: it's a view of the JSON lines
            self._run = None
            with suppress(Exception):
                import wandb

                wandb.teardown()  # now, and not with a traceback when the process ends
            warnings.warn(
                f"W&B was lost ({error or type(error).__name__}); metrics go to {self._metrics} as JSON lines only",
                stacklevel=3,
            )

    def finish(self) -> None:
        """End the run. A server that has fallen silent shows only here, by the time that this takes; the next stages won't ask it."""
        began = time.monotonic()
        self.call("finish")
        if time.monotonic() - began >= UPLOADS_WITHIN:
            _take_for_unreachable(
                self._metrics, f"did not take a run's curves within {UPLOADS_WITHIN:.0f} s"
            )


@contextmanager
def _jsonl(host: Host, run: str, stage: str, name: str) -> Generator[Log]:
    if host.tracking == "none":
        yield lambda _metrics, _step: None
        return
    path = host.metrics / run / f"{stage}-{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a")
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror}; the curves of {name} are not kept", stacklevel=2)
        yield lambda _metrics, _step: None
        return
    with opened as stream:

        def log(metrics: Mapping[str, float], step: int) -> None:
            stream.write(
                json.dumps({"time": time.time(), "host": platform.node(), "step": step, **metrics})
                + "\n"
            )
            stream.flush()

        yield log


def _wandb(
    host: Host, run: str, stage: str, name: str, config: Mapping[str, Any]
) -> Any:  # a wandb.Run or None; imported lazily
    """A W&B run. Offline for an hour, with one warning, after an online one did not start; None, with a warning, if an offline one doesn't either."""
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # its telemetry asks for W&B's server, offline too
    _keep_wandb_out_of_home(host.metrics)
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    unreachable = host.metrics / UNREACHABLE
    if (
        mode == "online"
        and unreachable.is_file()
        and time.time() - unreachable.stat().st_mtime < UNREACHABLE_FOR
    ):
        mode = "offline"
    try:
        import wandb  # slow to import, and not wanted with other trackers

        return wandb.init(
            project="vla-opd",
            group=os.environ.get("WANDB_RUN_GROUP") or run,
            job_type=stage,
            name=f"{stage}-{name}",
            id=host.execution or None,
            dir=host.metrics,
            config={**config, **({"prefect_task_run": host.task_run} if host.task_run else {})},
            mode=mode,  # pyright: ignore[reportArgumentType] - WANDB_MODE is free text; wandb.init checks it
            settings=wandb.Settings(
                silent=True,
                init_timeout=ANSWERS_WITHIN,
                finish_timeout=UPLOADS_WITHIN,
                console="off",
            ),
        )
    except Exception as error:  # noqa: BLE001 - its own errors, and whatever else its many parts meet on a strange machine
        if mode != "online":
            warnings.warn(
                f"W&B did not start ({error}); metrics go to {host.metrics} as JSON lines only",
                stacklevel=2,
            )
            return None
        _take_for_unreachable(host.metrics, f"did not start ({error})")
        return _wandb(host, run, stage, name, config)


def _keep_wandb_out_of_home(metrics: Path) -> None:
    """Where there is no home, or none that can be written to, W&B's files go beside its runs: it would stop without."""
    try:
        home = Path.home()
        usable = os.access(home, os.R_OK | os.W_OK | os.X_OK)
    except RuntimeError:
        usable = False
    if not usable:
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(name, str(metrics.resolve() / "wandb-home"))


def _take_for_unreachable(metrics: Path, why: str) -> None:
    unreachable = metrics / UNREACHABLE
    with suppress(OSError):  # then the next stage tries it too
        unreachable.write_text(why)
    warnings.warn(
        f"W&B {why}; its runs stay in {metrics / 'wandb'} for the next hour (`wandb sync` uploads them; remove {unreachable} to try again now)",
        stacklevel=2,
    )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    except (OSError, RuntimeError):  # no home, or one that this user can't read
        return False
