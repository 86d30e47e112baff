"""The deployment on a real Prefect server: runs are killed in the middle of a stage and retried."""

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
    # Every Python process of the project runs it first.
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    project.serve()
    yield project
    project.kill_everything()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ('settings={"optimize.lr": 0.1}', "'optimize.lr' was unexpected"),
        ('settings={"optimize.steps": "many"}', "'many' is not of type 'integer'"),
        ("iterations=0", "0 is less than the minimum"),
        ('targets=["optimise@it001"]', "'optimise@it001' does not match"),
        ('targets="report"', "field 'targets'. Failure reason: 'report' is not valid"),
    ],
)
def test_wrong_parameters_are_refused_before_there_is_a_run(
    served: Served, parameter: str, message: str
) -> None:
    refused = served.prefect("deployment", "run", "opd/train", "-p", parameter)
    assert refused.returncode == 1
    assert message in " ".join((refused.stdout + refused.stderr).split())
    assert served.ask("flow_runs/count", {}) == 0


def test_the_server_writes_in_batches(served: Served) -> None:
    """Written singly, states and events keep its database too busy for iterations to start."""
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
    """Loaded as a file, the flow would have modules of its own folder hide others of that name."""
    (deployment,) = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]
    load = f"""
import dvc.exceptions
from prefect.flows import load_flow_from_entrypoint
print(load_flow_from_entrypoint({deployment["entrypoint"]!r}).name)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", load], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert (loaded.returncode, loaded.stdout) == (0, "opd\n"), loaded.stderr


def test_a_folder_is_served_once(served: Served) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "flows.serve"],
        cwd=served.toy.folder,
        env=served.environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert second.returncode == 1
    assert "is being served from this folder already" in second.stderr


IN_ITS_STAGE = "Task run 'optimize@it001' - optimize it001: from 3 inputs"
VICTIMS = {
    "stages optimize": "FAILED",
    "dvc_runner.process repro": "FAILED",
    "spawn_main": "CRASHED",
}


def start_run(served: Served, *parameters: str) -> str:
    """Start a run of the deployment; return its id."""
    options = [word for parameter in parameters for word in ("-p", parameter)]
    created = served.prefect("deployment", "run", "opd/train", *options)
    assert created.returncode == 0, created.stdout + created.stderr
    return next(word for word in created.stdout.split() if re.fullmatch(r"[0-9a-f-]{36}", word))


def start_lost_run(served: Served) -> str:
    """Make a run on the server that is RUNNING, as if killed before it left a trace here."""
    deployment = served.ask("deployments/name/opd/train")["id"]
    state = {"state": {"type": "RUNNING"}}
    return served.ask(f"deployments/{deployment}/create_flow_run", state)["id"]


def read_task_log(served: Served, name: str) -> set[str]:
    """Return the lines in the logs of all task runs of that name."""
    tasks = served.ask("task_runs/filter", {"task_runs": {"name": {"any_": [name]}}})
    ids = [task["id"] for task in tasks]
    lines = served.ask("logs/filter", {"logs": {"task_run_id": {"any_": ids}}})
    return {line["message"] for line in lines}


def test_after_any_kill_a_retry_ends_with_the_undisturbed_result(
    served: Served, tmp_path: Path
) -> None:
    """One run; in the same stage the stage, then DVC, the flow's process and its runner are killed.

    All of them at once: tests/flows/test_served_run.py.
    """
    run = start_run(served, "iterations=3", 'settings={"optimize.steps": 5}')
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

    nightly = schedule(served)["id"]
    turned_on = served.prefect("deployment", "schedule", "resume", "opd/train", nightly)
    assert turned_on.returncode == 0, turned_on.stdout + turned_on.stderr
    lost = start_lost_run(served)
    assert served.state(lost) == "RUNNING"
    served.serve()
    assert re.findall("(.*): its process is gone", served.log) == [f"  {lost}"]
    assert served.state(lost) == "CRASHED"
    assert schedule(served)["active"], "serving again has turned the schedule off"
    assert "optimize it001: from 3 inputs" in read_task_log(served, "optimize@it001")

    undisturbed = make_toy(tmp_path)
    (tmp_path / "params.yaml").write_bytes((served.toy.folder / "params.yaml").read_bytes())
    undisturbed.dvc("repro")
    assert served.toy.lock == undisturbed.lock


def test_a_run_whose_server_is_lost_continues_and_says_so_once(tmp_path: Path) -> None:
    """The run is finished without the server; the next `serve` declares it crashed there."""
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
    (tmp_path / "undisturbed").mkdir()
    undisturbed = make_toy(tmp_path / "undisturbed")
    undisturbed.dvc("repro", "evaluate@final")
    assert alone.toy.lock == undisturbed.lock


@pytest.mark.skipif(
    "LONG" not in os.environ,
    reason="two minutes, as Prefect asks a lost server again and again; LONG=1 runs it",
)
def test_a_deployed_run_whose_server_is_lost_does_its_work_and_ends(served: Served) -> None:
    """Prefect would keep the process for minutes, to report the run's end to the lost server."""
    before = served.log.count(IN_ITS_STAGE)
    start_run(served, 'targets=["optimize@it001"]', 'settings={"optimize.steps": 6}')
    wait_for(lambda: served.log.count(IN_ITS_STAGE) == before + 1, 120, lambda: served.log)
    os.killpg(int((served.toy.folder / ".prefect/server.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not served.with_words("spawn_main"), 120, lambda: served.log)
    assert served.log.count("Prefect's server does not answer any more") == 1
    assert json.loads(served.toy.dvc("status", "optimize@it001", "--json")) == {}


def test_nothing_left_the_machine(served: Served) -> None:
    """By the tests above, no process of server, runner, flow, DVC and stages has sent anything."""
    log = served.toy.folder / "elsewhere.log"
    assert not log.exists(), log.read_text()
    probe = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.sendto(b"", ("192.0.2.1", 9))  # an address of no machine, for examples
"""
    subprocess.run(
        [sys.executable, "-c", probe], env=served.environment, check=False, capture_output=True
    )
    assert "192.0.2.1" in log.read_text(), "the watch would have missed it"
