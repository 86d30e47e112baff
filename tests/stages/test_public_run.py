"""The whole loop on a random tiny OpenVLA-OFT in LIBERO.

Adopted, rolled out, labelled, distilled with an adapter, evaluated and reported.
"""

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
from tests.small_run import HOST, call_stage, run_stage
from tests.vla_opd import public
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.data.records import read_records
from vla_opd.data.trajectory import read_states, shards
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy
from vla_opd.policies.openvla_oft.model import from_public

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PARAMS = """
run: {name: public}
environment:
  family: libero
  tasks: [libero_object/0]
  cameras: [agentview]
  image_size: 256
  render: exact
  wording: benchmark
adopt:
  student: {folder: public, crop: 1.0, dtype: float32}
  teacher: {folder: public, dtype: float32}
sample: {prompts: 1, group: 1, horizon: 16, observe_every: 2}
label: {batch_size: 4, threads: 1}
optimize:
  lora_rank: 4
  gradient_checkpointing: true
  steps: 8
  save_every: 2
  batch_size: 4
  schedule_iterations: 1
  learning_rate: 3.0e-3
  threads: 1
iterations: {it001: student}
evaluate: {episodes: 1, horizon: 8}
evaluations: {final: it001}
report: {start: final, final: final, teacher: final}
"""
OPTIMIZE = ["optimize", "--iteration", "it001"]
STAGES = [
    ["adopt", "--name", "student"],
    ["adopt", "--name", "teacher"],
    ["sample", "--iteration", "it001"],
    ["label", "--iteration", "it001"],
    OPTIMIZE,
    ["evaluate", "--name", "final"],
    ["report"],
]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The artifacts of the run, whose folder is the working directory."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "params.yaml").write_text(PARAMS)
    public.make(folder / "public")
    for arguments in STAGES:
        run_stage(folder, arguments, workers=1)
    with chdir(folder):
        yield folder / "artifacts/public"


def test_the_adapter_alone_brings_the_student_closer_to_its_teacher(loop: Path) -> None:
    student = open_checkpoint(loop / "checkpoints/student")
    updated = open_checkpoint(loop / "checkpoints/it001")
    facts = updated.manifest.facts
    assert facts["after"]["reverse_kl"] < 0.9 * facts["before"]["reverse_kl"]
    files = updated.manifest.files
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    assert set(files) >= {"model.safetensors", "tokenizer.json"} | adapter
    assert files["model.safetensors"] == student.manifest.files["model.safetensors"]
    assert updated.facts == student.facts
    assert lora.attached(load_policy(updated)) == (4, 16)


def test_the_policy_sees_the_simulators_frames(loop: Path) -> None:
    """Two decisions, all of whose states are kept: other states have other logits."""
    observations = read_states(shards(loop / "trajectories/it001")).observations
    assert observations.frames.shape == (8, 1, 256, 256, 3)
    instruction = "pick up the alphabet soup and place it in the basket"
    assert set(observations.instructions) == {instruction}
    teacher = load_policy(open_checkpoint(loop / "checkpoints/teacher"))
    with torch.inference_mode():
        logits = teacher.logits(observations)
    assert (logits[0] - logits[7]).abs().max() > 1e-3


def test_it_is_evaluated_and_reported(loop: Path) -> None:
    (record,) = read_records(loop / "evaluations/final")
    assert (record.task, record.steps, record.success) == ("libero_object/0", 8, False)
    assert "it001" in (loop / "report/page/index.html").read_text()


def test_an_adapter_that_cannot_be_trained_is_refused_before_rollouts(
    loop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("reinforcements.rl001=it001", "reinforce.lora_rank=8")
    with chdir(loop.parents[1]):
        assert call_stage(["explore", "--iteration", "rl001"], *settings) == 2
    message = "reinforce.lora_rank and lora_alpha are [8, 16]; expected the checkpoint's [4, 16]"
    assert message in capsys.readouterr().err


def test_it_is_exported_in_the_format_it_was_adopted_from(loop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with chdir(loop.parents[1]):
        assert cli.main(["export", "checkpoints/it001", str(out), "--like", "public"]) == 0
    before = from_public(loop.parents[1] / "public").state_dict()
    after = from_public(out).state_dict()
    changed = {
        name.partition(".")[0]
        for name, value in after.items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"dino", "siglip", "projector", "language_model"}


def test_a_killed_training_resumes_to_the_same_bytes(loop: Path, tmp_path: Path) -> None:
    """Only the adapter is saved on the way: the other weights do not change."""
    shutil.copytree(loop.parents[1], tmp_path, dirs_exist_ok=True)
    out = tmp_path / "artifacts/public/checkpoints/it001"
    shutil.rmtree(out)
    save = out.with_name(".it001.draft") / ".scratch/training.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", *OPTIMIZE, *HOST],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    with process:
        while process.poll() is None and not save.exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    weights = loop / "checkpoints/student/model.safetensors"
    assert save.stat().st_size < weights.stat().st_size / 5
    run_stage(tmp_path, OPTIMIZE, workers=1)
    expected = read_manifest(loop / "checkpoints/it001", "checkpoint")
    assert read_manifest(out, "checkpoint").digest == expected.digest
