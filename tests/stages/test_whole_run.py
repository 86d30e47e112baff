"""The smallest whole run, every stage for real, on an environment from outside the package: one worker or two, killed or not, the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
import safetensors

import stages.__main__ as command
from tests.small_run import HOST, PARAMS, STAGES, run_stage

REPOSITORY = Path(__file__).parents[2]
# A stage of each kind, and how much it has finished when it is killed: shards, lines of the journal, or saved optimiser steps. A good part is left.
KILLED_AT = {
    "demonstrations/main": 1,
    "checkpoints/student": 6,
    "trajectories/it001": 2,
    "logits/it001": 2,
    "checkpoints/it001": 6,
    "evaluations/final": 3,
}
SEED = "KILL_SEED"  # repeats the random kill of an earlier test run


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_workers_write_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    for artifact, arguments in STAGES.items():
        run_stage(tmp_path, arguments, workers=2)
        assert _bytes(tmp_path / "artifacts/small" / artifact) == _bytes(undisturbed / "artifacts/small" / artifact), artifact


@pytest.mark.parametrize("artifact", KILLED_AT)
def test_a_killed_stage_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], artifact: str) -> None:
    """Killed as soon as it has finished a chosen part of its work: it publishes nothing, and the next run does not do that part again."""
    out = _all_but(artifact, undisturbed, tmp_path)
    code = _killed(tmp_path, artifact, KILLED_AT[artifact])
    assert code == -signal.SIGKILL, f"not killed in its work: it ended with {code}"
    assert not out.exists()
    finished = _finished(_draft(out))
    assert finished >= KILLED_AT[artifact]
    _goes_on(undisturbed, tmp_path, artifact, finished, capfd)


def test_a_stage_killed_at_random_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Some stage, a random moment after its draft appeared: in the middle of anything, and perhaps too late."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    generator = random.Random(seed)  # noqa: S311 - no secret
    artifact = generator.choice(sorted(KILLED_AT))
    out = _all_but(artifact, undisturbed, tmp_path)
    code = _killed(tmp_path, artifact, generator.randint(0, KILLED_AT[artifact]), delay=generator.uniform(0, 0.3))
    print(f"{SEED}={seed}: {artifact} ended with {code}")  # pytest shows it if the test fails
    assert out.exists() or code == -signal.SIGKILL
    _goes_on(undisturbed, tmp_path, artifact, _finished(_draft(out)), capfd)


def _goes_on(undisturbed: Path, folder: Path, artifact: str, finished: int, captured: pytest.CaptureFixture[str]) -> None:
    """Run the killed stage again: it says that it reuses what was finished, leaves it alone, and ends at the undisturbed bytes."""
    out, expected = (place / "artifacts/small" / artifact for place in (folder, undisturbed))
    before = _shard_times(_draft(out)) if finished else {}
    said_before = captured.readouterr()
    run_stage(folder, STAGES[artifact], workers=2)
    said = captured.readouterr().err
    print(said_before.out, said_before.err, said, sep="\n")
    reused = re.search(r"reusing (\d+) of \d+ |going on from step (\d+)", said)
    assert int(reused[1] or reused[2] if reused else 0) == finished
    assert before.items() <= _shard_times(out).items(), "a finished shard was written again"
    assert _digest(out) == _digest(expected)
    assert _bytes(out) == _bytes(expected)


def _all_but(artifact: str, undisturbed: Path, folder: Path) -> Path:
    """Lay out a run in which only `artifact` is missing. Returns where it belongs."""
    root = folder / "artifacts/small"
    (folder / "params.yaml").write_text(PARAMS)
    for other in [name for name in STAGES if name != artifact]:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).symlink_to(undisturbed / "artifacts/small" / other)
    return root / artifact


def _killed(folder: Path, artifact: str, point: int, delay: float = 0.0) -> int:
    """Start the stage in a process of its own and SIGKILL it `delay` seconds after its draft holds `point` finished parts. Returns its exit code."""
    draft = _draft(folder / "artifacts/small" / artifact)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "stages", *STAGES[artifact], "--workers", "2", *HOST]
    with subprocess.Popen(arguments, cwd=folder, env=environment) as process:
        try:
            while process.poll() is None and not (draft.exists() and _finished(draft) >= point):
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            process.kill()
    return process.returncode


def _draft(out: Path) -> Path:
    return out.with_name(f".{out.name}.draft")


def _finished(draft: Path) -> int:
    """How much a next run can go on from: the shards, the whole lines of the journal or the saved optimiser steps, whichever the stage has."""
    scratch = draft / ".scratch"
    if not (scratch / "fingerprint").is_file():
        return 0
    try:
        shards = sum(path.name.startswith("shard-") for path in draft.iterdir())
        journal, save = scratch / "journal.jsonl", scratch / "training.safetensors"
        lines = journal.read_text().count("\n") if journal.is_file() else 0
        return shards + lines + (_saved_steps(save) if save.is_file() else 0)
    except FileNotFoundError:  # published under our eyes
        return 0


def _saved_steps(save: Path) -> int:
    with safetensors.safe_open(save, "pt") as file:
        return len(json.loads(file.metadata()["rows"]))


def _shard_times(folder: Path) -> dict[str, int]:
    """When each file of each shard was last written, in nanoseconds."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("shard-*/**/*") if path.is_file()}


def _digest(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["digest"]


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
    with chdir(tmp_path):
        assert command.main(["label", "--iteration", "it001", *HOST]) == 2
    said = capsys.readouterr().err
    assert frames.name in said
    assert "corrupt" in said
