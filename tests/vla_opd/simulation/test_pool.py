"""The pool of simulator processes: what happens when they die, hang or complain, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.processes import alive, dies
from tests.vla_opd.fake_env import FAMILY, Inspect, PointMass
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Command, Forward, Job, Outcome, Reset
from vla_opd.simulation.pool import JobQueue, Pool, PoolSettings, Tally

ENVIRONMENT = EnvironmentParams(family=FAMILY, tasks=("reach",), image_size=16, cameras=("front",))
ACTIONS = np.full((4, 4), 0.5, np.float32)
ORPHAN = """
from tests.vla_opd.simulation.test_pool import *
with Pool(ENVIRONMENT, jobs("reach", 1), lambda job: Inspect("threads"), capacity=1, settings=PoolSettings(), tally=Tally()) as pool:
    (job, outcome), = pool.collect()
    pool.send(job, Sleep())
    print(outcome.instruction.split()[0], flush=True)
    time.sleep(60)
"""


class Sleep:
    """A command that never ends."""

    def __call__(self, env: object) -> Outcome:
        time.sleep(3600)
        raise AssertionError


def jobs(task: str, count: int) -> list[Job]:
    return [Job(Placement(task, "training", index), 0, index) for index in range(count)]


def run(
    todo: list[Job],
    settings: PoolSettings,
    tally: Tally,
    first: Callable[[Job], Command] | None = None,
) -> dict[int, list[Outcome]]:
    """Every job: a reset, then 8 steps in two commands; the outcomes of the undisturbed attempt by placement index."""
    seen: dict[int, list[Outcome]] = {}

    def begin(job: Job) -> Command:
        seen[job.placement.index] = []
        return first(job) if first else Reset(job.placement)

    with Pool(ENVIRONMENT, todo, begin, capacity=4, settings=settings, tally=tally) as pool:
        while pool.unfinished:
            for job, outcome in pool.collect():
                outcomes = seen[job.placement.index]
                outcomes.append(outcome)
                if first or len(outcomes) == 3:
                    pool.finish(job)
                else:
                    pool.send(job, Forward(4 * (len(outcomes) - 1), ACTIONS, 1))
    return seen


def undisturbed(job: Job) -> list[Outcome]:
    """The same commands in this process; the marker exists by now, so nothing strikes."""
    env = PointMass(ENVIRONMENT)
    return [
        command(env)
        for command in (Reset(job.placement), Forward(0, ACTIONS, 1), Forward(4, ACTIONS, 1))
    ]


def children() -> set[str]:
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def belongings() -> tuple[set[str], int, int]:
    """What a pool might leave behind: child processes, open files, mapped shared memory."""
    return (
        children(),
        len(list(Path("/proc/self/fd").iterdir())),
        Path("/proc/self/maps").read_text().count("memfd:frames"),
    )


@pytest.mark.parametrize("trouble", ["exit", "kill", "hang", "stop", "raise", "nan"])
def test_an_episode_whose_worker_is_lost_is_redone_from_the_start(
    trouble: str, tmp_path: Path
) -> None:
    marker = tmp_path / "struck"
    todo = jobs(f"{trouble}:1:{marker}", 3)
    before = belongings()
    tally = Tally()
    settings = PoolSettings(workers=1, timeout_s=5.0)

    seen = run(todo, settings, tally)

    assert marker.exists()
    assert tally.crashes == 1
    assert belongings() == before
    assert seen.keys() == {0, 1, 2}
    for job in todo:
        for ours, theirs in zip(seen[job.placement.index], undisturbed(job), strict=True):
            assert ours.steps == theirs.steps
            assert ours.observed.tolist() == theirs.observed.tolist()
            np.testing.assert_array_equal(ours.frames, theirs.frames)
            np.testing.assert_array_equal(ours.proprio, theirs.proprio)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("exit", "exited with code 3"),
        ("raise", "the solver diverged"),
        ("nan", "diverged: proprioception at control step 3 is .nan"),
    ],
)
def test_too_many_crashes_of_one_episode_end_the_run(trouble: str, told: str) -> None:
    before, tally = belongings(), Tally()
    with pytest.raises(RuntimeError, match=told) as caught:
        run(jobs(f"{trouble}:0:", 2), PoolSettings(attempts=2), tally)
    assert "index=0" in str(caught.value)
    assert f"task='{trouble}:0:'" in str(caught.value)
    assert tally.crashes == 2
    assert belongings() == before


def test_a_users_mistake_travels_and_is_not_retried() -> None:
    before, tally = belongings(), Tally()
    with pytest.raises(ValueError, match="mistake") as caught:
        run(jobs("mistake", 2), PoolSettings(), tally)
    assert str(caught.value) == "environment.tasks has 'mistake'; expected another"
    assert "in reset" in caught.value.__notes__[0]  # where in the worker it was raised
    assert tally.crashes == 0
    assert belongings() == before


def test_a_worker_is_a_lean_single_threaded_process_deaf_to_ctrl_c() -> None:
    whats = ("modules", "threads", "interrupt")
    seen = run(
        jobs("reach", 3), PoolSettings(), Tally(), lambda job: Inspect(whats[job.placement.index])
    )
    (pid, *modules), (_, threads), (_, interrupt) = (
        seen[n][0].instruction.split() for n in range(3)
    )
    assert int(pid) != os.getpid()
    assert not {
        "torch",
        "transformers",
        "zarr",
        "pytest",
        "mujoco",
        "vla_opd.simulation.rollout",
    } & set(modules)
    assert threads == "1"
    assert interrupt == "SIG_IGN"


def test_workers_die_with_their_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
    assert dies(worker)


def test_leaving_the_pool_early_ends_busy_workers() -> None:
    before = belongings()
    with Pool(
        ENVIRONMENT,
        jobs("reach", 2),
        lambda _: Inspect("threads"),
        capacity=1,
        settings=PoolSettings(workers=2),
        tally=Tally(),
    ) as pool:
        ((job, _),) = pool.collect()[:1]
        pool.send(job, Sleep())
        assert len(children()) == len(before[0]) + 2
    assert belongings() == before


def test_a_worker_keeps_its_task_and_a_free_one_takes_the_largest_unserved() -> None:
    queue = JobQueue([*jobs("a", 2), *jobs("b", 4), *jobs("c", 3)], attempts=3)
    assert queue.take(None, set()).placement == Placement("b", "training", 0)
    assert queue.take(None, {"b"}).placement == Placement("c", "training", 0)
    assert queue.take("b", {"c"}).placement == Placement("b", "training", 1)
    assert queue.take("a", {"a", "b"}).placement == Placement("a", "training", 0)
    assert (
        queue.take("elsewhere", {"a", "b", "c"}).placement.task == "b"
    )  # c has as many left, but b came first
    assert len(queue) == 4


def test_a_crashed_job_goes_first_again() -> None:
    queue = JobQueue(jobs("a", 2), attempts=2)
    job = queue.take(None, set())
    queue.again(job, "it died")
    assert queue.take(None, set()) == job
    with pytest.raises(RuntimeError, match=r"index=0.*member 0.*2 times.*it died"):
        queue.again(job, "it died")


def test_the_same_job_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        JobQueue(jobs("a", 1) * 2, attempts=3)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout_s": -1.0}, {"attempts": 0}])
def test_pool_settings_are_checked(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"pool.{name} is {value!r}; expected more than 0"):
        PoolSettings(**wrong)  # type: ignore[arg-type]
