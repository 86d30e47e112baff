"""Fixtures: a toy project, a clone of one, and a run that is all manifests."""

import shutil
from pathlib import Path

import pytest

from tests.flows.manifests import publish
from tests.flows.toy import REFERENCE, Toy, make_toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A fresh toy project; the test stands in it."""
    folder = tmp_path / "toy"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return make_toy(folder)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a toy project whose reference (and nothing else) was made and committed."""
    folder = tmp_path_factory.mktemp("reference")
    made = folder / "made"
    made.mkdir()
    original = make_toy(made)
    original.dvc("repro", *REFERENCE)
    return original.clone(folder / "clone").folder


@pytest.fixture
def clone(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A copy of that clone, for one test to stand in."""
    folder = tmp_path / "clone"
    shutil.copytree(reference, folder)
    monkeypatch.chdir(folder)
    return Toy(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of one iteration: teacher and student come from demonstrations that aren't here."""
    run = tmp_path / "artifacts" / "one"
    gone = {"demonstrations": "0" * 64}
    teacher = publish(run / "checkpoints/teacher", "checkpoint", gone, name="teacher", seed=0)
    student = publish(run / "checkpoints/student", "checkpoint", gone, name="student", seed=0)
    visited = publish(run / "trajectories/it001", "trajectories", {"student": student}, seed=0)
    labels = publish(run / "logits/it001", "logits", {"teacher": teacher, "trajectories": visited})
    publish(run / "checkpoints/it001", "checkpoint", {"student": student, "trajectories": visited, "logits": labels}, seed=0)
    publish(run / "evaluations/teacher", "evaluation", {"checkpoint": teacher})
    return run.parent
