"""A child that dies with its parent, even when the parent is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import dies
from vla_opd.machine.parent_death import die_with_parent

CHILD = """
import time
from vla_opd.machine.parent_death import die_with_parent
die_with_parent()
print("tied", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(process.pid, flush=True)
process.wait()
"""


def test_a_child_dies_with_its_parent() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "tied\n"
        parent.send_signal(signal.SIGKILL)
    assert dies(child), "the child lives on"


def test_a_parent_that_is_dead_already() -> None:
    with pytest.raises(SystemExit, match="has died"):
        die_with_parent(signal.SIGCONT, parent=2**30)
