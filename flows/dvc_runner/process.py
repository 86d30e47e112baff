"""One DVC process for stage after stage, since DVC's own start is much of a stage's cost.

`main` runs `dvc repro --single-item` for each request that it reads, a line of JSON.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from flows.dvc_runner import cache_check
from vla_opd.machine import proxies
from vla_opd.machine.parent_death import die_with_parent

CHATTER = re.compile(
    r"Running stage |> |Stage '|Updating lock file|Generating lock file|To track the changes"
    r"|\tgit add|To enable auto|\tdvc config|Use `dvc push`"
)
NAME = "flows.dvc_runner.process"  # in the command line, for people who list processes
BOOT = (
    "import sys; sys.path.insert(0, {root!r}); del sys.argv[1]; "
    "from flows.dvc_runner.process import main; main()"
)
LineHandler = Callable[["Line"], object]
PASSING_EVERY_S = 15.0  # between the lines of a progress bar that a run's log keeps


@dataclass(frozen=True)
class Line:
    """One line of a stage's output.

    passing: it ended in a carriage return, as a progress bar's lines do.
    """

    text: str
    passing: bool = False

    @property
    def chatter(self) -> bool:
        """Return whether the line is empty or DVC's, not the stage's."""
        return not self.text.strip() or CHATTER.match(self.text) is not None


class ThrottledLog:
    """A stage's output in the log of the Prefect run: every line, but few of progress bars."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._last_passing = float("-inf")

    def write(self, line: Line) -> None:
        """Log a line, unless it is DVC's or follows another line of a progress bar closely."""
        now = time.monotonic()
        if line.chatter or (line.passing and now - self._last_passing < PASSING_EVERY_S):
            return
        if line.passing:
            self._last_passing = now
        self._logger.info("%s", line.text.strip())


class Dvc:
    """The process, started at the first request and again after its death.

    It dies with the process that started it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def repro(self, stage: str, on_line: LineHandler, environment: Mapping[str, str]) -> int:
        """Run `dvc repro --single-item STAGE` and return its exit code.

        It is minus the signal's number if the process dies of a signal.
        on_line:     called with each line of output as it arrives.
        environment: variables for the stage, in addition to this process's own.
        """
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        end = f"{uuid.uuid4()} "
        request = {"stage": stage, "environment": dict(environment), "end": end}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            for line in read_lines(process.stdout):
                if line.text.startswith(end):
                    return int(line.text.removeprefix(end))
                on_line(line)
        except BaseException:  # nobody will read the rest of the stage's output
            process.terminate()
            raise
        return process.wait()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process if there is none, so that a later request need not wait for it."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start()
        return self._process

    def close(self) -> None:
        """End the process, if there is one, by closing its input."""
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None


_CURRENT: ContextVar[Dvc | None] = ContextVar("dvc", default=None)


@contextmanager
def shared_dvc() -> Generator[Dvc]:
    """Yield a DVC process that lasts as long as the context; nested contexts share it."""
    outer = _CURRENT.get()
    if outer is not None:
        yield outer
        return
    dvc = Dvc()
    token = _CURRENT.set(dvc)
    try:
        yield dvc
    finally:
        _CURRENT.reset(token)
        dvc.close()


def _start() -> "subprocess.Popen[bytes]":
    """Start the process, with this interpreter's folder first on PATH (dvc.yaml runs `python`).

    `stale_locks.is_held` recognises it by the last words of its command, in case another process
    gets its number. `-P` imports this module from here, whatever the run's folder contains.
    """
    folder = str(Path(sys.executable).parent)
    path = {"PATH": folder + os.pathsep + os.environ.get("PATH", ""), "PYTHONUNBUFFERED": "1"}
    environment = proxies.restore(os.environ | path)
    end_with_parent = partial(die_with_parent, signal.SIGTERM, os.getpid())
    boot = BOOT.format(root=str(Path(__file__).resolve().parents[2]))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", boot, NAME, "repro", "--single-item"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call, no locks taken
    )


def read_lines(stream: IO[bytes]) -> Iterator[Line]:
    """Yield the lines of a byte stream as they arrive; a carriage return ends a passing line."""
    incomplete = b""
    while block := os.read(stream.fileno(), 65536):
        *complete, incomplete = re.split(rb"(?<=[\n\r])(?!\n)", incomplete + block)
        for line in complete:
            yield _decode(line)
    if incomplete:
        yield _decode(incomplete)


def _decode(line: bytes) -> Line:
    text = line.decode(errors="replace")
    return Line(text.rstrip("\r\n"), passing=text.endswith("\r"))


def main() -> None:
    """Answer requests until there are no more, or until Ctrl-C in the terminal."""
    from dvc.cli import main as dvc

    import_module("dvc.repo")  # now, so that the first stage need not wait for it

    cache_check.hash_on_read()
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a stage has no input
    try:
        for line in requests:
            request = json.loads(line)
            os.environ |= request["environment"]
            code = dvc([*sys.argv[1:], request["stage"]])
            print(f"\n{request['end']}{code}", flush=True)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
