"""Shapes and types are checked where tensors are: jaxtyping's annotations in these modules are enforced by beartype. Nowhere else."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are slow as a whole come first, so that at the end no worker waits for another's; what needs a GPU is skipped without one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(
        key=lambda item: (
            not any(mark.name == "slow" for mark in item.getparent(pytest.Module).own_markers)
        )
    )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest whole run, made once by one worker; tests copy what they change."""
    from tests.small_run import make_run  # brings the stages, which must come after the hook

    return make_run(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def small(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts of a copy of the smallest whole run; the test stands in it."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifacts/small"
