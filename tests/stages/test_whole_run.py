"""The smallest whole run, every stage for real, on an environment from outside the package: one worker or two, killed or not, the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stages.__main__ as command

REPOSITORY = Path(__file__).parents[2]
PARAMS = """
run: {name: small, seed: 3}
environment: {family: "tests.out_of_tree:make", tasks: [red, blue], image_size: 32, settle: 0}
policy: {chunk: 4, bins: 32, crop: 32, width: 32, layers: 1, heads: 2, channels: 8}
demonstrations: {main: {episodes: 12}}
demonstrate: {expert: "tests.out_of_tree:expert", horizon: 60}
teacher: {demonstrations: main, steps: 30, learning_rate: 2.0e-3}
student: {parent: teacher, demonstrations: main, per_task: 1, steps: 6, learning_rate: 1.0e-3}
finetune: {save_every: 4, batch_size: 16, threads: 1}
sample: {group: 3, horizon: 40, prompts: 2}
optimize: {steps: 8, save_every: 2, schedule_iterations: 1, batch_size: 16, threads: 1}
iterations: {it001: student}
evaluate: {episodes: 6, horizon: 40}
evaluations: {start: student, final: it001, teacher: teacher}
"""
STAGES = {
    "demonstrations/main": ["demonstrate", "--name", "main"],
    "checkpoints/teacher": ["finetune", "--name", "teacher"],
    "checkpoints/student": ["finetune", "--name", "student"],
    "trajectories/it001": ["sample", "--iteration", "it001"],
    "logits/it001": ["label", "--iteration", "it001"],
    "checkpoints/it001": ["optimize", "--iteration", "it001"],
    "evaluations/start": ["evaluate", "--name", "start"],
    "evaluations/final": ["evaluate", "--name", "final"],
    "evaluations/teacher": ["evaluate", "--name", "teacher"],
    "report/page": ["report"],
}


def _run(folder: Path, arguments: list[str], workers: int) -> None:
    back = Path.cwd()
    os.chdir(folder)
    try:
        assert command.main([*arguments, "--workers", str(workers), "--device", "cpu", "--tracking", "none"]) == 0
    finally:
        os.chdir(back)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run by one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "params.yaml").write_text(PARAMS)
    for arguments in STAGES.values():
        _run(folder, arguments, workers=1)
    return folder


def test_two_workers_write_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    for artifact, arguments in STAGES.items():
        _run(tmp_path, arguments, workers=2)
        assert _bytes(tmp_path / "artifacts/small" / artifact) == _bytes(undisturbed / "artifacts/small" / artifact), artifact


@pytest.mark.parametrize("artifact", [name for name in STAGES if name not in ("checkpoints/teacher", "evaluations/start", "evaluations/teacher")])
def test_a_killed_stage_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path, artifact: str) -> None:
    """Killed at a random moment after it began to write; run again; compared byte by byte."""
    root = tmp_path / "artifacts/small"
    (tmp_path / "params.yaml").write_text(PARAMS)
    for other in [name for name in STAGES if name != artifact]:
        source = undisturbed / "artifacts/small" / other
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).symlink_to(source)
    seconds = _killed(tmp_path, STAGES[artifact], root / artifact)
    _run(tmp_path, STAGES[artifact], workers=2)
    assert _bytes(root / artifact) == _bytes(undisturbed / "artifacts/small" / artifact), f"killed after {seconds:.2f} s"


def _killed(folder: Path, arguments: list[str], out: Path) -> float:
    """Start the stage in a process of its own and SIGKILL it up to half a second after its draft appears. Returns that time."""
    after = random.SystemRandom().uniform(0, 0.5)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    options = ["--workers", "2", "--device", "cpu", "--tracking", "none"]
    process = subprocess.Popen([sys.executable, "-m", "stages", *arguments, *options], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not out.with_name(f".{out.name}.draft").exists():
        time.sleep(0.005)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return after


def test_the_student_moves_towards_the_teacher(undisturbed: Path) -> None:
    facts = json.loads((undisturbed / "artifacts/small/checkpoints/it001/manifest.json").read_text())["facts"]
    assert facts["after"]["reverse_kl"] < 0.9 * facts["before"]["reverse_kl"]


def test_a_corrupt_shard_stops_the_stage_before_it_does_anything(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    subprocess.run(["cp", "-r", str(undisturbed / "artifacts"), str(tmp_path)], check=True)
    frames = next(path for path in (tmp_path / "artifacts/small/trajectories/it001").glob("shard-*/frames/c/**/*") if path.is_file())
    spoiled = bytearray(frames.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    frames.write_bytes(spoiled)
    os.chdir(tmp_path)
    try:
        assert command.main(["label", "--iteration", "it001", "--tracking", "none", "--device", "cpu"]) == 2
    finally:
        os.chdir(REPOSITORY)
    said = capsys.readouterr().err
    assert frames.name in said
    assert "corrupt" in said
