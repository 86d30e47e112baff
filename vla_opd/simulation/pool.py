"""A pool of simulator processes: each owns one `Env` and is replaced when it dies or hangs.

A worker is a fresh interpreter (never a fork) with its own command line: it imports numpy, the
params and the environments, but neither torch nor the caller's `__main__`. Commands and replies
travel pickled over a private socket pair. Frames come back through anonymous shared memory (a
memfd, which has no name, so nothing is left behind when processes are killed). Linux only.
"""

import json
import math
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
from vla_opd.simulation.worker import Crash, frames_shape, map_frames

# One thread per worker: the workers share the machine, and the last bits of a sum must not depend
# on the number of cores.
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
    """How the simulators are hosted; no episode depends on it.

    workers:   W, the number of simulator processes.
    timeout_s: seconds per command, after which a worker counts as hung. A worker's first command
               includes making the environment.
    attempts:  crashes of one episode after which the run gives up.
    """

    workers: int = 1
    timeout_s: float = 300.0
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "timeout_s", "attempts"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"pool.{name} is {value!r}; expected more than 0")


@dataclass
class SimulationStats:
    """Costs of a stage's simulations so far. Simulator crashes are not failed episodes.

    states:      kept or labelled by this process.
    policy_s:    seconds in the policy's forward passes.
    waiting_s:   seconds of waiting for simulators.
    simulator_s: seconds in commands, summed over the workers.
    environment: the environment's description of itself, for the manifest.
    """

    crashes: int = 0
    states: int = 0
    policy_s: float = 0.0
    waiting_s: float = 0.0
    simulator_s: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def as_metrics(self) -> dict[str, float]:
        """Return the numbers by name; the rate of states only if there are any."""
        metrics: dict[str, float] = {
            "crashes": self.crashes,
            "policy_seconds": self.policy_s,
            "waiting_seconds": self.waiting_s,
            "simulator_seconds": self.simulator_s,
        }
        if self.states:
            elapsed_s = time.perf_counter() - self.began
            metrics["states_per_second"] = self.states / elapsed_s
        return metrics


class _CrashError(Exception):
    """A worker died, hung or raised; the text says which."""


class _Worker:
    """One worker of the pool: lasting shared memory, and a process that may be replaced.

    task:     the task that the environment is set up for.
    awaiting: a command is in progress, until `deadline` (of `time.monotonic`).
    """

    def __init__(self, environment: EnvironmentParams, capacity: int) -> None:
        self.job: Job | None = None
        self.awaiting = False
        self.task: str | None = None
        self.deadline = 0.0
        self.connection: mpc.Connection | None = None
        self._greeting = (environment, capacity)
        self._process: subprocess.Popen[bytes] | None = None
        size = math.prod(frames_shape(environment, capacity))
        self._shared = os.memfd_create("frames")
        os.ftruncate(self._shared, size)
        self._frames = map_frames(self._shared, environment, capacity)

    def send(self, command: Command, timeout_s: float) -> None:
        """Send a command, starting the process if there is none. `_CrashError` if it is dead."""
        try:
            connection = self.connection or self._start()
            connection.send(command)
        except OSError as error:
            raise _CrashError(self._describe_exit()) from error
        self.awaiting = True
        self.deadline = time.monotonic() + timeout_s

    def receive(self) -> Outcome:
        """Return the reply that has arrived.

        `_CrashError` if the process died or the command crashed; the command's own ValueError.
        """
        assert self.connection is not None
        try:
            reply: Outcome | Crash = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _CrashError(self._describe_exit()) from error
        self.awaiting = False
        if isinstance(reply, Outcome):
            count = len(reply.observed)
            frames = self._frames[:count].copy()
            return replace(reply, frames=frames)
        if reply.mistake is not None:
            mistake = ValueError(reply.mistake)
            mistake.add_note(f"In the simulator process:\n{reply.text}")
            raise mistake
        raise _CrashError(reply.text)

    def kill(self) -> None:
        """Kill the process; the next command starts another."""
        self.hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self.task = None
        self.awaiting = False

    def hang_up(self) -> None:
        """Close the connection, which makes an idle process close its simulator and exit."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def close(self) -> None:
        """End the process, after a grace period if it is idle, and free the shared memory."""
        self.hang_up()
        process = self._process
        if process is not None and not self.awaiting:
            _wait_for_exit(process, _GRACE_S)
        self.kill()
        self._frames = self._frames[:0].copy()  # the mapping holds a descriptor of its own
        os.close(self._shared)

    def _start(self) -> mpc.Connection:
        parent_end, worker_end = mpc.Pipe(duplex=True)
        pipe = worker_end.fileno()
        start = {
            "path": list(map(str, sys.path)),
            "serve": [pipe, self._shared, os.getpid()],
        }
        with worker_end:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own code
                [sys.executable, "-X", "faulthandler", "-c", _BOOT, json.dumps(start)],
                env={**os.environ, **_ONE_THREAD},
                stdin=subprocess.DEVNULL,
                pass_fds=(pipe, self._shared),
            )
        self.connection = parent_end
        parent_end.send(self._greeting)
        return parent_end

    def _describe_exit(self) -> str:
        process = self._process
        if process is None or not _wait_for_exit(process, _GRACE_S):
            return "the simulator process closed its connection"
        code = process.returncode
        if code < 0:
            cause = signal.Signals(-code)
            return f"the simulator process died of {cause.name}"
        return f"the simulator process exited with code {code}"


def _wait_for_exit(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


class JobQueue:
    """Jobs that wait for a worker, by task, and the number of crashes of each job.

    ValueError if a job occurs twice.
    """

    def __init__(self, jobs: Iterable[Job], attempts: int) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._crashes: Counter[Job] = Counter()
        self._attempts = attempts
        distinct: set[Job] = set()
        for job in jobs:
            if job in distinct:
                raise ValueError(f"jobs: {job} occurs twice; expected distinct jobs")
            distinct.add(job)
            task = job.placement.task
            self._waiting.setdefault(task, deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, task: str | None, served: set[str]) -> Job:
        """Remove and return the next job for a worker whose environment is set up for `task`.

        Changing the task costs seconds. So it is a job of that task if there is one; otherwise of
        the task with the most waiting jobs among those that no worker serves (`served` are the
        others), or among all tasks.
        """
        counts = {name: len(jobs) for name, jobs in self._waiting.items() if jobs}
        if task is None or task not in counts:
            unserved = [name for name in counts if name not in served]
            task = max(unserved or counts, key=counts.__getitem__)
        return self._waiting[task].popleft()

    def put_back(self, job: Job, error: str) -> None:
        """Put a job whose worker crashed first in line. RuntimeError after too many crashes."""
        self._crashes[job] += 1
        crashes = self._crashes[job]
        if crashes >= self._attempts:
            raise RuntimeError(
                f"{job.placement}, member {job.member}: the simulator crashed "
                f"{crashes} times; the last time: {error}"
            )
        task = job.placement.task
        self._waiting[task].appendleft(job)


class Pool:
    """W simulators that work through jobs, each a sequence of commands. A context manager.

    `first(job)` returns the command that starts the job, also when it is started again because its
    worker crashed; nothing of the earlier attempt is kept. After that, the caller answers every
    outcome of `collect` with `send` or `finish`.

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
        stats: SimulationStats,
    ) -> None:
        self._queue = JobQueue(jobs, settings.attempts)
        self._first = first
        self._settings = settings
        self._stats = stats
        self._workers: list[_Worker] = []
        for _ in range(min(settings.workers, len(self._queue))):
            worker = _Worker(environment, capacity)
            self._workers.append(worker)

    def __enter__(self) -> "Pool":  # noqa: PYI034 - the tests' run-time type checker fails on Self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            if not worker.awaiting:
                worker.hang_up()  # all of them first, so that they close their simulators at once
        for worker in self._workers:
            worker.close()

    @property
    def unfinished(self) -> bool:
        """Return whether any job waits or runs."""
        running = any(worker.job for worker in self._workers)
        return running or len(self._queue) > 0

    @property
    def awaiting(self) -> bool:
        """Return whether any worker is busy, so that `collect` can return an outcome."""
        return any(worker.awaiting for worker in self._workers)

    def send(self, job: Job, command: Command) -> None:
        """Send the next command of a job that `collect` returned an outcome of."""
        self._send(self._worker_of(job), command)

    def finish(self, job: Job) -> None:
        """End a job; its worker takes the next."""
        self._worker_of(job).job = None
        self._assign()

    def collect(self) -> list[tuple[Job, Outcome]]:
        """Wait until a busy worker answers, dies or hangs, and return the outcomes that arrived.

        Empty if that was a crash, whose job is started again. The ValueError of a command is
        raised as it was; RuntimeError after too many crashes of one job names its placement and
        the last error.
        """
        self._assign()
        busy = [worker for worker in self._workers if worker.awaiting]
        answered = self._wait(busy)
        outcomes: list[tuple[Job, Outcome]] = []
        late: list[_Worker] = []
        for worker in busy:
            if worker.connection in answered:
                outcomes.extend(self._receive(worker))
            elif time.monotonic() > worker.deadline:
                late.append(worker)
        for worker in late:
            self._restart(worker, f"no answer within {self._settings.timeout_s:g} s")
        return outcomes

    def _wait(self, busy: list[_Worker]) -> list[object]:
        began = time.perf_counter()
        nearest = min((worker.deadline for worker in busy), default=0.0)
        remaining = nearest - time.monotonic()
        connections = [worker.connection for worker in busy if worker.connection is not None]
        timeout_s = max(0.0, remaining)
        answered = mpc.wait(connections, timeout_s)
        self._stats.waiting_s += time.perf_counter() - began
        return list(answered)

    def _receive(self, worker: _Worker) -> list[tuple[Job, Outcome]]:
        """Receive a worker's outcome; after a crash, restart it and return none."""
        job = worker.job
        assert job is not None
        try:
            outcome = worker.receive()
        except _CrashError as error:
            self._restart(worker, str(error))
            return []
        self._stats.simulator_s += outcome.seconds
        self._stats.environment = outcome.environment
        return [(job, outcome)]

    def _restart(self, worker: _Worker, error: str) -> None:
        """Replace a crashed worker's process and start its job again."""
        job = worker.job
        worker.job = None
        assert job is not None
        worker.kill()
        self._stats.crashes += 1
        self._queue.put_back(job, error)
        self._assign()

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.job is None and len(self._queue):
                served = {busy.job.placement.task for busy in self._workers if busy.job}
                job = self._queue.take(worker.task, served)
                command = self._first(job)
                worker.job = job
                worker.task = job.placement.task
                self._send(worker, command)

    def _send(self, worker: _Worker, command: Command) -> None:
        try:
            worker.send(command, self._settings.timeout_s)
        except _CrashError as error:
            self._restart(worker, str(error))

    def _worker_of(self, job: Job) -> _Worker:
        return next(worker for worker in self._workers if worker.job == job)
