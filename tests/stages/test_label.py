"""label: by the teacher or by an expert, and how later stages use it."""

import re
from pathlib import Path

import numpy as np
import pytest

from stages import label
from tests.small_run import STAGES, call_stage, read_bytes
from tests.vla_opd import small as tiny
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.analysis.finished_run import Run, read_run
from vla_opd.analysis.study_table import member_rows
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.data.labels import Labels, read_outcome, read_shard, write_shard
from vla_opd.data.trajectory import read_states, shards
from vla_opd.learning.bin_transfer import between
from vla_opd.learning.distillation import read_batch
from vla_opd.machine.host import Host
from vla_opd.pages.report_page import render
from vla_opd.params.load import load
from vla_opd.params.stages import EnvironmentParams, LabelParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy

LABEL = STAGES["labels/it001"]
OPTIMIZE = STAGES["checkpoints/it001"]
EXPERT = "label.expert=tests.out_of_tree:expert"


def test_trajectories_of_another_camera_order_are_refused(tmp_path: Path) -> None:
    weights = build_policy(tiny.FACTS).state_dict()
    publish(tmp_path / "teacher", weights, {"checkpoint": tiny.FACTS.model_dump()})
    cameras = tiny.ENVIRONMENT.cameras[::-1]
    swapped = EnvironmentParams(**tiny.ENVIRONMENT.model_dump() | {"cameras": cameras})
    recorded = {"environment": swapped.model_dump()}
    with draft(tmp_path / "trajectories", "trajectories", {}, recorded) as work:
        work.publish({"action_space": tiny.SPACE.digest, "states": 0})
    message = (
        r"environment\.cameras is \('side', 'front'\); expected \('front', 'side'\), "
        r"which .*teacher was trained with"
    )
    with pytest.raises(ValueError, match=message):
        label.run(
            run="test",
            settings=LabelParams(),
            teacher=tmp_path / "teacher",
            trajectories=tmp_path / "trajectories",
            out=tmp_path / "labels",
            host=Host(),
        )
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("setting", [EXPERT, "label.recover_every=3"])
def test_simulated_labels_are_the_same_with_two_workers_and_after_a_kill(
    small: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call_stage([*LABEL, "--workers", "1"], setting) == 0
    expected = read_bytes(small / "labels/it001")
    two_workers = [*LABEL, "--workers", "2"]
    with monkeypatch.context() as patch:
        written: list[str] = []

        def write_two(path: Path, labels: Labels) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path.name)
            write_shard(path, labels)

        patch.setattr(label, "write_shard", write_two)
        with pytest.raises(KeyboardInterrupt):
            call_stage(two_workers, setting)
        assert len(list((small / "labels/.it001.draft").glob("shard-*"))) == 2
    assert call_stage(two_workers, setting) == 0
    assert read_bytes(small / "labels/it001") == expected


def read_distillation(root: Path, *settings: str) -> Run:
    """Read the run as a report does, without its iterations of GRPO."""
    params = load("params.yaml", list(settings)).model_copy(update={"reinforcements": {}})
    return read_run(params, root)


def test_the_student_learns_from_the_experts_labels_and_the_report_names_it(small: Path) -> None:
    assert call_stage(LABEL, EXPERT) == 0
    manifest = read_manifest(small / "labels/it001", "labels")
    assert manifest.params["label"]["expert"] == "tests.out_of_tree:expert"
    visited = read_manifest(small / "trajectories/it001", "trajectories")
    assert manifest.facts["teacher_queries"] == visited.facts["states"]
    assert call_stage(OPTIMIZE, "optimize.objective=forward_kl") == 0
    assert call_stage(STAGES["evaluations/final"]) == 0
    run = read_distillation(small, EXPERT)
    assert (
        "Labeled by a scripted expert</strong> "
        "(<code>label.expert: tests.out_of_tree:expert</code>)"
    ) in render(run)
    row = member_rows(run, "dagger", 0, {}).updates[0]
    assert row.reverse_kl_before is None
    assert row.teacher_entropy_after is None
    assert row.failed_share is not None
    assert row.student_entropy_after > 0
    facts = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert facts["after"]["forward_kl"] < 0.8 * facts["before"]["forward_kl"]


def test_the_bins_of_a_teacher_with_other_statistics_are_transferred_on_demand(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = open_checkpoint(small / "checkpoints/teacher")
    student_space = teacher.facts.action_space
    wider = {
        "q01": tuple(q - 0.1 for q in student_space.q01),
        "q99": tuple(q + 0.2 for q in student_space.q99),
    }
    teacher_space = student_space.model_copy(update=wider)
    facts = teacher.facts.model_copy(update={"action_space": teacher_space})
    publish(small / "checkpoints/teacher", teacher.weights(), {"checkpoint": facts.model_dump()})
    assert call_stage(LABEL) == 2
    message = f"expected the teacher's, {teacher_space.digest[:12]} (or label.transfer true)"
    assert message in capsys.readouterr().err

    assert call_stage(LABEL, "label.transfer=true") == 0
    trajectories = small / "trajectories/it001"
    stored: list[np.ndarray] = []
    for path in shards(small / "labels/it001"):
        states = len(read_states([trajectories / path.name]))
        stored.append(read_shard(path, states).log_probs)
    log_probs = np.concatenate(stored)
    transfer = between(teacher_space, student_space)
    assert transfer is not None
    settings = load("params.yaml").optimize
    moved = read_batch(trajectories, small / "labels/it001", student_space, settings).teacher
    np.testing.assert_array_equal(moved, transfer(log_probs))
    assert np.abs(np.exp(moved) - np.exp(log_probs.astype(np.float32))).max() > 0.1

    assert call_stage(OPTIMIZE, "label.transfer=true") == 0
    result = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert result["transferred_from"] == teacher_space.digest
    assert 0 < result["after"]["reverse_kl"] < 0.8 * result["before"]["reverse_kl"]
    assert open_checkpoint(small / "checkpoints/it001").facts.action_space == student_space


def test_only_recoverable_states_are_learned_from_with_optimize_recoverable(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("label.recover_every=2", "optimize.recoverable=true")
    assert call_stage(LABEL) == 0
    assert call_stage(OPTIMIZE, *settings) == 2
    message = (
        "it001: has no record of the states from which the teacher still succeeds; "
        "expected labels made with label.recover_every"
    )
    assert message in capsys.readouterr().err

    assert call_stage(LABEL, "label.recover_every=2") == 0
    labels = read_manifest(small / "labels/it001", "labels").facts
    outcomes = [read_outcome(path)[1] for path in shards(small / "labels/it001")]
    recoverable = np.concatenate([states for states in outcomes if states is not None])
    assert labels["recoverable"] == recoverable.mean()
    assert 0 < labels["recoverable"] < 1
    visited = read_manifest(small / "trajectories/it001", "trajectories").facts
    assert labels["env_steps"] > 0
    assert labels["teacher_queries"] > visited["states"]
    assert call_stage(OPTIMIZE, *settings) == 0
    trained = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert trained["learnt_from"] == recoverable.sum()

    assert call_stage(STAGES["evaluations/final"]) == 0
    run = read_distillation(small)
    assert run.results.iterations[0].recoverable == labels["recoverable"]
    assert run.results.env_steps == visited["env_steps"] + labels["env_steps"]
    page = render(run)
    assert "<b>Recoverable</b>: fraction of states from which the teacher still succeeds" in page
    # Its cell is followed by that of the gradient's norm.
    cell = f'<td class="number">{labels["recoverable"]:.1%}</td>'
    assert re.search(rf'{re.escape(cell)}\s*<td class="number">', page)
    assert "Labeled by a scripted expert" not in page
