"""Stages in shares: on one node or two, DVC's stage combines them to what one process makes."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows import pipeline, shares
from flows.pipeline import StageFailed, Step
from flows.shares import Spread
from flows.train import opd
from tests.flows.served import checkout
from tests.flows.toy import Toy
from tests.small_run import PARAMS, STAGES, run_stage
from vla_opd.artifacts.manifest import MANIFEST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MORE = "adopt: {}\nlabel: {teacher: teacher}\nreport: {}\n"


class Watch(threading.Thread):
    """Calls `each` with every process that makes a share, repeatedly while they run.

    Its arguments are `sample --iteration it001 --share 1/2`, and the process.
    """

    def __init__(self, each: Callable[[str, psutil.Process], object]) -> None:
        super().__init__(daemon=True)
        self._each = each
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.1):
            for process in psutil.process_iter(["cmdline"]):
                command = process.info["cmdline"] or []
                if "--share" in command and command[2] == "stages":
                    with suppress(psutil.Error):
                        self._each(" ".join(command[3:]), process)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name, value in {"OPD_DEVICE": "cpu", "OPD_TRACKING": "jsonl", "OPD_WORKERS": "1"}.items():
        monkeypatch.setenv(name, value)


def make(
    stage: str, monkeypatch: pytest.MonkeyPatch, cluster: str = "", count: int = 2
) -> list[str]:
    """Make the shares of a stage that DVC would run; return the lines of output."""
    lines: list[str] = []
    monkeypatch.setenv("OPD_SHARES", str(count))
    monkeypatch.setenv("OPD_CLUSTER", cluster)
    monkeypatch.setattr(pipeline, "would_run", lambda _name: True)
    shares.make(Step(stage), lambda line: lines.append(line.text))
    return lines


@pytest.mark.parametrize(
    ("stage", "artifact", "cluster"),
    [
        ("sample@it001", "trajectories/it001", ""),
        ("explore@rl001", "trajectories/rl001", ""),
        ("evaluate@final", "evaluations/final", ""),
        ("label@it001", "labels/it001", "dask"),
    ],
)
def test_whoever_makes_the_shares_the_bytes_are_those_of_one_process(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stage: str,
    artifact: str,
    cluster: str,
) -> None:
    expected = {path.name: path.read_bytes() for path in (small / artifact).iterdir()}
    shutil.rmtree(small / artifact)
    assert make(stage, monkeypatch, cluster) == ["2 of 2 shares are made"]
    assert not (small / artifact).exists()
    capfd.readouterr()
    run_stage(small.parents[1], STAGES[artifact], workers=1)
    verb = stage.partition("@")[0]
    shards = {"sample": 8, "explore": 4, "evaluate": 20, "label": 8}[verb]  # explore: first round
    assert f"reusing {shards} of {shards} " in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in (small / artifact).iterdir()} == expected
    lines = [path.name for path in (small.parent / ".metrics/small").glob("*share*.jsonl")]
    assert len(lines) == 2


def test_if_no_share_is_made_the_stage_has_failed(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageFailed) as caught:
        make("label@it009", monkeypatch)
    assert "share 1/2 on" in caught.value.output[0]
    assert any(
        "iterations is 'it009'; expected one of ['it001']" in line for line in caught.value.output
    )


def test_the_stage_makes_what_a_lost_share_has_not(
    small: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(small / "labels/it001")
    with Watch(lambda part, process: process.kill() if part.endswith("2/2") else None):
        lines = make("label@it001", monkeypatch)
    assert lines[0].startswith("share 2/2 on ")
    assert "ended with -9" in lines[0]
    assert lines[1] == "1 of 2 shares are made"
    draft = small / "labels/.it001.draft"
    assert 4 <= len(list(draft.glob("shard-*"))) < 8
    monkeypatch.setenv("OPD_LAUNCH", (draft / ".scratch/launch").read_text())
    run_stage(small.parents[1], STAGES["labels/it001"], workers=1)
    manifest = small / "labels/it001/manifest.json"
    expected = undisturbed / "artifacts/small/labels/it001/manifest.json"
    assert manifest.read_bytes() == expected.read_bytes()


def test_a_run_that_is_ended_ends_its_shares(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to the flow, such as a cancelled deployment's, reaches no thread that waits."""
    ended: list[psutil.Process] = []

    def interrupted(future: Any) -> str:
        while len(ended) < 2:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(shares, "_outcome", interrupted)
    with (
        Watch(lambda _part, process: ended.append(process) if process not in ended else None),
        pytest.raises(KeyboardInterrupt),
    ):
        make("label@it001", monkeypatch)
    assert psutil.wait_procs(ended, timeout=5)[1] == []
    assert not shares._RUNNING


def test_a_senseless_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in ("0", "-1", "two"):
        monkeypatch.setenv("OPD_SHARES", count)
        with pytest.raises(
            ValueError, match=f"OPD_SHARES is '{count}'; expected a number of shares, at least 1"
        ):
            shares.wanted()
    monkeypatch.setenv("OPD_SHARES", "1")
    monkeypatch.setenv("OPD_WORKERS", "many")
    message = (
        "OPD_WORKERS is 'many'; expected a number of simulator processes, or 0 for one per core"
    )
    with pytest.raises(ValueError, match=message):
        shares.wanted()
    monkeypatch.setenv("OPD_WORKERS", "1")
    assert shares.wanted() is None
    monkeypatch.setenv("OPD_SHARES", "3")
    assert shares.wanted() == Spread(3)
    monkeypatch.setenv("OPD_CLUSTER", "ray:10.0.0.1:6379")
    assert shares.wanted() == Spread(3, "ray", "10.0.0.1:6379")
    monkeypatch.setenv("OPD_CLUSTER", "dask:tcp://10.0.0.1:8786")
    assert shares.wanted() == Spread(3, "dask", "tcp://10.0.0.1:8786")
    monkeypatch.setenv("OPD_CLUSTER", "slurm")
    with pytest.raises(
        ValueError, match="OPD_CLUSTER is 'slurm'; expected ray, ray:ADDRESS, dask or dask:ADDRESS"
    ):
        shares.wanted()
    monkeypatch.setattr(shares, "find_spec", lambda _name: None)
    monkeypatch.setenv("OPD_CLUSTER", "ray")
    with pytest.raises(
        ValueError, match=r"OPD_CLUSTER is 'ray'; expected prefect-ray to be installed"
    ):
        shares.wanted()


def test_each_share_on_this_machine_has_its_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPD_WORKERS")
    monkeypatch.setattr(shares.os, "sched_getaffinity", lambda _pid: set(range(16)))
    for spread, part in ((Spread(4), "4"), (Spread(40), "1"), (Spread(4, "dask"), "4")):
        with shares._placement(spread) as variables:
            assert variables == {"OPD_WORKERS": part}
    with shares._placement(Spread(4, "dask", "tcp://there")) as variables:
        assert variables == {}
    monkeypatch.setenv("OPD_WORKERS", "9")
    with shares._placement(Spread(4)) as variables:
        assert variables == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert [shares._gpu(number, Spread(4)) for number in range(1, 5)] == [
        {"CUDA_VISIBLE_DEVICES": device} for device in ("4", "6", "7", "4")
    ]
    monkeypatch.setenv("OPD_DEVICE", "cuda:1")
    assert shares._gpu(1, Spread(4)) == {}
    monkeypatch.setenv("OPD_DEVICE", "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert shares._gpu(1, Spread(4)) == {}


@pytest.mark.parametrize(
    ("nodes", "workers", "expected", "cpus", "gpus"),
    [
        ([(64, 0), (32, 0)], "0", "32", 32, 0),  # one share a node
        ([(64, 8), (64, 8)], "0", "8", 8, 1),  # one a GPU
        ([(64, 0)], "16", "16", 16, 0),
        ([(8, 0)], "16", "16", 8, 0),  # what no node has would wait for ever
    ],
)
def test_on_ray_a_share_asks_for_the_part_of_a_node_that_it_uses(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[tuple[int, int]],
    workers: str,
    expected: str,
    cpus: int,
    gpus: int,
) -> None:
    import ray
    from prefect_ray.context import RemoteOptionsContext

    described: list[dict[str, object]] = [{"Alive": False, "Resources": {}}]
    for cpu, gpu in nodes:
        resources = {"CPU": float(cpu)}
        if gpu:
            resources["GPU"] = float(gpu)
        described.append({"Alive": True, "Resources": resources})
    monkeypatch.setattr(ray, "nodes", lambda: described)
    monkeypatch.setenv("OPD_WORKERS", workers)
    monkeypatch.delenv("OPD_DEVICE")
    with shares._placement(Spread(4, "ray", "there:6379")) as variables:
        options = RemoteOptionsContext.get().current_remote_options
    assert variables == {"OPD_WORKERS": expected}
    assert options == {"scheduling_strategy": "SPREAD", "num_cpus": cpus, "num_gpus": gpus}


def test_nodes_with_gpus_and_without_make_nothing_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    with_gpus = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    without_gpus = {"Alive": True, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [with_gpus, without_gpus])
    for name in ("OPD_WORKERS", "OPD_DEVICE"):
        monkeypatch.delenv(name)
    with (
        pytest.raises(
            ValueError, match="OPD_CLUSTER: 1 of 2 nodes have GPUs; expected all or none"
        ),
        shares._placement(Spread(4, "ray", "there:6379")),
    ):
        pass
    monkeypatch.setenv("OPD_DEVICE", "cpu")
    with shares._placement(Spread(4, "ray", "there:6379")) as variables:
        assert variables == {"OPD_WORKERS": "8"}


def test_a_folder_that_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    message = shares.share.fn("label@it001", "1/2", str(folder), {})
    assert (
        f"no {folder} here; expected the folder of the run, on a file system that every node sees"
    ) in message


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes of one core each, both on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # not below other processes
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000}
    )
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    cluster.wait_for_nodes()
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def read_digest(project: Path, artifact: str) -> str:
    manifest = project / "artifacts/small" / artifact / MANIFEST
    return json.loads(manifest.read_text())["digest"]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
def test_a_run_on_two_nodes_of_ray_is_the_run_of_one_process(
    two_nodes: Any, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow, with DVC, samples and labels in shares on both nodes."""
    project = checkout(
        PARAMS.replace("reinforcements: {rl001: it001}", "reinforcements: {}") + MORE, tmp_path
    )
    monkeypatch.setenv("OPD_SHARES", "2")
    monkeypatch.setenv("OPD_CLUSTER", f"ray:{two_nodes.address}")
    homes: dict[str, int] = {}  # the node of each share, by the process that stands for it

    def note(part: str, process: psutil.Process) -> None:
        for parent in process.parents():
            if parent.name() == "raylet":
                homes[part] = parent.pid

    with chdir(project.folder), Watch(note):
        states = opd(targets=["label@it001"])
        assert {state.name for state in states.values()} == {"Completed"}
        assert not [step for step in pipeline.plan(["label@it001"]) if step.due]
    for name in ("trajectories/it001", "labels/it001"):
        assert read_digest(tmp_path, name) == read_digest(undisturbed, name)
    for verb in ("sample", "label"):
        assert len({home for part, home in homes.items() if part.startswith(verb)}) == 2, homes


def test_a_stage_that_dvc_would_not_run_has_no_shares(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if it is up to date, nor if the cache has what its command would make."""
    before = (toy.folder / "params.yaml").read_text()
    assert pipeline.would_run("demonstrate@pre")
    toy.dvc("repro", "sample@it001")
    assert not pipeline.would_run("sample@it001")
    (toy.folder / "params.yaml").write_text(
        before.replace("sample: {group: 2}", "sample: {group: 3}")
    )
    assert pipeline.would_run("sample@it001")
    toy.dvc("repro", "sample@it001")
    (toy.folder / "params.yaml").write_text(before)
    assert not pipeline.would_run("sample@it001")
    monkeypatch.setenv("OPD_SHARES", "2")
    monkeypatch.setattr(shares, "shares", None)  # nothing could be started
    shares.make(Step("sample@it001"), lambda _line: None)
    shares.make(Step("optimize@it001"), lambda _line: None)
