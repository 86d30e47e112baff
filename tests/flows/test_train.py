"""The flow on a toy project: the dvc.lock of `dvc repro`, mutual reuse, and resumption."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterTaskRunId
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows import pipeline, projects, shares
from flows.dvc_runner import process
from flows.dvc_runner.process import Line, LineHandler
from flows.pipeline import StageFailed, Step
from flows.prefect_server import gpu_limit, liveness
from flows.train import in_groups, opd
from tests.flows.toy import Toy, make_toy, ran
from tests.vla_opd.lineage.manifests import publish
from vla_opd.params.load import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Pair:
    """The same project, brought up to date by the flow and by `dvc repro`.

    processes: how many processes of DVC the flow started.
    """

    flow: Toy
    repro: Toy
    states: dict[str, Any]
    processes: int


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, server: None) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    first = folder / "flow"
    first.mkdir()
    by_flow = make_toy(first)
    shutil.copytree(first, folder / "repro")
    by_repro = Toy(folder / "repro")
    by_repro.dvc("repro")
    started = []
    start = process._start
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(first)
        patch.setattr(process, "_start", lambda: started.append(start()) or started[-1])
        states = opd()
        yield Pair(by_flow, by_repro, states, len(started))


def names(states: dict[str, Any]) -> set[str]:
    return {state.name for state in states.values()}


def test_the_flow_and_dvc_repro_leave_the_same_lock_byte_for_byte(pair: Pair) -> None:
    assert pair.flow.lock == pair.repro.lock
    assert names(pair.states) == {"Completed"}


def test_each_reuses_what_the_other_made(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(pair.flow.dvc("repro")) == []
    monkeypatch.chdir(pair.repro.folder)
    before = pair.repro.lock
    assert names(opd()) == {"Unchanged"}
    assert pair.repro.lock == before


def test_one_process_of_dvc_serves_all_stages(pair: Pair) -> None:
    assert pair.processes == 1


def test_every_iteration_is_a_subflow_and_every_stage_a_task(pair: Pair) -> None:
    with get_client(sync_client=True) as client:
        tasks = {
            name: client.read_task_run(state.state_details.task_run_id)
            for name, state in pair.states.items()
        }
        owners = {name: client.read_flow_run(task.flow_run_id).name for name, task in tasks.items()}
    assert {name: task.name for name, task in tasks.items()} == {name: name for name in pair.states}
    assert {name for name, owner in owners.items() if owner == "it002"} == {
        "sample@it002",
        "label@it002",
        "optimize@it002",
        "evaluate@final",
    }
    assert owners["sample@it001"] == "it001"
    assert not {owners[name] for name in ("pretrain@base", "finetune@teacher", "report")} & {
        "it001",
        "it002",
    }


def test_tasks_wait_for_their_parents_so_that_the_interface_draws_the_graph_of_dvc(
    pair: Pair,
) -> None:
    with get_client(sync_client=True) as client:
        tasks = {task.id: task for task in client.read_task_runs()}
        optimize = tasks[pair.states["optimize@it001"].state_details.task_run_id]
        first = client.read_flow_run(optimize.flow_run_id)

    def waited_for(run: Any) -> set[str]:
        return {tasks[entry.id].name for entry in run.task_inputs["wait_for"]}

    assert waited_for(optimize) == {"sample@it001", "label@it001"}
    assert waited_for(tasks[first.parent_task_run_id]) == {"finetune@student", "finetune@teacher"}


def test_a_failure_ends_the_flow_and_the_next_run_resumes_there(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAILS", "finetune base")
    with pytest.raises(StageFailed, match="pretrain@base") as failure:
        opd(targets=["finetune@student"])
    assert "finetune base: no luck" in failure.value.output
    assert toy.has("demonstrations/pre")
    # On the way to a target, DVC visits a stage's parents in no fixed order.
    before = toy.has("demonstrations/main")
    monkeypatch.delenv("TOY_FAILS")
    states = opd(targets=["finetune@student"])
    assert {name: state.name for name, state in states.items()} == {
        "demonstrate@pre": "Unchanged",
        "pretrain@base": "Completed",
        "demonstrate@main": "Unchanged" if before else "Completed",
        "finetune@student": "Completed",
    }


def test_the_early_cut_off_is_dvcs(clone: Toy) -> None:
    """A due stage whose inputs come out the same ends Unchanged, without running."""
    clone.edit("params.yaml", "steps: 3", "steps: 5")
    states = opd(targets=["finetune@teacher", "finetune@student"])
    assert {name: state.name for name, state in states.items()} == {
        "demonstrate@pre": "Unchanged",
        "pretrain@base": "Unchanged",
        "demonstrate@main": "Completed",
        "finetune@teacher": "Completed",
        "finetune@student": "Unchanged",
    }
    assert not clone.has("demonstrations/pre")


def test_a_task_waits_while_another_dvc_is_at_work(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([pipeline.Busy("another DVC process is at work here"), True])

    def reproduce(name: str, tell: LineHandler, task_run: str, launch: str) -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        tell(Line("Running stage"))
        return answer

    monkeypatch.setattr(pipeline, "reproduce", reproduce)
    monkeypatch.setattr("flows.train.BUSY_DELAY", 0)
    states = opd(targets=["demonstrate@pre"])
    assert names(states) == {"Completed"}
    assert next(answers, None) is None


def test_a_stage_is_told_its_task_run_and_its_shares_and_what_it_made_is_posted(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, tuple[str, str]] = {}
    digests: list[str] = []

    def reproduce(name: str, tell: LineHandler, task_run: str, launch: str) -> bool:
        arguments[name] = task_run, launch
        folder = toy.folder / "artifacts/toy/demonstrations/pre"
        digests.append(publish(folder, "demonstrations", {"parent": "0" * 64}))
        return True

    monkeypatch.setattr(pipeline, "reproduce", reproduce)
    monkeypatch.setattr(shares, "make", lambda step, _tell: f"shares of {step.name}")
    states = opd(targets=["demonstrate@pre"])
    run = states["demonstrate@pre"].state_details.task_run_id
    assert arguments == {"demonstrate@pre": (str(run), "shares of demonstrate@pre")}
    with get_client(sync_client=True) as client:
        (posted,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(task_run_id=ArtifactFilterTaskRunId(any_=[run]))
        )
    assert posted.key == "demonstrate-pre"
    assert {"what": "digest", "value": digests[0][:12]} in json.loads(posted.data)


def test_the_gpu_is_held_by_one_stage_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DEVICE", "cuda")
    gpu_limit.ensure_limit()
    gpu_limit.ensure_limit()  # there already
    entered = threading.Event()
    leave = threading.Event()

    def label() -> None:
        with gpu_limit.hold_gpu("label"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=label)
    with gpu_limit.hold_gpu("optimize"):
        thread.start()
        assert not entered.wait(3)
    assert entered.wait(60)
    leave.set()
    thread.join()


def test_settings_are_validated_then_written_with_comments_kept(toy: Toy) -> None:
    opd(targets=["demonstrate@pre"], settings={"optimize.steps": 7}, iterations=3)
    text = (toy.folder / "params.yaml").read_text()
    assert "# a comment that must survive" in text
    assert "optimize: {steps: 7}" in text
    assert "it003: it002" in text
    assert "final: it003" in text
    with pytest.raises(ParameterTypeError, match=r"optimize\.stepz"):
        opd(settings={"optimize.stepz": 7})
    with pytest.raises(ValueError, match=r"iterations is 1; expected at least the 3"):
        opd(iterations=1)
    assert (toy.folder / "params.yaml").read_text() == text


def test_a_project_runs_beside_the_run_of_its_checkout(toy: Toy) -> None:
    """The checkout's own run is at work meanwhile, and nothing of it is written."""
    quick = Path("runs/quick")
    projects.create("quick", Path("params.yaml"), {})
    before = (toy.folder / "params.yaml").read_text()
    with liveness.hold_run("another"):
        states = opd(settings={"optimize.steps": 7}, targets=["finetune@student"], project=quick)
    assert names(states) == {"Completed"}
    assert Toy(quick).has("checkpoints/student")
    assert load(quick / "params.yaml").optimize.steps == 7
    assert (toy.folder / "params.yaml").read_text() == before
    assert not (toy.folder / "artifacts/toy").exists()
    assert Path.cwd() == toy.folder


def test_an_edit_of_the_settings_ends_a_run_that_is_at_work(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce = pipeline.reproduce

    def reproduce_and_edit(name: str, tell: LineHandler, task_run: str, launch: str) -> bool:
        ran = reproduce(name, tell, task_run, launch)
        after = "optimize: {steps: 4}  # a comment is no setting"
        if name == "pretrain@base":
            after = "optimize: {steps: 9}"
        toy.edit("params.yaml", "optimize: {steps: 4}", after)
        return ran

    monkeypatch.setattr(pipeline, "reproduce", reproduce_and_edit)
    with pytest.raises(
        ValueError,
        match=r"params.yaml was edited while the run was at work, before .*; what is done is kept",
    ):
        opd(targets=["finetune@student"])
    assert toy.has("checkpoints/base", "demonstrations/pre")
    assert not toy.has("checkpoints/student")


def test_settings_of_a_run_at_work_are_not_changed_by_another(toy: Toy) -> None:
    before = (toy.folder / "params.yaml").read_text()
    with liveness.hold_run("another"):
        with pytest.raises(RuntimeError, match="in use by flow run another"):
            opd(targets=["demonstrate@pre"], settings={"optimize.steps": 7})
        assert (toy.folder / "params.yaml").read_text() == before
        assert names(opd(targets=["demonstrate@pre"], settings={"optimize.steps": 4})) == {
            "Completed"
        }, "the same settings are refused"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "OPD_PROCESSES",
            "3",
            r"finetune\.batch_size is 4; expected a multiple of the 3 processes",
        ),
        (
            "OPD_PROCESSES",
            "",
            "OPD_PROCESSES, or --processes, is ''; expected a number of processes",
        ),
        ("OPD_SHARES", "x", "OPD_SHARES is 'x'; expected a number of shares"),
    ],
)
def test_senseless_processes_and_shares_are_refused_before_any_stage(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        opd()
    assert not (toy.folder / "artifacts/toy").exists()


def test_groups_keep_the_order_of_the_plan() -> None:
    plan = [
        Step(name)
        for name in ("pretrain@base", "sample@a", "label@a", "finetune@teacher", "sample@b")
    ]
    assert [(name, [step.name for step in steps]) for name, steps in in_groups(plan)] == [
        (None, ["pretrain@base"]),
        ("a", ["sample@a", "label@a"]),
        (None, ["finetune@teacher"]),
        ("b", ["sample@b"]),
    ]
