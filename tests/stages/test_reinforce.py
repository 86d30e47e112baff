"""reinforce: which groups it learns from, whose rollouts it takes, and its schedule."""

import json
from pathlib import Path

import pytest
import safetensors.numpy
import torch

from tests.small_run import STAGES, call_stage
from vla_opd.learning.update import MOMENTS
from vla_opd.policies.checkpoint import open_checkpoint

REINFORCE = STAGES["checkpoints/rl001"]


def test_groups_are_kept_by_the_settings_they_were_explored_with(small: Path) -> None:
    manifest = small / "checkpoints/rl001/manifest.json"
    before = manifest.read_bytes()
    (small / "checkpoints/rl001").rename(small / "aside")
    assert call_stage(REINFORCE, "explore.keep_low=0", "explore.keep_high=1") == 0
    assert manifest.read_bytes() == before


def test_trajectories_of_another_student_are_refused(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_stage(REINFORCE, "reinforcements.rl001=student") == 2
    sampler = open_checkpoint(small / "checkpoints/it001").digest[:12]
    student = open_checkpoint(small / "checkpoints/student").digest[:12]
    message = f"trajectories/rl001: sampled by {sampler}; expected {student}, the student in"
    assert message in capsys.readouterr().err


def test_moments_continue_only_from_an_iteration_of_the_same_kind(small: Path) -> None:
    assert (small / "checkpoints/it001" / MOMENTS).is_file()
    lines = (small / "checkpoints/rl001/metrics.jsonl").read_text().splitlines()
    # The beginning of its own schedule.
    assert json.loads(lines[0])["learning_rate"] == pytest.approx(1e-4)
    assert steps_in(small / "checkpoints/rl001" / MOMENTS) == {12.0}
    for verb in ("explore", "reinforce"):
        assert call_stage([verb, "--iteration", "rl002"], "reinforcements.rl002=rl001") == 0
    assert steps_in(small / "checkpoints/rl002" / MOMENTS) == {24.0}


def steps_in(path: Path) -> set[float]:
    """Return the numbers of steps behind the moments."""
    moments = safetensors.numpy.load_file(path)
    return {float(value) for name, value in moments.items() if name.endswith("/step")}


def test_without_a_group_to_learn_from_the_student_stays_as_it_is(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("explore.keep_low=0.99", "explore.keep_high=0.995", "explore.rounds=1")
    for name in ("trajectories/rl001", "checkpoints/rl001"):
        assert call_stage(STAGES[name], *settings) == 0
    message = (
        "reinforce rl001: no state to learn from (keep_low, keep_high, recoverable); "
        "the student stays as it is"
    )
    assert message in capsys.readouterr().err
    before = open_checkpoint(small / "checkpoints/it001").weights()
    made = open_checkpoint(small / "checkpoints/rl001")
    after = made.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert made.manifest.facts["states"] == 0
