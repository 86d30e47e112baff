"""A killed stage resumes to the same bytes; two runs of one stage publish one whole artifact."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import safetensors
from ruamel.yaml import YAML

from tests.small_run import (
    HOST,
    PARAMS,
    STAGES,
    call_stage,
    lay_out_without,
    read_bytes,
    run_stage,
)
from vla_opd.artifacts.manifest import MANIFEST, Manifest, open_artifact

REPOSITORY = Path(__file__).parents[2]
# A stage of each kind, and the finished parts when it is killed: shards, lines of the journal or
# saved optimizer steps. A good part remains.
KILLED_AT = {
    "demonstrations/main": 1,
    "checkpoints/student": 6,
    "trajectories/it001": 2,
    "labels/it001": 2,
    "checkpoints/it001": 6,
    "trajectories/rl001": 6,  # in its second round
    "checkpoints/rl001": 6,
    "evaluations/final": 3,
    "report/page": 0,  # it has no parts
}
# A setting that changes what each stage makes.
CHANGES = {
    "demonstrations/main": "demonstrate.noise=0.3",
    "checkpoints/student": "finetune.smoothing=2.5",
    "trajectories/it001": "sample.temperature=0.3",
    "labels/it001": "label.dtype=float32",
    "checkpoints/it001": "optimize.steps=23",
    "trajectories/rl001": "explore.temperature=0.5",
    "checkpoints/rl001": "reinforce.steps=11",
    "evaluations/final": "evaluate.horizon=33",
    "report/page": "evaluate.confidence=0.8",
}
SEED = "KILL_SEED"  # the environment variable that repeats the random kill of an earlier test run


def random_generator(number: int) -> tuple[int, random.Random]:
    """Return a seed, of this test run or from the environment, and its generator."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32)) + number
    return seed, random.Random(seed)  # noqa: S311 - no secret


def start(folder: Path, artifact: str, *settings: str) -> "subprocess.Popen[bytes]":
    """Start a stage in a process of its own."""
    overrides = [f"--set={setting}" for setting in settings]
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *STAGES[artifact], "--workers", "2", *HOST, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )


def start_and_kill(folder: Path, artifact: str, parts: int, delay: float = 0.0) -> int:
    """Start a stage, and kill it once its draft has so many finished parts. Returns its exit code.

    delay: seconds to wait before the kill.
    """
    draft = draft_of(folder / "artifacts/small" / artifact)
    with start(folder, artifact) as process:
        try:
            while process.poll() is None:
                if draft.exists() and count_finished(draft) >= parts:
                    break
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            process.kill()
    return process.returncode


def draft_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.draft")


def count_finished(draft: Path) -> int:
    """Count what the next run resumes from: shards, lines of the journal and optimizer steps."""
    scratch = draft / ".scratch"
    if not (scratch / "fingerprint").is_file():
        return 0
    try:
        finished = len(list(draft.glob("shard-*")))
        for journal in scratch.glob("journal-*.jsonl"):
            finished += journal.read_text().count("\n")
        save = scratch / "training.safetensors"
        if save.is_file():
            with safetensors.safe_open(save, "pt") as file:
                finished += len(json.loads(file.metadata()["rows"]))
    except FileNotFoundError:  # published at this moment
        return 0
    return finished


def read_shard_times(folder: Path) -> dict[str, int]:
    """Return when each shard was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def read(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_text())


def assert_resumes(
    undisturbed: Path, folder: Path, artifact: str, captured: pytest.CaptureFixture[str]
) -> None:
    """Run the killed stage again.

    It reports how many finished parts it reuses, leaves them alone, and ends at the undisturbed
    bytes.
    """
    out = folder / "artifacts/small" / artifact
    finished = count_finished(draft_of(out))
    times = read_shard_times(draft_of(out)) if finished else {}
    of_killed = captured.readouterr()
    run_stage(folder, STAGES[artifact], workers=2)
    messages = captured.readouterr().err
    print(of_killed.out, of_killed.err, messages, sep="\n")
    # `explore` has one for each round.
    reused = re.findall(r"reusing (\d+) of \d+ |resuming from step (\d+)", messages)
    assert sum(int(parts or steps) for parts, steps in reused) == finished
    assert times.items() <= read_shard_times(out).items(), "a finished shard was written again"
    expected = undisturbed / "artifacts/small" / artifact
    assert read(out).digest == read(expected).digest
    assert read_bytes(out) == read_bytes(expected)


@pytest.mark.parametrize("artifact", KILLED_AT)
def test_a_killed_stage_goes_on_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], artifact: str
) -> None:
    """Killed after a chosen part of its work, it publishes nothing, and does not repeat it."""
    out = lay_out_without(artifact, undisturbed, tmp_path)
    code = start_and_kill(tmp_path, artifact, KILLED_AT[artifact])
    assert code == -signal.SIGKILL, f"not killed while it worked: it ended with {code}"
    assert not out.exists()
    assert count_finished(draft_of(out)) >= KILLED_AT[artifact]
    assert_resumes(undisturbed, tmp_path, artifact, capfd)


@pytest.mark.parametrize("number", range(int(os.environ.get("KILLS") or 1)))
def test_a_stage_killed_at_random_goes_on_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """At a random moment after its draft appeared: in the middle of anything, or too late."""
    seed, generator = random_generator(number)
    artifact = generator.choice(sorted(KILLED_AT))
    out = lay_out_without(artifact, undisturbed, tmp_path)
    parts = generator.randint(0, KILLED_AT[artifact])
    code = start_and_kill(tmp_path, artifact, parts, delay=generator.uniform(0, 0.3))
    print(f"{SEED}={seed}: {artifact} ended with {code}")  # pytest shows it if the test fails
    assert out.exists() or code == -signal.SIGKILL
    assert_resumes(undisturbed, tmp_path, artifact, capfd)


METAWORLD: dict[str, Any] = {
    "environment": {
        "family": "metaworld",
        "tasks": ["window-open-v3", "window-close-v3"],
        "image_size": 32,
        "settle": 0,
        "cameras": ["corner4"],
    },
    "demonstrations": {"main": {"episodes": 2}},
    "demonstrate": {"expert": "metaworld", "horizon": 200},
    "pretrained": {"teacher": {"demonstrations": "main", "steps": 1, "learning_rate": 1.0e-3}},
    "finetuned": {
        "student": {
            "parent": "teacher",
            "demonstrations": "main",
            "per_task": 1,
            "steps": 1,
            "learning_rate": 1.0e-3,
        }
    },
    "sample": {"group": 2, "horizon": 24, "prompts": 1},
}


def test_a_killed_stage_goes_on_to_the_bytes_of_one_worker_on_metaworld_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params = YAML(typ="safe").load(PARAMS) | METAWORLD
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        (folder / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    for artifact in (
        "demonstrations/main",
        "checkpoints/teacher",
        "checkpoints/student",
        "trajectories/it001",
    ):
        run_stage(undisturbed, STAGES[artifact], workers=1)
        if artifact.startswith("checkpoints"):
            out = killed / "artifacts/small" / artifact
            out.parent.mkdir(exist_ok=True)
            out.symlink_to(undisturbed / "artifacts/small" / artifact)
        else:
            assert start_and_kill(killed, artifact, 1) == -signal.SIGKILL
            assert_resumes(undisturbed, killed, artifact, capfd)


@pytest.mark.parametrize("settings", ["the same", "others"])
@pytest.mark.parametrize("number", range(int(os.environ.get("ROUNDS") or 1)))
def test_two_runs_of_one_stage_at_once_publish_one_whole_artifact(
    undisturbed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    number: int,
    settings: str,
) -> None:
    """Started up to two seconds apart.

    Each publishes what it would have alone, or reports that another is writing it.
    """
    seed, generator = random_generator(number)
    artifact = generator.choice(sorted(KILLED_AT))
    changes = [CHANGES[artifact]] if settings == "others" else []
    out = lay_out_without(artifact, undisturbed, tmp_path)
    first = start(tmp_path, artifact)
    time.sleep(generator.uniform(0, 2))
    second = start(tmp_path, artifact, *changes)
    codes = [first.wait(), second.wait()]
    messages = capfd.readouterr().err
    print(f"{SEED}={seed}: {artifact} ended with {codes}\n{messages}")
    assert sorted(codes) in ([0, 0], [0, 1])
    assert messages.count("another process is writing it") == codes.count(1)
    assert not draft_of(out).exists()
    open_artifact(out, read(out).kind)
    published = read_bytes(out)
    if published == read_bytes(undisturbed / "artifacts/small" / artifact):
        assert codes[0] == 0 or not changes
        return
    # Of two that published, either may have been the last.
    assert changes
    assert codes[1] == 0
    shutil.rmtree(out)
    with chdir(tmp_path):
        assert call_stage([*STAGES[artifact], "--workers", "1"], *changes) == 0
    assert published == read_bytes(out)
