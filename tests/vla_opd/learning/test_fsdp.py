"""Two processes train what one does, up to the order of sums, and resume each other's saves."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from flows.prefect_server.server import free_port
from tests.processes import dies
from tests.small_run import HOST, STAGES, call_stage
from tests.vla_opd import public
from tests.vla_opd.learning import trained_together
from vla_opd.artifacts.draft import draft as artifact_draft
from vla_opd.artifacts.manifest import open_artifact
from vla_opd.learning import fsdp

REPOSITORY = Path(__file__).parents[3]
OPTIMIZE = STAGES["checkpoints/it001"]
TWO = ["--processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.slow


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """Start a stage in a process of its own, which starts those that train together."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *arguments, *HOST],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(arguments: list[str]) -> tuple[int, str]:
    """Run such a stage. Returns its exit code and what it wrote to stderr."""
    with start(arguments) as process:
        messages = process.communicate()[1]
    return process.returncode, messages


def read_metrics(checkpoint: Path) -> list[dict[str, float]]:
    text = (checkpoint / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def read_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def assert_same_curve(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3)


def assert_same_tensors(path: Path, expected: Path) -> None:
    """Compare names, types and shapes, and the values within 0.1 % of their norm.

    The norm is of all weights together, or of all moments of a kind.
    """
    tensors = safetensors.torch.load_file(path)
    expected_tensors = safetensors.torch.load_file(expected)
    assert read_shapes(tensors) == read_shapes(expected_tensors)
    for kind in {name.partition("/")[2] for name in expected_tensors}:
        names = [name for name in expected_tensors if name.partition("/")[2] == kind]
        values = torch.cat([tensors[name].flatten() for name in names])
        expected_values = torch.cat([expected_tensors[name].flatten() for name in names])
        assert (values - expected_values).norm() <= 1e-3 * expected_values.norm(), kind


@pytest.mark.parametrize("name", ["checkpoints/student", "checkpoints/rl001"])
def test_two_processes_train_what_one_does(small: Path, undisturbed: Path, name: str) -> None:
    """`finetune` and `reinforce`; `optimize` is below."""
    code, messages = finish([*STAGES[name], *TWO])
    assert code == 0, messages
    checkpoint = small / name
    expected = undisturbed / "artifacts/small" / name
    assert_same_curve(read_metrics(checkpoint), read_metrics(expected))
    for part in ("model.safetensors", "optimizer.safetensors"):
        if (expected / part).is_file():
            assert_same_tensors(checkpoint / part, expected / part)
    manifest = open_artifact(checkpoint, "checkpoint")
    expected_manifest = open_artifact(expected, "checkpoint")
    assert manifest.params == expected_manifest.params
    assert manifest.files.keys() == expected_manifest.files.keys()
    assert manifest.made_with == expected_manifest.made_with | {"processes": "2"}


@pytest.mark.parametrize(("first", "second"), [(TWO, []), ([], TWO)])
def test_a_killed_training_resumes_with_another_number_of_processes(
    small: Path, undisturbed: Path, first: list[str], second: list[str]
) -> None:
    shutil.rmtree(small / "checkpoints/it001")
    save = small / "checkpoints/.it001.draft/.scratch/training.safetensors"
    with start([*OPTIMIZE, *first]) as process:
        while process.poll() is None and not save.is_file():
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        process.kill()
    assert process.returncode < 0
    workers = [int(pid) for pid in children.split()]
    assert len(workers) >= len(first)
    assert all(dies(pid) for pid in workers)
    with safetensors.safe_open(save, "pt") as file:
        saved = json.loads(file.metadata()["rows"])
    code, messages = finish([*OPTIMIZE, *second])
    assert code == 0, messages
    assert messages.count(f"optimize it001: resuming from step {len(saved)}\n") == 1
    rows = read_metrics(small / "checkpoints/it001")
    assert rows[: len(saved)] == saved
    assert_same_curve(rows, read_metrics(undisturbed / "artifacts/small/checkpoints/it001"))


def test_the_next_update_of_one_process_continues_from_the_moments_of_two(
    small: Path, undisturbed: Path
) -> None:
    assert finish([*OPTIMIZE, *TWO])[0] == 0
    origin = small / "checkpoints/it001"
    expected = undisturbed / "artifacts/small/checkpoints/it001"
    assert_same_curve(read_metrics(origin), read_metrics(expected))
    assert_same_tensors(origin / "optimizer.safetensors", expected / "optimizer.safetensors")
    settings = ("iterations.it002=it001", "optimize.schedule_iterations=2")
    for verb in ("sample", "label", "optimize"):
        assert call_stage([verb, "--iteration", "it002"], *settings) == 0
    moments = safetensors.torch.load_file(origin / "optimizer.safetensors")
    continued = safetensors.torch.load_file(small / "checkpoints/it002/optimizer.safetensors")
    assert continued["0/step"] == moments["0/step"] + 24


def test_an_adapter_in_bfloat16_that_recomputes_is_trained_by_two_as_by_one(tmp_path: Path) -> None:
    checkpoint = public.make(tmp_path / "checkpoint")
    out_of_one = tmp_path / "one"
    out_of_two = tmp_path / "two"
    out_of_one.mkdir()
    out_of_two.mkdir()
    trained_together.main(checkpoint, out_of_one)
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [*launcher, "tests.vla_opd.learning.trained_together", str(checkpoint), str(out_of_two)],
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    one = [json.loads(line) for line in (out_of_one / "rows.jsonl").read_text().splitlines()]
    two = [json.loads(line) for line in (out_of_two / "rows.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-2)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5
    # The second process begins with state 1, and has 16 + 32 of the 80 valid tokens.
    assert two[0]["first"] == pytest.approx(0.6)
    tensors_of_one = safetensors.torch.load_file(out_of_one / "trained.safetensors")
    tensors_of_two = safetensors.torch.load_file(out_of_two / "trained.safetensors")
    assert read_shapes(tensors_of_two) == read_shapes(tensors_of_one)
    assert any(name.endswith("/exp_avg") for name in tensors_of_one)
    names = sorted(name for name in tensors_of_one if "lora_B" in name)
    weights_of_one = torch.cat([tensors_of_one[name].flatten() for name in names])
    weights_of_two = torch.cat([tensors_of_two[name].flatten() for name in names])
    similarity = torch.nn.functional.cosine_similarity(weights_of_two, weights_of_one, 0)
    assert similarity > 0.95


def test_a_loss_that_is_not_finite_stops_every_process_and_each_keeps_its_states(
    small: Path,
) -> None:
    code, messages = finish([*OPTIMIZE, *TWO, "--set", "optimize.learning_rate=1e30"])
    assert code == 1
    assert messages.count("expected finite numbers") == 1
    dumps = list((small.parent / ".metrics/small/not_finite").iterdir())
    first, second = sorted(dumps, key=lambda path: "rank1" in path.name)
    tensors = safetensors.torch.load_file(first)
    tensors_of_second = safetensors.torch.load_file(second)
    assert len(tensors["batch/states"]) == len(tensors_of_second["batch/states"]) == 8
    assert not any(name.startswith("weights/") for name in tensors_of_second)
    weights = {
        name.removeprefix("weights/"): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    student = safetensors.torch.load_file(small / "checkpoints/student/model.safetensors")
    assert weights == {name: tensor.shape for name, tensor in student.items()}


def test_a_batch_that_cannot_be_shared_is_reported_once_and_before_any_process_starts(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_stage([*OPTIMIZE, "--processes", "3"]) == 2
    assert capsys.readouterr().err == (
        "optimize: optimize.batch_size is 16; "
        "expected a multiple of the 3 processes that are to train together\n"
    )
    assert call_stage([*OPTIMIZE, "--processes", "0"]) == 2
    message = "OPD_PROCESSES, or --processes, is '0'; expected a number of processes, at least 1"
    assert message in capsys.readouterr().err
    made_with = open_artifact(small / "checkpoints/it001", "checkpoint").made_with
    assert made_with.get("processes") is None


def test_a_mistake_of_the_user_is_reported_once(small: Path) -> None:
    shutil.rmtree(small / "labels/it001")
    code, messages = finish([*OPTIMIZE, *TWO])
    assert code == 2
    assert messages.count("labels/it001: no manifest.json; expected a complete artifact") == 1
    assert "Traceback" not in messages


def test_two_machines_with_separate_folders_train_nothing(small: Path, tmp_path: Path) -> None:
    """Each reports it: they may not share a terminal."""
    folders = [tmp_path, tmp_path / "second"]
    shutil.copytree(tmp_path, folders[1], ignore=shutil.ignore_patterns("second"))
    checkpoints = [folder / "artifacts/small/checkpoints/it001" for folder in folders]
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    processes = [
        subprocess.Popen(
            [
                *TORCHRUN,
                "--nnodes",
                "2",
                *address,
                "--node-rank",
                str(rank),
                "-m",
                "stages",
                *OPTIMIZE,
                *HOST,
            ],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode for process in processes)
    expected = (
        ".it001.draft: missing; expected the draft that another process has started, "
        "in a folder that all processes see"
    )
    assert expected in messages[1]
    assert not any(checkpoint.exists() for checkpoint in checkpoints)


def test_a_draft_that_another_process_is_writing_is_left_to_it(small: Path) -> None:
    with artifact_draft(small / "checkpoints/it001", "checkpoint", {}, {}):
        code, messages = finish([*OPTIMIZE, *TWO])
    assert code == 1
    assert messages.count("another process is writing it") == 1
    assert "Traceback" not in messages


def test_a_single_process_trains_unchanged() -> None:
    assert (fsdp.rank(), fsdp.count()) == (0, 1)
    rows = np.arange(5)
    policy = torch.nn.Linear(2, 2)
    loss = torch.tensor(0.1)
    assert fsdp.share(rows).tolist() == rows.tolist()
    assert fsdp.process_seed(7) == 7
    with fsdp.sharded(policy) as shared:
        assert shared is policy
    assert fsdp.weighted(loss, 3) is loss
    assert fsdp.mean({"a": 0.1}, 3) == {"a": 0.1}
    assert fsdp.gather_on_first(policy.weight) is policy.weight
    assert fsdp.shard_as(loss, policy.weight) is loss
