"""Two processes train what one does, up to the order of sums; what either wrote goes on in the other; and a mistake is said once."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import stages.__main__ as command
from flows.prefect_server.server import free_port
from tests.processes import dies
from tests.small_run import HOST, STAGES
from tests.vla_opd import public, trained_together
from vla_opd.artifacts.draft import draft as artifact_draft
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.learning import fsdp

REPOSITORY = Path(__file__).parents[2]
OPTIMIZE = STAGES["checkpoints/it001"]
TWO = ["--processes", "2"]
pytestmark = pytest.mark.slow


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """A stage in a process of its own, which starts those that train together."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *arguments, *HOST],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(arguments: list[str]) -> tuple[int, str]:
    """The exit code of such a stage, and what it said."""
    with start(arguments) as process:
        said = process.communicate()[1]
    return process.returncode, said


def alone(arguments: list[str]) -> tuple[int, str]:
    """The same of a stage in this process."""
    said = io.StringIO()
    with redirect_stderr(said):
        return command.main([*arguments, *HOST]), said.getvalue()


def rows(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(
    found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-3
) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def assert_same_tensors(found: Path, expected: Path, tolerance: float = 1e-3) -> None:
    """Of the same names and shapes, and all weights together, as the moments of either kind, the same up to this share of their length."""
    ours, theirs = safetensors.torch.load_file(found), safetensors.torch.load_file(expected)
    assert {name: (one.dtype, one.shape) for name, one in ours.items()} == {
        name: (one.dtype, one.shape) for name, one in theirs.items()
    }
    for kind in {name.partition("/")[2] for name in theirs}:
        names = [name for name in theirs if name.partition("/")[2] == kind]
        mine, its = (torch.cat([of[name].flatten() for name in names]) for of in (ours, theirs))
        assert (mine - its).norm() <= tolerance * its.norm(), kind


@pytest.mark.parametrize("name", ["checkpoints/student", "checkpoints/rl001"])
def test_two_processes_train_what_one_does(small: Path, undisturbed: Path, name: str) -> None:
    """What `optimize` makes is looked at below."""
    expected, made = undisturbed / "artifacts/small" / name, small / name
    code, said = ends([*STAGES[name], *TWO])
    assert code == 0, said
    assert_same_curve(rows(made), rows(expected))
    for part in ("model.safetensors", "optimizer.safetensors"):
        if (expected / part).is_file():
            assert_same_tensors(made / part, expected / part)
    ours, theirs = open_artifact(made, "checkpoint"), open_artifact(expected, "checkpoint")
    assert (ours.params, ours.files.keys()) == (theirs.params, theirs.files.keys())
    assert ours.made_with == theirs.made_with | {"processes": "2"}


@pytest.mark.parametrize(("first", "second"), [(TWO, []), ([], TWO)])
def test_what_is_killed_goes_on_as_another_number_of_processes(
    small: Path, undisturbed: Path, first: list[str], second: list[str]
) -> None:
    draft = small / "checkpoints/.it001.draft"
    shutil.rmtree(small / "checkpoints/it001")
    with start([*OPTIMIZE, *first]) as process:
        while process.poll() is None and not (draft / ".scratch/training.safetensors").is_file():
            time.sleep(0.005)
        workers = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        process.kill()
    assert process.returncode < 0
    assert len(workers) >= len(first)
    assert all(dies(pid) for pid in workers)
    with safetensors.safe_open(draft / ".scratch/training.safetensors", "pt") as file:
        done = json.loads(file.metadata()["rows"])
    code, said = (ends if second else alone)([*OPTIMIZE, *second])
    assert code == 0, said
    assert said.count(f"optimize it001: going on from step {len(done)}\n") == 1
    found, expected = (
        rows(small / "checkpoints/it001"),
        rows(undisturbed / "artifacts/small/checkpoints/it001"),
    )
    assert found[: len(done)] == done
    assert_same_curve(found, expected)


def test_the_next_update_goes_on_from_their_moments(small: Path, undisturbed: Path) -> None:
    """Of one process, after a checkpoint that two made."""
    assert ends([*OPTIMIZE, *TWO])[0] == 0
    origin, expected = (
        small / "checkpoints/it001",
        undisturbed / "artifacts/small/checkpoints/it001",
    )
    assert_same_curve(rows(origin), rows(expected))
    assert_same_tensors(origin / "optimizer.safetensors", expected / "optimizer.safetensors")
    after = ["--set", "iterations.it002=it001", "--set", "optimize.schedule_iterations=2"]
    for verb in ("sample", "label"):
        assert alone([verb, "--iteration", "it002", *after])[0] == 0
    code, said = alone(["optimize", "--iteration", "it002", *after])
    assert code == 0, said
    goes_on, made = (
        small / "checkpoints/it002",
        safetensors.torch.load_file(origin / "optimizer.safetensors"),
    )
    assert (
        safetensors.torch.load_file(goes_on / "optimizer.safetensors")["0/step"]
        == made["0/step"] + 24
    )


def test_an_adapter_in_bfloat16_that_recomputes_is_trained_by_two_as_by_one(tmp_path: Path) -> None:
    checkpoint, outs = public.make(tmp_path / "checkpoint"), [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()
    trained_together.main(checkpoint, outs[0])
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.vla_opd.trained_together",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launcher, str(checkpoint), str(outs[1])],
        check=True,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
    )
    one, two = (
        [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] for out in outs
    )
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-2)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5
    assert two[0]["first"] == pytest.approx(
        0.6
    )  # the second process begins with state 1, and has 16 + 32 of the 80 valid tokens
    learnt, again = (safetensors.torch.load_file(out / "learnt.safetensors") for out in outs)
    assert {name: (one.dtype, one.shape) for name, one in again.items()} == {
        name: (one.dtype, one.shape) for name, one in learnt.items()
    }
    assert any(name.endswith("/exp_avg") for name in learnt)
    ours, theirs = (
        torch.cat([one.flatten() for name, one in sorted(found.items()) if "lora_B" in name])
        for found in (again, learnt)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, 0) > 0.95


def test_numbers_that_are_not_finite_stop_all_of_them_and_each_keeps_its_states(
    small: Path,
) -> None:
    code, said = ends([*OPTIMIZE, *TWO, "--set", "optimize.learning_rate=1e30"])
    assert code == 1
    assert said.count("expected finite numbers") == 1
    first, second = sorted(
        (small.parent / ".metrics/small/not_finite").iterdir(),
        key=lambda path: "rank1" in path.name,
    )
    ours, others = safetensors.torch.load_file(first), safetensors.torch.load_file(second)
    assert len(ours["batch/states"]) == len(others["batch/states"]) == 8
    assert not any(name.startswith("weights/") for name in others)
    whole = safetensors.torch.load_file(small / "checkpoints/student/model.safetensors")
    assert {
        name.removeprefix("weights/") for name in ours if name.startswith("weights/")
    } == whole.keys()
    assert all(ours[f"weights/{name}"].shape == tensor.shape for name, tensor in whole.items())


def test_what_cannot_be_shared_out_is_said_once_and_before_anything_starts(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*OPTIMIZE, *HOST, "--processes", "3"]) == 2
    assert (
        capsys.readouterr().err
        == "optimize: optimize.batch_size is 16; expected a multiple of the 3 processes that are to train together\n"
    )
    assert command.main([*OPTIMIZE, *HOST, "--processes", "0"]) == 2
    assert (
        "OPD_PROCESSES, or --processes, is '0'; expected a number of processes, at least 1"
        in capsys.readouterr().err
    )
    assert (
        open_artifact(small / "checkpoints/it001", "checkpoint").made_with.get("processes") is None
    )


def test_a_mistake_of_the_user_is_said_once(small: Path) -> None:
    shutil.rmtree(small / "logits/it001")
    code, said = ends([*OPTIMIZE, *TWO])
    assert code == 2
    assert said.count("logits/it001: no manifest.json; expected a complete artifact") == 1
    assert "Traceback" not in said


def test_two_machines_that_have_been_told_different_things_train_nothing(
    small: Path, tmp_path: Path
) -> None:
    """Each says so of itself: they may not see each other's terminal."""
    other = tmp_path / "other"
    shutil.copytree(small.parents[1], other, ignore=shutil.ignore_patterns("other"))
    for folder in (small, other / "artifacts/small"):
        shutil.rmtree(folder / "checkpoints/it001")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*launcher, "--node-rank", str(rank), "-m", "stages", *OPTIMIZE, *HOST],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate((small.parents[1], other))
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert (
        ".it001.draft: isn't there; expected the draft that another process has begun, in a folder that all of them see"
        in said[1]
    )
    for folder in (small, other / "artifacts/small"):
        assert not (folder / "checkpoints/it001").exists()


def test_one_that_another_is_writing_is_left_to_it(small: Path) -> None:
    with artifact_draft(small / "checkpoints/it001", "checkpoint", {}, {}):
        code, said = ends([*OPTIMIZE, *TWO])
    assert code == 1
    assert said.count("another process is writing it") == 1
    assert "Traceback" not in said


def test_a_process_alone_is_left_as_it_is() -> None:
    assert (fsdp.rank(), fsdp.count()) == (0, 1)
    batch, policy, loss = np.arange(5), torch.nn.Linear(2, 2), torch.tensor(0.1)
    assert fsdp.share(batch).tolist() == batch.tolist()
    assert fsdp.own(7) == 7
    with fsdp.sharded(policy) as shared:
        assert shared is policy
    assert fsdp.weighted(loss, 3) is loss
    assert fsdp.mean({"a": 0.1}, 3) == {"a": 0.1}
    assert fsdp.whole(policy.weight) is policy.weight
    assert fsdp.cut(loss, policy.weight) is loss
