"""Damaged artifacts are detected, nothing is made from them, and shards are remade."""

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.small_run import STAGES, call_stage, read_bytes, run_stage
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import MANIFEST, Kind, Manifest, open_artifact
from vla_opd.data.trajectory import shards
from vla_opd.policies.checkpoint import WEIGHTS, save_weights

# The artifacts whose files each stage reads. Of trajectories and labels a report reads only the
# manifests.
INPUTS = {
    "checkpoints/student": ["demonstrations/main", "checkpoints/teacher"],
    "trajectories/it001": ["checkpoints/student", "checkpoints/teacher"],
    "labels/it001": ["trajectories/it001", "checkpoints/teacher"],
    "checkpoints/it001": ["checkpoints/student", "trajectories/it001", "labels/it001"],
    "trajectories/rl001": ["checkpoints/it001"],
    "checkpoints/rl001": ["checkpoints/it001", "trajectories/rl001"],
    "evaluations/final": ["checkpoints/it001"],
    "report/page": [
        "evaluations/start",
        "evaluations/final",
        "evaluations/teacher",
        "checkpoints/it001",
        "checkpoints/rl001",
    ],
}
SEED = "KILL_SEED"  # the environment variable that repeats the flips of an earlier test run


def flip(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@contextmanager
def flipped(folder: Path, generator: random.Random) -> Iterator[str]:
    """Flip one bit of one of an artifact's files, and restore it. Yields which.

    Three times in ten it is in the manifest.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = folder / MANIFEST if generator.random() < 0.3 else generator.choice(files)
    content = path.read_bytes()
    bit = generator.randrange(8 * len(content))
    path.write_bytes(flip(content, bit))
    try:
        yield f"bit {bit} of {path.relative_to(folder.parents[1])}"
    finally:
        path.write_bytes(content)


def kind_of(folder: Path) -> Kind:
    return Manifest.model_validate_json((folder / MANIFEST).read_text()).kind


def test_every_flipped_bit_is_detected(small: Path) -> None:
    """In shards, weights, labels, evaluations, the report and manifests."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    flips = int(os.environ.get("FLIPS") or 300)
    generator = random.Random(seed)  # noqa: S311 - no secret
    kinds = {small / name: kind_of(small / name) for name in STAGES}
    for _ in range(flips):
        folder = generator.choice(sorted(kinds))
        refused = pytest.raises(ValueError, match=re.escape(str(folder)))
        with flipped(folder, generator) as place, refused:
            print(f"{SEED}={seed}: {place}")
            open_artifact(folder, kinds[folder])
    for folder, kind in kinds.items():
        open_artifact(folder, kind)


@pytest.mark.parametrize(("artifact", "inputs"), INPUTS.items())
def test_nothing_is_made_from_a_corrupt_artifact(
    small: Path, capsys: pytest.CaptureFixture[str], artifact: str, inputs: list[str]
) -> None:
    """The stage names the damaged input, replaces nothing, and leaves no draft."""
    out = small / artifact
    before = read_bytes(out)
    for name in inputs:
        with flipped(small / name, random.Random(name)):  # noqa: S311
            assert call_stage(STAGES[artifact]) == 2
        assert f"small/{name}" in capsys.readouterr().err
    assert read_bytes(out) == before
    assert not out.with_name(f".{out.name}.draft").exists()


@pytest.mark.parametrize("artifact", ["trajectories/it001", "labels/it001"])
def test_a_corrupt_shard_is_remade_with_the_same_bytes(
    undisturbed: Path, small: Path, artifact: str
) -> None:
    shard = shards(small / artifact)[0]
    content = shard.read_bytes()
    shard.write_bytes(flip(content, len(content) * 4))
    run_stage(small.parents[1], STAGES[artifact], workers=1)
    assert read_bytes(small / artifact) == read_bytes(undisturbed / "artifacts/small" / artifact)


def publish_with_nan(folder: Path) -> None:
    """Publish the checkpoint again with one weight that is not a number."""
    checkpoint = open_artifact(folder, "checkpoint")
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    weights["placeholder"][0, 0] = torch.nan
    with draft(folder, "checkpoint", checkpoint.parents, checkpoint.params) as work:
        with work.part(WEIGHTS) as path:
            save_weights(path, weights)
        work.publish(checkpoint.facts)


@pytest.mark.parametrize(
    ("artifact", "policy", "message"),
    [
        ("labels/it001", "teacher", "log-probabilities of"),
        ("trajectories/it001", "student", "logits after"),
    ],
)
def test_a_policy_whose_numbers_are_not_finite_stops_the_stage(
    small: Path, capsys: pytest.CaptureFixture[str], artifact: str, policy: str, message: str
) -> None:
    """Its checkpoint is valid as a file. The stage reports one message and replaces nothing."""
    publish_with_nan(small / "checkpoints" / policy)
    if policy == "student":
        shutil.rmtree(small / artifact)
    before = read_bytes(small / artifact)
    assert call_stage(STAGES[artifact]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "not finite" in error
    assert "Traceback" not in error
    assert read_bytes(small / artifact) == before
