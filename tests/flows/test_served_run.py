"""A served run of the real stages, killed whole in the middle of an optimization and retried.

Environment and policy are the smallest; W&B keeps its runs offline, as it does without an account.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import psutil
import pytest

from flows.prefect_server.server import free_port
from tests.flows.served import Served, checkout, wait_for
from tests.small_run import PARAMS, STAGES, run_stage
from vla_opd.machine.tracking import read_executions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHANGES = {
    # Long enough to be killed in the middle.
    "optimize: {steps: 24, save_every: 3": "optimize: {steps: 200, save_every: 5",
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
    """Return the addresses, but for loopback, at which a process of the project listens now."""
    addresses: set[str] = set()
    for pid in project.processes():
        try:
            connections = psutil.Process(pid).net_connections("inet")
        except psutil.Error:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                addresses.add(connection.laddr.ip)
    return without_loopback(addresses)


def without_loopback(addresses: set[str]) -> set[str]:
    return {address for address in addresses if not LOOPBACK.fullmatch(address)}


def read_contacted(*traces: Path) -> set[str]:
    """Return the addresses in the calls that strace has recorded."""
    addresses: set[str] = set()
    for trace in traces:
        addresses.update(ADDRESS.findall(trace.read_text()))
    return addresses


def modification_times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.glob("*/*/manifest.json")}


def digests(run: Path) -> dict[str, str]:
    """Return the digest of every artifact of a run."""
    return {
        str(path.parent.relative_to(run)): json.loads(path.read_text())["digest"]
        for path in run.glob("*/*/manifest.json")
    }


def undisturbed(folder: Path) -> dict[str, str]:
    """Make the same run stage by stage, without Prefect and DVC; return its digests."""
    folder.mkdir()
    (folder / "params.yaml").write_text(SETTINGS)
    for artifact, arguments in STAGES.items():
        if artifact not in ("evaluations/start", "evaluations/teacher"):
            run_stage(folder, arguments, workers=1)
    return digests(folder / "artifacts/small")


def start_run(project: Served, log: Path) -> "subprocess.Popen[bytes]":
    """Start a run of the deployment, and follow it."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", "opd/train", "--watch"]
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            cwd=project.toy.folder,
            env=project.environment,
            stdout=output,
            stderr=output,
        )


def wait_until_it_saves(project: Served, observe: Callable[[], object]) -> None:
    """Wait until the optimization has saved its training state."""
    run = project.toy.folder / "artifacts/small"

    def has_saved() -> bool:
        observe()
        return any(run.glob("checkpoints/.it001.*/**/training.safetensors"))

    wait_for(has_saved, 300, lambda: project.log)


def retry_crashed_run(project: Served, observe: Callable[[], object]) -> None:
    """Retry the run that serving has declared crashed, and wait for its end."""
    (run,) = re.findall(r"(\S+): its process is gone", project.log)
    assert project.prefect("flow-run", "retry", run).returncode == 0

    def has_ended() -> bool:
        observe()  # below: two iterations, then the run
        return project.log.count("Finished in state Completed()") == 3

    wait_for(has_ended, 300, lambda: project.log)
    assert project.state(run) == "COMPLETED"


def deploy_to_work_pool(project: Served) -> None:
    """Make a work pool, and deploy to it as prefect.yaml says."""
    for words in (
        ["work-pool", "create", "opd", "--type", "process"],
        ["--no-prompt", "deploy", "--all"],
    ):
        done = project.prefect(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    deployment = project.prefect("deployment", "inspect", "opd/train").stdout
    assert "'work_pool_name': 'opd'" in deployment


def test_after_everything_was_killed_in_an_optimization_a_retry_ends_with_the_undisturbed_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"hunter2-{os.urandom(8).hex()}"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, secret)
    project = Served(checkout(SETTINGS, tmp_path / "project"), free_port())
    run = project.toy.folder / "artifacts/small"
    listening: set[str] = set()

    def observe() -> None:
        assert "Finished in state Failed" not in project.log, project.log
        listening.update(open_to_others(project))

    try:
        project.serve(*CALLS, str(tmp_path / "before"))
        with start_run(project, tmp_path / "watch.log"):
            wait_until_it_saves(project, observe)
            finished = modification_times(run)
            project.kill_everything()
        assert not (run / "checkpoints/it001").exists()

        project.serve(*CALLS, str(tmp_path / "after"))
        retry_crashed_run(project, observe)
        assert "optimize it001: resuming from step" in project.log
        table = project.log.rpartition("before")[2]
        assert "teacher" in table, "the deployment's log has no table at its end"
        # Before the work pool: for one, the server looks up kinds of worker on the internet.
        contacted = read_contacted(tmp_path / "before", tmp_path / "after")
        deploy_to_work_pool(project)
    finally:
        project.kill_everything()

    assert listening == set()
    assert "127.0.0.1" in contacted, "strace has recorded nothing"
    assert without_loopback(contacted) == set()
    files = [path for path in project.toy.folder.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    metrics = project.toy.folder / "artifacts/.metrics"
    assert list((metrics / "wandb").glob("offline-run-*"))
    assert len(finished) >= 5
    assert finished.items() <= modification_times(run).items(), "a finished stage ran again"
    assert json.loads((run / "report/summary.json").read_text())["final"]["episodes"] == 4
    stages = {execution.stage for execution in read_executions(metrics / "small")}
    assert {"optimize", "report"} <= stages
    assert digests(run) == undisturbed(tmp_path / "undisturbed")
