"""The whole promise, on the real stages: a clean checkout is served, all of it killed in the middle of an optimisation, served again, and retried.

The environment and the policy are the smallest; W&B keeps its runs offline, as it does for whoever has no account.
"""

import json
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import psutil
import pytest

from flows.prefect_server.server import free_port
from tests.flows.served import Served, checkout, wait_for
from tests.small_run import PARAMS, STAGES, run_stage
from vla_opd.machine.tracking import executions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHANGES = {
    "optimize: {steps: 24, save_every: 3": "optimize: {steps: 200, save_every: 5",  # long enough to be caught at it
    "evaluate: {episodes: 10": "evaluate: {episodes: 2",
    "evaluations: {start: student, final: it001, teacher: teacher}": "evaluations: {final: it001}",
}
MORE = """
adopt: {}
label: {teacher: teacher}
report: {start: final, final: final, teacher: final}
"""
SETTINGS = reduce(lambda text, change: text.replace(*change), CHANGES.items(), PARAMS) + MORE


LOOPBACK = re.compile(r"127\..*|::1|::ffff:127\..*")
CALLS = [
    "strace",
    "-f",
    "--seccomp-bpf",
    "-qq",
    "-e",
    "trace=connect,sendto,sendmsg,sendmmsg",
    "-e",
    "signal=none",
    "-o",
]
ADDRESS = re.compile(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"')


def open_to_others(project: Served) -> set[str]:
    """The addresses other than loopback at which any process of the project listens now."""
    found: set[str] = set()
    for pid in project.processes():
        try:
            connections = psutil.Process(pid).net_connections("inet")
        except psutil.Error:
            continue
        found |= {
            connection.laddr.ip
            for connection in connections
            if connection.status == psutil.CONN_LISTEN
        }
    return {address for address in found if not LOOPBACK.fullmatch(address)}


def digests(run: Path) -> dict[str, str]:
    """Of every artifact of a run."""
    return {
        str(path.parent.relative_to(run)): json.loads(path.read_text())["digest"]
        for path in run.glob("*/*/manifest.json")
    }


def undisturbed(folder: Path) -> dict[str, str]:
    """The digests of the same run in one go, stage by stage, without Prefect and DVC."""
    folder.mkdir()
    (folder / "params.yaml").write_text(SETTINGS)
    for artifact, arguments in STAGES.items():
        if artifact not in ("evaluations/start", "evaluations/teacher"):
            run_stage(folder, arguments, workers=1)
    return digests(folder / "artifacts/small")


def test_everything_killed_in_the_middle_of_an_optimisation_the_retry_ends_with_the_undisturbed_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"hunter2-{os.urandom(8).hex()}"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, secret)
    project = Served(checkout(SETTINGS, tmp_path / "project"), free_port())
    run = tmp_path / "project/artifacts/small"
    listening: set[str] = set()

    def under_watch(reached: bool) -> bool:
        assert "Finished in state Failed" not in project.log, project.log
        listening.update(open_to_others(project))
        return reached

    try:
        project.serve(*CALLS, str(tmp_path / "before"))
        command = [sys.executable, "-m", "prefect", "deployment", "run", "opd/train", "--watch"]
        with (
            (tmp_path / "watch.log").open("w") as log,
            subprocess.Popen(
                command, cwd=project.toy.folder, env=project.environment, stdout=log, stderr=log
            ),
        ):
            saved = "checkpoints/.it001.*/**/training.safetensors"
            wait_for(lambda: under_watch(any(run.glob(saved))), 300, lambda: project.log)
            made = {path: path.stat().st_mtime_ns for path in run.glob("*/*/manifest.json")}
            project.kill_everything()
        assert not (run / "checkpoints/it001").exists()

        project.serve(*CALLS, str(tmp_path / "after"))
        (name,) = [
            line.split(":")[0].strip()
            for line in project.log.splitlines()
            if "its process is gone" in line
        ]
        assert project.prefect("flow-run", "retry", name).returncode == 0
        each = "Finished in state Completed()"  # the two iterations, then the run
        wait_for(lambda: under_watch(project.log.count(each) == 3), 300, lambda: project.log)
        assert project.state(name) == "COMPLETED"
        assert "optimize it001: going on from step" in project.log
        assert "teacher" in project.log.rpartition("before")[2], (
            "the deployment's log has no table at its end"
        )
        contacted = set(
            ADDRESS.findall(
                "".join((tmp_path / trace).read_text() for trace in ("before", "after"))
            )
        )
        # The server looks up what kinds of worker there are, on the internet, for who makes a work pool: that is asked for.
        for words in (
            ["work-pool", "create", "opd", "--type", "process"],
            ["--no-prompt", "deploy", "--all"],
        ):  # as prefect.yaml says
            assert (done := project.prefect(*words)).returncode == 0, done.stdout + done.stderr
        assert (
            "'work_pool_name': 'opd'"
            in project.prefect("deployment", "inspect", "opd/train").stdout
        )
    finally:
        project.kill_everything()
    assert listening == set()
    assert "127.0.0.1" in contacted, "strace has seen nothing"
    assert {address for address in contacted if not LOOPBACK.fullmatch(address)} == set()
    assert [
        path
        for path in project.toy.folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ] == []
    metrics = project.toy.folder / "artifacts/.metrics"
    assert list((metrics / "wandb").glob("offline-run-*"))
    assert len(made) >= 5
    assert {path: path.stat().st_mtime_ns for path in made} == made, (
        "something that was finished was made again"
    )
    assert json.loads((run / "report/summary.json").read_text())["final"]["episodes"] == 4
    assert {"optimize", "report"} <= {one.stage for one in executions(metrics / "small")}
    assert digests(run) == undisturbed(tmp_path / "undisturbed")
