"""The pool of simulator processes: dying, hanging and failing workers; nothing is left behind."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.vla_opd.fake_env import FAMILY, Inspect, PointMass
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Command, Forward, Job, Outcome, Reset
from vla_opd.simulation.pool import JobQueue, Pool, PoolSettings, SimulationStats

ENVIRONMENT = EnvironmentParams(family=FAMILY, tasks=("reach",), image_size=16, cameras=("front",))
ACTIONS = np.full((4, 4), 0.5, np.float32)


class Sleep:
    """A command that never ends."""

    def __call__(self, env: object) -> Outcome:
        time.sleep(3600)
        raise AssertionError


def jobs(task: str, count: int) -> list[Job]:
    return [Job(Placement(task, "training", index), 0, index) for index in range(count)]


def run(
    all_jobs: list[Job],
    settings: PoolSettings,
    stats: SimulationStats,
    first: Callable[[Job], Command] | None = None,
) -> dict[int, list[Outcome]]:
    """Run every job: a reset, then 8 steps in two commands.

    Returns the outcomes of the last attempt, by placement index.
    """
    outcomes_of: dict[int, list[Outcome]] = {}

    def begin(job: Job) -> Command:
        outcomes_of[job.placement.index] = []
        return first(job) if first else Reset(job.placement)

    with Pool(ENVIRONMENT, all_jobs, begin, capacity=4, settings=settings, stats=stats) as pool:
        while pool.unfinished:
            for job, outcome in pool.collect():
                outcomes = outcomes_of[job.placement.index]
                outcomes.append(outcome)
                if first or len(outcomes) == 3:
                    pool.finish(job)
                else:
                    pool.send(job, Forward(4 * (len(outcomes) - 1), ACTIONS, 1))
    return outcomes_of


def undisturbed(job: Job) -> list[Outcome]:
    """Run the same commands in this process; the marker exists, so no trouble strikes."""
    env = PointMass(ENVIRONMENT)
    commands = (Reset(job.placement), Forward(0, ACTIONS, 1), Forward(4, ACTIONS, 1))
    return [command(env) for command in commands]


def children() -> set[str]:
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def resources() -> tuple[set[str], int, int]:
    """Return what a pool might leave behind: child processes, open files, mapped memory."""
    return (
        children(),
        len(list(Path("/proc/self/fd").iterdir())),
        Path("/proc/self/maps").read_text().count("memfd:frames"),
    )


@pytest.mark.parametrize("trouble", ["exit", "kill", "hang", "stop", "raise", "nan"])
def test_an_episode_whose_worker_is_lost_starts_again(trouble: str, tmp_path: Path) -> None:
    marker = tmp_path / "struck"
    all_jobs = jobs(f"{trouble}:1:{marker}", 3)
    before = resources()
    stats = SimulationStats()
    settings = PoolSettings(workers=1, timeout_s=5.0)

    outcomes_of = run(all_jobs, settings, stats)

    assert marker.exists()
    assert stats.crashes == 1
    assert resources() == before
    assert outcomes_of.keys() == {0, 1, 2}
    for job in all_jobs:
        outcomes = outcomes_of[job.placement.index]
        for outcome, expected in zip(outcomes, undisturbed(job), strict=True):
            assert outcome.steps == expected.steps
            assert outcome.observed.tolist() == expected.observed.tolist()
            np.testing.assert_array_equal(outcome.frames, expected.frames)
            np.testing.assert_array_equal(outcome.proprio, expected.proprio)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("exit", "exited with code 3"),
        ("raise", "the solver diverged"),
        ("nan", "diverged: proprioception at control step 3 is .nan"),
    ],
)
def test_too_many_crashes_of_one_episode_end_the_run(trouble: str, message: str) -> None:
    before = resources()
    stats = SimulationStats()
    with pytest.raises(RuntimeError, match=message) as caught:
        run(jobs(f"{trouble}:0:", 2), PoolSettings(attempts=2), stats)
    assert "index=0" in str(caught.value)
    assert f"task='{trouble}:0:'" in str(caught.value)
    assert stats.crashes == 2
    assert resources() == before


def test_a_users_mistake_travels_and_is_not_retried() -> None:
    before = resources()
    stats = SimulationStats()
    with pytest.raises(ValueError, match="mistake") as caught:
        run(jobs("mistake", 2), PoolSettings(), stats)
    assert str(caught.value) == "environment.tasks has 'mistake'; expected another"
    assert "in reset" in caught.value.__notes__[0]  # where in the worker it was raised
    assert stats.crashes == 0
    assert resources() == before


def test_leaving_the_pool_early_ends_busy_workers() -> None:
    before = resources()
    with Pool(
        ENVIRONMENT,
        jobs("reach", 2),
        lambda _: Inspect("threads"),
        capacity=1,
        settings=PoolSettings(workers=2),
        stats=SimulationStats(),
    ) as pool:
        ((job, _),) = pool.collect()[:1]
        pool.send(job, Sleep())
        assert len(children()) == len(before[0]) + 2
    assert resources() == before


def test_a_worker_keeps_its_task_and_a_free_one_takes_the_largest_unserved() -> None:
    queue = JobQueue([*jobs("a", 2), *jobs("b", 4), *jobs("c", 3)], attempts=3)
    assert queue.take(None, set()).placement == Placement("b", "training", 0)
    assert queue.take(None, {"b"}).placement == Placement("c", "training", 0)
    assert queue.take("b", {"c"}).placement == Placement("b", "training", 1)
    assert queue.take("a", {"a", "b"}).placement == Placement("a", "training", 0)
    # c has as many jobs waiting, but b came first.
    assert queue.take("elsewhere", {"a", "b", "c"}).placement.task == "b"
    assert len(queue) == 4


def test_a_crashed_job_is_next_in_line() -> None:
    queue = JobQueue(jobs("a", 2), attempts=2)
    job = queue.take(None, set())
    queue.put_back(job, "it died")
    assert queue.take(None, set()) == job
    with pytest.raises(RuntimeError, match=r"index=0.*member 0.*2 times.*it died"):
        queue.put_back(job, "it died")


def test_the_same_job_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        JobQueue(jobs("a", 1) * 2, attempts=3)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout_s": -1.0}, {"attempts": 0}])
def test_pool_settings_are_checked(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"pool.{name} is {value!r}; expected more than 0"):
        PoolSettings(**wrong)  # type: ignore[arg-type]
