"""DVC's own commands on the real dvc.yaml: comparing commits, experiments, push and pull."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from flows import cli
from flows.prefect_server.server import free_port
from tests.flows.toy import Toy, make_toy, ran

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy run, made and committed."""
    toy = make_toy(tmp_path_factory.mktemp("finished"))
    toy.dvc("repro")
    toy.git("add", "-A")
    toy.git("commit", "-q", "-m", "run")
    return toy


@pytest.fixture
def toy(finished: Toy, tmp_path: Path) -> Toy:
    """A copy of it."""
    shutil.copytree(finished.folder, tmp_path / "toy", symlinks=True)
    return Toy(tmp_path / "toy")


def test_git_has_the_reference_and_the_results_and_dvc_has_the_rest(toy: Toy) -> None:
    run = toy.folder / "artifacts/toy"
    files = [path for path in run.rglob("*") if path.is_file() and toy.tracked(path)]
    assert {path.relative_to(run).parts[:2] for path in files} == {
        ("checkpoints", "base"),
        ("checkpoints", "teacher"),
        ("checkpoints", "student"),
        ("evaluations", "start"),
        ("evaluations", "final"),
        ("evaluations", "teacher"),
        ("report", "page"),
    }


def test_an_extended_run_repeats_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy.folder)
    assert cli.main(["extend", "--iterations", "1"]) == 0
    assert ran(toy.dvc("repro")) == [
        "sample@it003",
        "label@it003",
        "optimize@it003",
        "evaluate@final",
        "report",
    ]


def test_dvc_repro_killed_with_its_stage_resumes_there(toy: Toy, tmp_path: Path) -> None:
    changed = make_toy(tmp_path / "changed")
    for project in (toy, changed):
        project.edit("params.yaml", "optimize: {steps: 4}", "optimize: {steps: 6}")
    with toy.started("repro", TOY_SLEEPS="optimize it001") as killed:
        assert killed.stdout is not None
        assert any(line.startswith("optimize it001: from") for line in killed.stdout)
        os.killpg(killed.pid, signal.SIGKILL)
    assert ran(toy.dvc("repro"))[0] == "optimize@it001"
    changed.dvc("repro")
    assert toy.lock == changed.lock


def test_parameters_results_and_curves_of_two_commits_are_compared(toy: Toy) -> None:
    toy.edit("params.yaml", "optimize: {steps: 4}", "optimize: {steps: 7}")
    toy.dvc("repro")
    changed = json.loads(toy.dvc("params", "diff", "--json"))["params.yaml"]
    assert changed == {"optimize.steps": {"old": 4, "new": 7, "diff": 3}}
    metrics = json.loads(toy.dvc("metrics", "diff", "--json"))
    success = metrics["artifacts/toy/report/page/results.json"]["final.success"]
    assert (success["old"], success["new"]) == (0.4, 0.7)
    (plot,) = json.loads(toy.dvc("plots", "diff", "--json"))["data"].values()
    rows = plot[0]["content"]["data"]["values"]
    assert {(row["rev"], row["depth"]) for row in rows} == {
        ("workspace", 0),
        ("workspace", 1),
        ("HEAD", 0),
        ("HEAD", 1),
    }


def test_an_experiment_runs_only_what_its_setting_changes(toy: Toy) -> None:
    output = toy.dvc("exp", "run", "-S", "optimize.steps=9")
    assert "Running stage 'optimize@it001'" in output
    assert "Running stage 'finetune@teacher'" not in output
    shown = json.loads(toy.dvc("exp", "show", "--json"))
    experiment = shown[1]["experiments"][0]["revs"][0]["data"]
    results = experiment["metrics"]["artifacts/toy/report/page/results.json"]
    assert results["data"]["final"] == {"success": 0.9}


def test_pushed_data_is_pulled_by_a_clone_which_then_has_nothing_to_do(
    toy: Toy, tmp_path: Path
) -> None:
    toy.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    toy.dvc("push")
    clone = toy.clone(tmp_path / "clone")
    assert not clone.has("trajectories/it001")
    clone.dvc("pull")
    assert clone.has(
        "trajectories/it001", "labels/it002", "checkpoints/it002", "demonstrations/main"
    )
    assert "Data and pipelines are up to date" in clone.dvc("status")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a service that speaks S3, with one bucket."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    command = [Path(sys.executable).parent / "moto_server", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            make_bucket(f"{address}/bucket")
            yield address
        finally:
            server.kill()


def make_bucket(address: str) -> None:
    """Make a bucket, once the service is up."""
    request = urllib.request.Request(address, method="PUT")  # noqa: S310
    for _ in range(100):
        with suppress(OSError):
            urllib.request.urlopen(request).close()  # noqa: S310
            return
        time.sleep(0.2)


def test_data_pushed_to_s3_is_pulled_by_a_clone(toy: Toy, tmp_path: Path, s3: str) -> None:
    toy.dvc("remote", "add", "--default", "store", "s3://bucket/run")
    toy.dvc("remote", "modify", "store", "endpointurl", s3)
    toy.dvc("push")
    clone = toy.clone(tmp_path / "clone")
    clone.dvc("pull")
    assert clone.has("trajectories/it001", "labels/it002", "checkpoints/it002")
    assert "Data and pipelines are up to date" in clone.dvc("status")


def test_iterations_can_branch(toy: Toy) -> None:
    checkpoints = toy.folder / "artifacts/toy/checkpoints"
    digests = [checkpoints / name / "digest" for name in ("it001", "it002")]
    before = [path.read_text() for path in digests]
    toy.edit(
        "params.yaml",
        "iterations: {it001: student, it002: it001}",
        "iterations: {it001: student, it002: it001, it002b: it001}",
    )
    assert ran(toy.dvc("repro")) == [
        "sample@it002b",
        "label@it002b",
        "optimize@it002b",
        "report",
    ]
    assert [path.read_text() for path in digests] == before
