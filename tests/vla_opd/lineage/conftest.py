"""Fixture: a run that is all manifests."""

from pathlib import Path

import pytest

from tests.vla_opd.lineage.manifests import publish


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of one iteration: teacher and student come from demonstrations that aren't here."""
    run = tmp_path / "artifacts" / "one"
    gone = {"demonstrations": "0" * 64}
    teacher = publish(run / "checkpoints/teacher", "checkpoint", gone, name="teacher", seed=0)
    student = publish(run / "checkpoints/student", "checkpoint", gone, name="student", seed=0)
    visited = publish(run / "trajectories/it001", "trajectories", {"student": student}, seed=0)
    labels = publish(run / "logits/it001", "logits", {"teacher": teacher, "trajectories": visited})
    publish(
        run / "checkpoints/it001",
        "checkpoint",
        {"student": student, "trajectories": visited, "logits": labels},
        seed=0,
    )
    publish(run / "evaluations/teacher", "evaluation", {"checkpoint": teacher})
    return run.parent
