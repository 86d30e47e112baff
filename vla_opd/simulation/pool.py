"""A pool of simulator processes: each owns one `Env`, runs commands in it, and is replaced when it dies or hangs.

A worker is a fresh interpreter (never a fork), started by its own command line: it imports numpy, the params and the environments, but no torch and
not the caller's `__main__`. Commands and replies travel pickled over a private socket pair; frames come back through anonymous shared memory
(a memfd: it has no name, so nothing can be left behind, whoever is killed). Linux only.
"""

import json
import multiprocessing.connection as mpc
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Command, Job, Outcome
from vla_opd.simulation.worker import Crash, frames_in

# One thread a worker: W of them share the machine, and the last bits of a sum must not depend on how many cores it has.
_ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    ),
    "1",
)
_BOOT = """
import json, sys
start = json.loads(sys.argv[1])
sys.path[:] = start["path"]
from vla_opd.simulation.worker import serve
serve(*start["serve"])
"""
_GRACE_S = 5.0


@dataclass(frozen=True)
class PoolSettings:
    """How the simulators are hosted; no episode depends on any of it.

    workers:   W, simulator processes.
    timeout_s: seconds that a worker may take over one command (the first includes making the environment) before it counts as hung.
    attempts:  crashes of one episode after which the run gives up.
    """

    workers: int = 1
    timeout_s: float = 300.0
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "timeout_s", "attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"pool.{name} is {getattr(self, name)!r}; expected more than 0")


@dataclass
class Tally:
    """What a run cost, current while it runs. Crashes of simulators are counted here, and are no failed episodes.

    states: kept, or labelled, by this process.
    """

    crashes: int = 0
    states: int = 0
    policy_s: float = 0.0  # in the policy's forward passes
    waiting_s: float = 0.0  # waiting for simulators
    simulator_s: float = 0.0  # in commands, summed over the workers
    environment: Mapping[str, str] = field(
        default_factory=dict
    )  # what the environment says of itself, for the manifest
    began: float = field(default_factory=time.perf_counter)

    def as_metrics(self) -> dict[str, float]:
        """The numbers, by name."""
        rate = (
            {"states_per_second": self.states / (time.perf_counter() - self.began)}
            if self.states
            else {}
        )
        return {
            "crashes": self.crashes,
            "policy_seconds": self.policy_s,
            "waiting_seconds": self.waiting_s,
            "simulator_seconds": self.simulator_s,
            **rate,
        }


class _CrashError(Exception):
    """A worker died, hung or raised; the text says which."""


class _Worker:
    """One seat of the pool: shared memory that lasts, and a process that may be replaced."""

    def __init__(self, environment: EnvironmentParams, capacity: int) -> None:
        size = capacity * len(environment.cameras) * environment.image_size**2 * 3
        self.job: Job | None = None
        self.awaiting = False  # a command is under way
        self.task: str | None = None  # what the environment is set up for
        self.deadline = 0.0
        self.connection: mpc.Connection | None = None
        self._greeting = (environment, capacity)
        self._process: subprocess.Popen[bytes] | None = None
        self._shared = os.memfd_create("frames")
        os.ftruncate(self._shared, size)
        self._frames = frames_in(self._shared, environment, capacity)

    def send(self, command: Command, timeout_s: float) -> None:
        """Start a command, and the process if there is none. `_CrashError` if it is dead."""
        try:
            connection = self.connection or self._start()
            connection.send(command)
        except OSError as error:
            raise _CrashError(self._obituary()) from error
        self.awaiting, self.deadline = True, time.monotonic() + timeout_s

    def receive(self) -> Outcome:
        """The reply that has arrived. `_CrashError` if it is a death or a crash; the command's own ValueError."""
        assert self.connection is not None
        try:
            reply: Outcome | Crash = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _CrashError(self._obituary()) from error
        self.awaiting = False
        if isinstance(reply, Outcome):
            return replace(reply, frames=self._frames[: len(reply.observed)].copy())
        if reply.mistake is not None:
            mistake = ValueError(reply.mistake)
            mistake.add_note(f"In the simulator process:\n{reply.text}")
            raise mistake
        raise _CrashError(reply.text)

    def kill(self) -> None:
        """End the process now, whatever it is doing; the next command starts another."""
        self.hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self.task, self.awaiting = None, None, False

    def hang_up(self) -> None:
        """Close the connection, which tells an idle process to close its simulator and exit."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def close(self) -> None:
        """End the process, with a grace period if it is idle, and free the shared memory."""
        self.hang_up()
        if self._process is not None and not self.awaiting:
            _exits(self._process, _GRACE_S)
        self.kill()
        self._frames = self._frames[:0].copy()  # the mapping holds a descriptor of its own
        os.close(self._shared)

    def _start(self) -> mpc.Connection:
        ours, theirs = mpc.Pipe(duplex=True)
        start = {
            "path": [str(entry) for entry in sys.path],
            "serve": [theirs.fileno(), self._shared, os.getpid()],
        }
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own code
                [sys.executable, "-X", "faulthandler", "-c", _BOOT, json.dumps(start)],
                env={**os.environ, **_ONE_THREAD},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._shared),
            )
        self.connection = ours
        ours.send(self._greeting)
        return ours

    def _obituary(self) -> str:
        if self._process is None or not _exits(self._process, _GRACE_S):
            return "the simulator process closed its connection"
        code = self._process.returncode
        return (
            f"the simulator process died of {signal.Signals(-code).name}"
            if code < 0
            else f"the simulator process exited with code {code}"
        )


def _exits(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


class JobQueue:
    """Jobs that wait for a worker, by task; and how often each one's worker crashed."""

    def __init__(self, jobs: Iterable[Job], attempts: int) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._crashes: Counter[Job] = Counter()
        self._attempts = attempts
        seen: set[Job] = set()
        for job in jobs:
            if job in seen:
                raise ValueError(f"jobs: {job} occurs twice; expected distinct jobs")
            seen.add(job)
            self._waiting.setdefault(job.placement.task, deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, task: str | None, served: set[str]) -> Job:
        """The next job for a worker whose environment has `task` (changing it costs seconds) while others work on `served`.

        One of its own task; otherwise of the task with the most jobs left among those that nobody serves; otherwise among all.
        """
        left = {name: len(jobs) for name, jobs in self._waiting.items() if jobs}
        if task is None or task not in left:
            unserved = {name: count for name, count in left.items() if name not in served}
            task = _most(unserved or left)
        return self._waiting[task].popleft()

    def again(self, job: Job, error: str) -> None:
        """Put a job back whose worker crashed. RuntimeError once it has crashed too often."""
        self._crashes[job] += 1
        if self._crashes[job] >= self._attempts:
            raise RuntimeError(
                f"{job.placement}, member {job.member}: the simulator crashed {self._crashes[job]} times; the last time: {error}"
            )
        self._waiting[job.placement.task].appendleft(job)


def _most(counts: Mapping[str, int]) -> str:
    return max(counts, key=counts.__getitem__)


class Pool:
    """W simulators that work through jobs, each a sequence of commands; use it as a context manager.

    `first(job)` gives the command that starts the job, whenever it starts: also when its worker has crashed and it is begun again, with nothing
    kept of the earlier attempt. After that, the caller answers every outcome of `collect` with `send` or `finish`.

    capacity: the most observations that one command may return.
    """

    def __init__(
        self,
        environment: EnvironmentParams,
        jobs: Iterable[Job],
        first: Callable[[Job], Command],
        *,
        capacity: int,
        settings: PoolSettings,
        tally: Tally,
    ) -> None:
        self._queue = JobQueue(jobs, settings.attempts)
        self._first, self._settings, self._tally = first, settings, tally
        self._workers = [
            _Worker(environment, capacity) for _ in range(min(settings.workers, len(self._queue)))
        ]

    def __enter__(self) -> "Pool":  # noqa: PYI034 - the run-time type checker of the tests does not know Self here
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            if not worker.awaiting:
                worker.hang_up()  # all at once: they close their simulators side by side
        for worker in self._workers:
            worker.close()

    @property
    def unfinished(self) -> bool:
        """Whether any job waits or runs."""
        return bool(len(self._queue)) or any(worker.job for worker in self._workers)

    @property
    def awaiting(self) -> bool:
        """Whether any worker is busy, so that `collect` has something to wait for."""
        return any(worker.awaiting for worker in self._workers)

    def send(self, job: Job, command: Command) -> None:
        """The next command of a job that `collect` returned an outcome of."""
        self._command(self._worker_of(job), command)

    def finish(self, job: Job) -> None:
        """The job is done; its worker takes the next."""
        self._worker_of(job).job = None
        self._assign()

    def collect(self) -> list[tuple[Job, Outcome]]:
        """Wait until a busy worker answers, dies or hangs; what has come back. Empty if that was a crash, whose job is begun again.

        ValueError of a command as it was raised; RuntimeError after too many crashes of one job, naming its placement and the last error.
        """
        self._assign()
        busy = [worker for worker in self._workers if worker.awaiting]
        answered = self._wait(busy)
        outcomes = [self._receive(worker) for worker in busy if worker.connection in answered]
        for worker in busy:
            if worker.connection not in answered and time.monotonic() > worker.deadline:
                self._crashed(worker, f"no answer within {self._settings.timeout_s:g} s")
        return [pair for pair in outcomes if pair is not None]

    def _wait(self, busy: list[_Worker]) -> list[object]:
        began = time.perf_counter()
        nearest = min((worker.deadline for worker in busy), default=0.0)
        connections = [worker.connection for worker in busy if worker.connection is not None]
        answered = mpc.wait(connections, timeout=max(0.0, nearest - time.monotonic()))
        self._tally.waiting_s += time.perf_counter() - began
        return list(answered)

    def _receive(self, worker: _Worker) -> tuple[Job, Outcome] | None:
        assert worker.job is not None
        try:
            done = worker.receive()
        except _CrashError as error:
            self._crashed(worker, str(error))
            return None
        self._tally.simulator_s += done.seconds
        self._tally.environment = done.environment
        return worker.job, done

    def _crashed(self, worker: _Worker, error: str) -> None:
        job, worker.job = worker.job, None
        assert job is not None
        worker.kill()
        self._tally.crashes += 1
        self._queue.again(job, error)
        self._assign()

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.job is None and len(self._queue):
                served = {other.job.placement.task for other in self._workers if other.job}
                worker.job = self._queue.take(worker.task, served)
                worker.task = worker.job.placement.task
                self._command(worker, self._first(worker.job))

    def _command(self, worker: _Worker, command: Command) -> None:
        try:
            worker.send(command, self._settings.timeout_s)
        except _CrashError as error:
            self._crashed(worker, str(error))

    def _worker_of(self, job: Job) -> _Worker:
        return next(worker for worker in self._workers if worker.job == job)
