"""Fixtures of the tests of `vla_opd.params`."""

from pathlib import Path

import pytest

from tests.vla_opd.params.minimal import MINIMAL


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A folder's params.yaml with the smallest run."""
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL)
    return path
