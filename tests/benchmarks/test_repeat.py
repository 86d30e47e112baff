"""The repetition of a stage on a busy machine: here only that its load ends with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.processes import dies

BENCHMARK = """
import time
from benchmarks.repeat import keep_busy
with keep_busy(2):
    print("busy", flush=True)
    time.sleep(60)
"""


def test_busy_processes_die_with_a_killed_benchmark() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", BENCHMARK], stdout=subprocess.PIPE, text=True, env=environment
    ) as benchmark:
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == "busy\n"
        loops = psutil.Process(benchmark.pid).children()
        benchmark.send_signal(signal.SIGKILL)
    try:
        assert len(loops) == 2
        assert all(dies(loop.pid) for loop in loops)
    finally:
        for loop in loops:
            if loop.is_running():
                loop.kill()
