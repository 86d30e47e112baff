"""optimize: the states it learns from, the anchor, and what it refuses."""

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_run import STAGES, call_stage
from vla_opd.artifacts.manifest import Manifest, read_manifest
from vla_opd.policies.checkpoint import Checkpoint, open_checkpoint
from vla_opd.policies.load import load_policy

OPTIMIZE = STAGES["checkpoints/it001"]


def read_metrics(root: Path) -> list[dict[str, float]]:
    text = (root / "checkpoints/it001/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        [
            "optimize.objective=mixed",
            "optimize.objective.distill=0.5",
            "optimize.objective.keep_low=0",
            "optimize.objective.keep_high=1",
        ],
        [
            "optimize.objective=reverse_kl_rollout",
            "optimize.objective.ratio=true",
            "optimize.objective.centre=true",
            "optimize.objective.clamp=0.001",
        ],
    ],
)
def test_objectives_on_decisions_train_on_a_real_run(small: Path, settings: list[str]) -> None:
    assert call_stage(OPTIMIZE, *settings) == 0
    rows = read_metrics(small)
    assert len(rows) == 24
    if "optimize.objective=mixed" in settings:
        assert rows[0]["clip_fraction"] == 0
    else:
        assert rows[0]["clamp_fraction"] > 0.5


def test_the_teachers_rollouts_are_not_taken_for_the_students(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small.is_dir()
    for name in ("trajectories/it001", "labels/it001"):
        assert call_stage(STAGES[name], "sample.visited_by=teacher") == 0
    capsys.readouterr()
    assert call_stage(OPTIMIZE, "optimize.objective=mixed") == 2
    message = (
        "the teacher acted (sample.visited_by); expected the student, "
        "whose own tokens mixed learns from"
    )
    assert message in capsys.readouterr().err


def test_without_a_group_to_learn_from_the_student_stays_as_it_is(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "optimize.objective=mixed",
        "optimize.objective.distill=0",
        "optimize.objective.keep_low=0.99",
        "optimize.objective.keep_high=0.995",
    )
    assert call_stage(OPTIMIZE, *settings) == 0
    message = (
        "no state to learn from (keep_low, keep_high, recoverable); the student stays as it is"
    )
    assert message in capsys.readouterr().err
    before = open_checkpoint(small / "checkpoints/student").weights()
    after = open_checkpoint(small / "checkpoints/it001").weights()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_anchor_is_a_parent_and_gone_before_the_student_is_loaded(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def load(checkpoint: Checkpoint, device: str) -> Any:
        assert all(reference() is None for reference in loaded)
        policy = load_policy(checkpoint, device)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr("stages.optimize.load_policy", load)
    assert call_stage(OPTIMIZE, "optimize.anchor=0.1") == 0
    assert len(loaded) == 2
    student = open_checkpoint(small / "checkpoints/student")
    parents = open_checkpoint(small / "checkpoints/it001").manifest.parents
    assert parents["anchor"] == student.digest
    rows = read_metrics(small)
    # At first the student is the anchor.
    assert rows[0]["anchor_kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["anchor_kl"] > 1e-3


def test_the_number_of_states_to_learn_from_can_be_set(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_stage(OPTIMIZE, "optimize.states=50") == 0
    facts = open_checkpoint(small / "checkpoints/it001").manifest.facts
    assert facts["learnt_from"] == 50 < facts["states"]
    capsys.readouterr()
    assert call_stage(OPTIMIZE, "optimize.states=100000") == 2
    message = (
        f"optimize.states is 100000; expected at most {facts['states']}, "
        "the number of states to learn from"
    )
    assert message in capsys.readouterr().err


def call_it002(verb: str, *settings: str) -> int:
    """Run a stage for a second iteration."""
    return call_stage([verb, "--iteration", "it002"], "iterations.it002=it001", *settings)


def optimize_it002(root: Path, *settings: str) -> Manifest:
    assert call_it002("optimize", *settings) == 0
    return read_manifest(root / "checkpoints/it002", "checkpoint")


def test_earlier_iterations_states_are_learned_from_too_with_optimize_earlier(small: Path) -> None:
    assert call_it002("sample") == 0
    assert call_it002("label") == 0
    single = optimize_it002(small)
    both = optimize_it002(small, "optimize.earlier=1")
    before = read_manifest(small / "checkpoints/it001", "checkpoint")
    for count in ("states", "learnt_from"):
        assert both.facts[count] == single.facts[count] + before.facts[count]
    # What is measured is measured on this iteration's states.
    for measured in ("before", "failed_share"):
        assert both.facts[measured] == single.facts[measured]
    assert both.files["model.safetensors"] != single.files["model.safetensors"]
    more = optimize_it002(small, "optimize.earlier=5")  # but there is only one
    assert more.files["model.safetensors"] == both.files["model.safetensors"]
    limit = both.facts["learnt_from"]
    assert call_it002("optimize", "optimize.earlier=1", f"optimize.states={limit}") == 0


def test_earlier_iterations_are_refused_if_they_changed_or_are_missing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_it002("sample") == 0
    assert call_it002("label") == 0
    assert call_stage(STAGES["labels/it001"], "iterations.it002=it001", "label.dtype=float32") == 0
    assert call_it002("optimize", "optimize.earlier=1") == 2
    message = r"labels/it001: is \w{12}; expected \w{12}, which \S+checkpoints/it001 learned from"
    assert re.search(message, capsys.readouterr().err)
    shutil.rmtree(small / "trajectories/it001")
    assert call_it002("optimize", "optimize.earlier=1") == 2
    message = (
        "trajectories/it001: no manifest.json; expected a complete artifact of kind 'trajectories'"
    )
    assert message in capsys.readouterr().err
    assert call_it002("optimize", "optimize.earlier=1", "optimize.objective=mixed") == 2
    message = "optimize.earlier is 1; expected 0 with optimize.objective mixed"
    assert message in capsys.readouterr().err
