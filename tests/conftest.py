"""Fixtures, and checks of shapes: beartype enforces the annotations of the modules `CHECKED`."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = [
    "analysis.comparison",
    "data.action_space",
    "data.labels",
    "data.trajectory",
    "data.zarr_zip",
    "learning.decisions",
    "learning.objectives",
    "policies.checkpoint",
]

install_import_hook([f"vla_opd.{module}" for module in CHECKED], "beartype.beartype")

# Stages in this process sum in the order of stages in processes of their own. MKL reads it once.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that no worker waits for another's at the end; skip GPU tests."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

    def is_in_fast_file(item: pytest.Item) -> bool:
        module = item.getparent(pytest.Module)
        return all(mark.name != "slow" for mark in module.own_markers)

    items.sort(key=is_in_fast_file)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest whole run, made once by one worker; tests copy what they change."""
    from tests.small_run import make_run  # imports the stages, which must come after the hook

    return make_run(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def small(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts of a copy of the smallest whole run, the test's working directory."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifacts/small"
