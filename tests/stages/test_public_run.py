"""The whole loop on a random tiny OpenVLA-OFT in LIBERO: adopted, rolled out, labelled, distilled with an adapter, scored and reported."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from flows import cli
from stages.__main__ import main
from tests.small_run import HOST, run_stage
from tests.vla_opd import public
from vla_opd.analysis.evaluation import read_records
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.data.trajectory import read_states, shards
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.openvla_oft.model import from_public

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PARAMS = """
run: {name: public}
environment: {family: libero, tasks: [libero_object/0], cameras: [agentview], image_size: 256, render: exact, wording: benchmark}
adopt:
  student: {folder: public, crop: 1.0, dtype: float32}
  teacher: {folder: public, dtype: float32}
sample: {prompts: 1, group: 1, horizon: 16, observe_every: 2}
label: {batch_size: 4, threads: 1}
optimize:
  {lora_rank: 4, gradient_checkpointing: true, steps: 8, save_every: 2, batch_size: 4, schedule_iterations: 1, learning_rate: 3.0e-3, threads: 1}
iterations: {it001: student}
evaluate: {episodes: 1, horizon: 8}
evaluations: {final: it001}
report: {start: final, final: final, teacher: final}
"""
OPTIMIZE = ["optimize", "--iteration", "it001"]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "params.yaml").write_text(PARAMS)
    public.make(folder / "public")
    iteration = (["sample", "--iteration", "it001"], ["label", "--iteration", "it001"], OPTIMIZE)
    for arguments in (
        ["adopt", "--name", "student"],
        ["adopt", "--name", "teacher"],
        *iteration,
        ["evaluate", "--name", "final"],
        ["report"],
    ):
        run_stage(folder, arguments, workers=1)
    with chdir(folder):
        yield folder / "artifacts/public"


def test_the_student_comes_nearer_to_its_teacher_by_its_adapter_alone(loop: Path) -> None:
    made, student = (open_checkpoint(loop / "checkpoints" / name) for name in ("it001", "student"))
    facts = made.manifest.facts
    assert facts["after"]["reverse_kl"] < 0.9 * facts["before"]["reverse_kl"]
    assert set(made.manifest.files) >= {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    }
    assert made.manifest.files["model.safetensors"] == student.manifest.files["model.safetensors"]
    assert made.facts == student.facts
    assert lora.attached(load_policy(made)) == (4, 16)


def test_what_is_seen_is_what_the_simulator_shows(loop: Path) -> None:
    """Two decisions, all of whose states are kept: other states, other logits; the same instruction."""
    states = read_states(shards(loop / "trajectories/it001"))
    assert states.observations.frames.shape == (8, 1, 256, 256, 3)
    assert set(states.observations.instructions) == {
        "pick up the alphabet soup and place it in the basket"
    }
    with torch.inference_mode():
        logits = load_policy(open_checkpoint(loop / "checkpoints/teacher")).logits(
            states.observations
        )
    assert (logits[0] - logits[7]).abs().max() > 1e-3


def test_it_is_scored_and_reported(loop: Path) -> None:
    (record,) = read_records(loop / "evaluations/final")
    assert (record.task, record.steps, record.success) == ("libero_object/0", 8, False)
    assert "it001" in (loop / "report/page/index.html").read_text()


def test_an_adapter_that_could_not_be_trained_is_not_rolled_out(
    loop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "reinforcements.rl001=it001", "--set", "reinforce.lora_rank=8"]
    with chdir(loop.parents[1]):
        assert main(["explore", "--iteration", "rl001", *settings, *HOST]) == 2
    assert (
        "reinforce.lora_rank and lora_alpha are [8, 16]; expected the checkpoint's [4, 16]"
        in capsys.readouterr().err
    )


def test_it_goes_out_as_it_came(loop: Path, tmp_path: Path) -> None:
    with chdir(loop.parents[1]):
        assert (
            cli.main(["export", "checkpoints/it001", str(tmp_path / "out"), "--like", "public"])
            == 0
        )
    before, after = from_public(loop.parents[1] / "public"), from_public(tmp_path / "out")
    changed = {
        name.rpartition(".")[0]
        for name, one in after.state_dict().items()
        if not torch.equal(one, before.state_dict()[name])
    }
    assert {name.partition(".")[0] for name in changed} == {
        "dino",
        "siglip",
        "projector",
        "language_model",
    }


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(loop: Path, tmp_path: Path) -> None:
    """Only the adapter is saved on the way: the rest doesn't change."""
    shutil.copytree(loop.parents[1], tmp_path, dirs_exist_ok=True)
    out = tmp_path / "artifacts/public/checkpoints/it001"
    shutil.rmtree(out)
    save = out.with_name(".it001.draft") / ".scratch/training.safetensors"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "stages", *OPTIMIZE, *HOST], cwd=tmp_path, env=environment
    ) as process:
        while process.poll() is None and not save.exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert save.stat().st_size < (loop / "checkpoints/student/model.safetensors").stat().st_size / 5
    run_stage(tmp_path, OPTIMIZE, workers=1)
    assert (
        read_manifest(out, "checkpoint").digest
        == read_manifest(loop / "checkpoints/it001", "checkpoint").digest
    )
