"""One DVC process for stage after stage: a good part of what DVC takes for a single stage is its own start.

`main` repeats `dvc repro --single-item` for each request that it reads, a line of JSON.
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

from flows.dvc_runner import cache_check, lock_file
from vla_opd.machine import proxies
from vla_opd.machine.parent_death import die_with_parent

CHATTER = re.compile(
    r"Running stage |> |Stage '|Updating lock file|Generating lock file|To track the changes|\tgit add|To enable auto|\tdvc config|Use `dvc push`"
)
NAME = "flows.dvc_runner.process"  # in the process's command line, for who looks at processes
BOOT = "import sys; sys.path.insert(0, {root!r}); del sys.argv[1]; from flows.dvc_runner.process import main; main()"
Tell = Callable[["Line"], object]
PASSING_EVERY = 15.0  # seconds between a progress bar's lines that a run's log keeps


@dataclass(frozen=True)
class Line:
    """One line of a stage's output; a `passing` one ended in a carriage return, as a progress bar's do."""

    text: str
    passing: bool = False

    @property
    def chatter(self) -> bool:
        """Whether DVC said it, not the stage."""
        return not self.text.strip() or CHATTER.match(self.text) is not None


class Kept:
    """A stage's output in the log of the Prefect run: every line, and of progress bars one now and then."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._last_passing = float("-inf")

    def tell(self, line: Line) -> None:
        """Log one line, if it is to be kept; what DVC itself says of every stage isn't."""
        now = time.monotonic()
        if line.chatter or (line.passing and now - self._last_passing < PASSING_EVERY):
            return
        self._last_passing = now if line.passing else self._last_passing
        self._logger.info("%s", line.text.strip())


class Dvc:
    """The process: started at the first request, and again if it has died since. It dies with the process that started it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def repro(self, stage: str, tell: Tell, environment: Mapping[str, str]) -> int:
        """The exit code of `dvc repro --single-item STAGE`; minus the signal if the process dies of one. `tell` gets each line as it is said.

        environment: what the stage finds there besides this process's own.
        """
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        end = f"{uuid.uuid4()} "
        request = {"stage": stage, "environment": dict(environment), "end": end}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            for line in lines(process.stdout):
                if line.text.startswith(end):
                    return int(line.text.removeprefix(end))
                tell(line)
        except BaseException:  # nobody will read what the stage goes on to say
            process.terminate()
            raise
        return process.wait()

    def start(self) -> "subprocess.Popen[bytes]":
        """The process, started if it isn't there: who will soon ask need not wait for it then."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _started()
        return self._process

    def close(self) -> None:
        """End the process, if there is one: it ends when nothing is asked of it any more."""
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None


_STAYING: ContextVar[Dvc | None] = ContextVar("staying", default=None)


@contextmanager
def staying() -> Generator[Dvc]:
    """The DVC process for as long as the context lasts; within another such context, that one's."""
    outer = _STAYING.get()
    if outer is not None:
        yield outer
        return
    own = Dvc()
    token = _STAYING.set(own)
    try:
        yield own
    finally:
        _STAYING.reset(token)
        own.close()


def _started() -> "subprocess.Popen[bytes]":
    """With this interpreter's folder first on PATH (dvc.yaml says `python`), and unbuffered.

    By the last words of its command `locks.held` knows it from another process that got its number.
    `-P`: whatever the folder of the run, or the environment, holds, this module is ours.
    """
    folder = str(Path(sys.executable).parent)
    path = {"PATH": folder + os.pathsep + os.environ.get("PATH", ""), "PYTHONUNBUFFERED": "1"}
    environment = proxies.restored(os.environ | path)
    boot = BOOT.format(root=str(Path(__file__).resolve().parents[2]))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", boot, NAME, "repro", "--single-item"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()),  # noqa: PLW1509 - one system call, no locks taken
    )


def lines(stream: IO[bytes]) -> Iterator[Line]:
    """Lines of a byte stream as they come; a carriage return ends a passing one."""
    held = b""
    while block := os.read(stream.fileno(), 65536):
        *whole, held = re.split(rb"(?<=[\n\r])(?!\n)", held + block)
        yield from (_line(piece) for piece in whole)
    if held:
        yield _line(held)


def _line(piece: bytes) -> Line:
    text = piece.decode(errors="replace")
    return Line(text.rstrip("\r\n"), passing=text.endswith("\r"))


def main() -> None:
    """Answer requests until there are no more, or until the terminal's interrupt."""
    from dvc.cli import main as dvc

    import_module("dvc.repo")  # now, not when the first stage waits for it

    lock_file.remember()
    cache_check.distrust()
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
