"""The deployment on a real Prefect server: started by command, killed whole in the middle of a stage, served again, retried, finished."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.prefect_server.server import free_port
from tests.flows.served import WATCH, Served, wait_for
from tests.flows.toy import ROOT, make_toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    project = Served(make_toy(folder), free_port())
    (folder / "watch").mkdir()
    (folder / "watch/sitecustomize.py").write_text(
        WATCH
    )  # every Python process of the project runs it first
    project.serve()
    yield project
    project.kill_everything()


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ('settings={"optimize.lr": 0.1}', "'optimize.lr' was unexpected"),
        ('settings={"optimize.steps": "many"}', "'many' is not of type 'integer'"),
        ("iterations=0", "0 is less than the minimum"),
        ('targets=["optimise@it001"]', "'optimise@it001' does not match"),
        ('targets="report"', "field 'targets'. Failure reason: 'report' is not valid"),
    ],
)
def test_wrong_parameters_are_refused_before_there_is_a_run(
    served: Served, parameter: str, said: str
) -> None:
    refused = served.prefect("deployment", "run", "opd/train", "-p", parameter)
    assert refused.returncode == 1
    assert said in " ".join((refused.stdout + refused.stderr).split())
    assert served.ask("flow_runs/count", {}) == 0


def test_the_server_writes_in_batches(served: Served) -> None:
    """One by one, states and events keep its database so busy that it refuses every other start of an iteration, for two seconds each."""
    services = served.ask("admin/settings")["server"]["services"]
    assert services["task_run_recorder"]["batch_size"] == 100
    assert services["task_run_recorder"]["flush_interval"] == 1
    assert services["event_persister"]["batch_size"] == 500


def schedule(served: Served) -> dict[str, Any]:
    (only,) = served.ask("deployments/name/opd/train")["schedules"]
    return only


def test_the_schedule_is_off_until_someone_turns_it_on(served: Served) -> None:
    assert not schedule(served)["active"]


def test_a_worker_of_a_pool_loads_the_flow_and_finds_dvc_itself() -> None:
    """Loaded as a file, the flow would have its own folder searched first, where dvc.py is ours."""
    (deployment,) = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]
    load = f"from prefect.flows import load_flow_from_entrypoint as load; print(load({deployment['entrypoint']!r}).name); import dvc.exceptions"
    loaded = subprocess.run(
        [sys.executable, "-c", load], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert (loaded.returncode, loaded.stdout) == (0, "opd\n"), loaded.stderr


def test_a_folder_is_served_once(served: Served) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "flows.serve"],
        cwd=served.toy.folder,
        env=served.environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert again.returncode == 1
    assert "is being served from this folder already" in again.stderr


IN_ITS_STAGE = "Task run 'optimize@it001' - optimize it001: from 3 inputs"
VICTIMS = {"stages optimize": "FAILED", "dvc repro": "FAILED", "spawn_main": "CRASHED"}


def test_whoever_is_killed_a_retry_finishes_with_the_undisturbed_result(
    served: Served, tmp_path: Path
) -> None:
    """One run; in the middle of the same stage first the stage is killed, then DVC, then the flow's process, then the runner that started it.

    All of them at once: tests/flows/test_served_run.py.
    """
    created = served.prefect(
        "deployment",
        "run",
        "opd/train",
        "-p",
        "iterations=3",
        "-p",
        'settings={"optimize.steps": 5}',
    )
    run = next(word for word in created.stdout.split() if re.fullmatch(r"[0-9a-f-]{36}", word))
    wait_for(lambda: served.log.count(IN_ITS_STAGE) == 1, 240, lambda: served.log)
    for kills, (victim, state) in enumerate(VICTIMS.items(), 1):
        served.kill(victim)
        wait_for(lambda state=state: served.state(run) == state, 60, lambda: served.log)
        assert served.prefect("flow-run", "retry", run).returncode == 0
        wait_for(
            lambda kills=kills: served.log.count(IN_ITS_STAGE) == kills + 1, 120, lambda: served.log
        )
    served.kill("flows.serve")  # the flow needs no runner
    assert served.runner is not None
    served.runner.wait()
    wait_for(lambda: served.state(run) == "COMPLETED", 300, lambda: served.log)
    turned_on = served.prefect(
        "deployment", "schedule", "resume", "opd/train", schedule(served)["id"]
    )
    assert turned_on.returncode == 0, turned_on.stdout + turned_on.stderr
    deployment = served.ask("deployments/name/opd/train")["id"]
    lost = served.ask(f"deployments/{deployment}/create_flow_run", {"state": {"type": "RUNNING"}})[
        "id"
    ]  # killed before it could leave a trace
    assert served.state(lost) == "RUNNING"
    served.serve()
    assert re.findall("(.*): its process is gone", served.log) == [f"  {lost}"]
    assert served.state(lost) == "CRASHED"
    assert schedule(served)["active"], "serving again has turned the schedule off"
    said = {
        "logs": {
            "task_run_id": {
                "any_": [
                    task["id"]
                    for task in served.ask(
                        "task_runs/filter", {"task_runs": {"name": {"any_": ["optimize@it001"]}}}
                    )
                ]
            }
        }
    }
    assert "optimize it001: from 3 inputs" in {
        line["message"] for line in served.ask("logs/filter", said)
    }, "the stage's output isn't in its task's log"

    other = make_toy(tmp_path)
    (tmp_path / "params.yaml").write_bytes((served.toy.folder / "params.yaml").read_bytes())
    other.dvc("repro")
    assert served.toy.lock == other.lock


def test_a_run_whose_server_is_lost_goes_on_and_says_so_once(tmp_path: Path) -> None:
    """The server is killed in the middle of a stage; the rest of the run is made without it, and the next `serve` knows how the run stands."""
    alone = Served(make_toy(tmp_path), free_port())
    run = [sys.executable, "-m", "flows", "run", "evaluate@final"]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            run,
            cwd=tmp_path,
            env=alone.environment | {"PREFECT_CLIENT_MAX_RETRIES": "0"},
            stdout=log,
            stderr=log,
        )
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


@pytest.mark.skipif(
    "LONG" not in os.environ,
    reason="two minutes, as Prefect asks a lost server again and again; LONG=1 runs it",
)
def test_a_deployed_run_whose_server_is_lost_does_its_work_and_ends(served: Served) -> None:
    """Prefect would keep the process for minutes, to tell the server that isn't there of the run's end."""
    before = served.log.count(IN_ITS_STAGE)
    asked = served.prefect(
        "deployment",
        "run",
        "opd/train",
        "-p",
        'targets=["optimize@it001"]',
        "-p",
        'settings={"optimize.steps": 6}',
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    wait_for(lambda: served.log.count(IN_ITS_STAGE) == before + 1, 120, lambda: served.log)
    os.killpg(int((served.toy.folder / ".prefect/server.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not served.with_words("spawn_main"), 120, lambda: served.log)
    assert served.log.count("Prefect's server does not answer any more") == 1
    assert json.loads(served.toy.dvc("status", "optimize@it001", "--json")) == {}


def test_nothing_left_the_machine(served: Served) -> None:
    """Of all that the tests above had the server, the runner, the flow, DVC and the stages do; and the watch would have seen it."""
    log = served.toy.folder / "elsewhere.log"
    assert not log.exists(), log.read_text()
    probe = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'', ('192.0.2.1', 9))"  # an address that is nobody's
    subprocess.run(
        [sys.executable, "-c", probe], env=served.environment, check=False, capture_output=True
    )
    assert "192.0.2.1" in log.read_text()
