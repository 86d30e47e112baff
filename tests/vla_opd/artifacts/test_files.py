"""File operations on artifacts."""

from pathlib import Path

import pytest

from vla_opd.artifacts.files import link


def test_a_link_never_replaces_a_file(tmp_path: Path) -> None:
    """The file may itself be a link into another artifact, which would be overwritten."""
    (tmp_path / "one").write_text("one")
    (tmp_path / "two").write_text("two")
    with pytest.raises(FileExistsError):
        link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "two"
    link(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").samefile(tmp_path / "one")
