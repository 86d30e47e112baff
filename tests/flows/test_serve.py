"""The deployment on a real Prefect server: started by command, killed whole in the middle of a stage, served again, retried, finished."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.flows.toy import Toy, make_toy

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address  # a string is a path of this machine's
        if not (host is None or str(host).startswith(("/", "127.", "::1", "localhost")) or str(host) in ("", "0.0.0.0")):
            with open(os.environ["OPD_TEST_WATCH"], "a") as log:
                log.write(f"{event} {address} by {sys.argv}\\n")
sys.addaudithook(watch)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    """A toy project, and a terminal in which it is served: every process of it carries a mark by which it can be found and killed."""

    toy: Toy
    port: int
    runner: "subprocess.Popen[bytes] | None" = None
    mark: str = field(default_factory=lambda: f"served-{os.urandom(4).hex()}")

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PREFECT_HOME": str(self.toy.folder / ".prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.toy.folder / 'watch'}",
            "OPD_TEST_WATCH": str(self.toy.folder / "elsewhere.log"),
            "DO_NOT_TRACK": "1",
            "TOY_SLEEPS": "optimize it001",
            "OPD_TEST_MARK": self.mark,
            "SHELL": "/bin/sh",  # DVC's choice where there is no login shell; dash keeps standing between DVC and the stage
        }

    @property
    def log(self) -> str:
        path = self.toy.folder / "serve.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def serve(self) -> None:
        """`python -m flows.serve`, until it says that it serves."""
        with (self.toy.folder / "serve.log").open("w") as log:
            self.runner = subprocess.Popen([sys.executable, "-m", "flows.serve"], cwd=self.toy.folder, env=self.environment, stdout=log, stderr=log)
        wait_for(lambda: "serving opd/train" in self.log, 120, lambda: self.log)

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *words], cwd=self.toy.folder, env=self.environment, text=True, capture_output=True, check=False
        )

    def state(self, run: str) -> str:
        found = re.search(
            r"type=StateType\.(\w+)|'type': StateType\.(\w+)|state_type=StateType\.(\w+)", self.prefect("flow-run", "inspect", run).stdout
        )
        return next(filter(None, found.groups())) if found else ""

    def processes(self) -> list[int]:
        """All of them: the server, the runner, the flow, dvc, the stage."""
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self.mark.encode() in _environ(folder)]

    def kill(self, words: str) -> None:
        """SIGKILL the one process of ours whose command line has these words."""
        found = {pid: line for pid in self.processes() if words in (line := _command(pid))}
        assert len(found) == 1, [_command(pid) for pid in self.processes()]
        os.kill(next(iter(found)), signal.SIGKILL)

    def kill_everything(self) -> int:
        killed = 0
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed += 1
            if self.runner is not None:
                self.runner.wait()
        return killed


def _environ(folder: Path) -> bytes:
    try:
        if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return b""
        return (folder / "environ").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.3)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    project = Served(make_toy(folder), free_port())
    (folder / "watch").mkdir()
    (folder / "watch/sitecustomize.py").write_text(WATCH)  # every Python process of the project runs it first
    project.serve()
    yield project
    project.kill_everything()


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ('settings={"optimize.lr": 0.1}', "'optimize.lr' was unexpected"),
        ('settings={"optimize.steps": "many"}', "'many' is not of type 'integer'"),
        ("iterations=0", "0 is less than the minimum"),
        ('targets="report"', "field 'targets'. Failure reason: 'report' is not valid"),
    ],
)
def test_wrong_parameters_are_refused_before_there_is_a_run(served: Served, parameter: str, said: str) -> None:
    refused = served.prefect("deployment", "run", "opd/train", "-p", parameter)
    assert refused.returncode == 1
    assert said in " ".join((refused.stdout + refused.stderr).split())
    assert "No flow runs found" in (listed := served.prefect("flow-run", "ls")).stdout or "opd" not in listed.stdout


def test_the_server_writes_the_states_of_tasks_in_batches(served: Served) -> None:
    """One by one, they keep its database so busy that it refuses every other start of an iteration, for two seconds each."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/api/admin/settings") as answer:
        recorder = json.load(answer)["server"]["services"]["task_run_recorder"]
    assert recorder["batch_size"] == 100
    assert recorder["flush_interval"] == 1


def test_a_folder_is_served_once(served: Served) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "flows.serve"], cwd=served.toy.folder, env=served.environment, text=True, capture_output=True, check=False
    )
    assert again.returncode == 1
    assert "is being served from this folder already" in again.stderr


IN_ITS_STAGE = "Task run 'optimize@it001' - optimize it001: from 3 inputs"
VICTIMS = {"stages optimize": "FAILED", "dvc repro": "FAILED", "spawn_main": "CRASHED"}


def test_whoever_is_killed_a_retry_finishes_with_the_undisturbed_result(served: Served, tmp_path: Path) -> None:
    """One run; in the middle of the same stage first the stage is killed, then DVC, then the flow's process, then everything at once."""
    created = served.prefect("deployment", "run", "opd/train", "-p", "iterations=3", "-p", 'settings={"optimize.steps": 5}')
    run = next(word for word in created.stdout.split() if re.fullmatch(r"[0-9a-f-]{36}", word))
    wait_for(lambda: served.log.count(IN_ITS_STAGE) == 1, 240, lambda: served.log)
    for kills, (victim, state) in enumerate(VICTIMS.items(), 1):
        served.kill(victim)
        wait_for(lambda state=state: served.state(run) == state, 60, lambda: served.log)
        assert served.prefect("flow-run", "retry", run).returncode == 0
        wait_for(lambda kills=kills: served.log.count(IN_ITS_STAGE) == kills + 1, 120, lambda: served.log)
    assert served.kill_everything() >= 4  # server, runner, flow, dvc, stage
    assert not served.toy.has("checkpoints/it001")

    served.serve()
    assert f"{run}: its process is gone" in served.log
    assert served.state(run) == "CRASHED"
    assert served.prefect("flow-run", "retry", run).returncode == 0
    wait_for(lambda: served.state(run) == "COMPLETED", 300, lambda: served.log)
    assert "sample it001: from" not in served.log  # finished stages aren't repeated

    other = make_toy(tmp_path)
    (tmp_path / "params.yaml").write_bytes((served.toy.folder / "params.yaml").read_bytes())
    other.dvc("repro")
    assert served.toy.lock == other.lock


def test_a_run_whose_server_is_lost_goes_on_and_says_so_once(tmp_path: Path) -> None:
    """The server is killed in the middle of a stage; the rest of the run is made without it, and the next `serve` knows how the run stands."""
    alone = Served(make_toy(tmp_path), free_port())
    run = [sys.executable, "-m", "flows", "run", "evaluate@final"]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(run, cwd=tmp_path, env=alone.environment | {"PREFECT_CLIENT_MAX_RETRIES": "0"}, stdout=log, stderr=log)
    try:
        wait_for(lambda: "▸ optimize@it001" in alone.log, 120, lambda: alone.log)
        os.killpg(int((tmp_path / ".prefect/server.pid").read_text()), signal.SIGKILL)
        assert process.wait(120) == 0, alone.log
    finally:
        alone.kill_everything()
    assert alone.log.count("Prefect's server does not answer any more") == 1
    assert alone.log.count("✓ optimize@it001") == 1
    assert alone.log.count("✓ evaluate@final") == 1
    (orphan,) = (tmp_path / ".prefect/runs").iterdir()
    try:
        alone.serve()
        assert f"{orphan.name}: its process is gone" in alone.log
        assert alone.state(orphan.name) == "CRASHED"
    finally:
        alone.kill_everything()
    (tmp_path / "other").mkdir()
    other = make_toy(tmp_path / "other")
    other.dvc("repro", "evaluate@final")
    assert alone.toy.lock == other.lock


def test_nothing_left_the_machine(served: Served) -> None:
    """Of all that the tests above had the server, the runner, the flow, DVC and the stages do; and the watch would have seen it."""
    log = served.toy.folder / "elsewhere.log"
    assert not log.exists(), log.read_text()
    probe = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'', ('192.0.2.1', 9))"  # an address that is nobody's
    subprocess.run([sys.executable, "-c", probe], env=served.environment, check=False, capture_output=True)
    assert "192.0.2.1" in log.read_text()
