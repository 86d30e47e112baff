"""Fixtures: a run that is all manifests, and a folder without anything recorded."""

from pathlib import Path

import pytest

from tests.vla_opd.lineage.manifests import publish
from vla_opd.lineage import provenance


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of one iteration, whose demonstrations are missing."""
    run = tmp_path / "artifacts" / "one"
    missing = {"demonstrations": "0" * 64}
    teacher = publish(run / "checkpoints/teacher", "checkpoint", missing, name="teacher", seed=0)
    student = publish(run / "checkpoints/student", "checkpoint", missing, name="student", seed=0)
    visited = publish(run / "trajectories/it001", "trajectories", {"student": student}, seed=0)
    labels = publish(run / "labels/it001", "labels", {"teacher": teacher, "trajectories": visited})
    publish(
        run / "checkpoints/it001",
        "checkpoint",
        {"student": student, "trajectories": visited, "labels": labels},
        seed=0,
    )
    publish(run / "evaluations/teacher", "evaluation", {"checkpoint": teacher})
    return run.parent


@pytest.fixture
def empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty folder, without dvc.lock and without a record of executions."""
    monkeypatch.chdir(tmp_path)
    provenance.locked_stages.cache_clear()
