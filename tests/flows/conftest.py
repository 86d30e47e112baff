"""Fixtures: a toy project, and a clone of one."""

import shutil
from pathlib import Path

import pytest

from tests.flows.toy import REFERENCE, Toy, make_toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A fresh toy project, the test's working directory."""
    folder = tmp_path / "toy"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return make_toy(folder)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a toy project whose reference (and nothing else) was made and committed."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "original").mkdir()
    original = make_toy(folder / "original")
    original.dvc("repro", *REFERENCE)
    return original.clone(folder / "clone").folder


@pytest.fixture
def clone(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A copy of that clone, the test's working directory."""
    folder = tmp_path / "clone"
    shutil.copytree(reference, folder)
    monkeypatch.chdir(folder)
    return Toy(folder)
