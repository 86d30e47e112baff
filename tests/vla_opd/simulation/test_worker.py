"""The simulator process: lean, single-threaded, deaf to Ctrl-C, and dead with its parent."""

import os
import signal
import subprocess
import sys

from tests.processes import alive, dies
from tests.vla_opd.fake_env import Inspect
from tests.vla_opd.simulation.test_pool import jobs, run
from vla_opd.simulation.pool import PoolSettings, SimulationStats

ORPHAN = """
from tests.vla_opd.simulation.test_pool import *
with Pool(
    ENVIRONMENT,
    jobs("reach", 1),
    lambda job: Inspect("threads"),
    capacity=1,
    settings=PoolSettings(),
    stats=SimulationStats(),
) as pool:
    (job, outcome), = pool.collect()
    pool.send(job, Sleep())
    print(outcome.instruction.split()[0], flush=True)
    time.sleep(60)
"""


def test_a_worker_is_a_lean_single_threaded_process_deaf_to_ctrl_c() -> None:
    questions = ("modules", "threads", "interrupt")
    outcomes_of = run(
        jobs("reach", 3),
        PoolSettings(),
        SimulationStats(),
        lambda job: Inspect(questions[job.placement.index]),
    )
    answers = [outcomes_of[index][0].instruction.split() for index in range(3)]
    (pid, *modules), (_, threads), (_, interrupt) = answers
    assert int(pid) != os.getpid()
    unwanted = {"torch", "transformers", "zarr", "pytest", "mujoco", "vla_opd.simulation.rollout"}
    assert not unwanted & set(modules)
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
